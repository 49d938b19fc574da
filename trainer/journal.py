"""The record of a run: one JSON object a line, written by rank 0 alone, read by everything that shows anything."""

from __future__ import annotations

import json
import math
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
        """Append one event; numbers, strings, lists and dicts of them. What is no number is null: JSON has no NaN."""
        if self._file is not None:
            line = json.dumps({"event": event, "time": time.time(), **_sound(fields)}, allow_nan=False) + "\n"
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


def _sound(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _sound(each) for key, each in value.items()}
    return [_sound(each) for each in value] if isinstance(value, list | tuple) else value


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
    """All whole events of a journal, in order; an absent journal has none.

    Raises:
        UserError: a line is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is not whole
    events = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                events.append(json.loads(line))
            except ValueError:
                raise UserError(
                    f"{path}: line {number} is no event of a journal. Take it out to go on with what the others say."
                ) from None
    return events


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
    while True:
        last_look = stop.is_set()
        if path.exists():
            with path.open("rb") as file:
                file.seek(offset)
                chunk = file.read()
            # Half a line is read again: it is cut off where its writer was killed.
            lines = chunk[: chunk.rfind(b"\n") + 1]
            offset += len(lines)
            for line in lines.split(b"\n"):
                if line.strip():
                    yield json.loads(line)
        if last_look:
            return
        stop.wait(poll)
