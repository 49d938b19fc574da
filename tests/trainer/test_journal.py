"""The journal keeps whole events, whatever happens to the process that writes it."""

import threading

import pytest

from pipelines.errors import UserError
from tests.full_disk import files_no_larger_than
from trainer.journal import Journal, follow, read, whole


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


def test_other_ranks_write_nothing(tmp_path):
    Journal(None).write("step", loss=1)
    assert list(tmp_path.iterdir()) == []
