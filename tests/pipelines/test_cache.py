"""A cache gives back what was put in, to all processes, or nothing; and its disk space is given back as asked."""

import errno
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import cache as caching
from pipelines.cache import Cache
from pipelines.errors import UserError
from pipelines.scanning import scan
from pipelines.store import aligned
from tests.full_disk import files_no_larger_than

FORK = multiprocessing.get_context("fork")
N = 120


def pixels(row, shape):
    """What every process holds an image to be."""
    return np.random.default_rng(row).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for i, (height, width) in enumerate(np.random.default_rng(1).integers(20, 90, (N, 2))):
        path = root / f"class{i % 2}" / f"{i}.bmp"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (width, height)).save(path)
    return scan(root)


def shape(manifest, row):
    return (int(manifest.heights_N[row]), int(manifest.widths_N[row]), 3)


def fill(cache, manifest, rows):
    for row in rows:
        cache.put(row, pixels(row, shape(manifest, row)))


def agree(cache, manifest):
    """Check all that is there; how many rows that is."""
    there = [row for row in range(N) if cache.get(row) is not None]
    for row in there:
        np.testing.assert_array_equal(cache.get(row), pixels(row, shape(manifest, row)))
    return len(there)


def in_process(work, *arguments):
    process = FORK.Process(target=work, args=arguments)
    process.start()
    return process


def test_what_is_put_is_got_as_a_view(manifest, tmp_path):
    with Cache.open(manifest, parent=tmp_path) as cache:
        assert (cache.capacity, len(cache)) == (N, 0)
        assert cache.get(3) is None
        assert cache.wants(3)
        fill(cache, manifest, range(0, N, 2))
        assert agree(cache, manifest) == len(cache) == N // 2
        assert not cache.wants(4) and cache.wants(5)
        view = cache.get(4)
        assert not (view.flags.owndata or view.flags.writeable)
        assert view.ctypes.data % 64 == 0
    np.testing.assert_array_equal(view, pixels(4, shape(manifest, 4)))  # it outlives the files
    assert os.listdir(tmp_path) == []


def test_pixels_of_another_size_or_type_are_refused(manifest, tmp_path):
    with Cache.open(manifest, parent=tmp_path) as cache:
        right = pixels(3, shape(manifest, 3))
        for wrong in (right[1:], right.transpose(1, 0, 2), right.astype(np.float32)):
            with pytest.raises(ValueError, match="row 3 is uint8"):
                cache.put(3, wrong)
        assert cache.get(3) is None
        cache.put(3, np.asfortranarray(right))
        np.testing.assert_array_equal(cache.get(3), right)


def test_the_limit_holds_and_the_rows_under_it_are_always_the_same(manifest, tmp_path):
    kept = []
    needed = aligned(3 * manifest.heights_N.astype(int) * manifest.widths_N)
    limit = int(needed.sum()) // 3
    for name in ("one", "two"):
        with Cache.open(manifest, parent=tmp_path / name, limit=limit) as cache:
            fill(cache, manifest, range(N) if name == "one" else range(N - 1, -1, -1))
            kept.append([row for row in range(N) if cache.get(row) is not None])
            assert agree(cache, manifest) == cache.capacity == len(kept[-1])
            assert not any(cache.wants(row) for row in range(N))
            used = sum(file.stat().st_blocks * 512 for file in cache.folder.glob("pixels*"))
    assert kept[0] == kept[1]
    total = needed[kept[0]].sum()
    assert limit - needed.max() < total <= limit
    assert used <= limit + 4096
    assert max(np.diff(kept[0])) > 1  # not the first rows, which may be all of one class
    with Cache.open(manifest, parent=tmp_path / "none", limit=0) as cache:
        fill(cache, manifest, range(N))
        assert (cache.capacity, len(cache)) == (0, 0)


def test_what_is_not_there_takes_no_space(manifest, tmp_path):
    large = replace(manifest, heights_N=manifest.heights_N * 100, widths_N=manifest.widths_N * 10)
    with Cache.open(large, parent=tmp_path, limit=2**40) as cache:
        (file,) = cache.folder.glob("pixels*")
        assert file.stat().st_size > 10**9
        assert file.stat().st_blocks * 512 < 10**5


def read_and_write(manifest, parent, seed):
    """A worker: it reads and writes all rows in an order of its own, and sees nothing but whole images."""
    with Cache.open(manifest, parent=parent) as cache:
        for row in np.random.default_rng(seed).permutation(N).tolist() * 2:
            expected = pixels(row, shape(manifest, row))
            view = cache.get(row)
            if view is None:
                cache.put(row, expected)
                view = cache.get(row)
            np.testing.assert_array_equal(view, expected)
        assert len(cache) == N


def test_several_processes_fill_one_cache_and_the_last_removes_it(manifest, tmp_path):
    for _ in range(3):  # opened, filled and removed anew
        workers = [in_process(read_and_write, manifest, tmp_path, seed) for seed in range(4)]
        for worker in workers:
            worker.join()
        assert [worker.exitcode for worker in workers] == [0] * 4
        assert os.listdir(tmp_path) == []


def open_and_close(manifest, parent, times):
    for _ in range(times):
        with Cache.open(manifest, parent=parent) as cache:
            fill(cache, manifest, range(3))
            assert agree(cache, manifest) >= 3


def test_opening_while_others_close(manifest, tmp_path):
    workers = [in_process(open_and_close, manifest, tmp_path, 40) for _ in range(4)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert os.listdir(tmp_path) == []


def test_a_cache_that_goes_as_another_is_about_to_join_it_is_made_anew(manifest, tmp_path, monkeypatch):
    seen = []

    def removed_at_once(path, *rest):
        if path != tmp_path:
            seen.append(path)
        if seen == [path]:
            raise FileExistsError(errno.EEXIST, "File exists", path)
        mkdir(path, *rest)

    mkdir = os.mkdir
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", removed_at_once)
        cache = Cache.open(manifest, parent=tmp_path)
    with cache:
        fill(cache, manifest, range(N))
        assert agree(cache, manifest) == N
    assert seen == [cache.folder] * 2


def write_until_killed(manifest, parent):
    with Cache.open(manifest, parent=parent) as cache:
        while True:
            fill(cache, manifest, range(N))
            os.pwrite(cache._complete_file, bytes(N), 0)  # as if nothing were there: it writes on and on


def test_a_killed_writer_leaves_whole_images_and_no_lock(manifest, tmp_path):
    for _ in range(3):
        writer = in_process(write_until_killed, manifest, tmp_path)
        while not list(tmp_path.glob("*/cache.json")):
            assert writer.is_alive()
            time.sleep(0.001)
        time.sleep(0.03)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
    cache = Cache.open(manifest, parent=tmp_path)  # what was left is used
    agree(cache, manifest)
    fill(cache, manifest, range(N))
    assert agree(cache, manifest) == N
    cache.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["_pixels_file", "_complete_file"])
def test_a_writer_that_dies_before_the_end_leaves_the_row_absent(manifest, tmp_path, monkeypatch, name):
    cache, other = Cache.open(manifest, parent=tmp_path), Cache.open(manifest, parent=tmp_path)
    write = caching._write

    def die(descriptor, data, offset):
        if descriptor == getattr(cache, name):
            raise KeyboardInterrupt
        write(descriptor, data, offset)

    with cache, other:
        monkeypatch.setattr(caching, "_write", die)
        with pytest.raises(KeyboardInterrupt):
            fill(cache, manifest, [7])
        monkeypatch.undo()
        assert cache.get(7) is other.get(7) is None
        fill(other, manifest, [7])
        np.testing.assert_array_equal(cache.get(7), pixels(7, shape(manifest, 7)))


def leave(manifest, parent, keep):
    Cache.open(manifest, parent=parent, keep=keep)
    os._exit(0)


def test_what_a_killed_run_left_goes_when_another_begins_unless_it_was_to_be_kept(manifest, tmp_path):
    others = [replace(manifest, digest=f"other {i}") for i in range(2)]
    for other, keep in zip(others, (False, True), strict=True):
        in_process(leave, other, tmp_path, keep).join()
    living = Cache.open(replace(manifest, digest="living"), parent=tmp_path)
    assert len(os.listdir(tmp_path)) == 2  # the first is gone already
    with Cache.open(manifest, parent=tmp_path) as cache:
        folders = set(tmp_path.iterdir())
        assert len(folders) == 3 and {cache.folder, living.folder} < folders
    living.close()
    assert len(os.listdir(tmp_path)) == 1


def test_a_kept_cache_is_used_again(manifest, tmp_path):
    with Cache.open(manifest, parent=tmp_path, limit=10**6, keep=True) as cache:
        fill(cache, manifest, range(50))
        count, capacity = len(cache), cache.capacity
    with Cache.open(replace(manifest, valid_N=~manifest.valid_N), parent=tmp_path, keep=True) as again:
        assert again.folder == cache.folder
        assert (agree(again, manifest), again.capacity) == (count, capacity)
    with Cache.open(manifest, parent=tmp_path, limit=10**7, keep=True) as wider:
        assert (len(wider), wider.capacity) == (0, N)
        fill(wider, manifest, range(N))
    with Cache.open(manifest, parent=tmp_path) as last:
        assert agree(last, manifest) == N
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "change", [{"digest": "x"}, {"root": Path("/other")}, {"paths": ("x", *map(str, range(1, N)))}]
)
def test_other_images_have_another_cache(manifest, tmp_path, change):
    with (
        Cache.open(manifest, parent=tmp_path) as cache,
        Cache.open(replace(manifest, **change), parent=tmp_path) as two,
    ):
        fill(cache, manifest, range(N))
        assert len(two) == 0


def test_a_kept_cache_that_is_not_what_it_was_is_made_anew(manifest, tmp_path, monkeypatch):
    def kept():
        with Cache.open(manifest, parent=tmp_path, keep=True) as cache:
            fill(cache, manifest, range(N))
        return cache.folder

    folder = kept()
    for name in ("pixels.bin", "complete.bin", "index.npy"):
        os.truncate(folder / name, 50)
        assert filled(manifest, tmp_path) == 0
        kept()
    (folder / "cache.json").write_text("[")
    assert filled(manifest, tmp_path) == 0
    kept()
    monkeypatch.setattr(caching, "_boot", lambda: "the next")
    assert filled(manifest, tmp_path) == N  # closed in order, and on the disk
    in_process(leave, manifest, tmp_path, True).join()
    assert filled(manifest, tmp_path) == N  # killed, but the machine lives: so does its page cache
    in_process(leave, manifest, tmp_path, True).join()
    monkeypatch.setattr(caching, "_boot", lambda: "the one after a power cut")
    assert filled(manifest, tmp_path) == 0


def filled(manifest, parent):
    with Cache.open(manifest, parent=parent, keep=True) as cache:
        return len(cache)


def test_one_limit_at_a_time(manifest, tmp_path):
    with Cache.open(manifest, parent=tmp_path, limit=10**5) as cache:
        with pytest.raises(UserError, match=r"in use with a limit of 100,000 bytes.*--cache-limit"):
            Cache.open(manifest, parent=tmp_path, limit=10**6)
        with Cache.open(manifest, parent=tmp_path) as other:
            assert other.capacity == cache.capacity


def test_a_full_disk_stops_the_cache_and_nothing_else(manifest, tmp_path):
    told = []
    with (
        Cache.open(manifest, parent=tmp_path, warn=told.append) as cache,
        Cache.open(manifest, parent=tmp_path) as other,
    ):
        with files_no_larger_than(300_000):
            fill(cache, manifest, range(N))
        (message,) = told
        assert os.strerror(errno.EFBIG) in message and str(tmp_path) in message
        assert 0 < agree(cache, manifest) < N
        assert not any(cache.wants(row) for row in range(N))
        assert agree(other, manifest) == len(cache)
        assert other.wants(N - 1)


def test_a_place_that_cannot_be_written(manifest, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written.*ONEWARP_CACHE"):
        Cache.open(manifest, parent=tmp_path / "file")
    with Cache.open(manifest, parent=tmp_path) as cache:
        folder = cache.folder
    folder.touch()
    with pytest.raises(UserError, match="Not a directory.*ONEWARP_CACHE"):
        Cache.open(manifest, parent=tmp_path)


def test_the_default_place_is_the_cache_folder(manifest, tmp_path, monkeypatch):
    monkeypatch.setenv("ONEWARP_CACHE", str(tmp_path / "here"))
    with Cache.open(manifest) as cache:
        assert cache.folder.parent == tmp_path / "here"
