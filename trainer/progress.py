"""A run as it is watched: a live bar and the epoch table on a terminal, plain lines elsewhere."""

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trainer.run_folder import printable

# The columns of the epoch table: heading, width. fastai's, and the throughput.
COLUMNS = (
    ("epoch", 5),
    ("train_loss", 10),
    ("valid_loss", 10),
    ("error_rate", 10),
    ("img/s", 7),
    ("time", 7),
)
SECONDS_BETWEEN_LINES = 15.0  # of the journal's clock, where the output is no terminal
NAMES = {"lr_find": "range test"}


class Progress:
    """Shows the events of a run's journal on `console`.

    On a terminal a two-line bar follows the phase under way and disappears at the end; finished epochs,
    the learning rate that was chosen and warnings stay. Elsewhere (a pipe, a file, a batch system's log)
    everything is a plain line, and a long epoch says how far it is at most every `SECONDS_BETWEEN_LINES`.
    The time left is the phase's, from the journal's own clock, so that a replay shows what the run showed.

    Use as a context manager: leaving it, also by an exception, gives the terminal back.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._phase: Mapping[str, Any] | None = None
        self._step: Mapping[str, Any] | None = None  # the latest step or range_step of the phase
        self._start: tuple[int, float] | None = None  # (steps done, time) that the speed is measured from
        self._has_header = False
        self._sized = False  # whether the epochs differ in size, which then has a column
        self._next_line = -math.inf
        self._workers: int | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            # Redrawn by rich's own thread, from a renderable that no event changes any more.
            self._live = Live(Text(""), console=self._console, refresh_per_second=5, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._phase = None
        if self._live is not None:
            self._live.stop()
            self._live = None

    def on(self, event: Mapping[str, Any]) -> None:
        """Show one event of the journal. Events that are of no interest here are passed over."""
        self._show(event)
        if self._live is not None:
            self._live.update(self._bar())

    def _show(self, event: Mapping[str, Any]) -> None:
        match event["event"]:
            case "run":
                self._sized = bool(event.get("config", {}).get("sizes"))
                # After a restart the speed is another, and so may the phase be, which says so itself.
                self._step = self._start = None
                if event.get("resumed_from") is not None:
                    workers, before = event.get("world_size"), self._workers
                    many = f", on {workers} worker{'s'[: workers != 1]}" if before and workers != before else ""
                    self._say(f"resumed from step {event['resumed_from']}{many}")
                self._workers = event.get("world_size")
            case "phase":
                self._phase, self._step, self._start = event, None, None
                self._next_line = event["time"] + SECONDS_BETWEEN_LINES
            case "range_step" | "step":
                self._on_step(event)
            case "range_result":
                self._say(_choice(event))
            case "epoch":
                self._on_epoch(event)
            case "quarantined":
                self._say(
                    f"left out  {printable(event['path'])}: {event['reason']} (found in training)", style="yellow"
                )
            case "bad_batch":
                then = {"stop": "the run stops", "skip": "it is passed over", "rewind": "back to the last checkpoint"}
                where = f"batch {event['step']} of epoch {event['epoch']}"
                self._say(f"warning: the loss of {where} is {event['loss']}; {then[event['action']]}", style="yellow")
            case "stalled":
                self._say(
                    f"warning: worker {event['rank']} stood still (--stall); the journal tells where", style="yellow"
                )
            case "leaving":
                self._say(f"a machine leaves the cluster: going on from step {event['step']} when there is room")
            case "warning":
                self._say(f"warning: {event['message']}", style="yellow")
            case "finished":
                self._phase = None

    def _on_step(self, event: Mapping[str, Any]) -> None:
        if self._phase is None:
            return
        self._step = event
        if self._start is None:
            # The first step is left out of the speed: it waited for the first batch and for compilers.
            self._start = (self._done(event), event["time"])
        if self._live is None and event["time"] >= self._next_line:
            self._next_line = event["time"] + SECONDS_BETWEEN_LINES
            self._say(", ".join([f"{self._where()} step {self._count()}", *self._values(), *self._left()]))

    def _on_epoch(self, event: Mapping[str, Any]) -> None:
        if not self._has_header:
            self._has_header = True
            self._say("  ".join(name.rjust(width) for name, width in self._columns()), style="bold")
        cells = (
            str(event["epoch"]),
            *([str(event["size"])] if self._sized else []),
            _number(event["train_loss"], ".4f"),
            _number(event["valid_loss"], ".4f"),
            _number(event["error_rate"], ".4f"),
            _number(event["images_per_second"], ",.0f"),
            _duration(event["seconds"]),
        )
        self._say("  ".join(cell.rjust(width) for cell, (_, width) in zip(cells, self._columns(), strict=True)))
        self._next_line = event["time"] + SECONDS_BETWEEN_LINES

    def _columns(self) -> tuple[tuple[str, int], ...]:
        return (*COLUMNS[:1], ("size", 4), *COLUMNS[1:]) if self._sized else COLUMNS

    def _say(self, line: str, style: str = "") -> None:
        # A Text, not markup: a path or a class may hold brackets. Off a terminal a line is never broken.
        text = Text(" ".join(line.splitlines()), style=style)
        self._console.print(text, soft_wrap=self._live is None, highlight=False)

    def _done(self, event: Mapping[str, Any]) -> int:
        """Steps of the phase that are done once `event` is."""
        first_step = self._phase["first_step"] if self._phase and event["event"] == "step" else 0
        return event["step"] - first_step + 1

    def _where(self) -> str:
        phase = self._phase or {}
        name = NAMES.get(phase["phase"], phase["phase"])
        if phase["phase"] == "lr_find":
            return name
        done = self._done(self._step) if self._step else 0
        epoch = max(done - 1, 0) * phase["epochs"] // max(phase["steps"], 1)
        return f"{name} epoch {epoch + 1}/{phase['epochs']}"

    def _count(self) -> str:
        done = self._done(self._step) if self._step else 0
        return f"{done}/{self._phase['steps'] if self._phase else 0}"

    def _values(self) -> list[str]:
        step = self._step
        if step is None:
            return ["waiting for the first batch"]
        lr = step["lr"]
        values = [
            f"loss {_number(step['loss'], '.4f')}",
            # Of several layer groups the head's, which is the last and the largest.
            f"lr {short_lr(lr if isinstance(lr, int | float) else lr[-1])}",
        ]
        if "images_per_second" in step:
            values.append(f"{_number(step['images_per_second'], ',.0f')} img/s")
        if "data_wait" in step:
            values.append(f"data wait {_number(step['data_wait'], '.0%')}")
        return values

    def _left(self) -> list[str]:
        if self._step is None or self._start is None or self._phase is None:
            return []
        start, begun = self._start
        before, done, whole = (self._work(steps) for steps in (start, self._done(self._step), self._phase["steps"]))
        if done <= before:
            return []
        seconds = (self._step["time"] - begun) / (done - before) * max(whole - done, 0)
        return [f"{_duration(seconds)} left"]

    def _work(self, steps: int) -> float:
        """The work of the phase's first `steps` steps: where its epochs differ in size, it is their pixels."""
        phase = self._phase or {}
        sizes = phase.get("sizes") or [1]
        each = phase["steps"] / len(sizes)
        return sum(size**2 * min(max(steps - number * each, 0), each) for number, size in enumerate(sizes))

    def _bar(self) -> RenderableType:
        phase = self._phase
        if phase is None:
            return Text("")
        done = self._done(self._step) if self._step else 0
        values = self._values()
        if phase["epochs"] and done and done % (phase["steps"] / phase["epochs"]) == 0:
            values = ["validating", *values]
        line = Table.grid(expand=True, padding=(0, 2, 0, 0))
        for ratio in (None, 1, None, None):
            line.add_column(ratio=ratio, no_wrap=True)
        line.add_row(
            Text(self._where(), style="bold"),
            ProgressBar(total=max(phase["steps"], 1), completed=done),
            self._count(),
            Text("".join(self._left()), style="cyan"),
        )
        return Group(line, Text("  " + " · ".join(values), style="dim", no_wrap=True, overflow="ellipsis"))


def short_lr(lr: float) -> str:
    """A learning rate in two digits: 0.0025 as "2.5e-3"."""
    mantissa, _, exponent = f"{lr:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _choice(event: Mapping[str, Any]) -> str:
    chosen = event["chosen"]
    if chosen is None:
        return "no learning rate: the curve says nothing about it"
    names = [name for name, lr in event["suggestions"].items() if lr == chosen]
    names.sort(key=lambda name: name != event.get("choice"))  # two methods may suggest the same
    return f"learning rate {short_lr(chosen)}" + (f" ({names[0]})" if names else "")


def _number(value: float | None, form: str) -> str:
    """JSON knows no NaN: a loss that was none comes as null."""
    return format(math.nan if value is None else value, form)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"
