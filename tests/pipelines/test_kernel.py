"""The compiled warp against NumPy in float64 and OpenCV."""

import ctypes
import mmap

import cv2
import numpy as np
import pytest

from pipelines.geometry import Augment, compose, draw
from pipelines.kernel import warp

BORDERS = {"reflect": cv2.BORDER_REFLECT_101, "zeros": cv2.BORDER_CONSTANT, "border": cv2.BORDER_REPLICATE}
SHIFT_3, SCALE_3 = np.array([100.0, 120.0, 140.0]), np.array([50.0, 60.0, 70.0])


def taps(index, length, padding):
    """Where pixel `index` of a continued image lies in the image, and whether it is one of its own."""
    if padding == "reflect":
        index = np.abs(index) % (2 * length - 2)
        index = np.minimum(index, 2 * length - 2 - index)
    return np.clip(index, 0, length - 1), (padding != "zeros") | ((index >= 0) & (index < length))


def oracle(image_HW3, matrix_33, size, padding):
    height, width, _ = image_HW3.shape
    y, x = np.mgrid[:size, :size] + 0.5
    x, y, w = np.moveaxis(np.stack([x, y, np.ones_like(x)], axis=-1) @ matrix_33.T, -1, 0)
    x, y = x / w - 0.5, y / w - 0.5
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    total = 0.0
    for right, down in np.ndindex(2, 2):
        column, inside = taps(left + right, width, padding)
        row, also = taps(top + down, height, padding)
        weight = np.abs(1 - right - (x - left)) * np.abs(1 - down - (y - top)) * inside * also
        total = total + weight[..., None] * image_HW3[row, column]
    return total


def warped(image_HW3, matrix_33, size, padding="reflect", **options):
    out_SS3 = np.full((size, size, 3), np.nan, np.float32)
    warp(image_HW3, matrix_33, SHIFT_3, SCALE_3, out_SS3, padding=padding, **options)
    return out_SS3 * SCALE_3 + SHIFT_3


def views(augment, n, height, width, size):
    draws = draw(augment, np.random.default_rng(1).random((n, 20)))
    return compose(draws, np.full(n, height), np.full(n, width), size)


def noise(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("padding", BORDERS)
@pytest.mark.parametrize(("height", "width", "size"), [(97, 131, 64), (60, 41, 75), (2, 2, 9), (3, 70, 33)])
def test_it_is_what_float64_says_on_noise(padding, height, width, size):
    image = noise(height, width)
    for matrix_33 in views(Augment(max_rotate=180, max_warp=0.3, min_zoom=0.5, p_affine=1), 20, height, width, size):
        expected = oracle(image, matrix_33, size, padding)
        assert np.abs(warped(image, matrix_33, size, padding) - expected).max() < 0.25  # a thousandth of a pixel


@pytest.mark.parametrize("padding", BORDERS)
def test_it_is_what_opencv_gives_up_to_its_rounding(padding):
    image = cv2.GaussianBlur(noise(97, 131), (0, 0), 2)
    centres = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    for matrix_33 in views(Augment(max_rotate=180, min_zoom=0.5, p_affine=1), 20, 97, 131, 64):
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        shifted_33 = np.linalg.inv(centres) @ matrix_33 @ centres
        expected = cv2.warpPerspective(image, shifted_33, (64, 64), flags=flags, borderMode=BORDERS[padding])
        assert np.abs(warped(image, matrix_33, 64, padding) - expected).max() < 2


def test_high_quality_is_the_mean_of_two_by_two():
    image = noise(97, 131)
    for matrix_33 in views(Augment(), 5, 97, 131, 80):
        fine = oracle(image, matrix_33, 80, "reflect").reshape(40, 2, 40, 2, 3).mean(axis=(1, 3))
        assert np.abs(warped(image, matrix_33, 40, points=2) - fine).max() < 0.05


@pytest.mark.parametrize("along", [0, 1])
def test_positions_in_long_images_are_right_to_a_hundredth_of_a_pixel(along):
    """A sawtooth: a hundredth of a pixel is a hundredth of 10 grey levels."""
    teeth = np.abs(np.arange(10_000) % 50 - 25) * 10
    image = np.tile(teeth[:, None, None], (1, 300, 3)).astype(np.uint8)
    image = np.ascontiguousarray(image.swapaxes(0, along))
    start_x, start_y = (50, 9_000) if along == 0 else (9_000, 50)
    for tilt in (0, 1e-4):
        matrix_33 = np.array([[0.7, 0.1, start_x], [0.1, 0.7, start_y], [tilt, 0, 1]])
        assert np.abs(warped(image, matrix_33, 200) - oracle(image, matrix_33, 200, "reflect")).max() < 0.1


def test_maps_that_leave_every_image_read_none_of_it():
    """Infinities and what is not a number: whatever comes out, the process lives."""
    image = noise(97, 131)
    for matrix_33 in (np.zeros((3, 3)), np.full((3, 3), np.nan), np.diag([1e30, 1e30, 1e-30]), np.diag([1, 1, 0.0])):
        for padding in BORDERS:
            warped(image, matrix_33, 64, padding)


@pytest.mark.parametrize("end", [False, True])
def test_not_a_byte_outside_an_image_is_read(end):
    """Between two pages that nobody may touch, at the start or the end of its own, all of it is read."""
    page = mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, 3 * page), np.uint8)
    protect = ctypes.CDLL(None).mprotect
    for first in (0, 2 * page):
        assert protect(ctypes.c_void_p(memory.ctypes.data + first), ctypes.c_size_t(page), 0) == 0
    width = page // 3 // 10
    start = 2 * page - 30 * width if end else page
    image = memory[start : start + 30 * width].reshape(10, width, 3)
    image[:] = noise(10, width)
    for padding in BORDERS:
        for matrix_33 in (np.diag([width / 64, 10 / 64, 1]), np.diag([width / 32, 10 / 32, 1])):
            expected = oracle(image, matrix_33, 64, padding)
            assert np.abs(warped(image, matrix_33, 64, padding) - expected).max() < 0.25
