"""Ctrl-C and SIGTERM lead to a checkpoint: the workers are asked to stop at their next step, and given time for it.

So does the news that a machine is about to leave the cluster; but then the run is to go on, on those that stay.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_AGAIN = 0.5  # seconds until a storage that did not take the request is asked again

_asked = threading.Event()
_leaving = threading.Event()


class StoppedError(BaseException):
    """A signal ended the run before its end. Like KeyboardInterrupt it is for nobody on the way to take."""

    def __init__(self, message: str, number: int = signal.SIGTERM, run: str | None = None) -> None:
        super().__init__(message)
        self.number = number
        self.run = run  # its name, where it can be gone on with

    @property
    def exit_code(self) -> int:
        """What shells and schedulers expect of a process that a signal ended."""
        return 128 + self.number


class WorkersError(RuntimeError):
    """The workers ended with an error that is no mistake of the user's."""


class LeavingError(Exception):
    """A machine is about to leave the cluster, and the run has a checkpoint: it is to be started again without it."""


def stop() -> None:
    """Ask this worker process to stop, and with it all of its run."""
    _asked.set()


def leave() -> None:
    """Ask this worker process to stop, because a machine of the run is about to go."""
    _leaving.set()


def told_to_stop(request: Path | None) -> bool:
    """Whether this process was asked to stop, or there is something in the file `request`."""
    return _asked.is_set() or (request is not None and _written(request))


def _written(request: Path) -> bool:
    with suppress(OSError):  # the storage may be gone
        return request.read_bytes() != b""
    return False


def asked(request: Path | None) -> bool:
    """Whether the run is to end here, for good or to go on without a machine that leaves."""
    return told_to_stop(request) or _leaving.is_set()


@contextmanager
def ending() -> Generator[None]:
    """While it lasts, SIGTERM is a `StoppedError`: what was begun is ended in good order; on the main thread."""

    def end(number: int, frame: FrameType | None) -> None:
        raise StoppedError("stopped", number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def listening(request: Path, grace: float) -> Generator[list[int]]:
    """While it lasts, a signal is written into the file `request`; yields the signals that came.

    The file is there before: that a new one has come is seen on network file systems a minute late.

    A second Ctrl-C is a KeyboardInterrupt. On another thread than the main one, where no signal arrives, it does
    nothing.

    Args:
        request: what the workers look for; gone afterwards.
        grace: seconds that they have.

    Raises:
        StoppedError: the time is over.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    over, writers = threading.Event(), []

    def write(name: str) -> None:
        while not over.is_set():
            with suppress(OSError):  # it may be full, or gone
                request.write_text(name)
                return
            over.wait(_AGAIN)

    def ask(number: int, frame: FrameType | None) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)
        if len(caught) == 1:
            signal.setitimer(signal.ITIMER_REAL, grace)
            # Not here: a storage that does not answer would keep the alarm from being heard.
            writers.append(threading.Thread(target=write, args=(signal.Signals(number).name,), daemon=True))
            writers[0].start()

    def late(number: int, frame: FrameType | None) -> None:
        message = f"stopped: the workers did not end within {grace:g} seconds; their last checkpoint is what is left"
        raise StoppedError(message, caught[0])

    with suppress(OSError):
        request.write_bytes(b"")
    # One that is ignored stays so: `nohup` does that with SIGHUP, which comes when a terminal is closed.
    heard = [each for each in SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in heard}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, late)
    try:
        yield caught
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        over.set()
        for writer in writers:  # it must not write when the file is gone
            writer.join(timeout=1.0)
        for number, handler in before.items():
            signal.signal(number, handler)
        with suppress(OSError):
            request.unlink()
