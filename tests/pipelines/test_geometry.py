"""The composed homography against the transforms written out point by point."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2

from pipelines.errors import UserError
from pipelines.geometry import (
    UNIFORMS,
    Augment,
    Centre,
    augmentation,
    compose,
    draw,
    padded_share,
    perspective,
    placement,
    prefilter,
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


EVERYTHING = Augment(crop="resized", min_scale=0.08, min_zoom=0.6, max_zoom=2, p_affine=1)


@pytest.mark.parametrize("augment", [Augment(), EVERYTHING, Augment(min_zoom=0.5), Augment.imagenet(), Centre()])
def test_the_chain_of_warps_ends_where_the_one_warp_reads(augment):
    draws = draw(augment, uniforms(0, 0, np.arange(N), UNIFORMS))
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


@pytest.mark.parametrize(("height", "width"), [(256, 341), (341, 256), (300, 300)])
def test_resizing_and_cropping_the_centre_is_one_read(height, width):
    """Against torchvision's steps on a picture of coordinates, which bilinear filters leave as they are."""
    y_HW, x_HW = np.mgrid[:height, :width] + 0.5
    steps = v2.Compose([v2.Resize(128, antialias=True), v2.CenterCrop(112)])
    expected_2HW = steps(torch.from_numpy(np.stack([x_HW, y_HW]))).numpy()
    draws = draw(Centre(crop_pct=0.875), np.zeros((1, UNIFORMS)))
    matrix_33 = compose(draws, np.array([height]), np.array([width]), 112)[0]
    y_HW, x_HW = np.mgrid[:112, :112] + 0.5
    ours_P2 = apply(matrix_33, np.column_stack([x_HW.ravel(), y_HW.ravel()]))
    # torchvision cuts at whole pixels of the resized picture, up to half of one off the centre.
    assert np.abs(ours_P2.T.reshape(2, 112, 112) - expected_2HW).max() <= 0.51 * min(height, width) / 128


def test_the_whole_square_is_the_default_of_validation():
    square, default = (draw(centre, np.zeros((3, UNIFORMS))) for centre in (Centre(), None))
    assert all(np.array_equal(a, b) for a, b in zip(vars(square).values(), vars(default).values(), strict=True))


def rectangles(augment, height, width, n):
    """Left, top, width and height in the image of what `n` samples read."""
    draws = draw(augment, uniforms(2, 0, np.arange(n), UNIFORMS))
    corner_N33 = placement(draws, np.full(n, height), np.full(n, width))
    across_N, down_N = 2 * corner_N33[:, 0, 0], 2 * corner_N33[:, 1, 1]
    return np.stack([corner_N33[:, 0, 2] - across_N / 2, corner_N33[:, 1, 2] - down_N / 2, across_N, down_N], axis=1)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 500), (900, 300), (300, 2400)])
def test_imagenets_crop_is_torchvisions(height, width):
    n = 2500
    ours_N4 = rectangles(Augment.imagenet(), height, width, n)
    assert (ours_N4 >= -1e-9).all()
    assert (ours_N4[:, :2] + ours_N4[:, 2:] <= np.array([width, height]) + 1e-9).all()
    torch.manual_seed(0)
    canvas = torch.empty(1, height, width)
    theirs = [RandomResizedCrop.get_params(canvas, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(n)]
    theirs_N4 = np.array(theirs, float)[:, [1, 0, 3, 2]]
    for ours_N, theirs_N in zip(ours_N4.T, theirs_N4.T, strict=True):  # Kolmogorov-Smirnov, at 1 in 1,000
        grid = np.arange(-0.5, max(width, height) + 1)  # between whole pixels, to which theirs are rounded
        ours, theirs = (np.searchsorted(np.sort(a), grid) / n for a in (ours_N, theirs_N))
        assert np.abs(ours - theirs).max() < 1.95 * np.sqrt(2 / n)
    ours_N, theirs_N = (np.log(rectangle_N4[:, 2] / rectangle_N4[:, 3]) for rectangle_N4 in (ours_N4, theirs_N4))
    assert np.quantile(ours_N, [0.2, 0.5, 0.8]) == pytest.approx(np.quantile(theirs_N, [0.2, 0.5, 0.8]), abs=0.03)


def test_a_panorama_is_read_in_the_middle_where_no_rectangle_fits():
    wide_4 = rectangles(Augment(crop="resized", min_scale=0.9), 100, 1000, 1)[0]
    assert wide_4 == pytest.approx([(1000 - 400 / 3) / 2, 0, 400 / 3, 100])
    high_4 = rectangles(Augment(crop="resized", min_scale=0.9, max_ratio=2), 1000, 100, 1)[0]
    assert high_4 == pytest.approx([0, 400, 100, 200])
    assert rectangles(Augment(crop="resized", min_scale=1), 110, 100, 1)[0] == pytest.approx([0, 0, 100, 110])


def test_options_leave_the_other_draws_as_they_are(draws):
    numbers = uniforms(0, 0, np.arange(N), UNIFORMS)
    assert np.array_equal(numbers[:, :20], uniforms(0, 0, np.arange(N), 20))
    for other, expected in (
        (Augment(crop="resized"), {"crop_side_N"}),
        (Augment(min_zoom=0.9), {"zoom_N"}),
        (Augment(max_lighting=0), {"brightness_N", "contrast_N"}),
        (Augment(padding="zeros"), set()),
    ):
        parameters = vars(draw(other, numbers))
        assert {name for name in vars(draws) if not np.array_equal(vars(draws)[name], parameters[name])} == expected


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
    zoom_N = draw(Augment(min_zoom=0.8, max_zoom=1.2, p_affine=1), uniforms(1, 0, np.arange(20_000), UNIFORMS)).zoom_N
    assert np.quantile(zoom_N, [0, 0.25, 0.5, 0.75, 1]) == pytest.approx([0.8, 0.9, 1, 1.1, 1.2], abs=0.01)


def test_the_draws_of_a_sample_never_change(draws):
    golden = {
        "angle_N": [0.0, 0.035980048148, -0.047328713089],
        "zoom_N": [1.0, 1.039218573726, 1.037578887504],
        "warp_x_N": [0.13651664122, -0.109745954489, -0.093260306166],
        "contrast_N": [0.800982740356, 1.0, 1.004213628199],
    }
    for name, values in golden.items():
        assert getattr(draws, name)[:3] == pytest.approx(values, abs=1e-9)


@pytest.mark.parametrize(
    "bad",
    [
        {"flip": 1.5},
        {"max_zoom": 0.5},
        {"min_zoom": 1.1},
        {"min_scale": 0},
        {"max_ratio": 0.75},
        {"max_lighting": 1},
        {"crop": "centre"},
        {"padding": "reflection"},
    ],
)
def test_impossible_augmentation_is_refused(bad):
    ((name, value),) = bad.items()
    with pytest.raises(UserError, match=f"Augment.{name} is {value!r}; it must"):
        Augment(**bad)


@pytest.mark.parametrize("crop_pct", [0, 1.1, float("nan")])
def test_impossible_validation_is_refused(crop_pct):
    with pytest.raises(UserError, match=f"crop_pct is {crop_pct}"):
        Centre(crop_pct=crop_pct)


def test_a_shrunk_image_is_read_at_the_same_places(draws):
    matrix_N33 = compose(draws, np.full(N, 900), np.full(N, 1000), 64)
    shrunk_N33 = shrink(matrix_N33, np.full(N, 0.25), np.full(N, 0.5))
    points = np.random.default_rng(1).uniform(0, 64, (25, 2))
    for i in range(N):
        assert np.allclose(apply(shrunk_N33[i], points), apply(matrix_N33[i], points) * [0.25, 0.5])


def read(image_HW, matrix_33, size, padding="reflection"):
    """By torch's grid_sample, [size, size]."""
    y_HW, x_HW = np.mgrid[:size, :size] + 0.5
    source_P2 = apply(matrix_33, np.column_stack([x_HW.ravel(), y_HW.ravel()]))
    grid_12 = source_P2 / [image_HW.shape[1], image_HW.shape[0]] * 2 - 1
    out = torch.nn.functional.grid_sample(
        torch.from_numpy(image_HW)[None, None],
        torch.from_numpy(grid_12).reshape(1, size, size, 2),
        mode="bilinear",
        padding_mode=padding,
        align_corners=False,
    )
    return out[0, 0].numpy()


def test_the_prefilter_leaves_steps_of_two_pixels_along_each_axis(draws):
    resized = draw(Augment(crop="resized", min_scale=0.3, max_ratio=3), uniforms(0, 0, np.arange(N), UNIFORMS))
    size, middle = 64, np.array([[32, 32], [32.001, 32], [32, 32.001]])
    some = {0: 0, 1: 0, 2: 0}
    for parameters in (draws, resized):
        for shorten in (1, 5, 12):
            heights_N, widths_N = np.full(N, 1500 // shorten), np.full(N, 1800 // shorten)
            matrix_N33 = compose(parameters, heights_N, widths_N, size)
            sizes_N2, shrunk_N33 = prefilter(matrix_N33, heights_N, widths_N, size)
            for i in range(N):
                steps = []
                for matrix_33 in (matrix_N33[i], shrunk_N33[i]):
                    centre, right, down = apply(matrix_33, middle)
                    steps.append(np.linalg.norm([right - centre, down - centre], axis=0)[::-1] / 0.001)
                before_2, after_2 = steps
                assert after_2 == pytest.approx(np.minimum(before_2, 2), rel=0.01)  # to whole pixels
                some[int((before_2 > 2.01).sum())] += 1
                assert (sizes_N2[i] > 0).all() or ((sizes_N2[i] == 0).all() and before_2.max() < 2.02)
                assert before_2.max() > 2 or not sizes_N2[i].any()  # read as decoded
                if sizes_N2[i, 0]:
                    assert apply(shrunk_N33[i], middle) == pytest.approx(
                        apply(matrix_N33[i], middle) * sizes_N2[i, ::-1] / [widths_N[i], heights_N[i]]
                    )
    assert min(some.values()) > 10  # neither, one, or both of the axes


def test_the_prefilter_comes_close_to_the_mean_over_each_output_pixel(draws):
    """A picture of fine detail, against 8 x 8 reads of the original for each output pixel."""
    size, height, width = 32, 500, 667
    frequency_HW = np.hypot(*np.meshgrid(np.fft.rfftfreq(width), np.fft.fftfreq(height)))
    frequency_HW[0, 0] = 1
    noise_HW = np.random.default_rng(0).normal(size=(height, width))
    picture_HW = np.fft.irfft2(np.fft.rfft2(noise_HW) / frequency_HW, s=(height, width))  # the spectrum of photographs
    picture_HW = np.clip(128 + 50 * picture_HW / picture_HW.std(), 0, 255)
    heights_N, widths_N = np.full(N, height), np.full(N, width)
    matrix_N33, fine_N33 = (compose(draws, heights_N, widths_N, s) for s in (size, 8 * size))
    sizes_N2, shrunk_N33 = prefilter(matrix_N33, heights_N, widths_N, size)
    half_N2 = sizes_N2 // 2  # steps of one pixel
    ways = {
        "ours": (sizes_N2, shrunk_N33),
        "half": (half_N2, shrink(shrunk_N33, *(half_N2 / sizes_N2).T[::-1])),
        "unfiltered": (np.stack([heights_N, widths_N], axis=1), matrix_N33),
    }
    decibels = {way: [] for way in ways}
    for i in range(8):
        mean_HW = read(picture_HW, fine_N33[i], 8 * size).reshape(size, 8, size, 8).mean(axis=(1, 3))
        for way, (sizes, matrices_N33) in ways.items():
            small = Image.fromarray(picture_HW.astype(np.float32)).resize(sizes[i, ::-1], Image.Resampling.BILINEAR)
            off_HW = read(np.asarray(small, np.float64), matrices_N33[i], size) - mean_HW
            decibels[way].append(20 * np.log10(255 / np.sqrt((off_HW**2).mean())))
    ours, half, unfiltered = (np.mean(each) for each in decibels.values())
    assert ours > 35
    assert ours > half + 3
    assert ours > unfiltered + 3


def test_twice_the_size_reads_the_same_places(draws):
    heights_N, widths_N = np.full(N, 900), np.full(N, 1000)
    once_N33, twice_N33 = (compose(draws, heights_N, widths_N, size) for size in (64, 128))
    points = np.random.default_rng(1).uniform(0, 64, (25, 2))
    for i in range(N):
        assert np.allclose(apply(twice_N33[i], 2 * points), apply(once_N33[i], points))


def test_the_padded_share_counts_the_pixels_that_touch_what_lies_outside():
    wild = draw(Augment(min_zoom=0.5, max_rotate=45, max_warp=0.4, p_affine=1), uniforms(0, 0, np.arange(40), UNIFORMS))
    heights_N, widths_N = np.arange(60, 100), np.arange(100, 60, -1)
    matrix_N33 = compose(wild, heights_N, widths_N, 50)
    share_N = padded_share(matrix_N33, heights_N, widths_N, 50)
    for i in range(40):
        ones_HW = np.ones((heights_N[i], widths_N[i]))
        assert share_N[i] == pytest.approx((read(ones_HW, matrix_N33[i], 50, "zeros") < 1 - 1e-6).mean(), abs=1e-12)
    assert 0 < share_N.min() < 0.05 and share_N.max() > 0.3
    square = compose(draw(None, np.zeros((1, UNIFORMS))), np.array([50]), np.array([50]), 50)
    assert padded_share(square, np.array([50]), np.array([50]), 50) == 0


def test_training_by_default_pads_less_than_one_pixel_in_a_hundred():
    """On the shapes of photographs, 3:4 and 2:3, upright and lying."""
    n = 600
    defaults = draw(Augment(), uniforms(0, 0, np.arange(n), UNIFORMS))
    heights_N, widths_N = np.tile([400, 533, 400, 600], n // 4), np.tile([533, 400, 600, 400], n // 4)
    share_N = padded_share(compose(defaults, heights_N, widths_N, 40), heights_N, widths_N, 40)
    assert 0.001 < share_N.mean() < 0.01
