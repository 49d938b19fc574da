"""One command finds each benchmark; what they measure is tested in `tests/benchmarks`."""

import importlib
from typing import get_type_hints

import pytest

from benchmarks.record import Options
from cluster import bench
from pipelines.errors import UserError


@pytest.mark.parametrize("name", bench.QUESTIONS)
def test_each_benchmark_is_there_and_tells_its_command(name):
    module = importlib.import_module(f"benchmarks.{name}")
    assert issubclass(get_type_hints(module.main)["options"], Options)
    command = "onewarp doctor DIR" if name == "bottleneck" else f"onewarp bench {name}"
    assert f"    {command}" in module.__doc__


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
    bench.main([])
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in bench.QUESTIONS)


def test_doctor_of_a_folder_says_what_binds(onewarp, small_set):
    told = onewarp("doctor", small_set, "--quick", "--threads", 1)
    assert told.returncode == 0, told.stderr
    assert "onewarp bench bottleneck --data small --threads 1 --quick" in told.stdout
    assert " binds" in told.stdout
    told = onewarp("doctor")
    assert told.returncode == 2
    assert "onewarp doctor DIR; or --cluster" in told.stderr
