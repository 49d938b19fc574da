"""How speed falls with the size of the files: the same photographs at 0.1 to 12 megapixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pipelines import Samples, scan

MEGAPIXELS = (0.1, 0.2, 1.0, 4.0, 12.0)
_QUALITY = 90


def at(megapixels: float, samples: Samples, count: int, folder: Path) -> Samples:
    """The first `count` of the samples as JPEGs of so many pixels, written to `folder`; two classes, as scans want."""
    for i, path in enumerate(samples.paths[:count]):
        with Image.open(Path(samples.root, path)) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
        factor = (1e6 * megapixels / (image.width * image.height)) ** 0.5
        size = (max(2, round(image.width * factor)), max(2, round(image.height * factor)))
        file = folder / f"{megapixels:g}" / str(i % 2) / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.resize(size, Image.Resampling.BICUBIC).save(file, quality=_QUALITY)
    found = scan(folder / f"{megapixels:g}", valid_fraction=1 / count).samples
    return found.subset(np.arange(len(found)))


def slope(megapixels: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """Core-milliseconds an image, and those for each megapixel: the straight line through the points, by least squares
    of the relative errors.
    """
    weights = 1 / np.array(costs)
    columns = np.stack([np.ones(len(costs)), np.array(megapixels)], axis=1) * weights[:, None]
    (fixed, each), *_ = np.linalg.lstsq(columns, np.ones(len(costs)), rcond=None)
    return float(fixed), float(each)
