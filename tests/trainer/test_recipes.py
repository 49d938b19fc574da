"""Recipes: their commands are what the command line takes, and each trains."""

import io
import shlex

import pytest
import tyro
from rich.console import Console

from trainer import TrainConfig, fine_tune, journal
from trainer.recipes import RECIPES

# The same in little.
LITTLE = {"epochs": 2, "micro_batch": 4, "batch": 8}


@pytest.mark.parametrize("name", RECIPES)
def test_its_command_means_its_settings(name):
    words = shlex.split(RECIPES[name].command("my photographs"))
    assert words[:4] == ["onewarp", "train", "--data", "my photographs"]
    config = tyro.cli(TrainConfig, args=words[2:])
    assert config == RECIPES[name].config(data="my photographs")
    assert {key: getattr(config, key) for key in RECIPES[name].settings} == RECIPES[name].settings


@pytest.mark.parametrize("name", RECIPES)
def test_it_trains(name, small_set, tmp_path):
    little = {key: min(LITTLE[key], value) for key, value in RECIPES[name].settings.items() if key in LITTLE}
    little = {
        "batch": 8,
        "model": "test_resnet",
        "pretrained": False,
        "lr_find_steps": 20,
        "wandb": "off",
        "precision": "fp32",
    } | little
    config = RECIPES[name].config(data=small_set, workers=0, threads=1, runs=tmp_path, name="run", **little)
    result = fine_tune(config, Console(file=io.StringIO()))
    assert 0 <= result.error_rate <= 1
    run, *_ = (event for event in journal.read(tmp_path / "run/journal.jsonl") if event["event"] == "run")
    epochs = [event for event in journal.read(tmp_path / "run/journal.jsonl") if event["event"] == "epoch"]
    assert TrainConfig.from_dict(run["config"]) == config
    assert len(epochs) == len(config.size_of_epochs)
