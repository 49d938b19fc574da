"""The `onewarp` command in a process of its own, and what a run's journal says meanwhile."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch

from benchmarks.nodes import HERE, Host
from benchmarks.processes import MARK
from trainer.journal import read

PATIENCE = 420  # seconds; where a machine is quiet nothing that is waited for takes a tenth of it


def _words(
    folder: Path, temporary: Path, host: Host, words: tuple[object, ...], environment: dict[str, str]
) -> dict[str, Any]:
    return {
        "args": [*host.entered, sys.executable, "-m", "cluster.cli", *map(str, words)],
        "text": True,
        "cwd": folder,
        "env": {**os.environ, "TMPDIR": str(temporary), MARK: str(temporary), "COLUMNS": "200", **environment},
    }


def onewarp(
    folder: Path, temporary: Path, *words: object, host: Host = HERE, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`onewarp WORDS` in `folder`, ended; what it starts lies in `temporary` and is marked with it."""
    return subprocess.run(**_words(folder, temporary, host, words, environment), capture_output=True, check=False)


@contextmanager
def begun(folder: Path, temporary: Path, *words: object, **environment: str) -> Generator[subprocess.Popen[str]]:
    """The same while it goes on; killed in the end, if it is still there."""
    told = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(**_words(folder, temporary, HERE, words, environment), **told)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def wait_for(condition: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    """Until `condition` holds; `process` must not end before."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def weights(run: Path) -> dict[str, Any]:
    """Those at its end."""
    return safetensors.torch.load_file(run / "model.safetensors")


def events(run: Path, *kinds: str) -> list[dict[str, Any]]:
    """Those of these kinds in the journal of the run in this folder; all, where none is given."""
    return [event for event in read(run / "journal.jsonl") if not kinds or event["event"] in kinds]
