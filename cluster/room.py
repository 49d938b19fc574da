"""How many workers there is room for on a cluster, now and while its machines come and go.

Ray Train's own policy counts what machines have, whoever uses it, those that are about to leave too, and ends the
workers for a larger number of them in mid-step.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import ray
from ray._private.state import state
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.util import placement_group_table

from cluster import leaving
from trainer import stopping
from trainer.notes import Note

LOOK = 5.0  # seconds between two looks at whether there is room for more workers
SURE = 2  # looks in a row that see it: what others use for a moment is none
SETTLING = 3.0  # seconds until what workers held that have ended is free again
POLL = 0.2
WARN_EVERY = 60.0

Resources = Mapping[str, float]


def room(free: Mapping[str, Resources], worker: Resources, without: Collection[str] = ()) -> int:
    """How many workers fit.

    Args:
        free: by machine, what is free.
        worker: what one takes.
        without: machines that do not count.
    """
    return sum(
        min(int(has.get(name, 0.0) // count) for name, count in worker.items() if count)
        for machine, has in free.items()
        if machine not in without
    )


class Alone(FixedScalingPolicy):
    """As many as were asked for, on this machine: nobody needs to be asked for more, which takes a process and time."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class Running(WorkerGroupCallback):
    """Knows the workers that run, for `Elastic`: both are in the process of Ray's that starts them."""

    group: Any = None

    @staticmethod
    def nodes() -> set[str]:
        """The machines that they are on."""
        return set() if Running.group is None else {worker.metadata.node_id for worker in Running.group.get_workers()}

    @staticmethod
    def places() -> list[str]:
        """The machine of each place that is kept for one of them."""
        if Running.group is None:
            return []
        handle = Running.group.get_worker_group_state().placement_group_handle
        return list(placement_group_table(handle.placement_group)["bundles_to_node_id"].values())

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        Running.group = worker_group

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        Running.group = None


class Elastic(ElasticScalingPolicy):
    """As many workers as there is room for.

    Args:
        note: told when there is too little for the least.
    """

    def __init__(self, scaling_config: Any, note: Note | None) -> None:
        super().__init__(scaling_config)
        self._note = note
        self._since: float | None = None  # when workers were needed first
        self._told = -WARN_EVERY
        self._looked, self._seen = -LOOK, 0

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """What is free or held by the workers that are to be ended, once those before them have let go of theirs."""
        self._maybe_send_resource_request()
        now = time.monotonic()
        self._since = self._since or now
        there, most = self._room() + self._held(), self.scaling_config.max_workers
        settled = there >= min(most, self._total()) or now - self._since > SETTLING
        if there >= self.scaling_config.min_workers and settled:
            self._since, self._looked, self._seen = None, now, 0
            return self._sized(min(there, most))
        if now - self._told > WARN_EVERY and now - self._since > 2 * SETTLING and self._note is not None:
            self._told = now
            self._note(f"There is room for {there} workers, and {self.scaling_config.min_workers} are the least.")
        time.sleep(POLL)
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Ask the workers to leave at a checkpoint, where there is room for more of them."""
        self._maybe_send_resource_request()
        now, most = time.monotonic(), self.scaling_config.max_workers
        if now - self._looked >= LOOK and Running.group is not None:
            self._looked = now
            more = worker_group_state.num_workers < most and self._room() > 0
            self._seen = self._seen + 1 if more else 0
            if self._seen == SURE:
                Running.group.execute_single_async(0, stopping.leave)
        return NoopDecision()

    def _sized(self, workers: int) -> ResizeDecision:
        return ResizeDecision(num_workers=workers, resources_per_worker=dict(self._worker()))

    def _worker(self) -> Resources:
        return self.scaling_config._resources_per_worker_not_none

    def _room(self) -> int:
        return room(state.available_resources_per_node(), self._worker(), leaving.machines())

    def _held(self) -> int:
        """How many places on machines that are there and stay the workers hold that are to be ended.

        Where a machine is lost Ray gives its places to others at once: they are not where the workers were.
        """
        machines = state.available_resources_per_node().keys() - leaving.machines()
        return sum(machine in machines for machine in Running.places())

    def _total(self) -> int:
        """The same, if nothing at all were in use."""
        return room(dict(_all()), self._worker(), leaving.machines())


def _all() -> Iterator[tuple[str, Resources]]:
    return ((node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"])
