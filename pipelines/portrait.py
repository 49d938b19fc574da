"""One portrait of an animal that never lived, painted with NumPy.

The body is a stack of implicit shapes, negative inside. The coat is band-limited noise: white noise is
filtered in the Fourier domain by a ring with a few angular lobes (the weave) and by the broad spectrum of
hair, at six orientations, which are then mixed pixel by pixel along the flow of the hair. That is a filter
bank in the spirit of Gabor noise (Lagae et al., "Procedural noise using sparse Gabor convolution",
SIGGRAPH 2009); its spectrum is exact, as nothing in it is interpolated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

_DIRECTIONS = 6  # of the filter bank, over half a turn
_TILE = 256  # pixels after which the noise of the coat repeats
_HAIR = 0.088  # rms of the hair, as a share of white
_WEAVE = 0.23  # rms of the weave, as a share of the hair's: the smaller, the harder twins are to tell apart
# Width x height: mostly the landscapes and portraits that cameras make, a few squares.
_SIZES = 4 * [(500, 375)] + 2 * [(375, 500)] + [(500, 333), (640, 480), (430, 360), (480, 640), (400, 400)]


@dataclass(frozen=True, kw_only=True)
class Look:
    """What twins share. Colours are RGB in [0, 1]; lengths are in radii of the head."""

    ears: Literal["pointed", "round", "folded", "floppy"]
    markings: Literal["stripes", "mask", "rosettes", "brindle", "plain", "patches"]
    base: tuple[float, float, float]
    dark: tuple[float, float, float]
    pale: tuple[float, float, float]
    iris: tuple[float, float, float]
    nose: tuple[float, float, float]
    slit: bool
    """Slit pupils and whiskers: a cat."""
    muzzle: float
    width: float


@dataclass(frozen=True, kw_only=True)
class Breed:
    """A look and the weave that tells it from its twin."""

    name: str
    look: Look
    period: float
    """Pixels between threads, in a picture whose shorter side is 375."""
    threads: tuple[float, ...]
    """Wave vectors against the hair, degrees: 90 draws lines along it, none is isotropic."""


@dataclass(frozen=True, kw_only=True)
class Portrait:
    """A painted picture and what it takes to measure its coat."""

    pixels_HW3: np.ndarray
    """RGB, uint8."""
    fur_HW: np.ndarray
    """Where nothing but fur is seen, bool."""
    flow_2HW: np.ndarray
    """Where hair points: cosine and sine, not normalised, of twice its angle to the x axis (y is down)."""


def paint(breed: Breed, key: tuple[int, int]) -> Portrait:
    """The picture that belongs to a breed and a Philox key, two integers from 0 to 2**63 - 1.

    The same pixels in any order and any process, up to the last bit of a processor's sines.
    """
    rng, look = np.random.Generator(np.random.Philox(key=np.array(key, np.uint64))), breed.look
    W, H = _SIZES[rng.integers(len(_SIZES))]
    short = min(W, H)
    y_H1, x_1W = np.arange(H, dtype=np.float32)[:, None], np.arange(W, dtype=np.float32)[None]

    # Coordinates, in head radii: (u, v) of the animal, (f, g) of its face, which turns and nods.
    radius = short * rng.uniform(0.29, 0.38)
    tilt, turn, nod = rng.normal(0, 0.16), rng.uniform(-0.26, 0.26), rng.uniform(-0.08, 0.12)
    across = (x_1W - W * 0.5 - rng.uniform(-0.13, 0.13) * W) / (radius * rng.uniform(0.94, 1.06))
    down = (y_H1 - H * rng.uniform(0.40, 0.50)) / radius
    u = math.cos(tilt) * across + math.sin(tilt) * down
    v = math.cos(tilt) * down - math.sin(tilt) * across
    f, g = u - turn, v - nod
    p = np.abs(f)  # most of a face is symmetric

    head = _either(
        _ellipse(u, v, 0, 0, 0.92 * look.width, 0.86),
        _ellipse(np.abs(u), v, 0.36, 0.30, 0.52 * look.width, 0.50),
    )
    body = _either(_ellipse(across, down, 0.1 * turn, 2.35, 1.18, 1.75), _ellipse(u, v, 0, 0.85, 0.62, 0.7))
    m = look.muzzle
    muzzle = _either(_ellipse(p, g, 0.17, 0.46, 0.27, 0.22), _ellipse(f, g, 0, 0.42, 0.9 * m, 0.75 * m))
    ears, inner = _ears(look.ears, u + 0.25 * turn, v)

    # The hair flows from the nose outwards and down the chest.
    chest = _smoothstep(0.75, 1.25, down) * _smoothstep(-0.05, 0.15, head)
    flow_2HW = _double(f, g - 0.25) * (1 - chest) - np.stack([chest, chest * 0.8 * u])
    grain = _coat(rng, breed, flow_2HW, short / 375, _WEAVE * math.exp(rng.normal(0, 0.3)))
    coat = _markings(rng, look, u, v, p, g, chest, radius)
    coat = coat + grain * (_HAIR * rng.uniform(0.8, 1.2)) * (0.45 + 0.55 * coat)

    picture = _background(rng, H, W, y_H1, x_1W)
    soft = 2.2 / radius
    sun_u, sun_v = rng.uniform(-0.16, 0.16), rng.uniform(-0.16, -0.03)

    def fur(shape, depth, tone, colour=coat):
        w = _window(shape < 0.1)
        dome = np.sqrt(1 - (1 - np.clip(-shape[w] / depth, 0, 1)) ** 2)
        light = tone * (0.6 + 0.4 * dome) * (1 + (sun_u * u[w] + sun_v * v[w]).clip(-0.2, 0.2))
        _over(picture[:, *w], shape[w] + 0.018 * grain[w], colour[:, *w] * light, soft)

    def shade(shape, strength, falloff, where):
        picture[:] *= 1 - strength * where * np.exp(-falloff * np.maximum(shape, 0))

    # Back to front; what lies nearer casts a soft shadow first.
    shade(body, 0.45, 5, 1)
    fur(body, 0.9, 0.94)
    shade(head, 0.38, 7, _smoothstep(-0.1, 0.7, v))
    if inner is not None:
        fur(ears, 0.22, 1)
        fur(inner, 0.25, 0.85, _column(look.nose) * 0.5 + _column(look.pale) * 0.4 + 0.12 * grain)
    fur(head, 0.75, 1)
    if inner is None:
        shade(ears, 0.35, 12, head < 0.1)
        fur(ears, 0.3, 0.82)
    shade(muzzle, 0.13, 11, head < 0)
    fur(muzzle, 0.34, 1.04)
    features = _face(picture, rng, look, f, g, p, soft)
    obstacle = _occlude(picture, rng, H, W, y_H1, x_1W) if rng.random() < 0.35 else np.inf

    fur_HW = np.minimum(np.minimum(head, body), ears) < -0.06
    fur_HW &= (features > 0.05) & (obstacle > 0.02 * short)
    return Portrait(pixels_HW3=_photograph(picture, rng, y_H1, x_1W), fur_HW=fur_HW, flow_2HW=flow_2HW)


def _column(colour):
    return np.asarray(colour, np.float32)[:, None, None]


def _smoothstep(low, high, t):
    t = np.clip((t - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _ellipse(x, y, cx, cy, rx, ry):
    """Nearly the distance to an ellipse, negative inside."""
    return (np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2) - 1) * min(rx, ry)


def _leaf(x, y, cx, cy, length, width, lean):
    """A pointed leaf of half-length `length` whose tip leans by `lean` radians to the right of upwards."""
    a = (y - cy) * math.cos(lean) - (x - cx) * math.sin(lean)
    b = (x - cx) * math.cos(lean) + (y - cy) * math.sin(lean)
    return np.abs(b) - width * (1 - (a / length) ** 2)


def _either(first, second, melt=0.12):
    """The smooth union of two shapes (Quilez' polynomial smooth minimum)."""
    h = np.maximum(melt - np.abs(first - second), 0)
    return np.minimum(first, second) - h * h / (4 * melt)


def _double(x, y):
    """Cosine and sine of twice the angle of (x, y): directions without a sign, fit for mixing."""
    return np.stack([x * x - y * y, 2 * x * y]) / (x * x + y * y + 1e-6)


def _ears(style, u, v):
    """Both ears, and the skin inside of those that stand up behind the head (others hang in front: None)."""
    a = np.abs(u)
    if style == "pointed":
        return _leaf(a, v, 0.62, -0.66, 0.78, 0.36, 0.42), _leaf(a, v, 0.62, -0.66, 0.58, 0.20, 0.42)
    if style == "round":
        return _ellipse(a, v, 0.68, -0.66, 0.36, 0.36), _ellipse(a, v, 0.67, -0.64, 0.21, 0.22)
    if style == "folded":
        return _leaf(a, v, 0.74, -0.42, 0.46, 0.32, 2.5), None
    return _leaf(a, v, 0.95, 0.22, 0.98, 0.36, -0.22) + 0.03, None


def _noise(rng, H, W, cell_y, cell_x):
    """Smooth noise of unit variance on the grid's nodes, cells of cell_y x cell_x pixels."""
    grid = rng.standard_normal((max(2, round(H / cell_y)) + 1, max(2, round(W / cell_x)) + 1), np.float32)
    return np.asarray(Image.fromarray(grid).resize((W, H), Image.Resampling.BICUBIC))


def _coat(rng, breed, flow_2HW, scale, weaving):
    """Hair of unit variance with its weave: noise whose spectrum turns with the flow."""
    H, W = flow_2HW.shape[1:]
    fy = np.fft.fftfreq(_TILE)[:, None].astype(np.float32)
    fx = np.fft.rfftfreq(_TILE)[None].astype(np.float32)
    f2 = fx * fx + fy * fy + 1e-9
    cos2, sin2 = (fx * fx - fy * fy) / f2, 2 * fx * fy / f2
    spectrum = np.fft.rfft2(rng.standard_normal((_TILE, _TILE), np.float32))
    ring = np.exp(((np.sqrt(f2) * (breed.period * scale) - 1) / 0.1) ** 2 / -2)
    hair = (f2 > 1e-6) * np.exp(-f2 * (5 * scale) ** 2) / (np.sqrt(f2) + 1 / 60)

    def lobe(turn, degrees, sharpness):
        twice = turn + math.radians(2 * degrees)
        return np.exp(sharpness * (cos2 * math.cos(twice) + sin2 * math.sin(twice) - 1))

    grain, total = np.zeros((H, W), np.float32), np.zeros((H, W), np.float32)
    for turn in np.linspace(0, 2 * math.pi, _DIRECTIONS, endpoint=False).tolist():
        weave = ring * (sum(lobe(turn, thread, 5) for thread in breed.threads) if breed.threads else 1)
        strands = hair * lobe(turn, 90, 9)
        weave, strands = (part / math.sqrt(np.mean(part * part)) for part in (weave, strands))
        tile = np.fft.irfft2(spectrum * (strands + weaving * weave))
        weight = np.maximum(math.cos(turn) * flow_2HW[0] + math.sin(turn) * flow_2HW[1], 0)
        weight *= weight
        weight *= weight
        grain += weight * np.pad(tile, ((0, H - _TILE), (0, W - _TILE)), mode="wrap")
        total += weight * weight
    return grain / np.sqrt(total + 1e-6)


def _markings(rng, look, u, v, p, g, chest, radius):
    """The colours of the fur before the hair is drawn, [3, H, W]."""
    H, W = u.shape
    shift = rng.normal(0, 0.025, 3)
    base, dark, pale = (
        _column(np.asarray(c) * rng.uniform(0.9, 1.1) + shift) for c in (look.base, look.dark, look.pale)
    )
    wobble = _noise(rng, H, W, 0.45 * radius, 0.45 * radius)
    bib = np.maximum(
        _smoothstep(0.10, -0.10, _ellipse(p, g, 0, 0.5, 0.42, 0.38)),
        chest * _smoothstep(0.75, 0.25, np.abs(u)),
    )
    if look.markings == "stripes":
        turns = np.arctan2(p, -(v - 0.25))
        rays = np.sin(13 * turns + 1.1 * wobble + rng.uniform(0, 6)) * _smoothstep(0.35, 0.6, np.hypot(u, v - 0.25))
        bars = np.sin(9.5 * v + 1.5 * np.abs(u) + 1.1 * wobble)
        ink = _smoothstep(0.0, 0.55, rays * (1 - chest) + bars * chest)
    elif look.markings == "rosettes":
        blobs = _noise(rng, H, W, 0.16 * radius, 0.16 * radius)
        ink = _smoothstep(0.32, 0.16, np.abs(blobs - 0.62)) + 0.35 * _smoothstep(0.6, 0.9, blobs)
    elif look.markings == "brindle":
        ink = 0.9 * _smoothstep(0.1, 0.6, _noise(rng, H, W, 0.09 * radius, 0.5 * radius) + 0.3 * wobble)
    elif look.markings == "patches":
        ink = _smoothstep(0.25, 0.42, wobble + 0.8 * np.exp(-8 * (np.hypot(u - 0.42, v + 0.15) - 0.1).clip(0)))
    elif look.markings == "mask":
        brow = _ellipse(p, g, 0.40, 0.02, 0.34, 0.30)
        bib = np.maximum(bib, _smoothstep(0.10, -0.08, _either(brow, _ellipse(p, g, 0.1, 0.5, 0.62, 0.46))))
        ink = _smoothstep(0.2, -0.5, g) * 0.9 + 0.25 * wobble.clip(0, 1)
    else:
        ink = 0.5 * _smoothstep(-0.4, 1.4, wobble)
    coat = base + (dark - base) * ink.clip(0, 1)
    return (coat + (pale - coat) * bib * 0.92).astype(np.float32)


def _over(picture, shape, colour, soft):
    """Lay a colour over the picture wherever the shape is negative."""
    w = _window(shape < soft)
    if np.ndim(colour) and colour.shape[-2:] != (1, 1):
        colour = colour[:, *w]
    part = picture[:, *w]
    part += np.clip(0.5 - shape[w] / soft, 0, 1) * (colour - part)


def _window(inside):
    """The rows and columns that hold all of a mask."""
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not len(rows):
        return np.s_[:0, :0]
    return np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _face(picture, rng, look, f, g, p, soft):
    """Eyes, nose, mouth and whiskers; returns their shape."""
    m, lid = look.muzzle, rng.uniform(-0.16, -0.07)
    eye_p, eye_g = p - 0.40, g + 0.10
    eye = _ellipse(eye_p, eye_g - (0.22 * eye_p if look.slit else 0), 0, 0, 0.205 if look.slit else 0.165, 0.155)
    eye = np.maximum(eye, lid - eye_g)
    gaze = rng.uniform(-0.035, 0.035)
    look_f = f - np.sign(f) * 0.40 - gaze
    _over(picture, eye - 0.028, 0.09, soft)
    iris = _column(np.asarray(look.iris) * rng.uniform(0.85, 1.1)) * (0.75 + 2.2 * (eye_g + 0.06).clip(-0.15, 0.2))
    _over(picture, eye, iris, soft)
    opening = rng.uniform(0.03, 0.085) if look.slit else rng.uniform(0.075, 0.105)
    _over(
        picture,
        np.maximum(_ellipse(look_f, eye_g, 0, 0, opening, 0.135 if look.slit else opening), eye),
        0.04,
        soft,
    )
    _over(picture, _ellipse(look_f, eye_g, -0.045, -0.055, 0.036, 0.036), 0.97, soft)
    _over(picture, _ellipse(look_f, eye_g, 0.05, 0.05, 0.018, 0.018), 0.75, soft)

    nose = _either(_ellipse(p, g, 0.05, 0.30, 0.30 * m, 0.085), _ellipse(f, g, 0, 0.34, 0.16 * m, 0.11), 0.08)
    line = np.maximum(np.abs(f) - 0.013, np.abs(g - 0.45) - 0.07)
    smile = np.maximum(np.abs(np.hypot(p - 0.13, g - 0.47) - 0.13) - 0.014, 0.50 - g)
    _over(picture, np.minimum(line, smile), _column(look.dark) * 0.35, soft)
    _over(picture, nose, _column(look.nose) * (1.0 - 1.1 * (g - 0.32)), soft)
    _over(picture, _ellipse(p, g, 0.075, 0.335, 0.036, 0.024), _column(look.nose) * 0.3, soft)
    _over(picture, _ellipse(f, g, -0.03, 0.265, 0.06, 0.018), np.minimum(_column(look.nose) + 0.35, 1), 2 * soft)
    if look.slit:
        for slope in (-0.16, 0.04, 0.22):
            reach = (p - 0.26).clip(0)
            hair = np.abs(g - 0.44 - 0.4 * slope - slope * reach - 0.16 * reach * reach) - 0.010 * (1.15 - reach)
            _over(picture, np.maximum(hair, np.maximum(0.26 - p, p - 1.35)), 0.96, 1.6 * soft)
    return np.minimum(np.minimum(eye, nose), smile)


def _background(rng, H, W, y_H1, x_1W):
    """A meadow, a carpet, a room or an unsharp garden, [3, H, W]."""
    place = rng.integers(4)
    unit = min(H, W) / 375
    cloud, mottle = _noise(rng, H, W, 90 * unit, 90 * unit), _noise(rng, H, W, 14 * unit, 14 * unit)
    if place == 0:
        blades = _noise(rng, H, W, 26 * unit, 4 * unit) + 0.6 * _noise(rng, H, W, 11 * unit, 3 * unit)
        tone = 0.5 + 0.13 * blades + 0.08 * cloud + 0.15 * (y_H1 / H - 0.5)
        colour = np.array([rng.uniform(0.5, 0.85), rng.uniform(0.85, 1.05), rng.uniform(0.25, 0.5)])
        return (_column(colour) * tone).astype(np.float32)
    colour = rng.uniform(0.25, 0.85, 3) * 0.6 + rng.uniform(0.3, 0.8) * 0.4
    if place == 1:
        turn, pitch = rng.uniform(0, np.pi), unit * rng.uniform(5, 16)
        along = math.cos(turn) * x_1W + math.sin(turn) * y_H1
        aside = math.cos(turn) * y_H1 - math.sin(turn) * x_1W
        knots = np.sin(2 * np.pi / pitch * along) * np.sin(2 * np.pi / pitch * aside)
        tone = 1 + 0.10 * knots + 0.07 * mottle + 0.07 * cloud + 0.05 * rng.standard_normal((H, W), np.float32)
        return (_column(colour) * tone).astype(np.float32)
    if place == 2:
        line = H * rng.uniform(0.55, 0.85) + rng.uniform(-0.06, 0.06) * (x_1W - W / 2)
        floor = _smoothstep(-2, 2, y_H1 - line)
        wood = _column((0.62, 0.43, 0.28)) * (1 + 0.12 * _noise(rng, H, W, 5 * unit, 80 * unit) + 0.04 * mottle)
        wall = _column(colour) * (1.1 - 0.25 * y_H1 / H + 0.04 * cloud + 0.02 * mottle)
        return (wall + (wood * rng.uniform(0.7, 1.3) - wall) * floor).astype(np.float32)
    # Discs of light out of focus, painted small and enlarged.
    h, w = H // 4, W // 4
    y, x = np.arange(h, dtype=np.float32)[:, None], np.arange(w, dtype=np.float32)
    garden = _column(colour * (0.7, 0.95, 0.6)) * (0.75 + 0.12 * _noise(rng, h, w, 24, 24))
    for _ in range(12):
        disc = np.hypot(x - rng.uniform(0, w), y - rng.uniform(0, h)) - rng.uniform(4, 13)
        glow = _column(colour * (0.9, 1, 0.7) + rng.uniform(0, 0.35) + rng.normal(0, 0.06, 3))
        garden += rng.uniform(0.2, 0.6) * np.clip(0.5 - disc / 2.5, 0, 1) * (glow - garden)
    return np.stack([np.asarray(Image.fromarray(c).resize((W, H), Image.Resampling.BICUBIC)) for c in garden])


def _occlude(picture, rng, H, W, y_H1, x_1W):
    """An unsharp twig or rail in front; returns its shape in pixels."""
    turn, unit = rng.uniform(0, np.pi), min(H, W) / 375
    offset = (x_1W - W * rng.uniform(0.1, 0.9)) * math.cos(turn) + (y_H1 - H * rng.uniform(0.1, 0.9)) * math.sin(turn)
    twig = np.abs(offset + 5 * unit * _noise(rng, H, W, 120 * unit, 120 * unit)) - unit * rng.uniform(3, 11)
    shade = _column(rng.uniform(0.15, 0.6) * np.array([1.0, rng.uniform(0.7, 1.3), 0.6]))
    _over(picture, twig, shade * (1 + 0.05 * offset / unit).clip(0.6, 1.4), 7 * unit)
    return twig


def _photograph(picture, rng, y_H1, x_1W):
    """Light, lens and sensor: what a camera makes of the scene, uint8 [H, W, 3]."""
    a, b = x_1W / x_1W.size - 0.5, y_H1 / y_H1.size - 0.5
    warm, turn = rng.normal(0, 0.06), rng.uniform(0, 2 * math.pi)
    falloff = 1 + rng.uniform(0, 0.5) * (math.cos(turn) * a + math.sin(turn) * b)
    falloff -= rng.uniform(0, 0.5) * (a * a + b * b)
    tint = _column((1 + warm, 1 + rng.normal(0, 0.02), 1 - warm)) * rng.uniform(0.78, 1.15)
    picture = np.clip(picture * falloff * tint, 0, 1) ** rng.uniform(0.88, 1.14)
    blur = rng.uniform(0, 0.09)  # of the three taps (blur, 1 - 2 blur, blur) along both axes
    edge = np.pad(picture, ((0, 0), (1, 1), (0, 0)), mode="edge")
    picture = (1 - 2 * blur) * picture + blur * (edge[:, :-2] + edge[:, 2:])
    edge = np.pad(picture, ((0, 0), (0, 0), (1, 1)), mode="edge")
    picture = (1 - 2 * blur) * picture + blur * (edge[:, :, :-2] + edge[:, :, 2:])
    picture += rng.standard_normal(picture.shape[1:], np.float32) * rng.uniform(0.004, 0.010)
    return np.ascontiguousarray((picture.clip(0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))
