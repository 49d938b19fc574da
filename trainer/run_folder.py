"""Where everything of a run lies."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import re
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import UserError
from pipelines.manifest import Quarantined
from trainer.config import TrainConfig

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class RunFolder:
    """The files of one run, under `path` (absolute)."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, JSON."""
        return self.path / "config.json"

    @property
    def manifest(self) -> Path:
        """What the data held when the run began, Parquet."""
        return self.path / "manifest.parquet"

    @property
    def quarantine(self) -> Path:
        """The files that were left out, and why: path, tab, reason; absent where every file is good."""
        return self.path / "quarantine.txt"

    @property
    def initial(self) -> Path:
        """The weights that every rank begins with."""
        return self.path / "initial.safetensors"

    @property
    def journal(self) -> Path:
        """The record, JSON lines."""
        return self.path / "journal.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The weights at the end."""
        return self.path / "model.safetensors"

    @property
    def best(self) -> Path:
        """The weights of the epoch with the lowest validation error."""
        return self.path / "best.safetensors"

    @property
    def report(self) -> Path:
        """The page to show."""
        return self.path / "report.html"

    @property
    def stop(self) -> Path:
        """Asks the workers, once there is something in it, to write a checkpoint and to end."""
        return self.path / "stop"

    @property
    def stalled(self) -> Path:
        """Where workers that stand still note where they stand, until that is in the journal."""
        return self.path / "stalled"

    @property
    def engine(self) -> Path:
        """What the engine that starts the workers keeps for itself while they run."""
        return self.path / ".engine"

    @contextmanager
    def locked(self, patience: float = 30.0) -> Generator[None]:
        """Be the only process that writes here; one that was killed may take `patience` seconds to be gone.

        On a storage that has no locks nobody is kept out.

        Raises:
            UserError: another process goes on writing.
        """
        deadline = time.monotonic() + patience
        with (self.path / ".lock").open("a") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if error.errno in _NO_LOCKS:
                        break
                    if error.errno not in (errno.EAGAIN, errno.EACCES):
                        raise
                    if time.monotonic() > deadline:
                        raise UserError(
                            f"The run {self.path} is going on in another process. Wait for its end, or stop it."
                        ) from None
                    time.sleep(0.2)
            yield

    def figure(self, name: str) -> Path:
        return self.path / f"{name}.png"

    def write_quarantine(self, left_out: Iterable[Quarantined]) -> None:
        """List the files that are left out."""
        write_quarantine(self.quarantine, left_out)

    def read_config(self) -> TrainConfig:
        return TrainConfig.read(self.config)


def write_quarantine(path: Path, left_out: Iterable[Quarantined]) -> None:
    """List files that are left out: path, tab, reason."""
    write_atomic(path, "".join(f"{printable(bad.path)}\t{bad.reason}\n" for bad in left_out))


def printable(path: str) -> str:
    """A path as it is, or escaped in quotes where it holds newlines or bytes that are no text."""
    return path if path.isprintable() else repr(path)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file that is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def absolute(path: Path) -> Path:
    """One spelling for each place, so that the same run is known again from another folder."""
    return Path(os.path.abspath(path.expanduser()))


def slug(name: str) -> str:
    """A folder name made of harmless characters."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.") or "data"


def new_name(runs: Path, data: Path) -> str:
    """Data and time, and a number where that is taken; the folder is made at once, so no other command takes it."""
    base = f"{slug(data.name)}-{time.strftime('%Y%m%d-%H%M%S')}"
    for name in itertools.chain([base], (f"{base}-{i}" for i in itertools.count(2))):
        try:
            (absolute(runs) / name).mkdir(parents=True)
        except OSError:  # one that is there is passed over; of any other trouble is told who is to write there
            if os.path.lexists(absolute(runs) / name):
                continue
        return name
    raise AssertionError
