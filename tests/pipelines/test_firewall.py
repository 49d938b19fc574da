"""Each bad file is named, each good file passes with the size that Pillow shows it in."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from pipelines.firewall import MAX_BYTES, Decoded, Refused, examine, read_header
from tests.hostile import EXIF_ORIENTATION, bad_files, encoded, good_files, late_exif_png, picture, promise

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hostile():
    return bad_files()


def test_bad_files_are_named_and_good_files_among_them_pass(tmp_path, hostile):
    good = good_files()
    for name, content in good.items() | {name: content for name, (content, _) in hostile.items()}.items():
        (tmp_path / name).write_bytes(content)
    # Sorted, good and bad alternate in every batch; ten copies of the good make several batches of them.
    names = sorted([*good, *hostile]) + sorted(good) * 10
    steps = []

    verdicts = examine([str(tmp_path / name) for name in names], progress=lambda *step: steps.append(step))

    for name, verdict in zip(names, verdicts, strict=True):
        if name in good:
            assert isinstance(verdict, Decoded), (name, verdict)
            assert sorted((verdict.height, verdict.width)) == [40, 60]
            assert verdict.transparent == ("clear" in name), name
        else:
            assert isinstance(verdict, Refused), name
            assert hostile[name][1] in verdict.reason
            assert "\n" not in verdict.reason
            assert len(verdict.reason) < 350
            assert verdict.lasting == ("the limit of" not in verdict.reason)
    formats = {name: verdict.format for name, verdict in zip(names, verdicts, strict=True) if name in good}
    assert formats["png.jpg"] == "PNG"
    assert formats["stereo.jpg"] == "JPEG"
    assert {formats["web.webp"], formats["lzw.tif"], formats["bits.bmp"]} == {"WEBP", "TIFF", "BMP"}
    assert steps[-1] == (len(names), len(names))
    assert len(steps) > 1
    assert steps == sorted(steps)


def test_the_hash_is_that_of_the_file(tmp_path):
    # sha256sum of these very bytes
    (tmp_path / "a.bmp").write_bytes(encoded(Image.new("RGB", (2, 2)), "BMP"))
    (verdict,) = examine([str(tmp_path / "a.bmp")])
    sum256 = subprocess.run(["sha256sum", tmp_path / "a.bmp"], capture_output=True, text=True, check=True).stdout
    assert verdict.hash.hex() == sum256[:32]


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_damage_that_the_decoder_passes_over_in_silence_or_aloud_is_told_from_none(tmp_path, form):
    """Bits are flipped at twenty places: whatever libjpeg or libtiff notices is refused, and no whole file is."""
    whole = encoded(picture(200, 150), form, **({"compression": "tiff_deflate"} if form == "TIFF" else {}))
    files = []
    for at in range(400, len(whole) - 400, len(whole) // 20):
        (tmp_path / f"{at}").write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        (tmp_path / f"{at} whole").write_bytes(whole)
        files += [str(tmp_path / f"{at}"), str(tmp_path / f"{at} whole")]
    verdicts = examine(files)
    assert all(isinstance(verdict, Decoded) for verdict in verdicts[1::2])
    refused = [file for file, verdict in zip(files, verdicts, strict=True) if isinstance(verdict, Refused)]
    broken = [file for file in files if not loads(file)]
    assert set(broken) <= set(refused)
    assert len(refused) > 5
    if form == "TIFF":  # whose streams have checksums
        assert broken == files[::2]


def loads(file):
    try:
        Image.open(file).load()
    except OSError:
        return False
    return True


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
        "    assert [hasattr(verdict, 'reason') for verdict in verdicts] == [True, False, True, False] * 20"
    )
    files = [str(tmp_path / name) for name in (bad[0], "good.png", bad[1], "good.png")]
    run = subprocess.run([sys.executable, "-c", code, *files], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_and_displayed_size(tmp_path, form):
    files, shown = [], []
    for orientation in range(10):  # 0 and 9 mean nothing
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        path = tmp_path / f"{orientation}.{form.lower()}"
        picture(50, 30).save(path, form, exif=exif)
        files.append(str(path))
        with Image.open(path) as image:
            shown.append(ImageOps.exif_transpose(image).size)
    verdicts = examine(files)
    assert [(verdict.width, verdict.height) for verdict in verdicts] == shown
    assert [verdict.orientation for verdict in verdicts] == [1, *range(1, 9), 1]
    assert len(set(shown)) == 2


def test_orientation_behind_the_pixels_and_in_xmp_alone(tmp_path):
    # The decoder heeds the first and not the second: the size shows it.
    (tmp_path / "late.png").write_bytes(late_exif_png(6))
    xmp = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    (tmp_path / "xmp.jpg").write_bytes(encoded(picture(), "JPEG", xmp=xmp))
    late, xmp = examine([str(tmp_path / "late.png"), str(tmp_path / "xmp.jpg")])
    assert (late.orientation, late.width, late.height) == (6, 40, 60)
    assert (xmp.orientation, xmp.width, xmp.height) == (1, 60, 40)


def test_limit_on_pixels_is_the_callers(tmp_path):
    picture(60, 40).save(tmp_path / "a.png")
    (verdict,) = examine([str(tmp_path / "a.png")], max_pixels=60 * 40 - 1)
    assert "60 x 40" in verdict.reason
    (verdict,) = examine([str(tmp_path / "a.png")], max_pixels=60 * 40)
    assert isinstance(verdict, Decoded)


def test_a_limit_above_pillows_own_holds(tmp_path):
    # Image.open refuses 180 megapixels; here the pixels are missing, so DALI is what says no.
    (tmp_path / "a.png").write_bytes(promise(18_000, 10_000))
    (verdict,) = examine([str(tmp_path / "a.png")], max_pixels=200_000_000)
    assert "pixels cannot be decoded" in verdict.reason


def test_a_file_too_large_to_hold_is_not_read(tmp_path):
    with open(tmp_path / "a.jpg", "wb") as file:
        file.write(encoded(picture(), "JPEG"))
        file.truncate(MAX_BYTES + 1)  # a hole: it takes no room on the disk
    (verdict,) = examine([str(tmp_path / "a.jpg")])
    assert verdict.reason == "the file has 1,073,741,825 bytes, more than the limit of 1,073,741,824"


def unreadable(why):
    return Refused(reason=f"the file cannot be read: {why}", lasting=False)


def test_unreadable_file():
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        picture().save(f"{folder}/a.jpg")
        os.chmod(f"{folder}/a.jpg", 0)
        if root:  # who may read everything: be nobody for a moment
            os.seteuid(65_534)
        try:
            assert examine([f"{folder}/a.jpg"]) == [unreadable("Permission denied")]
            assert read_header(f"{folder}/a.jpg") == unreadable("Permission denied")
        finally:
            if root:
                os.seteuid(0)


def test_vanished_file_and_no_files(tmp_path):
    assert examine([str(tmp_path / "gone.jpg")]) == [unreadable("No such file or directory")]
    assert examine([]) == []


@pytest.fixture
def hostile_files(tmp_path, hostile):
    """Where each bad file lies, by name."""
    for name, (content, _) in hostile.items():
        (tmp_path / name).write_bytes(content)
    return {name: str(tmp_path / name) for name in hostile}


def python(code, files):
    """Code that runs in a process of its own, whose error stream it may spoil."""
    return subprocess.run([sys.executable, "-c", code, *files], cwd=ROOT, capture_output=True, text=True, check=True)


def test_nothing_is_printed_and_stderr_works_afterwards(hostile_files):
    code = (
        "import os, sys; from pipelines.firewall import examine\n"
        "verdicts = examine(sys.argv[1:])\n"
        "assert all(hasattr(verdict, 'reason') for verdict in verdicts)\n"
        "os.write(2, b'still here')"
    )
    run = python(code, hostile_files.values())
    assert (run.stdout, run.stderr) == ("", "still here")


def test_bad_files_are_named_where_the_error_stream_broke_before(hostile, hostile_files):
    code = (
        "import os, sys; from pipelines.firewall import examine; from pipelines.decode import decoded\n"
        "saved = os.dup(2)\n"
        "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)\n"
        "decoded(sys.argv[1])\n"  # std::cerr fails here, and for good
        "os.dup2(saved, 2)\n"
        "print(*(verdict.reason for verdict in examine(sys.argv[2:])), sep='\\n')"
    )
    run = python(code, [hostile_files["flipped.tif"], *hostile_files.values()])
    for said, (_, words) in zip(run.stdout.splitlines(), hostile.values(), strict=True):
        assert words in said


def test_stderr_is_restored_when_progress_raises(tmp_path, capfd):
    picture().save(tmp_path / "a.jpg")

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examine([str(tmp_path / "a.jpg")] * 1000, progress=interrupt)
    os.write(2, b"still here")
    assert capfd.readouterr().err == "still here"
