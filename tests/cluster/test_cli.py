"""The command as a person types it."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from cluster import cli, help
from cluster.bench import QUESTIONS
from trainer import job, journal
from trainer.stopping import StoppedError, WorkersError

SCREEN = 45  # lines, of 100 columns


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
    [
        ["--help"],
        [],
        ["bench"],
        *([verb, "--help"] for verb in cli.VERBS),
        *(["bench", n, "--help"] for n in QUESTIONS),
    ],
)
def test_help_fits_a_screen(onewarp, tmp_path, words):
    told = onewarp(*words)
    assert told.returncode == 0
    assert 5 < len(told.stdout.splitlines()) <= SCREEN
    assert list(tmp_path.iterdir()) == []


def test_help_names_all_verbs(onewarp):
    lines = onewarp("--help").stdout.splitlines()
    assert [line.split()[0] for line in lines if re.match("  [a-z]", line)] == list(cli.VERBS)


def test_each_verb_tells_of_its_own_flags(onewarp):
    own = {
        "train": "--sizes",
        "evaluate": "--tta",
        "predict": "--threshold",
        "export": "--to",
        "check-export": "--limit",
    }
    own |= {"scan": "--near-duplicates", "pack": "--decoded", "show-batch": "--same", "summary": "--batch"}
    own |= {
        "report": "--out",
        "wandb-sync": "--wandb",
        "doctor": "--cluster",
        "completion": "fish",
        "check-export": "--limit",
    }
    for verb, flag in own.items():
        assert flag in onewarp(verb, "--help").stdout


@pytest.mark.parametrize("verb", help.LONG)
def test_the_short_help_is_of_flags_that_are_there(onewarp, verb):
    whole = onewarp(verb, "--help-all").stdout
    assert len(whole.splitlines()) > SCREEN
    for flags in help.LONG[verb][2].values():
        for flag in flags:
            assert f" --{flag.removesuffix('…')}" in whole
    defaults = {field.name: field.default for field in dataclasses.fields(help.LONG[verb][0])}
    short = onewarp(verb, "--help").stdout
    assert f"pixels ({defaults['size']})" in short


def test_a_verb_that_is_not_there(onewarp):
    told = onewarp("trian")
    assert told.returncode == 2
    assert "There is no verb 'trian'. Did you mean train?" in told.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script(onewarp, shell, tmp_path):
    told = onewarp("completion", shell)
    assert not told.returncode
    for word in ("wandb-sync", "freeze-epochs"):
        assert word in told.stdout
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=told.stdout, text=True, check=True)


TINY = [
    "--model",
    "test_convnext",
    "--no-pretrained",
    "--size",
    "32",
    "--batch",
    "8",
    "--workers",
    "0",
    "--wandb",
    "off",
]


def test_events_are_lines_of_json(onewarp, small_set, tmp_path):
    told = onewarp("train", "--data", small_set, "--epochs", 1, "--name", "a", "--json", *TINY)
    assert told.returncode == 0, told.stderr
    assert [json.loads(line) for line in told.stdout.splitlines()] == journal.read(tmp_path / "runs/a/journal.jsonl")


def test_quiet_is_quiet(onewarp, small_set, tmp_path):
    told = onewarp("lr-find", "--data", small_set, "--quiet", *TINY)
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")
    told = onewarp("train", "--data", "/nowhere", "--quiet")
    assert told.returncode == 2 and "/nowhere" in told.stderr
    told = onewarp("train", "--quiet", "--json")
    assert told.returncode == 2 and "--quiet and --json" in told.stderr


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["train", "--data", "my images"], "onewarp train --data 'my images' --name run-1"),
        (["train", "--name=a", "--restart", "--size", "64"], "onewarp train --name=a --size 64"),
        (["train", "--name", "a"], "onewarp train --name a"),
    ],
)
def test_a_stopped_run_tells_the_command_that_goes_on(onewarp, monkeypatch, words, answer):
    def stopped(*_, **__):
        raise StoppedError("stopped after step 7", 2, run="run-1")

    monkeypatch.setattr(job, "fine_tune", stopped)
    told = onewarp(*words)
    assert told.returncode == 130
    assert told.stderr.splitlines() == ["onewarp: stopped after step 7", f"go on with  {answer}"]


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


def test_a_folder_may_be_named_without_a_flag(monkeypatch):
    asked = []
    monkeypatch.setattr(cli.bench, "measure", lambda name, flags, prog: asked.append((name, flags)))
    for words in (["here"], ["here", "--quick"], ["--quick", "."], ["--data", "here"]):
        cli._act(["doctor", *words])
    assert asked == [
        ("bottleneck", ["--data", "here"]),
        ("bottleneck", ["--data", "here", "--quick"]),
        ("bottleneck", ["--quick", "--data", "."]),
        ("bottleneck", ["--data", "here"]),
    ]


def test_train_takes_a_folder_without_a_flag(onewarp):
    told = onewarp("train", "/nowhere", "--size", 32)
    assert told.returncode == 2 and "'/nowhere' does not exist" in told.stderr


def test_workers_that_fail_too_often_are_told_in_words(monkeypatch, capsys):
    def fail(_):
        raise WorkersError("Worker 0 failed: no space left")

    monkeypatch.setattr(cli, "_act", fail)
    monkeypatch.setattr(sys, "argv", ["onewarp", "train", "--data", "here"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert "no space left" in told and "--restarts" in told and "--name goes on from its last checkpoint" in told


def test_a_report_of_nothing_is_no_report(onewarp, tmp_path):
    told = onewarp("report")
    assert told.returncode == 2 and "onewarp report runs/NAME" in told.stderr
    assert list(tmp_path.iterdir()) == []
