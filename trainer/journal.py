"""The record of a run: one JSON object a line, written by rank 0 alone, read by everything that shows anything."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from pipelines.errors import UserError

SCHEMA = 1  # of the events, see docs/journal.md; a field that is new does not change it, one with a new meaning does


class Journal:
    """Appends events to `path`, each at once as a whole line; with `path=None` (other ranks) it writes nothing.

    A storage that is full does not end the run: what it does not take is kept, and written with the next event.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = None
        self._kept = b""
        self._lock = threading.Lock()  # checkpoints are told of by the thread that writes them
        if path is not None:
            _cut_partial_line(path)
            self._file = path.open("ab", buffering=0)

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; numbers, strings, lists and dicts of them."""
        if self._file is not None:
            line = json.dumps({"event": event, "time": time.time(), **fields}) + "\n"
            with self._lock, suppress(OSError):
                self._kept += line.encode()
                self._drain(self._file)

    def close(self) -> None:
        """Raise UserError where the storage has not taken all."""
        if self._file is not None:
            try:
                self._drain(self._file)
            except OSError as error:
                raise UserError(
                    f"The journal {self._file.name} cannot be written ({error.strerror}), and its last events are "
                    "lost. Make room, and go on with the same command and the run's --name."
                ) from None
            finally:
                self._file.close()

    def _drain(self, file: IO[bytes]) -> None:
        while self._kept:
            self._kept = self._kept[file.write(self._kept) :]


def _cut_partial_line(path: Path) -> None:
    """A process killed while writing leaves half a line: it is no event, and must not swallow the next one."""
    written = path.read_bytes() if path.exists() else b""
    end = written.rfind(b"\n") + 1
    if end < len(written):  # of what was read: another process may be about to write
        os.truncate(path, end)


def whole(path: Path) -> int:
    """Bytes up to the end of the last whole line; a worker cuts off what follows when it opens the journal."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def read(path: Path) -> list[dict[str, Any]]:
    """All whole events of a journal, in order; an absent journal has none."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is not whole
    return [json.loads(line) for line in lines if line.strip()]


def of_run(path: Path) -> list[dict[str, Any]]:
    """All whole events of the journal of a run that has begun.

    Raises:
        UserError: there is none.
    """
    events = read(path)
    if not any(event["event"] == "run" for event in events):
        raise UserError(f"{path.parent} holds no run that has begun. Name a folder under runs/.")
    return events


def follow(path: Path, stop: threading.Event, poll: float = 0.1, offset: int = 0) -> Iterator[dict[str, Any]]:
    """Events from byte `offset` on as they are written; ends when `stop` is set and the journal is read to its end."""
    rest = b""
    while True:
        last_look = stop.is_set()
        if path.exists():
            with path.open("rb") as file:
                file.seek(offset)
                chunk = file.read()
            offset += len(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line.strip():
                    yield json.loads(line)
        if last_look:
            return
        stop.wait(poll)
