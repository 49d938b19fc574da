"""The numbers that the README quotes are those of the records that it links."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")


def rows():
    """(name, what is told, records) of each row of the table of measurements."""
    section = (ROOT / "README.md").read_text().split("\n## Measured\n")[1].split("\n## ")[0]
    for line in section.splitlines():
        if "benchmarks/results/" in line:
            _, _, told, how, _ = re.split(r"(?<!\\)\|", line)
            records = [ROOT / link for link in re.findall(r"\((benchmarks/results/[^)]+)\)", how)]
            yield pytest.param(told, how, records, id=records[0].stem)


def measured(record):
    """Every number of a record, as it may be told: differences also the other way round."""
    values = [value for value in record["config"].values() for value in (value if isinstance(value, list) else [value])]
    for figure in record["figures"]:
        centre = figure["median" if "median" in figure else "mean"]
        values += [centre, *figure["interval"], figure["n"]]
    values += [float(number.replace(",", "")) for row in record["figures"] for number in NUMBER.findall(row["row"])]
    values += [float(number.replace(",", "")) for text in record["remarks"] for number in NUMBER.findall(text)]
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


@pytest.mark.parametrize(("told", "how", "links"), rows())
def test_each_number_is_in_the_record(told, how, links):
    records = [json.loads(link.with_suffix(".json").read_text()) for link in links]
    for record, link in zip(records, links, strict=True):
        assert link.exists()
        assert re.search(r"(?:onewarp bench |benchmarks\.)(\w+)", record["command"])[1] in how
        assert not record["config"]["quick"]
    values = [value for record in records for value in measured(record)]
    strange = [number for number in NUMBER.findall(told) if not quotes(number, values)]
    assert not strange


def test_a_number_that_is_not_is_found_out():
    assert quotes("0.18", [0.1779]) and quotes("1,207", [1207.29])
    assert not quotes("0.17", [0.1779]) and not quotes("1,208", [1207.29])
