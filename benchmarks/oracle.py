"""What an ideal warp would give, and how far a picture is from it. Pictures are float64 or uint8 [H, W, 3], 0 to 255.

Nothing here is shared with the loader's warp: coordinates are float64, the interpolation is torch's bicubic in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import conv2d, grid_sample

SUPERSAMPLING = 6  # samples along each side of an output pixel, at least
_FINEST = 0.8  # source pixels from one sample to the next, at most; further apart, the oracle itself would alias
_ROWS = 1024  # of samples at a time, to bound the memory


def source_points(source_from_output_33: np.ndarray, x_N: np.ndarray, y_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the output positions in columns `x_N` and rows `y_N` lie in the source: x and y, each [rows, columns].

    Positions are continuous, pixel centres at half-integers.
    """
    x_HW, y_HW = np.meshgrid(x_N, y_N)
    u_HW, v_HW, w_HW = np.moveaxis(np.stack([x_HW, y_HW, np.ones_like(x_HW)], -1) @ source_from_output_33.T, -1, 0)
    return u_HW / w_HW, v_HW / w_HW


def sample(image_HWC: np.ndarray, x_HW: np.ndarray, y_HW: np.ndarray, mode: str) -> np.ndarray:
    """Read a picture at points, mirrored about the centres of its border pixels; unrounded, float64 [h, w, 3].

    `mode` is grid_sample's, "bilinear" or "bicubic" (Keys, 1981, with a = -0.75).
    """
    height, width = image_HWC.shape[:2]
    image_NCHW = torch.from_numpy(np.array(image_HWC, np.float32)).permute(2, 0, 1)[None]
    # align_corners=True puts -1 and 1 on the centres of the border pixels, and mirrors there.
    grid_HW2 = np.stack([2 * (x_HW - 0.5) / max(width - 1, 1) - 1, 2 * (y_HW - 0.5) / max(height - 1, 1) - 1], -1)
    grid_NHW2 = torch.from_numpy(grid_HW2.astype(np.float32))[None]
    out_NCHW = grid_sample(image_NCHW, grid_NHW2, mode=mode, padding_mode="reflection", align_corners=True)
    return out_NCHW[0].permute(1, 2, 0).numpy().astype(np.float64)


def warp(image_HWC: np.ndarray, source_from_output_33: np.ndarray, size: int) -> np.ndarray:
    """One bilinear warp, rounded to uint8 [size, size, 3], as libraries do it."""
    centres_N = np.arange(size) + 0.5
    out_HWC = sample(image_HWC, *source_points(source_from_output_33, centres_N, centres_N), "bilinear")
    return out_HWC.round().clip(0, 255).astype(np.uint8)


def distance(source_from_output_33: np.ndarray, size: int) -> float:
    """Source pixels from one output pixel to the next, at the centre: the root of the area of an output pixel there."""
    step, middle = 1e-3, size / 2
    x_HW, y_HW = source_points(source_from_output_33, middle + np.array([0, step]), middle + np.array([0, step]))
    across, down = (np.array([a[0, 1] - a[0, 0], a[1, 0] - a[0, 0]]) / step for a in (x_HW, y_HW))
    return math.sqrt(abs(across[0] * down[1] - across[1] * down[0]))


def ideal(image_HWC: np.ndarray, source_from_output_33: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """The picture that a warp should give, and the samples along each side of a pixel that it is the mean of.

    Each output pixel is the mean over its area, a box, of 6 x 6 bicubic samples or more of the decoded picture. Nothing
    is rounded; overshoot is cut once, at the end.
    """
    per_side = max(SUPERSAMPLING, math.ceil(distance(source_from_output_33, size) / _FINEST))
    columns_N = (np.arange(size * per_side) + 0.5) / per_side
    rows_per_chunk = max(1, _ROWS // per_side)
    chunks = []
    for top in range(0, size, rows_per_chunk):
        rows_N = columns_N[top * per_side : (top + rows_per_chunk) * per_side]
        fine_HWC = sample(image_HWC, *source_points(source_from_output_33, columns_N, rows_N), "bicubic")
        chunks.append(fine_HWC.reshape(-1, per_side, size, per_side, 3).mean(axis=(1, 3)))
    return np.concatenate(chunks).clip(0, 255), per_side


def psnr(picture_HWC: np.ndarray, ideal_HWC: np.ndarray, fit_HW: np.ndarray | None = None) -> float:
    """Peak signal to noise, dB, of the pixels that are `fit` to be judged by; infinite for equal pictures."""
    error_HWC = (picture_HWC.astype(np.float64) - ideal_HWC) ** 2
    error = float((error_HWC if fit_HW is None else error_HWC[fit_HW]).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(picture_HWC: np.ndarray, ideal_HWC: np.ndarray, fit_HW: np.ndarray | None = None) -> float:
    """Structural similarity, mean over channels and over all windows that hold fit pixels alone; 1 for equal pictures.

    Wang, Bovik, Sheikh & Simoncelli, "Image quality assessment", 2004: 11 x 11 Gaussian window of 1.5 pixels,
    K1 = 0.01, K2 = 0.03.
    """
    offset_K = torch.arange(-5, 6, dtype=torch.float64)
    weight_K = torch.exp(-(offset_K**2) / (2 * 1.5**2))
    weight_K /= weight_K.sum()

    def blurred(image_CHW: torch.Tensor) -> torch.Tensor:
        rows_NCHW = conv2d(image_CHW[:, None], weight_K[None, None, :, None])
        return conv2d(rows_NCHW, weight_K[None, None, None, :])

    a, b = (torch.from_numpy(x.astype(np.float64)).permute(2, 0, 1) for x in (picture_HWC, ideal_HWC))
    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    covariance = blurred(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    if fit_HW is not None:
        whole_HW = ~around(~fit_HW, 5)[5:-5, 5:-5]  # by the centres of windows
        similarity = similarity[:, 0, whole_HW]
    return float(similarity.mean())


def sharpness(picture_HWC: np.ndarray, ideal_HWC: np.ndarray, fit_HW: np.ndarray | None = None) -> float:
    """Gradient energy (squared differences of fit neighbours, summed) as a ratio to the ideal's: above 1 is sharper."""
    fit_HW1 = np.ones((*ideal_HWC.shape[:2], 1), bool) if fit_HW is None else fit_HW[..., None]

    def energy(image_HWC: np.ndarray) -> float:
        image_HWC = image_HWC.astype(np.float64)
        down = np.diff(image_HWC, axis=0) ** 2 * (fit_HW1[1:] & fit_HW1[:-1])
        across = np.diff(image_HWC, axis=1) ** 2 * (fit_HW1[:, 1:] & fit_HW1[:, :-1])
        return float(down.sum() + across.sum())

    return energy(picture_HWC) / energy(ideal_HWC)


def spectrum(picture_HWC: np.ndarray) -> np.ndarray:
    """Power by spatial frequency, the mean over all directions, float64 [F]: entry f is of f cycles across the picture.

    Of the grey picture, windowed (Hann), so that its borders are no edges. F - 1 cycles are Nyquist's, half a cycle a
    pixel.
    """
    size = len(picture_HWC)
    window_N = np.hanning(size + 2)[1:-1]
    grey_HW = picture_HWC.astype(np.float64).mean(axis=2)
    power_HW = np.abs(np.fft.fft2((grey_HW - grey_HW.mean()) * window_N[:, None] * window_N)) ** 2
    cycles_N = np.fft.fftfreq(size, 1 / size)
    radius_HW = np.hypot(cycles_N[:, None], cycles_N).round().astype(np.int64)
    count = size // 2 + 1
    inside_HW = radius_HW < count
    sums_F = np.bincount(radius_HW[inside_HW], power_HW[inside_HW], minlength=count)
    return sums_F / np.bincount(radius_HW[inside_HW], minlength=count)


def padded(maps: Sequence[np.ndarray], heights: Sequence[int], widths: Sequence[int], size: int) -> np.ndarray:
    """Which output pixels show padding, bool [size, size].

    Args:
        maps: of each warp that a picture goes through, in its order, the matrix [3, 3] from result to source.
        heights, widths: of each warp's source.
        size: of the last result; every earlier one is the next one's source.

    A pixel shows padding where its centre is read outside the source, or inside it from a pixel that shows padding.
    """
    padded_HW = np.zeros((heights[0], widths[0]), bool)
    results = [*zip(heights[1:], widths[1:], strict=True), (size, size)]
    for matrix_33, (rows, columns) in zip(maps, results, strict=True):
        x_HW, y_HW = source_points(matrix_33, np.arange(columns) + 0.5, np.arange(rows) + 0.5)
        height, width = padded_HW.shape
        inside_HW = (x_HW >= 0) & (x_HW <= width) & (y_HW >= 0) & (y_HW <= height)
        j_HW = x_HW.clip(0, width - 1).astype(np.int64)
        i_HW = y_HW.clip(0, height - 1).astype(np.int64)
        padded_HW = ~inside_HW | padded_HW[i_HW, j_HW]
    return padded_HW


def around(marked_HW: np.ndarray, pixels: int = 2) -> np.ndarray:
    """The marked pixels, and those no further than so many from one of them: what interpolation mixes them with."""
    padded_HW, height, width = np.pad(marked_HW, pixels), *marked_HW.shape
    shifts = range(2 * pixels + 1)
    return np.any([padded_HW[i : i + height, j : j + width] for i in shifts for j in shifts], axis=0)
