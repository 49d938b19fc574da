"""The ideal picture and the measures of distance from it, against closed forms and other libraries."""

import cv2
import numpy as np
import pytest

from benchmarks import chained, oracle
from pipelines.geometry import square_from_output

SIZE = 48
TURN = np.radians(8)
MAP = np.array(
    [
        [1.7 * np.cos(TURN), -1.7 * np.sin(TURN), 20.0],
        [1.7 * np.sin(TURN), 1.7 * np.cos(TURN), 9.0],
        [4e-4, -3e-4, 1.0],
    ]
)


def gradient(x, y):
    """A picture so slow that its mean over a pixel is its value at the centre."""
    return np.stack([20 + x, 200 - 0.9 * y, 120 + 30 * np.sin((x + y) / 60)], axis=-1)


def noise(height=110, width=130, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_the_ideal_of_a_slow_gradient_is_the_gradient_at_the_mapped_points():
    centres_N = np.arange(130) + 0.5
    image_HWC = gradient(*np.meshgrid(centres_N, centres_N[:110]))
    ideal_HWC, per_side = oracle.ideal(image_HWC, MAP, SIZE)
    out_N = np.arange(SIZE) + 0.5
    expected_HWC = gradient(*oracle.source_points(MAP, out_N, out_N))
    assert per_side == 6
    assert oracle.psnr(ideal_HWC, expected_HWC) > 60
    shifted_HWC = gradient(*oracle.source_points(MAP, out_N + 0.5, out_N))  # half a pixel aside is another picture
    assert oracle.psnr(ideal_HWC, shifted_HWC) < 58


def test_the_ideal_agrees_with_opencv_on_noise_and_mirrors_alike_outside():
    image_HWC = noise()
    matrix_33 = MAP @ np.array([[1.4, 0, -12], [0, 1.4, -12], [0, 0, 1]])  # reads beyond every border
    fine_N = (np.arange(SIZE * 6) + 0.5) / 6
    x_HW, y_HW = (points - 0.5 for points in oracle.source_points(matrix_33, fine_N, fine_N))
    assert x_HW.min() < -5 and y_HW.min() < -5
    read_HWC = cv2.remap(
        image_HWC.astype(np.float32),
        x_HW.astype(np.float32),
        y_HW.astype(np.float32),
        cv2.INTER_CUBIC,
        borderMode=cv2.BORDER_REFLECT_101,
    )
    expected_HWC = read_HWC.reshape(SIZE, 6, SIZE, 6, 3).mean(axis=(1, 3)).clip(0, 255)
    ideal_HWC, _ = oracle.ideal(image_HWC, matrix_33, SIZE)
    # OpenCV before 5 rounds positions to 1/32 pixel; the mean over 36 of them leaves little of that.
    assert oracle.psnr(ideal_HWC, expected_HWC) > 45


def test_many_source_pixels_to_one_are_all_read():
    image_HWC = noise(480, 480)
    matrix_33 = np.diag([10.0, 10.0, 1.0])
    ideal_HWC, per_side = oracle.ideal(image_HWC, matrix_33, SIZE)
    assert oracle.distance(matrix_33, SIZE) == pytest.approx(10, abs=1e-6)
    assert per_side == 13
    mean_HWC = image_HWC.reshape(SIZE, 10, SIZE, 10, 3).mean(axis=(1, 3))
    assert oracle.psnr(ideal_HWC, mean_HWC) > 36  # noise of 74 grey levels averages out only where every pixel counts
    assert oracle.psnr(oracle.warp(image_HWC, matrix_33, SIZE), mean_HWC) < 20


def test_one_warp_by_the_identity_gives_the_same_picture():
    image_HWC = noise(SIZE, SIZE)
    np.testing.assert_array_equal(oracle.warp(image_HWC, np.eye(3), SIZE), image_HWC)


def test_equal_pictures_are_equal_by_every_measure():
    image_HWC = noise()
    assert oracle.psnr(image_HWC, image_HWC) == np.inf
    assert oracle.ssim(image_HWC, image_HWC) == pytest.approx(1, abs=1e-12)
    assert oracle.sharpness(image_HWC, image_HWC) == 1


def test_psnr_of_a_constant_error():
    assert oracle.psnr(np.full((9, 9, 3), 100.0), np.full((9, 9, 3), 105.0)) == pytest.approx(34.1514, abs=1e-4)


def test_only_fit_pixels_are_judged():
    ideal_HWC = np.random.default_rng(0).uniform(10, 240, (40, 40, 3))
    fit_HW = np.ones((40, 40), bool)
    fit_HW[5:12, 20:25] = False
    picture_HWC = ideal_HWC + 5
    picture_HWC[~fit_HW] = 0
    assert oracle.psnr(picture_HWC, ideal_HWC, fit_HW) == pytest.approx(20 * np.log10(255 / 5))
    assert oracle.sharpness(picture_HWC, ideal_HWC, fit_HW) == pytest.approx(1)
    assert oracle.sharpness(picture_HWC, ideal_HWC) != pytest.approx(1)
    equal_HWC = np.where(fit_HW[..., None], ideal_HWC, 0)
    assert oracle.ssim(equal_HWC, ideal_HWC, fit_HW) == pytest.approx(1)
    assert oracle.ssim(equal_HWC, ideal_HWC) < 0.98
    near_HW = fit_HW.copy()
    near_HW[5, 20] = True  # one of them counts: so do the windows that hold no other
    assert oracle.psnr(equal_HWC, ideal_HWC, near_HW) < 60


def test_ssim_is_the_mean_of_its_definition_over_all_windows():
    a_HWC, b_HWC = noise(14, 13, seed=1), noise(14, 13, seed=2)
    b_HWC = (0.6 * a_HWC + 0.4 * b_HWC).astype(np.uint8)
    bell_K = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weight_KK = np.outer(bell_K, bell_K) / bell_K.sum() ** 2
    values = []
    for top in range(4):
        for left in range(3):
            for channel in range(3):
                window = np.s_[top : top + 11, left : left + 11, channel]
                a, b = a_HWC[window].astype(float), b_HWC[window].astype(float)
                mean_a, mean_b = (weight_KK * a).sum(), (weight_KK * b).sum()
                var_a, var_b = (weight_KK * (a - mean_a) ** 2).sum(), (weight_KK * (b - mean_b) ** 2).sum()
                both = (weight_KK * (a - mean_a) * (b - mean_b)).sum()
                c1, c2 = 2.55**2, 7.65**2
                values.append(
                    (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
                )
    assert oracle.ssim(a_HWC, b_HWC) == pytest.approx(np.mean(values), abs=1e-9)


def test_ssim_is_that_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    a_HWC, b_HWC = noise(seed=1), noise(seed=2)
    b_HWC = (0.8 * a_HWC + 0.2 * b_HWC).astype(np.uint8)
    theirs = metrics.structural_similarity(
        a_HWC, b_HWC, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=2
    )
    assert oracle.ssim(a_HWC, b_HWC) == pytest.approx(theirs, abs=1e-9)


def test_a_blurred_picture_has_less_gradient_energy():
    image_HWC = noise()
    blurred_HWC = cv2.blur(image_HWC, (3, 3))
    # The differences of neighbouring means of 9 are of 6 pixels / 81, of neighbouring pixels of 2: 1 / 27.
    assert oracle.sharpness(blurred_HWC, image_HWC) == pytest.approx(1 / 27, rel=0.1)


def test_the_identity_shows_no_padding_at_any_scale():
    for size in (31, 50, 97):
        matrix_33 = np.linalg.inv(square_from_output(50)) @ square_from_output(size)
        assert oracle.padded([matrix_33], [50], [50], size).mean() == 0


def test_padding_is_the_area_read_outside():
    shift_33 = np.array([[1, 0, 10.0], [0, 1, 0], [0, 0, 1]])
    assert oracle.padded([shift_33], [50], [50], 50).mean() == pytest.approx(0.2)
    back_33 = np.linalg.inv(shift_33)
    # There and back: the padding of the first warp has moved to the right, that of the second lies at the left.
    assert oracle.padded([shift_33, back_33], [50, 50], [50, 50], 50).mean() == pytest.approx(0.2)
    assert oracle.padded([shift_33, shift_33], [50, 50], [50, 50], 50).mean() == pytest.approx(0.4)
    assert oracle.padded([shift_33 @ back_33], [50], [50], 50).mean() == 0


def test_a_grating_has_its_power_where_its_frequency_is():
    size, cycles = 64, 12
    x_N = (np.arange(size) + 0.5) / size
    grating_HWC = np.broadcast_to(100 * np.cos(2 * np.pi * cycles * x_N)[None, :, None], (size, size, 3)) + 128
    power_F = oracle.spectrum(grating_HWC)
    assert len(power_F) == size // 2 + 1
    assert power_F.argmax() == cycles
    assert power_F[cycles - 2 : cycles + 3].sum() > 0.99 * power_F.sum()
    np.testing.assert_allclose(oracle.spectrum(2 * grating_HWC), 4 * power_F)  # and light as such has none


def test_one_warp_of_many_transforms_is_that_of_their_product():
    rng = np.random.default_rng(0)
    first_33, second_33 = chained.drawn(rng), chained.drawn(rng)
    corners_32 = np.array([[-1, 1, 1.0], [-1, -1, 1], [1, 1, 1]]).T
    read_by_turns = first_33 @ (second_33 @ corners_32)
    np.testing.assert_allclose((first_33 @ second_33) @ corners_32, read_by_turns)
    assert np.abs(first_33 - np.eye(3)).max() < 0.3  # rotations of 10 degrees and the like


def test_what_lies_around_is_a_square():
    marked_HW = np.zeros((9, 9), bool)
    marked_HW[4, 0] = True
    assert oracle.around(marked_HW, 2).sum() == 5 * 3 and oracle.around(marked_HW, 2)[2:7, :3].all()
    assert not oracle.around(np.zeros((3, 3), bool)).any()
