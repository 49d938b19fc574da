"""Rounds through a Ray cluster: each machine looks at itself, at what the others left, and talks to each of them."""

from __future__ import annotations

import itertools
import shutil
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import checkup
from cluster.checkup import Check, Facts, Visit
from pipelines.errors import UserError, first_line

PATIENCE = 60.0  # seconds for each round
PAIRS = 28  # all of eight machines; of more, each with its neighbours
PINGS, MEGABYTES = 20, 16


@dataclass(frozen=True, kw_only=True)
class Link:
    """Two machines, and how fast sums go between them."""

    hosts: tuple[str, str]
    backend: str = "gloo"
    """Of torch.distributed."""
    milliseconds: float = 0.0
    """An all-reduce of one number, median."""
    megabytes: float = 0.0
    """Of an all-reduce in a second."""
    failed: str = ""


def examine(data: Path | None, runs: Path, *, thorough: bool = True) -> list[Check]:
    """Every machine of the cluster that this process has joined, judged; the head comes first.

    Args:
        data: folder of the images that each must be able to read, the same.
        runs: folder that each must be able to write, and see what the others wrote.
        thorough: decode an image on each, too.
    """
    nodes = _nodes()
    marks = runs / f".onewarp-{uuid.uuid4().hex}"
    names = [node["NodeID"] for node in nodes]
    visits = [
        Visit(data=data, runs=marks, name=name, others=tuple(n for n in names if n != name), thorough=thorough)
        for name in names
    ]
    try:
        machines = _ask([_on(node["NodeID"], _look).remote(visit) for node, visit in zip(nodes, visits, strict=True)])
        hosts = {name: facts.host for name, facts in zip(names, machines, strict=True)}
        missing = _ask([_on(visit.name, _unseen).remote(visit) for visit in visits])
    finally:
        shutil.rmtree(marks, ignore_errors=True)
    told = [
        replace(
            facts,
            unseen=tuple(hosts[name] for name in unseen),
            store=float(node["Resources"].get("object_store_memory", 0)),
            promised=int(node["Resources"].get("GPU", 0)),
            ahead=_ahead(node["NodeID"]),
        )
        for facts, unseen, node in zip(machines, missing, nodes, strict=True)
    ]
    return checkup.judge(told, data=data, runs=runs)


def links() -> list[Link]:
    """How each pair of machines talks, by gloo, and by nccl where both have GPUs; of many, each with its neighbours."""
    nodes = _nodes()
    pairs = list(itertools.combinations(nodes, 2))
    if len(pairs) > PAIRS:
        pairs = list(zip(nodes, [*nodes[1:], nodes[0]], strict=True))
    return [
        _link(backend, *pair)
        for pair in pairs
        for backend in ("gloo", "nccl")
        if backend == "gloo" or all(node["Resources"].get("GPU") for node in pair)
    ]


def _link(backend: str, *pair: dict[str, Any]) -> Link:
    # Two ends for it alone: where nccl fails, it takes its process down.
    ends = [_on(node["NodeID"], _End).remote() for node in pair]
    one, other = _ask([end.host.remote() for end in ends])
    hosts = (one, other)
    try:
        ((address, port),) = _ask([ends[0].meeting.remote()])
        took = _ask([end.talk.remote(backend, rank, address, port) for rank, end in enumerate(ends)])[0]
    except UserError as error:
        return Link(hosts=hosts, backend=backend, failed=first_line(error))
    finally:
        for end in ends:
            ray.kill(end)
    return Link(hosts=hosts, backend=backend, milliseconds=took[0], megabytes=took[1])


@ray.remote(num_cpus=0)
class _End:
    """One end of a link."""

    def host(self) -> str:
        return socket.gethostname()

    def meeting(self) -> tuple[str, int]:
        """Where the two meet: a port that is free here."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def talk(self, backend: str, rank: int, address: str, port: int) -> tuple[float, float]:
        """Milliseconds of a small all-reduce, and megabytes of a large one in a second."""
        dist.init_process_group(
            backend,
            init_method=f"tcp://{address}:{port}",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=PATIENCE / 2),
        )
        try:
            device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
            small, large = (torch.zeros(count, device=device) for count in (1, MEGABYTES * 2**20 // 4))
            times = sorted(_timed(small) for _ in range(PINGS))
            return 1e3 * times[PINGS // 2], MEGABYTES * 2**20 / 1e6 / min(_timed(large) for _ in range(3))
        finally:
            dist.destroy_process_group()


def _timed(tensor: torch.Tensor) -> float:
    clock = time.perf_counter()
    dist.all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - clock


def _nodes() -> list[dict[str, Any]]:
    """The machines that are there, this one first."""
    here = ray.get_runtime_context().get_node_id()
    alive = [node for node in ray.nodes() if node["Alive"]]
    return sorted(alive, key=lambda node: (node["NodeID"] != here, node["NodeManagerAddress"], node["NodeID"]))


def _on(node: str, what: Any) -> Any:
    return what.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False), num_cpus=0)


def _ask(answers: Sequence[Any]) -> list[Any]:
    """What all machines answer.

    Raises:
        UserError: one of them does not, in time.
    """
    try:
        return ray.get(list(answers), timeout=PATIENCE)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        raise UserError(
            f"A machine of the cluster does not answer: {type(cause).__name__}: {first_line(cause)}. Check that each "
            "has this version of onewarp, and that `ray status` lists it."
        ) from error


def _ahead(node: str) -> float:
    """Seconds that a machine's clock is ahead of this one's, at least: as far as the way there and back leaves open."""
    clock = _on(node, _clock)
    _ask([clock.remote()])  # a process for it is there from now on
    bounds = []
    for _ in range(5):
        before = time.time()
        (there,) = _ask([clock.remote()])
        bounds.append((there - time.time(), there - before))
    least, most = max(low for low, _ in bounds), min(high for _, high in bounds)
    return least if least > 0 else min(most, 0.0)


@ray.remote
def _look(visit: Visit) -> Facts:
    return checkup.look(visit)


@ray.remote
def _unseen(visit: Visit) -> tuple[str, ...]:
    return checkup.unseen(visit)


@ray.remote
def _clock() -> float:
    return time.time()
