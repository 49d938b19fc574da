"""An image file as a trained model expects it, read with Pillow and NumPy and nothing else.

This one file goes with every exported model, so that whoever serves it need neither guess nor install more:

    import json, numpy as np
    from preprocess import read

    contract = json.load(open("contract.json"))
    images_NCHW = np.stack([read(path, contract["preprocessing"]) for path in paths])

What it does is what validation did in training: upright, RGB, a square from the middle, bilinear at `size` x `size`
points, normalised. Where the points would lie more than two pixels apart the image is first shrunk, antialiased by a
triangle, until they lie two apart. Coordinates are continuous: pixel (i, j) covers [j, j + 1] x [i, i + 1].
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "TIFF"]  # what training reads
BILINEAR = Image.Resampling.BILINEAR


def read(file: str | os.PathLike[str] | IO[bytes], preprocessing: Mapping[str, Any]) -> np.ndarray:
    """The image in `file` as the model's input, float32 [3, size, size].

    Args:
        file: a path, or an open file.
        preprocessing: that part of the contract.

    Raises:
        OSError: no image that Pillow can read.
    """
    return normalised(sampled(upright(file), preprocessing), preprocessing)


def upright(file: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """RGB as it is to be looked at: the EXIF orientation applied, transparency dropped, 16 bits made 8."""
    try:
        with Image.open(file, formats=FORMATS) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits of grey, of which Pillow would keep the lower eight
                grey_HW = np.asarray(image).astype(np.float64)
                image = Image.fromarray((grey_HW / 257).round().clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow says of some damaged files
        raise OSError(str(error)) from None


def shrunk_size(height: int, width: int, step: float) -> tuple[int, int]:
    """Height and width that bring points `step` pixels apart to two pixels apart; as they are, where it is less."""
    factor = min(1.0, 2.0 / step)
    return max(1, round(height * factor)), max(1, round(width * factor))


def centres(length: int, shrunk: int, side: float, points: int) -> np.ndarray:
    """Where along an axis the points of a centred square are read, from its first pixel's centre, float64 [points].

    Args:
        length: of the image along the axis, pixels.
        shrunk: the same once it is shrunk.
        side: of the square in the image, pixels.
    """
    position_P = (length - side) / 2 + (np.arange(points) + 0.5) * side / points
    return position_P * (shrunk / length) - 0.5


def points_of(preprocessing: Mapping[str, Any]) -> int:
    """How many points are read along each axis: one a pixel, or two where quality is high."""
    return preprocessing["size"] * (2 if preprocessing["quality"] == "high" else 1)


def sampled(image: Image.Image, preprocessing: Mapping[str, Any]) -> np.ndarray:
    """The centred square at size x size points, float32 [size, size, 3], 0 to 255."""
    points = points_of(preprocessing)
    width, height = image.size
    side = preprocessing["crop_pct"] * min(height, width)
    shrunk_height, shrunk_width = shrunk_size(height, width, side / points)
    if (shrunk_height, shrunk_width) != (height, width):
        pixels_HWC = _shrunk(image, shrunk_height, shrunk_width)
    else:
        pixels_HWC = np.asarray(image)
    rows_PWC = _along(pixels_HWC, 0, centres(height, shrunk_height, side, points))
    return averaged(_along(rows_PWC, 1, centres(width, shrunk_width, side, points)), preprocessing["size"])


def averaged(square_PPC: np.ndarray, size: int) -> np.ndarray:
    """The mean of the points in each pixel, [size, size, 3]."""
    return square_PPC.reshape(size, len(square_PPC) // size, size, -1, 3).mean(axis=(1, 3))


def _shrunk(image: Image.Image, height: int, width: int) -> np.ndarray:
    """The image at this size, antialiased by a triangle, in whole levels; beyond its edge are its outermost pixels.

    Pillow's filter, but in floating point, as of bytes it rounds once for each axis; and on an image with a margin, as
    without one it leaves out what would lie beyond.
    """
    margin = 1 + max(image.height // height, image.width // width)
    box = (margin, margin, margin + image.width, margin + image.height)
    wide_HWC = np.pad(np.asarray(image, np.float32), ((margin, margin), (margin, margin), (0, 0)), "edge")
    bands = [Image.fromarray(wide_HWC[..., c]).resize((width, height), BILINEAR, box) for c in range(3)]
    return np.stack([np.asarray(band) for band in bands], axis=-1).round()


def normalised(square_SSC: np.ndarray, preprocessing: Mapping[str, Any]) -> np.ndarray:
    """(x / 255 - mean) / std of each channel, [3, size, size]."""
    mean_C, std_C = (np.array(preprocessing[name], np.float32) for name in ("mean", "std"))
    return np.ascontiguousarray(((square_SSC / 255 - mean_C) / std_C).transpose(2, 0, 1), np.float32)


def _along(pixels: np.ndarray, axis: int, position_P: np.ndarray) -> np.ndarray:
    """Linear interpolation along an axis; beyond the outermost pixel centres the image is its own mirror image."""
    last = pixels.shape[axis] - 1
    folded_P = np.abs((position_P + last) % max(2 * last, 1) - last)
    first_P = np.minimum(folded_P.astype(np.int64), max(last - 1, 0))
    weight_P = (folded_P - first_P).astype(np.float32)
    shape = [1] * pixels.ndim
    shape[axis] = -1
    before, after = (np.take(pixels, np.minimum(first_P + i, last), axis).astype(np.float32) for i in (0, 1))
    return before + (after - before) * weight_P.reshape(shape)
