"""The header of a JPEG that has nothing unusual about it, read in a few microseconds.

Most files of most folders are such, and Pillow, whose word counts, takes four times as long for them, under the lock
that all threads share.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

_ORIENTATION = 0x0112  # of TIFF 6.0, in EXIF's first directory
_SHORT = 3
_BASELINE_TO_PROGRESSIVE = (0xC0, 0xC1, 0xC2)
_OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)


class Plain(NamedTuple):
    """What such a header says."""

    width: int
    """As stored."""
    height: int
    orientation: int
    """1 to 8, as EXIF counts."""


def plain_header(encoded: bytes) -> Plain | None:
    """Read segment by segment up to the pixels; `None` for whatever takes a closer look, or may be damaged.

    That is: anything but grey or three components of eight bits, coded baseline to progressive; fill bytes, segments
    that do not add up, several frames or EXIF segments, an orientation that is not one number of 1 to 8.
    """
    at, size, orientation = 2, None, None
    while True:
        segment = encoded[at : at + 4]
        if len(segment) < 4 or segment[0] != 0xFF:
            return None
        marker, length = segment[1], int.from_bytes(segment[2:], "big")
        if length < 2 or at + 2 + length > len(encoded):
            return None
        if marker == 0xDA:  # the pixels
            return None if size is None else Plain(*size, orientation or 1)
        if marker in _BASELINE_TO_PROGRESSIVE:
            if size is not None or length < 8:
                return None
            bits, height, width, components = struct.unpack_from(">BHHB", encoded, at + 4)
            if bits != 8 or components not in (1, 3) or length != 8 + 3 * components or not (height and width):
                return None
            size = width, height
        elif marker == 0xE1 and encoded.startswith(b"Exif", at + 4):
            if orientation is not None or not encoded.startswith(b"Exif\0\0", at + 4):
                return None
            orientation = _orientation(encoded[at + 10 : at + 2 + length])
            if orientation is None:
                return None
        elif marker in _OTHER_FRAMES or not 0xC0 <= marker <= 0xFE or 0xD0 <= marker <= 0xD9:
            return None
        at += 2 + length


def _orientation(tiff: bytes) -> int | None:
    """1 where the first directory says nothing of it; `None` where it may not be what it says."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 10:
        return None
    (first,) = struct.unpack_from(order + "I", tiff, 4)
    if first < 8 or first + 2 > len(tiff):
        return None
    (entries,) = struct.unpack_from(order + "H", tiff, first)
    if first + 2 + 12 * entries > len(tiff):
        return None
    found = []
    for at in range(first + 2, first + 2 + 12 * entries, 12):
        tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, at)
        if tag == _ORIENTATION:
            if kind != _SHORT or count != 1 or not 1 <= value <= 8:
                return None
            found.append(value)
    return found[0] if len(found) == 1 else None if found else 1
