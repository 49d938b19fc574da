"""The composed homography against the transforms written out point by point."""

import numpy as np
import pytest

from pipelines.geometry import (
    UNIFORMS,
    Augment,
    augmentation,
    compose,
    decimation,
    draw,
    perspective,
    placement,
    shrink,
    square_from_output,
    stepwise,
)
from pipelines.plan import uniforms

N = 200


@pytest.fixture
def draws():
    return draw(Augment(), uniforms(0, 0, np.arange(N), UNIFORMS))


def apply(matrix_33, points_P2):
    homogeneous = np.column_stack([points_P2, np.ones(len(points_P2))]) @ matrix_33.T
    return homogeneous[:, :2] / homogeneous[:, 2:]


def test_perspective_takes_the_corners_where_fastai_does():
    rng = np.random.default_rng(0)
    for x, y in rng.uniform(-0.4, 0.4, (20, 2)):
        matrix_33 = perspective(np.array([x]), np.array([y]))[0]
        corners = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]], float)
        target = np.array([[-1 - y, -1 - x], [-1 + y, 1 + x], [1 + y, -1 + x], [1 - y, 1 - x]])
        assert np.abs(apply(matrix_33, corners) - target).max() < 1e-12


def test_the_composition_equals_its_steps(draws):
    """Each output pixel centre, taken through the transforms one at a time."""
    size, heights_N, widths_N = 32, np.full(N, 333), np.full(N, 500)
    matrix_N33 = compose(draws, heights_N, widths_N, size)
    points = np.random.default_rng(1).uniform(0, size, (25, 2))
    for i in range(N):
        p = points / size * 2 - 1
        p = p * draws.crop_side_N[i] + [
            draws.crop_x_N[i] * (1 - draws.crop_side_N[i]),
            draws.crop_y_N[i] * (1 - draws.crop_side_N[i]),
        ]
        p = p * [draws.flip_N[i], 1]
        zoom = draws.zoom_N[i]
        p = p / zoom + [draws.zoom_x_N[i] * (1 - 1 / zoom), draws.zoom_y_N[i] * (1 - 1 / zoom)]
        angle = draws.angle_N[i]
        p = p @ np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).T
        p = apply(perspective(draws.warp_x_N[i : i + 1], draws.warp_y_N[i : i + 1])[0], p)
        centre = np.array([250 + draws.place_x_N[i] * (500 - 333) / 2, 333 / 2])
        assert np.abs(apply(matrix_N33[i], points) - (p * 333 / 2 + centre)).max() < 1e-9


def test_the_chain_of_warps_ends_where_the_one_warp_reads(draws):
    size, heights_N, widths_N = 48, np.full(N, 333), np.full(N, 500)
    matrix_N33 = placement(draws, heights_N, widths_N) @ square_from_output(size)
    chain = stepwise(draws, size)
    assert list(chain) == ["perspective", "rotate", "zoom", "flip", "crop"]
    for step_N33 in chain.values():
        matrix_N33 = matrix_N33 @ step_N33
    points = np.random.default_rng(2).uniform(0, size, (25, 2))
    for chained_33, composed_33 in zip(matrix_N33, compose(draws, heights_N, widths_N, size), strict=True):
        assert np.abs(apply(chained_33, points) - apply(composed_33, points)).max() < 1e-9


def test_without_augmentation_the_centred_square_is_read():
    matrix_33 = compose(draw(None, np.zeros((1, UNIFORMS))), np.array([300]), np.array([501]), 100)[0]
    corners = apply(matrix_33, np.array([[0, 0], [100, 100]], float))
    assert np.allclose(corners, [[100.5, 0], [400.5, 300]])


def test_a_flip_of_a_flip_is_the_identity():
    always = Augment(flip=1, max_rotate=0, max_zoom=1, max_warp=0, min_scale=1)
    flips_N33 = augmentation(draw(always, uniforms(0, 0, np.arange(5), UNIFORMS)))
    assert np.array_equal(flips_N33 @ flips_N33, np.broadcast_to(np.eye(3), (5, 3, 3)))
    assert (flips_N33[:, 0, 0] == -1).all()


def test_draws_keep_their_ranges_and_probabilities():
    many = draw(Augment(), uniforms(1, 0, np.arange(20_000), UNIFORMS))
    assert np.abs(np.degrees(many.angle_N)).max() <= 10
    assert many.zoom_N.min() >= 1 and many.zoom_N.max() <= 1.1
    assert np.abs(many.warp_x_N).max() <= 0.2
    assert (many.crop_side_N**2).min() >= 0.75 and (many.crop_side_N**2).max() <= 1
    assert np.abs(many.brightness_N).max() <= 0.1
    assert many.contrast_N.min() >= 0.8 and many.contrast_N.max() <= 1.25
    assert (many.flip_N < 0).mean() == pytest.approx(0.5, abs=0.02)
    for changed in (many.angle_N != 0, many.zoom_N != 1, many.warp_x_N != 0, many.warp_y_N != 0):
        assert changed.mean() == pytest.approx(0.75, abs=0.02)
    for changed in (many.brightness_N != 0, many.contrast_N != 1):
        assert changed.mean() == pytest.approx(0.75, abs=0.02)
    pairs = np.corrcoef([many.angle_N, many.zoom_N, many.warp_x_N, many.warp_y_N, many.crop_x_N, many.place_x_N])
    assert np.abs(pairs - np.eye(6)).max() < 0.04


def test_the_draws_of_a_sample_never_change(draws):
    golden = {
        "angle_N": [0.0, 0.035980048148, -0.047328713089],
        "zoom_N": [1.0, 1.039218573726, 1.037578887504],
        "warp_x_N": [0.13651664122, -0.109745954489, -0.093260306166],
        "contrast_N": [0.800982740356, 1.0, 1.004213628199],
    }
    for name, values in golden.items():
        assert getattr(draws, name)[:3] == pytest.approx(values, abs=1e-9)


@pytest.mark.parametrize("bad", [{"flip": 1.5}, {"max_zoom": 0.5}, {"min_scale": 0}, {"max_lighting": 1}])
def test_impossible_augmentation_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Augment(**bad)


def test_decimation_follows_the_distance_between_the_pixels_read(draws):
    size, heights_N, widths_N = 64, np.full(N, 900), np.full(N, 1000)
    matrix_N33 = compose(draws, heights_N, widths_N, size)
    middle = np.array([[32, 32], [32.001, 32], [32, 32.001]])
    for matrix_33, factor in zip(matrix_N33, decimation(matrix_N33, size), strict=True):
        centre, right, down = apply(matrix_33, middle)
        area = abs(np.linalg.det(np.stack([right - centre, down - centre]) / 0.001))
        assert factor == int(area**0.5)
    assert (decimation(compose(draws, heights_N // 8, widths_N // 8, size), size) == 1).all()


def test_a_shrunk_image_is_read_at_the_same_places(draws):
    matrix_N33 = compose(draws, np.full(N, 900), np.full(N, 1000), 64)
    shrunk_N33 = shrink(matrix_N33, np.full(N, 0.25), np.full(N, 0.5))
    points = np.random.default_rng(1).uniform(0, 64, (25, 2))
    for i in range(N):
        assert np.allclose(apply(shrunk_N33[i], points), apply(matrix_N33[i], points) * [0.25, 0.5])
