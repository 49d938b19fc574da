"""Nobody waits half an hour for a worker that stands still: all of them end, and tell first where each of them stood.

At every step a worker waits for the others. So where one stands still (it was stopped, its disk does not answer, it
waits for itself), all do soon after, and each notices for itself that no batch comes any more. Whoever started the
workers starts them again, from the last checkpoint.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import re
import shutil
import socket
import subprocess
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.ranks import Ranks

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: trying again may help
FIRST = 10.0  # times as long at first, when caches fill and compilers work
_AT_FIRST = 2  # beats: a batch comes before any step, of the first rank another, for its picture
SLOWER = 5.0  # times as long as any step so far
_FADES = 0.99  # a beat: what was slow once does not count for ever
_POLL = 0.5  # seconds
_DUMP = 10.0  # seconds that py-spy has
_NOTING = 15.0  # seconds for all notes: a storage that stands still takes none
_SET_PTRACER, _ANYBODY = 0x59616D61, -1  # of prctl(2): where Yama is, no process may look at its sibling but by consent


class Watchdog:
    """Ends this process where nothing happens for `stall` seconds; `beat` says that something does.

    Where steps are slow it waits for `SLOWER` times the slowest of late. Time in which this process itself was stopped
    does not count.

    Args:
        folder: takes `rank-N.txt`, where each worker stood; the same on every rank.
        stall: seconds; `None` watches nothing.
    """

    def __init__(self, folder: Path, ranks: Ranks, stall: float | None) -> None:
        self._folder, self._rank, self._stall = folder, ranks.rank, stall
        self._longest = 0.0
        self.restart()
        self._closed = threading.Event()
        if ranks.rank == 0:  # what nobody took note of is of an earlier group
            shutil.rmtree(folder, ignore_errors=True)
        everyone = ranks.gather([(ranks.rank, socket.gethostname(), os.getpid())])
        self._mates = {rank: pid for rank, host, pid in everyone if host == socket.gethostname() and rank != self._rank}
        if stall is not None:
            ctypes.CDLL(None).prctl(_SET_PTRACER, ctypes.c_ulong(_ANYBODY), 0, 0, 0)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """Something happened."""
        self._beats += 1
        took = self._still + _POLL  # it is counted in these
        if self._beats > _AT_FIRST + 1:  # what compiles at the first step says nothing of those to come
            self._longest = max(took, _FADES * self._longest)
        patience = FIRST if self._beats <= _AT_FIRST else 1.0
        self._limit = max(patience * (self._stall or 0), SLOWER * max(took, self._longest))
        self._still = 0.0

    def restart(self) -> None:
        """Something else begins, which is compiled first."""
        self._beats, self._still, self._limit = 0, 0.0, FIRST * (self._stall or 0)

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(_POLL):
            now = time.monotonic()
            self._still += min(now - before, 2 * _POLL)
            before = now
            if self._still > self._limit:
                noting = threading.Thread(target=self._note, daemon=True)
                noting.start()
                noting.join(_NOTING)
                os._exit(EXIT_CODE)

    def _note(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._file(self._rank).open("w") as file:
                file.write(f"no batch for {self._still:.0f} seconds\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            time.sleep(2 * _POLL)  # those that can note it themselves
            for rank, pid in self._mates.items():
                if not self._file(rank).exists():
                    self._file(rank).write_text(f"{state(pid)}\n{stacks(pid)}")
        except OSError:  # the storage may be what ails
            pass

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.txt"


def notes(folder: Path) -> Iterator[tuple[int, str]]:
    """The rank, and where it stood, of each worker that stood still; what was noted is gone afterwards."""
    for file in sorted(folder.glob("rank-*.txt")):
        yield int(file.stem.removeprefix("rank-")), file.read_text(errors="backslashreplace")
    shutil.rmtree(folder, ignore_errors=True)


def state(pid: int) -> str:
    """What the kernel says of a process: `T (stopped)`, `D (disk sleep)`."""
    try:
        found = re.search(r"^State:\t(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return f"process {pid}: {found[1] if found else 'gone'}"


def stacks(pid: int) -> str:
    """The Python stacks of another process of this machine, read without its help."""
    beside = sysconfig.get_path("scripts")  # where pip puts it, whether that is on the PATH or not
    command = shutil.which("py-spy", path=os.pathsep.join((beside, os.environ.get("PATH", "")))) or "py-spy"
    try:
        told = subprocess.run(
            [command, "dump", "--nonblocking", "--pid", str(pid)],
            capture_output=True,
            text=True,
            timeout=_DUMP,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"its stacks cannot be read: {error}"
    return told.stdout or f"its stacks cannot be read: {told.stderr.strip()}"
