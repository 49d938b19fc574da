"""Help that fits a screen: the verbs, a line each; of a training's many flags those used most."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.look import ShowBatch, Summary
from trainer.config import TrainConfig

ALL = "--help-all"
Groups = Mapping[str, Mapping[str, str]]
TRAINING: Groups = {
    "data": {
        "data": "folder with a folder of images for each class; or `breeds`",
        "label-regex": r"labels from file names: its first group, as in '(.+)_\d+\.jpg$'",
        "label-csv": "labels from a table with the columns path,label[,split]",
        "valid-fraction": "share held out, where the data brings no split",
        "subset": "share of each class, for a quick try",
        "cache": "`decoded`: keep pixels on disk, so that later epochs need not decode",
    },
    "model": {
        "model": "body, any classifier of torchvision or timm",
        "weights": "start from this file: a body, or the model of an earlier run",
        "size": "side of the images, pixels",
        "sizes": "progressive resizing, SIZE:EPOCHS,…, as in 128:3,160:3,224:2",
        "augment.…": "flip, rotation, zoom, perspective, crop, light: see all flags",
        "mixup": "strength; 0.4 is usual",
        "cutmix": "strength; 1 is usual",
    },
    "learning": {
        "epochs": "with everything, after --freeze-epochs; none is left out, as rates fall to the end",
        "freeze-epochs": "with the head alone, at the beginning",
        "lr": "peak rate of the head; default: a range test finds it",
        "schedule": "fine-tune, one-cycle, flat-cos or warmup-linear",
        "batch": "images in a step, over all workers; `auto`: what the memory holds",
        "micro-batch": "images that a worker computes at once, to save memory",
        "loss": "cross-entropy, focal, or one-vs-rest, which can say: none of them",
        "ema": "average the weights, with this decay; 0.999 is usual",
        "seed": "of everything random",
    },
    "machine": {
        "workers": "processes; default: one a GPU, else 2. 2:8: as many as there is room for",
        "address": "Ray cluster to run on: auto, or HOST:PORT",
        "threads": "CPU threads of each worker; default: its share",
        "precision": "auto, fp32, tf32, bf16 or fp16",
        "checkpoint-every": "steps",
    },
    "run": {
        "name": "folder under --runs; default: data, date, time. Of a stopped run: go on",
        "runs": "folder of the runs",
        "wandb": "Weights & Biases: auto, online, offline or off",
        "quiet": "print errors alone",
        "json": "print the journal's events, a JSON object a line",
        "verbose": "print what Ray and the workers say, too",
    },
}


_LOOKING = {
    "label-regex": TRAINING["data"]["label-regex"],
    "label-csv": TRAINING["data"]["label-csv"],
    "size": "side of the images, pixels",
    "seed": "of order and augmentation",
    "augment.…": "flip, rotation, zoom, perspective, crop, light: see all flags",
    "image": "one image, relative to DIR; default: the first",
}
# The verbs with more flags than a screen holds: their settings, what follows the verb, and the flags used most.
LONG: dict[str, tuple[type[Any], str, Groups]] = {
    "train": (TrainConfig, "[--data DIR]", TRAINING),
    "lr-find": (TrainConfig, "[--data DIR]", TRAINING),
    "show-batch": (
        ShowBatch,
        "DIR",
        {
            "": {
                **_LOOKING,
                "same": "draw one image as the first 12 epochs show it",
                "compare": "draw images read by one warp and by repeated interpolation",
                "out": "picture to write",
            }
        },
    ),
    "summary": (Summary, "DIR", {"": {**_LOOKING, "batch": "images in a step"}}),
}


def verbs(known: Mapping[str, Callable[..., None]], console: Console) -> None:
    """The verbs, each in its first sentence."""
    _say(console, "usage: onewarp VERB …   (onewarp VERB --help tells more)")
    _say(console, "\nDistributed training of image classifiers: one warp an image, every rank fed.\n")
    table = _columns(3)
    for verb, act in known.items():
        table.add_row("", Text(verb, style="bold"), _first_sentence(act))
    console.print(table)


def short(verb: str, act: Callable[..., None], console: Console) -> None:
    """The flags of one of the `LONG` verbs that are used most, with unit and default."""
    settings, what, groups = LONG[verb]
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    _say(console, f"usage: onewarp {verb} {what} [flags]\n\n{_first_sentence(act)}\n")
    table = _columns(3)
    for group, flags in groups.items():
        head = group
        for flag, words in flags.items():
            told = Text(words).append(_shown(defaults.get(flag.replace("-", "_"))), style="cyan")
            table.add_row(head, Text(f"--{flag}", style="bold"), told)
            head = ""
    console.print(table)
    _say(console, f"\nAll flags, in full: onewarp {verb} {ALL}")


def meant(word: str, known: Iterable[str]) -> str:
    """What one may have meant by a word that is not known, and what there is."""
    near = difflib.get_close_matches(word, known := list(known), n=1)
    return (f"Did you mean {near[0]}? " if near else "") + f"There are {', '.join(known)}."


def _shown(default: Any) -> str:
    if default is None or default is False or default is dataclasses.MISSING:
        return ""
    return f" ({default:g})" if isinstance(default, float) else f" ({default})"


def _first_sentence(act: Callable[..., None]) -> str:
    return (act.__doc__ or "").partition("\n")[0]


def _columns(count: int) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for i in range(count):
        table.add_column(no_wrap=i < count - 1)
    return table


def _say(console: Console, words: str) -> None:
    console.print(words, markup=False, highlight=False)
