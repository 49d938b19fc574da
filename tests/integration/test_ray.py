"""A whole job on two real Ray workers, and what it leaves behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.journal import read

SETTINGS = ["--model", "convnext_atto", "--head", "plain", "--no-pretrained", "--size", "48", "--batch", "8"]
SETTINGS += ["--epochs", "1", "--lr", "1e-3", "--wandb", "off"]


def train(data, folder, *words, settings=SETTINGS):
    (folder / "tmp").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", "train", "--data", str(data), *settings, *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder / "tmp"), "COLUMNS": "120"},
        check=False,
    )


def scratch():
    return set(Path("/tmp").glob("onewarp-*"))


def ray_processes():
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(word.endswith((b"raylet", b"gcs_server")) or word.startswith(b"ray::") for word in words):
                found.add(int(entry.name))
    return found


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers take two cores")
def test_two_workers_train_and_agree_with_one(small_set, tmp_path):
    before, folders = ray_processes(), scratch()
    two = train(small_set, tmp_path, "--name", "two", "--workers", "2")
    assert two.returncode == 0, two.stdout + two.stderr
    assert ray_processes() <= before
    assert list((tmp_path / "tmp").iterdir()) == []
    assert scratch() <= folders  # where Ray lives when TMPDIR, as here, is too long for its sockets
    assert "error rate" in two.stdout
    assert "go on with  onewarp train" in two.stdout
    zero = train(small_set, tmp_path, "--name", "zero", "--workers", "0")
    assert zero.returncode == 0, zero.stdout + zero.stderr
    events = {name: read(tmp_path / "runs" / name / "journal.jsonl") for name in ("two", "zero")}
    assert [e["world_size"] for e in events["two"] if e["event"] == "run"] == [2]
    losses = {name: [e["loss"] for e in events[name] if e["event"] == "step"] for name in events}
    assert len(losses["two"]) == 12
    assert losses["two"] == pytest.approx(losses["zero"], rel=1e-4)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers take two cores")
def test_a_mistake_met_by_a_worker_is_told_in_words(small_set, tmp_path):
    settings = [*SETTINGS, "--weight-decay", "0"]
    settings[settings.index("1e-3")] = "1e30"
    told = train(small_set, tmp_path, "--name", "bad", "--workers", "2", settings=settings)
    assert told.returncode == 2, told.stdout + told.stderr
    assert "Lower --lr" in told.stderr
    assert "Traceback" not in told.stderr + told.stdout
