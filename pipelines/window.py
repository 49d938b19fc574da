"""Which rows of an image a warp reads, so that the decoder can leave out the others.

Rows, not a rectangle: a stored image's rows are one piece of memory, to be handed over without a copy, so that an image
gives the same pixels whether it is decoded or comes from a store; and the decoder gains nothing from columns, which it
has to decompress all the same.
"""

from __future__ import annotations

import numpy as np

_MARGIN = 2  # rows: the second tap of the bilinear interpolation, and one for rounding in float32


def rows(source_from_output_N33: np.ndarray, heights_N: np.ndarray, size: int) -> np.ndarray:
    """First row and the row after the last that the warp to `size` pixels reads, int64 [N, 2], at least two rows.

    Where the warp leaves the image, the rows reach that edge of it, and as far from there as the reflected padding
    reads: padding looks the same in the rows alone as in the whole image.
    """
    corners_34 = np.array([[0, size, 0, size], [0, 0, size, size], [1, 1, 1, 1]], np.float64)
    _, y_N4, w_N4 = np.moveaxis(source_from_output_N33 @ corners_34, 1, 0)
    # A square in front of the horizon is seen as the convex quadrilateral of its corners. Behind it: all rows.
    ahead_N = (w_N4 > 0).all(axis=1)
    y_N4 = y_N4 / np.where(ahead_N[:, None], w_N4, 1.0)
    bound = 4.0 * heights_N  # beyond it, everything is read; it keeps the integers small
    first_N = np.floor(np.maximum(y_N4.min(axis=1), -bound)).astype(np.int64) - _MARGIN
    stop_N = np.ceil(np.minimum(y_N4.max(axis=1), bound)).astype(np.int64) + _MARGIN
    above_N, below_N = np.maximum(-first_N, 0), np.maximum(stop_N - heights_N, 0)
    stop_N = np.where(above_N > 0, np.maximum(stop_N, above_N + 1), stop_N)
    first_N = np.where(below_N > 0, np.minimum(first_N, heights_N - below_N - 1), first_N)
    rows_N2 = np.stack([np.maximum(first_N, 0), np.minimum(stop_N, heights_N)], axis=1)
    return np.where(ahead_N[:, None], rows_N2, np.stack([np.zeros_like(heights_N), heights_N], axis=1))


def below(source_from_output_N33: np.ndarray, first_N: np.ndarray) -> np.ndarray:
    """The same map into an image that has lost the rows above `first_N`."""
    matrix_N33 = source_from_output_N33.copy()
    matrix_N33[:, 1] -= first_N[:, None] * matrix_N33[:, 2]
    return matrix_N33
