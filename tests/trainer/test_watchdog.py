"""A process that stands still ends itself, and says where it stood."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.ranks import Ranks
from trainer.watchdog import EXIT_CODE, Watchdog, notes, stacks, state

ROOT = Path(__file__).parents[2]

STILL = """
import sys, time
from pathlib import Path
from trainer.ranks import Ranks
from trainer.watchdog import Watchdog

def lost_in_thought():
    time.sleep(60)

watchdog = Watchdog(Path(sys.argv[1]), Ranks(), 1.0)
for _ in range(3):
    watchdog.beat()
print("ready", flush=True)
lost_in_thought()
"""

ALIVE = """
import sys, time
from pathlib import Path
from trainer.ranks import Ranks
from trainer.watchdog import Watchdog

watchdog = Watchdog(Path(sys.argv[1]), Ranks(), 1.0)
for _ in range(30):
    watchdog.beat()
    time.sleep(0.1)
watchdog.close()
time.sleep(3)

slow = Watchdog(Path(sys.argv[1]), Ranks(), 1.5)
for seconds in (0, 1, 3):
    slow.beat()
    time.sleep(seconds)
    slow.beat()
slow.close()
"""


@pytest.fixture
def still(tmp_path):
    """A process that beats once and never again."""
    command = [sys.executable, "-c", STILL, str(tmp_path / "stalled")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_it_ends_and_notes_where_it_stood(still, tmp_path):
    assert still.wait(30) == EXIT_CODE
    ((rank, stood),) = notes(tmp_path / "stalled")
    assert rank == 0
    assert "lost_in_thought" in stood
    assert "no batch for" in stood
    assert not (tmp_path / "stalled").exists()
    assert list(notes(tmp_path / "stalled")) == []


def test_one_that_was_stopped_is_seen_from_outside_and_goes_on_afterwards(still, tmp_path):
    os.kill(still.pid, signal.SIGSTOP)
    time.sleep(4)  # longer than it may stand still; but it does not count as long as it cannot help it
    assert "T (stopped)" in state(still.pid)
    assert "lost_in_thought" in stacks(still.pid)
    assert still.poll() is None
    os.kill(still.pid, signal.SIGCONT)
    assert still.wait(30) == EXIT_CODE


def test_beats_keep_it_quiet_and_slow_ones_make_it_patient(tmp_path):
    process = subprocess.run([sys.executable, "-c", ALIVE, str(tmp_path / "stalled")], cwd=ROOT, check=False)
    assert process.returncode == 0
    assert not (tmp_path / "stalled").exists()


def test_without_a_limit_nothing_watches(tmp_path):
    Watchdog(tmp_path / "stalled", Ranks(), None)
    time.sleep(0.6)
    assert not (tmp_path / "stalled").exists()


def test_a_process_that_is_gone():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert state(gone.pid) == f"process {gone.pid}: gone"
    assert stacks(gone.pid).startswith("its stacks cannot be read")


def limits(tmp_path, seconds, stall=60.0):
    """What it would wait for each of these times between two beats."""
    watchdog = Watchdog(tmp_path, Ranks(), stall)
    found = []
    for took in seconds:
        found.append(watchdog._limit)
        watchdog._still = took
        watchdog.beat()
    watchdog.close()
    return found


@pytest.mark.parametrize("before", [[5], [5, 3]], ids=["goes on", "draws a picture first"])
def test_steps_that_are_all_slower_than_the_limit_are_waited_for(tmp_path, before):
    seconds = [*before, *[70.0] * 5]
    assert all(took < limit for took, limit in zip(seconds, limits(tmp_path, seconds), strict=True))


def test_what_was_slow_once_is_forgotten_and_what_compiles_at_first_says_nothing(tmp_path):
    *_, soon = limits(tmp_path, [1.0, 1.0, 400.0, *[1.0] * 3])
    assert soon == 60
    *_, after, later = limits(tmp_path, [*[1.0] * 5, 59.0, 1.0])
    assert after == 60 and later == pytest.approx(5 * 59.5)
    *_, at_last = limits(tmp_path, [*[1.0] * 5, 59.0, *[1.0] * 400])
    assert at_last == 60


def test_what_begins_anew_may_compile(tmp_path):
    watchdog = Watchdog(tmp_path, Ranks(), 60.0)
    for _ in range(9):
        watchdog.beat()
    assert watchdog._limit == 60
    watchdog.restart()
    assert watchdog._limit == 600
    watchdog.close()


def test_what_an_earlier_group_noted_is_not_taken_for_its_own(tmp_path):
    folder = tmp_path / "stalled"
    folder.mkdir()
    (folder / "rank-1.txt").write_text("long ago")
    Watchdog(folder, Ranks(), None)
    assert list(notes(folder)) == []
