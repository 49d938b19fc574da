"""The journal keeps whole events, whatever happens to the process that writes it."""

import ast
import os
import random
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from pipelines.errors import UserError
from tests.full_disk import files_no_larger_than
from tests.trainer.conftest import PLAIN
from trainer import TrainConfig, fine_tune
from trainer.journal import SCHEMA, Journal, follow, read, whole

ROOT = Path(__file__).parents[2]


def test_events_come_back_in_order(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.write("step", loss=0.5, lr=[1e-3])
    assert read(tmp_path / "j.jsonl")[0]["loss"] == 0.5  # flushed, not buffered
    journal.write("warning", message="naïve\nline")
    journal.close()
    assert [event["event"] for event in read(tmp_path / "j.jsonl")] == ["step", "warning"]
    assert read(tmp_path / "j.jsonl")[1]["message"] == "naïve\nline"
    assert read(tmp_path / "absent") == []


def test_half_a_line_is_no_event_and_swallows_none(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text('{"event": "step", "time": 1}\n{"event": "st')
    assert len(read(path)) == 1
    assert whole(path) == path.read_bytes().index(b"\n") + 1
    journal = Journal(path)
    journal.write("phase")
    journal.close()
    assert [event["event"] for event in read(path)] == ["step", "phase"]


def test_what_a_full_storage_does_not_take_is_written_when_it_has_room(tmp_path):
    path = tmp_path / "j.jsonl"
    journals = [Journal(path), Journal(tmp_path / "lost.jsonl")]
    with files_no_larger_than(100):
        for journal in journals:
            for i in range(5):
                journal.write("step", step=i)
        assert 0 < len(read(path)) < 5
        with pytest.raises(UserError, match="lost.jsonl cannot be written"):
            journals[1].close()
    journals[0].write("step", step=5)
    journals[0].close()
    assert [event["step"] for event in read(path)] == list(range(6))


def test_follow_sees_events_as_they_come_and_all_of_them(tmp_path):
    path, stop, seen = tmp_path / "j.jsonl", threading.Event(), []
    reader = threading.Thread(target=lambda: seen.extend(follow(path, stop, poll=0.005)))
    reader.start()
    journal = Journal(path)
    for i in range(500):
        journal.write("step", step=i)
    stop.set()
    reader.join()
    journal.close()
    assert [event["step"] for event in seen] == list(range(500))


def test_follow_goes_on_behind_half_a_line_that_was_cut_off(tmp_path):
    path, stop = tmp_path / "j.jsonl", threading.Event()
    path.write_text('{"event": "step", "step": 0}\n{"event": "st')
    following = follow(path, stop, poll=0.005)
    assert next(following)["step"] == 0
    journal = Journal(path)  # which cuts it
    journal.write("step", step=1)
    journal.write("step", step=2)
    journal.close()
    assert next(following)["step"] == 1
    stop.set()
    assert [event["step"] for event in following] == [2]


def test_what_is_no_number_is_null_as_json_has_none(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.write("epoch", valid_loss=float("nan"), rows=[{"loss": float("inf")}], errors=(1.5, float("-inf")))
    journal.close()
    assert "NaN" not in (text := (tmp_path / "j.jsonl").read_text()) and "Infinity" not in text
    (event,) = read(tmp_path / "j.jsonl")
    assert (event["valid_loss"], event["rows"], event["errors"]) == (None, [{"loss": None}], [1.5, None])


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text('{"event": "run"}\n{"event": \x00\x00\n{"event": "step"}\n')
    with pytest.raises(UserError, match="j.jsonl: line 2 is no event"):
        read(path)


def test_other_ranks_write_nothing(tmp_path):
    Journal(None).write("step", loss=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", range(50))
def test_a_process_that_is_killed_loses_no_event_that_it_has_written(tmp_path, seed):
    path, draw = tmp_path / "j.jsonl", random.Random(seed)
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:  # it must not come back into pytest
        journal, i = Journal(path), 0
        while True:
            journal.write("step", step=i, filler="x" * (i * 7919 % 3000))
            os.write(tell, bytes([i % 256]))
            i += 1
    os.close(tell)
    try:
        os.read(told, 1)
        time.sleep(draw.uniform(0, 0.01))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    written = 1 + len(os.read(told, 2**20))
    os.close(told)
    found = read(path)
    assert [event["step"] for event in found] == list(range(len(found)))
    assert written <= len(found) <= written + 1
    journal = Journal(path)
    journal.write("warning", message="later")
    journal.close()
    assert [event["event"] for event in read(path)] == ["step"] * len(found) + ["warning"]


# ---- What docs/journal.md says of it


def documented():
    """Fields of each kind of event: those that are always there, and those that may be."""
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", (ROOT / "docs/journal.md").read_text(), re.MULTILINE)
    return {
        kind: (set(re.findall(r"(?<!\[)`(\w+)`", fields)), set(re.findall(r"\[`(\w+)`\]", fields)))
        for kind, fields in rows
    }


def written_by_the_code():
    """Kinds of events that stand in the code."""
    for file in (ROOT / "trainer").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "write":
                first = node.args[0] if node.args else None
                if isinstance(first, ast.Constant) and isinstance(first.value, str) and first.value.isidentifier():
                    yield first.value


def test_every_kind_of_event_is_documented():
    assert set(written_by_the_code()) - {"read"} == set(documented())  # that one is told of in `apply`'s own file


def test_events_have_the_fields_that_are_documented(small_set, tmp_path, quiet):
    settings = {**PLAIN, "lr": None, "lr_find_steps": 20, "epochs": 1, "freeze_epochs": 1, "clip_norm": 1.0}
    settings |= {"data": str(small_set), "runs": str(tmp_path), "workers": 0, "name": "run"}
    events = read(fine_tune(TrainConfig.from_dict(settings), quiet).folder / "journal.jsonl")
    assert {event["event"] for event in events} >= {
        *("run", "phase", "range_step", "range_result", "step", "epoch", "checkpoint", "finished")
    }
    assert events[0]["schema"] == SCHEMA
    for event in events:
        always, sometimes = documented()[event["event"]]
        assert always <= set(event) - {"event", "time"} <= always | sometimes, event["event"]
