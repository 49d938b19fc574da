"""The picture of an interpolation benchmark: a photograph by each way, a detail of each, and two curves."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipelines.preview import liveliest

COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#8C8C8C", "#222222")  # Okabe and Ito
IDEAL = "the ideal"


def draw(
    path: Path,
    example: Mapping[str, np.ndarray],
    spectra: Mapping[str, np.ndarray],
    gaps: Mapping[int, tuple[float, float]],
    size: int,
) -> None:
    """Write one PNG.

    Args:
        example: pictures [size, size, 3] by name, the ideal among them.
        spectra: power over the ideal's by frequency, [F], by name.
        gaps: decibels of one warp and of the chain by the number of transforms.
        size: pixels.
    """
    names = [IDEAL, *(name for name in example if name != IDEAL)]
    figure = Figure(figsize=(2.6 * len(names), 9.4), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.3, 1))
    above, below = halves
    axes = above.subplots(2, len(names), squeeze=False)
    top, left, side = liveliest(example[IDEAL])
    for column, name in enumerate(names):
        picture_HWC = example[name].round().clip(0, 255).astype(np.uint8)
        detail_HWC = picture_HWC[top : top + side, left : left + side]
        axes[0, column].imshow(picture_HWC, interpolation="nearest")
        axes[1, column].imshow(detail_HWC, interpolation="nearest")
        axes[0, column].set_title(textwrap.fill(name, 28), fontsize=9, parse_math=False)
        for row in (0, 1):
            axes[row, column].set_axis_off()
    spectrum, chain = below.subplots(1, 2)
    for colour, (name, power_F) in zip(itertools.cycle(COLOURS), spectra.items(), strict=False):
        cycles_F = np.arange(len(power_F)) / size
        spectrum.plot(cycles_F[1:], power_F[1:], color=colour, linewidth=1.8, label=name)
    spectrum.axhline(1, color="#222222", linewidth=0.8)
    spectrum.set_yscale("log")
    spectrum.set_xlabel("cycles a pixel")
    spectrum.set_ylabel("power ÷ the ideal's")
    spectrum.set_title("What is left of fine detail", fontsize=10, loc="left")
    spectrum.legend(fontsize=8, frameon=False)
    counts = sorted(gaps)
    for index, (label, colour) in enumerate((("one warp of all", COLOURS[0]), ("one by one", COLOURS[3]))):
        chain.plot(counts, [gaps[count][index] for count in counts], "o-", color=colour, label=label)
    chain.set_xlabel("transforms in a row")
    chain.set_ylabel("PSNR, dB")
    chain.set_title("How interpolation adds up", fontsize=10, loc="left")
    chain.legend(fontsize=8, frameon=False)
    for plot in (spectrum, chain):
        plot.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(path)
