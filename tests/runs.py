"""What a run has left, for tests to look at."""

from pathlib import Path


def newest(run: Path) -> Path:
    """The folder of its newest checkpoint."""
    return sorted((run / "checkpoints").glob("step-*"))[-1]
