"""The README quotes its records: each sentence is made of the cells that it means, no number comes from elsewhere."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.record import short

ROOT = Path(__file__).parents[2]
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")


class Cells:
    """A record's figures, as the README tells them."""

    def __init__(self, record):
        self._figures = {(figure["row"], figure["column"]): figure for figure in record["figures"]}

    def figure(self, row, column):
        return self._figures[row, column]

    def value(self, row, column):
        figure = self.figure(row, column)
        return figure["mean" if "mean" in figure else "median"]

    def told(self, row, column, form=None):
        value = self.value(row, column)
        return short(value) if form is None else format(value, form)


def photographs(cells):
    ours, fastai = "onewarp train", "fastai, chapter 5"
    error, wall, ratio, less = "validation error", "wall, s", "ours ÷ this, by the wall", "ours − this, error"
    yield f"mean error {cells.told(ours, error, '.3f')} in {cells.told(ours, wall, ',.0f')} s"
    yield f"fastai {cells.told(fastai, error, '.3f')} in {cells.told(fastai, wall, ',.0f')} s"
    low, high = cells.figure(fastai, less)["interval"]
    yield f"{-cells.value(fastai, less):.3f} [{-high:.3f}, {-low:.3f}] less"
    yield f"in {cells.told(fastai, ratio, '.3f')} of the time"


def loaders(cells):
    for words, row in (
        ("{} from JPEGs", "onewarp Loader, full augmentation"),
        ("{} from a decoded store", "the same from a decoded store"),
        ("DALI decoding and nothing else {}", "DALI, decoding alone (the ceiling)"),
        ("albumentations' crop, flip and light {}", "albumentations, RandomResizedCrop + flip + light"),
        ("the repeated torchvision chain {}", "torchvision v2, repeated chain"),
        ("fastai's presizing {}", "fastai, presizing"),
    ):
        yield words.format(cells.told(row, "img/s"))


def interpolation(cells):
    for words, row in (
        ("one warp {} dB", "onewarp: one warp (Loader)"),
        ('`quality="high"` {}', "onewarp: one warp of 2 x 2 points a pixel"),
        ("presizing and one warp {}", "presize to 460, then one warp"),
        ("fastai's own operators {}", "fastai's own operators"),
        ("repeated interpolation {}", "repeated interpolation"),
    ):
        yield words.format(cells.told(row, "PSNR, dB", ".1f"))
    six = "6 transforms in a row"
    one, chain = cells.told(six, "one warp, dB", ".1f"), cells.told(six, "one by one, dB", ".1f")
    yield f"six transforms in a row {one} by one warp, {chain} one by one"


def steady(cells):
    column = "figure"
    order = cells.told("order of a whole epoch of 10,000,000, s", column, ".2f")
    yield f"the order of 10 million samples takes {order} s"
    scan = cells.told("speed of a scan ÷ decoding alone", column, ".2f")
    yield f"a scan runs at {scan} of the speed of decoding alone"
    starts = [f"start of an epoch at its {name} step, s" for name in ("first", "middle", "last")]
    yield f"an epoch starts anywhere within {max(cells.value(row, column) for row in starts):.2f} s (median)"


def rows():
    """(name, what is told, records) of each row of the table of measurements."""
    section = (ROOT / "README.md").read_text().split("\n## Measured\n")[1].split("\n## ")[0]
    for line in section.splitlines():
        if "benchmarks/results/" in line:
            _, _, told, how, _ = re.split(r"(?<!\\)\|", line)
            (record,) = (ROOT / link for link in re.findall(r"\((benchmarks/results/[^)]+)\)", how))
            yield pytest.param(told, how, record, id=record.stem)


def measured(record):
    """Every number of a record, as it may be told."""
    values = [value for value in record["config"].values() for value in (value if isinstance(value, list) else [value])]
    for figure in record["figures"]:
        centre = figure["mean" if "mean" in figure else "median"]
        values += [centre, *figure["interval"], figure["n"]]
    texts = [figure["row"] for figure in record["figures"]] + record["remarks"]
    values += [float(number.replace(",", "")) for text in texts for number in NUMBER.findall(text)]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    return [told for number in numbers for told in (number, -number)]


def quotes(number, values):
    """Whether it is one of them, rounded to its own digits."""
    digits = len(number.partition(".")[2])
    return any(f"{value:.{digits}f}" == number.replace(",", "") for value in values)


def test_every_row_is_linked():
    section = (ROOT / "README.md").read_text().split("\n## Measured\n")[1].split("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert len(table) == len(list(rows())) >= 4


@pytest.mark.parametrize(("told", "how", "link"), rows())
def test_each_sentence_is_the_records(told, how, link):
    record = json.loads(link.with_suffix(".json").read_text())
    assert link.exists()
    assert re.search(r"(?:onewarp bench |benchmarks\.)(\w+)", record["command"])[1] in how
    assert not record["config"]["quick"]
    missing = [sentence for sentence in globals()[link.stem](Cells(record)) if sentence not in told]
    assert not missing
    strange = [number for number in NUMBER.findall(told) if not quotes(number, measured(record))]
    assert not strange


def test_a_number_that_is_not_is_found_out():
    assert quotes("0.18", [0.1779]) and quotes("1,207", [1207.29])
    assert not quotes("0.17", [0.1779]) and not quotes("1,208", [1207.29])
