"""The verb that measures: `bench`, one command for each question."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import get_type_hints

import tyro
from rich.console import Console

from cluster.help import meant
from pipelines.errors import UserError

QUESTIONS = {
    "loaders": "is it faster than what I have?",
    "interpolation": "is one warp sharper than repeated interpolation?",
    "accuracy": "does that matter to the model?",
    "overhead": "what does the trainer cost beside the model?",
    "startup": "what comes before the first step, and what does Ray cost?",
    "scaling": "what do more ranks give?",
    "bottleneck": "what binds a training on these images, here? (Also `onewarp doctor DIR`.)",
    "photographs": "does it learn as well as fastai, and how much sooner?",
    "recipes": "what do the settings of trainer/recipes.py cost and bring?",
    "steady": "does a long run stay as fast, in as much memory?",
    "faults": "does it survive what is killed?",
}


def bench(name: tyro.conf.Positional[str]) -> None:  # what `onewarp --help` tells of it
    pass


_SAID = "Measure, and write down every sample"
bench.__doc__ = f"{_SAID}: speed, sharpness, accuracy, cost, faults; `bench` alone lists them."


def measure(name: str, flags: Sequence[str], prog: str) -> None:
    """Run a benchmark with these flags of its own."""
    module = importlib.import_module(f"benchmarks.{name}")
    options = get_type_hints(module.main)["options"]
    module.main(tyro.cli(options, args=flags, prog=prog, description=module.__doc__))


def main(words: Sequence[str]) -> None:
    """`onewarp bench` with the words that follow it; each benchmark has flags of its own.

    Raises:
        UserError: there is no such benchmark.
    """
    if not words or words[0] in ("-h", "--help"):
        lines = (f"  {name:14s} {question}" for name, question in QUESTIONS.items())
        usage = "usage: onewarp bench NAME [--data DIR] [--quick] [--json FILE], or NAME --help for how it measures"
        Console().print(f"{usage}\n\n{_SAID}.\n\n", "\n".join(lines), sep="", markup=False, highlight=False)
        return
    name, *flags = words
    if name not in QUESTIONS:
        raise UserError(f"onewarp bench {name}: there is no such benchmark. {meant(name, QUESTIONS)}")
    measure(name, flags, f"onewarp bench {name}")
