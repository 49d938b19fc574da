"""What others than the workers have to say of a run, into its journal.

Light to import: who starts workers again must not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pipelines.errors import UserError
from trainer import watchdog
from trainer.journal import Journal

Note = Callable[[str], None]
"""Told, in a sentence, what happened to the workers. It is pickled to get there."""


def note(journal: Path, stalled: Path, message: str) -> None:
    """Write a warning, after where workers stood that stood still; the one that writes the journal is ended, or is
    about to be.

    Args:
        stalled: see `watchdog.notes`.
    """
    if not (journal.parent / "config.json").exists():  # the run is not prepared yet
        return
    record = Journal(journal)
    for rank, stood in watchdog.notes(stalled):
        record.write("stalled", rank=rank, stood=stood)
    record.write("warning", message=message)
    with suppress(UserError):  # a full storage is no reason not to start again
        record.close()
