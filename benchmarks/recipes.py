"""What the settings of `trainer/recipes.py` cost and bring.

    onewarp bench recipes [--data DIR] [--only default detail] [--seeds 0 1 2] [--json FILE]

Each is the command `onewarp train` as docs/recipes.md shows it, a process of its own, timed from its start to its end,
range test, plots and report included; they begin with an empty cache folder, and never run at once.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.data import folder_of
from benchmarks.photographs import finished, our_command, read_through
from benchmarks.record import Figure, Options, Record
from pipelines.errors import UserError
from trainer import journal
from trainer.config import TrainConfig
from trainer.recipes import RECIPES

ERROR, F1, WALL = "validation error", "macro F1", "wall, s"


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(Options):
    """Train by each recipe."""

    only: tuple[str, ...] = ()
    """These recipes. Default: all."""
    seeds: tuple[int, ...] = (0,)
    """Trainings of each."""


def trained(config: TrainConfig) -> tuple[float, float, float]:
    """(validation error, macro F1, seconds) of the command with this configuration."""
    with tempfile.TemporaryDirectory(prefix="onewarp-recipes-") as scratch:
        config = replace(config, runs=Path(scratch, "runs"), name="run")
        _, wall = finished(our_command(config), Path(scratch))
        events = journal.read(Path(scratch, "runs", "run", "journal.jsonl"))
    *_, last = (event for event in events if event["event"] == "epoch")
    return last["error_rate"], last["macro_f1"], wall


def main(options: RecipeOptions) -> Record:
    unknown = sorted(set(options.only) - set(RECIPES))
    if unknown:
        raise UserError(f"--only {unknown[0]}: there is no such recipe; there are {', '.join(RECIPES)}.")
    chosen, small = options.only or tuple(RECIPES), {}
    if options.quick:
        chosen, options = chosen[:1], replace(options, seeds=options.seeds[:1])
        # Ray alone takes a quarter of a minute to start and stop.
        small = {"workers": 0, "threads": 1, "lr_find_steps": 20, "size": 32, "batch": 8, "subset": 1.0}
    folder, regex = folder_of(options)
    read_through(folder)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in chosen}
    for seed, name in itertools.product(options.seeds, chosen):
        config = RECIPES[name].config(data=str(folder), label_regex=regex, seed=seed, **small)
        found[name].append(trained(config))
        error, f1, wall = found[name][-1]
        print(f"{name}, seed {seed}: error {error:.4f}, macro F1 {f1:.4f} in {wall:.0f} s", flush=True)
    record = Record(
        title="Recipes",
        name="recipes",
        options=options,
        figures=[
            Figure(row=name, column=column, samples=list(samples), centre="mean" if column != WALL else "median")
            for name, of_name in found.items()
            for column, samples in zip((ERROR, F1, WALL), zip(*of_name, strict=True), strict=True)
        ],
        skipped={},
        remarks=tuple(f"{name}: `{RECIPES[name].command(Path(options.data).name)}`" for name in chosen),
        packages=("ray", "timm"),
    )
    record.publish()
    return record
