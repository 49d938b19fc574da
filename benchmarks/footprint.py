"""The memory that a way to read images takes: of a process of its own and of its workers."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path


def megabytes(batches: Callable[[], Iterator[int]], seconds: float, imports: Sequence[str] = ()) -> float:
    """Most memory that reading takes, beside what a process has that has imported the libraries: MB.

    It reads for so many seconds, and three batches at least. `imports` are modules that this way alone wants.
    Shared pages count for each process in part (PSS), so that forked workers are not counted twice.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.peers", "pipelines.reader", "pipelines.loader"])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(batches, seconds, tuple(imports), send))
    process.start()
    send.close()
    try:
        return receive.recv()
    finally:
        process.join()


def _measure(batches: Callable[[], Iterator[int]], seconds: float, imports: tuple[str, ...], send: Connection) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of torch's loaders, as elsewhere
    for module in imports:
        import_module(module)
    before, most = _held(), 0.0
    started, running = time.perf_counter(), batches()
    for count, _ in enumerate(running):
        most = max(most, _held())
        if count >= 2 and time.perf_counter() - started > seconds:
            break
    send.send(most - before)


def _held() -> float:
    """Of this process and its children, MB."""
    pids = ["self", *(child.pid for child in multiprocessing.active_children())]
    return sum(_proportional(Path(f"/proc/{pid}/smaps_rollup")) for pid in pids)


def _proportional(rollup: Path) -> float:
    for line in rollup.read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0
