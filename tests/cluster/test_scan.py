"""The verb as a person types it, and the same scan by Ray tasks."""

import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import rich.console

from pipelines.errors import UserError
from pipelines.manifest import Manifest
from pipelines.scanning import is_current
from tests.hostile import encoded, make_hostile_folder, picture
from trainer.bar import counted

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return make_hostile_folder(tmp_path_factory.mktemp("data") / "hostile", plain=300, each=1)


def rows(manifest):
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in vars(manifest).items()
        if name not in ("train", "valid")
    }


def test_bad_files_are_named_in_a_list_and_the_scan_succeeds(onewarp, hostile, tmp_path):
    told = onewarp("scan", hostile.root, "--split-seed", "5", "--threads", "2")
    assert told.returncode == 0, told.stderr
    assert "split at random, seed 5, 20%" in told.stdout
    assert f"… and {len(hostile.bad) - 5} more files; all are named in {tmp_path}/scan/quarantine.txt" in told.stdout
    assert f"left out  {len(hostile.bad)} files" in told.stdout
    lines = (tmp_path / "scan/quarantine.txt").read_text().splitlines()
    named = dict(line.split("\t") for line in lines)
    assert set(named) == set(hostile.bad)
    assert all(words in named[path] for path, words in hostile.bad.items())
    manifest = Manifest.read(tmp_path / "scan/manifest.parquet")
    assert manifest.paths == hostile.good
    assert is_current(manifest)


def test_the_list_is_empty_where_every_file_is_good(onewarp, small_set, tmp_path):
    (tmp_path / "found").mkdir()
    (tmp_path / "found/quarantine.txt").write_text("an older scan\treason\n")
    told = onewarp("scan", small_set, "--out", "found")
    assert (told.returncode, (tmp_path / "found/quarantine.txt").read_text()) == (0, "")
    assert "an epoch" not in told.stdout


def test_leaks_are_a_warning(onewarp, tmp_path):
    for part in ("train", "valid"):
        for label in ("cat", "dog"):
            (tmp_path / f"data/{part}/{label}").mkdir(parents=True)
            (tmp_path / f"data/{part}/{label}/1.jpg").write_bytes(encoded(picture(seed=len(label + part)), "JPEG"))
            (tmp_path / f"data/{part}/{label}/2.jpg").write_bytes(encoded(picture(seed=ord(label[0])), "JPEG"))
    told = onewarp("scan", "data")
    assert told.returncode == 0
    assert "warning   4 of 4 validation images are in training too, byte for byte" in told.stdout


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["/nowhere"], "'/nowhere' does not exist"),
        (["DATA", "--max-pixels", "0"], "--max-pixels is 0"),
        (["DATA", "--threads", "0"], "--threads is 0"),
        (["DATA", "--valid-fraction", "2"], "2"),
        (["DATA", "--out", "/dev/null/x"], "/dev/null/x cannot be written"),
        (["DATA", "--max-pixels", "100"], "None of the 76 images"),
    ],
)
def test_a_mistake_is_one_paragraph_and_exit_code_2(onewarp, small_set, words, answer):
    told = onewarp("scan", *[str(small_set) if word == "DATA" else word for word in words])
    assert told.returncode == 2
    assert answer in told.stderr
    assert len(told.stderr.strip().splitlines()) == 1


def test_near_duplicates_across_the_split_come_first(onewarp, tmp_path):
    pytest.importorskip("imagehash", reason="the extra near-duplicates is not installed")
    for number, path in enumerate(("train/cat/1", "train/dog/1", "valid/cat/1", "valid/dog/1")):
        (tmp_path / "data" / path).parent.mkdir(parents=True)
        (tmp_path / f"data/{path}.jpg").write_bytes(encoded(picture(seed=number), "JPEG"))
    (tmp_path / "data/train/cat/again.jpg").write_bytes(encoded(picture(seed=0), "JPEG", quality=95))
    (tmp_path / "data/valid/dog/again.jpg").write_bytes(encoded(picture(seed=1), "JPEG", quality=95))
    (tmp_path / "data/valid/dog/same.jpg").write_bytes((tmp_path / "data/valid/dog/1.jpg").read_bytes())
    told = onewarp("scan", "data", "--near-duplicates")
    (line,) = (line for line in told.stdout.splitlines() if line.startswith("alike"))
    assert "2 pairs" in line
    assert "1 of them across training and validation" in line
    assert line.endswith("'train/dog/1.jpg' ~ 'valid/dog/again.jpg', 'train/cat/1.jpg' ~ 'train/cat/again.jpg'")


def test_a_missing_package_is_named_before_the_scan(onewarp, small_set, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagehash", None)  # as where it is not installed
    told = onewarp("scan", small_set, "--near-duplicates")
    assert told.returncode == 2
    assert "pip install 'onewarp[near-duplicates]'" in told.stderr
    assert not (tmp_path / "scan").exists()


def test_the_bar_counts_the_files_on_a_terminal(hostile):
    console = rich.console.Console(force_terminal=True, width=100, file=io.StringIO(), record=True)
    with counted(console, "Reading [bold]/data") as progress:
        progress(3, 7)
    assert "Reading [bold]/data" in console.export_text()


def test_ray_gives_the_same_manifest(onewarp, hostile, tmp_path, monkeypatch):
    from cluster import engine  # noqa: F401, I001  it keeps Ray on loopback
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the package, installed on each machine
    assert onewarp("scan", hostile.root, "--out", "here").returncode == 0
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as scratch:  # short, for Ray's sockets
        # Where it notes its address: by default a folder in /tmp that is not there before Ray's first run.
        monkeypatch.setenv("RAY_TMPDIR", scratch)
        Path(scratch, "ray").mkdir()
        arguments = {"num_cpus": 2, "object_store_memory": 100 * 2**20, "temp_dir": scratch}
        cluster = Cluster(initialize_head=True, head_node_args=arguments)
        try:
            told = onewarp("scan", hostile.root, "--out", "there", "--no-reuse", "--address", cluster.address)
        finally:
            cluster.shutdown()
    assert told.returncode == 0, told.stderr
    here, there = (Manifest.read(tmp_path / name / "manifest.parquet") for name in ("here", "there"))
    assert rows(here) == rows(there)
    assert (tmp_path / "here/quarantine.txt").read_bytes() == (tmp_path / "there/quarantine.txt").read_bytes()


def test_a_machine_without_the_images_is_no_reason_to_leave_them_out(tmp_path):
    from cluster.examine import _examine_chunk

    with pytest.raises(UserError, match=f"does not see '{tmp_path}'. Mount"):
        _examine_chunk._function([f"{tmp_path}/1.jpg", f"{tmp_path}/2.jpg"], 100)


def test_where_no_cluster_answers(onewarp, small_set, monkeypatch):
    from cluster import engine

    monkeypatch.setattr(engine, "ALONE", False)  # of a process that has had Ray for itself
    told = onewarp("scan", small_set, "--no-reuse", "--address", "nowhere")
    assert told.returncode == 2
    assert "--address nowhere: Ray cannot join" in told.stderr
