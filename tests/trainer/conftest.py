"""Runs that are prepared and ready to start."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from trainer.config import TrainConfig
from trainer.prepare import prepare

# A body without batch statistics and without dropout: what it computes does not depend on the number of ranks.
PLAIN = {
    "model": "test_convnext",
    "head": "plain",
    "pretrained": False,
    "size": 48,
    "batch": 8,
    "wandb": "off",
}


@pytest.fixture
def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def prepared(small_set: Path, tmp_path: Path, quiet: Console) -> Callable[..., Path]:
    """`prepared("name", **settings)`: the folder of a run whose workers have not started."""

    def make(name: str, **settings: object) -> Path:
        config = TrainConfig.from_dict(
            {**PLAIN, "data": str(small_set), "runs": str(tmp_path), "workers": 0, "name": name, **settings}
        )
        return prepare(config, quiet)[0].path

    return make


@pytest.fixture
def copies(tmp_path: Path) -> Callable[[Path, str], Path]:
    """`copies(run, "name")`: the same prepared run under another name."""
    return lambda run, name: Path(shutil.copytree(run, tmp_path / name))
