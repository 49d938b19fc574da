"""Ray, started quietly and for this machine alone, or joined where it runs."""

from __future__ import annotations

import ctypes
import logging
import os
import secrets
import select
import signal
import tempfile
import threading
import time
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster import environment

os.environ.update({**environment.QUIET, **os.environ})

# isort: split
import ray

from pipelines.errors import UserError, first_line

# In workers: loopback, what libraries leave goes with Ray's own (it kills them), and the key of wandb is not theirs.
WORKERS = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "WANDB_API_KEY": ""}
OBJECT_STORE_BYTES = 100 * 2**20  # workers share files, not objects
VERBOSE = environment.VERBOSE in os.environ
SAID: dict[str, Any] = {"log_to_driver": VERBOSE, "logging_level": logging.INFO if VERBOSE else logging.ERROR}
ALONE = os.environ[environment.OTHERS] == "0"  # Ray was imported for this machine alone
LOOPBACK = ("127.", "localhost", "[::1]")
PATIENCE = 10.0  # seconds for its processes to end
_SIGACTION = 512  # bytes, more than a `struct sigaction` has anywhere
LONGEST_TEMPORARY = 24  # characters: Ray's sockets lie 83 deeper, and a socket's path ends at 107


def at(address: str | None) -> AbstractContextManager[object]:
    """The cluster that answers at `address`; where that is `None`, this machine with all its cores."""
    return local(len(os.sched_getaffinity(0))) if address is None else joined(address)


@contextmanager
def local(cpus: int) -> Generator[str]:
    """Ray on this machine, gone afterwards with all that its processes leave; yields its scratch folder.

    It listens on loopback alone, and to nobody who has not this process's token: other users of the machine.
    """
    # Ray then asks for a token by itself; given so, it is not written to the home folder.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    temporary = tempfile.gettempdir()
    if len(temporary) > LONGEST_TEMPORARY:
        temporary = "/tmp"
    with tempfile.TemporaryDirectory(prefix="onewarp-", dir=temporary) as scratch:
        with _own_handlers(), _blocked(signal.SIGHUP):
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                **SAID,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=scratch,
                runtime_env={"env_vars": {**WORKERS, "TMPDIR": scratch}},
            )
        _started.clear()
        _started.update(pid for pid in _descendants(os.getpid()) if scratch in _command_of(pid))
        try:
            yield scratch
        finally:
            end()


_started: set[int] = set()  # processes of Ray's that this one has started


def end() -> None:
    """End Ray, and wait for all its processes to be gone; from any thread, once or twice."""
    # It ends what it has started, but not its workers: they end when they see that it is gone.
    with _awaited(_started.union(*map(_descendants, _started))):
        ray.shutdown()


def rearm() -> None:
    """Set Python's handlers of signals anew for the system, which Ray has changed beside them; on the main thread."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler is not None:
                signal.signal(number, handler)


def _descendants(pid: int) -> set[int]:
    """The processes that a process has started, and that they have started."""
    found: set[int] = set()
    with suppress(OSError):  # it is gone, and they have other parents
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found |= {child} | _descendants(child)
    return found


def _command_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    return ""


@contextmanager
def _awaited(processes: Iterable[int]) -> Generator[None]:
    """These processes have ended when it ends, or `PATIENCE` is over."""
    with ExitStack() as closing:
        ends = []
        for pid in processes:
            with suppress(ProcessLookupError):
                ends.append(os.pidfd_open(pid))
                closing.callback(os.close, ends[-1])
        yield
        deadline = time.monotonic() + PATIENCE
        for end in ends:
            select.select([end], [], [], max(0.0, deadline - time.monotonic()))


@contextmanager
def _own_handlers() -> Generator[None]:
    """Handlers of signals are there again afterwards. Ray sets one of Python's for SIGTERM, and one of the system's."""
    numbers, main = (signal.SIGINT, signal.SIGTERM), threading.current_thread() is threading.main_thread()
    libc = ctypes.CDLL(None)
    systems = {number: ctypes.create_string_buffer(_SIGACTION) for number in numbers}
    pythons = {number: signal.getsignal(number) for number in numbers}
    for number, action in systems.items():
        libc.sigaction(number, None, action)
    try:
        yield
    finally:
        for number, handler in pythons.items():
            if main and callable(handler) and handler is not signal.default_int_handler:
                signal.signal(number, handler)
            elif not main:  # only there may Python's be set
                libc.sigaction(number, systems[number], None)


@contextmanager
def _blocked(number: signal.Signals) -> Generator[None]:
    """What is started meanwhile does not hear this signal: SIGHUP, which a closed terminal sends to all, ends it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def joined(address: str) -> Generator[None]:
    """The cluster that answers at `address` ("auto", "HOST:PORT" or "ray://HOST:PORT"); left, not ended.

    Raises:
        UserError: none answers there.
    """
    if ALONE and not address.removeprefix("ray://").startswith(LOOPBACK):
        raise UserError(
            f"--address {address}: in this process Ray was started for this machine alone. Join the cluster from a new "
            f"process, or set {environment.OTHERS}=1 for this one."
        )
    try:
        with _own_handlers():
            ray.init(address=address, **SAID)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise UserError(
            f"--address {address}: Ray cannot join a cluster there ({first_line(error)}). Check it with `ray status`. "
            "A cluster with tokens wants RAY_AUTH_MODE=token, and the token in RAY_AUTH_TOKEN or ~/.ray/auth_token."
        ) from None
    try:
        yield
    finally:
        ray.shutdown()
