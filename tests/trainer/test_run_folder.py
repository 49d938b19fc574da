"""One process writes to a run."""

import errno
import fcntl
import time
from pathlib import Path

import pytest

from pipelines.errors import UserError
from trainer.run_folder import RunFolder, new_name


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


def test_two_commands_of_one_second_have_two_names(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")
    names = {new_name(tmp_path, Path("pets & co")) for _ in range(3)}
    assert names == {f"pets-co-20260101-000000{number}" for number in ("", "-2", "-3")}
    assert {folder.name for folder in tmp_path.iterdir()} == names
