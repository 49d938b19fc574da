"""Each kind of file has, for the decoder of training, the pixels that another library shows it with."""

import cv2
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps

from pipelines.decode import decoded
from tests.hostile import deep_pixels, good_files, translucent, turned

GOOD = good_files()
DEEP = {"deep grey.png": 1, "deep grey.tif": 1, "deep.png": 3, "deep clear.png": 4}
CLEAR = ["clear.png", "clear.webp", "clear.tif"]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return write


def shown(path):
    """By Pillow, turned as its EXIF says."""
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("name", [name for name in GOOD if name not in DEEP and "clear" not in name])
def test_eight_bits_as_pillow_shows_them(write, name):
    path = write(name, GOOD[name])
    np.testing.assert_array_equal(decoded(path), shown(path))


@pytest.mark.parametrize("name", DEEP)
def test_sixteen_bits_are_divided_by_257_and_rounded(write, name):
    channels = DEEP[name]
    expected_HWC = np.round(deep_pixels(channels)[..., :3] / 257)
    np.testing.assert_array_equal(decoded(write(name, GOOD[name])), np.broadcast_to(expected_HWC, (40, 60, 3)))


@pytest.mark.parametrize("name", CLEAR)
def test_alpha_is_dropped_and_the_stored_colours_stay(write, name):
    stored_HW4 = np.asarray(translucent())
    assert (stored_HW4[..., 3] < 128).mean() > 0.3
    pixels_HW3 = decoded(write(name, GOOD[name]))
    np.testing.assert_array_equal(pixels_HW3, stored_HW4[..., :3])


def test_opencv_and_torchvision_drop_alpha_too(write):
    path = write("clear.png", GOOD["clear.png"])
    pixels_HW3 = decoded(path)
    np.testing.assert_array_equal(cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB), pixels_HW3)
    others_3HW = torchvision.io.decode_image(path, torchvision.io.ImageReadMode.RGB)
    assert torch.equal(others_3HW, torch.from_numpy(pixels_HW3).permute(2, 0, 1))


def test_a_palette_with_transparent_colours_keeps_them_all(write):
    opaque, clear = (write(name, GOOD[name]) for name in ("palette.png", "clear palette.png"))
    np.testing.assert_array_equal(decoded(clear), decoded(opaque))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_eight_orientations(write, form, orientation):
    path = write(f"a.{form.lower()}", turned(orientation, form))
    stored_HW3 = decoded(write("b", turned(1, form)))
    # What each value says of row 0 and column 0 (EXIF 2.32, table 6), as NumPy moves pixels.
    turn = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, -1),
        7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
        8: lambda p: np.rot90(p),
    }[orientation]
    np.testing.assert_array_equal(decoded(path), turn(stored_HW3))
    np.testing.assert_array_equal(decoded(path), shown(path))
