"""Each usable file stands in the manifest exactly once, and what cannot be used is said in words."""

import hashlib
import os
import re
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.errors import UserError
from pipelines.labels import Csv, Regex
from pipelines.manifest import Manifest
from pipelines.scanning import changes, is_current, scan
from tests.hostile import make_hostile_folder

ODD_NAME = os.fsdecode(b"caf\xe9 \"a\" 'b'\n1.jpg")


def put(root, *paths, size=(8, 6)):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        # A colour of its own: no two files are alike.
        Image.new("RGB", size, f"#{zlib.crc32(os.fsencode(path)) >> 8:06x}").save(root / path, "BMP")


def by_path(manifest):
    """{path: (class, part)}, checked to be one entry for each row."""
    rows = {}
    for part, samples in (("train", manifest.train), ("valid", manifest.valid)):
        for path, label in zip(samples.paths, samples.labels_N, strict=True):
            assert path not in rows
            rows[path] = (manifest.classes[label], part)
    assert sorted([*manifest.train.ids_N, *manifest.valid.ids_N]) == list(range(len(rows)))
    return rows


def reasons(manifest):
    return {bad.path: bad.reason for bad in manifest.quarantine}


def refuse(match, *args, **options):
    with pytest.raises(UserError, match=match) as caught:
        scan(*args, **options)
    assert "\n" not in str(caught.value)


@pytest.fixture
def ten(tmp_path):
    """Two classes of five, without a split."""
    root = tmp_path / "ten"
    put(root, *(f"{name}/{i}.jpg" for name in ("cat", "dog") for i in range(5)))
    return root


# Folders


def test_split_folders(tmp_path):
    put(tmp_path, "train/cat/1.jpg", "train/cat/deep/2.jpg", "train/dog/1.JPEG", "val/dog/9.jpg")
    put(tmp_path, "test/cat/5.jpg", "6.jpg", ".hidden/7.jpg", "train/cat/.8.jpg")
    (tmp_path / "train/cat/notes.txt").touch()
    manifest = scan(tmp_path)
    assert by_path(manifest) == {
        "train/cat/1.jpg": ("cat", "train"),
        "train/cat/deep/2.jpg": ("cat", "train"),
        "train/dog/1.JPEG": ("dog", "train"),
        "val/dog/9.jpg": ("dog", "valid"),
    }
    assert manifest.classes == ("cat", "dog")
    assert manifest.split_from == "folders"
    assert manifest.quarantine == ()
    (note,) = manifest.notes
    assert note.endswith("left alone: 1 in the folder itself, 1 in 'test/'")


def test_only_a_training_folder(ten):
    (ten / "train").mkdir()
    for name in ("cat", "dog"):
        (ten / name).rename(ten / "train" / name)
    manifest = scan(ten)
    assert set(manifest.classes) == {"cat", "dog"}
    assert (manifest.split_from, len(manifest.valid)) == ("random", 2)
    assert "no validation folder" in " ".join(manifest.notes)


def test_a_class_called_train(tmp_path):
    put(tmp_path, *(f"{name}/{i}.jpg" for name in ("train", "tram") for i in range(3)))
    assert scan(tmp_path).classes == ("train", "tram")


def test_classes_in_file_names_below_split_folders(tmp_path):
    put(tmp_path, "Train/cat_1.jpg", "Train/dog_1.jpg", "Validation/dog_2.jpg")
    assert by_path(scan(tmp_path, labels=Regex(r"(.+)_\d+"))) == {
        "Train/cat_1.jpg": ("cat", "train"),
        "Train/dog_1.jpg": ("dog", "train"),
        "Validation/dog_2.jpg": ("dog", "valid"),
    }
    # Without the pattern, "Train" and "Validation" must not pass for classes.
    refuse(r"--label-regex '\(\.\+\)_.*would read 'cat' from 'cat_1.jpg'", tmp_path)


def test_folder_mistakes(tmp_path, ten):
    refuse("does not exist", tmp_path / "nowhere")
    refuse("is a file", ten / "cat/1.jpg")
    (tmp_path / "empty").mkdir()
    refuse("no images", tmp_path / "empty")
    refuse("valid_fraction is 1", ten, valid_fraction=1)
    refuse("only one class, 'cat'", ten, labels=Csv(str(one_class(tmp_path))))
    (ten / "train/cat").mkdir(parents=True)
    (ten / "val").mkdir()
    refuse("'train/' holds no images", ten)
    put(ten, "train/cat/1.jpg", "train/dog/1.jpg")
    refuse("'val/' holds no images", ten)
    put(ten, "val/bird/1.jpg")
    refuse("never sees .'bird'.*no training image", ten)
    (ten / "valid").mkdir()
    refuse("several validation folders.*'valid/' and 'val/'", ten)


def one_class(tmp_path):
    table = tmp_path / "one.csv"
    table.write_text("path,label\ncat/1.jpg,cat\ncat/2.jpg,cat\n")
    return table


def test_flat_folder_suggests_a_pattern_that_works(tmp_path):
    put(tmp_path, *(f"great_dane_{i}.jpg" for i in range(3)), *(f"pug_{i}.jpg" for i in range(3)))
    with pytest.raises(UserError, match="--label-csv") as caught:
        scan(tmp_path)
    pattern = str(caught.value).split("--label-regex '")[1].split("'")[0]
    assert scan(tmp_path, labels=Regex(pattern)).classes == ("great_dane", "pug")


def test_some_files_without_a_class_folder(ten):
    put(ten, "stray.jpg")
    assert reasons(scan(ten)) == {"stray.jpg": "no class folder"}


def test_links(ten, tmp_path):
    (ten / "cat/loop").symlink_to(ten)
    (ten / "cat/self").symlink_to("self")
    (ten / "again").symlink_to("dog")
    (ten / "cat/nowhere.jpg").symlink_to("gone.jpg")
    (ten / "cat/folder.jpg").mkdir()
    os.mkfifo(ten / "cat/pipe.jpg")
    put(tmp_path, "elsewhere/1.jpg")
    (ten / "bird").symlink_to(tmp_path / "elsewhere")
    (ten / "cat/link.jpg").symlink_to(tmp_path / "elsewhere/1.jpg")
    manifest = scan(ten, split_seed=2)
    assert manifest.classes == ("bird", "cat", "dog")
    assert len(by_path(manifest)) == 12
    assert reasons(manifest) == {
        "cat/folder.jpg": "a folder, not an image file",
        "cat/nowhere.jpg": "a link to nowhere",
        "cat/pipe.jpg": "a device, pipe or socket, not an image file",
    }
    assert [note.split(" ")[0] for note in manifest.notes] == ["'again'", "'cat/loop'", "groups"]


# File names


def test_pattern(tmp_path):
    put(tmp_path, "a/cat_1.jpg", "a/cat_2.jpg", "b/dog_1.jpg", "b/dog_2.jpg", "odd.jpg")
    manifest = scan(tmp_path, labels=Regex(r"(.+)_\d+\.jpg$"), valid_fraction=0.5, split_seed=3)
    assert {path: name for path, (name, _) in by_path(manifest).items()} == {
        "a/cat_1.jpg": "cat",
        "a/cat_2.jpg": "cat",
        "b/dog_1.jpg": "dog",
        "b/dog_2.jpg": "dog",
    }
    assert list(reasons(manifest)) == ["odd.jpg"]
    assert "does not match" in manifest.quarantine[0].reason


def test_pattern_mistakes(ten):
    refuse("not a regular expression: missing", ten, labels=Regex("("))
    refuse("has no group", ten, labels=Regex(r"\d"))
    refuse("matches none.*'0.jpg'", ten, labels=Regex("(cat)_"))


# Table


def test_table_with_split(ten, tmp_path, monkeypatch):
    put(ten, ODD_NAME)
    table = ten / "labels.csv"
    odd = os.fsencode(ODD_NAME).replace(b'"', b'""')
    text = "\ufeffSplit,path, label,note\ntrain,cat/1.jpg,tabby,\nTRAIN,./dog/1.jpg, pug ,x\nval,dog/2.jpg,pug\n"
    table.write_bytes(text.encode() + b'validation,"' + odd + b'",tabby,\n')
    monkeypatch.chdir(tmp_path)  # labels.csv is not here: it is looked for in the image folder
    manifest = scan("ten", labels=Csv("labels.csv"))
    assert manifest.root == ten
    assert by_path(manifest) == {
        "cat/1.jpg": ("tabby", "train"),
        "dog/1.jpg": ("pug", "train"),
        "dog/2.jpg": ("pug", "valid"),
        ODD_NAME: ("tabby", "valid"),
    }
    assert manifest.split_from == "csv"


def test_table_without_split(ten):
    (ten / "t.csv").write_text("path,label\n" + "".join(f"{n}/{i}.jpg,{n}\n" for n in ("cat", "dog") for i in range(5)))
    manifest = scan(ten, labels=Csv("t.csv"))
    assert (manifest.split_from, len(manifest.train), len(manifest.valid)) == ("random", 8, 2)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", r"columns \(none\)"),
        ("file,label\n", "columns 'file', 'label'.*path and label"),
        ("path,label\n", "no lines below"),
        ("path,label\ncat/1.jpg\n", "Line 2 .* lacks a label"),
        ("path,label\n,cat\n", "Line 2 .* lacks a path"),
        ("path,label\n/cat/1.jpg,cat\n", "'/cat/1.jpg'.*relative"),
        ("path,label\ncat/../../1.jpg,cat\n", "must lead into"),
        ("path,label\ncat/1.jpg,cat\ncat//1.jpg,dog\n", "Line 3 .*'cat/1.jpg' a second time"),
        ("path,label,split\ncat/1.jpg,cat,tset\n", "split 'tset'"),
        ("path,label\n" + "".join(f"no{i}.jpg,cat\n" for i in range(7)), "^7 of the 7 .*'no4.jpg', ..."),
        ("path,label\ncat,cat\n", "None of the paths .*folder"),
        ("path,label,split\ncat/1.jpg,cat,train\ndog/1.jpg,dog,train\n", "no usable image for validation"),
        ("path,label,split\ncat/1.jpg,cat,val\ndog/1.jpg,dog,val\n", "no usable image for training"),
        ("path,label,split\ncat/1.jpg,cat,train\ndog/1.jpg,dog,val\n", "never sees .'dog'"),
    ],
)
def test_table_mistakes(ten, text, match):
    (ten / "t.csv").write_text(text)
    refuse(match, ten, labels=Csv("t.csv"))


def test_table_that_is_not_there(ten):
    refuse("'no.csv' was not found.*ten/no.csv", ten, labels=Csv("no.csv"))


# Split


def test_draw_never_changes(tmp_path):
    put(tmp_path, *(f"{name}/{i:02}.jpg" for name in ("cat", "dog") for i in range(10)))
    assert scan(tmp_path, split_seed=42).valid.ids_N.tolist() == [0, 8, 13, 16]
    assert scan(tmp_path, split_seed=-1, valid_fraction=0.3).valid.ids_N.tolist() == [1, 3, 5, 14, 16, 18]


def test_draw_leaves_at_least_one_in_each_part(ten):
    assert len(scan(ten, valid_fraction=1e-9).valid) == 1
    put(ten, *(f"{name}/{i}.jpg" for name in ("cat", "dog") for i in range(5)))
    refuse("the draw left them no training image", ten, valid_fraction=1 - 1e-9)


# Bad files


def test_bad_files(ten):
    (ten / "cat/0.jpg").write_bytes(b"")
    (ten / "cat/note.gif").write_bytes(b"GIF89a")
    (ten / "bird").mkdir()
    (ten / "bird/1.jpg").write_text("text")
    steps = []
    manifest = scan(ten, progress=lambda *step: steps.append(step))
    assert len(by_path(manifest)) == 9
    assert list(reasons(manifest)) == ["bird/1.jpg", "cat/0.jpg", "cat/note.gif"]
    assert manifest.classes == ("cat", "dog")
    assert manifest.notes == ("the class 'bird' has no usable image and was left out",)
    assert steps[-1] == (12, 12)
    for path in (*ten.glob("cat/*"), *ten.glob("dog/*")):
        path.write_text("text")
    refuse("None of the 12 images .* is usable; 'bird/1.jpg'", ten)


def test_hostile_folder(tmp_path):
    hostile = make_hostile_folder(tmp_path, plain=20, each=3)
    manifest = scan(tmp_path)
    assert manifest.paths == hostile.good
    found = reasons(manifest)
    assert set(found) == set(hostile.bad)
    for path, words in hostile.bad.items():
        assert words in found[path], path
    assert manifest.orientations_N.tolist() == [
        int(re.search(r"turned (\d)", path)[1]) if "turned" in path else 6 if "late exif" in path else 1
        for path in manifest.paths
    ]
    (note,) = manifest.notes
    assert note.startswith(f"{sum('clear' in path for path in hostile.good)} images have transparent parts")
    assert manifest.warnings == ()


# Duplicates


def test_copies_are_noted_and_those_across_the_split_are_a_warning(tmp_path):
    put(
        tmp_path,
        *(f"{part}/{name}/{i}.jpg" for part in ("train", "valid") for name in ("cat", "dog") for i in range(4)),
    )

    def copy(source, *targets):
        for target in targets:
            (tmp_path / target).write_bytes((tmp_path / source).read_bytes())

    copy("train/cat/0.jpg", "train/cat/copy.jpg", "valid/cat/0.jpg", "valid/dog/copy.jpg")
    copy("train/dog/1.jpg", "train/dog/2.jpg")
    copy("valid/dog/2.jpg", "valid/dog/3.jpg")
    manifest = scan(tmp_path)
    row = dict(zip(manifest.paths, manifest.hashes_N16, strict=True))
    for path, hash_16 in row.items():
        assert hash_16.tobytes() == hashlib.sha256((tmp_path / path).read_bytes()).digest()[:16]
    (note,) = manifest.notes
    assert note == (
        "groups of identical files: 3, with 5 to spare: 'train/cat/0.jpg' = 'train/cat/copy.jpg', "
        "'train/dog/1.jpg' = 'train/dog/2.jpg', 'valid/dog/2.jpg' = 'valid/dog/3.jpg'"
    )
    (warning,) = manifest.warnings
    assert warning.startswith("2 of 9 validation images are in training too")
    assert warning.endswith("'train/cat/0.jpg' = 'valid/cat/0.jpg', 'train/cat/0.jpg' = 'valid/dog/copy.jpg'")


# Samples and file


def test_samples(tmp_path):
    put(tmp_path, "train/cat/1.jpg", size=(20, 10))
    put(tmp_path, "train/dog/1.jpg", size=(30, 40))
    put(tmp_path, "valid/dog/1.jpg")
    samples = scan(tmp_path).train
    assert (samples.heights_N.tolist(), samples.widths_N.tolist()) == ([10, 40], [20, 30])
    arrays = (samples.labels_N, samples.ids_N, samples.heights_N, samples.widths_N)
    assert [array.dtype for array in arrays] == [np.int64, np.int64, np.int32, np.int32]
    for index in (np.array([1]), [1], np.array([False, True]), slice(1, None)):
        part = samples.subset(index)
        assert (len(part), part.paths, part.ids_N.tolist()) == (1, ("train/dog/1.jpg",), [1])
        assert (part.labels_N.tolist(), part.heights_N.tolist(), part.classes) == ([1], [40], ("cat", "dog"))


def test_file_round_trip(ten, tmp_path):
    put(ten, f"cat/{ODD_NAME}", os.fsdecode(b"ca\xf1on/1.jpg"), os.fsdecode(b"ca\xf1on/2.jpg"))
    (ten / os.fsdecode(b"dog/bad\xff.jpg")).touch()
    manifest = scan(ten)
    file = tmp_path / "m.parquet"
    file.write_text("an older one")
    manifest.write(file)
    again = Manifest.read(file)
    for name, value in vars(manifest).items():
        other = getattr(again, name)
        if isinstance(value, np.ndarray):
            assert value.dtype == other.dtype
            assert value.tolist() == other.tolist()
        else:
            assert value == other
    assert f"cat/{ODD_NAME}" in again.paths
    assert r"ca\xf1on" in again.classes
    assert reasons(again) == {os.fsdecode(b"dog/bad\xff.jpg"): "the file is empty"}
    assert [path.name for path in tmp_path.glob("m.parquet*")] == ["m.parquet"]
    stat = os.stat(ten / "cat/1.jpg")
    row = pq.read_table(file).to_pylist()[again.paths.index("cat/1.jpg")]
    assert (row["path"], row["label"], row["format"]) == (b"cat/1.jpg", "cat", "BMP")
    assert (row["bytes"], row["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)
    assert (row["orientation"], len(row["hash"])) == (1, 16)


def test_a_failed_write_leaves_the_old_file(ten, tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(OSError, match="folder"):
        scan(ten).write(target)
    assert list(tmp_path.glob("*.tmp")) == []


def test_reading_what_is_no_manifest(tmp_path):
    file = tmp_path / "m.parquet"
    with pytest.raises(UserError, match="Scan the images again"):
        Manifest.read(file)
    file.write_bytes(b"PAR1 cut off")
    with pytest.raises(UserError, match="Scan the images again"):
        Manifest.read(file)


def touch(path):
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize(
    "change",
    [
        lambda root: touch(root / "cat/1.jpg"),
        lambda root: put(root, "cat/new.jpg"),
        lambda root: (root / "cat/1.jpg").unlink(),
        lambda root: (root / "cat/1.jpg").rename(root / "dog/9.jpg"),
        lambda root: put(root, "cat/bad.jpg"),
        lambda root: (root / "cat/nowhere.jpg").unlink(),
        lambda root: root.rename(root.parent / "moved"),
    ],
)
def test_is_current_until_a_file_changes(ten, tmp_path, change):
    (ten / "cat/bad.jpg").touch()
    (ten / "cat/nowhere.jpg").symlink_to("gone")
    scan(ten).write(tmp_path / "m")
    (ten / "notes.txt").touch()
    assert is_current(Manifest.read(tmp_path / "m"))
    change(ten)
    assert not is_current(Manifest.read(tmp_path / "m"))


def test_what_went_bad_meanwhile_does_not_count_and_what_changed_is_named(ten):
    manifest = scan(ten)
    (ten / "cat/1.jpg").unlink()
    touch(ten / "dog/1.jpg")
    assert not is_current(manifest, {"cat/1.jpg"})
    assert is_current(manifest, {"cat/1.jpg", "dog/1.jpg"})
    assert changes(manifest) == ["1 is gone ('cat/1.jpg')", "1 is altered ('dog/1.jpg')"]
    (ten / "cat/1.jpg").mkdir()  # no readable file
    assert is_current(manifest, {"cat/1.jpg", "dog/1.jpg"})
    put(ten, "cat/new.jpg")
    assert not is_current(manifest, {"cat/1.jpg", "dog/1.jpg"})
    for path in (ten / "dog").iterdir():
        touch(path)
    assert changes(manifest) == ["6 are altered ('cat/1.jpg', 'dog/0.jpg', 'dog/1.jpg', …)"]
    assert changes(scan(ten)) == ["there are new ones, or others were left out then"]


def test_is_current_until_the_table_changes(ten):
    table = ten / "t.csv"
    lines = "path,label,split\ncat/1.jpg,cat,train\ndog/1.jpg,dog,train\ndog/2.jpg,dog,val\n"
    table.write_text(lines)
    manifest = scan(ten, labels=Csv("t.csv"))
    put(ten, "cat/new.jpg")
    assert is_current(manifest)
    touch(ten / "cat/1.jpg")
    assert not is_current(manifest)
    manifest = scan(ten, labels=Csv("t.csv"))
    table.write_text(lines.replace("cat/1.jpg,cat", "cat/1.jpg,Cat"))
    assert not is_current(manifest)
    table.unlink()
    assert not is_current(manifest)


def test_photographs():
    photos = Path(os.environ.get("ONEWARP_PHOTOS", Path(__file__).parents[2] / "../shared/data/clothing"))
    if not photos.is_dir():
        pytest.skip("ONEWARP_PHOTOS is no folder of photographs")
    manifest = scan(photos)
    on_disk = {path.relative_to(photos).as_posix() for path in photos.glob("*/*/*.jpg")}
    assert set(manifest.train.paths) | set(manifest.valid.paths) | set(reasons(manifest)) == on_disk
    for samples in (manifest.train, manifest.valid):
        for i in range(0, len(samples), 50):
            with Image.open(photos / samples.paths[i]) as image:
                assert image.size == (samples.widths_N[i], samples.heights_N[i])
