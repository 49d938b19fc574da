"""From random numbers to one homography for each image.

Pixel convention (the only one, everywhere): coordinates are continuous, pixel (i, j) covers
[j, j+1] x [i, i+1] and its centre lies at (j + 0.5, i + 0.5). DALI calls this `pixel_origin="corner"`;
OpenCV puts centres at integers, torch's `grid_sample(align_corners=False)` agrees with us up to scale.

    source_from_output = S @ A @ D        float64 [N, 3, 3], acting on column vectors (x, y, 1)

`D` takes an output pixel to the unit square [-1, 1]^2, `A` is the augmentation inside that square and
`S` places the square in the decoded image (side = the shorter side; ImageNet's crop stretches it to a rectangle).
Only `S` knows the image's size.

Twice supersampled, `size` is twice the size everywhere here, and the mean of each 2 x 2 outputs is the pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Literal, get_args

import numpy as np

from pipelines.errors import UserError

Crop = Literal["square", "resized"]
Padding = Literal["reflect", "zeros", "border"]


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What training does to an image; the defaults are those of fastai's `aug_transforms(min_scale=0.75)`.

    Light differs from fastai's, which adds and multiplies in logit space: brightness is the same shift and contrast the
    same slope at middle grey, but both are linear, so that they cost one multiply-add.
    """

    flip: float = 0.5
    """Probability of a horizontal flip."""
    max_rotate: float = 10.0
    """Largest rotation either way, degrees."""
    min_zoom: float = 1.0
    """Smallest magnification; below 1 the picture shrinks, and what is round it is padding."""
    max_zoom: float = 1.1
    """Largest magnification."""
    max_warp: float = 0.2
    """Largest perspective tilt along each axis, as a share of half the square's side."""
    crop: Crop = "square"
    """"square": as large as the image allows, and a random square in it; "resized": ImageNet's random rectangle of the
    image, resized to a square."""
    min_scale: float = 0.75
    """Smallest area of the random crop, as a share of the square, or of the image where the crop is "resized"."""
    max_ratio: float = 4 / 3
    """Largest ratio of the sides of a "resized" crop, either way."""
    padding: Padding = "reflect"
    """What lies outside the image: its mirror image, black, or its outermost pixels."""
    max_lighting: float = 0.2
    """Strength of brightness and contrast changes, 0 to below 1."""
    p_affine: float = 0.75
    """Probability of each of rotation, zoom and perspective."""
    p_lighting: float = 0.75
    """Probability of each of brightness and contrast."""

    def __post_init__(self) -> None:
        choices = {"crop": get_args(Crop), "padding": get_args(Padding)}
        limits = {
            "flip": (0, 1),
            "max_rotate": (0, 180),
            "min_zoom": (0.1, 1),
            "max_zoom": (1, 10),
            "max_warp": (0, 0.9),
            "min_scale": (0.01, 1),
            "max_ratio": (1, 10),
            "max_lighting": (0, 0.9),
            "p_affine": (0, 1),
            "p_lighting": (0, 1),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"Augment.{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}")
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"Augment.{name} is {getattr(self, name)}; it must lie between {low} and {high}")

    @classmethod
    def imagenet(cls) -> Augment:
        """What most published models were trained with: torchvision's `RandomResizedCrop` and a flip."""
        return cls(crop="resized", min_scale=0.08, max_rotate=0, max_zoom=1, max_warp=0, max_lighting=0)


@dataclass(frozen=True, kw_only=True)
class Centre:
    """How validation reads an image: a centred square."""

    crop_pct: float = 1.0
    """Side of the square, as a share of the shorter side. Pretrained weights expect what they were measured with:
    224 pixels from the middle of a shorter side resized to 256 are 0.875."""

    def __post_init__(self) -> None:
        if not 0.01 <= self.crop_pct <= 1:
            raise UserError(f"Centre.crop_pct is {self.crop_pct}; it must lie between 0.01 and 1")


TRIES = 10  # rectangles that ImageNet's crop draws for a sample, the first that fits in the image being taken
UNIFORMS = 20 + 2 * TRIES  # how many uniform numbers `draw` reads for a sample; new ones come last


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


@dataclass(frozen=True, kw_only=True)
class ResizedDraws(Draws):
    """Those of the "resized" crop, which takes the place of the square and of the crop in it."""

    areas_NT: np.ndarray
    """Area of each rectangle tried, as a share of the image, float64 [N, TRIES]."""
    ratios_NT: np.ndarray
    """Its width by its height."""
    max_ratio: float
    """The limit of those ratios."""


def draw(augment: Augment | Centre | None, uniforms_NK: np.ndarray) -> Draws:
    """Turn uniform numbers [N, UNIFORMS] into the parameters of N samples; `None` is `Centre()`."""
    n = len(uniforms_NK)
    if not isinstance(augment, Augment):
        zero_N, one_N = np.zeros(n), np.ones(n)
        return Draws(
            place_x_N=zero_N,
            place_y_N=zero_N,
            crop_side_N=one_N if augment is None else one_N * augment.crop_pct,
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
    common = Draws(
        place_x_N=both_ways[0],
        place_y_N=both_ways[1],
        crop_side_N=np.sqrt(augment.min_scale + (1.0 - augment.min_scale) * u[2]),
        crop_x_N=both_ways[3],
        crop_y_N=both_ways[4],
        flip_N=np.where(u[5] < augment.flip, -1.0, 1.0),
        angle_N=sometimes(u[6], augment.p_affine, np.radians(augment.max_rotate) * both_ways[7], 0.0),
        zoom_N=sometimes(u[8], augment.p_affine, augment.min_zoom + (augment.max_zoom - augment.min_zoom) * u[9], 1.0),
        zoom_x_N=both_ways[10],
        zoom_y_N=both_ways[11],
        warp_x_N=sometimes(u[12], augment.p_affine, augment.max_warp * both_ways[13], 0.0),
        warp_y_N=sometimes(u[14], augment.p_affine, augment.max_warp * both_ways[15], 0.0),
        brightness_N=sometimes(u[16], augment.p_lighting, 0.5 * augment.max_lighting * both_ways[17], 0.0),
        contrast_N=sometimes(u[18], augment.p_lighting, np.exp(log_contrast * both_ways[19]), 1.0),
    )
    if augment.crop == "square":
        return common
    tries = slice(20, 20 + TRIES), slice(20 + TRIES, 20 + 2 * TRIES)
    return ResizedDraws(
        **{**vars(common), "crop_side_N": np.ones(n)},
        areas_NT=augment.min_scale + (1.0 - augment.min_scale) * u[tries[0]].T,
        ratios_NT=np.exp(np.log(augment.max_ratio) * both_ways[tries[1]].T),
        max_ratio=augment.max_ratio,
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
    """`S`: the square [-1, 1]^2 in pixels of the decoded image, [N, 3, 3]; its side is the image's shorter side.

    With the "resized" crop it is a rectangle: the first of those drawn that fits in the image, at a random place, or
    else, as with torchvision's `RandomResizedCrop`, the largest in the middle whose sides have an allowed ratio.
    Rectangles are not rounded to whole pixels.
    """
    heights_N, widths_N = heights_N.astype(np.float64), widths_N.astype(np.float64)
    x_N, y_N = draws.place_x_N, draws.place_y_N
    if isinstance(draws, ResizedDraws):
        areas_NT = draws.areas_NT * (heights_N * widths_N)[:, None]
        across_NT, down_NT = np.sqrt(areas_NT * draws.ratios_NT), np.sqrt(areas_NT / draws.ratios_NT)
        fits_NT = (across_NT <= widths_N[:, None]) & (down_NT <= heights_N[:, None])
        each, first_N, found_N = np.arange(len(x_N)), fits_NT.argmax(axis=1), fits_NT.any(axis=1)
        ratio_N = np.clip(widths_N / heights_N, 1 / draws.max_ratio, draws.max_ratio)
        across_N = np.where(found_N, across_NT[each, first_N], np.minimum(widths_N, heights_N * ratio_N))
        down_N = np.where(found_N, down_NT[each, first_N], np.minimum(heights_N, widths_N / ratio_N))
        x_N, y_N = x_N * found_N, y_N * found_N
    else:
        across_N = down_N = np.minimum(heights_N, widths_N)
    centre_x_N = widths_N / 2 + x_N * (widths_N - across_N) / 2
    centre_y_N = heights_N / 2 + y_N * (heights_N - down_N) / 2
    return _matrix([[across_N / 2, 0, centre_x_N], [0, down_N / 2, centre_y_N], [0, 0, 1]], len(x_N))


def square_from_output(size: int) -> np.ndarray:
    """`D`: an output pixel position, 0..size, in the square [-1, 1]^2; [3, 3]."""
    return np.array([[2.0 / size, 0, -1.0], [0, 2.0 / size, -1.0], [0, 0, 1.0]])


def _jacobian(source_from_output_N33: np.ndarray, size: int) -> np.ndarray:
    """Of the map from output to source at the image centre, [N, 2, 2]."""
    m = source_from_output_N33
    x_N, y_N, w_N = np.moveaxis(m @ np.array([size / 2, size / 2, 1.0]), -1, 0)
    return (m[:, :2, :2] * w_N[:, None, None] - np.stack([x_N, y_N], 1)[:, :, None] * m[:, 2:, :2]) / (
        w_N[:, None, None] ** 2
    )


def prefilter(
    source_from_output_N33: np.ndarray, heights_N: np.ndarray, widths_N: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Height and width to shrink each image to before the warp reads it, and the same map into the shrunk image.

    Bilinear interpolation looks at four pixels: read further apart than two, it skips some, and fine patterns alias.
    So an image is shrunk, antialiased by a triangle, to where the warp's steps are two pixels long, and no further:
    triangle and bilinear read together come closest to the mean over an output pixel, and a step of one pixel blurs.
    Each axis has its own factor, as a crop may be wider than high: one step right and one down in the output reach
    dx/du and dx/dv along x at the image centre, and the root of the sum of their squares is the step.

    Returns: sizes int64 [N, 2], (0, 0) where the image is read as it was decoded; matrices float64 [N, 3, 3].
    """
    step_N2 = np.linalg.norm(_jacobian(source_from_output_N33, size), axis=2)[:, ::-1]  # along height, along width
    sizes_N2 = np.stack([heights_N, widths_N], axis=1)
    shrunk_N2 = np.maximum(1, np.rint(sizes_N2 * np.minimum(1.0, 2.0 / step_N2)).astype(np.int64))
    scale_N2 = shrunk_N2 / sizes_N2
    unchanged_N1 = (shrunk_N2 == sizes_N2).all(axis=1, keepdims=True)
    return np.where(unchanged_N1, 0, shrunk_N2), shrink(source_from_output_N33, scale_N2[:, 1], scale_N2[:, 0])


def shrink(source_from_output_N33: np.ndarray, scale_x_N: np.ndarray, scale_y_N: np.ndarray) -> np.ndarray:
    """The same map into an image whose width and height were multiplied by the scales."""
    n = len(scale_x_N)
    return _matrix([[scale_x_N, 0, 0], [0, scale_y_N, 0], [0, 0, 1]], n) @ source_from_output_N33


def compose(draws: Draws, heights_N: np.ndarray, widths_N: np.ndarray, size: int) -> np.ndarray:
    """`source_from_output`, [N, 3, 3]: where in the decoded image each output pixel is read, once."""
    return placement(draws, heights_N, widths_N) @ augmentation(draws) @ square_from_output(size)


def padded_share(
    source_from_output_N33: np.ndarray, heights_N: np.ndarray, widths_N: np.ndarray, size: int
) -> np.ndarray:
    """Share of output pixels whose bilinear read touches a pixel outside the image, float64 [N]."""
    y_HW, x_HW = np.mgrid[:size, :size] + 0.5
    points_3P = np.stack([x_HW.ravel(), y_HW.ravel(), np.ones(size * size)])
    near = 0.5 - 1e-6  # between the centres of the outermost pixels, but for rounding
    share_N = np.empty(len(heights_N))
    for i, matrix_33 in enumerate(source_from_output_N33):
        x_P, y_P, w_P = matrix_33 @ points_3P
        inside_P = (w_P > 0) & (x_P >= near * w_P) & (y_P >= near * w_P)
        inside_P &= (x_P <= (widths_N[i] - near) * w_P) & (y_P <= (heights_N[i] - near) * w_P)
        share_N[i] = 1 - inside_P.mean()
    return share_N
