"""One process writes to a run."""

import errno
import fcntl

import pytest

from pipelines.errors import UserError
from trainer.run_folder import RunFolder


def test_the_second_is_told(tmp_path):
    with (
        RunFolder(tmp_path).locked(),
        pytest.raises(UserError, match="going on in another process"),
        RunFolder(tmp_path).locked(patience=0.3),
    ):
        pass
    with RunFolder(tmp_path).locked(patience=0):
        pass


def test_storage_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunFolder(tmp_path).locked(patience=0):
        pass
