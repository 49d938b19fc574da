"""The chapter of fastai's book as docs/from-fastai.md translates it: every piece of it runs, in the page's order."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from tests.cluster.conftest import onewarp  # noqa: F401
from tests.conftest import picture
from trainer import TrainConfig
from trainer.apply_config import EvaluateConfig

PAGE = (Path(__file__).parents[1] / "docs/from-fastai.md").read_text()
PIECES = re.findall(r"```(sh|python) here\n(.*?)```", PAGE, re.DOTALL)
# The page's own settings, on a small model without a download, in this process.
SMALL = {
    'model="resnet34", size=224': 'model="test_resnet", size=48, pretrained=False, workers=0, batch=8, wandb="off"',
    'model="resnet50"': 'model="test_vit"',
    "epochs=12": "epochs=2",
    "epochs=6": "epochs=1",
    "EvaluateConfig(": "EvaluateConfig(workers=0, ",
}


@pytest.fixture
def pets(tmp_path):
    """Photographs named as the pets are, beside which the page's code runs."""
    (tmp_path / "pets/images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for label, name in enumerate(["Abyssinian", "great_pyrenees", "keeshond"]):
        for i in range(20):
            picture(rng, 80, 110, label).save(tmp_path / f"pets/images/{name}_{i}.jpg")
    return tmp_path


def test_the_page_runs(onewarp, pets):  # noqa: F811
    kept, names = dict(SMALL), {}
    for language, code in PIECES:
        for before, after in SMALL.items():
            if before in code:
                code = code.replace(before, after)
                kept.pop(before, None)
        if language == "python":
            exec(code, names)
            continue
        for line in code.replace("RUN", names["result"].folder.name if "result" in names else "").splitlines():
            _, *words = shlex.split(line)
            told = onewarp(*words)
            assert told.returncode == 0, told.stderr
    assert not kept  # each substitution is of something on the page
    assert names["judged"].metrics.images == 60 // 5 and len(names["said"].paths) == 60
    assert {"show_batch.png", "same.png", "predictions.csv", "again.csv"} <= {path.name for path in pets.iterdir()}
    assert len(list((pets / "runs").iterdir())) == 7 + 1


def test_every_flag_on_the_page_is_there():
    table = PAGE.split("What has another name")[1]
    known = {field.name for kind in (TrainConfig, EvaluateConfig) for field in fields(kind)}
    for cell in re.findall(r"^\| .*? \| (.*) \|$", table, re.MULTILINE)[2:]:
        for name in re.findall(r"`([a-z_]+)(?:=[^`]*)?`", cell.partition(" of `")[0]):
            assert name in known, name
