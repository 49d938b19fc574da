"""What a machine says of itself, and what is made of it."""

import os
from dataclasses import replace

import pytest
from rich.console import Console

from cluster import checkup
from cluster.checkup import Facts, Visit, judge, look, unseen
from cluster.doctor import refuse_the_ill, table
from pipelines.errors import UserError

WELL = Facts(
    host="one",
    versions={"onewarp": "0.1.0", "torch": "2.14.1"},
    data="3 entries (ab)",
    disk=10**11,
    shm=10**9,
    files=65536,
    gpus=("H100", "H100"),
    store=1e8,
    promised=2,
)


def ills(*machines, tmp_path):
    return [(check.host, check.what) for check in judge(machines, data=tmp_path, runs=tmp_path) if check.fix]


def test_this_machine_is_well(small_set, tmp_path):
    facts = look(Visit(data=small_set, runs=tmp_path / "runs/marks", name="a"))
    assert (tmp_path / "runs/marks/a").exists()
    assert facts.cannot_read == facts.cannot_write == facts.cannot_decode == ""
    assert facts.versions["torch"].split(".")[0] == "2" and "missing" not in facts.versions.values()
    assert facts.data.startswith("2 entries")
    facts = replace(facts, store=1e8, disk=10**11, shm=10**9, files=65536)
    assert ills(facts, replace(facts, host="two"), tmp_path=tmp_path) == []
    assert look(Visit(data=None, runs=tmp_path, name="b", thorough=False)).gpus is None


def test_what_a_machine_lacks_is_named(tmp_path):
    file = tmp_path / "file"
    file.touch()
    facts = look(Visit(data=tmp_path / "nowhere", runs=file / "runs", name="a", thorough=False))
    assert facts.cannot_read == "No such file or directory"
    assert facts.cannot_write == "Not a directory"


def test_marks_of_others_are_waited_for(tmp_path):
    (tmp_path / "a").touch()
    visit = Visit(data=None, runs=tmp_path, name="me", others=("a", "b"))
    assert unseen(visit, patience=0.3) == ("b",)
    (tmp_path / "b").touch()
    assert unseen(visit, patience=0) == ()
    assert unseen(replace(visit, runs=tmp_path / "nowhere"), patience=0) == ("a", "b")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"versions": {"onewarp": "0.1.0", "torch": "2.13"}}, "versions"),
        ({"cannot_read": "Permission denied", "data": ""}, "data"),
        ({"data": "4 entries (cd)"}, "data"),
        ({"cannot_write": "Read-only file system"}, "runs"),
        ({"unseen": ("one",)}, "runs"),
        ({"disk": 10**8}, "disk"),
        ({"shm": 10**6}, "shm"),
        ({"store": 1e6}, "store"),
        ({"files": 1024}, "files"),
        ({"gpus": ("H100",)}, "GPUs"),
        ({"cannot_decode": "no driver"}, "decoding"),
        ({"ahead": -3.0}, "clock"),
    ],
)
def test_each_ill_is_told_with_its_cure(tmp_path, change, what):
    other = replace(WELL, host="two", **change)
    assert ills(WELL, other, tmp_path=tmp_path) == [("two", what)]
    with pytest.raises(UserError, match=rf"^two: {what}: .*To mend it, .+\.$"):
        refuse_the_ill(judge([WELL, other], data=tmp_path, runs=tmp_path))


def test_a_version_that_differs_is_told_with_both(tmp_path):
    other = replace(WELL, host="two", versions={"onewarp": "0.1.0", "torch": "2.13"})
    with pytest.raises(UserError, match=r"torch 2\.13, and 2\.14\.1 on one"):
        refuse_the_ill(judge([WELL, other], data=None, runs=tmp_path))


def test_the_table_has_a_row_for_each_machine(tmp_path):
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    other = replace(WELL, host="two", cannot_write="[bold] Read-only")
    console.print(table(judge([WELL, other], data=tmp_path, runs=tmp_path)))
    text = console.export_text()
    assert text.count("2 × H100") == 2
    assert "[bold] Read-only" in text


def test_pixels_that_differ_from_pillows_are_an_ill(monkeypatch):
    run = checkup.Decoder.run
    assert checkup._decode() == ""
    monkeypatch.setattr(checkup.Decoder, "run", lambda *words: [pixels ^ 255 for pixels in run(*words)])
    assert "differ from Pillow's" in checkup._decode()
