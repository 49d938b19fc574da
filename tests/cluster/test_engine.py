"""What Ray has started is gone when Ray is left."""

import os
import signal
import subprocess
import sys

import pytest

from cluster import engine


def started(seconds):
    """A process, and one that it has started; each ends by itself after so many seconds."""
    child = f"import time; time.sleep({seconds})"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid, flush=True)"
    process = subprocess.Popen([sys.executable, "-c", f"{code}; p.wait()"], stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


def test_processes_are_awaited_whoever_started_them():
    process, child = started(0.5)
    assert {process.pid, child} <= engine._descendants(os.getpid())
    assert engine._descendants(process.pid) == {child}
    with process, engine._awaited([process.pid, child, 2**22 + 1]):  # the last is none, or gone already
        process.kill()  # then the other has no parent that we know
    assert not os.path.exists(f"/proc/{child}/exe")


def test_but_not_for_ever(monkeypatch):
    monkeypatch.setattr(engine, "PATIENCE", 0.2)
    process, child = started(60)
    with process:
        with engine._awaited([process.pid]):
            pass
        assert process.poll() is None
        for pid in (child, process.pid):
            os.kill(pid, signal.SIGKILL)
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
