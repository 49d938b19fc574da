"""The rows that a warp needs, against every row that its interpolation and its padding look at."""

import numpy as np
import pytest

from pipelines.geometry import Augment, compose, draw
from pipelines.window import below, rows

SIZE = 32
AUGMENTS = {
    "none": None,
    "training": Augment(),
    "outside": Augment(max_rotate=180, max_warp=0.5, min_scale=1, p_affine=1),
    "small crops": Augment(max_rotate=45, min_scale=0.02, max_zoom=3),
    "at the edges": "at the edges",
}


def matrices(augment, n=300):
    rng = np.random.default_rng(3)
    heights_N, widths_N = rng.integers(2, 400, n), rng.integers(2, 400, n)
    if augment == "at the edges":  # small views that lie across an edge, or outside but less than a height away
        heights_N = rng.integers(130, 400, n)
        matrix_N33 = np.tile(np.eye(3), (n, 1, 1)) * rng.uniform(0.3, 1.5, (n, 1, 1))
        matrix_N33[:, 1, 2] = rng.uniform(-0.8, 1.5, n) * heights_N
        matrix_N33[:, 2, 2] = 1
        return matrix_N33, heights_N
    return compose(draw(augment, rng.random((n, 20))), heights_N, widths_N, SIZE), heights_N


def rows_read(matrix_33, height):
    """By brute force: both taps at every output pixel, folded back at the edges as reflection does, and those edges."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    _, source_y, w = np.moveaxis(np.stack([x, y, np.ones_like(x)], axis=-1) @ matrix_33.T, -1, 0)
    tap = np.floor(source_y / w - 0.5).astype(int)
    taps = np.concatenate([tap.ravel(), tap.ravel() + 1])
    period = 2 * (height - 1)
    folded = np.abs(taps) % period
    return np.concatenate([np.where(folded >= height, period - folded, folded), taps.clip(0, height - 1)])


@pytest.mark.parametrize("augment", AUGMENTS.values(), ids=AUGMENTS)
def test_every_row_that_is_read_is_there_and_few_others(augment):
    matrix_N33, heights_N = matrices(augment)
    for matrix_33, height, (first, stop) in zip(matrix_N33, heights_N, rows(matrix_N33, heights_N, SIZE), strict=True):
        read = rows_read(matrix_33, height)
        assert 0 <= first <= read.min() and read.max() < stop <= height
        assert stop - first >= 2
        spacing = np.ceil(4 * height / SIZE)  # the corners lie half an output pixel outside the outermost centres
        assert (stop - first) - (read.max() - read.min() + 1) <= 2 * (spacing + 3)


def test_a_view_across_the_horizon_reads_all_rows():
    matrix_N33 = np.array([[[1, 0, 0], [0, 1, 0], [0.0, -0.05, 1.0]], [[1, 0, 0], [0, 1, 1e9], [0, 0, 1]]])
    assert rows(matrix_N33, np.array([100, 50]), SIZE).tolist() == [[0, 100], [0, 50]]


def test_below_moves_the_source_and_nothing_else():
    matrix_N33, _ = matrices(AUGMENTS["outside"], n=5)
    point = np.array([3.5, 7.25, 1.0])
    before = matrix_N33 @ point
    after = below(matrix_N33, np.arange(5)) @ point
    assert np.allclose(after[:, 0] / after[:, 2], before[:, 0] / before[:, 2])
    assert np.allclose(after[:, 1] / after[:, 2], before[:, 1] / before[:, 2] - np.arange(5))
