"""How near to an ideal picture each way of augmenting comes, under the same random parameters.

    onewarp bench interpolation --data DIR [--megapixels 12] [--json FILE]

The ideal (`benchmarks.oracle`) is the mean of 36 or more bicubic samples over the area of each output pixel, read from
the decoded photograph through the same homography. Ours is what the `Loader` gives, light off. With `--megapixels` the
photographs are laid side by side into pictures of that size, which keeps their detail fine, and Pillow's antialiased
filters, each followed by one warp, are measured too.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import chained, oracle, portrayed
from benchmarks.chained import once
from benchmarks.data import open_data
from benchmarks.megapixels import mosaic, shape
from benchmarks.record import Figure, Options, Record
from pipelines import Augment, Loader, Samples, scan
from pipelines.decode import decoded
from pipelines.errors import UserError
from pipelines.geometry import (
    Draws,
    augmentation,
    compose,
    placement,
    square_from_output,
    stepwise,
    transforms,
)
from pipelines.preview import repeat

UNLIT = Augment(max_lighting=0.0)
PRESIZED = 460  # pixels, as in chapter 5 of fastai's book
OURS = "onewarp: one warp (Loader)"

# Arguments of the Loader beside the defaults, by the name of the row.
HIGH = "onewarp: one warp of 2 x 2 points a pixel"
LOADERS: dict[str, dict[str, Any]] = {OURS: {}, HIGH: {"quality": "high"}}


@dataclass(frozen=True, kw_only=True)
class InterpolationOptions(Options):
    """Compare pixels."""

    size: int = 224
    """Pixels."""
    images: int = 0
    """Photographs, evenly spread over those for training; 0: 125, or 25 when they are enlarged."""
    megapixels: float = 0.0
    """Size of the pictures; 0: as they are."""
    seed: int = 0
    """Seed of the random parameters."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one way made of one picture."""

    picture_HWC: np.ndarray
    """0 to 255, [size, size, 3]."""
    padded_HW: np.ndarray
    """Which of its pixels show padding, bool [size, size]."""
    ideal_from_output_33: np.ndarray | None = None
    """The map of its own ideal, where a way cannot take the parameters exactly; `None`: the map of the draw."""


Way = Callable[[np.ndarray, Draws, int], Outcome]


def presized(image_HWC: np.ndarray, draws: Draws, size: int) -> Outcome:
    """The square resized to 460 by Pillow's antialiased bilinear filter, rounded, then one bilinear warp."""
    square_HWC, _ = _square(image_HWC, draws, PRESIZED)
    matrix_33 = np.linalg.inv(square_from_output(PRESIZED)) @ augmentation(draws)[0] @ square_from_output(size)
    return Outcome(
        picture_HWC=oracle.warp(square_HWC, matrix_33, size),
        padded_HW=oracle.padded([matrix_33], [PRESIZED], [PRESIZED], size),
    )


def repeated(image_HWC: np.ndarray, draws: Draws, size: int) -> Outcome:
    """The conventional chain: each transform interpolates and rounds by itself."""
    picture_HWC, _ = repeat(image_HWC, draws, size)
    maps = [matrix_N33[0] for matrix_N33 in stepwise(draws, size).values()]
    sides = [size] * len(maps)
    return Outcome(picture_HWC=picture_HWC, padded_HW=oracle.padded(maps, sides, sides, size))


def fastai_presizing(image_HWC: np.ndarray, draws: Draws, size: int) -> Outcome:
    """fastai's own operators: `Resize(460)`, the composed warp at 460, the random crop to the output.

    Its crops fall on whole pixels and its warps put -1 and 1 on pixel centres, so the draw is moved to whole pixels and
    the ideal reads through the map that fastai's conventions give: what is measured is interpolation alone.
    """
    vision = import_module("fastai.vision.all")
    square_HWC, source_from_square_33 = _square(image_HWC, draws, PRESIZED, whole_pixels=True)
    single = {name: matrix_N33[0] for name, matrix_N33 in transforms(draws).items()}
    affine_33 = single["rotate"] @ single["zoom"] @ single["flip"]
    tilt_33 = single["perspective"]
    corner, cut = _whole_crop(single["crop"])

    def tilted(coords_NHW2: torch.Tensor) -> torch.Tensor:
        tilt = torch.from_numpy(tilt_33).to(coords_NHW2.dtype)
        mapped_NHW3 = torch.nn.functional.pad(coords_NHW2, (0, 1), value=1.0) @ tilt.T
        return mapped_NHW3[..., :2] / mapped_NHW3[..., 2:]

    image_NCHW = vision.TensorImage(torch.from_numpy(square_HWC.copy()).permute(2, 0, 1)[None].float() / 255)
    mat_N23 = torch.from_numpy(affine_33[None, :2]).float()
    warped_NCHW = image_NCHW.affine_coord(mat_N23, tilted, pad_mode="reflection")
    (left, top) = corner
    cropped_NCHW = warped_NCHW[..., top : top + cut, left : left + cut].affine_coord(sz=(size, size))
    picture_HWC = 255 * torch.Tensor(cropped_NCHW)[0].permute(1, 2, 0).numpy()

    half = (PRESIZED - 1) / 2
    pixel_from_square_33 = np.array([[half, 0, half + 0.5], [0, half, half + 0.5], [0, 0, 1]])
    warp_33 = pixel_from_square_33 @ tilt_33 @ affine_33 @ np.linalg.inv(pixel_from_square_33)
    scale = (cut - 1) / (size - 1)
    crop_33 = np.array([[scale, 0, left + 0.5 - 0.5 * scale], [0, scale, top + 0.5 - 0.5 * scale], [0, 0, 1]])
    return Outcome(
        picture_HWC=picture_HWC,
        padded_HW=oracle.padded([warp_33, crop_33], [PRESIZED] * 2, [PRESIZED] * 2, size),
        ideal_from_output_33=source_from_square_33 @ warp_33 @ crop_33,
    )


def antialiased(resample: Image.Resampling) -> Way:
    """The whole picture shrunk to the same size as ours, by one of Pillow's filters, then one bilinear warp."""

    def way(image_HWC: np.ndarray, draws: Draws, size: int) -> Outcome:
        height, width = image_HWC.shape[:2]
        matrix_33 = compose(draws, np.array([height]), np.array([width]), size)[0]
        return Outcome(
            picture_HWC=once(image_HWC, matrix_33, size, resample),
            padded_HW=oracle.padded([matrix_33], [height], [width], size),
        )

    return way


def _square(
    image_HWC: np.ndarray, draws: Draws, side: int, *, whole_pixels: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The square of a draw at `side` pixels, uint8 [side, side, 3], and the map [3, 3] from there to the image."""
    height, width = image_HWC.shape[:2]
    (half, _, x), (_, _, y), _ = placement(draws, np.array([height]), np.array([width]))[0]
    left, top = x - half, y - half
    if whole_pixels:
        left, top = round(left), round(top)
    box = (left, top, left + 2 * half, top + 2 * half)
    square_HWC = np.asarray(Image.fromarray(image_HWC).resize((side, side), Image.Resampling.BILINEAR, box=box))
    scale = 2 * half / side
    return square_HWC, np.array([[scale, 0, left], [0, scale, top], [0, 0, 1]])


def _whole_crop(crop_33: np.ndarray) -> tuple[tuple[int, int], int]:
    """((left, top), side) of the crop of a draw in the presized square, in whole pixels."""
    (side, _, x), (_, _, y), _ = crop_33
    cut = round(side * PRESIZED)
    left, top = ((centre - side + 1) * PRESIZED / 2 for centre in (x, y))
    return (min(round(left), PRESIZED - cut), min(round(top), PRESIZED - cut)), cut


@contextmanager
def enlarged(samples: Samples, count: int, megapixels: float, seed: int) -> Generator[Samples]:
    """`count` pictures of `megapixels`, 4:3, laid out of photographs; they are gone afterwards."""
    height, width = shape(megapixels)
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory(prefix="onewarp-pixels-") as folder:
        for number in range(count + 2):  # scan wants validation images of both classes
            chosen = rng.choice(len(samples), min(len(samples), 60), replace=False)
            paths = [samples.root / samples.paths[i] for i in chosen]
            side = max(height, width) if number < count else 64
            picture = Image.fromarray(mosaic(paths, min(height, side), side))
            file = Path(folder, "train" if number < count else "valid", f"class{number % 2}", f"{number:04d}.jpg")
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file, quality=95, subsampling=0)
        yield scan(folder).train


def loaded(
    samples: Samples, options: InterpolationOptions, arguments: dict[str, Any]
) -> tuple[dict[int, np.ndarray], float]:
    """What the Loader makes of each sample, by id, as float64 [size, size, 3], and its core-milliseconds a picture."""

    def loader(these: Samples, batch: int) -> Loader:
        return Loader(
            these,
            size=options.size,
            global_batch=batch,
            seed=options.seed,
            augment=UNLIT,
            threads=options.threads,
            **arguments,
        )

    pictures = {}
    for batch in loader(samples, 1).epoch(0):
        image_HWC = batch.images_NCHW[0].permute(1, 2, 0).numpy().astype(np.float64)
        pictures[int(batch.ids_N[0])] = 255 * (0.5 * image_HWC + 0.5)
    # Timed in batches, as in training; building the pipeline is a small part of four rounds.
    four = samples.subset(np.tile(np.arange(len(samples)), 4))
    size = min(16, len(four))
    started, read = time.process_time(), 0
    for batch in loader(four, size).epoch(1):
        read += len(batch.ids_N)
    return pictures, 1000 * (time.process_time() - started) / read


METRICS = {
    "PSNR, dB": oracle.psnr,
    "SSIM": oracle.ssim,
    "gradient energy ÷ ideal's": oracle.sharpness,
}
FINEST = "power of the finest detail ÷ ideal's"
CHAIN = "one warp, dB", "one by one, dB", "gap, dB"
WHOLE = "PSNR, padding too, dB"
DIFFERENCES = {OURS: "one warp − this, dB", HIGH: "one warp of 2 x 2 − this, dB"}
PADDED, COST = "padding, % of pixels", "core-ms"


def _finest(picture_HWC: np.ndarray, ideal_HWC: np.ndarray) -> np.floating:
    """The power of the upper half of all frequencies, 1/4 to 1/2 cycle a pixel, over the ideal's there."""
    power_F, ideal_F = oracle.spectrum(picture_HWC), oracle.spectrum(ideal_HWC)
    return power_F[len(power_F) // 2 :].sum() / ideal_F[len(ideal_F) // 2 :].sum()


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a picture of the outcome is drawn of."""

    example: dict[str, np.ndarray]
    """The first photograph: the ideal's and each way's picture of it, by name."""
    spectra: dict[str, np.ndarray]
    """Of each way, its power over the ideal's by frequency, the mean over all photographs, [F]."""
    left_out: float
    """Share of the pixels that no way is judged by."""
    blank: int
    """Photographs of which the draw shows one colour and nothing else: no way can be judged by them."""


def measure(
    samples: Samples, options: InterpolationOptions, ways: dict[str, Way]
) -> tuple[list[Figure], set[int], Seen]:
    """Every way on every sample; the figures, and how many samples along a pixel's side the ideals took."""
    n, size = len(samples), options.size
    loaders = {name: loaded(samples, options, arguments) for name, arguments in LOADERS.items()}
    loader = Loader(samples, size=size, global_batch=1, seed=options.seed, augment=UNLIT)
    cells: dict[tuple[str, str], list[float]] = {}
    per_sides = set()
    example: dict[str, np.ndarray] = {}
    powers: dict[str, list[np.ndarray]] = {}
    left_out: list[float] = []
    blank = 0
    small_HWC = np.zeros((2 * size, 2 * size, 3), np.uint8)
    for way in ways.values():  # imports and the like are outside the clock
        way(small_HWC, loader.draws(0, np.zeros(1, np.int64)), size)

    def note(row: str, picture_HWC: np.ndarray, ideal_HWC: np.ndarray, fit_HW: np.ndarray) -> None:
        # A spectrum is of the whole picture: where it is not fit it shows the ideal.
        whole_HWC = np.where(fit_HW[..., None], picture_HWC, ideal_HWC)
        powers.setdefault(row, []).append(oracle.spectrum(whole_HWC) / oracle.spectrum(ideal_HWC))
        cells.setdefault((row, FINEST), []).append(float(_finest(whole_HWC, ideal_HWC)))
        for column, metric in METRICS.items():
            cells.setdefault((row, column), []).append(metric(picture_HWC, ideal_HWC, fit_HW))
        psnrs = "PSNR, dB"
        for ours, column in DIFFERENCES.items():
            if row not in LOADERS or (row, ours) == (HIGH, OURS):
                cells.setdefault((row, column), []).append(cells[ours, psnrs][-1] - cells[row, psnrs][-1])

    for position in range(n):
        path = os.path.join(samples.root, samples.paths[position])
        started = time.process_time()
        with Image.open(path) as image:
            image.convert("RGB")
        decoding = 1000 * (time.process_time() - started)
        image_HWC = decoded(path)
        height, width = image_HWC.shape[:2]
        draws = loader.draws(0, np.array([position]))
        matrix_33 = compose(draws, np.array([height]), np.array([width]), size)[0]
        ideal_HWC, per_side = oracle.ideal(image_HWC, matrix_33, size)
        if np.ptp(ideal_HWC, axis=(0, 1)).max() < 1:  # of 255
            blank += 1
            continue
        per_sides.add(per_side)
        example.setdefault("the ideal", ideal_HWC)
        padded_HW = oracle.padded([matrix_33], [height], [width], size)
        outcomes = {}
        for name, (pictures, cost) in loaders.items():
            outcomes[name] = Outcome(picture_HWC=pictures[int(samples.ids_N[position])], padded_HW=padded_HW), cost
        for name, way in ways.items():
            started = time.process_time()
            outcome = way(image_HWC, draws, size)
            outcomes[name] = outcome, decoding + 1000 * (time.process_time() - started)
        # None is judged where any way shows padding: some read beyond the square where others mirror, and what is
        # measured is interpolation.
        fit_HW = ~oracle.around(np.any([outcome.padded_HW for outcome, _ in outcomes.values()], axis=0))
        for name, (outcome, cost) in outcomes.items():
            own_33 = outcome.ideal_from_output_33
            its_HWC = ideal_HWC if own_33 is None else oracle.ideal(image_HWC, own_33, size)[0]
            note(name, outcome.picture_HWC, its_HWC, fit_HW)
            cells.setdefault((name, WHOLE), []).append(oracle.psnr(outcome.picture_HWC, its_HWC))
            example.setdefault(name, outcome.picture_HWC)
            cells.setdefault((name, PADDED), []).append(100 * float(outcome.padded_HW.mean()))
            cells.setdefault((name, COST), []).append(cost)
        left_out.append(1 - float(fit_HW.mean()))
    if not left_out:
        raise UserError(f"None of the {n} photographs shows anything but one colour. Choose another --data.")
    figures = [
        Figure(row=row, column=column, samples=samples, centre="mean") for (row, column), samples in cells.items()
    ]
    columns = [*METRICS, FINEST, *DIFFERENCES.values(), PADDED, WHOLE, COST]
    spectra = {name: np.mean(power_NF, axis=0) for name, power_NF in powers.items()}
    ordered = sorted(figures, key=lambda figure: columns.index(figure.column))
    seen = Seen(example=example, spectra=spectra, left_out=float(np.mean(left_out)), blank=blank)
    return ordered, per_sides, seen


def main(options: InterpolationOptions) -> Record:
    default = 25 if options.megapixels else 125
    options = replace(options, images=options.images or (4 if options.quick else default))
    torch.set_num_threads(1)  # its threads wait by spinning, which would count as work
    samples = open_data(options).train
    spread = np.linspace(0, len(samples) - 1, min(options.images, len(samples))).round().astype(np.int64)

    ways: dict[str, Way] = {f"presize to {PRESIZED}, then one warp": presized, "repeated interpolation": repeated}
    skipped = {}
    if find_spec("fastai") is None:
        skipped["fastai's own operators"] = "not installed: fastai"
    else:
        ways["fastai's own operators"] = fastai_presizing
    if options.megapixels:
        for filter in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS):
            ways[f"Pillow's {filter.name.lower()} filter, then one warp"] = antialiased(filter)
        with enlarged(samples, options.images, options.megapixels, options.seed) as large:
            figures, per_sides, seen = measure(large, options, ways)
    else:
        figures, per_sides, seen = measure(samples.subset(spread), options, ways)
    if seen.blank:
        skipped[f"{seen.blank} of the photographs"] = "they show nothing but one colour"
    some = spread[:: max(1, len(spread) // (2 if options.quick else 25))]
    few = [decoded(os.path.join(samples.root, samples.paths[i])) for i in some]
    chain: dict[int, list[tuple[float, float]]] = {}
    for count, ours, theirs in chained.measured(few, options.size, options.seed):
        chain.setdefault(count, []).append((ours, theirs))
    for count, pairs in chain.items():
        row = f"{count} transform{'s' if count > 1 else ''} in a row"
        for column, decibels in zip(CHAIN, zip(*((a, b, a - b) for a, b in pairs), strict=True), strict=True):
            figures.append(Figure(row=row, column=column, samples=list(decibels), centre="mean"))

    record = Record(
        title=f"Pixels against a supersampled ideal, {options.size} px"
        + (f", sources of {options.megapixels:g} megapixels" if options.megapixels else ""),
        name="interpolation",
        options=options,
        figures=figures,
        skipped=skipped,
        remarks=(
            f"The ideal is the mean of {min(per_sides)}² to {max(per_sides)}² bicubic samples a pixel.",
            "fastai's crops fall on whole pixels: it is held against an ideal moved likewise.",
            f"Pixels where any way shows padding, and their neighbours ({100 * seen.left_out:.1f}%), count for none, "
            "but in the column that says so (in a spectrum they are the ideal's): presizing, fastai and the chain cut "
            "the square first and mirror what one warp reads.",
            "Transforms in a row are each a rotation of up to "
            f"{chained.ANGLE:g}°, a zoom of up to {chained.ZOOM:g} and a tilt of up to {chained.TILT:g} ({len(few)} "
            "photographs).",
            "Core time is from the file on, decoding included: ours in batches, the others one by one through Pillow "
            "and torch on one thread; benchmarks.loaders compares speed.",
        ),
        packages=("fastai",) if find_spec("fastai") else (),
    )
    record.publish()
    if options.json is not None:
        gaps = {count: tuple(np.mean(pairs, axis=0)) for count, pairs in chain.items()}
        portrayed.draw(options.json.with_suffix(".png"), seen.example, seen.spectra, gaps, options.size)
    return record
