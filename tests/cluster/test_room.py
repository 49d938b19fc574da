"""How many workers there is room for, and when their number changes."""

from types import SimpleNamespace

import pytest
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2.api.config import ScalingConfig

from cluster import leaving, room
from trainer import stopping


def test_room_is_counted_machine_by_machine():
    worker = {"CPU": 2.0, "GPU": 1.0}
    free = {"a": {"CPU": 5.0, "GPU": 4.0}, "b": {"CPU": 64.0, "GPU": 1.0}, "c": {"CPU": 64.0}, "d": {"GPU": 8.0}}
    assert room.room(free, worker) == 2 + 1 + 0 + 0
    assert room.room(free, worker, without={"a"}) == 1
    assert room.room(free, {"CPU": 1.0}) == 5 + 64 + 64
    assert room.room({}, worker) == 0


@pytest.fixture
def cluster(monkeypatch):
    """A cluster of machines with cores, some of them in use, and some of them leaving."""
    there = SimpleNamespace(cores={"a": 1, "b": 1, "c": 1}, used={}, leaves=set(), now=1000.0, notes=[])

    def free():
        return {name: {"CPU": float(count - there.used.get(name, 0))} for name, count in there.cores.items()}

    def machines():
        return [
            {"NodeID": name, "Alive": True, "Resources": {"CPU": float(count)}} for name, count in there.cores.items()
        ]

    monkeypatch.setattr(room.state, "available_resources_per_node", free)
    monkeypatch.setattr(room.ray, "nodes", machines)
    monkeypatch.setattr(leaving, "machines", lambda: there.leaves)
    monkeypatch.setattr(room.time, "monotonic", lambda: there.now)
    monkeypatch.setattr(room.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(room.Elastic, "_maybe_send_resource_request", lambda self: None)
    policy = room.Elastic(ScalingConfig(num_workers=(2, 3), resources_per_worker={"CPU": 1}), there.notes.append)
    there.start = policy.make_decision_for_non_running_worker_group
    there.go_on = lambda workers: policy.make_decision_for_running_worker_group(
        SimpleNamespace(num_workers=workers), None
    )
    return there


def size(decision):
    return decision.num_workers if isinstance(decision, ResizeDecision) else None


def test_workers_begin_with_what_is_free_and_stays(cluster):
    assert size(cluster.start()) == 3
    cluster.leaves = {"c"}
    assert size(cluster.start()) == 2


def test_what_ended_workers_held_is_waited_for_but_not_what_others_use(cluster):
    cluster.used = {"a": 1}
    assert size(cluster.start()) is None
    cluster.used = {}
    assert size(cluster.start()) == 3
    cluster.used = {"a": 1}
    assert size(cluster.start()) is None
    cluster.now += room.SETTLING + 1
    assert size(cluster.start()) == 2


def test_places_that_workers_hold_are_theirs_again(cluster, monkeypatch):
    places = ["a", "b", "gone", ""]  # the last of a place that Ray has not given to another machine yet
    monkeypatch.setattr(room.Running, "places", staticmethod(lambda: places))
    cluster.cores = {"a": 1, "b": 1}
    cluster.used = {"a": 1, "b": 1}
    assert size(cluster.start()) == 2
    cluster.leaves = {"b"}
    assert size(cluster.start()) is None


def test_too_little_room_is_told_once_a_minute(cluster):
    cluster.cores = {"a": 1}
    for _ in range(100):
        assert size(cluster.start()) is None
        cluster.now += 1
    assert cluster.notes == ["There is room for 1 workers, and 2 are the least."] * 2


def test_for_more_room_workers_are_asked_to_leave_and_never_ended(cluster, monkeypatch):
    asked = []
    group = SimpleNamespace(execute_single_async=lambda rank, act: asked.append((rank, act)))
    monkeypatch.setattr(room.Running, "group", group)
    cluster.used = {"a": 1, "b": 1, "c": 1}
    assert isinstance(cluster.go_on(2), NoopDecision) and asked == []

    def looks(workers, count):
        for _ in range(count):
            cluster.now += room.LOOK
            assert isinstance(cluster.go_on(workers), NoopDecision)

    for used in ({"a": 1, "b": 1}, {"a": 1, "b": 1, "c": 1}, {"a": 1, "b": 1}):  # a third machine is free now and then
        cluster.used = used
        looks(2, 1)
        assert asked == []
    looks(2, 1)
    assert asked == [(0, stopping.leave)]
    looks(2, 5)
    assert len(asked) == 1  # not at each look
    looks(3, 5)
    assert len(asked) == 1  # there are the most that may be
    cluster.leaves = {"c"}
    looks(2, 5)
    assert len(asked) == 1
