"""The pictures of a run: range test, confusion matrix, top losses, batch. Each function writes one PNG.

Figures are built without pyplot, so that nothing here touches global state, needs a display or clashes
with a notebook. Every text that may hold a class name is drawn literally: "$" and "_" are not mathematics.
"""

import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from trainer.interpret import by_likeness

# The palette of Okabe and Ito (https://jfly.uni-koeln.de/color/), distinct under all common colour blindness.
BLUE, ORANGE, SKY = "#0072B2", "#D55E00", "#56B4E9"
INK, FAINT = "#222222", "#8C8C8C"
DPI = 110
MOST_COUNTED_CLASSES = 60  # above, a cell is too small for its count
LONGEST_NAME = 32  # letters of a name in a plot


def plot_lr_find(
    path: Path,
    lrs: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    suggestions: Mapping[str, float],
    chosen: float | None,
) -> None:
    """The learning-rate range test: raw losses faint, smoothed losses bold, suggestions as labelled dots.

    `lrs`, `losses` and `smoothed` are equally long; losses that are not finite are left out. `suggestions`
    maps a suggestion's name to its learning rate; the one equal to `chosen` is emphasised, and a `chosen`
    that nothing suggested gets a dot of its own. `None`: there is no rate.
    """
    lrs_N, losses_N, smoothed_N = (np.asarray(values, dtype=np.float64) for values in (lrs, losses, smoothed))
    figure, axes = _axes(7.2, 4.4)
    axes.plot(lrs_N, losses_N, color=SKY, alpha=0.55, linewidth=1, label="loss")
    axes.plot(lrs_N, smoothed_N, color=BLUE, linewidth=2.2, label="smoothed")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    _title(axes, "Learning-rate range test")
    known_N = np.isfinite(smoothed_N)
    marks = dict(suggestions)
    if chosen is not None and not any(math.isclose(lr, chosen, rel_tol=1e-6) for lr in marks.values()):
        marks["chosen"] = chosen
    if known_N.any():
        # The raw loss of the last steps may be millions; the smoothed curve decides how far up is seen.
        low = min(smoothed_N[known_N].min(), losses_N[np.isfinite(losses_N)].min(initial=np.inf))
        high = smoothed_N[known_N].max()
        room = max(high - low, 1e-3 * max(abs(high), 1e-12))
        # Labels stand in rows of their own above the curve, where they cannot cover it or one another.
        row = 0.085 * room
        axes.set_ylim(low - 0.08 * room, high + 0.1 * room + row * (len(marks) + 0.5))
        # All texts stand on the side with more room, and the lines they would cross are the shorter ones.
        middle = math.sqrt(lrs_N[0] * lrs_N[-1])
        leftward = math.fsum(math.log(lr / middle) for lr in marks.values()) > 0
        for index, (name, lr) in enumerate(sorted(marks.items(), key=lambda mark: mark[1], reverse=not leftward)):
            is_chosen = chosen is not None and math.isclose(lr, chosen, rel_tol=1e-6)
            color = ORANGE if is_chosen else INK
            loss = np.interp(math.log(lr), np.log(lrs_N[known_N]), smoothed_N[known_N])
            top = high + 0.1 * room + row * (index + 0.5)
            axes.plot([lr, lr], [loss, top], color=color, linewidth=1, linestyle=":", zorder=3)
            size = 8 if is_chosen else 6
            axes.plot(lr, loss, "o", color=color, markersize=size, markeredgecolor="white", zorder=4)
            number = f"{lr:.1e}".replace("e-0", "e-")
            axes.annotate(
                f"{_short(name, LONGEST_NAME)} {number}" + (" (chosen)" if is_chosen and name != "chosen" else ""),
                (lr, top),
                xytext=(-5 if leftward else 5, 0),
                textcoords="offset points",
                ha="right" if leftward else "left",
                va="center",
                color=color,
                fontsize=9,
                fontweight="bold" if is_chosen else "normal",
                parse_math=False,
            )
    axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)
    _save(figure, path)


def plot_confusion(path: Path, confusion_CC: npt.NDArray[np.integer], classes: Sequence[str]) -> None:
    """The confusion matrix: row = actual class, column = predicted class, counts in the cells.

    A cell's shade is its share of the row, so that rare classes are as readable as common ones, on a scale
    that keeps small shares visible. Above `MOST_COUNTED_CLASSES` classes the shades speak alone, and the classes
    stand in the order of their likeness, so that those that are confused make a block on the diagonal; the figure
    stops growing at 24 inches, from where on only every k-th class is named.
    """
    counts_CC = np.asarray(confusion_CC)
    count = len(classes)
    if counts_CC.shape != (count, count):
        raise ValueError(f"a confusion matrix of shape {counts_CC.shape} does not fit {count} classes")
    if count > MOST_COUNTED_CLASSES:
        order_C = by_likeness(counts_CC)
        counts_CC, classes = counts_CC[np.ix_(order_C, order_C)], [classes[index] for index in order_C]
    shares_CC = counts_CC / np.maximum(counts_CC.sum(axis=1, keepdims=True), 1)

    cell = 0.62 if count <= 12 else 0.36 if count <= MOST_COUNTED_CLASSES else 0.1  # inches
    side = min(max(2.6, cell * count), 24.0)
    font = 10.0 if count <= 12 else 9.0 if count <= MOST_COUNTED_CLASSES else 5.5
    names = [_short(name, LONGEST_NAME) for name in classes]
    # Room for the labels: about 0.6 em a letter.
    margin = 1.2 + max(map(len, names), default=0) * font * 0.6 / 72
    figure, axes = _axes(side + margin + 0.6, side + margin)
    axes.grid(visible=False)
    norm = PowerNorm(gamma=0.5, vmin=0.0, vmax=1.0)
    shades = axes.imshow(shares_CC, cmap="Blues", norm=norm, interpolation="nearest", aspect="equal")

    named = range(0, count, max(1, math.ceil(count * font * 1.25 / 72 / side)))
    labels = [names[index] for index in named]
    steep = 90 if count > 12 else 40
    axes.set_xticks(named, labels, rotation=steep, fontsize=font, parse_math=False)
    if steep != 90:
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.set_yticks(named, labels, fontsize=font, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted" if count <= MOST_COUNTED_CLASSES else "predicted (like classes stand together)")
    axes.set_ylabel("actual")
    total, right = int(counts_CC.sum()), int(np.trace(counts_CC))
    _title(axes, f"Confusion matrix: {right:,} of {total:,} right")
    if count <= MOST_COUNTED_CLASSES:
        for row, column in np.argwhere(counts_CC > 0):
            text = axes.text(
                column,
                row,
                str(counts_CC[row, column]),
                ha="center",
                va="center",
                fontsize=_fit(str(counts_CC[row, column]), side / count, font),
                color="white" if norm(shares_CC[row, column]) > 0.6 else INK,
            )
            text.set_in_layout(False)  # thousands of texts that lie inside anyway
    # Lines around each cell, or around as many as the eye can count on the way to a name.
    lines_L = np.arange(0, count + 1, 1 if count <= MOST_COUNTED_CLASSES else 10) - 0.5
    axes.set_xticks(lines_L, minor=True)
    axes.set_yticks(lines_L, minor=True)
    axes.grid(visible=True, which="minor", color="#E4E4E4", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    bar = figure.colorbar(shades, ax=axes, shrink=0.6, pad=0.02, format=PercentFormatter(1.0), aspect=30)
    bar.set_label("share of the actual class", fontsize=9, color=INK)
    bar.set_ticks([0.0, 0.05, 0.25, 0.5, 1.0])
    bar.ax.tick_params(labelsize=8, length=2, colors=INK)
    bar.outline.set_visible(False)
    _save(figure, path)


def plot_top_losses(path: Path, images: Sequence[Image.Image | npt.NDArray[np.uint8]], titles: Sequence[str]) -> None:
    """The first nine `images` (PIL or uint8 HWC) under titles "predicted / actual / loss / probability"."""
    _grid(path, "Top losses: predicted / actual / loss / probability", images[:9], titles[:9])


def plot_confused(path: Path, rows: Sequence[tuple[str, Sequence[npt.NDArray[np.uint8]]]]) -> None:
    """A row of images (uint8 HWC) under each title; as many columns as the longest row has images."""
    columns = max(len(images) for _, images in rows)
    figure = Figure(figsize=(2.2 * columns, 2.6 * len(rows)), dpi=DPI)
    figure.set_layout_engine("constrained")
    for place, (title, images) in enumerate(rows):
        for column in range(columns):
            axes = figure.add_subplot(len(rows), columns, place * columns + column + 1)
            axes.set_axis_off()
            if column < len(images):
                axes.imshow(images[column], interpolation="antialiased")
            if column == 0:
                axes.set_title(_plain(title), fontsize=10, color=INK, loc="left", parse_math=False, pad=4)
    _save(figure, path)


def plot_batch(path: Path, images_NHWC: npt.NDArray[np.uint8], titles: Sequence[str]) -> None:
    """Every image of `images_NHWC` (uint8) under its title, in a grid that is as square as N allows."""
    _grid(path, "", list(images_NHWC), titles)


def _grid(
    path: Path, heading: str, images: Sequence[Image.Image | npt.NDArray[np.uint8]], titles: Sequence[str]
) -> None:
    if not len(images) or len(images) != len(titles):
        raise ValueError(f"{len(images)} images and {len(titles)} titles: both must be given, equally many")
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    # A title has two lines where images are few, and is kept from running into its neighbour's.
    tile = 2.7 if columns <= 4 else 1.9
    figure = Figure(figsize=(tile * columns, (tile + 0.35) * rows + (0.4 if heading else 0)), dpi=DPI)
    figure.set_layout_engine("constrained")
    font = 9.0 if columns <= 4 else 8.0
    letters = int(tile * 72 / (font * 0.6))
    for index, (image, title) in enumerate(zip(images, titles, strict=True)):
        axes = figure.add_subplot(rows, columns, index + 1)
        pixels_HWC = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
        axes.imshow(pixels_HWC, interpolation="antialiased")
        text = "\n".join(textwrap.wrap(_plain(title), letters, max_lines=3, placeholder="…"))
        axes.set_title(text, fontsize=font, color=INK, parse_math=False, pad=4)
        axes.set_axis_off()
    if heading:
        figure.suptitle(heading, fontsize=12, fontweight="bold", color=INK, x=0.01, ha="left", parse_math=False)
    _save(figure, path)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=DPI)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(visible=True, color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=12, fontweight="bold", color=INK)


def _fit(text: str, cell_inches: float, largest: float) -> float:
    """The font size at which `text` fills at most 0.85 of a cell's width."""
    return min(largest, 0.85 * cell_inches * 72 / (0.64 * len(text)))


def _plain(name: str) -> str:
    return " ".join(name.split())


def _short(name: str, letters: int) -> str:
    name = _plain(name)
    return name if len(name) <= letters else name[: letters - 1] + "…"


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # A class named in a script that the font lacks shows as boxes; warnings say no more.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")
        figure.savefig(path, format="png", bbox_inches="tight", pad_inches=0.12)
