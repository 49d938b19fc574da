"""What ended the workers, and whether they are started again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ray.train import UserCallback

from cluster import leaving
from cluster.room import Running
from pipelines.errors import UserError, first_line
from trainer import memory, stopping
from trainer.notes import Note
from trainer.stopping import WorkersError

# What Ray says of a worker that it ended itself, before the kernel would.
_ENDED_BY_RAY = "due to the node running low on memory"


class Failures(UserCallback):
    """Sees what ended the workers before Ray starts them again, in the process of Ray's that does so.

    It also counts how often that was since an epoch ended: a run of weeks meets more failures than one of hours, and a
    machine that left in good order is no failure.

    Args:
        note: told of each, in a sentence.
        restarts: how often that may be.
        alone: all workers are of this machine.
    """

    def __init__(self, note: Note | None, restarts: int, *, alone: bool) -> None:
        self._note, self._restarts, self._left, self._alone = note, restarts, restarts, alone
        self._killed = memory.killed()

    def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
        """An epoch is over. Whatever ended for lack of memory until now was none of ours."""
        self._killed, self._left = memory.killed(), self._restarts

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """An exception from here ends the training: what would be met again."""
        causes = [cause for error in worker_exceptions.values() for cause in _chain(error)]
        for cause in causes:
            if isinstance(cause, UserError):
                raise type(cause)(str(cause))
        if any(isinstance(cause, stopping.LeavingError) for cause in causes):
            return
        died = [
            each.health_check_failure for each in worker_exceptions.values() if hasattr(each, "health_check_failure")
        ]
        here = self._alone and memory.killed() > self._killed
        if died and (here or any(_ENDED_BY_RAY in str(each) for each in died)):
            which = "this" if self._alone else "a"
            raise memory.OutOfMemoryError(f"The memory of {which} machine ran out, and a worker was ended for it.")
        # A machine that was told to leave may be gone before its workers have; the others may be the first to say so.
        leaves = leaving.machines() & Running.nodes()
        if self._note is not None:
            for rank, error in sorted(worker_exceptions.items()):
                reason = first_line(getattr(error, "health_check_failure", error)).rstrip(".")
                self._note(f"Worker {rank} failed ({reason}).")
        if not (leaves or any(getattr(error, "preempted", False) for error in died)):
            if self._left == 0:
                raise WorkersError("\n".join(str(error) for error in worker_exceptions.values()))
            self._left -= 1


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
