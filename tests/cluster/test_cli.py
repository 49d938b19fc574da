"""The command as a person types it."""

import subprocess
import sys

import pytest
from PIL import Image

VERBS = ("train", "lr-find", "evaluate", "predict", "export", "check-export", "scan", "pack", "show-batch", "summary")
VERBS += ("report", "wandb-sync", "doctor", "bench")


def test_the_installed_command_answers(tmp_path):
    told = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "train", "--data", "/nowhere"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert told.returncode == 2
    assert "/nowhere" in told.stderr
    assert "Traceback" not in told.stderr + told.stdout


@pytest.mark.parametrize(
    "words",
    [["--help"], *([verb, "--help"] for verb in VERBS)],
)
def test_help_reads(onewarp, tmp_path, words):
    told = onewarp(*words)
    assert told.returncode == 0
    words_of_its_own = {"--help": f"{{{','.join(VERBS)}}}", "predict": "--threshold", "doctor": "--cluster"}
    words_of_its_own |= {
        "export": "--to",
        "check-export": "--limit",
        "report": "--out",
        "wandb-sync": "--wandb",
        "bench": "loaders",
    }
    assert words_of_its_own.get(words[0], "--label-regex") in told.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--data", "/nowhere"], "/nowhere"),
        (["--size", "7"], "--size is 7"),
        (["--sizes", "64:1,96"], "--sizes is '64:1,96'"),
        (["--sizes", "64:1,96:2", "--epochs", "4"], "--epochs is 4; it must be left out with --sizes"),
        # 3 is the default; where it is given, it contradicts
        (["--sizes", "64:1,96:1", "--epochs", "3"], "--epochs is 3; it must be left out with --sizes"),
        (["--lr", "1e-6:1e-4"], "--lr is 1e-6:1e-4; it must be one number with --schedule fine-tune"),
        (["--lr", "fast", "--schedule", "one-cycle"], "--lr is fast; it must be a number greater than 0"),
        (["--data", "DATA", "--workers", "99", "--no-pretrained"], "--workers 99"),
        (["--data", "DATA", "--model", "resnet34x", "--workers", "0"], "--model resnet34x is unknown"),
    ],
)
def test_a_mistake_is_one_paragraph_and_exit_code_2(onewarp, small_set, tmp_path, words, answer):
    words = [str(small_set) if word == "DATA" else word for word in words]
    told = onewarp("train", *words, "--batch", "8")
    assert told.returncode == 2
    assert answer in told.stderr
    assert "Traceback" not in told.stderr + told.stdout
    assert len(told.stderr.strip().splitlines()) == 1


def test_an_unknown_flag_suggests_the_nearest(onewarp):
    told = onewarp("train", "--sise", "64")
    assert told.returncode == 2
    assert "--size" in told.stderr
    assert "Traceback" not in told.stderr


@pytest.mark.parametrize(("words", "tiles"), [([], 16), (["--same"], 12), (["--compare"], 16)])
def test_show_batch_draws(onewarp, small_set, tmp_path, words, tiles):
    told = onewarp("show-batch", str(small_set), "--size", "64", "--out", "look.png", *words)
    assert told.returncode == 0, told.stderr
    assert "picture   look.png" in told.stdout
    with Image.open(tmp_path / "look.png") as picture:
        columns = 4
        assert picture.width > columns * 250
        assert picture.height > tiles / columns * 250


def test_the_summary_ends_with_a_batch(onewarp, small_set, tmp_path):
    told = onewarp("summary", str(small_set), "--size", "64")
    assert told.returncode == 0, told.stderr
    assert "53 to train, 23 to validate" in told.stdout
    assert "batch     53 x 3 x 64 x 64" in told.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["show-batch", "DATA", "--same", "--compare"], "--same and --compare are two pictures"),
        (["show-batch", "DATA", "--image", "x.jpg"], "--image x.jpg"),
        (["show-batch", "DATA", "--out", "/nowhere/x.png"], "/nowhere/x.png cannot be written"),
        (["show-batch", "/nowhere"], "/nowhere"),
        (["summary", "DATA", "--image", "x.jpg"], "'x.jpg' is not among the 53 images"),
        (["summary", "DATA", "--size", "7"], "--size is 7"),
    ],
)
def test_a_look_at_what_is_not_there_is_one_paragraph(onewarp, small_set, tmp_path, words, answer):
    told = onewarp(*[str(small_set) if word == "DATA" else word for word in words])
    assert told.returncode == 2
    assert answer in told.stderr
    assert "Traceback" not in told.stderr + told.stdout
    assert len(told.stderr.strip().splitlines()) == 1
