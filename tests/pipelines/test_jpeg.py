"""Pillow is what the quick reader of JPEG headers must agree with, or leave to it."""

import io

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from pipelines.firewall import _orientation
from pipelines.jpeg import Plain, plain_header
from tests.conftest import picture


def jpeg(mode="RGB", **options):
    image = picture(np.random.default_rng(0), 37, 52).convert(mode)
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def exif(orientation, order="<"):
    entries = Image.Exif()
    entries.endian = order
    entries[0x0112] = orientation
    entries[0x0131] = "a program of a name that does not fit into four bytes"
    return entries


def by_pillow(encoded):
    image = JpegImageFile(io.BytesIO(encoded))
    return Plain(*image.size, _orientation(image, encoded))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_in_both_byte_orders(orientation, order):
    assert plain_header(jpeg(exif=exif(orientation, order))) == Plain(52, 37, orientation)


@pytest.mark.parametrize(
    "encoded",
    [
        jpeg(),
        jpeg("L"),
        jpeg(progressive=True),
        jpeg(comment=b"\xff\xd8 no image", icc_profile=b"\xff" * 70_000),
        jpeg(exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"),
        jpeg(exif=exif(6)) + b"rest",
    ],
)
def test_plain_files_are_read(encoded):
    assert plain_header(encoded) == by_pillow(encoded)


def segment(encoded, marker):
    """The first segment of this marker, whole."""
    at = encoded.index(marker)
    return encoded[at : at + 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")]


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"\xff\xd8",
        jpeg("CMYK"),
        jpeg(exif=exif(0)),
        jpeg(exif=exif(9)),
        jpeg(exif=b"Exif\0\0"),
        b"\xff\xd8" + segment(jpeg(exif=exif(3)), b"\xff\xe1") + jpeg(exif=exif(6))[2:],
        b"\xff\xd8" + segment(jpeg(), b"\xff\xc0") + jpeg()[2:],
        jpeg().replace(b"\xff\xdb", b"\xff\xff\xdb", 1),  # a fill byte
        jpeg().replace(b"\xff\xc0", b"\xff\xc3", 1),  # lossless
        jpeg().replace(b"\xff\xdb", b"\xff\xd8", 1),  # an image in the image
    ],
)
def test_what_takes_a_closer_look_is_left_to_pillow(encoded):
    assert plain_header(encoded) is None


def test_a_header_cut_off_anywhere_is_left_to_pillow():
    encoded = jpeg(exif=exif(6))
    start_of_scan = encoded.index(b"\xff\xda") + 4
    length = int.from_bytes(encoded[start_of_scan - 2 : start_of_scan], "big")
    assert all(plain_header(encoded[:end]) is None for end in range(start_of_scan + length - 2))
    assert plain_header(encoded[: start_of_scan + length - 2]) == Plain(52, 37, 6)


def test_where_bits_are_flipped_it_says_what_pillow_says_or_nothing():
    encoded = jpeg(exif=exif(6))
    rng, agreed = np.random.default_rng(1), 0
    for at in range(2, encoded.index(b"\xff\xda") + 8):
        for bit in rng.choice(8, 3, replace=False):
            flipped = bytearray(encoded)
            flipped[at] ^= 1 << bit
            found = plain_header(bytes(flipped))
            if found is not None:
                try:
                    expected = by_pillow(bytes(flipped))
                except (OSError, SyntaxError):  # Pillow refuses it, and the decoder has the last word
                    continue
                assert found == expected, (at, bit)
                agreed += 1
    assert agreed > 100


def test_photographs(photos):
    files = sorted(photos.rglob("*.jpg"))[::20]
    read = [(plain_header(file.read_bytes()), by_pillow(file.read_bytes())) for file in files]
    assert all(found in (None, expected) for found, expected in read)
    assert sum(found is not None for found, _ in read) > 0.9 * len(read)
