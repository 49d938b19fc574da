"""What is said before workers start on a cluster."""

import os

import pytest

from cluster import environment
from pipelines.errors import UserError
from trainer import TrainConfig
from trainer.crew import Crew
from trainer.starting import resolve_crew


@pytest.fixture
def room(monkeypatch):
    """`wait_for_room` of a cluster with these resources; it is imported where what it sets for Ray is taken back."""
    monkeypatch.setenv(environment.OTHERS, "0")
    from cluster import join

    def of(crew, *resources, free=None, patience=0.0):
        answers = iter(resources)
        now = {}

        def there():
            now.update(next(answers))
            return now

        monkeypatch.setattr(join.ray, "cluster_resources", there)
        monkeypatch.setattr(join.ray, "available_resources", lambda: free or now)
        return join.wait_for_room(crew, "head:6379", patience)

    return of


def test_room_is_of_gpus_where_there_are_some(room, capsys):
    assert room(Crew(2, 2), {"GPU": 2.0, "CPU": 64.0}) == 2
    assert room(Crew(1, 8), {"GPU": 1.0, "CPU": 8.0}) == 1
    assert capsys.readouterr().err == ""
    assert room(Crew(4, 4), {"CPU": 4.0}) == 0
    assert "on CPU cores: the cluster at head:6379 has no GPU" in capsys.readouterr().err


def test_too_little_room_is_told_and_not_waited_for_for_ever(room, capsys):
    with pytest.raises(UserError, match=r"--workers 4: the cluster at head:6379 has 2 GPUs, one for a worker\. Choose"):
        room(Crew(4, 4), {"GPU": 2.0, "CPU": 64.0})
    with pytest.raises(UserError, match=r"--workers 2:4: the cluster at head:6379 has 1 CPU cores and no GPU"):
        room(Crew(2, 4), {"CPU": 1.0})
    with pytest.raises(UserError, match=r"has 2 GPUs, 1 of them free, one for a worker\. .* wait for the end of other"):
        room(Crew(2, 2), {"GPU": 2.0, "CPU": 64.0}, free={"GPU": 1.0, "CPU": 64.0})
    # It says so at once, and goes on when machines come.
    capsys.readouterr()
    assert room(Crew(2, 4), {}, {"GPU": 1.0}, {"GPU": 2.0}, patience=60) == 2
    assert capsys.readouterr().err.count("waiting   for room for 2 workers") == 1


def test_one_machine_has_as_many_workers_as_there_is_room_for(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert resolve_crew(TrainConfig(workers=f"1:{cores + 5}")).workers == cores
    with pytest.raises(UserError, match=f"--workers {cores + 1}: this machine has {cores} CPU cores and no GPU"):
        resolve_crew(TrainConfig(workers=f"{cores + 1}:{cores + 2}"))


def test_a_cluster_is_told_how_many_workers(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert resolve_crew(TrainConfig()).workers
    with pytest.raises(UserError, match=r"On a cluster \(auto\) --workers must be given"):
        resolve_crew(TrainConfig(address="auto"))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert resolve_crew(TrainConfig(workers=4000)).address == "10.0.0.1:6379"
    assert resolve_crew(TrainConfig(workers=0)).address is None
    monkeypatch.setenv("RAY_ADDRESS", "local")  # Ray's word for this machine
    assert resolve_crew(TrainConfig()).address is None
    assert resolve_crew(TrainConfig(address="local", workers=2)).address is None
    with pytest.raises(UserError, match="--address is auto; it must be left out with --workers 0"):
        TrainConfig(address="auto", workers=0)


def test_a_process_whose_ray_is_for_this_machine_alone_joins_none(monkeypatch):
    from cluster import engine

    monkeypatch.setattr(engine, "ALONE", True)
    with pytest.raises(UserError, match="--address head:6379: in this process Ray was started for this machine alone"):
        engine.joined("head:6379").__enter__()
