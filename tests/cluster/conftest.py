"""The command as a person types it."""

import sys
from types import SimpleNamespace

import pytest

from cluster.cli import main


@pytest.fixture
def onewarp(capsys, monkeypatch, tmp_path):
    """Runs the command in an empty folder, in this process: a traceback is a failed test."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["onewarp", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code
        told = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=told.out, stderr=told.err)

    return run
