"""Which images a model is applied to: all of a folder, or the validation part of what has one."""

import shutil

import pytest

from pipelines.errors import UserError
from pipelines.firewall import examine
from pipelines.labels import Csv, Regex
from pipelines.scanning import scan, scan_to_apply
from tests.hostile import make_hostile_folder
from tests.pipelines.test_manifest import put


def names(found):
    samples = found.samples
    if not samples.classes:
        assert (samples.labels_N == -1).all()
        return list(samples.paths)
    return {path: samples.classes[label] for path, label in zip(samples.paths, samples.labels_N, strict=True)}


def test_without_labels_it_is_every_image_at_any_depth(tmp_path):
    put(tmp_path, "1.bmp", "train/cat/2.bmp", "valid/dog/3.bmp", "a/b/c/d/4.bmp", ".hidden/5.bmp")
    found = scan_to_apply(tmp_path, labels=None)
    assert names(found) == ["1.bmp", "a/b/c/d/4.bmp", "train/cat/2.bmp", "valid/dog/3.bmp"]
    assert found.part_of is None
    assert found.samples.ids_N.tolist() == [0, 1, 2, 3]
    assert found.samples.heights_N.tolist() == [6] * 4


def test_of_a_split_it_is_the_validation_part_alone_and_nothing_else_is_decoded(tmp_path, monkeypatch):
    put(tmp_path, "train/cat/1.bmp", "train/dog/2.bmp", "val/cat/3.bmp", "val/cat/4.bmp")
    (tmp_path / "train/cat/bad.bmp").touch()
    (tmp_path / "train/cat/folder.jpg").mkdir()
    (tmp_path / "val/cat/bad.bmp").touch()
    (tmp_path / "val/dog/folder.jpg").mkdir(parents=True)
    looked: list[str] = []

    def watched(files, **options):
        looked.extend(files)
        return examine(files, **options)

    monkeypatch.setattr("pipelines.scanning.firewall.examine", watched)
    found = scan_to_apply(tmp_path, labels="folder")
    assert names(found) == {"val/cat/3.bmp": "cat", "val/cat/4.bmp": "cat"}  # one class is enough
    assert found.part_of == "folders"
    assert [bad.path for bad in found.quarantine] == ["val/cat/bad.bmp", "val/dog/folder.jpg"]
    assert sorted(looked) == [str(tmp_path / "val/cat" / name) for name in ("3.bmp", "4.bmp", "bad.bmp")]


def test_without_a_split_it_is_everything_that_has_a_label(tmp_path):
    put(tmp_path, "cat/1.bmp", "cat/2.bmp", "3.bmp")
    found = scan_to_apply(tmp_path, labels="folder")
    assert names(found) == {"cat/1.bmp": "cat", "cat/2.bmp": "cat"}
    assert found.part_of is None
    assert [(bad.path, bad.reason) for bad in found.quarantine] == [("3.bmp", "no class folder")]
    named = scan_to_apply(tmp_path, labels=Regex(r"(\d)\."))
    assert names(named) == {"3.bmp": "3", "cat/1.bmp": "1", "cat/2.bmp": "2"}


def test_a_training_folder_alone_is_judged_whole(tmp_path):
    put(tmp_path, "train/cat/1.bmp", "train/dog/2.bmp", "test/cat/3.bmp")
    found = scan_to_apply(tmp_path, labels="folder")
    assert names(found) == {"train/cat/1.bmp": "cat", "train/dog/2.bmp": "dog"}
    assert found.part_of is None
    assert any("'train/'" in note for note in found.notes)


def test_a_table_may_hold_a_split_or_none(tmp_path):
    put(tmp_path, "1.bmp", "2.bmp", "3.bmp")
    table = tmp_path / "labels.csv"
    table.write_text("path,label,split\n1.bmp,cat,train\n2.bmp,cat,valid\n3.bmp,dog,train\n")
    found = scan_to_apply(tmp_path, labels=Csv(str(table)))
    assert (names(found), found.part_of) == ({"2.bmp": "cat"}, "csv")
    table.write_text("path,label\n1.bmp,cat\n3.bmp,dog\n")
    found = scan_to_apply(tmp_path, labels=Csv(str(table)))
    assert (names(found), found.part_of) == ({"1.bmp": "cat", "3.bmp": "dog"}, None)
    table.write_text("path,label,split\n1.bmp,cat,train\n")
    with pytest.raises(UserError, match=r"The split \(csv\) of .* leaves no image for validation"):
        scan_to_apply(tmp_path, labels=Csv(str(table)))


def test_hostile_files_are_told_from_good_ones_as_by_a_scan(tmp_path):
    hostile = make_hostile_folder(tmp_path / "hostile", each=1)
    found, scanned = scan_to_apply(hostile.root, labels=None), scan(hostile.root)
    assert found.samples.paths == scanned.paths == hostile.good
    assert found.quarantine == scanned.quarantine
    assert found.hashes_N16.tolist() == scanned.hashes_N16.tolist()


def test_a_single_file_is_looked_at_whatever_it_is_called(tmp_path):
    put(tmp_path, "1.bmp", "2.bmp")
    shutil.copy(tmp_path / "1.bmp", tmp_path / "upload")
    found = scan_to_apply(tmp_path / "upload", labels=None)
    assert (names(found), found.samples.root) == (["upload"], tmp_path)
    with pytest.raises(UserError, match="is a file, not a folder"):
        scan_to_apply(tmp_path / "1.bmp", labels="folder")
