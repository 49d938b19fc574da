"""What is written for people: links lead somewhere, commands and flags are there."""

import re
import shlex
from pathlib import Path

import pytest
import tyro

from cluster.bench import QUESTIONS
from cluster.cli import VERBS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def anchor(heading):
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def help_of(verb, capsys):
    """The flags that a verb takes."""
    with pytest.raises(SystemExit):
        tyro.cli(VERBS[verb], args=["--help"])
    return set(re.findall(r"--[\w.-]+", capsys.readouterr().out))


@each_page
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, place = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if place:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert place in {anchor(heading) for heading in headings}, target


@each_page
def test_commands_are_there(page, capsys):
    text = page.read_text()
    told = re.findall(r"^ {4}(?:\.venv/bin/)?onewarp (.+)$", text, re.MULTILINE) + re.findall(
        r"`onewarp ([^`]+)`", text
    )
    for command in told:
        verb, *words = shlex.split(command)
        assert verb in (*VERBS, "--help"), command
        if verb == "--help":
            continue
        if verb == "bench":
            assert not words or words[0] in QUESTIONS or not words[0].islower(), command
            continue
        known = help_of(verb, capsys)
        for word in words:
            if word.startswith("--") and word not in ("--help-all", "--cluster"):
                assert word.partition("=")[0] in known, command


def test_flags_in_the_tables_are_those_of_training(capsys):
    known = help_of("train", capsys)
    table = (ROOT / "docs/training.md").read_text().split("\n## ")[0]
    named = {
        flag for row in re.findall(r"^\| (`--[^|]*)\|", table, re.MULTILINE) for flag in re.findall(r"--[\w-]+", row)
    }
    assert len(named) > 20
    assert named - known == {"--augment"}  # which stands for all that begin so
