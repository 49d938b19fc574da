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
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import MARK, left_running

# A node that is gone is missed within seconds.
RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "20",
}


@dataclass(frozen=True)
class Host:
    """Where a node runs: here, or in a network namespace, which is to its processes as a machine of its own."""

    address: str = "127.0.0.1"
    interface: str = "lo"
    namespace: str | None = None

    @property
    def entered(self) -> list[str]:
        """What a command begins with to run there."""
        return ["ip", "netns", "exec", self.namespace] if self.namespace else []


HERE = Host()


@contextmanager
def two_hosts() -> Generator[tuple[Host, Host]]:
    """Two network namespaces, a cable between them, and no way to anywhere else.

    Raises:
        PermissionError: this process may not make any.
    """
    name = f"ow{os.getpid()}"
    hosts = [Host(f"10.77.0.{i + 1}", f"{name}{end}", f"{name}{end}") for i, end in enumerate("ab")]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    with ExitStack() as closing:
        try:
            for host in hosts:
                ip("netns", "add", host.interface)
                closing.callback(ip, "netns", "delete", host.interface)
                ip("-n", host.interface, "link", "set", "lo", "up")
            one, other = (host.interface for host in hosts)
            ip("link", "add", one, "netns", one, "type", "veth", "peer", "name", other, "netns", other)
            for host in hosts:
                ip("-n", host.interface, "address", "add", f"{host.address}/24", "dev", host.interface)
                ip("-n", host.interface, "link", "set", host.interface, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            raise PermissionError(f"no network namespaces here: {error}") from None
        yield hosts[0], hosts[1]


class Node:
    """A node of the cluster: the process of `ray start --block`, and what it has started."""

    def __init__(self, temporary: Path, host: Host, *words: str) -> None:
        self.mark = self._scratch = Path(tempfile.mkdtemp(dir=temporary, prefix="n"))
        self._log = (self._scratch / "log").open("wb")
        command = [*host.entered, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *words]
        command += ["--node-ip-address", host.address, "--object-store-memory", str(80 * 2**20)]
        environment = {**os.environ, **RAY, "TMPDIR": str(self._scratch), MARK: str(self.mark)}
        environment["GLOO_SOCKET_IFNAME"] = host.interface
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env=environment)

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

    def __init__(self, temporary: Path, closing: ExitStack, host: Host) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"{host.address}:{port}"
        self._temporary, self._closing = temporary, closing
        place = ["--port", str(port), "--temp-dir", str(temporary / "r"), "--include-dashboard", "false"]
        self.head = self._start(host, "--head", "--num-cpus", "0", *place)

    def add(self, cpus: int = 1, host: Host = HERE) -> Node:
        return self._start(host, "--address", self.address, "--num-cpus", str(cpus))

    def _start(self, host: Host, *words: str) -> Node:
        node = Node(self._temporary, host, *words)
        self._closing.callback(node.kill)
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in node.told():
            assert node.process.poll() is None, node.told()
            assert time.monotonic() < deadline, node.told()
            time.sleep(0.1)
        return node


@contextmanager
def nodes(temporary: Path, host: Host = HERE) -> Generator[Nodes]:
    """A cluster with nothing but a head, on `host`; gone afterwards."""
    with ExitStack() as closing:
        yield Nodes(temporary, closing, host)
