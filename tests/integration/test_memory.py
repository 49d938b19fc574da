"""Memory that runs out in a worker of Ray's is told to whoever started it."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from trainer import TrainConfig
from trainer.prepare import prepare

# What a worker does; but the second has little room from where the steps begin.
STARVED = """
import sys
from functools import partial
from pathlib import Path

from cluster.launch import launch
from tests.trainer.test_memory import starve_from_the_first_step
from trainer import memory
from trainer.crew import Crew
from trainer.worker import run


def starved(path, ranks, report):
    if ranks.rank == 1:
        starve_from_the_first_step()
    run(path, "train", ranks, report)


if __name__ == "__main__":
    try:
        with launch(partial(starved, Path(sys.argv[1])), Crew(2, 2)) as wait:
            wait()
    except memory.OutOfMemoryError as error:
        print("out of memory:", error)
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers take two cores")
def test_memory_that_runs_out_in_a_worker_reaches_the_driver(small_set, tmp_path):
    settings = {"size": 160, "batch": 52, "threads": 1, "lr": 1e-3, "epochs": 1, "freeze_epochs": 0}
    config = TrainConfig(data=str(small_set), runs=tmp_path, name="run", workers=2, pretrained=False, **settings)
    run = prepare(config, Console(file=io.StringIO()))[0].path
    (tmp_path / "starved.py").write_text(STARVED)
    told = subprocess.run(
        [sys.executable, str(tmp_path / "starved.py"), str(run)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert told.returncode == 0, told.stdout + told.stderr
    assert "out of memory: The memory of worker 1 ran out (" in told.stdout
