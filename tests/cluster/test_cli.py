"""The command as a person types it."""

import os
import subprocess
import sys

import pytest


def onewarp(*words, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "100", **environment},
        check=False,
    )


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["lr-find", "--help"]])
def test_help_reads(tmp_path, words):
    told = onewarp(*words, cwd=tmp_path)
    assert told.returncode == 0
    assert "{train,lr-find}" in told.stdout or "--data" in told.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--data", "/nowhere"], "/nowhere"),
        (["--size", "7"], "--size is 7"),
        (["--data", "DATA", "--workers", "99", "--no-pretrained"], "--workers 99"),
        (["--data", "DATA", "--model", "resnet34x", "--workers", "0"], "--model resnet34x is unknown"),
    ],
)
def test_a_mistake_is_one_paragraph_and_exit_code_2(small_set, tmp_path, words, answer):
    words = [str(small_set) if word == "DATA" else word for word in words]
    told = onewarp("train", *words, "--batch", "8", cwd=tmp_path)
    assert told.returncode == 2
    assert answer in told.stderr
    assert "Traceback" not in told.stderr + told.stdout
    assert len(told.stderr.strip().splitlines()) == 1


def test_an_unknown_flag_suggests_the_nearest(tmp_path):
    told = onewarp("train", "--sise", "64", cwd=tmp_path)
    assert told.returncode == 2
    assert "--size" in told.stderr
    assert "Traceback" not in told.stderr
