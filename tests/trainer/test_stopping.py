"""Signals are requests, first; what a worker makes of one is in `test_checkpoint`."""

import os
import signal
import time

import pytest

from trainer.stopping import StoppedError, ending, listening, told_to_stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_request_while_it_lasts(tmp_path, number):
    request = tmp_path / "stop"
    request.write_text("by a process that was killed")
    before = signal.getsignal(number)
    with listening(request, grace=60) as caught:
        assert not told_to_stop(request)
        os.kill(os.getpid(), number)
        wait_until(lambda: told_to_stop(request))
    assert caught == [number]
    assert not told_to_stop(request) and not request.exists()
    assert signal.getsignal(number) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_storage_that_is_full_takes_the_request_when_it_has_room(tmp_path):
    request = tmp_path / "there" / "stop"  # and it is not, yet
    with listening(request, grace=60):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        assert not told_to_stop(request)
        request.parent.mkdir()
        wait_until(lambda: told_to_stop(request))
    assert not request.exists()


def test_a_closed_terminal_ends_a_run_and_under_nohup_does_not(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening(tmp_path / "stop", grace=60) as caught:
            os.kill(os.getpid(), signal.SIGHUP)
        assert caught == []
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with listening(tmp_path / "stop", grace=60) as caught:
            os.kill(os.getpid(), signal.SIGHUP)
        assert caught == [signal.SIGHUP]
    finally:
        signal.signal(signal.SIGHUP, before)


def wait_until(true, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_whoever_does_not_answer_in_time_is_left(tmp_path):
    def take_too_long():
        with listening(tmp_path / "stop", grace=0.1):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    with pytest.raises(StoppedError, match=r"within 0\.1 seconds") as told:
        take_too_long()
    assert told.value.exit_code == 143
    assert not (tmp_path / "stop").exists()


def test_a_second_interrupt_is_one(tmp_path):
    def insist():
        with listening(tmp_path / "stop", grace=60):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        insist()
    assert not (tmp_path / "stop").exists()


def test_before_there_is_training_it_is_the_end():
    before = signal.getsignal(signal.SIGTERM)

    def wait():
        with ending():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    with pytest.raises(StoppedError, match="^stopped$") as told:
        wait()
    assert told.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == before
