"""Each bad file is named, each good file passes with the size that Pillow shows it in."""

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines.firewall import Decoded, examine

ROOT = Path(__file__).parents[2]


def picture(width=60, height=40, seed=0, mode="RGB"):
    pixels_HWC = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels_HWC).convert(mode)


def png_header(width, height):
    """A PNG that promises width x height pixels and has hardly any."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def encoded(folder, name, image, form, **options):
    path = folder / name
    image.save(path, form, **options)
    return path.read_bytes()


@pytest.fixture
def hostile(tmp_path):
    """Bad files by name: their bytes, and a word of the reason."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    jpeg = encoded(scratch, "a.jpg", picture(400, 300), "JPEG")
    png = encoded(scratch, "a.png", picture(400, 300), "PNG")
    webp = encoded(scratch, "a.webp", picture(400, 300), "WEBP")
    tiff = encoded(scratch, "a.tif", picture(400, 300), "TIFF")
    return {
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"<html><body>404", "not an image: it starts with '<html><body>404'"),
        "header cut.jpg": (jpeg[:100], "JPEG header is damaged"),
        "pixels cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "last bytes cut.jpg": (jpeg[:-2], "truncated"),
        "pixels cut.png": (png[: len(png) // 2], "truncated"),
        "wrong checksum.png": (png[:5000] + b"\0\0\0" + png[5003:], "pixels cannot be decoded"),
        "cut.webp": (webp[: len(webp) // 2], "WEBP header is damaged"),
        "cut.tif": (tiff[: len(tiff) // 2], "truncated"),
        "bomb.png": (
            png_header(65_000, 65_000),
            "65000 x 65000 pixels, more than the limit of 100 megapixels",
        ),
        "no pixels.png": (png_header(300, 200), "pixels cannot be decoded"),
        "gif.jpg": (encoded(scratch, "a.gif", picture(), "GIF"), "GIF is not supported"),
        "drawing.svg": (
            b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
            "SVG is not supported",
        ),
        "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC is not supported"),
        "dot.png": (encoded(scratch, "dot.png", picture(1, 1), "PNG"), "1 x 1 pixels"),
        "line.png": (encoded(scratch, "line.png", picture(505, 5), "PNG"), "more than 100 times"),
        # Pillow reads one bit to a pixel in TIFF, DALI does not.
        "fax.tif": (
            encoded(scratch, "fax.tif", picture(mode="1"), "TIFF"),
            "DALI cannot decode this TIFF though",
        ),
    }


def good_files(folder):
    deep = np.random.default_rng(1).integers(0, 65_536, (40, 60)).astype(np.uint16)
    return {
        "plain.jpg": encoded(folder, "plain.jpg", picture(), "JPEG"),
        "progressive.jpg": encoded(folder, "progressive.jpg", picture(), "JPEG", progressive=True),
        "grey.jpg": encoded(folder, "grey.jpg", picture(mode="L"), "JPEG"),
        "cmyk.jpg": encoded(folder, "cmyk.jpg", picture(mode="CMYK"), "JPEG"),
        "stereo.jpg": encoded(folder, "stereo.jpg", picture(), "MPO", save_all=True, append_images=[picture(seed=1)]),
        "deep.png": encoded(folder, "deep.png", Image.fromarray(deep), "PNG"),
        "palette.png": encoded(folder, "palette.png", picture(mode="P"), "PNG"),
        "clear.png": encoded(folder, "clear.png", picture(mode="RGBA"), "PNG"),
        "png.jpg": encoded(folder, "png.jpg", picture(), "PNG"),
        "web.webp": encoded(folder, "web.webp", picture(), "WEBP"),
        "lzw.tif": encoded(folder, "lzw.tif", picture(), "TIFF", compression="tiff_lzw"),
        "bits.bmp": encoded(folder, "bits.bmp", picture(), "BMP"),
        'a "quoted"\nname \'s.jpg': encoded(folder, "quoted.jpg", picture(), "JPEG"),
        os.fsdecode(b"latin-\xe9.jpg"): encoded(folder, "latin.jpg", picture(), "JPEG"),
    }


def test_bad_files_are_named_and_good_files_among_them_pass(tmp_path, hostile):
    good = good_files(tmp_path / "scratch")
    folder = tmp_path / "images"
    folder.mkdir()
    for name, content in good.items() | {name: content for name, (content, _) in hostile.items()}.items():
        (folder / name).write_bytes(content)
    # Sorted, good and bad alternate in every batch; ten copies of the good make several batches of them.
    names = sorted([*good, *hostile]) + sorted(good) * 10
    steps = []

    verdicts = examine([str(folder / name) for name in names], progress=lambda *step: steps.append(step))

    for name, verdict in zip(names, verdicts, strict=True):
        if name in good:
            assert isinstance(verdict, Decoded), (name, verdict)
            assert (verdict.height, verdict.width) == (40, 60)
        else:
            assert isinstance(verdict, str), name
            assert hostile[name][1] in verdict
            assert "\n" not in verdict
            assert len(verdict) < 350
    formats = {name: verdict.format for name, verdict in zip(names, verdicts, strict=True) if name in good}
    assert formats["png.jpg"] == "PNG"
    assert formats["stereo.jpg"] == "JPEG"
    assert {formats["web.webp"], formats["lzw.tif"], formats["bits.bmp"]} == {"WEBP", "TIFF", "BMP"}
    assert steps[-1] == (len(names), len(names))
    assert len(steps) > 1
    assert steps == sorted(steps)


def test_headers_that_only_dali_rejects_do_not_kill_the_process(tmp_path, hostile):
    # They make DALI's decoder crash when they share a batch: see `_sizes`.
    bad = ["fax.tif", "pixels cut.png"]
    for name in bad:
        (tmp_path / name).write_bytes(hostile[name][0])
    picture(400, 300).save(tmp_path / "good.png")
    code = (
        "import sys; from pipelines.firewall import examine\n"
        "for _ in range(2):\n"
        "    verdicts = examine(sys.argv[1:] * 20)\n"
        "    assert [isinstance(verdict, str) for verdict in verdicts] == [True, False, True, False] * 20"
    )
    files = [str(tmp_path / name) for name in (bad[0], "good.png", bad[1], "good.png")]
    run = subprocess.run([sys.executable, "-c", code, *files], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_size_is_the_displayed_one_for_every_exif_orientation(tmp_path, form):
    files, shown = [], []
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{form.lower()}"
        picture(50, 30).save(path, form, exif=exif)
        files.append(str(path))
        with Image.open(path) as image:
            shown.append(ImageOps.exif_transpose(image).size)
    verdicts = examine(files)
    assert [isinstance(verdict, Decoded) and (verdict.width, verdict.height) for verdict in verdicts] == shown
    assert len(set(shown)) == 2


def test_limit_on_pixels_is_the_callers(tmp_path):
    picture(60, 40).save(tmp_path / "a.png")
    (verdict,) = examine([str(tmp_path / "a.png")], max_pixels=60 * 40 - 1)
    assert "60 x 40" in str(verdict)
    (verdict,) = examine([str(tmp_path / "a.png")], max_pixels=60 * 40)
    assert isinstance(verdict, Decoded)


def test_a_limit_above_pillows_own_holds(tmp_path):
    # Image.open refuses 180 megapixels; here the pixels are missing, so DALI is what says no.
    (tmp_path / "a.png").write_bytes(png_header(18_000, 10_000))
    (verdict,) = examine([str(tmp_path / "a.png")], max_pixels=200_000_000)
    assert "pixels cannot be decoded" in str(verdict)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    picture().save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").chmod(0)
    assert examine([str(tmp_path / "a.jpg")]) == ["the file cannot be read: Permission denied"]


def test_vanished_file_and_no_files(tmp_path):
    assert examine([str(tmp_path / "gone.jpg")]) == ["the file cannot be read: No such file or directory"]
    assert examine([]) == []


def test_nothing_is_printed_and_stderr_works_afterwards(tmp_path, hostile):
    for name, (content, _) in hostile.items():
        (tmp_path / name).write_bytes(content)
    code = (
        "import os, sys; from pipelines.firewall import examine\n"
        "verdicts = examine(sys.argv[1:])\n"
        "assert all(isinstance(verdict, str) for verdict in verdicts)\n"
        "os.write(2, b'still here')"
    )
    files = [str(tmp_path / name) for name in hostile]
    run = subprocess.run([sys.executable, "-c", code, *files], cwd=ROOT, capture_output=True, check=True)
    assert (run.stdout, run.stderr) == (b"", b"still here")


def test_stderr_is_restored_when_progress_raises(tmp_path, capfd):
    picture().save(tmp_path / "a.jpg")

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examine([str(tmp_path / "a.jpg")] * 1000, progress=interrupt)
    os.write(2, b"still here")
    assert capfd.readouterr().err == "still here"
