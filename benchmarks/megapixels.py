"""How speed falls with the size of the files: pictures of 0.1 to 12 megapixels, as rich in detail as each other.

None is enlarged: what interpolation makes up takes few bits, and decodes too fast. Larger ones are laid out of several
photographs, side by side; smaller ones are shrunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pipelines import Samples, scan

MEGAPIXELS = (0.1, 0.2, 1.0, 4.0, 12.0)
_QUALITY = 90
_CELLS = 60  # photographs of which one mosaic is laid out, at most


def shape(megapixels: float) -> tuple[int, int]:
    """Height and width of a picture of so many pixels, 4:3."""
    height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
    return height, round(height * 4 / 3)


def at(megapixels: float, samples: Samples, count: int, folder: Path) -> Samples:
    """`count` JPEGs of so many pixels, 4:3, made of the samples and written to `folder`; two classes, as scans want."""
    height, width = shape(megapixels)
    paths = [Path(samples.root, path) for path in samples.paths]
    for i in range(count):
        turned = paths[i:] + paths[:i]
        file = folder / f"{megapixels:g}" / str(i % 2) / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(_detailed(turned, height, width)).save(file, quality=_QUALITY)
    found = scan(folder / f"{megapixels:g}", valid_fraction=1 / count).samples
    return found.subset(np.arange(len(found)))


def _detailed(paths: list[Path], height: int, width: int) -> np.ndarray:
    """The first photograph, if it is large enough to be shrunk to the size, else a mosaic; uint8 [height, width, 3]."""
    with Image.open(paths[0]) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    if image.height >= height and image.width >= width:
        return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))
    return mosaic(paths[:_CELLS], height, width)


def mosaic(paths: list[Path], height: int, width: int) -> np.ndarray:
    """Photographs side by side at their own scale, uint8 [height, width, 3]; each fills one cell, cut to its size."""
    photographs = []
    for path in paths:
        with Image.open(path) as image:
            photographs.append(np.asarray(image.convert("RGB")))
    rows = min(len(photograph) for photograph in photographs)
    columns = min(photograph.shape[1] for photograph in photographs)
    picture_HWC = np.empty((height, width, 3), np.uint8)
    number = 0
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            cell_HWC = picture_HWC[top : top + rows, left : left + columns]
            cell_HWC[:] = photographs[number % len(photographs)][: cell_HWC.shape[0], : cell_HWC.shape[1]]
            number += 1
    return picture_HWC


def slope(megapixels: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """Core-milliseconds an image, and those for each megapixel: the straight line through the points, by least squares
    of the relative errors.
    """
    weights = 1 / np.array(costs)
    columns = np.stack([np.ones(len(costs)), np.array(megapixels)], axis=1) * weights[:, None]
    (fixed, each), *_ = np.linalg.lstsq(columns, np.ones(len(costs)), rcond=None)
    return float(fixed), float(each)
