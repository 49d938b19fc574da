"""What a person is shown before training is what training does."""

import shutil

import numpy as np
import pytest
from PIL import Image

from pipelines import Augment, Loader, Regex, UserError, preview, scan
from pipelines.geometry import UNIFORMS, draw
from pipelines.plan import uniforms

SIZE = 64


@pytest.fixture(scope="module")
def manifest(lossless_set):
    return scan(lossless_set)


def test_one_image_is_shown_as_its_epochs_show_it(manifest):
    position = 17
    pictures, titles = preview.same_pictures(manifest.train, position, size=SIZE, seed=3, count=4)
    loader = Loader(manifest.train, size=SIZE, global_batch=53, seed=3, augment=Augment())
    for epoch in range(4):
        batch = next(loader.epoch(epoch))
        at = batch.ids_N.tolist().index(manifest.train.ids_N[position])
        assert np.array_equal(pictures[epoch], loader.pictures(batch)[at])
        assert titles[epoch] == f"{manifest.train.paths[position].split('/')[1]}, epoch {epoch}"
    assert len({picture.tobytes() for picture in pictures}) == 4


def test_a_batch_is_the_first_of_training(manifest):
    pictures, titles = preview.batch_pictures(manifest.train, size=SIZE, seed=1, count=16)
    loader = Loader(manifest.train, size=SIZE, global_batch=16, seed=1, augment=Augment())
    batch = next(loader.epoch(0))
    assert np.array_equal(pictures, loader.pictures(batch))
    assert titles == [manifest.classes[label] for label in batch.labels_N]


def test_a_neutral_draw_is_interpolated_once():
    rng = np.random.default_rng(0)
    image_HWC = rng.integers(0, 256, (90, 130, 3), dtype=np.uint8)
    neutral = draw(None, np.zeros((1, UNIFORMS)))
    resized = np.asarray(Image.fromarray(image_HWC).resize((60, 60), Image.Resampling.BILINEAR, box=(20, 0, 110, 90)))
    picture, interpolations = preview.repeat(image_HWC, neutral, 60)
    assert interpolations == 1
    assert np.array_equal(picture, resized)
    # A flip moves whole pixels: no further interpolation, and the mirror image to the last bit.
    flip = draw(
        Augment(flip=1, max_rotate=0, max_zoom=1, max_warp=0, min_scale=1, max_lighting=0),
        np.full((1, UNIFORMS), 0.5),
    )
    picture, interpolations = preview.repeat(image_HWC, flip, 60)
    assert interpolations == 1
    assert np.array_equal(picture, resized[:, ::-1])


def test_the_two_ways_show_the_same_scene_and_one_warp_keeps_more_of_it(tmp_path):
    """Without detail both ways agree; of fine detail the chain loses the greater part."""
    rng = np.random.default_rng(5)
    for i in range(8):
        folder = tmp_path / f"{'ab'[i % 2]}"
        folder.mkdir(exist_ok=True)
        smooth = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(
            (150, 110), Image.Resampling.BICUBIC
        )
        smooth.save(folder / f"smooth{i}.png")
        noise_HWC = rng.normal(0, 25, (110, 150, 1))
        Image.fromarray((np.asarray(smooth) * 0.6 + 50 + noise_HWC).clip(0, 255).astype(np.uint8)).save(
            folder / f"fine{i}.png"
        )
    samples = scan(tmp_path, valid_fraction=0.1).train
    seen = 0
    for position, path in enumerate(samples.paths):
        pair = preview.compare(samples, position, size=100, seed=0)
        drawn = draw(Augment(), uniforms(0, 0, samples.ids_N[[position]], UNIFORMS))
        moved = [drawn.angle_N[0] != 0, drawn.zoom_N[0] != 1, bool(drawn.warp_x_N[0] or drawn.warp_y_N[0])]
        assert pair.interpolations == 2 + sum(moved)  # the resize and the crop always
        inner = np.s_[15:-15, 15:-15]  # the border is mirrored by whole or by half pixels
        difference = np.abs(pair.once[inner].astype(float) - pair.repeated[inner]).mean()
        if "smooth" in path:
            assert difference < 1.5
        else:
            once, repeated = (
                np.abs(np.diff(p[inner].astype(float), axis=1)).mean() for p in (pair.once, pair.repeated)
            )
            assert repeated < 0.8 * once
        seen += 1
    assert seen > 10


def test_a_rectangle_is_compared_with_the_same_rectangle(manifest):
    """Without rotation and perspective both ways show the scene alike, however wide the crop."""
    resized = Augment(crop="resized", max_rotate=0, max_warp=0, max_zoom=1, min_scale=0.3)
    for position in range(20):
        pair = preview.compare(manifest.train, position, size=SIZE, seed=1, augment=resized)
        assert np.abs(pair.once.astype(float) - pair.repeated).mean() < 12


def test_details_are_of_the_same_window(manifest):
    pair = preview.compare(manifest.train, 5, size=SIZE, seed=0)
    small = pair.once_detail[::4, ::4]
    places = [
        (top, left)
        for top in range(SIZE - 15)
        for left in range(SIZE - 15)
        if np.array_equal(pair.once[top : top + 16, left : left + 16], small)
    ]
    assert places
    top, left = places[0]
    assert np.array_equal(pair.repeated[top : top + 16, left : left + 16], pair.repeated_detail[::4, ::4])


def told(manifest, labels="folder", image=None):
    lines, error = [], None
    try:
        for line in preview.summary(manifest, labels, image, size=SIZE, seed=0, batch=8):
            lines.append(line)
    except UserError as failure:
        error = str(failure)
    return "\n".join(lines), error


def test_the_summary_tells_the_whole_way(manifest):
    text, error = told(manifest, image="train/class2/005.png")
    assert error is None
    assert "header    PNG, RGB, 128 x 96" in text
    assert "decoded   96 x 128 x 3 (height, width, RGB), uint8 " in text and "EXIF orientation 1 applied" in text
    assert "'class2', 2 of 0–2; the name of its folder" in text
    assert "training, one of 53" in text
    assert "S·A·D" in text
    assert "1 x 3 x 64 x 64, float32" in text
    assert "8 x 3 x 64 x 64" in text


def test_a_validation_image_has_no_draw(manifest):
    text, error = told(manifest, image="valid/class1/001.png")
    assert error is None
    assert "validation reads the centred square" in text
    # The centred square of 131 x 97: 48.5 pixels to each side of the middle.
    assert "[    1.5156     0.0000     0.0000 ]" in text


def test_a_regular_expression_is_named(lossless_set, tmp_path):
    for i, path in enumerate(sorted((lossless_set / "train").rglob("*.png"))):
        shutil.copy(path, tmp_path / f"{path.parent.name}_{i}.png")
    labels = Regex(r"(.+)_\d+\.png$")
    text, error = told(scan(tmp_path, labels=labels), labels)
    assert error is None
    assert r"the first group of '(.+)_\\d+\\.png$'" in text


@pytest.mark.parametrize(
    ("damage", "step"),
    [
        (lambda path: path.write_bytes(b""), "header"),
        (lambda path: path.write_bytes(b"<html>not found</html>"), "header"),
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "pixels"),
        (lambda path: path.unlink(), "file"),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_summary_says_where_the_way_ends(lossless_set, tmp_path, damage, step, when):
    root = shutil.copytree(lossless_set, tmp_path / "set")
    image = "train/class0/003.png"
    if when == "before" and step != "file":
        damage(root / image)
    manifest = scan(root)
    if when == "after" or step == "file":
        damage(root / image)
    text, error = told(manifest, image=image)
    assert error is not None
    assert f"The way ends at the {step}" in error
    assert ("file " in text) == (step != "file")
    assert ("header" in text) == (step == "pixels")


def test_an_image_that_is_not_there(manifest):
    _, error = told(manifest, image="train/class0/nothing.png")
    assert "'train/class0/nothing.png' is not among the 53 images" in error
