"""Workers that start beside what prepares their run."""

import threading
import time

import pytest

from trainer import TrainConfig, starting
from trainer.ranks import Ranks
from trainer.run_folder import RunFolder


@pytest.fixture
def begun(monkeypatch):
    told = []
    monkeypatch.setattr("trainer.worker.run", lambda *words: told.append(words))
    return told


@pytest.mark.parametrize("workers", [1, 2])
def test_they_wait_for_the_configuration_however_few_they_are(tmp_path, begun, workers):
    folder, ranks, before = RunFolder(tmp_path), Ranks(world_size=workers), time.time()
    thread = threading.Thread(target=starting._work, args=(folder, "train", True, ranks, print))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and begun == []
    folder.config.write_text("{}")
    thread.join(10)
    ((*told, arrival),) = begun
    assert told == [tmp_path, "train", ranks, print]
    assert before < arrival.met <= arrival.imported < time.time()
    assert arrival.process < before


def test_others_begin_at_once_and_say_what_they_do_not_see(tmp_path, begun):
    starting._work(RunFolder(tmp_path), "train", False, Ranks(world_size=2), print)
    assert len(begun) == 1


@pytest.mark.parametrize(
    ("settings", "early"),
    [
        ({"workers": 2}, True),
        ({"workers": 1}, True),
        ({"workers": 0}, False),
        ({"workers": 2, "batch": "auto"}, False),  # it measures what memory there is
        ({"workers": 2, "address": "head:6379"}, False),
        ({"workers": 2, "data": "/nowhere"}, False),
    ],
)
def test_who_starts_early(tmp_path, monkeypatch, settings, early):
    config = TrainConfig(**{"data": str(tmp_path), **settings})
    told = []
    monkeypatch.setattr(starting.Workers, "_begin", lambda self, *, early: told.append(early))
    starting.Workers(config, "train", RunFolder(tmp_path)).begin_early()
    assert told == ([True] if early else [])
