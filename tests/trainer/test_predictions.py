"""The table of predictions, read back."""

import csv

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.errors import UserError
from trainer.apply import best
from trainer.apply_config import check_table
from trainer.predictions import decide, write

# Names that a CSV must quote, or that are no text at all.
CLASSES = ["cat", 'a "dog"', "fox, red", "two\nlines", "owl", "emu", "gnu"]
PATHS = ["a.jpg", "b,c.jpg", 'd"e.jpg', "f\udcffg.jpg"]


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(4, 7, generator=generator).softmax(dim=1)


def table(path, probabilities_NC, classes=CLASSES, threshold=0.0):
    best_NK, probabilities_NK = (part.numpy() for part in best(probabilities_NC))
    write(
        path,
        paths=PATHS,
        predicted_N=decide(best_NK, probabilities_NK, threshold),
        best_NK=best_NK,
        probabilities_NK=probabilities_NK,
        classes=classes,
    )
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_each_image_has_its_best_classes_in_order(drawn, tmp_path, suffix):
    rows = table(tmp_path / f"p.{suffix}", drawn)
    assert list(rows[0])[:5] == ["path", "predicted", "probability", "top1", "probability1"]
    assert [row["path"] for row in rows] == [*PATHS[:3], repr(PATHS[3])]
    for row, probability_C in zip(rows, drawn.numpy(), strict=True):
        order = np.argsort(-probability_C)[:5]
        assert [row[f"top{k}"] for k in range(1, 6)] == [CLASSES[i] for i in order]
        assert [np.float32(row[f"probability{k}"]) for k in range(1, 6)] == probability_C[order].tolist()
        assert row["predicted"] == row["top1"] and row["probability"] == row["probability1"]


def test_none_of_the_classes_is_an_empty_cell(drawn, tmp_path):
    threshold = float(drawn.max(dim=1).values.sort().values[1])  # one image stays below
    doubtful = int(drawn.max(dim=1).values.argmin())
    for suffix, nothing in (("csv", ""), ("parquet", None)):
        rows = table(tmp_path / f"p.{suffix}", drawn, threshold=threshold)
        assert [row["predicted"] == nothing for row in rows] == [i == doubtful for i in range(4)]
        assert rows[doubtful]["top1"] == CLASSES[int(drawn[doubtful].argmax())]


def test_where_there_are_fewer_than_five_classes_there_are_fewer_columns(drawn, tmp_path):
    (first, *_) = table(tmp_path / "p.csv", drawn[:, :3], CLASSES[:3])
    assert list(first)[-1] == "probability3"


def test_equal_probabilities_keep_the_order_of_the_classes():
    assert best(torch.full((1, 300), 0.5))[0].tolist() == [[0, 1, 2, 3, 4]]


def test_a_table_that_cannot_be_written_leaves_the_old_one(drawn, tmp_path, monkeypatch):
    path = tmp_path / "p.csv"
    table(path, drawn)
    before = path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["p.csv"]
    (tmp_path / ".p.csv.partial").mkdir()  # stands in the way
    with pytest.raises(UserError, match=r"cannot be written to .*p\.csv"):
        table(path, drawn.flip(1))
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="in a folder that is there"):
        table(tmp_path / "nowhere" / "p.parquet", drawn)


def test_the_name_says_the_format(tmp_path):
    check_table(tmp_path / "p.csv"), check_table(tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"p\.xlsx must end in \.csv or \.parquet"):
        check_table(tmp_path / "p.xlsx")
