"""The verb that measures: `bench`, one command for each question."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from typing import Literal, get_args, get_type_hints

import tyro

from pipelines.errors import UserError

Name = Literal["loaders", "interpolation", "overhead", "scaling", "accuracy", "photographs", "steady", "faults"]


def bench(name: tyro.conf.Positional[Name]) -> None:
    """Measure, and write down every sample: `bench NAME`, and `bench NAME --help` for what it asks and how it measures.

    loaders: is it faster than what I have? interpolation: is one warp sharper than repeated interpolation? accuracy:
    does that matter to the model? overhead: what do the trainer and Ray cost? scaling: what do more ranks give?
    photographs: does it learn as well as fastai, and how much sooner? steady: does a long run stay as fast, in as much
    memory? faults: does it survive what is killed?
    """


def main(words: Sequence[str]) -> None:
    """`onewarp bench` with the words that follow it; each benchmark has flags of its own.

    Raises:
        UserError: there is no such benchmark.
    """
    names = get_args(Name)
    if not words or words[0] in ("-h", "--help"):
        tyro.cli(bench, args=["--help"], prog="onewarp bench")
    name, *flags = words
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        meant = f"Did you mean {near[0]}? " if near else ""
        raise UserError(f"onewarp bench {name}: there is no such benchmark. {meant}There are {', '.join(names)}.")
    module = importlib.import_module(f"benchmarks.{name}")
    options = tyro.cli(
        get_type_hints(module.main)["options"], args=flags, prog=f"onewarp bench {name}", description=module.__doc__
    )
    module.main(options)
