"""Images that are there more than once: the same bytes, or nearly the same picture.

An image that stands in training and in validation, "leakage", makes the measured error smaller than it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from pipelines.errors import UserError
from pipelines.firewall import READERS, Progress

DISTANCE = 4  # bits of 64 in which the perceptual hashes of near-duplicates may differ
_SHOWN = 5  # pairs that are named
_BLOCK = 2_048  # hashes compared at a time
_SKETCH = 128  # pixels: a JPEG may be decoded at an eighth of its size, down to this; the hash takes 32
_WINDOW = 256  # files between two reports of progress


def identical(hashes_N16: np.ndarray) -> list[np.ndarray]:
    """Groups of two or more rows with the same hash, ascending int64 arrays in the order of their first rows."""
    keys_N = np.ascontiguousarray(hashes_N16).view("V16").ravel()
    order_N = np.argsort(keys_N, kind="stable")
    new_N = keys_N[order_N][1:] != keys_N[order_N][:-1]
    groups = np.split(order_N, np.flatnonzero(new_N) + 1)
    return sorted((group for group in groups if len(group) > 1), key=lambda group: int(group[0]))


def leaks(groups: list[np.ndarray], valid_N: np.ndarray) -> np.ndarray:
    """Each validation row that a training row equals, behind the first such row: int64 [pairs, 2]."""
    pairs = [
        (int(group[~valid_N[group]][0]), int(row))
        for group in groups
        if not valid_N[group].all()
        for row in group[valid_N[group]]
    ]
    return np.array(pairs, np.int64).reshape(-1, 2)


def near(hashes_N: np.ndarray, distance: int = DISTANCE) -> np.ndarray:
    """Pairs of rows whose 64-bit hashes differ in at most `distance` bits, int64 [pairs, 2], the lower row first.

    Two hashes that differ in at most d bits agree in one of d + 1 parts, so only rows that share a part are
    compared: for 100,000 hashes about a thousandth of all pairs.
    """
    edges = np.linspace(0, 64, distance + 2).round().astype(np.uint64)
    found = [np.zeros((0, 2), np.int64)]
    for low, high in pairwise(edges):
        part_N = hashes_N >> low & np.uint64(2 ** int(high - low) - 1)
        order_N = np.argsort(part_N, kind="stable")
        starts = np.flatnonzero(part_N[order_N][1:] != part_N[order_N][:-1]) + 1
        for rows in np.split(order_N, starts):
            found += _close(hashes_N, rows, distance) if len(rows) > 1 else ()
    return np.unique(np.concatenate(found), axis=0)


def _close(hashes_N: np.ndarray, rows: np.ndarray, distance: int) -> Iterator[np.ndarray]:
    """Pairs among `rows`, ascending, by blocks: as many may share a part as there are."""
    for at in range(0, len(rows), _BLOCK):
        for to in range(at, len(rows), _BLOCK):
            left, right = rows[at : at + _BLOCK], rows[to : to + _BLOCK]
            differing = np.bitwise_count(hashes_N[left][:, None] ^ hashes_N[right])
            first, second = np.nonzero(differing <= distance)
            pairs = np.stack([left[first], right[second]], 1)
            yield pairs[pairs[:, 0] < pairs[:, 1]]


def hasher() -> Callable[[Image.Image], Any]:
    """imagehash's pHash.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from imagehash import phash
    except ImportError:
        raise UserError(
            "Near-duplicates are found with the package imagehash, which is not installed. "
            "Install it with: pip install 'onewarp[near-duplicates]'"
        ) from None
    return phash


def perceptual(
    files: Sequence[str], formats: Sequence[str], *, threads: int = 2, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The pHash of each image as displayed, by the package imagehash (DCT of 32 x 32 pixels of grey).

    Args:
        files: absolute paths of images that the firewall passed, of `formats`.
        progress: called with (files hashed, files in all) now and then.

    Returns:
        hashes uint64 [M], and the positions int64 [M] of their files: one that Pillow cannot read has none.

    Raises:
        UserError: see `hasher`.
    """
    phash = hasher()
    hashes: list[int | None] = []
    with ThreadPoolExecutor(threads) as pool:
        for at in range(0, len(files), _WINDOW):
            window = slice(at, at + _WINDOW)
            hashes += pool.map(lambda file, form: _perceptual(file, form, phash), files[window], formats[window])
            if progress is not None:
                progress(len(hashes), len(files))
    rows = np.array([row for row, one in enumerate(hashes) if one is not None], np.int64)
    return np.array([one for one in hashes if one is not None], np.uint64), rows


def _perceptual(file: str, form: str, phash: Callable[[Image.Image], Any]) -> int | None:
    try:
        with open(file, "rb") as stream:
            image: Image.Image = READERS[form](stream)
            image.draft("L", (_SKETCH, _SKETCH))
            if image.mode.startswith("I"):  # sixteen bits, which Pillow would clip at 255
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            hash_88 = np.asarray(phash(ImageOps.exif_transpose(image)).hash)
    except Exception:  # whatever Pillow raises where DALI found nothing wrong
        return None
    return int.from_bytes(np.packbits(hash_88).tobytes())


def listed(pairs_P2: np.ndarray, paths: Sequence[str], sign: str) -> str:
    """The first pairs by name, as "'a' = 'b', 'c' = 'd', …"."""
    shown = ", ".join(f"{paths[i]!r} {sign} {paths[j]!r}" for i, j in pairs_P2[:_SHOWN])
    return shown + (", …" if len(pairs_P2) > _SHOWN else "")
