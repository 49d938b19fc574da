"""From random numbers to one homography for each image.

Pixel convention (the only one, everywhere): coordinates are continuous, pixel (i, j) covers
[j, j+1] x [i, i+1] and its centre lies at (j + 0.5, i + 0.5). DALI calls this `pixel_origin="corner"`;
OpenCV puts centres at integers, torch's `grid_sample(align_corners=False)` agrees with us up to scale.

    source_from_output = S @ A @ D        float64 [N, 3, 3], acting on column vectors (x, y, 1)

`D` takes an output pixel to the unit square [-1, 1]^2, `A` is the augmentation inside that square and
`S` places the square in the decoded image (side = the shorter side). Only `S` knows the image's size.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import reduce

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What training does to an image; the defaults are those of fastai's `aug_transforms(min_scale=0.75)`."""

    flip: float = 0.5
    """Probability of a horizontal flip."""
    max_rotate: float = 10.0
    """Largest rotation either way, degrees."""
    max_zoom: float = 1.1
    """Largest magnification; the smallest is 1."""
    max_warp: float = 0.2
    """Largest perspective tilt along each axis, as a share of half the square's side."""
    min_scale: float = 0.75
    """Smallest area of the random crop, as a share of the square."""
    max_lighting: float = 0.2
    """Strength of brightness and contrast changes, 0 to below 1."""
    p_affine: float = 0.75
    """Probability of each of rotation, zoom and perspective."""
    p_lighting: float = 0.75
    """Probability of each of brightness and contrast."""

    def __post_init__(self) -> None:
        limits = {
            "flip": (0, 1),
            "max_rotate": (0, 180),
            "max_zoom": (1, 10),
            "max_warp": (0, 0.9),
            "min_scale": (0.01, 1),
            "max_lighting": (0, 0.9),
            "p_affine": (0, 1),
            "p_lighting": (0, 1),
        }
        for field in fields(self):
            value, (low, high) = getattr(self, field.name), limits[field.name]
            if not low <= value <= high:
                raise ValueError(f"Augment.{field.name} is {value}; it must lie between {low} and {high}")


UNIFORMS = 20  # how many uniform numbers `draw` reads for a sample


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random parameters of N samples; every field is a float64 array [N]."""

    place_x_N: np.ndarray
    """Where the square lies along the image's width, -1 (left) to 1 (right)."""
    place_y_N: np.ndarray
    """The same along the height."""
    crop_side_N: np.ndarray
    """Side of the random crop, as a share of the square's side."""
    crop_x_N: np.ndarray
    """Where the crop lies in the square, -1 to 1."""
    crop_y_N: np.ndarray
    flip_N: np.ndarray
    """-1 where the image is mirrored, else 1."""
    angle_N: np.ndarray
    """Rotation, radians."""
    zoom_N: np.ndarray
    """Magnification."""
    zoom_x_N: np.ndarray
    """Where the zoom aims, -1 to 1."""
    zoom_y_N: np.ndarray
    warp_x_N: np.ndarray
    """Perspective tilt, as a share of half the side."""
    warp_y_N: np.ndarray
    brightness_N: np.ndarray
    """Added to values in [0, 1]."""
    contrast_N: np.ndarray
    """Multiplies the distance from middle grey."""


def draw(augment: Augment | None, uniforms_NK: np.ndarray) -> Draws:
    """Turn uniform numbers [N, UNIFORMS] into the parameters of N samples; `None` is the centred square, unchanged."""
    n = len(uniforms_NK)
    if augment is None:
        zero_N, one_N = np.zeros(n), np.ones(n)
        return Draws(
            place_x_N=zero_N,
            place_y_N=zero_N,
            crop_side_N=one_N,
            crop_x_N=zero_N,
            crop_y_N=zero_N,
            flip_N=one_N,
            angle_N=zero_N,
            zoom_N=one_N,
            zoom_x_N=zero_N,
            zoom_y_N=zero_N,
            warp_x_N=zero_N,
            warp_y_N=zero_N,
            brightness_N=zero_N,
            contrast_N=one_N,
        )
    u = uniforms_NK.T
    both_ways = 2.0 * u - 1.0

    def sometimes(gate: np.ndarray, p: float, value: np.ndarray, neutral: float) -> np.ndarray:
        return np.where(gate < p, value, neutral)

    # fastai shifts brightness in logit space; at middle grey that is a shift of half of max_lighting.
    log_contrast = -np.log1p(-augment.max_lighting)
    return Draws(
        place_x_N=both_ways[0],
        place_y_N=both_ways[1],
        crop_side_N=np.sqrt(augment.min_scale + (1.0 - augment.min_scale) * u[2]),
        crop_x_N=both_ways[3],
        crop_y_N=both_ways[4],
        flip_N=np.where(u[5] < augment.flip, -1.0, 1.0),
        angle_N=sometimes(u[6], augment.p_affine, np.radians(augment.max_rotate) * both_ways[7], 0.0),
        zoom_N=sometimes(u[8], augment.p_affine, 1.0 + (augment.max_zoom - 1.0) * u[9], 1.0),
        zoom_x_N=both_ways[10],
        zoom_y_N=both_ways[11],
        warp_x_N=sometimes(u[12], augment.p_affine, augment.max_warp * both_ways[13], 0.0),
        warp_y_N=sometimes(u[14], augment.p_affine, augment.max_warp * both_ways[15], 0.0),
        brightness_N=sometimes(u[16], augment.p_lighting, 0.5 * augment.max_lighting * both_ways[17], 0.0),
        contrast_N=sometimes(u[18], augment.p_lighting, np.exp(log_contrast * both_ways[19]), 1.0),
    )


def _matrix(rows: list[list[np.ndarray | float]], n: int) -> np.ndarray:
    matrix_N33 = np.empty((n, 3, 3))
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            matrix_N33[:, i, j] = value
    return matrix_N33


def perspective(warp_x_N: np.ndarray, warp_y_N: np.ndarray) -> np.ndarray:
    """The homography that tilts the square [-1, 1]^2 as fastai's `warp` does, [N, 3, 3].

    The corners (-1,-1), (-1,1), (1,-1), (1,1) go to (-1-y,-1-x), (-1+y,1+x), (1+y,-1+x), (1-y,1-x); the map
    of a square onto a quadrilateral has a closed form (Heckbert, "Fundamentals of texture mapping", 1989, 2.2.3).
    """
    x, y, n = warp_x_N, warp_y_N, len(warp_x_N)
    # Corners in Heckbert's order, for (u, v) in [0, 1]^2: (0,0), (1,0), (1,1), (0,1).
    x0, y0 = -1 - y, -1 - x
    x1, y1 = 1 + y, -1 + x
    x2, y2 = 1 - y, 1 - x
    x3, y3 = -1 + y, 1 + x
    dx1, dy1, dx2, dy2 = x1 - x2, y1 - y2, x3 - x2, y3 - y2
    sx, sy = x0 - x1 + x2 - x3, y0 - y1 + y2 - y3
    determinant = dx1 * dy2 - dx2 * dy1
    g = (sx * dy2 - dx2 * sy) / determinant
    h = (dx1 * sy - sx * dy1) / determinant
    quad_from_unit = _matrix(
        [[x1 - x0 + g * x1, x3 - x0 + h * x3, x0], [y1 - y0 + g * y1, y3 - y0 + h * y3, y0], [g, h, 1.0]], n
    )
    unit_from_square = np.array([[0.5, 0.0, 0.5], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
    matrix_N33 = quad_from_unit @ unit_from_square
    return matrix_N33 / matrix_N33[:, 2:, 2:]


def transforms(draws: Draws) -> dict[str, np.ndarray]:
    """The single transforms inside the square by name, each [N, 3, 3], in the order in which a picture meets them."""
    n = len(draws.zoom_N)
    side = draws.crop_side_N
    crop = _matrix([[side, 0, draws.crop_x_N * (1 - side)], [0, side, draws.crop_y_N * (1 - side)], [0, 0, 1]], n)
    flip = _matrix([[draws.flip_N, 0, 0], [0, 1, 0], [0, 0, 1]], n)
    shrink = 1.0 / draws.zoom_N
    zoom = _matrix(
        [[shrink, 0, draws.zoom_x_N * (1 - shrink)], [0, shrink, draws.zoom_y_N * (1 - shrink)], [0, 0, 1]], n
    )
    cos, sin = np.cos(draws.angle_N), np.sin(draws.angle_N)
    rotate = _matrix([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], n)
    tilt = perspective(draws.warp_x_N, draws.warp_y_N)
    return {"perspective": tilt, "rotate": rotate, "zoom": zoom, "flip": flip, "crop": crop}


def augmentation(draws: Draws) -> np.ndarray:
    """`A`: where in the square each point of the output square is read, [N, 3, 3].

    Read right to left: the crop (last thing to happen to the picture, first to the coordinate), flip, zoom,
    rotation, perspective.
    """
    return reduce(np.matmul, transforms(draws).values())


def stepwise(draws: Draws, size: int) -> dict[str, np.ndarray]:
    """The same transforms as a chain of warps from `size` pixels to `size` pixels, by name, each [N, 3, 3].

    What libraries do that interpolate once for each transform: the square is resized to the output size first, and each
    of these is applied to the picture that the one before it left. Multiplied in this order behind `S @ D` they give
    `compose`, up to rounding.
    """
    down = square_from_output(size)
    return {name: np.linalg.inv(down) @ matrix_N33 @ down for name, matrix_N33 in transforms(draws).items()}


def placement(draws: Draws, heights_N: np.ndarray, widths_N: np.ndarray) -> np.ndarray:
    """`S`: the square [-1, 1]^2 in pixels of the decoded image, [N, 3, 3]; its side is the image's shorter side."""
    side = np.minimum(heights_N, widths_N).astype(np.float64)
    centre_x = widths_N / 2.0 + draws.place_x_N * (widths_N - side) / 2.0
    centre_y = heights_N / 2.0 + draws.place_y_N * (heights_N - side) / 2.0
    return _matrix([[side / 2, 0, centre_x], [0, side / 2, centre_y], [0, 0, 1]], len(side))


def square_from_output(size: int) -> np.ndarray:
    """`D`: an output pixel position, 0..size, in the square [-1, 1]^2; [3, 3]."""
    return np.array([[2.0 / size, 0, -1.0], [0, 2.0 / size, -1.0], [0, 0, 1.0]])


def decimation(source_from_output_N33: np.ndarray, size: int) -> np.ndarray:
    """By how much an image is shrunk, whole pixels into one, before the warp reads it; int64 [N], 1 means not at all.

    Bilinear interpolation looks at four pixels: read further apart than two pixels, it skips some, and fine patterns
    alias. The distance is the geometric mean of the singular values of the map's Jacobian at the image centre.
    """
    m = source_from_output_N33
    centre = np.array([size / 2, size / 2, 1.0])
    x_N, y_N, w_N = np.moveaxis(m @ centre, -1, 0)
    jacobian_N22 = (m[:, :2, :2] * w_N[:, None, None] - np.stack([x_N, y_N], 1)[:, :, None] * m[:, 2:, :2]) / (
        w_N[:, None, None] ** 2
    )
    distance_N = np.sqrt(np.abs(np.linalg.det(jacobian_N22)))
    return np.where(distance_N > 2.0, distance_N, 1.0).astype(np.int64)


def shrink(source_from_output_N33: np.ndarray, scale_x_N: np.ndarray, scale_y_N: np.ndarray) -> np.ndarray:
    """The same map into an image whose width and height were multiplied by the scales."""
    n = len(scale_x_N)
    return _matrix([[scale_x_N, 0, 0], [0, scale_y_N, 0], [0, 0, 1]], n) @ source_from_output_N33


def compose(draws: Draws, heights_N: np.ndarray, widths_N: np.ndarray, size: int) -> np.ndarray:
    """`source_from_output`, [N, 3, 3]: where in the decoded image each output pixel is read, once."""
    return placement(draws, heights_N, widths_N) @ augmentation(draws) @ square_from_output(size)
