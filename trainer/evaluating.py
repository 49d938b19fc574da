"""`evaluate`: how well a trained run does on labelled images."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from pipelines.errors import UserError
from pipelines.manifest import Manifest, Quarantined, Samples
from pipelines.scanning import scan_to_apply
from trainer import figures, predictions, worst
from trainer.apply import Scores, apply, scratch_in
from trainer.apply_config import EvaluateConfig
from trainer.bar import counted
from trainer.config import TrainConfig
from trainer.evaluate import Judgement
from trainer.images import resolve_data
from trainer.interpret import confusion_matrix, most_confused
from trainer.metrics import ClassMetrics, Metrics
from trainer.predictions import NONE, decide, list_left_out, tell_left_out
from trainer.ranks import Ranks
from trainer.run_folder import RunFolder, absolute, printable, slug, write_atomic
from trainer.starting import check_workers
from trainer.trained import Trained, open_run

PAIRS = 10  # of confused classes that are told on the terminal
LISTED = 40  # classes that are; of more, those that are found least often


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well a run does on labelled images."""

    metrics: Metrics
    loss: float
    """By the loss of training, without label smoothing and class weights; nats."""
    most_confused: tuple[tuple[str, str, int], ...]
    """(actual, predicted, count), most frequent first, from the least count asked for on."""
    images: str
    """Which they are, in words."""
    trained_on: int
    """How many of them training saw, byte for byte; the error of those says nothing of new images."""
    threshold: float
    """What the best class must reach."""
    declined: int
    """Images whose best class does not; the metrics count them as what it says."""
    answered_error_rate: float
    """Error of the others; NaN where there are none."""
    left_out: tuple[Quarantined, ...]
    """Files that could not be read or have no label, and why."""
    folder: Path
    """Where evaluation.json, predictions.csv, confusion.png, confused.png and top_losses.png lie."""


def evaluate_run(config: EvaluateConfig, console: Console | None = None) -> Evaluation:
    """Judge a run by labelled images, and write what was found.

    The predicted class is the most probable one, as in validation, whatever its probability; how many images would be
    declined, and how well the others do, is told beside it.

    Raises:
        UserError: the run, the images, or the place to write to cannot be used.
    """
    console = console or Console()
    trained, manifest = open_run(absolute(config.run), config.weights)
    check_workers(config.workers or 0)
    name = slug(Path(config.data or trained.config.data).name)
    out = trained.path / f"evaluation-{name}" if config.out is None else absolute(config.out)
    trained.describe(config.tta, console)
    with _folder(out), scratch_in(out, "--out") as scratch:
        chosen = _labelled(config, trained, manifest, console)
        chosen.tell(console)
        scores = apply(
            trained,
            chosen.samples,
            tta=config.tta,
            workers=config.workers,
            scratch=scratch,
            console=console,
        )
        return _judged(config, trained, chosen, scores, out)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Chosen:
    """The images to judge by."""

    samples: Samples
    """With the run's classes."""
    words: str
    """Which they are."""
    trained_on: int
    quarantine: tuple[Quarantined, ...]
    notes: tuple[str, ...]

    def tell(self, console: Console) -> None:
        say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
        say(f"images    {len(self.samples):,}: {self.words}")
        for note in self.notes:
            say(f"note      {note}")
        if self.trained_on:
            say(
                f"warning   {self.trained_on:,} of them were trained on, byte for byte, which makes the error look "
                "smaller than it is",
                style="yellow",
            )


def _labelled(config: EvaluateConfig, trained: Trained, manifest: Manifest, console: Console) -> _Chosen:
    """The images that the configuration means: new ones, or what the run itself was validated on."""
    ran = trained.config
    train = manifest.train.share(ran.subset, ran.split_seed)
    if config.data is None:
        samples = trained.validated(manifest, "--data")
        return _Chosen(
            samples=samples,
            words=f"the run's own validation images of {manifest.root}",
            trained_on=_shared(manifest.hashes_N16[samples.ids_N], manifest.hashes_N16[train.ids_N]),
            quarantine=(),
            notes=(),
        )
    source = TrainConfig(data=config.data, label_regex=config.label_regex, label_csv=config.label_csv)
    folder, labels = resolve_data(source, console)
    with counted(console, f"Reading {folder}") as progress:
        found = scan_to_apply(folder, labels=labels, threads=len(os.sched_getaffinity(0)), progress=progress)
    split = {"folders": "by folders", "csv": "by the table", "random": "drawn when it was packed"}
    part = "all of" if found.part_of is None else f"the validation part ({split[found.part_of]}) of"
    return _Chosen(
        samples=_with_classes(found.samples, trained),
        words=f"{part} {folder}",
        trained_on=_shared(found.hashes_N16, manifest.hashes_N16[train.ids_N]),
        quarantine=found.quarantine,
        notes=found.notes,
    )


def _with_classes(samples: Samples, trained: Trained) -> Samples:
    """The samples with the run's classes, matched by name."""
    known = {name: label for label, name in enumerate(trained.classes)}
    used = [samples.classes[label] for label in np.unique(samples.labels_N)]
    unknown = [name for name in used if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], trained.classes, n=5)
        known_words = f"classes of like names: {', '.join(map(repr, near))}" if near else _first(trained.classes)
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(
            f"The images under {str(samples.root)!r} have the class {unknown[0]!r}{more}, which the run "
            f"{trained.path.name} does not know; {known_words}. Rename it, take its images out, or check where the "
            "labels come from."
        )
    label_C = np.array([known.get(name, -1) for name in samples.classes], np.int64)
    return replace(samples, classes=trained.classes, labels_N=label_C[samples.labels_N])


def _first(classes: tuple[str, ...]) -> str:
    return f"it knows {', '.join(map(repr, classes[:6]))}{', …' if len(classes) > 6 else ''}"


def _shared(hashes_N16: np.ndarray, others_M16: np.ndarray) -> int:
    """How many of the files are among the others, byte for byte."""
    others = {row.tobytes() for row in others_M16}
    return sum(row.tobytes() in others for row in hashes_N16)


@contextmanager
def _folder(path: Path) -> Generator[None]:
    """Make a folder, and take it away again if nothing was put into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {path} cannot be written ({error.strerror}). Choose another --out.") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it is not empty
            path.rmdir()


def _judged(config: EvaluateConfig, trained: Trained, chosen: _Chosen, scores: Scores, out: Path) -> Evaluation:
    """Sum up what the model said, and write it."""
    assert scores.losses_N is not None
    assert scores.places_N is not None
    samples, classes = chosen.samples, trained.classes
    judgement = Judgement(
        positions_N=scores.positions_N,
        labels_N=samples.labels_N[scores.positions_N],
        predicted_N=scores.best_NK[:, 0],
        losses_N=scores.losses_N,
        confidence_N=scores.probabilities_NK[:, 0],
        places_N=scores.places_N,
    )
    threshold = trained.threshold if config.threshold is None else config.threshold
    answered_N = decide(scores.best_NK, scores.probabilities_NK, threshold) != NONE
    wrong_N = (judgement.predicted_N != judgement.labels_N)[answered_N]
    confusion_CC = confusion_matrix(judgement.labels_N, judgement.predicted_N, classes)
    result = Evaluation(
        metrics=judgement.metrics(classes),
        loss=judgement.loss,
        most_confused=tuple(most_confused(confusion_CC, classes, config.min_count)),
        images=chosen.words,
        trained_on=chosen.trained_on,
        threshold=threshold,
        declined=int((~answered_N).sum()),
        answered_error_rate=float(wrong_N.mean()) if len(wrong_N) else math.nan,
        left_out=(*chosen.quarantine, *(Quarantined(path=bad.path, reason=bad.reason) for bad in scores.spoiled)),
        folder=out,
    )
    record = {
        "run": str(trained.path),
        "weights": trained.weights.name,
        "data": str(samples.root),
        "which": chosen.words,
        "tta": config.tta,
        "trained_on": chosen.trained_on,
        "left_out": len(result.left_out),
        "threshold": threshold,
        "declined": result.declined,
        "answered_error_rate": None if math.isnan(result.answered_error_rate) else result.answered_error_rate,
        "loss": result.loss,
        **asdict(result.metrics),
        "most_confused": result.most_confused,
        "top_losses": worst.losses(judgement, samples.paths, classes),
    }
    try:
        figures.plot_confusion(out / "confusion.png", confusion_CC, classes)
        # A few pictures: read on the CPU, in this process.
        loader = trained.loader(samples, Ranks(), device=torch.device("cpu"))
        worst.draw_losses(out / "top_losses.png", loader, judgement, classes)
        worst.draw_confused(out / "confused.png", loader, judgement, classes, result.most_confused)
        list_left_out(RunFolder(out).quarantine, result.left_out)
        predictions.write(
            out / "predictions.csv",
            paths=[samples.paths[position] for position in judgement.positions_N.tolist()],
            predicted_N=judgement.predicted_N,
            best_NK=scores.best_NK,
            probabilities_NK=scores.probabilities_NK,
            classes=classes,
            labels_N=judgement.labels_N,
        )
        # Last: where it is of this evaluation, so is everything beside it.
        write_atomic(out / "evaluation.json", json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"The folder {out} cannot be written ({error.strerror}). Choose another --out.") from None
    return result


def summary(result: Evaluation, console: Console) -> None:
    """The last words of `evaluate` on the terminal."""
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    metrics = result.metrics
    tell_left_out(result.left_out, RunFolder(result.folder).quarantine, console)
    say("")
    say(f"error rate    {metrics.error_rate:.4f}   ({metrics.images - metrics.right:,} of {metrics.images:,} wrong)")
    if result.threshold > 0:
        others = f"; error of the others {result.answered_error_rate:.4f}" if result.declined < metrics.images else ""
        say(
            f"declined      {result.declined:,} of {metrics.images:,}   (best class below {result.threshold:g}){others}"
        )
    say(f"top-5         {metrics.top5_accuracy:.4f}   (accuracy among the five most probable classes)")
    say(f"macro F1      {metrics.macro_f1:.4f}")
    say(f"calibration   {metrics.calibration_error:.4f}   (expected error of the probabilities)")
    say(f"loss          {result.loss:.4f}")
    say("")
    for line in _table([row for row in metrics.per_class if row.images or row.predicted]):
        say(line)
    if result.most_confused:
        say("")
        say("most confused (actual → predicted)")
        for actual, predicted, count in result.most_confused[:PAIRS]:
            say(f"  {count:5,}  {printable(actual)} → {printable(predicted)}")
        if len(result.most_confused) > PAIRS:
            say(f"         … and {len(result.most_confused) - PAIRS:,} more pairs")
    say("")
    say(f"written   {result.folder}")
    say("          " + ", ".join(sorted(p.name for p in result.folder.iterdir() if not p.name.startswith("."))))


def _table(rows: list[ClassMetrics]) -> Generator[str]:
    """Precision and recall of each class, in words."""
    shown = rows if len(rows) <= LISTED else sorted(rows, key=lambda row: row.recall)[:LISTED]
    width = max(5, *(len(printable(row.name)) for row in shown))
    yield f"{'class':{width}}  {'images':>7}  {'precision':>9}  {'recall':>6}"
    for row in shown:
        # Of nothing there is no share.
        precision = f"{row.precision:.3f}" if row.predicted else "–"
        recall = f"{row.recall:.3f}" if row.images else "–"
        yield f"{printable(row.name):{width}}  {row.images:7,}  {precision:>9}  {recall:>6}"
    if len(shown) < len(rows):
        yield f"… and {len(rows) - len(shown):,} classes that are found more often; evaluation.json has all"
