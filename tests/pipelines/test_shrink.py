"""The shrink: its formula written out, DALI's operator, torch's, and what must hold for any image."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def, types
from torchvision.transforms.v2 import functional

from pipelines.shrink import shrink

SIZES = [((61, 83), (40, 83)), ((61, 83), (61, 30)), ((90, 70), (45, 35)), ((128, 200), (9, 13)), ((33, 47), (1, 1))]


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def formula(image_HW3, height, width):
    """Float64 [height, width, 3]: every weight of every pixel, along one axis and then the other."""

    def along(length, shrunk):
        scale = length / shrunk
        matrix_SL = np.zeros((shrunk, length))
        for i in range(shrunk):
            centre = (i + 0.5) * scale
            reach = range(int(np.floor(centre - scale)) - 1, int(np.ceil(centre + scale)) + 1)
            weights = {j: max(0.0, 1 - abs(j + 0.5 - centre) / scale) for j in reach}
            for j, weight in weights.items():
                matrix_SL[i, min(max(j, 0), length - 1)] += weight / sum(weights.values())
        return matrix_SL

    rows, columns = along(len(image_HW3), height), along(image_HW3.shape[1], width)
    return np.einsum("sh,hwc,tw->stc", rows, image_HW3.astype(np.float64), columns)


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_it_is_its_formula_rounded_once(before, after):
    image_HW3 = noise(*before)
    small_HW3, exact_HW3 = shrink(image_HW3, *after), formula(image_HW3, *after)
    assert small_HW3.shape == (*after, 3) and small_HW3.dtype == np.uint8
    assert np.abs(small_HW3 - exact_HW3).max() < 0.5 + 1e-3


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_it_is_dalis_up_to_rounding(before, after):
    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def resized():
        image = fn.external_source(source=lambda: [noise(*before)], layout="HWC")
        return fn.resize(image, size=list(map(float, after)), interp_type=types.INTERP_LINEAR, antialias=True)

    pipeline = resized()
    pipeline.build()
    off_HW3 = np.abs(shrink(noise(*before), *after).astype(int) - np.asarray(pipeline.run()[0][0]))
    assert off_HW3.max() <= 1 and (off_HW3 > 0).mean() < 0.02


def test_it_is_torchs_where_no_edge_is_near():
    image_HW3 = noise(120, 160)
    theirs_CHW = functional.resize(torch.from_numpy(image_HW3).permute(2, 0, 1).float(), [48, 50], antialias=True)
    off_HW3 = np.abs(shrink(image_HW3, 48, 50) - theirs_CHW.permute(1, 2, 0).numpy())
    assert off_HW3[2:-2, 2:-2].max() < 0.5 + 1e-3


def test_what_is_even_stays_and_the_same_size_is_the_same_image():
    for level in (0, 1, 254, 255):
        assert (shrink(np.full((77, 91, 3), level, np.uint8), 50, 17) == level).all()
    image_HW3 = noise(20, 31)
    assert np.array_equal(shrink(image_HW3, 20, 31), image_HW3)


def test_mirrored_and_transposed_images_give_mirrored_and_transposed_ones():
    image_HW3 = noise(64, 96)
    small = shrink(image_HW3, 25, 37).astype(int)
    for mirror in (np.flipud, np.fliplr):
        turned = shrink(np.ascontiguousarray(mirror(image_HW3)), 25, 37)
        assert np.abs(mirror(turned) - small).max() <= 1  # sums in another order
    transposed = shrink(np.ascontiguousarray(image_HW3.transpose(1, 0, 2)), 37, 25)
    assert np.abs(transposed.transpose(1, 0, 2) - small).max() <= 1


def test_threads_and_memory_that_was_used_before_make_no_difference():
    images = [noise(50 + i, 60, i) for i in range(20)]
    expected = [shrink(image, 30, 31) for image in images]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda image: shrink(image, 30, 31), images))
    memory = np.full(4000, 7, np.uint8)
    for image, one, other in zip(images, expected, found, strict=True):
        assert np.array_equal(one, other)
        assert np.array_equal(one, shrink(image, 30, 31, memory))
