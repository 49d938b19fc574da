"""Images per second of our loader and of the conventional torchvision chain, on the same files.

    python -m benchmarks.loaders --data DIR [--json FILE]

The ways take turns, round by round, so that a machine whose speed drifts does not favour one. Each round reads
`--images` images from files to normalised float batches; starting workers and pipelines is outside the clock, and so
is the first batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.record import Row, write
from pipelines import Augment, Loader, Samples, scan
from pipelines.datasets import named_dataset
from pipelines.labels import Regex


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare loaders."""

    data: str = "breeds"
    """Folder of images, or the name of an embedded data set."""
    size: int = 224
    """Pixels."""
    batch: int = 64
    """Images in a batch."""
    threads: int = 2
    """Decoding threads of ours, worker processes of the others."""
    images: int = 512
    """Images read in each round."""
    rounds: int = 5
    """Measurements of each way."""
    json: Path | None = None
    """Write the record here."""


class Files(Dataset):
    """The same files as `Samples`, read by Pillow."""

    def __init__(self, samples: Samples, transform: Callable) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.samples.root / self.samples.paths[index]) as image:
            return self.transform(image.convert("RGB")), int(self.samples.labels_N[index])


def conventional(size: int) -> list:
    """The transforms as they are usually chained: each interpolates and rounds by itself."""
    return [
        v2.Resize(460),
        v2.RandomCrop(460),
        v2.RandomRotation([-10, 10], interpolation=v2.InterpolationMode.BILINEAR),
        v2.RandomResizedCrop(size, scale=(0.75, 1.0), ratio=(1.0, 1.0)),
        v2.RandomPerspective(0.2, p=0.75),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(brightness=0.2, contrast=0.2),
    ]


TO_FLOAT = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]


def torchvision_way(samples: Samples, options: Options, transforms: list) -> Iterator[int]:
    loader = DataLoader(
        Files(samples, v2.Compose(transforms)), batch_size=options.batch, shuffle=True, num_workers=options.threads
    )
    while True:
        for images_NCHW, _ in loader:
            yield len(images_NCHW)


def our_way(samples: Samples, options: Options) -> Iterator[int]:
    loader = Loader(samples, size=options.size, global_batch=options.batch, augment=Augment(), threads=options.threads)
    epoch = 0
    while True:
        for batch in loader.epoch(epoch):
            yield len(batch.labels_N)
        epoch += 1


def speed(sizes: Iterator[int], images: int) -> float:
    """Images per second, from the second batch on."""
    next(sizes)
    read, started = 0, time.perf_counter()
    while read < images:
        read += next(sizes)
    return read / (time.perf_counter() - started)


def main(options: Options) -> None:
    named = named_dataset(options.data)
    manifest = scan(named[0], labels=Regex(named[1])) if named else scan(options.data)
    samples = manifest.train
    torch.set_num_threads(options.threads)
    ways: dict[str, Callable[[], Iterator[int]]] = {
        "onewarp Loader, full augmentation": lambda: our_way(samples, options),
        "torchvision v2 chain on PIL images": lambda: torchvision_way(
            samples, options, [*conventional(options.size), v2.ToImage(), *TO_FLOAT]
        ),
        "torchvision v2 chain on tensors": lambda: torchvision_way(
            samples, options, [v2.ToImage(), *conventional(options.size), *TO_FLOAT]
        ),
    }
    figures: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            sizes = way()
            figures[name].append(speed(sizes, options.images))
            del sizes  # ends its workers before the next way starts
    rows = [Row(name=name, samples=samples) for name, samples in figures.items()]
    config = {key: value for key, value in asdict(options).items() if key != "json"}
    write(
        f"Loaders, {options.size} px, {options.threads} threads", "img/s", rows, config=config, json_file=options.json
    )


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.loaders", description=__doc__))
