"""A place of its own for what a command's processes leave."""

import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest


@pytest.fixture
def temporary() -> Generator[Path]:
    """Where a command's processes, Ray's among them, may leave something; short, because of Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="ow-", dir="/tmp") as folder:
        yield Path(folder)
