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
        assert told_to_stop(request)
    assert caught == [number]
    assert not told_to_stop(request) and not request.exists()
    assert signal.getsignal(number) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


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
