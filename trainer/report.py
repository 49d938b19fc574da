"""A run as a page to show: one file, no network, no script; written of the journal and the pictures beside it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.manifest import Manifest
from trainer import chart, journal, page
from trainer.chart import Series
from trainer.config import TrainConfig, flags, flat
from trainer.page import duration, picture, table, text
from trainer.run_folder import RunFolder

_LISTED = 20  # files left out that are named
_ROWS = 60  # classes in a table that is open
_FACTS = ("digest", "train", "valid", "quarantined", "device", "precision")

Event = dict[str, Any]


def write(folder: RunFolder, path: Path | None = None) -> Path:
    """Write a page of a run, whatever it has come to; by default `report.html` in its folder.

    Raises:
        UserError: there is no run, or the page cannot be written.
    """
    return page.write(path or folder.report, folder.path.name, _of_run(folder))


def compare(folders: Sequence[RunFolder], path: Path) -> Path:
    """Write a page that holds several runs against each other: results, settings that differ, curves together."""
    return page.write(path, "Runs compared", _of_runs(folders))


# ---- One run


def _of_run(folder: RunFolder) -> Iterable[str]:
    events = journal.of_run(folder.journal)
    runs = [event for event in events if event["event"] == "run" and event["command"] == "train"]
    run = (runs or [event for event in events if event["event"] == "run"])[-1]
    finished = next((event for event in reversed(events) if event["event"] == "finished"), None)
    epochs = _once(events, "epoch")
    yield f"<h1>{text(folder.path.name)}</h1>"
    if run["command"] == "lr-find":
        yield f'<p class="lead">{_suggested(events)}</p><p class="faint">{_what(run)}</p>{_command(run)}'
        yield picture(folder.figure("lr_find"), "Range test")
        yield _data(folder, run)
        yield _happened(events)
        yield f"<details><summary>All settings</summary><pre>{_settings(run)}</pre></details>"
        return
    yield f'<p class="lead">{_result(run, finished, epochs, working(events))}</p>'
    yield f'<p class="faint">{_what(run)}</p>{_command(run)}'
    for sentence in (finished or {}).get("advice", ()):
        yield f'<p class="bad">{text(sentence)}</p>'
    yield _epoch_table(epochs)
    yield f'<h2>Learning</h2><div class="two">{_losses(events, epochs)}{_rates(events)}</div>'
    yield picture(folder.figure("lr_find"), "Range test")
    if finished:
        yield _judgement(folder, finished)
    yield picture(folder.figure("show_batch"), "The first images of training, as the model sees them")
    yield _data(folder, run)
    yield _speed(events, run)
    yield _happened(events)
    yield _how_to_go_on(folder, run, finished)
    yield f"<details><summary>All settings</summary><pre>{_settings(run)}</pre></details>"


def _suggested(events: Sequence[Event]) -> str:
    """What a range test alone came to."""
    result = next((event for event in reversed(events) if event["event"] == "range_result"), None)
    if result is None:
        return "Not finished: the range test goes on, or was stopped."
    if result["chosen"] is None:
        return "The curve of the range test says nothing about the learning rate."
    others = ", ".join(f"{text(name)} {rate:.2g}" for name, rate in result["suggestions"].items())
    return f"Suggested learning rate: <b>{result['chosen']:.2g}</b> ({text(result['choice'])}). By method: {others}."


def _result(run: Event, finished: Event | None, epochs: Sequence[Event], seconds: float) -> str:
    if finished is None:
        reached = (
            f"error {100 * epochs[-1]['error_rate']:.1f}% after epoch {epochs[-1]['epoch']}" if epochs else "begun"
        )
        return f"Not finished: {reached}."
    wrong, valid = round(finished["error_rate"] * run["valid"]), run["valid"]
    took = duration(seconds)
    return (
        f"Error <b>{100 * finished['error_rate']:.1f}%</b>: {wrong:,} of {valid:,} validation images, after "
        f"{run['epochs']} epoch{'s' if run['epochs'] > 1 else ''} on {run['train']:,} images in {took}."
    )


def _what(run: Event) -> str:
    config = run["config"]
    workers = f"{run['world_size']} worker{'s' if run['world_size'] > 1 else ''} on {text(run['device'])}"
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run["time"]))
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return (
        f"{text(config['model'])}, {config['head']} head, {config['size']} px, batches of {config['batch']}, seed "
        f"{config['seed']}, {run['precision']}, {workers}; {text(config['data'])}, {len(run['classes'])} classes; "
        f"{when}; {text(versions)}"
    )


def _command(run: Event) -> str:
    """What would be typed for the same; and what it was typed for, by the hash of its files' names, sizes and times."""
    verb = "lr-find" if run["command"] == "lr-find" else "train"
    words = shlex.join(["onewarp", verb, *flags(run["config"], without=("resume", "restart"))])
    return f'<pre>{text(words)}</pre><p class="faint">Data {text(str(run.get("digest", ""))[:16])}.</p>'


def _epoch_table(epochs: Sequence[Event]) -> str:
    columns = {
        "train_loss": "training loss",
        "valid_loss": "validation loss",
        "error_rate": "error",
        "top5_accuracy": "top 5",
        "macro_f1": "macro F1",
        "calibration_error": "calibration",
        "images_per_second": "img/s",
    }
    rows = [
        [
            str(event["epoch"]),
            event["phase"],
            *(_cell(name, event.get(name)) for name in columns),
            duration(event["seconds"]),
        ]
        for event in epochs
    ]
    return "<h2>Epochs</h2>" + table(["epoch", "phase", *columns.values(), "time"], rows) if rows else ""


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name == "images_per_second":
        return f"{value:,.0f}"
    return f"{100 * value:.1f}%" if name in ("error_rate", "top5_accuracy") else f"{value:.4f}"


def _losses(events: Sequence[Event], epochs: Sequence[Event]) -> str:
    steps = _once(events, "step")
    ends, kept = _ends(steps), [step for step in steps if not step.get("skipped")]
    return chart.lines(
        [
            Series(name="training", x_N=[s["step"] for s in kept], y_N=[s["loss"] for s in kept]),
            Series(
                name="validation",
                x_N=[ends.get(e["epoch"], 0) for e in epochs],
                y_N=[e["valid_loss"] for e in epochs],
                colour=1,
                dots=True,
            ),
        ],
        x="step",
        y="loss",
    )


def _ends(steps: Sequence[Event]) -> dict[int, int]:
    return {step["epoch"]: step["step"] for step in steps}


def _rates(events: Sequence[Event]) -> str:
    steps = _once(events, "step")
    groups = max((len(step["lr"]) for step in steps), default=0)
    shown = sorted({0, groups - 1}) if groups else []
    names = {groups - 1: "head", 0: "first layers"} if groups > 1 else {0: "all layers"}
    return chart.lines(
        [
            Series(name=names[g], x_N=[s["step"] for s in steps], y_N=[s["lr"][g] for s in steps], colour=2 * (g == 0))
            for g in shown
        ],
        x="step",
        y="learning rate",
        log=groups > 1,
    )


def _judgement(folder: RunFolder, finished: Event) -> str:
    pairs = [[text(a), text(p), f"{n:,}"] for a, p, n in finished["most_confused"]]
    losses = [
        [
            text(row["path"]),
            text(row["actual"]),
            text(row["predicted"]),
            _number(row["loss"], ".2f"),
            _number(row["probability"], ".0%"),
        ]
        for row in finished.get("top_losses", ())
    ]
    head = ["file", "actual", "predicted", "loss", "probability"]
    files = f"<details><summary>Their files</summary>{table(head, losses, escaped=True)}</details>" if losses else ""
    rows = [
        [
            text(row["name"]),
            f"{row['images']:,}",
            # Without any of a kind there is no share of them.
            *(
                f"{row[share]:.0%}" if row[of] else ""
                for share, of in (("precision", "predicted"), ("recall", "images"))
            ),
        ]
        for row in finished["per_class"]
    ]
    classes = table(["class", "images", "precision", "recall"], rows, escaped=True)
    is_open = " open" if len(rows) <= _ROWS else ""
    return (
        "<h2>Where it errs</h2>"
        + (table(["actual", "predicted", "images"], pairs, escaped=True) if pairs else "<p>Nothing was confused.</p>")
        + picture(folder.figure("confused"), "What was taken for what")
        + picture(folder.figure("confusion"), "Confusion matrix")
        + f"<details{is_open}><summary>Each class</summary>{classes}</details>"
        + picture(folder.figure("top_losses"), "Top losses: predicted / actual / loss / probability")
        + files
    )


def _data(folder: RunFolder, run: Event) -> str:
    lines = folder.quarantine.read_text(errors="replace").splitlines() if folder.quarantine.exists() else []
    told = f"<p>{run['train']:,} images to train, {run['valid']:,} to validate, {len(run['classes'])} classes.</p>"
    told += _found(folder)
    if not lines:
        return f"<h2>Data</h2>{told}<p>Every file could be read.</p>"
    rows = [[text(part) for part in (*line.split("\t", 1), "")[:2]] for line in lines[:_LISTED]]
    more = f"<p>… and {len(lines) - _LISTED:,} more, in quarantine.txt.</p>" if len(lines) > _LISTED else ""
    count = f"{len(lines):,} file{' was' if len(lines) == 1 else 's were'} left out"
    return (
        f'<h2>Data</h2>{told}<p class="bad">{count}:</p>{table(["file", "why"], rows, escaped=True, words=True)}{more}'
    )


def _found(folder: RunFolder) -> str:
    """What the scan had to say."""
    try:
        manifest = Manifest.read(folder.manifest)
    except (OSError, UserError):
        return ""
    bad = [f'<p class="bad">{text(warning)}</p>' for warning in manifest.warnings]
    return "".join([*bad, *(f"<p>{text(note)}</p>" for note in manifest.notes)])


def _speed(events: Sequence[Event], run: Event) -> str:
    steps = _once(events, "step")
    if not steps:
        return ""
    batch = run["config"]["batch"]
    seconds = [batch / step["images_per_second"] for step in steps]
    waited = sum(step["data_wait"] * took for step, took in zip(steps, seconds, strict=True))
    rows = [[name, duration(took)] for name, took in spent(events) if took >= 0.5]
    curve = chart.lines(
        [Series(name="img/s", x_N=[s["step"] for s in steps], y_N=[s["images_per_second"] for s in steps], colour=2)],
        x="step",
        y="throughput",
    )
    told = f"<p>Steps waited for images {100 * waited / sum(seconds):.1f}% of their time.</p>"
    return f'<h2>Where the time went</h2><div class="two"><div>{table(["", "time"], rows)}{told}</div>{curve}</div>'


def spent(events: Sequence[Event]) -> list[tuple[str, float]]:
    """Seconds of the range test, of training and of what is between, by the journal's own clock.

    What lies before a `run` event is no time of the run's: it was stopped, or its workers were being started.
    """
    kinds = {"range_step": "range test", "range_result": "range test", "step": "training steps"}
    between = "validation, checkpoints, pictures"
    total = {"range test": 0.0, "training steps": 0.0, between: 0.0}
    for before, event in pairwise(events):
        if event["event"] != "run":
            total[kinds.get(event["event"], between)] += event["time"] - before["time"]
    return list(total.items())


def working(events: Sequence[Event]) -> float:
    """Seconds that the workers of a run have worked, all starts together."""
    return sum(seconds for _, seconds in spent(events))


def _once(events: Sequence[Event], kind: str) -> list[Event]:
    """The steps, or epochs; of one that was done again the last time."""
    key = "epoch" if kind == "epoch" else "step"
    return [found for _, found in sorted({event[key]: event for event in events if event["event"] == kind}.items())]


def _happened(events: Sequence[Event]) -> str:
    rows: list[list[str]] = []
    before = None
    for event in events:
        at = time.strftime("%m-%d %H:%M:%S", time.localtime(event["time"]))
        if event["event"] == "run" and before is not None:
            where = "the beginning" if event["resumed_from"] is None else f"step {event['resumed_from']:,}"
            rows.append([at, f"Started on {event['world_size']} workers, from {where}."])
        elif event["event"] == "warning":
            rows.append([at, text(event["message"])])
        elif event["event"] == "stopped":
            rows.append([at, f"Stopped by a signal after step {event['step']:,}."])
        elif event["event"] == "leaving":
            rows.append([at, f"A checkpoint after step {event['step']:,}, as machines come or go."])
        elif event["event"] == "bad_batch":
            rows.append([at, f"The loss of step {event['step']} of epoch {event['epoch']} was bad: {event['action']}."])
        elif event["event"] == "stalled":
            rows.append([at, f"Worker {event['rank']} stood still; its stacks are in the journal."])
        before = event
    return "<h2>What happened on the way</h2>" + table(["time", ""], rows, escaped=True, words=True) if rows else ""


def _how_to_go_on(folder: RunFolder, run: Event, finished: Event | None) -> str:
    if finished is None:
        name = text(shlex.quote(folder.path.name))
        words = f"The same command with <code>--name {name}</code> goes on from its last checkpoint."
        return f"<h2>How to go on</h2><p>{words}</p>"
    place = shlex.quote(str(folder.path))
    lines = [
        f"onewarp evaluate {place} --data DIR",
        f"onewarp predict {place} DIR --out predictions.csv",
        f"onewarp export {place}",
    ]
    return f"<h2>How to go on</h2><pre>{chr(10).join(map(text, lines))}</pre>"


def _settings(run: Event) -> str:
    default = flat(TrainConfig().as_dict())
    return "\n".join(
        f"{'* ' if value != default.get(name) else '  '}{text(name)} = {text(value)}"
        for name, value in flat(run["config"]).items()
    )


# ---- Several runs


def _of_runs(folders: Sequence[RunFolder]) -> Iterable[str]:
    same = len({folder.path.name for folder in folders}) < len(folders)
    told = {str(folder.path) if same else folder.path.name: journal.of_run(folder.journal) for folder in folders}
    runs = {name: [e for e in events if e["event"] == "run"][-1] for name, events in told.items()}
    yield "<h1>Runs compared</h1>"
    rows = []
    for name, events in told.items():
        finished = next((e for e in reversed(events) if e["event"] == "finished"), None)
        best = finished and finished.get("best")
        rows.append(
            [
                name,
                "" if finished is None else f"{100 * finished['error_rate']:.1f}%",
                "" if not best else f"{100 * best['error_rate']:.1f}% (epoch {best['epoch']})",
                "" if finished is None else _number(finished["valid_loss"], ".4f"),
                "not finished" if finished is None else duration(working(events)),
                str(runs[name]["world_size"]),
            ]
        )
    yield table(["run", "error", "best", "validation loss", "time", "workers"], rows)
    yield "<h2>Settings that differ</h2>" + _differences({name: flat(run["config"]) for name, run in runs.items()})
    facts = {name: {key: run.get(key) for key in _FACTS} | run["versions"] for name, run in runs.items()}
    yield "<h2>Data and versions that differ</h2>" + _differences(facts)
    losses, errors = [], []
    for number, (name, events) in enumerate(told.items()):
        steps, epochs = _once(events, "step"), _once(events, "epoch")
        ends = _ends(steps)
        losses.append(Series(name=name, x_N=[s["step"] for s in steps], y_N=[s["loss"] for s in steps], colour=number))
        errors.append(
            Series(
                name=name,
                x_N=[ends.get(e["epoch"], 0) for e in epochs],
                y_N=[100 * e["error_rate"] for e in epochs],
                colour=number,
                dots=True,
            )
        )
    curves = chart.lines(losses, x="step", y="training loss") + chart.lines(errors, x="step", y="validation error, %")
    yield f'<h2>Learning</h2><div class="two">{curves}</div>'


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _differences(configs: Mapping[str, Mapping[str, Any]]) -> str:
    names = dict.fromkeys(name for config in configs.values() for name in config)
    rows = []
    for name in names:
        values = [config.get(name) for config in configs.values()]
        if name not in ("name", "runs") and any(value != values[0] for value in values):
            rows.append([name, *("" if value is None else str(value) for value in values)])
    return table(["", *configs], rows) if rows else "<p>None.</p>"
