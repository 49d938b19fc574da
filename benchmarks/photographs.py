"""End to end against fastai: the same photographs, the same body, the same epochs; the error, and the time it took.

    onewarp bench photographs --data DIR [--seeds 0 1 2] [--json FILE]

Ours is the command `onewarp train`, fastai's side is `benchmarks.fastai_run`, chapter 5 of its book. Each training is a
process of its own, timed from its start to its end, imports, scan, range test, plots and all; ours begins with an empty
cache folder. They take turns and never run at once; every second seed fastai goes first. Both have all cores.

The folder holds `train/` and one of `validation/`, `valid/`, `val/`, with a folder for each class in them; the embedded
set is copied into such a one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from benchmarks.data import open_data
from benchmarks.record import Figure, Options, Record
from pipelines import Manifest
from pipelines.datasets import named_dataset
from pipelines.errors import UserError
from trainer import journal
from trainer.config import TrainConfig, flags

OURS, FASTAI = "onewarp train", "fastai, chapter 5"
CHANNELS_LAST = "fastai, ChannelsLast"
ERROR, WALL = "validation error", "wall, s"
RATE, RANGE_TEST, TRAINING = "rate of the head", "range test, s", "epochs, s"
WALL_RATIO, ERROR_DIFFERENCE = "ours ÷ this, by the wall", "ours − this, error"
_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class PhotographOptions(Options):
    """Train on the same photographs by ours and by fastai."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Trainings of each."""
    model: str = "tf_efficientnet_lite0"
    """Body, by timm's name."""
    size: int = 160
    """Pixels."""
    presized: int = 0
    """Pixels to which fastai resizes first; 0: 1.5 times the size, the least that leaves its crops their detail."""
    batch: int = 64
    """Images in a step."""
    epochs: int = 3
    """After one with the head alone."""
    subset: float = 1.0
    """Share of each class, copied to another folder beforehand."""
    channels_last: bool = False
    """Also fastai with its `ChannelsLast`, which its book does not use and which is faster on CPUs."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training."""

    error: float
    """Share of the validation images misjudged after the last epoch."""
    lr: float
    """The head's peak rate, which a range test found."""
    lr_find_seconds: float
    train_seconds: float
    """All epochs with their validation."""
    train: int
    """Images."""
    valid: int
    wall: float = math.nan
    """Seconds of the whole process."""


def ours(data: Path, options: PhotographOptions, seed: int, scratch: Path) -> Run:
    """The command; `scratch` takes its runs and its cache."""
    config = TrainConfig(
        data=str(data),
        model=options.model,
        size=options.size,
        epochs=options.epochs,
        batch=options.batch,
        seed=seed,
        runs=scratch / "runs",
        name="run",
    )
    if options.quick:
        # Ray alone takes a quarter of a minute to start and stop.
        config = replace(config, workers=0, threads=1, lr_find_steps=20)
    _, wall = finished(our_command(config), scratch)
    events = journal.read(scratch / "runs" / "run" / "journal.jsonl")
    return replace(_of_journal(events), wall=wall)


def _of_journal(events: list[dict]) -> Run:
    by_name = {event["event"]: event for event in events}  # the last of each
    phases = [event for event in events if event["event"] == "phase"]
    return Run(
        error=by_name["finished"]["error_rate"],
        lr=by_name["range_result"]["chosen"],
        lr_find_seconds=by_name["range_result"]["time"] - phases[0]["time"],
        train_seconds=by_name["checkpoint"]["time"] - phases[1]["time"],
        train=by_name["run"]["train"],
        valid=by_name["run"]["valid"],
    )


def fastai(data: Path, options: PhotographOptions, seed: int, scratch: Path, *, channels_last: bool) -> Run:
    """Chapter 5; `scratch` takes what its range test keeps meanwhile."""
    words = ["-m", "benchmarks.fastai_run", "--data", str(data), "--scratch", str(scratch), "--seed", str(seed)]
    words += ["--valid", _validation(data).name, "--model", options.model, "--size", str(options.size)]
    words += ["--presized", str(_presized(options)), "--epochs", str(options.epochs), "--batch", str(options.batch)]
    words += ["--workers", str(options.threads), *(["--channels-last"] if channels_last else [])]
    output, wall = finished(words, scratch)
    return replace(Run(**json.loads(output.splitlines()[-1])), wall=wall)


def _presized(options: PhotographOptions) -> int:
    return options.presized or round(1.5 * options.size)


def our_command(config: TrainConfig) -> list[str]:
    """The words for `finished` that train with this configuration."""
    return ["-m", "cluster.cli", "train", *flags(config.as_dict())]


def finished(words: Sequence[str], scratch: Path, more: Mapping[str, str] | None = None) -> tuple[str, float]:
    """What a Python process prints, and its seconds from start to end; what it keeps goes to `scratch`.

    Args:
        more: of its environment.
    """
    environment = {
        **os.environ,
        **(more or {}),
        "PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "ONEWARP_CACHE": str(scratch / "cache"),
    }
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words], cwd=scratch, env=environment, capture_output=True, text=True, check=False
    )
    wall = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return done.stdout, wall


def _validation(data: Path) -> Path:
    found = [data / name for name in ("validation", "valid", "val") if (data / name).is_dir()]
    if not found or not (data / "train").is_dir():
        raise UserError(
            f"{data} must hold train/ and one of validation/, valid/ and val/, where fastai looks for them."
        )
    return found[0]


def reduced(data: Path, share: float, to: Path) -> Path:
    """A copy in `to` of this share of each class's files, evenly spread over them by name; at least two of each."""
    for part in (data / "train", _validation(data)):
        for folder in sorted(folder for folder in part.iterdir() if folder.is_dir()):
            files = sorted(file for file in folder.iterdir() if file.is_file())
            count = min(len(files), max(2, round(share * len(files))))
            target = to / part.name / folder.name
            target.mkdir(parents=True)
            for i in range(count):
                shutil.copy2(files[i * len(files) // count], target)
    return to


def laid_out(manifest: Manifest, to: Path) -> Path:
    """A copy of all images in `to`, where parts and classes are folders."""
    for path, label, valid in zip(manifest.paths, manifest.labels_N, manifest.valid_N, strict=True):
        folder = to / ("valid" if valid else "train") / manifest.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy2(manifest.root / path, folder)
    return to


def read_through(folder: Path) -> None:
    """Read every file once, so that the first training finds as much in memory as the later ones."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.read_bytes()


def main(options: PhotographOptions) -> Record:
    if options.quick:
        options = replace(options, seeds=options.seeds[:1], size=32, batch=8, epochs=1, threads=0)
    ways = [OURS, FASTAI, *([CHANNELS_LAST] if options.channels_last else [])]
    skipped = {}
    if find_spec("fastai") is None:
        skipped = dict.fromkeys(ways[1:], "not installed: fastai")
        ways = ways[:1]
    runs: dict[str, list[Run]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="onewarp-photographs-") as folder:
        if named_dataset(options.data):
            data = laid_out(open_data(replace(options, threads=max(1, options.threads))), Path(folder, "whole"))
        else:
            data = Path(options.data).resolve()
        if options.quick:
            data = reduced(data, min(options.subset, 48 / _count(data / "train")), Path(folder, "data"))
        elif options.subset < 1:
            data = reduced(data, options.subset, Path(folder, "data"))
        read_through(data)
        for turn, seed in enumerate(options.seeds):
            for way in ways if turn % 2 == 0 else reversed(ways):
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    if way == OURS:
                        run = ours(data, options, seed, Path(scratch))
                    else:
                        run = fastai(data, options, seed, Path(scratch), channels_last=way == CHANNELS_LAST)
                runs[way].append(run)
                print(f"seed {seed}, {way}: error {run.error:.4f} in {run.wall:.0f} s, rate {run.lr:.2e}", flush=True)
            # After each pair, not only at the end: three take hours, and what ends them early should cost one pair.
            record = _record(runs, options, skipped)
            record.publish(whole=turn + 1 == len(options.seeds))
    return record


def _record(runs: dict[str, list[Run]], options: PhotographOptions, skipped: dict[str, str]) -> Record:
    images = {(run.train, run.valid) for of_way in runs.values() for run in of_way}
    if len(images) > 1:
        raise RuntimeError(f"The ways did not train and validate on the same images: {images}.")
    ((train, valid),) = images
    seeds = options.seeds[: len(runs[OURS])]
    return Record(
        title=f"Photographs end to end, {options.model}, {options.size} px, fine_tune({options.epochs})",
        name="photographs",
        options=options,
        figures=list(figures(runs)),
        skipped=skipped,
        remarks=(
            f"{train:,} images to train on and {valid:,} to validate on; seeds {', '.join(map(str, seeds))}.",
            f"fastai presizes to {_presized(options)} with {options.threads} loader processes, beside torch's threads "
            "on all cores; its rate is the `valley` of its `lr_find`.",
            "The intervals are of seeds: all trainings are judged by the same images, and how others would judge them "
            "is not in it.",
        ),
        packages=() if skipped else ("fastai", "timm", "ray"),
    )


def _count(folder: Path) -> int:
    return sum(file.is_file() for file in folder.rglob("*"))


def figures(runs: dict[str, list[Run]]) -> Iterator[Figure]:
    """The table; ratios and differences are of trainings with the same seed."""
    for way, of_way in runs.items():
        yield Figure(row=way, column=ERROR, samples=[run.error for run in of_way], centre="mean")
        yield Figure(row=way, column=WALL, samples=[run.wall for run in of_way])
        if way != OURS:
            pairs = list(zip(runs[OURS], of_way, strict=True))
            yield Figure(row=way, column=WALL_RATIO, samples=[our.wall / this.wall for our, this in pairs])
            yield Figure(
                row=way, column=ERROR_DIFFERENCE, samples=[our.error - this.error for our, this in pairs], centre="mean"
            )
        yield Figure(row=way, column=RANGE_TEST, samples=[run.lr_find_seconds for run in of_way])
        yield Figure(row=way, column=TRAINING, samples=[run.train_seconds for run in of_way])
        yield Figure(row=way, column=RATE, samples=[run.lr for run in of_way])
