"""What is in a store is what DALI decodes, or what the files hold; and there is a whole store or none."""

import errno
import io
import os
import shutil
import struct
from collections import namedtuple

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines import packing
from pipelines.decode import decoded
from pipelines.errors import UserError
from pipelines.labels import Regex
from pipelines.packing import pack
from pipelines.scanning import scan
from pipelines.store import Store
from tests.conftest import picture
from tests.full_disk import files_no_larger_than
from tests.hostile import good_files

NOT_UTF8 = os.fsdecode(b"latin-\xe9.jpg")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Every format that is read, each EXIF orientation in two of them, odd names, and two bad files."""
    scratch = tmp_path_factory.mktemp("pack")
    contents = good_files()
    contents[NOT_UTF8] = contents["plain.jpg"]
    rng = np.random.default_rng(3)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for suffix, form in (("jpg", "JPEG"), ("png", "PNG")):
            stream = io.BytesIO()
            picture(rng, 48, 90).save(stream, form, exif=exif)
            contents[f"turned {orientation}.{suffix}"] = stream.getvalue()
    root = scratch / "images"
    for part in ("train", "valid"):
        for kind, names in (("a", [*contents]), ("b", ["plain.jpg"])):
            (root / part / kind).mkdir(parents=True)
            for name in names:
                (root / part / kind / name).write_bytes(contents[name])
    (root / "train/a/bad.jpg").write_bytes(b"")
    (root / "train/a/cut.jpg").write_bytes(contents["plain.jpg"][:-50])
    return scan(root)


def file_of(manifest, row):
    return os.path.join(manifest.root, manifest.paths[row])


def test_decoded_pixels_are_those_that_dali_decodes(manifest, tmp_path):
    store = pack(manifest, tmp_path / "out", kind="decoded")
    assert NOT_UTF8 in {os.path.basename(path) for path in manifest.paths}
    assert len(store) == len(manifest.paths)
    for row in manifest.train.ids_N:  # validation holds the same files
        np.testing.assert_array_equal(store.pixels(row), decoded(file_of(manifest, row)), manifest.paths[row])
    turned = {store.pixels(row).shape[:2] for row, path in enumerate(manifest.paths) if "turned" in path}
    assert turned == {(48, 90), (90, 48)}
    assert store.manifest.paths == manifest.paths
    np.testing.assert_array_equal(store.manifest.heights_N, manifest.heights_N)
    assert store.manifest.heights_N.dtype == manifest.heights_N.dtype
    assert store.manifest.formats == manifest.formats


def test_encoded_bytes_are_those_of_the_files(manifest, tmp_path):
    store = pack(manifest, tmp_path / "out", kind="encoded")
    for row in range(len(store)):
        with open(file_of(manifest, row), "rb") as stream:
            assert store.encoded(row).tobytes() == stream.read()


def test_bad_files_are_listed_and_not_packed(manifest, tmp_path):
    store = pack(manifest, tmp_path / "out", kind="encoded")
    assert [bad.path for bad in store.manifest.quarantine] == ["train/a/bad.jpg", "train/a/cut.jpg"]
    assert store.manifest.quarantine == manifest.quarantine
    assert not {bad.path for bad in manifest.quarantine} & set(store.manifest.paths)


@pytest.mark.parametrize("kind", ["decoded", "encoded"])
def test_the_short_side_is_bounded(manifest, tmp_path, kind):
    store = pack(manifest, tmp_path / "out", kind=kind, short_side=44)
    there = store.manifest
    for row, path in enumerate(manifest.paths):
        before = manifest.heights_N[row], manifest.widths_N[row]
        if min(before) <= 44:
            assert (there.heights_N[row], there.widths_N[row]) == before
            if kind == "encoded":
                with open(file_of(manifest, row), "rb") as stream:
                    assert store.encoded(row).tobytes() == stream.read()
                assert there.formats[row] == manifest.formats[row]
            continue
        height, width = (44, 82) if before == (48, 90) else (82, 44)  # 44 / 48 * 90 = 82.5, to the even number
        assert (there.heights_N[row], there.widths_N[row]) == (height, width)
        with Image.open(file_of(manifest, row)) as image:
            expected = ImageOps.exif_transpose(image).resize((width, height), Image.Resampling.LANCZOS)
        if kind == "decoded":
            difference = store.pixels(row).astype(int) - np.asarray(expected)
            assert abs(difference).max() <= 2, path  # Pillow's and DALI's JPEG decoders may round apart
            continue
        with Image.open(io.BytesIO(store.encoded(row))) as image:
            assert (image.format, image.size) == (there.formats[row], (width, height)) == ("JPEG", expected.size)
            assert {component[1:3] for component in image.layer} == {(1, 1)}  # 4:4:4
            assert not image.getexif()
            error = np.asarray(image).astype(float) - np.asarray(expected)
        assert 10 * np.log10(255**2 / (error**2).mean()) > 30, path


def test_quality_is_that_of_the_new_jpegs(manifest, tmp_path):
    low, high = (
        pack(manifest, tmp_path / f"{quality}", kind="encoded", short_side=44, quality=quality) for quality in (50, 95)
    )
    shrunk_N = low.manifest.heights_N < manifest.heights_N
    sizes = [(len(low.encoded(row)), len(high.encoded(row))) for row in range(len(low))]
    assert shrunk_N.any()
    assert all((a < b) == shrunk for (a, b), shrunk in zip(sizes, shrunk_N, strict=True))


@pytest.mark.parametrize("options", [{"kind": "decoded"}, {"kind": "encoded", "short_side": 44}])
def test_the_same_images_give_the_same_bytes(manifest, tmp_path, options, monkeypatch):
    first = pack(manifest, tmp_path / "1", threads=1, **options)
    monkeypatch.setattr(packing, "_BATCH_PIXELS", 10_000)
    second = pack(manifest, tmp_path / "2", threads=3, **options)
    assert sorted(os.listdir(first.folder)) == sorted(os.listdir(second.folder))
    for name in set(os.listdir(first.folder)) - {"manifest.parquet"}:  # which holds the folder's name
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes(), name


def test_shards_are_bounded_and_samples_aligned(manifest, tmp_path, monkeypatch):
    whole = pack(manifest, tmp_path / "whole", kind="decoded")
    monkeypatch.setattr(packing, "SHARD_BYTES", 30_000)
    store = pack(manifest, tmp_path / "out", kind="decoded")
    sizes = [file.stat().st_size for file in sorted(store.folder.glob("shard-*"))]
    assert len(sizes) > 10
    assert max(sizes) <= 30_000
    for row in range(len(store)):
        view = store.pixels(row)
        assert view.ctypes.data % 64 == 0
        np.testing.assert_array_equal(view, whole.pixels(row))


def test_an_image_larger_than_a_shard_has_one_of_its_own(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "SHARD_BYTES", 100)
    store = pack(manifest, tmp_path / "out", kind="decoded")
    assert len(list(store.folder.glob("shard-*"))) == len(store)
    for row in range(len(store)):
        assert store.pixels(row).size == (store.folder / f"shard-{row:05d}.bin").stat().st_size


def test_what_is_there_is_kept(manifest, tmp_path):
    out = tmp_path / "out"
    first = pack(manifest, out, kind="encoded")
    written = (out / "store.json").stat().st_mtime_ns
    assert pack(manifest, out, kind="encoded").digest == first.digest
    assert (out / "store.json").stat().st_mtime_ns == written
    others = [
        ("made in another way .encoded.", {"kind": "decoded"}),
        ("made in another way", {"kind": "encoded", "short_side": 44}),
    ]
    for answer, options in others:
        with pytest.raises(UserError, match=answer):
            pack(manifest, out, **options)
    relabelled = scan(manifest.root, labels=Regex(r"(.).*\d?\.\w+$"))
    with pytest.raises(UserError, match="of other images"):
        pack(relabelled, out, kind="encoded")
    (tmp_path / "taken").mkdir()
    for path, answer in ((tmp_path / "taken", "exists and is no store"), (tmp_path / "no/where", "There is no folder")):
        with pytest.raises(UserError, match=answer):
            pack(manifest, path, kind="encoded")
    with pytest.raises(UserError, match="is a store already"):
        pack(first.manifest, tmp_path / "again", kind="decoded")
    assert sorted(os.listdir(tmp_path)) == ["out", "taken"]


@pytest.fixture
def copy(manifest, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(manifest.root, root)
    return scan(root)


@pytest.mark.parametrize("kind", ["decoded", "encoded"])
@pytest.mark.parametrize("change", [os.unlink, os.utime, lambda file: os.truncate(file, 300)])
def test_a_file_that_changed_after_the_scan_is_named(copy, tmp_path, kind, change):
    change(file_of(copy, 40))
    with pytest.raises(UserError, match="changed after it was scanned") as caught:
        pack(copy, tmp_path / "out", kind=kind)
    assert repr(copy.paths[40]) in str(caught.value)
    assert os.listdir(tmp_path) == ["copy"]


@pytest.mark.parametrize(
    ("at", "content", "answer"),
    [
        (0, b"no image at all", "can no longer be decoded"),
        (18, struct.pack("<ii", 40, 60), "changed after it was scanned"),  # width and height, until now 60 x 40
    ],
)
def test_a_file_that_changed_unseen_is_named(copy, tmp_path, at, content, answer):
    row = next(row for row, path in enumerate(copy.paths) if path.endswith(".bmp"))
    status = os.stat(file_of(copy, row))
    with open(file_of(copy, row), "r+b") as stream:
        stream.seek(at)
        stream.write(content)
    os.utime(file_of(copy, row), ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match=answer) as caught:
        pack(copy, tmp_path / "out", kind="decoded")
    assert copy.paths[row] in str(caught.value)
    assert os.listdir(tmp_path) == ["copy"]


def test_an_interrupted_pack_leaves_nothing(manifest, tmp_path):
    seen = []

    def interrupt(done, total):
        seen.extend(os.listdir(tmp_path))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(manifest, tmp_path / "out", kind="decoded", progress=interrupt)
    assert len(seen) == 1 and seen[0].startswith(".out-")
    assert os.listdir(tmp_path) == []


def test_what_a_killed_pack_left_is_removed_and_that_of_a_living_one_is_not(manifest, tmp_path):
    for name in (".out-dead.packing", ".out-alive.packing", ".other-dead.packing"):
        (tmp_path / name / "out").mkdir(parents=True)
        (tmp_path / name / "out/shard-00000.bin").touch()
    with packing._locked(tmp_path / ".out-alive.packing"):
        pack(manifest, tmp_path / "out", kind="encoded")
    assert sorted(os.listdir(tmp_path)) == [".other-dead.packing", ".out-alive.packing", "out"]


@pytest.mark.parametrize("limit", [100_000, 100])  # within the shard, at its first image
def test_a_disk_that_fills_up_leaves_nothing(manifest, tmp_path, limit):
    with files_no_larger_than(limit), pytest.raises(UserError, match="cannot be written") as caught:
        pack(manifest, tmp_path / "out", kind="decoded")
    assert os.strerror(errno.EFBIG) in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_too_small_is_said_before(manifest, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    needed = pack(manifest, tmp_path / "fits", kind="decoded").bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, needed - 64))
    with pytest.raises(UserError, match=r"will take 0\.\d MB, and 0\.\d MB are free.*--encoded"):
        pack(manifest, tmp_path / "out", kind="decoded")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, needed + 64))
    assert Store.open(pack(manifest, tmp_path / "out", kind="decoded").folder).bytes == needed


def test_settings_out_of_range(manifest, tmp_path):
    for options, answer in (({"short_side": 0}, "short_side is 0"), ({"quality": 101}, "quality is 101")):
        with pytest.raises(UserError, match=answer):
            pack(manifest, tmp_path / "out", kind="encoded", **options)
