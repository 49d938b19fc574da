"""`export`: a trained model, and with it everything that whoever serves it would else have to guess.

A folder: the model, `contract.json` (how an image becomes its input, what its output means), `preprocess.py` (the same
as code, on Pillow and NumPy), and eight golden images with the input and the output that belong to them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from rich.console import Console

from pipelines import preprocess
from pipelines.errors import UserError, first_line
from pipelines.images import pixels_of
from pipelines.manifest import Manifest, Samples
from pipelines.scanning import scan_to_apply
from pipelines.store import Store
from trainer import models
from trainer.export_config import ExportConfig, Form
from trainer.exported import CONTRACT, FORMAT, GOLDEN, GOLDEN_TENSORS, PREPROCESS, Exported, agree
from trainer.ranks import Ranks
from trainer.run_folder import absolute
from trainer.trained import Trained, open_run

GOLDEN_IMAGES = 8
FILES: dict[Form, str] = {"onnx": "model.onnx", "torch": "model.pt2", "safetensors": "model.safetensors"}


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written."""

    folder: Path
    model: Path
    difference: float
    """Of the golden images' logits, the exported model's and ours: the largest."""
    images: int
    """Golden ones."""


def export(config: ExportConfig, console: Console | None = None) -> Export:
    """Write the model of a run and its contract to a folder, and try the model on the golden images.

    Raises:
        UserError: the run, the images or the place to write to cannot be used; or the model cannot be exported so.
    """
    console = console or Console()
    trained, manifest = open_run(absolute(config.run), config.weights)
    out = trained.path / f"export-{config.to}" if config.out is None else absolute(config.out)
    if out.exists() and not (out / CONTRACT).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there and is no export. Choose another --out.")
    golden = _golden(config, trained, manifest)
    model = trained.model(Ranks()).to(memory_format=torch.contiguous_format)
    model.ordered(torch.preserve_format)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".onewarp-", dir=out.parent) as scratch:
            made = Path(scratch, "export")
            (made / GOLDEN).mkdir(parents=True)
            paths = _copied(golden, made / GOLDEN)
            images_NCHW = torch.cat([batch.images_NCHW for batch in _read(trained, golden)]).contiguous()
            with torch.inference_mode():
                logits_NC = model(images_NCHW)
            tensors = {"images_NCHW": images_NCHW, "logits_NC": logits_NC}
            safetensors.torch.save_file(tensors, made / GOLDEN_TENSORS)
            file = made / FILES[config.to]
            with console.status(f"Writing {file.name} …"):
                _WRITERS[config.to](model, images_NCHW[:2], file)
            shutil.copy(preprocess.__file__, made / PREPROCESS)
            contract = _contract(trained, config.to, file, [f"{GOLDEN}/{path}" for path in paths])
            (made / CONTRACT).write_text(json.dumps(contract, indent=2) + "\n", encoding="utf-8")
            difference = _tried(Exported.open(made), images_NCHW.numpy(), logits_NC.numpy(), config.to)
            if out.exists():
                shutil.rmtree(out)
            os.replace(made, out)
    except OSError as error:
        raise UserError(f"The export {out} cannot be written ({first_line(error)}). Choose another --out.") from None
    return Export(folder=out, model=out / FILES[config.to], difference=difference, images=len(paths))


def _golden(config: ExportConfig, trained: Trained, manifest: Manifest) -> Samples:
    """Eight images, evenly spread over those there are: in the order of their paths, so over the classes too."""
    if config.images is not None:
        samples = scan_to_apply(absolute(config.images), labels=None).samples
    else:
        samples = trained.validated(manifest, "--images")
    count = min(GOLDEN_IMAGES, len(samples))
    return samples.subset(np.arange(count) * len(samples) // count)


def _read(trained: Trained, samples: Samples) -> list[Any]:
    loader = trained.loader(samples, Ranks(), device=torch.device("cpu"))
    batches = list(loader.epoch(0))
    if loader.spoiled:
        bad = loader.spoiled[0]
        raise UserError(
            f"{bad.path!r} under {str(samples.root)!r} cannot be read any more: {bad.reason}. Put it back, or give "
            "other golden images with --images."
        )
    return batches


def _copied(samples: Samples, folder: Path) -> list[str]:
    """Write the files of the images, or what a store holds of them; returns their names."""
    names = []
    for i, path in enumerate(samples.paths):
        suffix = Path(path).suffix.lower()
        if samples.store is None:
            names.append(f"{i}{suffix}")
            shutil.copyfile(os.path.join(samples.root, path), folder / names[-1])
        elif (store := Store.open(samples.store)).kind == "encoded":
            names.append(f"{i}{suffix}")
            (folder / names[-1]).write_bytes(store.encoded(int(samples.ids_N[i])).tobytes())
        else:
            names.append(f"{i}.png")
            Image.fromarray(pixels_of(samples, i)).save(folder / names[-1])
    return names


def _contract(trained: Trained, form: Form, file: Path, golden: list[str]) -> dict[str, Any]:
    config, statistics = trained.config, models.statistics(trained.config.model)
    size = config.size
    return {
        "format": FORMAT,
        "model": {
            "file": file.name,
            "kind": form,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "name": config.model,
            "head": config.head,
            "run": trained.path.name,
            "weights": trained.weights.name,
        },
        "input": {"name": "images", "shape": ["n", 3, size, size], "dtype": "float32", "layout": "NCHW, RGB"},
        "output": {
            "name": "logits",
            "shape": ["n", len(trained.classes)],
            "probabilities": "sigmoid of each" if config.loss == "one-vs-rest" else "softmax",
            "threshold": trained.threshold,
        },
        "classes": list(trained.classes),
        "preprocessing": {
            "size": size,
            "crop_pct": config.crop_pct,
            "quality": config.quality,
            "mean": list(statistics.mean),
            "std": list(statistics.std),
            "in_words": [
                "Decode to RGB, 8 bits; apply the EXIF orientation; drop transparency.",
                "Take the square in the middle whose side is crop_pct times the shorter side.",
                "Let step be its side divided by size (by 2 x size where quality is high), in pixels. Where step is "
                "above 2, shrink the image, antialiased by a triangle, to 2 / step of its height and width, rounded; "
                "round its values to whole levels once.",
                "Read it bilinearly at size x size points, the centres of equal cells of the square. Where quality is "
                "high, at 2 size x 2 size points, of which each 2 x 2 are averaged.",
                "Divide by 255, subtract mean, divide by std, channel by channel; order as channels, rows, columns.",
            ],
            "code": PREPROCESS,
        },
        "golden": {"images": golden, "tensors": GOLDEN_TENSORS},
    }


def _to_onnx(model: torch.nn.Module, images_NCHW: torch.Tensor, file: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"Exporting to ONNX needs the package {error.name}: pip install onnx onnxscript onnxruntime. Or export "
            "--to torch, which needs nothing more."
        ) from None
    program: Any = torch.onnx.export(
        model,
        (images_NCHW,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
        verbose=False,
    )
    program.save(str(file), external_data=False)


def _to_torch(model: torch.nn.Module, images_NCHW: torch.Tensor, file: Path) -> None:
    dynamic = ({0: torch.export.Dim("n", min=1)},)
    torch.export.save(torch.export.export(model, (images_NCHW,), dynamic_shapes=dynamic), file)


def _quietly(write: Callable[..., None], model: torch.nn.Module, images_NCHW: torch.Tensor, file: Path) -> None:
    """Exporters talk much of what is going well."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            write(model, images_NCHW, file)
    except (UserError, OSError):
        raise
    except Exception as error:  # of many kinds
        raise UserError(
            f"The model cannot be written as {file.name} ({first_line(error)}). Try another --to; safetensors always "
            "works."
        ) from None
    finally:
        logging.disable(logging.NOTSET)


def _to_safetensors(model: torch.nn.Module, images_NCHW: torch.Tensor, file: Path) -> None:
    safetensors.torch.save_file(model.state_dict(), file)


_WRITERS: dict[Form, Callable[[torch.nn.Module, torch.Tensor, Path], None]] = {
    "onnx": partial(_quietly, _to_onnx),
    "torch": partial(_quietly, _to_torch),
    "safetensors": _to_safetensors,
}


def _tried(exported: Exported, images_NCHW: np.ndarray, logits_NC: np.ndarray, form: Form) -> float:
    difference = float(np.abs(exported.logits(images_NCHW) - logits_NC).max())
    if not agree(difference, float(np.abs(logits_NC).max())):
        raise UserError(
            f"The model exported to {form} does not say what the run's own says: logits differ by {difference:.2g}. "
            "Nothing was written. Try another --to."
        )
    return difference
