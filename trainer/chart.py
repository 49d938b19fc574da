"""Line charts as SVG text: they stand in a page, need no script, and take its colours by night as by day."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 480, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 38
_POINTS = 300  # of a series: more are no wider than a pixel
COLOURS = 6  # classes .c0 to .c5 of the page


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line."""

    name: str
    x_N: Sequence[float | None]
    y_N: Sequence[float | None]
    colour: int = 0
    dots: bool = False
    """A dot at each point: there are few of them."""


def lines(series: Sequence[Series], *, x: str, y: str, log: bool = False) -> str:
    """A chart of these lines over the axes `x` and `y`; what is not finite is left out. Empty without a point."""
    known = [(each, *_finite(each, log)) for each in series]
    known = [(each, x_N, y_N) for each, x_N, y_N in known if len(x_N)]
    if not known:
        return ""
    all_x, all_y = (np.concatenate([line[at] for line in known]) for at in (1, 2))
    x_ticks, y_ticks = ticks(all_x.min(), all_x.max()), ticks(all_y.min(), all_y.max(), log=log)
    low_x, high_x = min(x_ticks[0], all_x.min()), max(x_ticks[-1], all_x.max())
    low_y, high_y = min(y_ticks[0], all_y.min()), max(y_ticks[-1], all_y.max())

    def across(value: float) -> float:
        share = (value - low_x) / (high_x - low_x) if high_x > low_x else 0.5
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def up(value: float) -> float:
        a, b, c = (math.log10(v) if log else v for v in (low_y, value, high_y))
        share = (b - a) / (c - a) if c > a else 0.5
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(f"{y} by {x}")}">']
    for value in y_ticks:
        height = f"{up(value):.1f}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{height}" y2="{height}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{up(value) + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    for value in x_ticks:
        parts.append(f'<text x="{across(value):.1f}" y="{HEIGHT - 20}" text-anchor="middle">{_number(value)}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{html.escape(x)}</text>')
    legend = []
    for each, x_N, y_N in known:
        points = [(across(a), up(b)) for a, b in zip(x_N, y_N, strict=True)]
        colour, path = f"c{each.colour % COLOURS}", " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline class="line {colour}" points="{path}"/>')
        for a, b in points if each.dots else ():
            parts.append(f'<circle class="dot {colour}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>')
        legend.append(f'<span class="key {colour}">{html.escape(each.name)}</span>')
    parts.append("</svg>")
    return f"<figure>{''.join(parts)}<figcaption>{html.escape(y)} {''.join(legend)}</figcaption></figure>"


def ticks(low: float, high: float, *, log: bool = False) -> list[float]:
    """Round numbers from about `low` to about `high`: powers of ten, or multiples of 1, 2 or 5 of one."""
    if log:
        return [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    if high == low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 6)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _finite(series: Series, log: bool) -> tuple[np.ndarray, np.ndarray]:
    """Its points, of many the means of so many groups of neighbours."""
    x_N, y_N = (
        np.array([math.nan if value is None else value for value in values], np.float64)
        for values in (series.x_N, series.y_N)
    )
    known_N = np.isfinite(x_N) & np.isfinite(y_N) & ((y_N > 0) | (not log))
    x_N, y_N = x_N[known_N], y_N[known_N]
    if len(x_N) > _POINTS:
        groups = np.array_split(np.arange(len(x_N)), _POINTS)
        x_N, y_N = (np.array([values_N[group].mean() for group in groups]) for values_N in (x_N, y_N))
    return x_N, y_N


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
