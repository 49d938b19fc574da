"""The table of what a model says of each image, as CSV or Parquet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch

from pipelines.errors import UserError, first_line
from trainer.apply_config import check_table
from trainer.run_folder import printable

BEST = 5


def best(probabilities_NC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The K = min(5, C) most probable classes, int64 [N, K], most probable first, and their probabilities, [N, K].

    Of equal probabilities the lower class comes first, on any device.
    """
    sorted_NC, order_NC = probabilities_NC.sort(dim=1, descending=True, stable=True)
    return order_NC[:, :BEST], sorted_NC[:, :BEST]


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
        predicted_N: classes by index, or `losses.NONE`; see `losses.decide`.
        best_NK, probabilities_NK: see `best`.
        labels_N: true classes, by index.

    Raises:
        UserError: the name ends in neither, or the file cannot be written.
    """
    check_table(path)
    names = np.array([*classes, None], dtype=object)  # at -1, `losses.NONE`, stands nothing
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
