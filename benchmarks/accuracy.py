"""Does it matter to the model how its images are interpolated?

    onewarp bench accuracy [--data DIR] [--seeds 0 1 2 3 4] [--json FILE]

The same model is fine-tuned from the same weights, in the same order, with the same draws and dropout, at the same
rates; all that differs is how a training image is made of its file: by one warp (the Loader), by presizing to 460
pixels and one warp, or by a chain that interpolates at each transform and rounds to 8 bits in between. Light is off, as
it interpolates nothing. All are judged by the same validation images, read by the Loader. A difference is of two
trainings with the same seed.

Then skew between training and serving: the same models see their validation images as other libraries read them, at the
same size and from the same centred square.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.data import open_data
from benchmarks.first import first_model
from benchmarks.interpolation import UNLIT, presized
from benchmarks.record import Figure, Options, Record
from pipelines import Centre, Loader, Samples
from pipelines.decode import Decoder
from pipelines.geometry import Draws
from pipelines.loader import Batch
from pipelines.preview import repeat
from trainer import evaluate, models, optim, schedule
from trainer.journal import Journal
from trainer.loop import Learner, train_epoch
from trainer.position import Position
from trainer.precision import Precision
from trainer.ranks import Ranks

ONE = "one warp (Loader)"
ERROR, WORSE = "error, %", "worse than one warp by, percentage points"
SERVED, CHANGED = "error, %, read by ", "answers changed, %, read by "
SKEW = "worse than read by the Loader, points, read by "
_QUEUE = 4  # batches ahead, of each process


@dataclass(frozen=True, kw_only=True)
class AccuracyOptions(Options):
    """Train by each way of reading."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One training of each way for each."""
    model: str = "tf_efficientnet_lite0"
    """Body."""
    size: int = 160
    """Pixels."""
    batch: int = 32
    """Images in a step."""
    epochs: int = 4
    """With everything, after one with the head alone."""
    lr: float = 4e-3
    """Base rate of `fine_tune`, the same for all."""


# ---- The ways that are not ours


Way = Callable[[np.ndarray, Draws, int], np.ndarray]
"""Decoded pixels, a draw and a size to a picture, uint8 [size, size, 3]."""


def _presized(image_HWC: np.ndarray, draws: Draws, size: int) -> np.ndarray:
    return presized(image_HWC, draws, size).picture_HWC


def _repeated(image_HWC: np.ndarray, draws: Draws, size: int) -> np.ndarray:
    return repeat(image_HWC, draws, size)[0]


OTHERS: dict[str, Way] = {"presized to 460, then one warp": _presized, "repeated interpolation": _repeated}


class Made(Dataset[tuple[torch.Tensor, int]]):
    """The images of all epochs, one behind the other, as a way makes them."""

    def __init__(self, samples: Samples, way: Way, size: int, seed: int) -> None:
        self._samples, self._way, self._size, self._seed = samples, way, size, seed

    @cached_property  # in the process that reads
    def _loader(self) -> Loader:
        return Loader(self._samples, size=self._size, global_batch=1, seed=self._seed, augment=UNLIT)

    @cached_property
    def _decoder(self) -> Decoder:
        torch.set_num_threads(1)
        return Decoder(1, 1)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """The picture, uint8 [size, size, 3], and its position in the set."""
        epoch, position = divmod(index, len(self._samples))
        file = Path(self._samples.root, self._samples.paths[position])
        (image_HWC,) = self._decoder.run([file.read_bytes()])
        draws = self._loader.draws(epoch, np.array([position]))
        return torch.from_numpy(self._way(image_HWC, draws, self._size)), position


class Chain:
    """As much of a loader as `train_epoch` asks for; its epochs are read once each, in order."""

    def __init__(self, loader: Loader, made: Made, statistics: models.Statistics, epochs: int, processes: int) -> None:
        self.plan, self.steps, self._samples = loader.plan, loader.steps, loader.samples
        self._mean_3, self._std_3 = torch.tensor(statistics.mean), torch.tensor(statistics.std)
        self._device = Ranks().device
        planned = [
            (epoch * len(self._samples) + self.plan.batch(epoch, step)).tolist()
            for epoch in range(epochs)
            for step in range(self.steps)
        ]
        self._batches = iter(
            DataLoader(
                made,
                batch_sampler=planned,
                num_workers=processes,
                prefetch_factor=_QUEUE,
                multiprocessing_context="spawn",  # DALI has threads here
            )
        )

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        for step in range(start_step, self.steps):
            pictures_NHWC, positions_N = next(self._batches)
            images_NHWC = (pictures_NHWC.float() / 255 - self._mean_3) / self._std_3
            yield Batch(
                step=step,
                images_NCHW=images_NHWC.permute(0, 3, 1, 2).to(self._device),
                labels_N=torch.from_numpy(self._samples.labels_N[positions_N.numpy()]).to(self._device),
                ids_N=torch.from_numpy(self._samples.ids_N[positions_N.numpy()]),
            )


# ---- Training


def trained(options: AccuracyOptions, train: Samples, classes: int, name: str, seed: int) -> Learner:
    """A model fine-tuned on images of the way `name`."""
    statistics = models.statistics(options.model)
    torch.manual_seed(seed)
    model = first_model(options.model, head="fastai", classes=classes, size=options.size)
    ranks = Ranks()
    model = model.to(device=ranks.device).ordered(torch.channels_last)
    learner = Learner(
        model=model,
        optimizer=optim.build(model, 0.01, options.size),
        precision=Precision(name="fp32", device=ranks.device),
        ranks=ranks,
    )
    loader = Loader(
        train,
        size=options.size,
        global_batch=options.batch,
        seed=seed,
        augment=UNLIT,
        threads=options.threads,
        mean=statistics.mean,
        std=statistics.std,
        device="gpu" if ranks.device.type == "cuda" else "cpu",
    )
    batches: Loader | Chain = loader
    if name != ONE:
        made = Made(train, OTHERS[name], options.size, seed)
        batches = Chain(loader, made, statistics, 1 + options.epochs, options.threads)
    rates = {"base_lr": options.lr, "groups": len(optim.groups_of(learner.optimizer)), "steps_per_epoch": loader.steps}
    for phase in schedule.fine_tune(**rates, epochs=options.epochs, freeze_epochs=1):
        optim.forget(learner.optimizer)
        learner.train(first_group=phase.freeze_to)
        position = Position(epoch=phase.first_epoch, base_lr=options.lr)
        for _ in range(phase.epochs):
            read: Any = batches
            *_, last = train_epoch(learner, read, phase, position, seed=seed, journal=Journal(None))
            position = Position(epoch=last.epoch + 1, updates=last.updates, base_lr=options.lr)
    return learner


# ---- Serving


def _torchvision(path: str, size: int) -> np.ndarray:
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    read = v2.Compose([v2.CenterCrop(min(upright.size)), v2.Resize((size, size), antialias=True)])
    return np.asarray(read(upright))


def _pillow(path: str, size: int) -> np.ndarray:
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    return np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC))


def _opencv(path: str, size: int) -> np.ndarray:
    cv2: Any = import_module("cv2")
    image_HWC = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)
    height, width = image_HWC.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return cv2.resize(image_HWC[top : top + side, left : left + side], (size, size), interpolation=cv2.INTER_LINEAR)


SERVERS: dict[str, Callable[[str, int], np.ndarray]] = {
    "torchvision, antialiased": _torchvision,
    "Pillow, bicubic": _pillow,
    "OpenCV, linear": _opencv,
}


def served(learner: Learner, samples: Samples, read: Callable[[str, int], np.ndarray], options: AccuracyOptions) -> Any:
    """What the model predicts of images that `read` reads, int64 [N]."""
    statistics = models.statistics(options.model)
    mean_3, std_3 = torch.tensor(statistics.mean), torch.tensor(statistics.std)
    learner.model.eval()
    predicted = []
    with torch.inference_mode():
        for start in range(0, len(samples), options.batch):
            paths = [str(Path(samples.root, path)) for path in samples.paths[start : start + options.batch]]
            pictures_NHWC = torch.from_numpy(np.stack([read(path, options.size) for path in paths]))
            images_NHWC = (pictures_NHWC.float() / 255 - mean_3) / std_3
            images_NCHW = images_NHWC.permute(0, 3, 1, 2).to(learner.ranks.device)
            predicted.append(learner.model(images_NCHW).argmax(dim=1))
    return torch.cat(predicted).cpu().numpy()


# ---- The record


def verdict(worse: Figure) -> str:
    """Whether the ways can be told apart."""
    low, high, _ = worse.interval
    n = len(worse.samples)
    if low > 0 or high < 0:
        which = "worse" if low > 0 else "better"
        return f"By {n} seeds {worse.row} is {which} than one warp: the interval of the differences excludes 0."
    return f"By {n} seeds {worse.row} cannot be told from one warp: the interval of the differences holds 0."


def main(options: AccuracyOptions) -> Record:
    manifest = open_data(options)
    train = manifest.train
    if options.quick:
        train = train.subset(np.arange(min(48, len(train))))
        options = replace(options, seeds=(0, 1), model="test_efficientnet", size=32, batch=8, epochs=1, threads=1)
    torch.set_num_threads(options.threads)
    figures, skipped = [], {}
    errors: dict[str, list[float]] = {ONE: [], **{name: [] for name in OTHERS}}
    statistics = models.statistics(options.model)
    valid = Loader(
        manifest.valid,
        size=options.size,
        global_batch=64,
        augment=Centre(),
        threads=options.threads,
        mean=statistics.mean,
        std=statistics.std,
        device="gpu" if torch.cuda.is_available() else "cpu",
    )
    servers = dict(SERVERS)
    if find_spec("cv2") is None:
        skipped["OpenCV, linear"] = "not installed: opencv-python-headless"
        del servers["OpenCV, linear"]
    skew: dict[tuple[str, str], list[float]] = {}
    for seed, name in itertools.product(options.seeds, errors):
        learner = trained(options, train, len(manifest.classes), name, seed)
        judgement = evaluate.judge(learner, valid)
        error = 100 * judgement.error_rate
        errors[name].append(error)
        for server, read in servers.items():
            predicted_N = served(learner, manifest.valid, read, options)
            wrong = 100 * float((predicted_N != manifest.valid.labels_N).mean())
            changed = 100 * float((predicted_N != judgement.predicted_N).mean())
            for column, percent in ((SERVED, wrong), (SKEW, wrong - error), (CHANGED, changed)):
                skew.setdefault((f"trained by {name}", column + server), []).append(percent)
    for name, percent in errors.items():
        figures.append(Figure(row=name, column=ERROR, samples=percent, centre="mean"))
        if name != ONE:
            worse = [theirs - ours for theirs, ours in zip(percent, errors[ONE], strict=True)]
            figures.append(Figure(row=name, column=WORSE, samples=worse, centre="mean"))
    verdicts = [verdict(figure) for figure in figures if figure.column == WORSE]
    figures += [Figure(row=row, column=column, samples=each, centre="mean") for (row, column), each in skew.items()]

    record = Record(
        title=f"Accuracy by interpolation, {options.model}, {options.size} px, {1 + options.epochs} epochs",
        name="accuracy",
        options=options,
        figures=figures,
        skipped=skipped,
        remarks=(
            f"{len(train):,} images to train, {len(manifest.valid):,} to validate; seeds "
            f"{', '.join(map(str, options.seeds))}. A difference is of two trainings with one seed, its interval "
            "Student's.",
            "Presizing and the chain cut the square first, and mirror what one warp still reads beyond it: so some "
            "pixels at borders differ too.",
            *verdicts,
            "The intervals are of seeds: all trainings are judged by the same images, and how others would judge them "
            "is not in it.",
        ),
        packages=() if skipped else ("opencv-python-headless",),
    )
    record.publish()
    return record
