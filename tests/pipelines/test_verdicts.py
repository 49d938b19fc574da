"""An unchanged file is decoded once, whoever asks; a changed one again; and the cache is no more than a cache."""

import os
import shutil

import numpy as np
import pytest

from pipelines import firewall, verdicts
from pipelines.labels import Csv
from pipelines.scanning import scan
from tests.hostile import make_hostile_folder
from tests.pipelines.test_manifest import put


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ONEWARP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
    put(tmp_path / "data", *(f"{name}/{i}.jpg" for name in ("cat", "dog") for i in range(5)))
    return tmp_path / "data"


class Counting:
    """The firewall, remembering which files it was asked about."""

    def __init__(self, root):
        self.root, self.files = root, []

    def __call__(self, files, **options):
        self.files += [os.path.relpath(file, self.root) for file in files]
        return firewall.examine(files, **options)

    def of(self, **options):
        """The manifest of a new scan, and the files that it decoded."""
        self.files = []
        return scan(self.root, examine=self, **options), self.files


def rows(manifest):
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in vars(manifest).items()
        if name not in ("train", "valid")
    }


def test_a_second_scan_decodes_nothing_and_gives_the_same(cache, tmp_path):
    hostile = make_hostile_folder(tmp_path / "data", each=1)
    counting = Counting(hostile.root)
    first, decoded = counting.of()
    assert set(decoded) >= set(hostile.good)
    second, decoded = counting.of()
    # Only what a limit keeps out is looked at again, and that no further than its header.
    assert sorted(path.split(" ", 1)[1] for path in decoded) == ["bomb.png", "over the limit.png"]
    assert rows(second) == rows(first)
    assert set(counting.of(reuse=False)[1]) >= set(hostile.good)


def test_other_labels_and_another_split_decode_nothing(cache, root):
    counting = Counting(root)
    counting.of()
    assert counting.of(split_seed=3, valid_fraction=0.4)[1] == []
    (root / "t.csv").write_text("path,label\ncat/1.jpg,a\ncat/2.jpg,b\ncat/3.jpg,a\ndog/1.jpg,b\ndog/2.jpg,b\n")
    assert counting.of(labels=Csv("t.csv"), split_seed=1)[1] == []


def test_only_new_and_changed_files_are_decoded(cache, root):
    counting = Counting(root)
    counting.of()
    put(root, "cat/new.jpg", size=(30, 20))
    put(root, "dog/1.jpg", size=(20, 10))
    os.utime(root / "dog/2.jpg", ns=(1, 1))
    (root / "dog/3.jpg").unlink()
    (root / "dog/4.jpg").write_bytes(b"")
    after, decoded = counting.of()
    assert decoded == ["cat/new.jpg", "dog/1.jpg", "dog/2.jpg", "dog/4.jpg"]
    width = dict(zip(after.paths, after.widths_N.tolist(), strict=True))
    assert (width["cat/new.jpg"], width["dog/1.jpg"], width["cat/1.jpg"]) == (30, 20, 8)
    assert [bad.path for bad in after.quarantine] == ["dog/4.jpg"]
    assert set(verdicts.recall(root)) == {*after.paths, "dog/4.jpg"}


def test_a_scan_of_some_files_keeps_the_verdicts_on_the_others(cache, root):
    counting = Counting(root)
    counting.of()
    os.utime(root / "cat/1.jpg", ns=(1, 1))
    (root / "t.csv").write_text("path,label,split\ncat/1.jpg,a,train\ndog/1.jpg,b,train\ndog/2.jpg,b,valid\n")
    assert counting.of(labels=Csv("t.csv"))[1] == ["cat/1.jpg"]
    assert counting.of()[1] == []


def test_a_limit_is_kept_whatever_an_earlier_scan_allowed(cache, root):
    counting = Counting(root)
    put(root, "cat/large.jpg", size=(30, 20))
    assert "cat/large.jpg" in counting.of()[0].paths
    lower, decoded = counting.of(max_pixels=599)
    assert decoded == ["cat/large.jpg"]
    assert "30 x 20" in lower.quarantine[0].reason
    assert "cat/large.jpg" in counting.of(max_pixels=600)[0].paths


@pytest.mark.parametrize("damage", [b"", b"PAR1 cut off", "version", "decoder"])
def test_what_cannot_be_used_is_decoded_again(cache, root, damage, monkeypatch):
    counting = Counting(root)
    first, decoded = counting.of()
    (file,) = (cache / "scans").iterdir()
    match damage:
        case "version":
            monkeypatch.setattr(verdicts, "_VERSION", 99)
        case "decoder":
            monkeypatch.setattr(verdicts, "DECODER", "another")
        case _:
            file.write_bytes(damage)
    again, twice = counting.of()
    assert twice == decoded
    assert rows(again) == rows(first)
    assert counting.of()[1] == []


def test_a_cache_that_cannot_be_written_is_done_without(root, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ONEWARP_CACHE", str(tmp_path / "file/below"))
    counting = Counting(root)
    assert len(counting.of()[1]) == len(counting.of()[1]) == 10


def test_folders_do_not_share(cache, root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")  # times included
    counting = [Counting(root), Counting(copy)]
    assert [len(one.of()[1]) for one in counting] == [10, 10]
    assert [len(one.of()[1]) for one in counting] == [0, 0]


def test_unreadable_is_not_for_ever(cache, root):
    # Permissions change neither size nor time.
    def denied(files, **options):
        refused = firewall.Refused(reason="the file cannot be read: Permission denied", lasting=False)
        verdicts = firewall.examine(files, **options)
        return [refused if file.endswith("cat/1.jpg") else one for file, one in zip(files, verdicts, strict=True)]

    assert [bad.path for bad in scan(root, examine=denied).quarantine] == ["cat/1.jpg"]
    manifest, decoded = Counting(root).of()
    assert (decoded, manifest.quarantine) == (["cat/1.jpg"], ())
