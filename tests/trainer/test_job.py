"""Whole jobs in one process: what they leave, how they go on, and what they say to mistakes."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from pipelines import Augment, pack, scan
from pipelines.errors import UserError
from tests.trainer.conftest import PLAIN
from trainer import TrainConfig, fine_tune, lr_find, worker
from trainer.best import Best
from trainer.job import Result, _continuing, summary
from trainer.journal import read
from trainer.lr_range import RangeTest
from trainer.prepare import prepare
from trainer.ranks import Ranks
from trainer.schedule import fit_one_cycle
from trainer.worker import run


def config(small_set, tmp_path, **settings):
    return TrainConfig.from_dict(
        {**PLAIN, "data": str(small_set), "runs": str(tmp_path), "workers": 0, "name": "run", **settings}
    )


def test_what_is_frozen_stays_under_every_schedule(small_set, tmp_path, quiet):
    """fastai's `fit_one_cycle` of a frozen learner: one rate for all that learns, and one whole cycle."""
    wanted = config(small_set, tmp_path, schedule="one-cycle", freeze_to=-1, epochs=1, lr=3e-3, train_bn=False)
    folder = fine_tune(wanted, quiet).folder
    (phase,) = (event for event in read(folder / "journal.jsonl") if event["event"] == "phase")
    assert phase["phase"] == "frozen" and phase["lr"] == [3e-3] * 3
    before, after = (safetensors.torch.load_file(folder / f"{name}.safetensors") for name in ("initial", "model"))
    changed = {name.partition(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"head"}
    steps = [event["lr"][-1] for event in read(folder / "journal.jsonl") if event["event"] == "step"]
    cycle = fit_one_cycle(lr=3e-3, groups=3, steps_per_epoch=len(steps), epochs=1)[0]
    assert steps == pytest.approx([cycle.hyper(step)[0][-1] for step in range(len(steps))])


def test_where_the_curve_says_nothing_there_is_no_rate(small_set, tmp_path, quiet):
    curve = RangeTest(lrs=(1e-3,), losses=(1.0,), smoothed=(1.0,), suggestions={})
    with mock.patch.object(worker, "range_test", return_value=curve):
        found = lr_find(config(small_set, tmp_path), quiet)
        assert found.suggestions == {}
        result, warning = (
            next(event for event in read(found.folder / "journal.jsonl") if event["event"] == kind)
            for kind in ("range_result", "warning")
        )
        assert result["chosen"] is None
        assert warning["message"] == "The range test's curve says nothing about the learning rate."
        assert "no learning rate: the curve says nothing about it" in quiet.file.getvalue()
        trained = fine_tune(config(small_set, tmp_path, name="trained", epochs=1), quiet)
    warnings = [event["message"] for event in read(trained.folder / "journal.jsonl") if event["event"] == "warning"]
    assert any("says nothing about the learning rate; going on with 0.001 (default)." in words for words in warnings)


def test_a_job_leaves_everything_it_promises(small_set, tmp_path, quiet):
    settings = {"model": "test_resnet", "head": "fastai", "epochs": 1, "lr_find_steps": 20, "wandb": "offline"}
    wanted = config(small_set, tmp_path, **settings)
    result = fine_tune(wanted, quiet)
    assert result.folder == tmp_path / "run"
    for name in ("lr_find", "show_batch", "confusion", "top_losses"):
        with Image.open(result.folder / f"{name}.png") as image:
            assert min(image.size) > 200
    names = {path.name for path in result.folder.iterdir()}
    assert {
        "config.json",
        "journal.jsonl",
        "manifest.parquet",
        "report.html",
        "model.safetensors",
        "best.safetensors",
        "checkpoints",
        "wandb",
    } <= names
    assert len(list(result.folder.glob("wandb/offline-run-*/run-*.wandb"))) == 1
    kinds = [event["event"] for event in read(result.folder / "journal.jsonl")]
    assert kinds[0] == "run"
    assert kinds[-1] == "finished"
    assert kinds.count("step") == 2 * (53 // 8)
    assert kinds.count("epoch") == kinds.count("checkpoint") == 2
    assert 0 <= result.error_rate <= 1
    assert result.best is not None and result.best.error_rate <= result.error_rate
    summary(result, wanted, quiet)
    told = quiet.file.getvalue()
    assert "53 to train, 23 to validate" in told
    assert "the last 5 images of each epoch's order are dropped" in told
    assert f"error rate  {result.error_rate:.4f}" in told
    assert "--weights" in told


def test_the_command_that_goes_on_keeps_data_split_and_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = TrainConfig(data="photos", label_regex="(.+)_x", valid_fraction=0.3, split_seed=7, batch=32, seed=4)
    result = Result(
        error_rate=0, valid_loss=0, most_confused=[], quarantine=0, seconds=0, folder=tmp_path / "runs/first"
    )
    words = _continuing(result, wanted)
    assert words[:2] == ["onewarp", "train"]
    flags = dict(zip(words[2::2], words[3::2], strict=True))
    again = {"--data": "photos", "--label-regex": "(.+)_x", "--valid-fraction": "0.3", "--split-seed": "7"}
    again |= {"--batch": "32", "--weights": "runs/first/model.safetensors", "--seed": "5"}
    assert flags == again | {"--freeze-epochs": "0", "--epochs": "3"}


def test_the_command_that_goes_on_keeps_nested_settings_and_switches(tmp_path):
    wanted = TrainConfig(cache="decoded", cache_keep=True, augment=Augment(flip=0, max_rotate=20), subset=0.5)
    result = Result(error_rate=0, valid_loss=0, most_confused=[], quarantine=0, seconds=0, folder=tmp_path)
    words = " ".join(_continuing(result, wanted))
    assert "--cache decoded --cache-keep" in words
    assert "--augment.flip 0 --augment.max-rotate 20" in words
    assert "--subset 0.5" in words
    assert "--no-train-bn" in _continuing(result, TrainConfig(train_bn=False))


def test_how_images_are_read_is_set_by_the_configuration(small_set, tmp_path, quiet, monkeypatch):
    monkeypatch.setenv("ONEWARP_CACHE", str(tmp_path / "cache"))
    common = {"lr": 1e-3, "epochs": 1, "freeze_epochs": 0, "seed": 2}
    plain = {"subset": 0.5, "crop_pct": 0.8, "augment": {"crop": "resized", "padding": "border"}, **common}
    fine_tune(config(small_set, tmp_path, **plain), quiet)
    fine_tune(config(small_set, tmp_path, name="cached", cache="decoded", cache_keep=True, **plain), quiet)
    fine_tune(
        config(small_set, tmp_path, name="balanced", sampling="balanced", repeats=2, quality="high", **plain), quiet
    )
    told = quiet.file.getvalue()
    assert "subset    26 to train, 12 to validate" in told
    losses = {}
    for name in ("run", "cached", "balanced"):
        events = read(tmp_path / name / "journal.jsonl")
        assert (events[0]["train"], events[0]["valid"]) == (26, 12)
        losses[name] = [event["loss"] for event in events if event["event"] == "step"]
        assert len(losses[name]) == 26 // 8
    assert losses["run"] == losses["cached"]
    assert losses["run"] != losses["balanced"]
    assert len(list((tmp_path / "cache").glob("decoded-*"))) == 1
    again = TrainConfig.read(tmp_path / "run" / "config.json")
    assert again.augment == Augment(crop="resized", padding="border")


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"schedule": "one-cycle", "optimizer": "sgd", "lr": 0.1}, [0.1] * 3),
        ({"schedule": "flat-cos", "optimizer": "lamb"}, [1e-3] * 3),
        ({"schedule": "one-cycle", "lr": "1e-6:1e-4"}, [1e-6, 1e-5, 1e-4]),
        ({"schedule": "flat-cos", "lr": ":1e-3"}, [1e-4, 1e-4, 1e-3]),
        ({"schedule": "warmup-linear", "layer_decay": 0.5}, [1e-3 * 0.5**n for n in (4, 3, 2, 1, 0)]),
        ({"freeze_epochs": 0, "layer_groups": ["body.stem", "body.stages|body.head", "head"]}, [5e-6, 5e-5, 5e-4]),
    ],
)
def test_schedules_optimisers_and_groups_are_set_by_the_configuration(small_set, tmp_path, quiet, settings, rates):
    fine_tune(config(small_set, tmp_path, **{"epochs": 1, "subset": 0.4, "lr": 1e-3, **settings}), quiet)
    events = read(tmp_path / "run" / "journal.jsonl")
    (phase,) = [event for event in events if event["event"] == "phase"]
    assert phase["lr"] == pytest.approx(rates)
    assert events[0]["epochs"] == 1
    steps = [event for event in events if event["event"] == "step"]
    assert len(steps) == 2
    # LAMB clips, and says so.
    assert all(("grad_norm" in step) == (settings.get("optimizer") == "lamb") for step in steps)


def test_a_store_is_trained_on_like_the_folder_it_was_packed_from(small_set, tmp_path, quiet):
    pack(scan(small_set), tmp_path / "packed", kind="decoded")
    settings = {"lr": 1e-3, "epochs": 1, "freeze_epochs": 0}
    results = [
        fine_tune(config(data, tmp_path, name=name, **settings), quiet)
        for name, data in (("files", small_set), ("store", tmp_path / "packed"))
    ]
    assert results[0].valid_loss == results[1].valid_loss
    weights = [safetensors.torch.load_file(result.folder / "model.safetensors") for result in results]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_run_that_stopped_goes_on_to_the_same_weights_to_the_bit(prepared, copies):
    settings = {
        "model": "test_resnet",
        "head": "fastai",
        "epochs": 2,
        "freeze_epochs": 2,
        "lr": 1e-3,
        "size": 32,
        "mixup": 0.2,
        "ema": 0.9,
    }
    undisturbed = prepared("undisturbed", **settings)
    for stop_after in (1, 2, 3):
        stopped = copies(undisturbed, f"stopped{stop_after}")

        def stop(metrics, epochs=iter(range(1, 5)), after=stop_after):  # noqa: B008
            if next(epochs) == after:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            run(stopped, "train", Ranks(), report=stop)
        run(stopped, "train", Ranks())
    run(undisturbed, "train", Ranks())
    expected = safetensors.torch.load_file(undisturbed / "model.safetensors")
    for stop_after in (1, 2, 3):
        stopped = undisturbed.with_name(f"stopped{stop_after}")
        ours = safetensors.torch.load_file(stopped / "model.safetensors")
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
        steps = [event["step"] for event in read(stopped / "journal.jsonl") if event["event"] == "step"]
        assert steps == list(range(4 * 6))


def test_a_finished_run_is_not_run_again_and_another_configuration_is_refused(small_set, tmp_path, quiet):
    wanted = config(small_set, tmp_path, epochs=1, freeze_epochs=0, lr=1e-3)
    first = fine_tune(wanted, quiet)
    before = (tmp_path / "run/journal.jsonl").read_bytes()
    again = fine_tune(wanted, quiet)
    assert again.error_rate == first.error_rate
    assert (tmp_path / "run/journal.jsonl").read_bytes() == before
    lr_find(wanted, quiet)
    assert fine_tune(wanted, quiet).error_rate == first.error_rate
    with pytest.raises(UserError, match="exists with another configuration: --lr was 0.001 and is now 0.002"):
        fine_tune(config(small_set, tmp_path, epochs=1, freeze_epochs=0, lr=2e-3), quiet)


def test_auto_precision_is_whatever_the_run_began_with(small_set, tmp_path, quiet):
    settings = {"epochs": 1, "freeze_epochs": 0, "lr": 1e-3}
    fine_tune(config(small_set, tmp_path, precision="bf16", **settings), quiet)
    assert prepare(config(small_set, tmp_path, **settings), quiet)[0].read_config().precision == "bf16"
    with pytest.raises(UserError, match="--precision was bf16 and is now fp32"):
        prepare(config(small_set, tmp_path, precision="fp32", **settings), quiet)
    # A cluster's machines chose for themselves, each time.
    path = tmp_path / "run/config.json"
    path.write_text(path.read_text().replace('"bf16"', '"auto"'))
    prepare(config(small_set, tmp_path, precision="fp32", **settings), quiet)


def test_a_worker_that_does_not_see_the_run_says_where_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{socket.gethostname()} does not see the run's folder {tmp_path}"):
        run(tmp_path, "train", Ranks())


def test_lr_find_alone(small_set, tmp_path, quiet):
    found = lr_find(config(small_set, tmp_path, lr_find_steps=20), quiet)
    assert len(found.lrs) == len(found.losses) > 5
    assert (found.folder / "lr_find.png").exists()


def test_files_that_cannot_be_read_are_named_and_left_out(small_set, tmp_path, quiet):
    data = shutil.copytree(small_set, tmp_path / "data")
    (data / "train/class0/broken.jpg").write_bytes((data / "train/class0/000.jpg").read_bytes()[:700])
    (data / "valid/class1/empty.jpg").touch()
    result = fine_tune(config(data, tmp_path, epochs=1, freeze_epochs=0, lr=1e-3), quiet)
    told = quiet.file.getvalue()
    assert result.quarantine == 2
    assert "train/class0/broken.jpg" in told
    assert "valid/class1/empty.jpg" in told
    quarantine = (result.folder / "quarantine.txt").read_text()
    assert "train/class0/broken.jpg" in quarantine
    assert "valid/class1/empty.jpg" in quarantine


def test_a_loss_that_is_no_number_stops_the_run_in_words(prepared):
    path = prepared("run", epochs=1, freeze_epochs=0, lr=1e30)
    with pytest.raises(UserError, match=r"The loss became .* at step \d of epoch 0.*Lower --lr"):
        run(path, "train", Ranks())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 8}, "--size is 8; it must be between 32 and 1024 pixels"),
        ({"size": 4000}, "--size is 4000"),
        ({"freeze_to": -1}, "--freeze-to is -1; it must be left out with --schedule fine-tune"),
        ({"schedule": "one-cycle", "freeze_to": 3}, "--freeze-to is 3, and test_convnext has 3 layer groups here."),
        ({"batch": 54}, "--batch 54 is larger than the 53 training images"),
        ({"model": "resnet43"}, "unknown to torchvision and to timm"),
        ({"data": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"weights": "absent.pth"}, "no such file"),
        ({"epochs": 0, "freeze_epochs": 0}, "--epochs is 0"),
        ({"label_regex": "(.+)_nothing"}, "matches"),
        ({"label_csv": "absent.csv"}, "absent.csv"),
        ({"lr": -1}, "--lr is -1"),
        ({"lr": "1e-3:x"}, "--lr is 1e-3:x; it must be a number greater than 0"),
        ({"lr": "1e-6:1e-4"}, "--lr is 1e-6:1e-4; it must be one number with --schedule fine-tune"),
        ({"lr": ":1e-4", "schedule": "one-cycle", "layer_decay": 0.5}, "one number with --layer-decay"),
        ({"lr": 1e-3, "lr_choice": "valley"}, "--lr-choice is valley; it must be left out where --lr is given"),
        ({"lr_choice": "deepest"}, "lr_choice"),
        ({"sizes": "32:1,48"}, "--sizes is '32:1,48'; it must be SIZE:EPOCHS"),
        ({"sizes": "32:1,64:1"}, "--size is 48; it must be left out with --sizes 32:1,64:1, which makes it 64"),
        ({"lr_find_steps": 101}, "--lr-find-steps is 101; it must be between 20 and 100"),
        ({"layer_groups": ["body.*"]}, "--layer-groups"),
        ({"schedule": "one-cycle", "epochs": 0}, "--epochs is 0; it must be more than 0 with --schedule one-cycle"),
        ({"subset": 0}, "--subset is 0"),
        ({"label_smoothing": 1}, "--label-smoothing is 1"),
        ({"ema": 1}, "--ema is 1"),
        ({"repeats": 2, "mixup": 0.2}, "--repeats is 2; it must be 1 with --mixup"),
        ({"schedule": "one-cycle", "freeze_epochs": 7}, "--freeze-epochs is 7; it must be left out"),
        ({"focal_gamma": 5}, "--focal-gamma is 5"),
        ({"micro_batch": 1}, "--micro-batch is 1; it must be at least 2"),
        (
            {"micro_batch": 2, "batch": 7},
            "--micro-batch 2 splits the 7 images of a worker so .* Choose --micro-batch 3",
        ),
        ({"clip_norm": 0}, "--clip-norm is 0.0; it must be greater than 0"),
        ({"clip_norm": float("inf")}, "--clip-norm is inf"),
        ({"grad_compression": "int8"}, "'grad_compression' is 'int8'"),
        ({"mixup": 0.2, "batch": 7, "workers": 2}, "a pair that MixUp or CutMix would"),
        ({"batch": 50, "subset": 0.5}, "--batch 50 is larger than the 26 training images of --subset 0.5"),
        ({"repeats": 3}, "--repeats is 3; it must be a divisor of the batch, 8"),
        ({"cache_keep": True}, "--cache-keep is True; it must be left out where --cache is off"),
        ({"augment": {"flip": 2}}, "Augment.flip is 2"),
        ({"augment": {"flop": 2}}, "Unknown setting 'flop'"),
        ({"name": "../escape"}, "plain folder name"),
        ({"workers": 2, "batch": 3}, "--batch 3 gives some of the 2 workers fewer than two images"),
        ({"workers": 4000}, "--workers 4000: this machine has"),
        ({"seed": 2**64}, "--seed is"),
        ({"colour": "red"}, "Unknown setting 'colour'"),
    ],
)
def test_mistakes_are_answered_in_one_paragraph(small_set, tmp_path, quiet, settings, words):
    with pytest.raises(UserError, match=words) as caught:
        fine_tune(config(small_set, tmp_path, **settings), quiet)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_worker_runs_a_configuration_file_in_one_process(small_set, tmp_path):
    settings = {
        **PLAIN,
        "data": str(small_set),
        "runs": str(tmp_path),
        "name": "run",
        "epochs": 1,
        "lr": 1e-3,
    }
    (tmp_path / "run.json").write_text(json.dumps({**settings, "freeze_epochs": 0}))
    command = [sys.executable, "-m", "trainer.worker", "--config", str(tmp_path / "run.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "run/journal.jsonl")[-1]["event"] == "finished"


def test_paths_may_be_strings_and_the_folder_a_path():
    config = TrainConfig(data=Path("a"), runs="b", weights="c", label_csv="d")  # ty: ignore[invalid-argument-type]
    assert config == TrainConfig(data="a", runs=Path("b"), weights=Path("c"), label_csv=Path("d"))


def test_rates_may_be_a_slice_and_are_the_same_in_words():
    low_high = TrainConfig(schedule="one-cycle", lr=slice(1e-6, 1e-4))  # ty: ignore[invalid-argument-type]
    high = TrainConfig(schedule="one-cycle", lr=slice(1e-3))  # ty: ignore[invalid-argument-type]
    assert low_high == TrainConfig(schedule="one-cycle", lr="1e-6:1e-4")
    assert high == TrainConfig(schedule="one-cycle", lr=":1e-3")
    for config in (low_high, high, TrainConfig(lr="0.01"), TrainConfig(lr=0.01), TrainConfig()):
        assert TrainConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config
    assert TrainConfig(lr="0.01").lr == 0.01


def test_the_chosen_suggestion_is_trained_with(small_set, tmp_path, quiet):
    settings = {"model": "test_resnet", "size": 32, "lr_find_steps": 30, "freeze_epochs": 0, "epochs": 1, "seed": 1}
    fine_tune(config(small_set, tmp_path, lr_choice="steep", **settings), quiet)
    events = read(tmp_path / "run" / "journal.jsonl")
    (found,) = [event for event in events if event["event"] == "range_result"]
    assert len(set(found["suggestions"].values())) > 2  # they differ, so it tells which was taken
    assert (found["choice"], found["chosen"]) == ("steep", found["suggestions"]["steep"])
    phases = {event["phase"]: event for event in events if event["event"] == "phase"}
    assert phases["unfrozen"]["lr"][-1] == pytest.approx(found["suggestions"]["steep"] / 2)
    assert "(steep)" in quiet.file.getvalue()


def test_best_epoch_and_advice_are_told(tmp_path, quiet):
    (tmp_path / "model.safetensors").touch()
    best = Best(epoch=2, error_rate=0.125, valid_loss=0.5)
    told = {"error_rate": 0.25, "valid_loss": 0.75, "most_confused": [], "quarantine": 0, "seconds": 1}
    summary(Result(folder=tmp_path, best=best, advice=("Overfitting: …",), **told), TrainConfig(), quiet)
    lines = quiet.file.getvalue().splitlines()
    assert "best epoch  2, error rate 0.1250, kept in best.safetensors" in lines
    assert "note        Overfitting: …" in lines


def test_dropout_differs_by_step_and_rank():
    from trainer.loop import dropout_seed

    seeds = [dropout_seed(0, e, s, r) for e in range(5) for s in range(20) for r in range(4)]
    assert len(set(seeds)) == len(seeds)
    assert np.all(np.array(seeds) < 2**63)
