"""The table of all usable images of a data set, with label, split and size, and of the unusable ones (Parquet)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import parquet
from pipelines.errors import UserError, first_line
from pipelines.labels import SplitFrom
from pipelines.plan import subset

_VERSION = 3  # of the Parquet layout


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """A file that is kept out of training."""

    path: str
    """Relative to the root; names that are not UTF-8 hold surrogate escapes."""
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """The images of one part of the split, as aligned arrays."""

    root: Path
    """Absolute."""
    classes: tuple[str, ...]
    """The name of each label."""
    paths: tuple[str, ...]
    """Relative to the root; names that are not UTF-8 hold surrogate escapes, as from `os.fsdecode`."""
    labels_N: np.ndarray
    """int64 index into `classes`; -1 where nothing says what the images show."""
    heights_N: np.ndarray
    """int32, pixels as displayed: the EXIF orientation is applied."""
    widths_N: np.ndarray
    """int32, likewise."""
    bytes_N: np.ndarray
    """int64, size of each file when it was scanned."""
    mtimes_N: np.ndarray
    """int64, time of its last modification then, ns."""
    ids_N: np.ndarray
    """int64 row number in the manifest: unique over training and validation."""
    store: Path | None = None
    """The store that holds the images under these ids; None where each is a file below `root`."""

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, index: np.ndarray | Sequence[int] | slice) -> Samples:
        """The samples at `index`, whatever indexes a NumPy array; classes, labels and ids stay the same."""
        return replace(
            self,
            paths=tuple(self.paths[i] for i in np.arange(len(self))[index]),
            labels_N=self.labels_N[index],
            heights_N=self.heights_N[index],
            widths_N=self.widths_N[index],
            bytes_N=self.bytes_N[index],
            mtimes_N=self.mtimes_N[index],
            ids_N=self.ids_N[index],
        )

    def share(self, fraction: float, seed: int = 0) -> Samples:
        """A share of each class, for quick tries; all samples for 1. See `plan.subset`."""
        return self if fraction == 1 else self.subset(subset(self.labels_N, fraction, seed))


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """All usable images of a folder, in the order of their paths, as aligned arrays."""

    root: Path
    """Absolute."""
    classes: tuple[str, ...]
    """Sorted."""
    paths: tuple[str, ...]
    """Relative to the root; see `Samples.paths`."""
    labels_N: np.ndarray
    """int64 index into `classes`."""
    valid_N: np.ndarray
    """bool: the image is for validation."""
    heights_N: np.ndarray
    """int32, pixels as displayed."""
    widths_N: np.ndarray
    """int32, pixels as displayed."""
    formats: tuple[str, ...]
    """By content: JPEG, PNG, WEBP, BMP or TIFF."""
    bytes_N: np.ndarray
    """int64, size of the file."""
    mtimes_N: np.ndarray
    """int64, time of the file's last modification, ns."""
    orientations_N: np.ndarray
    """uint8, EXIF orientation of the stored pixels, 1 to 8."""
    hashes_N16: np.ndarray
    """uint8, the first 16 bytes of the SHA-256 of each file."""
    quarantine: tuple[Quarantined, ...]
    """In the order of their paths."""
    notes: tuple[str, ...]
    """What the user should know, in words."""
    warnings: tuple[str, ...]
    """What makes a measured error untrue, in words: images that stand in training and in validation."""
    split_from: SplitFrom
    """Where the split into training and validation comes from."""
    table: Path | None
    """The table that the labels come from."""
    digest: str
    """Of what the files or the store were when this was written; see `scanning.is_current`."""
    store: Path | None = None
    """See `Samples.store`."""

    @cached_property
    def train(self) -> Samples:
        """What is learned from; not empty."""
        return self.samples.subset(np.flatnonzero(~self.valid_N))

    @cached_property
    def valid(self) -> Samples:
        """What is measured on; not empty."""
        return self.samples.subset(np.flatnonzero(self.valid_N))

    def part(self, rows_N: np.ndarray) -> Manifest:
        """The images of these rows alone, in this order; nothing is left out of it."""
        return replace(
            self,
            paths=tuple(self.paths[row] for row in rows_N),
            formats=tuple(self.formats[row] for row in rows_N),
            labels_N=self.labels_N[rows_N],
            valid_N=self.valid_N[rows_N],
            heights_N=self.heights_N[rows_N],
            widths_N=self.widths_N[rows_N],
            bytes_N=self.bytes_N[rows_N],
            mtimes_N=self.mtimes_N[rows_N],
            orientations_N=self.orientations_N[rows_N],
            hashes_N16=self.hashes_N16[rows_N],
            quarantine=(),
        )

    @cached_property
    def samples(self) -> Samples:
        """All of them."""
        return Samples(
            root=self.root,
            classes=self.classes,
            paths=self.paths,
            labels_N=self.labels_N,
            heights_N=self.heights_N,
            widths_N=self.widths_N,
            bytes_N=self.bytes_N,
            mtimes_N=self.mtimes_N,
            ids_N=np.arange(len(self.paths)),
            store=self.store,
        )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a Parquet file, whole or not at all: a reader never sees half of it.

        One row for each image (path as bytes, since names need not be UTF-8); the rest is JSON in the
        schema's metadata, under the key `onewarp`.
        """
        meta = {
            "version": _VERSION,
            "root": str(self.root),
            "classes": self.classes,
            "quarantine": [(bad.path, bad.reason) for bad in self.quarantine],
            "notes": self.notes,
            "warnings": self.warnings,
            "split_from": self.split_from,
            "table": self.table and str(self.table),
            "digest": self.digest,
            "store": self.store and str(self.store),
        }
        table = pa.table(
            {
                "path": pa.array([os.fsencode(name) for name in self.paths], pa.binary()),
                "label": pa.array(self.classes).take(pa.array(self.labels_N)),
                "split": pa.array(np.where(self.valid_N, "valid", "train")),
                "height": self.heights_N,
                "width": self.widths_N,
                "bytes": self.bytes_N,
                "mtime_ns": self.mtimes_N,
                "format": pa.array(self.formats),
                "orientation": self.orientations_N,
                "hash": pa.array([row.tobytes() for row in self.hashes_N16], pa.binary(16)),
            },
            metadata={"onewarp": json.dumps(meta)},
        )
        parquet.write(table, path)

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Manifest:
        """Read what `write` wrote.

        Raises:
            UserError: the file is missing, damaged, or no manifest of this version.
        """
        try:
            table = pq.read_table(path)
            meta = json.loads((table.schema.metadata or {})[b"onewarp"])
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            words = first_line(error)
            raise UserError(f"{os.fspath(path)!r} is no manifest: {words}. Scan the images again.") from None
        if meta["version"] != _VERSION:
            raise UserError(f"The manifest {os.fspath(path)!r} is of another version. Scan the images again.")
        label_of = {name: label for label, name in enumerate(meta["classes"])}
        return Manifest(
            root=Path(meta["root"]),
            classes=tuple(meta["classes"]),
            paths=tuple(os.fsdecode(name) for name in table["path"].to_pylist()),
            labels_N=np.array([label_of[name] for name in table["label"].to_pylist()], np.int64),
            valid_N=np.array(table["split"].to_pylist()) == "valid",
            heights_N=table["height"].to_numpy(),
            widths_N=table["width"].to_numpy(),
            formats=tuple(table["format"].to_pylist()),
            bytes_N=table["bytes"].to_numpy(),
            mtimes_N=table["mtime_ns"].to_numpy(),
            orientations_N=table["orientation"].to_numpy(),
            hashes_N16=rows16(table["hash"].to_pylist()),
            quarantine=tuple(Quarantined(path=name, reason=reason) for name, reason in meta["quarantine"]),
            notes=tuple(meta["notes"]),
            warnings=tuple(meta["warnings"]),
            split_from=meta["split_from"],
            table=meta["table"] and Path(meta["table"]),
            digest=meta["digest"],
            store=meta["store"] and Path(meta["store"]),
        )


def rows16(hashes: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16)
