"""A Ray cluster of several nodes on this machine, started as its administrators start one."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from benchmarks.processes import MARK, left_running

# A node that is gone is missed within seconds.
RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "20",
}


class Node:
    """A node of the cluster: the process of `ray start --block`, and what it has started."""

    def __init__(self, temporary: Path, *words: str) -> None:
        self.mark = self._scratch = Path(tempfile.mkdtemp(dir=temporary, prefix="n"))
        self._log = (self._scratch / "log").open("wb")
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--block",
            "--node-ip-address",
            "127.0.0.1",
            *words,
        ]
        store = ["--object-store-memory", str(80 * 2**20)]
        environment = {**os.environ, **RAY, "TMPDIR": str(self._scratch), MARK: str(self.mark)}
        self.process = subprocess.Popen([*command, *store], stdout=self._log, stderr=self._log, env=environment)

    def told(self) -> str:
        return (self._scratch / "log").read_text(errors="replace")

    def kill(self) -> None:
        """As if its power were cut: every process of it, the workers too."""
        self._log.close()
        while left := left_running(self.mark):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, 9)
            self.process.poll()
            time.sleep(0.05)
        self.process.wait()


class Nodes:
    """A head, which takes no workers, and nodes for one worker each."""

    def __init__(self, temporary: Path, closing: ExitStack) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self._temporary, self._closing = temporary, closing
        place = ["--port", str(port), "--temp-dir", str(temporary / "r"), "--include-dashboard", "false"]
        self.head = self._start("--head", "--num-cpus", "0", *place)

    def add(self, cpus: int = 1) -> Node:
        return self._start("--address", self.address, "--num-cpus", str(cpus))

    def _start(self, *words: str) -> Node:
        node = Node(self._temporary, *words)
        self._closing.callback(node.kill)
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in node.told():
            assert node.process.poll() is None, node.told()
            assert time.monotonic() < deadline, node.told()
            time.sleep(0.1)
        return node


@contextmanager
def nodes(temporary: Path) -> Generator[Nodes]:
    """A cluster with nothing but a head; gone afterwards."""
    with ExitStack() as closing:
        yield Nodes(temporary, closing)
