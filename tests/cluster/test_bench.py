"""One command finds each benchmark; what they measure is tested in `tests/benchmarks`."""

import importlib
from typing import get_args, get_type_hints

import pytest

from benchmarks.record import Options
from cluster import bench
from pipelines.errors import UserError


@pytest.mark.parametrize("name", get_args(bench.Name))
def test_each_benchmark_is_there_and_tells_its_command(name):
    module = importlib.import_module(f"benchmarks.{name}")
    assert issubclass(get_type_hints(module.main)["options"], Options)
    assert f"    onewarp bench {name}" in module.__doc__
    assert f" {name}: " in " ".join(bench.bench.__doc__.split())  # what it answers


def test_flags_are_those_of_the_benchmark(small_set, monkeypatch):
    from benchmarks import steady

    asked = []
    # As `main` is found by its options, so must what stands in for it.
    monkeypatch.setattr(steady, "main", lambda options: asked.append(options))
    steady.main.__annotations__["options"] = steady.SteadyOptions
    bench.main(["steady", "--data", str(small_set), "--quick"])
    assert asked == [steady.SteadyOptions(data=str(small_set), quick=True)]


def test_a_benchmark_that_is_none_is_told(capsys):
    with pytest.raises(UserError, match="onewarp bench loader: there is no such benchmark. Did you mean loaders"):
        bench.main(["loader"])
    with pytest.raises(SystemExit) as ended:
        bench.main([])
    assert ended.value.code == 0
    assert "bench NAME" in capsys.readouterr().out
