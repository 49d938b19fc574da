"""A model that has been exported, taken up again: it needs no DALI, and as ONNX no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pipelines import preprocess
from pipelines.errors import UserError, first_line
from pipelines.listing import Listing, look_up, walk
from pipelines.manifest import Quarantined
from trainer.apply_config import PredictConfig
from trainer.bar import counted
from trainer.predictions import BEST, Predictions, finished
from trainer.run_folder import absolute

CONTRACT, PREPROCESS, GOLDEN, GOLDEN_TENSORS = "contract.json", "preprocess.py", "golden", "golden.safetensors"
FORMAT = 1  # of the contract
AGREE = 1e-3  # most difference of logits, as a share of the largest
BATCH = 32  # images that the model is given at once


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A folder that `onewarp export` wrote."""

    folder: Path
    contract: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Exported:
        """Take up an export; the model itself is loaded when it is first asked.

        Raises:
            UserError: it is none, was written by a later version, or its model is not the one that was written.
        """
        try:
            contract = json.loads((folder / CONTRACT).read_bytes())
            form, written, wanted = contract["format"], contract["model"]["file"], contract["model"]["sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder} holds no export: {CONTRACT} cannot be read ({first_line(error)}). Give a folder that "
                "`onewarp export` wrote."
            ) from None
        if form != FORMAT:
            raise UserError(
                f"{folder} was exported in format {form}, and this onewarp reads {FORMAT}. Export it "
                "again with this version."
            )
        file = folder / Path(written).name
        try:
            found = hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"The model {file} cannot be read ({error.strerror}). Copy or export it again.") from None
        if found != wanted:
            raise UserError(f"The model {file} is not the one that was exported: its checksum differs. Copy it again.")
        return cls(folder=folder, contract=contract)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.contract["classes"])

    @property
    def preprocessing(self) -> dict[str, Any]:
        return self.contract["preprocessing"]

    def logits(self, images_NCHW: np.ndarray) -> np.ndarray:
        """What the model says of float32 images, float32 [N, C]; on the CPU."""
        return self._model(images_NCHW)

    def probabilities(self, logits_NC: np.ndarray) -> np.ndarray:
        """float64 [N, C]; see `losses.Loss.probabilities`."""
        logits_NC = logits_NC.astype(np.float64)
        if self.contract["output"]["probabilities"] == "softmax":
            exponential_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
            return exponential_NC / exponential_NC.sum(axis=1, keepdims=True)
        return 1 / (1 + np.exp(-logits_NC))

    @cached_property
    def _model(self) -> Callable[[np.ndarray], np.ndarray]:
        described = self.contract["model"]
        file = self.folder / described["file"]
        try:
            return {"onnx": _onnx, "torch": _torch, "safetensors": _safetensors}[described["kind"]](file, self.contract)
        except ImportError as error:
            raise UserError(
                f"The model {file} needs the package {error.name}. Install it: pip install {error.name}"
            ) from None


def _onnx(file: Path, contract: dict[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = contract["input"]["name"], contract["output"]["name"]

    def run(images_NCHW: np.ndarray) -> np.ndarray:
        outputs: Any = session.run([names[1]], {names[0]: images_NCHW})
        return outputs[0]

    return run


def _torch(file: Path, contract: dict[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
    import torch

    return _by_torch(torch.export.load(file).module())


def _safetensors(file: Path, contract: dict[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
    import safetensors.torch

    from trainer import models

    described, classes = contract["model"], len(contract["classes"])
    size = contract["preprocessing"]["size"]
    model = models.build(described["name"], head=described["head"], classes=classes, size=size)
    model.load_state_dict(safetensors.torch.load_file(file))
    return _by_torch(model.eval())


def _by_torch(module: Any) -> Callable[[np.ndarray], np.ndarray]:
    import torch

    def run(images_NCHW: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(images_NCHW)).numpy()

    return run


def agree(difference: float, largest: float) -> bool:
    """Whether logits that differ by so much are the same, but for arithmetic in another order; `largest` is of them."""
    return difference <= AGREE * max(1.0, largest)


def is_export(folder: Path) -> bool:
    """Whether a folder is an export, and not a run."""
    return (folder / CONTRACT).is_file()


def predict(config: PredictConfig, console: Console) -> Predictions:
    """Apply an export to a folder of images, and write the table.

    Raises:
        UserError: the export, the images, or the place to write to cannot be used.
    """
    given = {"--tta": config.tta, "--workers": config.workers, "--weights best": config.weights == "best"}
    for flag, value in given.items():
        if value:
            raise UserError(
                f"{flag} is of no use to an export, which {config.run} is: its one model reads each image once, in "
                "this process. Leave it out, or apply the run itself."
            )
    exported, data, file = Exported.open(absolute(config.run)), absolute(config.data), absolute(config.out)
    described = exported.contract["model"]
    console.print(
        f"export    {exported.folder}: {described['name']}, {exported.preprocessing['size']} px, "
        f"{len(exported.classes)} classes, {described['file']}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    root, listing = files_of(data)
    paths, left_out = sorted(listing.files), dict(listing.rejected)
    read, best, probabilities = [], [], []
    with counted(console, f"Applying {exported.folder.name}") as progress:
        read_one = partial(preprocess.read, preprocessing=exported.preprocessing)
        for names, images_NCHW, bad in batches(root, paths, read_one):
            left_out |= bad
            if names:
                probabilities_NC = exported.probabilities(exported.logits(images_NCHW))
                best_NK = np.argsort(-probabilities_NC, axis=1, kind="stable")[:, :BEST]
                best.append(best_NK)
                probabilities.append(np.take_along_axis(probabilities_NC, best_NK, axis=1))
                read += names
            progress(len(read) + len(left_out), len(paths))
    if not read:
        name, why = next(iter(left_out.items()))
        raise UserError(f"None of the {len(left_out)} images in {str(data)!r} is usable; {name!r}: {why}.")
    threshold = exported.contract["output"]["threshold"] if config.threshold is None else config.threshold
    return finished(
        file,
        paths=tuple(read),
        classes=exported.classes,
        best_NK=np.concatenate(best),
        probabilities_NK=np.concatenate(probabilities),
        threshold=threshold,
        left_out=tuple(Quarantined(path=name, reason=why) for name, why in sorted(left_out.items())),
    )


def files_of(data: Path) -> tuple[Path, Listing]:
    """The image files of a folder, or the one file.

    Raises:
        UserError: there are none.
    """
    if data.is_file():
        return data.parent, look_up(data.parent, [data.name])[0]
    if not data.is_dir():
        raise UserError(f"The image folder {str(data)!r} does not exist. Give the folder that holds the images.")
    listing = walk(data)
    if not listing.files:
        raise UserError(f"There are no images in {str(data)!r}. Give the folder that holds the images.")
    return data, listing


def batches(
    root: Path, paths: Sequence[str], read: Callable[[Path], np.ndarray]
) -> Iterator[tuple[list[str], np.ndarray, dict[str, str]]]:
    """The images, a batch at a time, as `read` reads them on all cores: names, float32 [N, …], and what failed why."""

    def tried(path: str) -> np.ndarray | str:
        try:
            return read(root / path)
        except OSError as error:
            return error.strerror or first_line(error)

    parts = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        ahead = [pool.map(tried, part) for part in parts[:1]]
        for number, part in enumerate(parts):
            ahead += [pool.map(tried, part) for part in parts[number + 1 : number + 2]]  # while this one is used
            images = dict(zip(part, ahead.pop(0), strict=True))
            good = {name: image for name, image in images.items() if isinstance(image, np.ndarray)}
            bad = {name: why for name, why in images.items() if isinstance(why, str)}
            yield list(good), np.stack(list(good.values())) if good else np.empty(0, np.float32), bad
