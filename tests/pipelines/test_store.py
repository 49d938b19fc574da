"""A store gives back what was put in, from any process, and one that is not whole is refused."""

import json
import multiprocessing
import os
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import UserError
from pipelines.packing import pack
from pipelines.scanning import scan
from pipelines.store import INDEX, MANIFEST, META, Store, is_store


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    root = tmp_path_factory.mktemp("store") / "images"
    rng = np.random.default_rng(0)
    for i in range(7):
        path = root / "train" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 31 - i, 3), dtype=np.uint8)).save(path)
    shutil.copytree(root / "train", root / "valid")
    return scan(root)


@pytest.fixture(scope="module")
def packed(manifest, tmp_path_factory):
    return pack(manifest, tmp_path_factory.mktemp("packed") / "store", kind="decoded").folder


@pytest.fixture
def folder(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "moved")


def same_pixels(store, manifest):
    for row, path in enumerate(manifest.paths):
        with Image.open(manifest.root / path) as image:
            np.testing.assert_array_equal(store.pixels(row), np.asarray(image))


def test_pixels_are_views_that_cannot_be_written_and_outlive_the_store(folder, manifest):
    store = Store.open(folder)
    same_pixels(store, manifest)
    views = [store.pixels(0), store.pixels(1)]
    expected = [view.copy() for view in views]
    assert not any(view.flags.owndata or view.flags.writeable for view in views)
    assert all(view.ctypes.data % 64 == 0 for view in views)
    assert 0 < views[1].ctypes.data - views[0].ctypes.data < views[0].nbytes + 64  # of one mapping
    del store
    shutil.rmtree(folder)
    np.testing.assert_array_equal(views[0], expected[0])
    np.testing.assert_array_equal(views[1], expected[1])


def test_the_manifest_says_where_the_store_is_now(folder, packed, manifest):
    assert Store.open(packed).manifest.store == packed
    there = Store.open(folder).manifest
    assert there.store == folder
    assert there.train.store == folder
    assert (there.paths, there.classes, there.quarantine) == (manifest.paths, manifest.classes, ())
    np.testing.assert_array_equal(there.labels_N, manifest.labels_N)
    np.testing.assert_array_equal(there.valid_N, manifest.valid_N)
    shapes = [Store.open(folder).pixels(row).shape for row in there.valid.ids_N]
    assert shapes == [(*size, 3) for size in zip(there.valid.heights_N, there.valid.widths_N, strict=True)]


def test_other_processes_read_it(folder, manifest):
    store = Store.open(folder)
    same_pixels(pickle.loads(pickle.dumps(store)), manifest)
    assert len(pickle.dumps(store)) < 1000
    processes = [multiprocessing.get_context("fork").Process(target=same_pixels, args=(store, manifest)) for _ in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def test_a_store_holds_one_kind(folder, manifest, tmp_path):
    with pytest.raises(ValueError, match="not encoded"):
        Store.open(folder).encoded(0)
    with pytest.raises(ValueError, match="not pixels"):
        pack(manifest, tmp_path / "encoded", kind="encoded").pixels(0)
    with pytest.raises(IndexError):
        Store.open(folder).pixels(len(manifest.paths))


def edit(file, change):
    data = bytearray(file.read_bytes())
    file.write_bytes(change(data))


def flip(at):
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def altered(**values):
    return lambda data: json.dumps(json.loads(data) | values).encode()


@pytest.mark.parametrize(
    ("spoil", "answer"),
    [
        (lambda f: (f / META).unlink(), f"{META}, which is written last, is missing. Copy it again, whole"),
        (lambda f: edit(f / META, lambda data: data[:50]), f"{META} was altered"),
        (lambda f: edit(f / META, lambda data: b"[]"), f"{META} was altered"),
        (lambda f: edit(f / META, altered(kind="encoded")), f"{META} was altered"),
        (lambda f: (f / INDEX).unlink(), f"{INDEX} is missing"),
        (lambda f: edit(f / INDEX, flip(-9)), f"{INDEX} was altered: its checksum differs"),
        (lambda f: (f / "shard-00000.bin").unlink(), "shard-00000.bin is missing"),
        (lambda f: os.truncate(f / "shard-00000.bin", 100), r"shard-00000.bin has 100 bytes instead of \d+,\d+"),
        (lambda f: (shutil.rmtree(f), f.mkdir()), "is no store: there is no store.json"),
        (lambda f: shutil.rmtree(f), "does not exist"),
    ],
)
def test_what_is_not_whole_is_refused(folder, spoil, answer):
    Store.open(folder)
    spoil(folder)
    with pytest.raises(UserError, match=answer) as caught:
        Store.open(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert is_store(folder) == (folder.exists() and any(folder.iterdir()))


def test_the_manifest_of_another_store_is_refused(folder, manifest, tmp_path):
    other = pack(manifest, tmp_path / "other", kind="encoded")
    shutil.copy(other.folder / MANIFEST, folder / MANIFEST)
    with pytest.raises(UserError, match="manifest.parquet is that of another store"):
        _ = Store.open(folder).manifest


def test_the_digest_tells_stores_apart(folder, packed, manifest, tmp_path):
    digest = Store.open(folder).digest
    assert digest == Store.open(packed).digest == Store.open(folder).manifest.digest
    assert digest != pack(manifest, tmp_path / "encoded", kind="encoded").digest
    assert digest != pack(manifest, tmp_path / "small", kind="decoded", short_side=16).digest


def test_a_folder_of_images_is_no_store(manifest):
    assert not is_store(manifest.root)
    assert not is_store(manifest.root / "nowhere")


def test_a_folder_with_arrays_among_its_images_is_no_store(tmp_path):
    (tmp_path / INDEX).touch()
    assert not is_store(tmp_path)
