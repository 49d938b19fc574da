"""What a run loses when its processes die, and how long it takes to go on.

    onewarp bench faults [--json FILE]

A training with two workers, on a Ray cluster of a head and two nodes on this machine, is hit with SIGKILL at random
steps: a worker, a whole node with all its processes, the command itself. A node is replaced at once, the command is
started again with the same words. What counts is read from the journal: every step of the plan was done, each time with
the same loss; and the weights at the end are those of a run that nothing happened to. The clock runs from the signal to
the end of the next step. Kills while a checkpoint is written are sent when its unfinished folder appears.

On one machine a worker is stopped (SIGSTOP), and SIGTERM is sent to the command and to a worker in turn; then the clock
runs to the end of the command, which must leave a checkpoint of its last step.

What checkpoints cost is measured without Ray: steps with a checkpoint after every 20 take turns, run by run, with steps
without.
"""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from rich.console import Console

from benchmarks.data import open_data
from benchmarks.nodes import RAY, Node, nodes
from benchmarks.processes import MARK, workers
from benchmarks.record import Figure, Options, Record
from trainer import TrainConfig, fine_tune, journal

Kind = Literal["worker", "node", "command"]
KINDS: tuple[Kind, ...] = ("worker", "node", "command")
EVERY = 10  # steps from one checkpoint to the next
POLL = 0.2  # seconds between two looks; what is told are the times in the journal
PATIENCE = 180.0  # seconds for anything to happen
WARM = 10  # steps that count for no speed
STALL = 10.0  # seconds that a worker may stand still
COUNT, SAME, LOST = "times", "weights equal to the bit, of 1 run", "steps lost, most"
AGAIN, ENDED, SLOWEST = "to the next step, s", "to the end, s", "slowest, s"
_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class FaultOptions(Options):
    """Hit what trains, and see that nothing is lost."""

    kills: int = 10
    """Of each kind: a worker, a node, the command."""
    writing: int = 20
    """Of the command, while it writes a checkpoint."""
    stops: int = 6
    """Of a worker by SIGSTOP, and as many by SIGTERM of the run."""
    pairs: int = 6
    """Runs with and without checkpoints; 0 leaves that out."""
    seed: int = 0
    """Of the steps at which it is hit."""


class Training:
    """The command on a cluster, begun again when it was killed."""

    def __init__(self, folder: Path, options: FaultOptions, epochs: int, *more: str) -> None:
        self.run = folder / "runs/run"
        words = ["-m", "cluster.cli", "train", "--data", options.data, "--runs", str(folder / "runs"), "--name", "run"]
        words += ["--model", "test_convnext", "--head", "plain", "--no-pretrained", "--size", "64", "--batch", "8"]
        words += ["--epochs", str(epochs), "--freeze-epochs", "0", "--lr", "1e-3", "--wandb", "off", "--restarts", "99"]
        words += ["--checkpoint-every", str(EVERY), "--workers", "2", *more]
        self._words, self._folder = words, folder
        self.start()

    def start(self) -> None:
        environment = {**os.environ, **RAY, "PYTHONPATH": str(_ROOT), "TMPDIR": str(self._folder)}
        with (self._folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self._words],
                cwd=self._folder,
                stdout=log,
                stderr=log,
                env={**environment, MARK: str(self._folder)},
            )

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.run / "journal.jsonl"
        return [event for event in journal.read(path) if event["event"] == kind] if path.exists() else []

    def step_after(self, count: int) -> float:
        """The time at which a step is in the journal beyond the first `count` lines of steps."""
        self.wait_for(lambda: len(self.events("step")) > count)
        return self.events("step")[count]["time"]

    def go_on(self, rng: random.Random) -> None:
        """Wait for a random number of steps from here."""
        steps = len(self.events("step")) + rng.randint(2, 2 * EVERY)
        self.wait_for(lambda: len(self.events("step")) >= steps)

    def wait_for(self, condition: Callable[[], object], poll: float = POLL) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("It ended, or stands still:\n" + (self._folder / "log").read_text()[-4000:])
            time.sleep(poll)

    def writes(self) -> bool:
        """Whether a checkpoint is half written just now."""
        folder = self.run / "checkpoints"
        return folder.is_dir() and any(name.endswith(".partial") for name in os.listdir(folder))

    def finish(self) -> dict[str, Any]:
        """The weights at the end."""
        if self.process.wait(timeout=1800) != 0:
            raise RuntimeError((self._folder / "log").read_text()[-4000:])
        return safetensors.torch.load_file(self.run / "model.safetensors")

    def same(self, expected: dict[str, Any]) -> bool:
        """Whether it comes to its end by every step of the plan, and there to these weights."""
        weights, first = self.finish(), self.events("run")[0]
        return equal(weights, expected) and whole(self.events("step"), first["epochs"] * first["steps_per_epoch"])


@dataclass
class Outcome:
    """Of a run that was hit again and again, always alike."""

    lost: list[float]
    """Steps done before each time that had to be done again."""
    seconds: list[float]
    """From each signal to the next step, or to the end."""
    same: bool = False


def hit(training: Training, outcome: Outcome, strike: Callable[[], None], rng: random.Random) -> None:
    """Kill something a random number of steps after the training has gone on from the last time."""
    training.go_on(rng)
    begun, clock = len(training.events("run")), time.time()
    strike()
    training.wait_for(lambda: len(training.events("run")) > begun)
    again = training.events("run")[begun]
    done = [event["step"] for event in training.events("step") if event["time"] < again["time"]]
    outcome.lost.append(max(done) + 1 - (again["resumed_from"] or 0))
    outcome.seconds.append(training.step_after(len(done)) - clock)


def whole(done: list[dict[str, Any]], steps: int) -> bool:
    """Whether the events `done` are all `steps` of a plan and no other, with one loss however often each was done."""
    losses: dict[int, float] = {}
    for event in done:
        if losses.setdefault(event["step"], event["loss"]) != event["loss"]:
            return False
    return sorted(losses) == list(range(steps))


def killed(kind: Kind, options: FaultOptions, folder: Path, epochs: int, expected: dict[str, Any]) -> Outcome:
    """A run of which processes of one kind are killed, one after the other."""
    outcome, rng = Outcome([], []), random.Random(f"{options.seed} {kind}")
    with nodes(folder) as cluster:
        there: list[Node] = [cluster.add(), cluster.add()]
        training = Training(folder, options, epochs, "--address", cluster.address)
        for _ in range(options.kills):

            def strike() -> None:
                if kind == "worker":
                    os.kill(rng.choice([pid for node in there for pid in workers(node.mark)]), signal.SIGKILL)
                elif kind == "node":
                    there.pop(rng.randrange(2)).kill()
                    there.append(cluster.add())
                else:
                    training.process.kill()
                    training.process.wait()
                    training.start()

            hit(training, outcome, strike, rng)
        outcome.same = training.same(expected)
    return outcome


def survives_writing(options: FaultOptions, folder: Path, epochs: int, expected: dict[str, Any]) -> bool:
    """Whether it ends as `expected`, though it and its workers are killed while a checkpoint is half written."""
    training = Training(folder, options, epochs)
    for _ in range(options.writing):
        struck = False
        while not struck:
            training.step_after(len(training.events("step")))
            processes = [*workers(folder), training.process.pid]
            training.wait_for(training.writes, poll=0.001)
            for pid in processes:
                os.kill(pid, signal.SIGKILL)
            struck = training.writes()
            training.process.wait()
            training.start()
    return training.same(expected)


def stood_still(options: FaultOptions, folder: Path, epochs: int, expected: dict[str, Any]) -> Outcome:
    """A run of which one worker after the other stands still."""
    outcome, rng = Outcome([], []), random.Random(f"{options.seed} still")
    training = Training(folder, options, epochs, "--stall", f"{STALL:g}")
    for _ in range(options.stops):
        hit(training, outcome, lambda: os.kill(rng.choice(workers(folder)), signal.SIGSTOP), rng)
    outcome.same = training.same(expected)
    return outcome


def told_to_end(options: FaultOptions, folder: Path, epochs: int, expected: dict[str, Any]) -> Outcome:
    """A run whose command and workers are told to end, in turn, and which goes on each time."""
    outcome, rng = Outcome([], []), random.Random(f"{options.seed} end")
    training = Training(folder, options, epochs)
    for turn in range(options.stops):
        training.go_on(rng)
        clock = time.time()
        os.kill(rng.choice(workers(folder)) if turn % 2 else training.process.pid, signal.SIGTERM)
        if training.process.wait(PATIENCE) != 128 + signal.SIGTERM:
            raise RuntimeError((folder / "log").read_text()[-4000:])
        outcome.seconds.append(time.time() - clock)
        outcome.lost.append(training.events("step")[-1]["step"] + 1 - training.events("checkpoint")[-1]["step"])
        training.start()
    outcome.same = training.same(expected)
    return outcome


def equal(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(found[name].equal(value) for name, value in expected.items())


def cost(options: FaultOptions, folder: Path) -> list[tuple[float, float]]:
    """Seconds of a step (with a checkpoint after every 20, without), in pairs of runs that change places."""

    def seconds(every: int, name: str) -> float:
        config = TrainConfig(
            data=options.data,
            runs=folder / "runs",
            name=name,
            workers=0,
            threads=options.threads,
            size=128,
            batch=16,
            epochs=1,
            freeze_epochs=0,
            lr=1e-3,
            wandb="off",
            checkpoint_every=every,
            pretrained=False,
        )
        fine_tune(config, Console(file=io.StringIO()))
        events = journal.read(folder / "runs" / name / "journal.jsonl")
        steps = [event["time"] for event in events if event["event"] == "step"][WARM - 1 :]
        return (steps[-1] - steps[0]) / (len(steps) - 1)

    found = []
    for pair in range(options.pairs):
        both = [(20, f"{pair}-with"), (10**6, f"{pair}-without")]
        took = {every: seconds(every, name) for every, name in (both if pair % 2 else reversed(both))}
        found.append((took[20], took[10**6]))
    return found


def main(options: FaultOptions) -> Record:
    if options.quick:
        options = replace(options, kills=min(options.kills, 1), writing=1, stops=min(options.stops, 2), pairs=0)
    data = open_data(options)
    per_epoch = len(data.train) // 8
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="ow-", dir="/tmp") as place:
        options = replace(options, data=str(data.root))
        # Each kill passes at most 2 x EVERY steps, and as many while the next run starts.
        epochs = -(-(max(options.kills, options.writing, options.stops) * 4 * EVERY + 50) // per_epoch)
        expected = Training(_folder(place, "calm"), options, epochs).finish()
        for kind in KINDS if options.kills else ():
            outcome = killed(kind, options, _folder(place, kind), epochs, expected)
            row = f"kill -9 of a {kind}" if kind != "command" else "kill -9 of the command"
            figures += list(cells(row, outcome))
        if options.stops:
            outcome = stood_still(options, _folder(place, "still"), epochs, expected)
            figures += list(cells(f"SIGSTOP of a worker, --stall {STALL:g}", outcome))
            outcome = told_to_end(options, _folder(place, "end"), epochs, expected)
            figures += list(cells("SIGTERM to the command or a worker", outcome, ENDED))
        if options.writing:
            same = survives_writing(options, _folder(place, "writing"), epochs, expected)
            row = "kill -9 while a checkpoint is written"
            figures.append(Figure(row=row, column=COUNT, samples=[float(options.writing)]))
            figures.append(Figure(row=row, column=SAME, samples=[float(same)]))
        if options.pairs:
            pairs = cost(replace(options, data="breeds"), _folder(place, "cost"))
            row = "a checkpoint after every 20 steps"
            figures.append(Figure(row=row, column="step ÷ without", samples=[this / that for this, that in pairs]))
            figures.append(Figure(row=row, column="s a step", samples=[this for this, _ in pairs]))
    record = Record(
        title="Signals, and what they cost",
        name="faults",
        options=options,
        figures=figures,
        skipped={},
        remarks=(
            f"A checkpoint after every {EVERY} steps where something is killed; steps of some hundredths of a second.",
            f"Runs of {epochs} epochs of {per_epoch} steps; all kills of a kind hit one run.",
        ),
        packages=("ray",),
    )
    record.publish()
    return record


def cells(row: str, outcome: Outcome, clock: str = AGAIN) -> Iterator[Figure]:
    yield Figure(row=row, column=COUNT, samples=[float(len(outcome.lost))])
    yield Figure(row=row, column=SAME, samples=[float(outcome.same)])
    yield Figure(row=row, column=LOST, samples=[max(outcome.lost)])
    yield Figure(row=row, column=clock, samples=outcome.seconds)
    yield Figure(row=row, column=SLOWEST, samples=[max(outcome.seconds)])


def _folder(place: str, name: str) -> Path:
    """Short, because of Ray's sockets."""
    folder = Path(place, name)
    folder.mkdir()
    return folder
