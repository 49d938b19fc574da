"""`onewarp evaluate` and `onewarp predict` as a person types them."""

import csv
import io
import json

import pytest
from rich.console import Console

from trainer import TrainConfig, fine_tune


@pytest.fixture(scope="module")
def run(small_set, tmp_path_factory):
    config = {"data": str(small_set), "model": "test_convnext", "head": "plain", "pretrained": False, "size": 48}
    config |= {"batch": 8, "epochs": 1, "freeze_epochs": 0, "lr": 4e-3, "wandb": "off", "workers": 0}
    config |= {"runs": str(tmp_path_factory.mktemp("runs")), "name": "run"}
    return fine_tune(TrainConfig.from_dict(config), Console(file=io.StringIO())).folder


def test_a_folder_is_predicted(onewarp, run, small_set, tmp_path):
    (tmp_path / "new/more").mkdir(parents=True)
    for i, file in enumerate(sorted((small_set / "valid/class1").glob("*"))):
        (tmp_path / "new" / ("more" if i % 2 else ".") / file.name).write_bytes(file.read_bytes())
    (tmp_path / "new/bad\n.jpg").touch()
    told = onewarp("predict", run, "new", "--workers", "0", "--out", "said.csv")
    assert told.returncode == 0, told.stderr
    assert r"left out  'bad\n.jpg': the file is empty" in told.stdout
    assert "images    8\n" in told.stdout
    assert f"table     {tmp_path}/said.csv" in told.stdout
    with (tmp_path / "said.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["path"] for row in rows) == [row["path"] for row in rows]
    assert sum(row["path"].startswith("more/") for row in rows) == 4
    counts = [line.split() for line in told.stdout.splitlines() if line.endswith(("class0", "class1", "class2"))]
    assert sum(int(count) for count, _ in counts) == 8
    assert {name: int(count) for count, name in counts} == {
        name: sum(row["predicted"] == name for row in rows) for _, name in counts
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "said-quarantine.txt", "said.csv"]


def test_a_run_is_evaluated(onewarp, run, small_set, tmp_path):
    told = onewarp("evaluate", run, "--workers", "0", "--data", small_set, "--tta", "1", "--out", "judged")
    assert told.returncode == 0, told.stderr
    assert f"images    23: the validation part (by folders) of {small_set}" in told.stdout
    record = json.loads((tmp_path / "judged/evaluation.json").read_text())
    assert f"error rate    {record['error_rate']:.4f}   ({23 - record['right']} of 23 wrong)" in told.stdout
    assert (record["tta"], record["images"]) == (1, 23)
    assert "class    images  precision  recall" in told.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["judged"]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["predict", "/nowhere", "."], "The run /nowhere does not exist"),
        (["predict", "RUN", "/nowhere"], "'/nowhere' does not exist"),
        (["predict", "RUN", "."], "There are no images in"),
        (["predict", "RUN", ".", "--out", "x.txt"], "must end in .csv or .parquet"),
        (["predict", "RUN", ".", "--threshold", "7"], "--threshold is 7"),
        (["predict", "RUN", ".", "--weights", "best"], "no best weights"),
        (["evaluate", "RUN", "--data", "."], "There are no images in"),
        (["evaluate", "RUN", "--tta", "-3"], "--tta is -3"),
    ],
)
def test_a_mistake_is_one_paragraph_and_leaves_nothing(onewarp, run, tmp_path, words, answer):
    (run / "best.safetensors").unlink(missing_ok=True)
    told = onewarp(*[str(run) if word == "RUN" else word for word in words])
    assert told.returncode == 2
    assert answer in told.stderr
    assert "Traceback" not in told.stderr + told.stdout
    assert len(told.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(onewarp, run, small_set, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.apply.launcher", lambda workers: interrupted)
    for words in (["predict", run, small_set], ["evaluate", run, "--out", "judged"]):
        told = onewarp(*words, "--workers", "0")
        assert (told.returncode, told.stderr) == (130, "interrupted before all was written\n")
        assert list(tmp_path.iterdir()) == []
