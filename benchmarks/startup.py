"""What comes before the first step, and what Ray Train costs against torchrun.

    onewarp bench startup [--data DIR] [--rounds 6] [--json FILE]

The same training on two workers, started by `onewarp train`, which is Ray Train, and by torchrun, which has neither Ray
nor a display and starts nothing again. They take turns; each is timed from the start of its process to its end, with an
empty cache folder. The moments are those of rank 0, as the journal tells them, in seconds from the start of the
command; they overlap where one thing happens beside another.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.data import folder_of
from benchmarks.photographs import finished, our_command, read_through
from benchmarks.record import Figure, Options, Record
from pipelines.errors import UserError
from trainer import allocation, journal, weights
from trainer.config import TrainConfig
from trainer.run_folder import RunFolder
from trainer.starting import default_workers, gpus

RAY, TORCHRUN = "Ray Train (onewarp train)", "torchrun"
MOMENTS = {
    "process": "the worker's process has begun",
    "met": "it is in the process group",
    "imported": "it has imported everything",
    "prepared": "the run is prepared: files scanned, model made",
    "ready": "the worker has loader, model and optimiser",
    "first": "the first step is done",
    "finished": "the journal ends",
    "end": "the command ends",
}
STEP, RATIO = "a step, s", "Ray ÷ torchrun"


@dataclass(frozen=True, kw_only=True)
class StartupOptions(Options):
    """Start the same training by Ray and by torchrun."""

    rounds: int = 6
    """Trainings of each; six is the fewest that have a 95% interval."""
    model: str = "tf_efficientnet_lite0"
    """Body; with its installed weights, where it has some."""
    size: int = 160
    """Pixels."""
    batch: int = 64
    """Images in a step."""
    subset: float = 1.0
    """Share of the images, of which there is one epoch."""


@dataclass(frozen=True, kw_only=True)
class Started:
    """One training."""

    moments: dict[str, float]
    """Seconds from the start of the command, in the order of `MOMENTS`."""
    step: float
    """Seconds, median."""


def by_ray(config: TrainConfig, scratch: Path) -> Started:
    return _started(our_command(config), config, scratch)


def by_torchrun(config: TrainConfig, scratch: Path) -> Started:
    file = scratch / "config.json"
    file.write_text(json.dumps(config.as_dict()))
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(config.crew.most)]
    return _started([*start, "-m", "benchmarks.torchrun_run", "--config", str(file)], config, scratch)


def _started(words: list[str], config: TrainConfig, scratch: Path) -> Started:
    before = time.time()
    # Workers on CPUs hold on to memory, whoever starts them.
    _, wall = finished(words, scratch, {} if gpus() else allocation.environment())
    folder = RunFolder(config.runs / str(config.name))
    events = journal.read(folder.journal)
    found = moments(events, folder.config.stat().st_mtime)
    steps = [event for event in events if event["event"] == "step"]
    assert isinstance(config.batch, int)
    if len(steps) < 2:
        raise UserError(f"An epoch of {len(steps)} steps has no step after the first. Choose a smaller --batch.")
    return Started(
        moments={name: at - before for name, at in found.items()} | {"end": wall},
        step=statistics.median(config.batch / step["images_per_second"] for step in steps[1:]),
    )


def moments(events: list[dict], prepared: float) -> dict[str, float]:
    """When each was reached, seconds since 1970; `prepared` is when the run's configuration was written."""
    first = {event["event"]: event for event in reversed(events)}
    return {
        **first["run"]["arrival"],
        "prepared": prepared,
        "ready": first["run"]["time"],
        "first": first["step"]["time"],
        "finished": events[-1]["time"],
    }


def main(options: StartupOptions) -> Record:
    folder, regex = folder_of(options)
    if options.quick:
        options = replace(options, rounds=1, model="test_efficientnet", size=32, batch=8)
    read_through(folder)
    ways = {RAY: by_ray, TORCHRUN: by_torchrun}
    found: dict[str, list[Started]] = {name: [] for name in ways}
    for turn in range(options.rounds):
        for name in ways if turn % 2 == 0 else reversed(ways):
            with tempfile.TemporaryDirectory(prefix="onewarp-startup-") as scratch:
                config = TrainConfig(
                    data=str(folder),
                    label_regex=regex,
                    model=options.model,
                    pretrained=weights.packaged(options.model) is not None,
                    size=options.size,
                    batch=options.batch,
                    subset=options.subset,
                    epochs=0,
                    freeze_epochs=1,
                    lr=1e-3,
                    workers=default_workers(),
                    wandb="off",
                    runs=Path(scratch, "runs"),
                    name="run",
                )
                found[name].append(ways[name](config, Path(scratch)))
                at = found[name][-1].moments
                print(f"{name}: first step after {at['first']:.1f} s, end after {at['end']:.1f} s", flush=True)
    record = Record(
        title=f"What comes before the first step, {options.model}, {options.size} px, {default_workers()} workers",
        name="startup",
        options=options,
        figures=list(figures(found)),
        skipped={},
        remarks=(
            "Seconds from the start of the command; each moment is rank 0's. An epoch with the head alone follows, and "
            "its validation.",
        ),
        packages=("ray", "timm"),
    )
    record.publish()
    return record


def figures(found: Mapping[str, list[Started]]) -> Iterator[Figure]:
    """The table; a ratio is of two trainings in turn."""
    pairs = list(zip(found[RAY], found[TORCHRUN], strict=True))
    for moment, words in MOMENTS.items():
        for name, of_name in found.items():
            yield Figure(row=f"{words}, s", column=name, samples=[each.moments[moment] for each in of_name])
        if moment in ("first", "end"):
            ratios = [ray.moments[moment] / other.moments[moment] for ray, other in pairs]
            yield Figure(row=f"{words}, s", column=RATIO, samples=ratios)
    for name, of_name in found.items():
        yield Figure(row=STEP, column=name, samples=[each.step for each in of_name])
    yield Figure(row=STEP, column=RATIO, samples=[ray.step / other.step for ray, other in pairs])
