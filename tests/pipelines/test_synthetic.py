"""The embedded data set: reproducible, complete or absent, and fine enough to feel every interpolation."""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines import synthetic
from pipelines.errors import UserError
from pipelines.synthetic import BREEDS, breeds, portrait

PER_BREED = 6  # pictures measured for the spectrum
TURNS = np.arange(8) * np.pi / 8
PERIODS = (4.8, 5.2, 6.3)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return breeds(tmp_path_factory.mktemp("cache"), classes=4, per_class=3, seed=5)


def _contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- pictures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("breed", "number", "shape", "means_3", "detail"),
    [
        (0, 1, (400, 400, 3), (141.29, 107.41, 78.91), 5.79),
        (7, 2, (640, 480, 3), (123.91, 109.59, 73.55), 6.23),
    ],
)
def test_the_paint_is_that_of_this_version(breed, number, shape, means_3, detail):
    # Means, not a hash: the last bit of a sine may differ between processors. If this fails on purpose,
    # raise synthetic.VERSION along with the numbers.
    pixels_HW3 = portrait(breed, number).pixels_HW3
    assert synthetic.VERSION == 1
    assert pixels_HW3.shape == shape
    np.testing.assert_allclose(pixels_HW3.mean((0, 1)), means_3, atol=0.05)
    assert np.abs(np.diff(pixels_HW3.astype(int), axis=1)).mean() == pytest.approx(detail, abs=0.02)


def test_a_picture_is_the_same_made_alone_or_in_a_set(small, tmp_path):
    larger = _contents(breeds(tmp_path, classes=5, per_class=4, seed=5))
    contents = _contents(small)
    assert contents.items() <= larger.items()
    synthetic._save(tmp_path, 2, 3, seed=5)
    assert (tmp_path / "Frost_Spitz_3.jpg").read_bytes() == contents["Frost_Spitz_3.jpg"]


def test_threads_do_not_mix_their_numbers():
    jobs = [(breed, 1) for breed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda job: portrait(*job).pixels_HW3, reversed(jobs)))
    for job, pixels_HW3 in zip(reversed(jobs), together, strict=True):
        np.testing.assert_array_equal(portrait(*job).pixels_HW3, pixels_HW3)


def test_seed_breed_and_number_each_change_the_picture():
    assert len({portrait(*key).pixels_HW3.tobytes() for key in [(0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0)]}) == 4


def test_what_jpeg_and_exif_make_of_a_picture_is_still_that_picture(tmp_path):
    turned = []
    for number in range(1, 200):
        rng = np.random.default_rng([0, 3, number])
        if rng.random() < 0.09:
            synthetic._save(tmp_path, 3, number, seed=0)
            with Image.open(tmp_path / f"Drift_Spitz_{number}.jpg") as image:
                turned.append(image.getexif()[0x0112])
                upright_HW3 = np.asarray(ImageOps.exif_transpose(image), np.float32)
            difference = upright_HW3 - portrait(3, number).pixels_HW3
            assert np.abs(difference).mean() < 6
        if set(turned) == {3, 6, 8}:
            break
    assert set(turned) == {3, 6, 8}


def test_sizes_are_mixed():
    sizes = [portrait(breed, 1).pixels_HW3.shape[:2] for breed in range(12)]
    assert any(h > w for h, w in sizes)
    assert any(w > h for h, w in sizes)
    assert len(set(sizes)) >= 4
    assert all(min(size) >= 330 and max(size) <= 640 for size in sizes)


# --- the folder -----------------------------------------------------------------------------------------


def test_counts_and_layout(small):
    assert small.name == "breeds-v1-4x3-seed5"
    names = sorted(file.name for file in small.iterdir())
    classes = [re.sub(r"_\d+\.jpg$", "", name) for name in names]
    assert {name: classes.count(name) for name in classes} == {breed.name: 3 for breed in BREEDS[:4]}
    for name in names:
        with Image.open(small / name) as image:
            assert image.format == "JPEG"
            assert image.mode == "RGB"


def test_a_complete_folder_is_returned_untouched(small):
    def stamps():
        return {file.name: file.stat().st_mtime_ns for file in [small, *small.iterdir()]}

    before = stamps()
    assert breeds(small.parent, classes=4, per_class=3, seed=5) == small
    assert stamps() == before


def test_an_interrupted_making_leaves_nothing_usable(tmp_path, monkeypatch):
    save = synthetic._save

    def interrupted(folder, breed, number, seed):
        if number == 2:
            raise KeyboardInterrupt
        save(folder, breed, number, seed)

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            breeds(tmp_path, classes=2, per_class=2)
    assert list(tmp_path.iterdir()) == []
    assert len(list(breeds(tmp_path, classes=2, per_class=2).iterdir())) == 4


def test_a_killed_maker_leaves_nothing_that_is_taken_for_a_data_set(tmp_path):
    code = f"from pipelines.synthetic import breeds; breeds({os.fspath(tmp_path)!r}, classes=2, per_class=500)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(synthetic.__file__).parents[1]) as maker:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".breeds*/*/*.jpg")) and time.monotonic() < deadline:
            time.sleep(0.02)
        maker.kill()
    assert list(tmp_path.glob(".breeds*/*/*.jpg"))
    assert not list(tmp_path.glob("breeds*"))


def test_two_makers_at_once_agree(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: breeds(tmp_path, classes=2, per_class=2), range(2))
    assert first == second
    assert [entry.name for entry in tmp_path.iterdir()] == ["breeds-v1-2x2-seed0"]
    assert len(list(first.iterdir())) == 4


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("ONEWARP_CACHE", raising=False)
    folders = [breeds(classes=2, per_class=1)]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folders.append(breeds(classes=2, per_class=1))
    monkeypatch.setenv("ONEWARP_CACHE", str(tmp_path / "own"))
    folders.append(breeds(classes=2, per_class=1))
    folders.append(breeds(tmp_path / "given", classes=2, per_class=1))
    places = ["home/.cache/onewarp", "xdg/onewarp", "own", "given"]
    assert [folder.parent for folder in folders] == [tmp_path / place for place in places]


@pytest.mark.parametrize("wrong", [{"classes": 1}, {"classes": 13}, {"per_class": 0}, {"seed": -1}, {"seed": 2**63}])
def test_wrong_counts_are_named(tmp_path, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        breeds(tmp_path, **wrong)


def test_a_cache_that_is_a_file_is_named(tmp_path):
    place = tmp_path / "file"
    place.write_text("")
    with pytest.raises(UserError, match=f"{re.escape(os.fspath(place))}.*ONEWARP_CACHE"):
        breeds(place, classes=2, per_class=1)


# --- what tells twins apart -----------------------------------------------------------------------------


def _read(image, times):
    """The central square at 224 x 224, interpolated once or four times; the same geometry either way."""
    side, bilinear = min(image.size), Image.Resampling.BILINEAR
    left, top = (image.width - side) / 2, (image.height - side) / 2
    if times == 1:
        step = side / 224
        return image.transform((224, 224), Image.Transform.AFFINE, (step, 0, left, 0, step, top), bilinear)
    square = image.resize((460, 460), bilinear, box=(left, top, left + side, top + side))
    return square.resize((224, 224), bilinear).rotate(7, bilinear).rotate(-7, bilinear)


def _weave(picture, times):
    """Energy of the coat by period and by angle to the hair, [periods, turns], in squared grey levels.

    A bank of one-sided Gaussian filters on the frequency plane: the squared modulus of a response is a
    local energy, and it is filed under the angle between the filter and the hair there.
    """
    grey_HW = np.asarray(_read(Image.fromarray(picture.pixels_HW3).convert("L"), times), float)
    fur_HW = np.asarray(_read(Image.fromarray(picture.fur_HW.astype(np.float32)), 1)) > 0.999
    y, x = np.mgrid[-1:1:224j, -1:1:224j]
    fur_HW &= np.hypot(x, y) < 0.95  # the rotations of the chain lose the corners
    cos2_HW, sin2_HW = (np.asarray(_read(Image.fromarray(part), 1)) for part in picture.flow_2HW)
    hair = np.arctan2(sin2_HW, cos2_HW)[fur_HW] / 2

    spectrum = np.fft.fft2(grey_HW - grey_HW.mean())
    fy, fx = np.meshgrid(np.fft.fftfreq(224), np.fft.fftfreq(224), indexing="ij")
    energy, n = np.zeros((len(PERIODS), len(TURNS))), len(TURNS)
    for i, period in enumerate(PERIODS):
        f = 375 / 224 / period  # cycles per pixel of the small picture
        for turn in TURNS:
            distance2 = (fx - f * np.cos(turn)) ** 2 + (fy - f * np.sin(turn)) ** 2
            local_HW = np.abs(np.fft.ifft2(spectrum * np.exp(-distance2 / (2 * (0.13 * f) ** 2)))) ** 2
            bins = np.round((turn - hair) / (np.pi / n)).astype(int) % n
            energy[i] += np.bincount(bins, local_HW[fur_HW], n) / np.bincount(bins, minlength=n).clip(1)
    return energy / n


def _design(breed):
    """Where the energy of a breed's weave should lie, [periods, turns], unit sum."""
    ring = np.exp(-((np.array(PERIODS) / breed.period - 1) ** 2) / (2 * 0.1**2))
    angles = np.deg2rad(breed.threads)[:, None]
    lobes = np.exp(10 * (np.cos(2 * (TURNS - angles)) - 1)).sum(0) if breed.threads else np.ones(len(TURNS))
    return ring[:, None] / ring.sum() * lobes / lobes.sum()


@pytest.mark.parametrize("first", range(0, 12, 2), ids=[breed.name for breed in BREEDS[::2]])
def test_twins_differ_where_they_should_and_four_interpolations_wash_it_out(first):
    assert BREEDS[first].look is BREEDS[first + 1].look
    difference = _design(BREEDS[first]) - _design(BREEDS[first + 1])
    score_2N2 = np.array(
        [
            [[(_weave(picture, times) * difference).sum() for times in (1, 4)] for picture in pictures]
            for pictures in ([portrait(breed, n) for n in range(1, PER_BREED + 1)] for breed in (first, first + 1))
        ]
    )
    apart_2 = score_2N2[0].mean(0) - score_2N2[1].mean(0)
    standard_error_2 = np.sqrt((score_2N2.var(1, ddof=1) / PER_BREED).sum(0))
    assert apart_2[0] > 3 * standard_error_2[0]
    assert apart_2[1] < apart_2[0] / 3
