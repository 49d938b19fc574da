"""Files as people really have them: unusual ones that must be read right, broken ones that must be named."""

from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

EXIF_ORIENTATION = 0x0112
HEIGHT, WIDTH = 40, 60  # of every good file, as stored


def picture(width: int = WIDTH, height: int = HEIGHT, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Noise: it hardly compresses, so that a cut or a flipped bit hits pixels."""
    pixels_HWC = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels_HWC).convert(mode)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(header: bytes, data: bytes) -> bytes:
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(data)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def promise(width: int, height: int) -> bytes:
    """A PNG that promises width x height pixels and has hardly any."""
    return png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"\0" * 99)


def deep_png(pixels_HWC: np.ndarray) -> bytes:
    """Sixteen bits a channel, which Pillow writes for grey alone: uint16 [H, W, 3 or 4]."""
    height, width, channels = pixels_HWC.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels_HWC)
    return png(struct.pack(">IIBBBBB", width, height, 16, 2 if channels == 3 else 6, 0, 0, 0), rows)


def deep_pixels(channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 65_536, (HEIGHT, WIDTH, channels)).astype(np.uint16)


def translucent(seed: int = 0) -> Image.Image:
    """RGBA with colour under its transparent pixels."""
    image = picture(seed=seed)
    image.putalpha(picture(seed=seed + 1, mode="L"))
    return image


def turned(orientation: int, form: str, seed: int = 0) -> bytes:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    # A lossy WebP: DALI's parser (2.4) loses its way behind a chunk of odd length, which lossless ones may have.
    return encoded(picture(seed=seed), form, exif=exif)


def late_exif_png(orientation: int, seed: int = 0) -> bytes:
    """A PNG whose EXIF chunk stands behind its pixels, as the format allows."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    whole = encoded(picture(seed=seed), "PNG")
    return whole[:-12] + png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + whole[-12:]


def good_files(seed: int = 0) -> dict[str, bytes]:
    """By name; every one of 60 x 40 pixels as stored."""
    plain = picture(seed=seed)
    palette = plain.convert("P", palette=Image.Palette.ADAPTIVE)
    return {
        "plain.jpg": encoded(plain, "JPEG"),
        "progressive.jpg": encoded(plain, "JPEG", progressive=True),
        "grey.jpg": encoded(plain.convert("L"), "JPEG"),
        "cmyk.jpg": encoded(plain.convert("CMYK"), "JPEG"),
        "stereo.jpg": encoded(plain, "MPO", save_all=True, append_images=[picture(seed=seed + 1)]),
        "png.jpg": encoded(plain, "PNG"),
        "grey.png": encoded(plain.convert("L"), "PNG"),
        "one bit.png": encoded(plain.convert("1"), "PNG"),
        "palette.png": encoded(palette, "PNG"),
        "clear palette.png": encoded(palette, "PNG", transparency=bytes(range(256))),
        "clear.png": encoded(translucent(seed), "PNG"),
        "clear.webp": encoded(translucent(seed), "WEBP", lossless=True, exact=True),
        "clear.tif": encoded(translucent(seed), "TIFF"),
        "deep grey.png": encoded(Image.fromarray(deep_pixels(1, seed)[..., 0]), "PNG"),
        "deep.png": deep_png(deep_pixels(3, seed)),
        "deep clear.png": deep_png(deep_pixels(4, seed)),
        "deep grey.tif": encoded(Image.fromarray(deep_pixels(1, seed)[..., 0]), "TIFF"),
        "web.webp": encoded(plain, "WEBP"),
        "bits.bmp": encoded(plain, "BMP"),
        "raw.tif": encoded(plain, "TIFF"),
        "lzw.tif": encoded(plain, "TIFF", compression="tiff_lzw"),
        "deflate.tif": encoded(plain, "TIFF", compression="tiff_deflate"),
        "cmyk.tif": encoded(plain.convert("CMYK"), "TIFF"),
        "late exif.png": late_exif_png(6, seed),
        **{f"turned {turn}.jpg": turned(turn, "JPEG", seed) for turn in range(1, 9)},
        'a "quoted"\nname \'s.jpg': encoded(plain, "JPEG", quality=90),
        "naïve 画像.jpg": encoded(plain, "JPEG", quality=91),
        os.fsdecode(b"latin-\xe9.jpg"): encoded(plain, "JPEG", quality=92),
    }


def bad_files(seed: int = 0) -> dict[str, tuple[bytes, str]]:
    """By name: the bytes, and words of the reason that must be given."""
    jpeg, png, webp = (encoded(picture(400, 300, seed), form) for form in ("JPEG", "PNG", "WEBP"))
    tiff, deflated = (encoded(picture(400, 300, seed), "TIFF", compression=kind) for kind in ("raw", "tiff_deflate"))
    progressive = encoded(picture(400, 300, seed), "JPEG", progressive=True)
    return {
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"a shopping list\n", "not an image: it starts with 'a shopping list"),
        "page.jpg": (b"<html><body>404", "not an image: it starts with '<html><body>404'"),
        "header cut.jpg": (jpeg[:100], "JPEG header is damaged"),
        "pixels cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "last bytes cut.jpg": (jpeg[:-2], "truncated"),
        "pixels cut.png": (png[: len(png) // 2], "truncated"),
        "cut.webp": (webp[: len(webp) // 2], "WEBP header is damaged"),
        "cut.tif": (tiff[: len(tiff) // 2], "truncated"),
        # The decoder makes up the rest of these three, and says so on its error output alone.
        "flipped.jpg": (flipped(jpeg, b"\xff\xd9"), "pixels are damaged: Corrupt JPEG data"),
        "flipped progressive.jpg": (flipped(progressive, b"\xff\xd9"), "pixels are damaged: Corrupt JPEG data"),
        "flipped.tif": (flipped(deflated), "pixels cannot be decoded"),
        "unknown marker.jpg": (flipped(jpeg, b"\xff\x10"), "pixels cannot be decoded"),
        "flipped.png": (flipped(png), "pixels cannot be decoded"),
        "bomb.png": (promise(65_000, 65_000), "65000 x 65000 pixels, more than the limit of 100 megapixels"),
        "over the limit.png": (promise(10_001, 10_000), "10001 x 10000 pixels, more than the limit"),
        "no pixels.png": (promise(300, 200), "pixels cannot be decoded"),
        "gif.jpg": (encoded(picture(seed=seed), "GIF"), "GIF is not supported"),
        "drawing.svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG is not supported"),
        "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC is not supported"),
        "dot.png": (encoded(picture(1, 1, seed), "PNG"), "1 x 1 pixels"),
        "line.png": (encoded(picture(2000, 1, seed), "PNG"), "2000 x 1 pixels"),
        "strip.png": (encoded(picture(505, 5, seed), "PNG"), "more than 100 times"),
        # Pillow reads one bit to a pixel in TIFF, DALI does not.
        "fax.tif": (encoded(picture(seed=seed, mode="1"), "TIFF"), "DALI cannot decode this TIFF though"),
    }


def flipped(whole: bytes, to: bytes | None = None) -> bytes:
    """The bits in the middle flipped, all of 16 bytes or until the bytes are `to`."""
    middle = len(whole) // 2
    to = bytes(byte ^ 0xFF for byte in whole[middle : middle + 16]) if to is None else to
    return whole[:middle] + to + whole[middle + len(to) :]


@dataclass(frozen=True, kw_only=True)
class Hostile:
    """A folder of two classes, with good and bad files side by side."""

    root: Path
    good: tuple[str, ...]
    """Relative paths, sorted."""
    bad: dict[str, str]
    """Words that the reason must hold, by relative path."""


def make_hostile_folder(root: Path, *, plain: int = 0, each: int = 3) -> Hostile:
    """Every case `each` times, no two files alike, among `plain` ordinary ones.

    A file that nobody may read is among them only where there is such a thing: root may read all.
    """
    good: list[str] = []
    bad: dict[str, str] = {}

    def place(name: str, number: int) -> str:
        folder = ("cat", "dog")[(len(good) + len(bad)) % 2]
        (root / folder).mkdir(parents=True, exist_ok=True)
        return f"{folder}/{number:03d} {name}"

    for number in range(each):
        for name, content in good_files(1000 + 2 * number).items():
            path = place(name, number)
            (root / path).write_bytes(content)
            good.append(path)
        for name, (content, words) in bad_files(1000 + 2 * number).items():
            path = place(name, number)
            (root / path).write_bytes(content)
            bad[path] = words
        path = place("folder.jpg", number)
        (root / path).mkdir()
        bad[path] = "a folder"
        path = place("nowhere.jpg", number)
        (root / path).symlink_to("gone.jpg")
        bad[path] = "a link to nowhere"
        path = place("loop.jpg", number)
        (root / path).symlink_to(Path(path).name)
        bad[path] = "symbolic links"
        if os.geteuid() != 0:
            path = place("secret.jpg", number)
            (root / path).write_bytes(encoded(picture(seed=number), "JPEG"))
            (root / path).chmod(0)
            bad[path] = "Permission denied"
    for number in range(plain):
        path = place("ordinary.jpg", number)
        (root / path).write_bytes(encoded(picture(seed=number, width=90), "JPEG"))
        good.append(path)
    return Hostile(root=root, good=tuple(sorted(good)), bad=bad)
