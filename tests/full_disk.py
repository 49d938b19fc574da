"""A disk that fills up, without filling one."""

import os
import resource
from collections.abc import Generator
from contextlib import contextmanager


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
