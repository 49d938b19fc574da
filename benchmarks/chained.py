"""How interpolation adds up: the same transforms one by one, and as one warp.

Each transform in a chain is a rotation, a zoom and a tilt, drawn at random. The chain resizes the square first, then
reads each picture from the rounded one before it; the warp reads all of them from the decoded image at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from benchmarks import oracle
from pipelines.geometry import perspective, prefilter, square_from_output

MOST = 6
ANGLE, ZOOM, TILT = 10.0, 1.1, 0.1  # degrees, factor, share of half a side: each at most


def drawn(rng: np.random.Generator) -> np.ndarray:
    """One transform of the square [-1, 1]^2, [3, 3]: where each of its points is read."""
    angle, shrink = np.radians(rng.uniform(-ANGLE, ANGLE)), 1 / rng.uniform(1, ZOOM)
    cos, sin = shrink * np.cos(angle), shrink * np.sin(angle)
    tilts_2 = rng.uniform(-TILT, TILT, 2)
    (tilt_33,) = perspective(tilts_2[:1], tilts_2[1:])
    return tilt_33 @ np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])


def once(
    image_HWC: np.ndarray, matrix_33: np.ndarray, size: int, resample: Image.Resampling = Image.Resampling.BILINEAR
) -> np.ndarray:
    """One bilinear warp of an image that is shrunk before where ours would be, by one of Pillow's filters.

    uint8 [size, size, 3].
    """
    height, width = image_HWC.shape[:2]
    ((rows, columns),), (shrunk_33,) = prefilter(matrix_33[None], np.array([height]), np.array([width]), size)
    if rows > 0:  # else it is read as it was decoded
        image_HWC = np.asarray(Image.fromarray(image_HWC).resize((int(columns), int(rows)), resample))
    return oracle.warp(image_HWC, shrunk_33, size)


def measured(images: Sequence[np.ndarray], size: int, seed: int) -> Iterator[tuple[int, float, float]]:
    """(transforms, dB of one warp, dB of the chain) for each image and each length of the chain."""
    down_33 = square_from_output(size)
    for number, image_HWC in enumerate(images):
        rng = np.random.default_rng([seed, number])
        steps = [drawn(rng) for _ in range(MOST)]
        height, width = image_HWC.shape[:2]
        side = min(height, width)
        left, top = (width - side) / 2, (height - side) / 2
        source_33 = np.array([[side / 2, 0, left + side / 2], [0, side / 2, top + side / 2], [0, 0, 1]])
        box = (left, top, left + side, top + side)
        square = Image.fromarray(image_HWC).resize((size, size), Image.Resampling.BILINEAR, box=box)
        chained_HWC, all_33, maps = np.asarray(square), np.eye(3), []
        for count, step_33 in enumerate(steps, start=1):
            all_33 = all_33 @ step_33
            maps.append(np.linalg.inv(down_33) @ step_33 @ down_33)
            chained_HWC = oracle.warp(chained_HWC, maps[-1], size)
            matrix_33 = source_33 @ all_33 @ down_33
            ideal_HWC, _ = oracle.ideal(image_HWC, matrix_33, size)
            if np.ptp(ideal_HWC, axis=(0, 1)).max() < 1:  # one colour, which every way gets right
                continue
            # What a picture of the chain mirrors the warp still reads; neither is judged by that.
            fit_HW = ~oracle.around(oracle.padded(maps, [size] * count, [size] * count, size))
            pictures = (once(image_HWC, matrix_33, size), chained_HWC)
            ours, theirs = (oracle.psnr(picture, ideal_HWC, fit_HW) for picture in pictures)
            yield count, ours, theirs
