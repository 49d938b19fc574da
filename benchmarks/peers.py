"""The other ways to read the same files: DALI without us, torchvision, albumentations, fastai.

Each is written as its own documentation writes it, shuffles, and gives batches of normalised float images for ever. All
that run in worker processes prefetch two batches a worker, which is the default of torch's `DataLoader`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali import Pipeline, pipeline_def
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from pipelines import Samples

PREFETCHED = 2  # batches a worker reads ahead, and batches a DALI pipeline does
_HALF = [0.5, 0.5, 0.5]
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else it asks a server for its latest version when it is imported
_PRESIZED = 460  # pixels, as in chapter 5 of fastai's book


def files(samples: Samples) -> list[str]:
    """Absolute paths, in the order of the samples."""
    return [os.path.join(samples.root, path) for path in samples.paths]


# ---- DALI


@pipeline_def
def _decode_only(source: Iterator[list[np.ndarray]]) -> Any:
    paths = fn.external_source(source=source, dtype=types.DALIDataType.UINT8, ndim=1)
    return fn.decoders.image(fn.io.file.read(paths), output_type=types.DALIImageType.RGB)


def dali_decode_only(paths: list[str], batch: int, threads: int) -> Iterator[int]:
    """Bytes to RGB pixels and nothing else, in the order of `paths`, once: the ceiling of whoever decodes."""

    def source() -> Iterator[list[np.ndarray]]:
        for start in range(0, len(paths), batch):
            yield [np.frombuffer(os.fsencode(path), np.uint8) for path in paths[start : start + batch]]

    pipeline = _decode_only(
        source(), batch_size=batch, num_threads=threads, device_id=None, prefetch_queue_depth=PREFETCHED
    )
    yield from _batches(pipeline)


def dali_decoding(samples: Samples, *, size: int, batch: int, threads: int) -> Iterator[int]:
    """`dali_decode_only` for ever, in a random order."""
    paths = np.array(files(samples), dtype=object)
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(len(paths))[: len(paths) // batch * batch]
        yield from dali_decode_only(list(paths[order]), batch, threads)


def _uniform(low: float, high: float) -> Any:
    return fn.random.uniform(range=(low, high))


@pipeline_def
def _dali_usual(paths: list[str], size: int) -> Any:
    encoded, _ = fn.readers.file(files=paths, random_shuffle=True, name="reader")
    images = fn.decoders.image(encoded, output_type=types.DALIImageType.RGB)
    resized: Any = fn.resize(images, resize_shorter=_PRESIZED)
    images = fn.crop(
        resized,
        crop=(_PRESIZED, _PRESIZED),
        crop_pos_x=_uniform(0.0, 1.0),
        crop_pos_y=_uniform(0.0, 1.0),
    )
    # Area of the crop 0.75 to 1 and zoom 1 to 1.1, in one scale; warp_affine knows no perspective.
    scale = size / _PRESIZED / fn.stack(*[_uniform(0.79, 1.0)] * 2)
    matrix = fn.transforms.translation(offset=[-_PRESIZED / 2, -_PRESIZED / 2])
    matrix = fn.transforms.scale(matrix, scale=scale)
    matrix = fn.transforms.rotation(matrix, angle=_uniform(-10.0, 10.0))
    matrix = fn.transforms.translation(matrix, offset=[size / 2, size / 2])
    images = fn.warp_affine(images, matrix=matrix, size=(size, size), inverse_map=False)
    images = fn.brightness_contrast(
        images, brightness=_uniform(0.8, 1.2), contrast=_uniform(0.8, 1.25), contrast_center=127.5
    )
    return fn.crop_mirror_normalize(
        images,
        mean=[127.5] * 3,
        std=[127.5] * 3,
        mirror=fn.random.coin_flip(),
        dtype=types.DALIDataType.FLOAT,
        output_layout="CHW",
    )


def dali_usual(samples: Samples, *, size: int, batch: int, threads: int) -> Iterator[int]:
    """Resize to 460, crop, `warp_affine` to the output: DALI as its examples are written."""
    pipeline = _dali_usual(
        files(samples),
        size,
        batch_size=batch,
        num_threads=threads,
        device_id=None,
        prefetch_queue_depth=PREFETCHED,
        seed=0,
    )
    yield from _batches(pipeline)


def _batches(pipeline: Pipeline) -> Iterator[int]:
    pipeline.build()
    while True:
        try:
            outputs: Any = pipeline.run()
        except StopIteration:
            return
        yield len(outputs[0])


# ---- torch's DataLoader


class Files(Dataset):
    """Images and labels, read and transformed by one function of the file's path."""

    def __init__(self, samples: Samples, read: Callable[[str], torch.Tensor]) -> None:
        self.paths, self.labels_N, self.read = files(samples), samples.labels_N, read

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.read(self.paths[index]), int(self.labels_N[index])


def _data_loader(samples: Samples, read: Callable[[str], torch.Tensor], batch: int, workers: int) -> Iterator[int]:
    loader = DataLoader(
        Files(samples, read),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
        prefetch_factor=PREFETCHED,
    )
    while True:
        for images_NCHW, _ in loader:
            yield len(images_NCHW)


def conventional(size: int) -> list:
    """The transforms as they are usually chained: each interpolates and rounds by itself."""
    return [
        v2.Resize(_PRESIZED),
        v2.RandomCrop(_PRESIZED),
        v2.RandomRotation([-10, 10], interpolation=v2.InterpolationMode.BILINEAR),
        v2.RandomResizedCrop(size, scale=(0.75, 1.0), ratio=(1.0, 1.0)),
        v2.RandomPerspective(0.2, p=0.75),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(brightness=0.2, contrast=0.2),
    ]


def _torchvision(samples: Samples, transforms: list, batch: int, workers: int) -> Iterator[int]:
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_HALF, _HALF)]
    transform = v2.Compose([*transforms, *to_float])

    def read(path: str) -> torch.Tensor:
        with Image.open(path) as image:
            return transform(image.convert("RGB"))

    return _data_loader(samples, read, batch, workers)


def torchvision_chain(samples: Samples, *, size: int, batch: int, threads: int) -> Iterator[int]:
    """`conventional` on Pillow's images, the quicker of torchvision's two backends here."""
    return _torchvision(samples, conventional(size), batch, threads)


def torchvision_crop(samples: Samples, *, size: int, batch: int, threads: int) -> Iterator[int]:
    """RandomResizedCrop and flip alone: less work than any other way here but decoding."""
    transforms = [v2.RandomResizedCrop(size, scale=(0.75, 1.0)), v2.RandomHorizontalFlip()]
    return _torchvision(samples, transforms, batch, threads)


def timm_train(samples: Samples, *, size: int, batch: int, threads: int) -> Iterator[int]:
    """timm's training transform with its defaults: RandomResizedCrop, flip, colour jitter."""
    data = import_module("timm.data")
    transform = data.create_transform(size, is_training=True, scale=(0.75, 1.0), mean=tuple(_HALF), std=tuple(_HALF))

    def read(path: str) -> torch.Tensor:
        with Image.open(path) as image:
            return transform(image.convert("RGB"))

    return _data_loader(samples, read, batch, threads)


def albumentations(samples: Samples, *, size: int, batch: int, threads: int) -> Iterator[int]:
    """RandomResizedCrop, flip and light on OpenCV's images: no rotation, zoom or perspective."""
    cv2, A, tensor = import_module("cv2"), import_module("albumentations"), import_module("albumentations.pytorch")
    transform = A.Compose(
        [
            A.RandomResizedCrop((size, size), scale=(0.75, 1.0)),
            A.HorizontalFlip(),
            A.RandomBrightnessContrast(p=0.75),
            A.Normalize(_HALF, _HALF),
            tensor.ToTensorV2(),
        ]
    )

    def read(path: str) -> torch.Tensor:
        cv2.setNumThreads(0)  # a worker is a thread of its own, as torch's are
        return transform(image=cv2.imread(path, cv2.IMREAD_COLOR_RGB))["image"]

    return _data_loader(samples, read, batch, threads)


# ---- spdl


def spdl_resized(samples: Samples, *, size: int, batch: int, threads: int) -> Iterator[int]:
    """SPDL's pipeline of threads: a batch decoded and resized by FFmpeg, then normalised. It augments nothing."""
    io, pipeline = import_module("spdl.io"), import_module("spdl.pipeline")
    paths, rng = np.array(files(samples), dtype=object), np.random.default_rng(0)

    def source() -> Iterator[list[str]]:
        while True:
            order = rng.permutation(len(paths))[: len(paths) // batch * batch]
            yield from (list(paths[part]) for part in order.reshape(-1, batch))

    def read(part: list[str]) -> torch.Tensor:
        images_NHWC = io.to_numpy(io.load_image_batch(part, width=size, height=size, pix_fmt="rgb24"))
        return (torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).float() - 127.5) / 127.5

    built = pipeline.PipelineBuilder().add_source(source()).pipe(read, concurrency=threads).add_sink(PREFETCHED)
    with (running := built.build(num_threads=threads, max_failures=0)).auto_stop():
        for images_NCHW in running:
            yield len(images_NCHW)


# ---- fastai


def fastai_presizing(samples: Samples, *, size: int, batch: int, threads: int) -> Iterator[int]:
    """Chapter 5 of fastai's book: `Resize(460)` by the workers, `aug_transforms` by batch in the main process."""
    vision = import_module("fastai.vision.all")
    labels = dict(zip(files(samples), samples.labels_N.tolist(), strict=True))
    paths = files(samples)
    block = vision.DataBlock(
        blocks=(vision.ImageBlock, vision.CategoryBlock(vocab=sorted(set(labels.values())))),
        get_items=lambda _: paths,
        get_y=lambda path: labels[path],  # it inspects signatures: a built-in has none
        splitter=vision.IndexSplitter([0]),
        item_tfms=vision.Resize(_PRESIZED),
        batch_tfms=[*vision.aug_transforms(size=size, min_scale=0.75), vision.Normalize.from_stats(_HALF, _HALF)],
    )
    loaders = block.dataloaders(None, bs=batch, num_workers=threads, device=torch.device("cpu"))
    while True:
        for images_NCHW, _ in loaders.train:
            yield len(images_NCHW)
