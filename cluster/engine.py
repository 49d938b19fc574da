"""Ray, started quietly and for this machine alone, or joined where it runs."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Generator
from contextlib import contextmanager

# Ray reads these when it is imported; see each name for what it does.
QUIET_AND_LOCAL = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no reports home
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # a local cluster listens on loopback alone
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # also how often reports are collected and failures seen
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
for _name, _value in QUIET_AND_LOCAL.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402

from pipelines.errors import UserError, first_line  # noqa: E402

# In workers: loopback, what libraries leave goes with Ray's own (it kills them), and the key of wandb is not theirs.
WORKERS = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "WANDB_API_KEY": ""}
OBJECT_STORE_BYTES = 100 * 2**20  # workers share files, not objects
LONGEST_TEMPORARY = 24  # characters: Ray's sockets lie 83 deeper, and a socket's path ends at 107


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
        with _own_handlers():
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=scratch,
                runtime_env={"env_vars": {**WORKERS, "TMPDIR": scratch}},
            )
        try:
            yield scratch
        finally:
            ray.shutdown()


@contextmanager
def _own_handlers() -> Generator[None]:
    """Handlers of signals that the caller has set are there again afterwards; Ray sets one for SIGTERM."""
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    set_before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in set_before.items():
            if callable(handler) and handler is not signal.default_int_handler:
                signal.signal(number, handler)


@contextmanager
def joined(address: str) -> Generator[None]:
    """The cluster that answers at `address` ("auto", "HOST:PORT" or "ray://HOST:PORT"); left, not ended.

    Raises:
        UserError: none answers there.
    """
    try:
        with _own_handlers():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise UserError(
            f"--address {address}: Ray cannot join a cluster there ({first_line(error)}). Check it with `ray status`. "
            "A cluster with tokens wants RAY_AUTH_MODE=token, and the token in RAY_AUTH_TOKEN or ~/.ray/auth_token."
        ) from None
    try:
        yield
    finally:
        ray.shutdown()
