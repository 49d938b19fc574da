import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from trainer import figures

# Names that mathtext, legends or layouts have choked on, and a very long one.
ODD_NAMES = ["$x_1", "_under_", "a$\\frac{$b", "100%", "", "two\nlines", "日本", "&<b>", "#tag", "long " * 40]


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def where(path, color, tolerance=0):
    """Median (row, column) of the pixels of `color` in the PNG at `path`, and how many there are."""
    rows, columns = np.nonzero((np.abs(pixels(path) - color) <= tolerance).all(axis=-1))
    return (np.median(rows), np.median(columns), len(rows)) if len(rows) else (None, None, 0)


def hex_rgb(color):
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]


def lr_curve():
    lrs = np.geomspace(1e-7, 1, 80)
    smoothed = 2.3 - 1.4 / (1 + np.exp(-3 * (np.log10(lrs) + 3)))
    losses = smoothed + np.random.default_rng(0).normal(0, 0.1, 80)
    losses[-2:] = np.nan, 1e9
    return lrs, losses, smoothed


def test_lr_find_marks_the_chosen_rate_on_the_curve(tmp_path):
    found = []
    for chosen in (1e-5, 1e-3):
        figures.plot_lr_find(tmp_path / "l.png", *lr_curve(), {"valley": 1e-5, "steep_$": 1e-3}, chosen)
        found.append(where(tmp_path / "l.png", hex_rgb(figures.ORANGE)))
    # The rate is on a log axis from 1e-7 to 1, the loss falls with it.
    width = pixels(tmp_path / "l.png").shape[1]
    assert found[1][1] - found[0][1] == pytest.approx(2 / 7 * width, rel=0.35)
    assert found[0][2] > 100


def test_lr_find_draws_a_choice_that_was_nobodys_suggestion(tmp_path):
    figures.plot_lr_find(tmp_path / "l.png", *lr_curve(), {}, 3e-3)
    assert where(tmp_path / "l.png", hex_rgb(figures.ORANGE))[2] > 100


def test_lr_find_of_a_run_that_diverged_at_once_is_still_a_picture(tmp_path):
    figures.plot_lr_find(tmp_path / "l.png", [1e-3, 1e-2], [np.nan] * 2, [np.nan] * 2, {}, 1e-3)
    assert pixels(tmp_path / "l.png").size


def test_confusion_has_actual_in_rows_and_predicted_in_columns(tmp_path):
    darkest = [8, 48, 107]
    centres = {}
    for cell in ((0, 1), (1, 0), (1, 1)):
        confusion_CC = np.zeros((3, 3), dtype=np.int64)
        confusion_CC[cell] = 5
        figures.plot_confusion(tmp_path / "c.png", confusion_CC, ["a", "b", "c"])
        centres[cell] = where(tmp_path / "c.png", darkest, tolerance=2)
    assert centres[0, 1][0] < centres[1, 1][0] == pytest.approx(centres[1, 0][0], abs=2)
    assert centres[1, 0][1] < centres[1, 1][1] == pytest.approx(centres[0, 1][1], abs=2)


@pytest.mark.parametrize(("count", "counted"), [(2, True), (37, True), (61, False)])
def test_confusion_counts_its_cells_as_long_as_they_are_readable(tmp_path, count, counted):
    # Ten times the counts are the same shades: below the title only the texts of the cells can differ.
    pictures = []
    for factor in (1, 10):
        confusion_CC = (np.eye(count, dtype=np.int64) * 4 + 1) * factor
        figures.plot_confusion(tmp_path / "c.png", confusion_CC, [f"class {i:03}" for i in range(count)])
        pictures.append(pixels(tmp_path / "c.png")[45:])
    assert (pictures[0].shape != pictures[1].shape or not np.array_equal(*pictures)) == counted


@pytest.mark.parametrize(("count", "together"), [(40, False), (80, True)])
def test_confused_classes_stand_together_where_there_are_many(tmp_path, count, together):
    confusion_CC = np.zeros((count, count), dtype=np.int64)
    confusion_CC[0, -1] = confusion_CC[-1, 0] = 9
    figures.plot_confusion(tmp_path / "c.png", confusion_CC, [""] * count)
    dark_HW = (np.abs(pixels(tmp_path / "c.png") - [8, 48, 107]) <= 2).all(axis=-1)
    height, width = dark_HW.shape
    lowest = np.flatnonzero(dark_HW[:, : width // 2].any(axis=1)).max()  # what the first class is predicted for
    assert lowest < 0.15 * height if together else lowest > 0.85 * height


def test_confusion_stops_growing(tmp_path):
    figures.plot_confusion(tmp_path / "c.png", np.eye(300, dtype=np.int64), ["a rather long name"] * 300)
    height, width, _ = pixels(tmp_path / "c.png").shape
    assert max(height, width) < 30 * figures.DPI


def test_names_may_hold_anything(tmp_path, recwarn):
    images = [np.full((20, 30, 3), 90, np.uint8)] * 9
    figures.plot_confusion(tmp_path / "c.png", np.eye(10, dtype=np.int64), ODD_NAMES)
    figures.plot_top_losses(tmp_path / "t.png", images, ODD_NAMES[:9])
    figures.plot_batch(tmp_path / "b.png", np.stack(images), ODD_NAMES[1:])
    figures.plot_lr_find(tmp_path / "l.png", *lr_curve(), dict.fromkeys(ODD_NAMES, 1e-3), 1e-3)
    assert all(pixels(tmp_path / f"{name}.png").std() > 0 for name in "ctbl")
    assert [str(warning.message) for warning in recwarn] == []


def test_batch_shows_each_image_in_reading_order(tmp_path):
    colors = [[200, 0, 0], [0, 200, 0], [0, 0, 200], [200, 200, 0], [0, 200, 200]]
    images_NHWC = np.stack([np.full((64, 64, 3), color, np.uint8) for color in colors])
    figures.plot_batch(tmp_path / "b.png", images_NHWC, list("abcde"))
    places = [where(tmp_path / "b.png", color) for color in colors]
    assert all(count > 1000 for *_, count in places)
    rows = [row for row, *_ in places]
    columns = [column for _, column, _ in places]
    assert rows[0] == rows[1] == rows[2] < rows[3] == rows[4]
    assert columns[0] == columns[3] < columns[1] == columns[4] < columns[2]


def test_top_losses_shows_nine_at_most_and_any_kind_of_image(tmp_path):
    images: list = [Image.new("RGB", (40, 30), (20 * i, 0, 200)) for i in range(12)]
    images[3] = Image.new("L", (40, 30), 128)
    images[4] = np.full((50, 20, 3), (80, 0, 200), np.uint8)
    figures.plot_top_losses(tmp_path / "t.png", images, ["cat / dog / 7.31 / 0.02"] * 12)
    seen = [where(tmp_path / "t.png", (20 * i, 0, 200))[2] > 0 for i in range(12)]
    assert seen == [i < 9 and i != 3 for i in range(12)]
    assert where(tmp_path / "t.png", (128, 128, 128))[2] > 1000


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not fit 2 classes"):
        figures.plot_confusion(tmp_path / "c.png", np.eye(3, dtype=np.int64), ["a", "b"])
    with pytest.raises(ValueError, match="1 images and 2 titles"):
        figures.plot_batch(tmp_path / "b.png", np.zeros((1, 8, 8, 3), np.uint8), ["a", "b"])
    with pytest.raises(ValueError, match="0 images"):
        figures.plot_top_losses(tmp_path / "t.png", [], [])


def test_pyplot_and_its_global_state_stay_out():
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, figures.__file__]).returncode == 0
