"""A run that has been trained, taken up again to be applied to images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import timm
import torch
from rich.console import Console

from pipelines.errors import UserError, first_line
from pipelines.geometry import Augment, Centre
from pipelines.loader import Loader
from pipelines.manifest import Manifest, Samples
from trainer import losses, models
from trainer.apply_config import Weights
from trainer.config import TrainConfig
from trainer.models import Classifier
from trainer.precision import Precision, has_tf32, resolve
from trainer.ranks import Ranks
from trainer.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run's folder says of its model, as each worker needs it."""

    path: Path
    """The run's folder, absolute."""
    config: TrainConfig
    classes: tuple[str, ...]
    weights: Path

    @property
    def threshold(self) -> float:
        """What the best class must reach, for an image not to be none of the classes."""
        return 0.5 if self.config.loss == "one-vs-rest" else 0.0

    def validated(self, manifest: Manifest, instead: str) -> Samples:
        """The images that the run was validated on; `instead` is the flag that names others.

        Raises:
            UserError: they are gone.
        """
        samples = manifest.valid.share(self.config.subset, self.config.split_seed)
        if not samples.root.is_dir() and samples.store is None:
            raise UserError(
                f"The images that the run was validated on are gone: the folder {str(samples.root)!r} does not exist. "
                f"Put it back, or give other images with {instead}."
            )
        return samples

    def describe(self, tta: int, console: Console) -> None:
        """Say which model is applied."""
        config = self.config
        words = f"{config.model}, {config.size} px, {len(self.classes)} classes, weights {self.weights.name}"
        views = f", {tta} augmented readings an image" if tta else ""
        console.print(f"run       {self.path}: {words}{views}", highlight=False, markup=False, soft_wrap=True)

    def model(self, ranks: Ranks) -> Classifier:
        """The model with its weights, on this rank's device, in evaluation mode.

        Raises:
            UserError: the weights are not those of the model.
        """
        model = models.build(self.config.model, head=self.config.head, classes=len(self.classes), size=self.config.size)
        try:
            model.load_state_dict(safetensors.torch.load_file(self.weights))
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            raise UserError(
                f"The weights {self.weights} do not fit the model {self.config.model} with a {self.config.head} head, "
                f"which the run's configuration names ({first_line(error)}). Do not change a run's files."
            ) from None
        return model.to(device=ranks.device).to(memory_format=torch.channels_last).eval()

    def precision(self, ranks: Ranks) -> Precision:
        """The number format that training validated in; fp32 in place of a tf32 that this device does not have."""
        choice = self.config.precision
        return resolve("fp32" if choice == "tf32" and not has_tf32(ranks.device) else choice, ranks.device)

    def loss(self) -> losses.Loss:
        """The loss that training was judged by: without label smoothing and class weights."""
        return losses.named(self.config.loss, focal_gamma=self.config.focal_gamma)

    def loader(self, samples: Samples, ranks: Ranks, *, device: torch.device, augmented: bool = False) -> Loader:
        """Reads each of the samples once, as the run's validation does, or augmented as in its training."""
        config, statistics = self.config, models.statistics(self.config.model)
        augment: Augment | Centre = config.augment if augmented else Centre(crop_pct=config.crop_pct)
        return Loader(
            samples,
            size=config.size,
            # As many images at a time as a worker had in training: they fit into the memory of its device.
            global_batch=-(-config.global_batch // max(1, config.crew.most)) * ranks.world_size,
            seed=config.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            augment=augment,
            quality=config.quality,
            each_once=True,
            device="gpu" if device.type == "cuda" else "cpu",
            device_id=ranks.local_rank,
            threads=ranks.cores,
            mean=statistics.mean,
            std=statistics.std,
            half=device.type == "cuda" and self.precision(ranks).half_images,
        )


def open_run(path: Path, weights: Weights) -> tuple[Trained, Manifest]:
    """Take up the run in the folder `path`, and the table of the images that it was trained on.

    Raises:
        UserError: there is no run, it has not finished, or it cannot be used here.
    """
    folder = RunFolder(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        others = [entry.name for entry in sorted(path.parent.glob("*")) if RunFolder(entry).config.is_file()]
        known = f"; runs beside it: {', '.join(others[:10])}{', …' if len(others) > 10 else ''}" if others else ""
        raise UserError(f"The run {path} {what}{known}. Give the folder of a finished run.")
    if not folder.config.is_file():
        raise UserError(f"{path} is no run: there is no {folder.config.name} in it. Give the folder of a finished run.")
    config = folder.read_config()
    if not (config.model in models.TORCHVISION or timm.is_model(config.model)):
        raise UserError(
            f"The run {path} was trained with the model {config.model}, which neither torchvision nor timm has here "
            f"(timm {timm.__version__}). Install the version of timm that it was trained with."
        )
    if not folder.model.is_file():
        raise UserError(
            f"The run {path} has not finished: there is no {folder.model.name} in it. Train it to its end, with the "
            f"same settings and --name {path.name}."
        )
    file = folder.model if weights == "last" else folder.best
    if not file.is_file():
        raise UserError(f"The run {path} has kept no best weights: there is no {file.name} in it. Use --weights last.")
    try:
        with safetensors.safe_open(file, "pt"):
            pass
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"The weights {file} cannot be read ({first_line(error)}). Copy or train the run again."
        ) from None
    manifest = Manifest.read(folder.manifest)
    return Trained(path=path, config=config, classes=manifest.classes, weights=file), manifest
