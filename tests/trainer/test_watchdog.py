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
watchdog.beat()
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
    time.sleep(2)  # longer than it may stand still; but it does not count as long as it cannot help it
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
