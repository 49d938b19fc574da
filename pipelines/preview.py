"""Look before you train: one image's whole way in words, and what augmentation does to it in pictures."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import grid_sample

from pipelines.decode import DecodeError, decoded
from pipelines.errors import UserError, first_line
from pipelines.firewall import Refused, examine, read_header
from pipelines.geometry import (
    UNIFORMS,
    Augment,
    Draws,
    ResizedDraws,
    augmentation,
    compose,
    draw,
    placement,
    prefilter,
    square_from_output,
    stepwise,
)
from pipelines.images import pixels_of
from pipelines.labels import Csv, Labels, Regex
from pipelines.loader import Loader
from pipelines.manifest import Manifest, Samples
from pipelines.plan import uniforms

_DEFAULT = Augment()
_DETAIL = 4  # a detail shows this part of the side


def find(samples: Samples, image: str | None) -> int:
    """Position of the image at the path `image`, relative to the root or as typed; the first for `None`.

    Raises:
        UserError: it is not among the samples.
    """
    if image is None:
        return 0
    name = _spelled(image, samples.root, samples.paths)
    if name not in samples.paths:
        raise UserError(
            f"{image!r} is not among the {len(samples):,} images for training under {str(samples.root)!r}; "
            f"{samples.paths[0]!r} is one of them."
        )
    return samples.paths.index(name)


def _spelled(image: str, root: Path, known: Collection[str]) -> str:
    """A path as the manifest spells it: relative to the root."""
    name = os.path.normpath(image)
    return name if name in known else os.path.relpath(image, root)


def batch_pictures(
    samples: Samples, *, size: int, seed: int, count: int, augment: Augment = _DEFAULT
) -> tuple[np.ndarray, list[str]]:
    """The first `count` images that training would show, uint8 [N, size, size, 3], with their classes."""
    loader = Loader(samples, size=size, global_batch=min(count, len(samples)), seed=seed, augment=augment)
    batch = next(loader.epoch(0))
    return loader.pictures(batch), [samples.classes[label] for label in batch.labels_N]


def same_pictures(
    samples: Samples, position: int, *, size: int, seed: int, count: int, augment: Augment = _DEFAULT
) -> tuple[np.ndarray, list[str]]:
    """One image as the first `count` epochs of training show it, uint8 [count, size, size, 3], with titles."""
    loader = Loader(samples.subset([position]), size=size, global_batch=1, seed=seed, augment=augment)
    pictures = [loader.pictures(next(loader.epoch(epoch)))[0] for epoch in range(count)]
    name = samples.classes[samples.labels_N[position]]
    return np.stack(pictures), [f"{name}, epoch {epoch}" for epoch in range(count)]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One image under one draw, read in two ways; all pictures uint8 [size, size, 3]."""

    once: np.ndarray
    """By one warp from the decoded image, as the loader reads it."""
    repeated: np.ndarray
    """Resized to the output size, then interpolated again by each transform of the draw."""
    once_detail: np.ndarray
    repeated_detail: np.ndarray
    """The same window of both, the one with the most detail, magnified without smoothing."""
    interpolations: int
    """How often the repeated picture was interpolated."""


def compare(
    samples: Samples, position: int, *, size: int, seed: int, epoch: int = 0, augment: Augment = _DEFAULT
) -> Comparison:
    """The book's picture (fastai, chapter 5): presizing's promise, one interpolation against many; light left out."""
    one = samples.subset([position])
    unlit = replace(augment, max_lighting=0.0)
    loader = Loader(one, size=size, global_batch=1, seed=seed, augment=unlit)
    once = loader.pictures(next(loader.epoch(epoch)))[0]
    draws = loader.draws(epoch, np.zeros(1, np.int64))
    repeated, interpolations = repeat(pixels_of(one, 0), draws, size)
    top, left, side = liveliest(once)
    window = np.s_[top : top + side, left : left + side]
    return Comparison(
        once=once,
        repeated=repeated,
        once_detail=_magnified(once[window], size),
        repeated_detail=_magnified(repeated[window], size),
        interpolations=interpolations,
    )


def repeat(image_HWC: np.ndarray, draws: Draws, size: int) -> tuple[np.ndarray, int]:
    """The conventional chain on one image with the parameters of a draw, light left out.

    The square is resized to `size` by Pillow's antialiased bilinear filter; then each transform that the draw does not
    leave neutral interpolates the rounded result of the one before it, bilinearly, mirrored at the border.

    Returns: uint8 [size, size, 3], and how many times its pixels were interpolated (a flip moves whole pixels).
    """
    height, width = image_HWC.shape[:2]
    (across, _, x), (_, down, y), _ = placement(draws, np.array([height]), np.array([width]))[0]
    left, top = max(0.0, x - across), max(0.0, y - down)  # rounding may leave the image by less than nothing
    box = (left, top, min(float(width), x + across), min(float(height), y + down))
    picture = np.asarray(Image.fromarray(image_HWC).resize((size, size), Image.Resampling.BILINEAR, box=box))
    interpolations = 1
    for name, matrix_N33 in stepwise(draws, size).items():
        if not np.allclose(matrix_N33[0], np.eye(3), atol=1e-9):
            picture = _warp(picture, matrix_N33[0])
            interpolations += name != "flip"
    return picture, interpolations


def _warp(picture_HWC: np.ndarray, matrix_33: np.ndarray) -> np.ndarray:
    """One bilinear warp of a square picture onto its own size."""
    size = len(picture_HWC)
    centres = np.arange(size) + 0.5
    x_HW, y_HW = np.meshgrid(centres, centres)
    u_HW, v_HW, w_HW = np.moveaxis(np.stack([x_HW, y_HW, np.ones_like(x_HW)], axis=-1) @ matrix_33.T, -1, 0)
    # grid_sample wants the square [-1, 1]^2 from edge to edge, which is what D gives.
    grid_NHW2 = torch.from_numpy(np.stack([u_HW / w_HW, v_HW / w_HW], axis=-1) * 2 / size - 1)[None].float()
    image_NCHW = torch.from_numpy(np.array(picture_HWC)).permute(2, 0, 1)[None].float()
    out_NCHW = grid_sample(image_NCHW, grid_NHW2, mode="bilinear", padding_mode="reflection", align_corners=False)
    return out_NCHW[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy()


def liveliest(picture_HWC: np.ndarray) -> tuple[int, int, int]:
    """(top, left, side) of the window with the greatest sum of absolute differences between neighbours."""
    side = max(8, len(picture_HWC) // _DETAIL)
    grey_HW = picture_HWC.mean(axis=2)
    change_HW = np.abs(np.diff(grey_HW, axis=0, prepend=0)) + np.abs(np.diff(grey_HW, axis=1, prepend=0))
    change_HW[0] = change_HW[:, 0] = 0
    sums = np.pad(change_HW.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    windows = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    top, left = np.unravel_index(windows.argmax(), windows.shape)
    return int(top), int(left), side


def _magnified(detail_HWC: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(detail_HWC).resize((size, size), Image.Resampling.NEAREST))


def summary(
    manifest: Manifest,
    labels: Labels,
    image: str | None,
    *,
    size: int,
    seed: int,
    batch: int,
    augment: Augment = _DEFAULT,
) -> Iterator[str]:
    """One training image's way from the file to its place in a batch, a line at a time.

    Args:
        manifest: of the folder, scanned with `labels`.
        image: path relative to the root; `None` takes the first that training would read.
        size, seed, batch, augment: as training would have them.

    Raises:
        UserError: at the step that fails, after the lines of those before it.
    """
    left_out = {bad.path: bad.reason for bad in manifest.quarantine}
    if image is not None and (name := _spelled(image, manifest.root, left_out)) in left_out:
        yield from _read(os.path.join(manifest.root, name))
        raise UserError(f"The way ends at the label: {left_out[name]}.")  # the file itself is good
    loader = Loader(manifest.train, size=size, global_batch=batch, seed=seed, augment=augment)
    samples = manifest.train
    if image is None:
        position = int(loader.plan.batch(0, 0)[0])
    elif (name := _spelled(image, manifest.root, manifest.paths)) in manifest.valid.paths:
        samples, position = manifest.valid, manifest.valid.paths.index(name)
    else:
        position = find(samples, image)
    training = samples is manifest.train
    if samples.store is None:
        yield from _read(os.path.join(samples.root, samples.paths[position]))
    else:
        yield f"store     {str(samples.store)!r}, row {samples.ids_N[position]}: {samples.paths[position]!r}"
        yield _decoded(pixels_of(samples, position))

    label = int(samples.labels_N[position])
    yield f"label     {samples.classes[label]!r}, {label} of 0–{len(samples.classes) - 1}; {_origin(labels)}"
    part = "training" if training else "validation"
    yield f"split     {part}, one of {len(samples):,}; id {samples.ids_N[position]} in the manifest"

    read = augment if training else None
    draws = draw(read, uniforms(seed, 0, samples.ids_N[[position]], UNIFORMS))
    heights_N, widths_N = samples.heights_N[[position]], samples.widths_N[[position]]
    yield f"draw      {_drawn(draws, seed)}" if training else "draw      none: validation reads the centred square"
    matrix_N33 = compose(draws, heights_N, widths_N, size)
    yield from _matrix("S", "square into image", placement(draws, heights_N, widths_N)[0])
    yield from _matrix("A", "augmentation in the square", augmentation(draws)[0])
    yield from _matrix("D", "output into square", square_from_output(size))
    yield from _matrix("S·A·D", "output pixel into image", matrix_N33[0])
    height, width = prefilter(matrix_N33, heights_N, widths_N, size)[0][0]
    words = f"to {height} x {width} first, antialiased" if height else "none: minified by no more than two"
    yield f"shrink    {words}"
    alone = Loader(samples.subset([position]), size=size, global_batch=1, seed=seed, augment=read)
    yield f"output    {_tensor(next(alone.epoch(0)).images_NCHW)}"

    first = next(loader.epoch(0))
    counts = np.bincount(first.labels_N.numpy(), minlength=len(samples.classes))
    yield f"batch     {_tensor(first.images_NCHW)}, channels_last"
    yield "          " + ", ".join(f"{n} {name}" for name, n in zip(samples.classes, counts, strict=True) if n)


def _read(file: str) -> Iterator[str]:
    """File, header and pixels of an image that may fail at any of them."""
    try:
        yield f"file      {file!r}, {os.stat(file).st_size:,} bytes"
    except OSError as error:
        raise UserError(f"The way ends at the file: {file!r} cannot be read ({error.strerror}).") from None
    header = read_header(file)
    if isinstance(header, Refused):
        raise UserError(f"The way ends at the header: {header.reason}. Replace the file, or leave it out.")
    with Image.open(file) as opened:
        yield f"header    {header.format}, {opened.mode}, {header.width} x {header.height}"
    (verdict,) = examine([file], threads=1)
    if isinstance(verdict, Refused):
        raise UserError(f"The way ends at the pixels: {verdict.reason}. Replace the file, or leave it out.")
    try:
        pixels_HWC = decoded(file)
    except (OSError, DecodeError) as error:
        raise UserError(f"The way ends at the pixels: {first_line(error)}.") from None
    with Image.open(file) as opened:  # a PNG may hold its EXIF behind its pixels, which are known to be good by now
        turned = opened.getexif().get(0x0112, 1)
    yield f"{_decoded(pixels_HWC)}, EXIF orientation {turned} applied"


def _decoded(pixels_HWC: np.ndarray) -> str:
    means = ", ".join(f"{mean:.0f}" for mean in pixels_HWC.mean(axis=(0, 1)))
    return (
        f"decoded   {' x '.join(map(str, pixels_HWC.shape))} (height, width, RGB), "
        f"{pixels_HWC.dtype} {pixels_HWC.min()}–{pixels_HWC.max()}, mean {means}"
    )


def _origin(labels: Labels) -> str:
    match labels:
        case Regex():
            return f"the first group of {labels.pattern!r} in the file's name"
        case Csv():
            return f"from the table {labels.path!r}"
        case _:
            return "the name of its folder"


def _drawn(draws: Draws, seed: int) -> str:
    value = {f.name.removesuffix("_N"): float(getattr(draws, f.name)[0]) for f in fields(Draws)}
    crop = f"crop {value['crop_side']:.3f} of the side at ({value['crop_x']:+.2f}, {value['crop_y']:+.2f})"
    if isinstance(draws, ResizedDraws):
        crop = f"crop {draws.areas_NT[0, 0]:.3f} of the area, {draws.ratios_NT[0, 0]:.3f} as wide as high, if it fits"
    return (
        f"(seed {seed}, epoch 0) {crop}, "
        f"{'flipped' if value['flip'] < 0 else 'not flipped'}, rotated {np.degrees(value['angle']):+.1f}°, "
        f"zoom {value['zoom']:.3f}, tilt ({value['warp_x']:+.3f}, {value['warp_y']:+.3f}), "
        f"brightness {value['brightness']:+.3f}, contrast {value['contrast']:.3f}"
    )


def _matrix(name: str, meaning: str, matrix_33: np.ndarray) -> Iterator[str]:
    for i, row in enumerate(matrix_33):
        numbers = " ".join(f"{number:10.4f}" for number in row)
        yield f"{name if i == 0 else '':8s}  [{numbers} ]" + (f"  {meaning}" if i == 0 else "")


def _tensor(images: torch.Tensor) -> str:
    low, high, mean, std = (float(f(images.float())) for f in (torch.min, torch.max, torch.mean, torch.std))
    shape = " x ".join(map(str, images.shape))
    kind = str(images.dtype).removeprefix("torch.")
    return f"{shape}, {kind}, {low:.2f} to {high:.2f}, mean {mean:.2f}, deviation {std:.2f}"
