"""The recorder's statistics and what it writes."""

import json
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest

from benchmarks.record import Figure, Options, Record, mean_interval, median_interval, student
from pipelines.errors import UserError


@pytest.mark.parametrize(
    ("n", "rank", "coverage"),
    # Rank from the low and the high end, and coverage: the table of the sign test.
    [(5, 1, 93.75), (6, 1, 96.875), (8, 1, 99.21875), (9, 2, 96.09375), (15, 4, 96.484375), (20, 6, 95.861053)],
)
def test_the_interval_of_a_median_has_the_ranks_of_the_sign_test(n, rank, coverage):
    samples = list(range(1, n + 1))
    random.Random(0).shuffle(samples)
    assert median_interval(samples) == pytest.approx((rank, n + 1 - rank, coverage))


def test_the_interval_of_a_median_covers_it_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        low, high, coverage = median_interval(rng.exponential(size=9).tolist())
        hits += low <= np.log(2) <= high
    assert hits / 20 == pytest.approx(coverage, abs=1.5)


def test_the_interval_of_a_mean():
    low, high, coverage = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert (low + high) / 2 == 2.5 and coverage == 95
    assert high - low == pytest.approx(2 * 3.182 * 1.2909944 / 2)
    assert mean_interval([7.0]) == (7.0, 7.0, 0.0)
    assert median_interval([7.0]) == (7.0, 7.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class SomeOptions(Options):
    warm_up: int = 3
    seconds: float = 2.0
    seeds: tuple[int, ...] = (0, 1)


@pytest.fixture
def record(tmp_path):
    return Record(
        title="Two ways",
        name="some",
        options=SomeOptions(
            data="my photographs", quick=True, warm_up=5, seeds=(3, 4), json=tmp_path / "new" / "some.json"
        ),
        figures=[
            Figure(row="ours", column="img/s", samples=[900.0, 1000.0, 1100.0]),
            Figure(row="theirs", column="img/s", samples=[90.0, 100.0, 110.0]),
            Figure(row="theirs", column="dB", samples=[30.0, 32.0], centre="mean"),
        ],
        skipped={"another": "not installed: another"},
    )


def test_a_record_holds_every_sample_and_how_to_ask_again(record, capsys):
    record.publish()
    written = json.loads(record.options.json.read_text())
    assert written["command"] == "onewarp bench some --data 'my photographs' --quick --warm-up 5 --seeds 3 4"
    assert written["config"] == {
        "data": "my photographs",
        "threads": 2,
        "quick": True,
        "warm_up": 5,
        "seconds": 2.0,
        "seeds": [3, 4],
    }
    ours, _, mean = written["figures"]
    assert ours["samples"] == [900, 1000, 1100] and ours["n"] == 3
    assert ours["median"] == 1000 and ours["interval"] == [900, 1100] and ours["coverage_percent"] == 75
    assert mean["mean"] == mean["median"] == 31 and "mean" not in ours and mean["method"] == "Student's t"
    assert written["skipped"] == {"another": "not installed: another"}
    assert {"cpu", "cores", "python", "versions", "commit"} <= set(written["environment"])
    assert {"torch", "nvidia-dali-cuda130"} <= set(written["environment"]["versions"])
    assert str(record.options.json.parent) not in record.options.json.read_text()  # where it was written is no matter
    table = record.options.json.with_suffix(".md").read_text()
    assert table in capsys.readouterr().out


def test_a_record_that_is_not_whole_takes_no_whole_ones_place(record):
    path = record.options.json
    record.publish()
    whole = path.read_bytes()
    replace(record, title="One way").publish(whole=False)
    assert path.read_bytes() == whole
    unfinished = path.with_name("some-unfinished.json")
    assert json.loads(unfinished.read_text())["title"] == "One way"
    record.publish()
    assert sorted(file.name for file in path.parent.iterdir()) == ["some.json", "some.md"]


@pytest.mark.parametrize("name", ["some.md", ".", "file/some.json"])
def test_where_a_record_cannot_go_is_told_before_anything_is_measured(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--json .*(Name a file|Choose another)"):
        SomeOptions(json=tmp_path / name)


def test_the_table_has_a_cell_for_each_figure(record):
    lines = record.markdown().splitlines()
    assert "| | img/s | dB |" in lines
    assert "| ours | 1,000 [900, 1,100] |  |" in lines
    assert "| theirs | 100 [90, 110] | 31 [18.3, 43.7] |" in lines
    assert any(line.startswith("Left out: another (not installed: another)") for line in lines)
    assert any("median of 3 [75% interval]" in line for line in lines)


def test_students_quantiles_are_those_of_tables():
    tables = {1: 12.706, 2: 4.303, 4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228, 30: 2.042, 124: 1.979}
    for freedom, quantile in tables.items():
        assert student(freedom) == pytest.approx(quantile, rel=2e-3)
