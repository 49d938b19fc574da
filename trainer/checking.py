"""`check-export`: does an exported model, with images read by other libraries, say what it said in training?

Each way reads the images as the contract says, with what its library offers. A way whose library is not installed is
named and left out. The first that is there is what the others are held against: DALI, by which validation was read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from rich.console import Console

from pipelines import preprocess
from pipelines.errors import UserError, first_line
from trainer.bar import counted
from trainer.export_config import CheckExportConfig
from trainer.exported import GOLDEN, Exported, agree, batches, files_of
from trainer.run_folder import absolute, printable

LEVELS = 1.0  # of 255, on average: what another decoder or filter may differ by
NAMED = 5  # images with another answer that are named

Read = Callable[[Path, dict[str, Any]], np.ndarray]
"""A file and the preprocessing part of a contract, to the model's input, float32 [3, size, size]."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """What a model says of images that were read in one way, held against the first way."""

    name: str
    images: int
    mean_levels: float
    """Mean difference of the inputs' values, in levels of 255."""
    max_levels: float
    logits: float
    """Largest difference of a logit."""
    changed: tuple[str, ...]
    """Images whose most probable class is another one."""


@dataclass(frozen=True, kw_only=True)
class ExportCheck:
    """What was found."""

    golden_logits: float
    """Largest difference of the golden outputs and what the model makes of the golden inputs."""
    golden_scale: float
    """Largest golden logit."""
    golden_levels: dict[str, float]
    """Mean difference of the golden inputs and what each way makes of the golden images, levels."""
    ways: tuple[Way, ...]
    skipped: dict[str, str]
    """Ways that were left out, and why."""
    unread: dict[str, str]
    """Images that not every way reads, and why: they count for none."""

    @property
    def troubles(self) -> list[str]:
        """What does not agree, in words."""
        found = []
        if not agree(self.golden_logits, self.golden_scale):
            found.append(
                f"of the golden inputs the model gives other outputs than when it was exported, by up to "
                f"{self.golden_logits:.2g}: onnxruntime or torch computes otherwise here. Export again, or install "
                "the version that it was exported with"
            )
        for name, levels in self.golden_levels.items():
            if not levels <= LEVELS:
                found.append(
                    f"{name} reads the golden images otherwise than when they were exported, by {levels:.2f} levels on "
                    "average: its decoder or its filter is another"
                )
        return found


def check_export(config: CheckExportConfig, console: Console | None = None) -> ExportCheck:
    """Read images in each way, and compare inputs, outputs and answers.

    Raises:
        UserError: the export or the images cannot be used.
    """
    console = console or Console()
    exported = Exported.open(absolute(config.export))
    preprocessing = exported.preprocessing
    readers, skipped = _readers()
    unread: dict[str, str] = {}
    tensors = safetensors.numpy.load_file(exported.folder / exported.contract["golden"]["tensors"])
    golden_NCHW, golden_NC = tensors["images_NCHW"], tensors["logits_NC"]
    per_level_311 = _level(preprocessing)
    golden_levels = {}
    for name, read in readers.items():
        off = []
        for path, golden_CHW in zip(exported.contract["golden"]["images"], golden_NCHW, strict=True):
            try:
                off.append(np.abs(read(exported.folder / path, preprocessing) - golden_CHW) / per_level_311)
            except OSError as error:
                unread[path] = f"{name}: {first_line(error)}"
        if off:
            golden_levels[name] = float(np.mean(off))
    data = exported.folder / GOLDEN if config.data is None else absolute(config.data)
    return ExportCheck(
        golden_logits=float(np.abs(exported.logits(golden_NCHW) - golden_NC).max()),
        golden_scale=float(np.abs(golden_NC).max()),
        golden_levels=golden_levels,
        ways=tuple(_compared(exported, readers, data, config.limit, console, unread)),
        skipped=skipped,
        unread=unread,
    )


def _level(preprocessing: dict[str, Any]) -> np.ndarray:
    """What a level of 255 is worth in the model's input, float32 [3, 1, 1]."""
    return (1 / (255 * np.array(preprocessing["std"], np.float32)))[:, None, None]


def _compared(
    exported: Exported,
    readers: dict[str, Read],
    data: Path,
    limit: int | None,
    console: Console,
    unread: dict[str, str],
) -> Iterator[Way]:
    root, listing = files_of(data)
    paths = sorted(listing.files)
    if limit is not None and limit < len(paths):
        paths = [paths[i * len(paths) // limit] for i in range(limit)]
    first, *_ = readers
    per_level_311 = _level(exported.preprocessing)
    differences: dict[str, list[np.ndarray]] = {name: [] for name in readers}  # [mean, max] of each image
    logits: dict[str, list[np.ndarray]] = {name: [] for name in readers}
    names: list[str] = []

    def each(path: Path) -> np.ndarray:
        found = []
        for name, read in readers.items():
            try:
                found.append(read(path, exported.preprocessing))
            except OSError as error:
                raise OSError(f"{name}: {first_line(error)}") from None
        return np.stack(found)

    with counted(console, f"Reading {data} in {len(readers)} ways") as progress:
        refused: dict[str, str] = {}
        for good, images_NWCHW, bad in batches(root, paths, each):
            names += good
            refused |= bad
            for way, name in enumerate(readers) if good else ():
                off_NCHW = np.abs(images_NWCHW[:, way] - images_NWCHW[:, 0]) / per_level_311
                differences[name].append(np.stack([off_NCHW.mean(axis=(1, 2, 3)), off_NCHW.max(axis=(1, 2, 3))]))
                logits[name].append(exported.logits(np.ascontiguousarray(images_NWCHW[:, way])))
            progress(len(names), len(paths))
    unread |= refused
    if not names:
        path, why = next(iter(refused.items()))
        raise UserError(
            f"None of the {len(paths)} images in {str(data)!r} can be read in every way; {printable(path)}: {why}."
        )
    reference_NC = np.concatenate(logits[first])
    for name in readers:
        mean_N, max_N = np.concatenate(differences[name], axis=1)
        logits_NC = np.concatenate(logits[name])
        other_N = logits_NC.argmax(axis=1) != reference_NC.argmax(axis=1)
        yield Way(
            name=name,
            images=len(names),
            mean_levels=float(mean_N.mean()),
            max_levels=float(max_N.max()),
            logits=float(np.abs(logits_NC - reference_NC).max()),
            changed=tuple(names[i] for i in np.flatnonzero(other_N)),
        )


# ---- The ways


def _readers() -> tuple[dict[str, Read], dict[str, str]]:
    found: dict[str, Read] = {}
    skipped = {}
    for name, (package, distribution, make) in _WAYS.items():
        try:
            import_module(package)
            found[name] = make()
        except ImportError as error:
            skipped[name] = f"not installed: pip install {distribution} ({first_line(error)})"
    return found, skipped


def _dali() -> Read:
    """The parts of the CPU's loader, one image at a time."""
    from pipelines import geometry
    from pipelines.decode import DecodeError, Decoder
    from pipelines.kernel import warp
    from pipelines.shrink import shrink

    own = threading.local()  # DALI's pipelines, which are one thread's

    def read(path: Path, preprocessing: dict[str, Any]) -> np.ndarray:
        if not hasattr(own, "decoder"):
            own.decoder = Decoder(1, 1)
        try:
            (image_HWC,) = own.decoder.run([path.read_bytes()])
        except DecodeError as error:
            del own.decoder  # one that has failed is finished
            raise OSError(str(error)) from None
        size, points = preprocessing["size"], preprocess.points_of(preprocessing)
        centre = geometry.Centre(crop_pct=preprocessing["crop_pct"])
        draws = geometry.draw(centre, np.zeros((1, geometry.UNIFORMS)))
        height_1, width_1 = (np.array([length]) for length in image_HWC.shape[:2])
        matrix_133 = geometry.compose(draws, height_1, width_1, points)
        shrunk_12, matrix_133 = geometry.prefilter(matrix_133, height_1, width_1, points)
        if shrunk_12.any():
            image_HWC = shrink(image_HWC, *shrunk_12[0].tolist())
        mean_3, std_3 = (255.0 * np.array(preprocessing[name]) for name in ("mean", "std"))
        out_SS3 = np.empty((size, size, 3), np.float32)
        warp(image_HWC, matrix_133[0], mean_3, std_3, out_SS3, padding="reflect", points=points // size)
        return out_SS3.transpose(2, 0, 1)

    return read


def _pillow() -> Read:
    return preprocess.read


def _torchvision() -> Read:
    import torch
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.v2 import functional

    def read(path: Path, preprocessing: dict[str, Any]) -> np.ndarray:
        try:
            image_CHW = decode_image(str(path), ImageReadMode.RGB, apply_exif_orientation=True)
        except (RuntimeError, ValueError) as error:
            raise OSError(str(error)) from None
        if image_CHW.dtype == torch.uint16:  # 16-bit PNG; the others read its upper eight
            image_CHW = (image_CHW.int() >> 8).to(torch.uint8)
        (height, width), points = image_CHW.shape[1:], preprocess.points_of(preprocessing)
        side = preprocessing["crop_pct"] * min(height, width)
        shrunk = preprocess.shrunk_size(height, width, side / points)
        if shrunk != (height, width):
            image_CHW = functional.resize(image_CHW.float(), list(shrunk), antialias=True).round()
        # grid_sample's coordinates: -1 and 1 are the edges of the image.
        y_P, x_P = (
            torch.from_numpy((preprocess.centres(*axis, side, points) + 0.5) * 2 / axis[1] - 1)
            for axis in zip((height, width), shrunk, strict=True)
        )
        grid_PP2 = torch.stack(torch.meshgrid(x_P, y_P, indexing="xy"), dim=-1).float()
        square_1CPP = torch.nn.functional.grid_sample(
            image_CHW[None].float(), grid_PP2[None], mode="bilinear", padding_mode="border", align_corners=False
        )
        square_PPC = square_1CPP[0].permute(1, 2, 0).numpy()
        return preprocess.normalised(preprocess.averaged(square_PPC, preprocessing["size"]), preprocessing)

    return read


def _opencv() -> Read:
    cv2: Any = import_module("cv2")

    def read(path: Path, preprocessing: dict[str, Any]) -> np.ndarray:
        image_HWC = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if image_HWC is None:
            raise OSError("OpenCV cannot read it")
        image_HWC = cv2.cvtColor(image_HWC, cv2.COLOR_BGR2RGB)
        (height, width), points = image_HWC.shape[:2], preprocess.points_of(preprocessing)
        side = preprocessing["crop_pct"] * min(height, width)
        shrunk = preprocess.shrunk_size(height, width, side / points)
        if shrunk != (height, width):  # OpenCV has no antialiased triangle; the mean over an area is the nearest
            image_HWC = cv2.resize(image_HWC, shrunk[::-1], interpolation=cv2.INTER_AREA)
        y_P, x_P = (
            preprocess.centres(*axis, side, points).astype(np.float32)
            for axis in zip((height, width), shrunk, strict=True)
        )
        map_x_PP, map_y_PP = np.meshgrid(x_P, y_P)
        square_PPC = cv2.remap(image_HWC, map_x_PP, map_y_PP, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
        square_SSC = preprocess.averaged(square_PPC.astype(np.float32), preprocessing["size"])
        return preprocess.normalised(square_SSC, preprocessing)

    return read


# What each imports, and what pip installs for it.
_WAYS: dict[str, tuple[str, str, Callable[[], Read]]] = {
    "DALI": ("nvidia.dali", "nvidia-dali-cuda130", _dali),
    "Pillow": ("PIL", "pillow", _pillow),
    "torchvision": ("torchvision", "torchvision", _torchvision),
    "OpenCV": ("cv2", "opencv-python-headless", _opencv),
}


# ---- In words


def summary(found: ExportCheck, console: Console) -> None:
    """What was found, as a table."""

    def say(line: str, style: str = "") -> None:
        console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)

    say(f"golden    outputs reproduced to {found.golden_logits:.2g}")
    say("")
    say(f"{'read by':12}  {'images':>7}  {'mean diff.':>10}  {'largest':>8}  {'logits':>8}  {'answers changed':>15}")
    for way in found.ways:
        numbers = f"{way.mean_levels:10.3f}  {way.max_levels:8.1f}  {way.logits:8.4f}  {len(way.changed):15,}"
        say(f"{way.name:12}  {way.images:7,}  {numbers}")
    say(f"differences from {found.ways[0].name}: of input values in levels of 255, of logits at most")
    for way in found.ways:
        for path in way.changed[:NAMED]:
            say(f"changed   {way.name}: {printable(path)}")
    for path, why in list(found.unread.items())[:NAMED]:
        say(f"unread    {printable(path)}: {why}", style="yellow")
    if len(found.unread) > NAMED:
        say(f"          and {len(found.unread) - NAMED} more that not every way reads; they count for none")
    for name, why in found.skipped.items():
        say(f"left out  {name}: {why}", style="yellow")
    for trouble in found.troubles:
        say(f"trouble   {trouble}", style="red")
