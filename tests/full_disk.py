"""A disk that fills up, without filling one."""

import os
import resource
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(place: Path, megabytes: float) -> Generator[None]:
    """A file system of so many MB at the folder `place`; skips where none can be mounted."""
    words = ["mount", "-t", "tmpfs", "-o", f"size={round(1024 * megabytes)}k", "onewarp", str(place)]
    try:
        subprocess.run(words, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextmanager
def files_no_larger_than(limit: int) -> Generator[None]:
    """Writing beyond `limit` bytes of a file fails, as on a full disk.

    What is printed meanwhile goes nowhere: where standard error is a file, as it is under pytest, C++'s std::cerr
    would fail on it too, and then be silent for the life of the process, DALI's messages in later tests included.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
