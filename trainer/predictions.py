"""What a model says of each image of a folder: as arrays, as a table in CSV or Parquet, in a few words."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from rich.console import Console

from pipelines.errors import UserError, first_line
from pipelines.manifest import Quarantined
from trainer.apply_config import check_table
from trainer.run_folder import printable, write_quarantine

BEST = 5  # classes that are told of an image
NONE = -1
"""The class of an image that is none of the classes."""
NAMED = 5  # files left out that are named on the terminal
COUNTED = 20  # classes whose images are


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a model says of N images, in the order of their paths. K = min(5, C)."""

    paths: tuple[str, ...]
    """Relative to the folder."""
    classes: tuple[str, ...]
    """Of the model."""
    predicted_N: np.ndarray
    """The most probable class by index, int64; `NONE`, -1, where it does not reach the threshold."""
    best_NK: np.ndarray
    """The most probable classes, int64, most probable first."""
    probabilities_NK: np.ndarray
    """Their probabilities, float64."""
    left_out: tuple[Quarantined, ...]
    """Files that could not be read, and why."""
    threshold: float
    file: Path
    """The table."""

    @property
    def predicted(self) -> list[str | None]:
        """The classes by name."""
        return [None if label == NONE else self.classes[label] for label in self.predicted_N.tolist()]


def decide(best_NK: np.ndarray, probabilities_NK: np.ndarray, threshold: float = 0.0) -> np.ndarray:
    """The most probable class of each image, int64 [N]; `NONE` where not even that one reaches the threshold.

    After `losses.OneVsRest` 0.5 is the natural threshold: no class says yes. Over a softmax the largest probability is
    a common measure of doubt too, but an image of no class can still be a confident one of some class.
    """
    return np.where(probabilities_NK[:, 0] >= threshold, best_NK[:, 0], NONE)


def finished(
    file: Path,
    *,
    paths: tuple[str, ...],
    classes: tuple[str, ...],
    best_NK: np.ndarray,
    probabilities_NK: np.ndarray,
    threshold: float,
    left_out: tuple[Quarantined, ...],
) -> Predictions:
    """Decide, write the table `file`, and list what it lacks beside it.

    Raises:
        UserError: it cannot be written.
    """
    said: dict[str, Any] = {"paths": paths, "best_NK": best_NK, "probabilities_NK": probabilities_NK}
    said["predicted_N"] = decide(best_NK, probabilities_NK, threshold)
    write(file, **said, classes=classes)
    list_left_out(left_out_file(file), left_out)
    return Predictions(**said, classes=classes, left_out=left_out, threshold=threshold, file=file)


def write(
    path: Path,
    *,
    paths: Sequence[str],
    predicted_N: np.ndarray,
    best_NK: np.ndarray,
    probabilities_NK: np.ndarray,
    classes: Sequence[str],
    labels_N: np.ndarray | None = None,
) -> None:
    """Write the predictions of N images to `path`, .csv or .parquet; it appears when it is whole.

    The columns are `path`, `label` where labels are known, `predicted`, `probability`, then `top1`, `probability1`, …
    for each of the K best classes.
    Classes are told by name. `predicted` is empty where the image is none of the classes, `probability` is the best
    one's all the same.

    Args:
        paths: of the images; one that is no text is written escaped, in quotes.
        predicted_N: classes by index, or `NONE`; see `decide`.
        best_NK, probabilities_NK: see `Predictions`.
        labels_N: true classes, by index.

    Raises:
        UserError: the name ends in neither, or the file cannot be written.
    """
    check_table(path)
    names = np.array([*classes, None], dtype=object)  # at -1, `NONE`, stands nothing
    columns = {"path": pa.array([printable(name) for name in paths], pa.string())}
    if labels_N is not None:
        columns["label"] = pa.array(names[labels_N], pa.string())
    columns |= {
        "predicted": pa.array(names[predicted_N], pa.string()),
        "probability": pa.array(probabilities_NK[:, 0], pa.float32()),
    }
    for k in range(best_NK.shape[1]):
        columns[f"top{k + 1}"] = pa.array(names[best_NK[:, k]], pa.string())
        columns[f"probability{k + 1}"] = pa.array(probabilities_NK[:, k], pa.float32())
    table = pa.table(columns)
    partial = path.with_name(f".{path.name}.partial")
    try:
        if path.suffix == ".csv":
            pyarrow.csv.write_csv(table, partial)
        else:
            pyarrow.parquet.write_table(table, partial)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"The predictions cannot be written to {path} ({first_line(error)}). Choose another file, in a folder that "
            "is there and can be written to."
        ) from None


def left_out_file(table: Path) -> Path:
    """Where the files that a table lacks are listed."""
    return table.with_name(f"{table.stem}-quarantine.txt")


def list_left_out(path: Path, left_out: Sequence[Quarantined]) -> None:
    """List them, and their reasons; where there are none, there is no list, nor that of an earlier time."""
    if left_out:
        write_quarantine(path, left_out)
    else:
        path.unlink(missing_ok=True)


def tell_left_out(left_out: Sequence[Quarantined], listed: Path, console: Console) -> None:
    """Name the first files that were left out, and the list of all of them."""
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    for bad in left_out[:NAMED]:
        say(f"left out  {printable(bad.path)}: {bad.reason}")
    if left_out:
        say(f"left out  {len(left_out):,} files, all named in {listed}")


def summary(result: Predictions, console: Console) -> None:
    """The last words of `predict` on the terminal."""
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    tell_left_out(result.left_out, left_out_file(result.file), console)
    say(f"images    {len(result.paths):,}")
    counts = Counter(result.predicted)
    none = counts.pop(None, 0)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0] or ""))
    for name, count in ordered[:COUNTED]:
        say(f"  {count:8,}  {printable(name or '')}")
    if len(ordered) > COUNTED:
        rest = ordered[COUNTED:]
        say(f"  {sum(count for _, count in rest):8,}  of {len(rest):,} more classes")
    if result.threshold > 0:
        say(f"  {none:8,}  none of the classes: the best is less probable than {result.threshold:g}")
    say(f"table     {result.file}")
