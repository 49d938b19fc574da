"""What ended the workers, and whether they are started again."""

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from cluster import leaving
from cluster.restarts import Failures
from cluster.room import Running
from pipelines.errors import UserError
from trainer.stopping import LeavingError, WorkersError


def gone(reason, message="its node has died"):
    why = NodeDeathInfo(reason=reason)
    died = ActorDiedErrorContext(actor_id=bytes(16), error_message=message, node_death_info=why)
    return WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError(died))


KILLED, TOLD_TO_LEAVE = gone(NodeDeathInfo.UNEXPECTED_TERMINATION), gone(NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)


@pytest.fixture(autouse=True)
def leaves(monkeypatch):
    """The machines of the cluster that leave just now; workers are on `a` and `b`."""
    told = set()
    monkeypatch.setattr(leaving, "machines", lambda: told)
    monkeypatch.setattr(Running, "nodes", staticmethod(lambda: {"a", "b"}))
    return told


def met(exceptions, restarts):
    told = []
    failures = Failures(told.append, restarts, alone=False)
    for each in exceptions:
        failures.after_exception(None, each)
    return told


def test_so_many_failures_and_one_more():
    lost = {0: RuntimeError("Connection reset\nby peer"), 1: KILLED}
    told = [
        "Worker 0 failed (Connection reset).",
        "Worker 1 failed (The actor died unexpectedly before finishing this task).",
    ]
    assert met([lost, lost], 2) == told + told
    with pytest.raises(WorkersError, match="its node has died"):
        met([lost, lost], 1)


def test_a_machine_that_was_told_to_leave_is_no_failure():
    assert met([{0: LeavingError(), 1: LeavingError()}] * 3, 0) == []
    # It was gone before its worker could leave, and the other lost it: that is told, and costs no restart.
    assert len(met([{0: RuntimeError("Connection reset"), 1: TOLD_TO_LEAVE}] * 3, 0)) == 6


def test_nor_is_it_where_the_others_say_so_before_ray_does(leaves):
    leaves.add("b")
    assert len(met([{0: RuntimeError("Connection reset")}] * 3, 0)) == 3


def test_a_machine_without_workers_may_leave_and_excuses_nothing(leaves):
    leaves.add("c")
    with pytest.raises(WorkersError, match="Connection reset"):
        met([{0: RuntimeError("Connection reset")}], 0)


def test_what_would_be_met_again_ends_the_training():
    mistake = RuntimeError()
    mistake.__cause__ = UserError("--lr is too high.")
    with pytest.raises(UserError, match="--lr is too high"):
        met([{0: mistake, 1: KILLED}], 9)


def test_the_last_failure_is_told_too():
    told = []
    failures = Failures(told.append, 0, alone=False)
    with pytest.raises(WorkersError):
        failures.after_exception(None, {0: RuntimeError("Connection reset")})
    assert told == ["Worker 0 failed (Connection reset)."]


def test_an_epoch_that_ends_renews_the_restarts():
    failures = Failures(None, 1, alone=False)
    for _ in range(3):
        failures.after_exception(None, {0: KILLED})
        failures.after_report(None, None, None)
    failures.after_exception(None, {0: KILLED})
    with pytest.raises(WorkersError):
        failures.after_exception(None, {0: KILLED})
