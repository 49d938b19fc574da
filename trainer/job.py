"""A job from the outside: prepare its folder, start its workers, watch its journal, tell how it ended."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pipelines.errors import UserError
from trainer import journal, memory, report
from trainer.config import Goal, TrainConfig, flags
from trainer.progress import Progress
from trainer.run_folder import RunFolder, absolute, new_name
from trainer.starting import Workers, check_batch, resolve_crew
from trainer.stopping import StoppedError, ending, listening
from trainer.tracking import Tracker, TrackingMode

if TYPE_CHECKING:
    from pipelines.manifest import Manifest
    from trainer.best import Best


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a training ended."""

    error_rate: float
    """Share of validation images misjudged, by the weights that are kept."""
    valid_loss: float
    """No number where the model says none of some image."""
    most_confused: list[tuple[str, str, int]]
    """(actual, predicted, count), most frequent first, at most five."""
    quarantine: int
    """Files left out because they could not be decoded or labelled, at the scan or since."""
    seconds: float
    """Everything from the scan on."""
    folder: Path
    """Where everything of the run lies."""
    best: Best | None = None
    """The epoch whose weights are in `best.safetensors`: the lowest error of all."""
    advice: tuple[str, ...] = ()
    """What the epochs say about overfitting; sentences."""


OnEvent = Callable[[dict[str, Any]], None]


def fine_tune(config: TrainConfig, console: Console | None = None, on_event: OnEvent | None = None) -> Result:
    """Train as `config` says, on as many workers as it says, and return how it ended.

    Args:
        on_event: called with each new event of the journal, on another thread.

    Raises:
        UserError: something about the data, the model or the machine that a person can mend.
        StoppedError: a signal came, and the run ended at a checkpoint.
    """
    from trainer.best import Best

    started = time.time()
    events, folder, manifest = _carry_out(config, "train", console or Console(), on_event)
    finished = next(event for event in reversed(events) if event["event"] == "finished")
    with suppress(UserError):  # a full storage; the run is what matters
        report.write(folder)
    return Result(
        error_rate=finished["error_rate"],
        valid_loss=math.nan if finished["valid_loss"] is None else finished["valid_loss"],
        most_confused=[(a, p, n) for a, p, n in finished["most_confused"]],
        quarantine=len(manifest.quarantine) + sum(event["event"] == "quarantined" for event in events),
        seconds=time.time() - started,
        folder=folder.path,
        best=Best(**finished["best"]) if finished.get("best") else None,
        advice=tuple(finished.get("advice", ())),
    )


@dataclass(frozen=True, kw_only=True)
class LrFind:
    """What a range test found."""

    lrs: list[float]
    losses: list[float]
    suggestions: dict[str, float]
    """Rates by method; empty where the curve carries no information."""
    folder: Path
    """Where the plot lies."""


def lr_find(config: TrainConfig, console: Console | None = None, on_event: OnEvent | None = None) -> LrFind:
    """Run the learning-rate range test alone, over all workers.

    Args:
        on_event: as of `fine_tune`.

    Raises:
        UserError: as `fine_tune`.
    """
    events, folder, _ = _carry_out(config, "lr-find", console or Console(), on_event)
    steps = [event for event in events if event["event"] == "range_step"]
    result = next(event for event in reversed(events) if event["event"] == "range_result")
    return LrFind(
        lrs=[step["lr"] for step in steps],
        losses=[step["loss"] for step in steps],
        suggestions=result["suggestions"],
        folder=folder.path,
    )


def _carry_out(
    config: TrainConfig, goal: Goal, console: Console, on_event: OnEvent | None
) -> tuple[list[dict[str, Any]], RunFolder, Manifest]:
    config, caught, started = resolve_crew(config), [], time.time()
    check_batch(config)
    made = [] if absolute(config.runs).exists() else [absolute(config.runs)]
    name = config.name or new_name(config.runs, absolute(Path(config.data)))
    config = dataclasses.replace(config, name=name)
    folder = RunFolder(absolute(config.runs) / name)
    made = [folder.path, *made]
    new, short = not folder.config.exists(), None
    with given_back(made), Workers(config, goal, folder) as workers, ending():
        if new:
            workers.begin_early()
        from trainer.prepare import prepare  # which takes seconds, while they start

        folder, manifest = prepare(config, console)
        console.print(f"run       {folder.path}", highlight=False, markup=False, soft_wrap=True)
        if goal == "train" and any(event["event"] == "finished" for event in journal.read(folder.journal)):
            console.print(f"The run {folder.path.name} was finished before; this is how it ended.")
        else:
            offset = 0 if new else journal.whole(folder.journal)
            watching = watched(folder, config.wandb, console, offset, on_event)
            with watching, listening(folder.stop, config.grace) as caught:
                try:
                    workers.work()
                except memory.OutOfMemoryError as error:
                    short = error
                except Exception:
                    if goal == "train":
                        with suppress(UserError):
                            report.write(folder)  # how far it came, and what happened
                    raise
                finally:
                    workers.close()  # before anybody stops to listen, and before what is left is uploaded
    if short is not None:
        if config.address is not None:
            raise UserError(f"{short} Choose a smaller --batch or --size, or give --micro-batch.")
        from trainer import rehearsal

        with console.status("The memory ran out. Trying which batch fits …"):
            raise UserError(f"{short} {rehearsal.advice(folder.read_config(), manifest, folder.initial)}")
    events = journal.read(folder.journal)
    begin = max(i for i, event in enumerate(events) if event["event"] == "run" and event["command"] == goal)
    if events[-1]["event"] == "stopped" and events[begin]["time"] >= started:
        kept = [event["step"] for event in events if event["event"] == "checkpoint"]
        told = f"the last checkpoint is of step {kept[-1]}" if kept else "there is no checkpoint yet"
        with suppress(UserError):
            report.write(folder)
        number = caught[0] if caught else signal.SIGTERM
        raise StoppedError(f"stopped after step {events[-1]['step']}; {told}", number, run=name)
    return events[begin:], folder, manifest


@contextmanager
def given_back(folders: Sequence[Path]) -> Generator[None]:
    """Folders that were made for what does not come are gone afterwards; those with something in them stay."""
    try:
        yield
    finally:
        with suppress(OSError):
            for folder in folders:
                folder.rmdir()


@contextmanager
def watched(
    folder: RunFolder, wandb_mode: TrackingMode, console: Console, offset: int, on_event: OnEvent | None
) -> Generator[None]:
    """Show, track and tell what is written to the journal from byte `offset` on, while the workers run."""
    stop = threading.Event()

    with Progress(console) as progress:

        def warn(message: str) -> None:
            progress.on({"event": "warning", "time": time.time(), "message": message})

        tracker = Tracker(folder.path, wandb_mode, warnings=warn)

        def tell(on: Callable[[dict[str, Any]], None]) -> None:
            for event in journal.follow(folder.journal, stop, offset=offset):
                on(event)

        # Each reads for itself: a tracking server that does not answer must not hold up the display.
        told = [progress.on, tracker.on, *([] if on_event is None else [on_event])]
        readers = [threading.Thread(target=tell, args=(on,)) for on in told]
        for reader in readers:
            reader.start()
        try:
            yield
        finally:
            stop.set()
            for reader in readers:
                reader.join()
            tracker.close()


def summary(result: Result, config: TrainConfig, console: Console) -> None:
    """The last words of a training on the terminal."""
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    say("")
    say(f"error rate  {result.error_rate:.4f}   (validation loss {result.valid_loss:.4f}, {result.seconds:.0f} s)")
    if result.best is not None:
        say(f"best epoch  {result.best.epoch}, error rate {result.best.error_rate:.4f}, kept in best.safetensors")
    for sentences in result.advice:
        say(f"note        {sentences}", style="yellow")
    if result.quarantine:
        say(f"left out    {result.quarantine} files, named in quarantine.txt")
    if result.most_confused:
        say("most confused (actual → predicted)")
        for actual, predicted, count in result.most_confused:
            say(f"  {count:4d}  {actual} → {predicted}")
    say(f"run         {result.folder}")
    say(f"report      {RunFolder(result.folder).report}")
    say("            " + ", ".join(sorted(p.name for p in result.folder.iterdir() if not p.name.startswith("."))))
    say("go on with  " + shlex.join(_continuing(result, config)))


def _continuing(result: Result, config: TrainConfig) -> list[str]:
    """The command that trains the result further: the same data, split and settings, another seed."""
    replaced = {
        "data",
        "name",
        "lr",
        "pretrained",
        "weights",
        "epochs",
        "sizes",
        "freeze_epochs",
        "seed",
        "resume",
        "restart",
    }
    words = ["onewarp", "train", "--data", config.data, *flags(config.as_dict(), without=replaced)]
    model = os.path.relpath(RunFolder(result.folder).model)
    return [*words, "--weights", model, "--freeze-epochs", "0", "--epochs", "3", "--seed", str(config.seed + 1)]
