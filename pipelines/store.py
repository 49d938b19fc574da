"""A store: the images of a data set in a few large files that are mapped into memory, read by row number.

    manifest.parquet   labels, split, and the sizes of what is stored (`Manifest.write`)
    index.npy          int64 [N, 5], a row for each image: shard, offset, bytes, height, width
    shard-00000.bin …  the images one after another, each from a multiple of 64 bytes on
    store.json         what the store is, with the checksum of its index; written last

It holds the bytes of image files ("encoded") or decoded pixels ("decoded": uint8 RGB, height x width x 3, as
displayed, what `decode.decoded` gives). The manifest's row numbers, a sample's `ids_N`, are the rows of the store.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipelines.errors import UserError, first_line
from pipelines.manifest import Manifest

Kind = Literal["encoded", "decoded"]

ALIGNMENT = 64  # bytes: a cache line, and whatever vector instructions may want
MANIFEST, INDEX, META = "manifest.parquet", "index.npy", "store.json"

_FORMAT, _VERSION = "onewarp store", 1


class Store:
    """The images of a store, as views into its files; open one with `Store.open`.

    Any number of threads and of forked or spawned processes may read it, each image once in the memory of a
    machine: the operating system's page cache holds it for all of them.
    """

    def __init__(self, folder: Path, meta: dict[str, Any], index_N5: np.ndarray, shards: list[np.ndarray]) -> None:
        self.folder = folder
        self.kind: Kind = meta["kind"]
        self.recipe: dict[str, Any] = meta["recipe"]
        """What was made of the files; see `pack`."""
        self.source: str = meta["source"]
        """Digest of the manifest that was packed."""
        self.digest: str = meta["digest"]
        """Changes with anything but the bytes inside of the shards, of which it knows the number alone."""
        self.bytes: int = sum(meta["shards"])
        """Of all shards together."""
        self._index_N5, self._shards = index_N5, shards

    @staticmethod
    def open(folder: str | os.PathLike[str]) -> Store:
        """Map a store into memory; no image is read.

        Raises:
            UserError: the folder holds no store, or one that is unfinished, cut short, altered or of another version.
        """
        path = Path(os.path.abspath(folder))
        meta = _read_meta(path)
        shards = [
            mapped(_checked(path, shard_name(number), "bytes", length)) for number, length in enumerate(meta["shards"])
        ]
        index = _checked(path, INDEX, "checksum", meta["index"])
        return Store(path, meta, np.asarray(np.load(index, mmap_mode="r")), shards)

    def __len__(self) -> int:
        return len(self._index_N5)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store.open, (self.folder,)  # another process maps the files for itself

    @cached_property
    def manifest(self) -> Manifest:
        """Labels, split and sizes of the rows; `store` is this folder, wherever it has been moved to.

        Raises:
            UserError: the manifest in the folder is damaged or of another store.
        """
        manifest = Manifest.read(self.folder / MANIFEST)
        if manifest.digest != self.digest or len(manifest.paths) != len(self):
            raise UserError(_damaged(self.folder, f"{MANIFEST} is that of another store"))
        return replace(manifest, store=self.folder)

    def pixels(self, row: int) -> np.ndarray:
        """The image of a decoded store, uint8 [H, W, 3], a read-only view that keeps its file mapped."""
        if self.kind != "decoded":
            raise ValueError(f"{self.folder} holds encoded images, not pixels")
        shard, offset, length, height, width = self._index_N5[row].tolist()
        return self._shards[shard][offset : offset + length].reshape(height, width, 3)

    def encoded(self, row: int) -> np.ndarray:
        """The file of an encoded store, uint8 [bytes], a read-only view that keeps its shard mapped."""
        if self.kind != "encoded":
            raise ValueError(f"{self.folder} holds pixels, not encoded images")
        shard, offset, length, _, _ = self._index_N5[row].tolist()
        return self._shards[shard][offset : offset + length]


def is_store(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a store or what is left of one, which `Store.open` then refuses with the reason."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in (META, shard_name(0)))


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:05d}.bin"


def aligned(length: Any) -> Any:
    """`length`, an integer or an array of them, rounded up to a multiple of `ALIGNMENT`."""
    return -(-length // ALIGNMENT) * ALIGNMENT


def mapped(file: Path) -> np.ndarray:
    """The bytes of a file, uint8 [bytes], read-only, loaded as they are looked at."""
    with open(file, "rb") as stream:
        return np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def rows_digest(manifest: Manifest) -> str:
    """Changes with anything that changes which image a row number of the manifest means, or its pixels."""
    return hashlib.sha256(repr((str(manifest.root), manifest.digest, manifest.paths)).encode()).hexdigest()


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write the file that makes a folder a store."""
    with open(folder / META, "w", encoding="utf-8") as stream:
        json.dump(meta, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())


def new_meta(
    folder: Path, *, kind: Kind, recipe: dict[str, Any], source: str, rows: int, shards: list[int]
) -> dict[str, Any]:
    """The contents of `store.json` for a folder that has its index; `shards` are the lengths of its shards, bytes."""
    meta = {
        "format": _FORMAT,
        "version": _VERSION,
        "kind": kind,
        "recipe": recipe,
        "source": source,
        "rows": rows,
        "shards": shards,
        "index": _checksum(folder / INDEX),
    }
    return meta | {"digest": _digest(meta)}


def _read_meta(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"The store {str(folder)!r} does not exist. Write one with: onewarp pack DIR {folder.name}")
    try:
        meta = json.loads((folder / META).read_bytes())
        good = meta.pop("digest") == _digest(meta) and meta["format"] == _FORMAT
        version = meta["version"]
    except FileNotFoundError:
        if is_store(folder):
            raise UserError(
                f"The store {str(folder)!r} cannot be used: {META}, which is written last, is missing. Copy it again, "
                "whole, or pack the images to another folder."
            ) from None
        raise UserError(
            f"{str(folder)!r} is no store: there is no {META} in it. Give a folder that onewarp pack wrote."
        ) from None
    except OSError as error:
        raise UserError(f"The store {str(folder)!r} cannot be read: {first_line(error)}. Make it readable.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        good, version = False, None
    if not good:
        raise UserError(_damaged(folder, f"{META} was altered, or is not onewarp's"))
    if version != _VERSION:
        raise UserError(
            f"The store {str(folder)!r} is of version {version}, and this program reads version {_VERSION}. Pack the "
            "images again."
        )
    return meta | {"digest": _digest(meta)}


def _digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _checksum(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _checked(folder: Path, name: str, what: Literal["bytes", "checksum"], expected: int | str) -> Path:
    """The path of a file of the store that is what `store.json` says."""
    try:
        found = os.stat(folder / name).st_size if what == "bytes" else _checksum(folder / name)
    except FileNotFoundError:
        raise UserError(_damaged(folder, f"{name} is missing")) from None
    except OSError as error:
        raise UserError(f"The store {str(folder)!r} cannot be read: {first_line(error)}. Make it readable.") from None
    if found != expected:
        told = (
            f"has {found:,} bytes instead of {expected:,}" if what == "bytes" else "was altered: its checksum differs"
        )
        raise UserError(_damaged(folder, f"{name} {told}"))
    return folder / name


def _damaged(folder: Path, why: str) -> str:
    return (
        f"The store {str(folder)!r} cannot be used: {why}. If it is a copy, copy it again, whole; otherwise delete it "
        "and pack the images again."
    )
