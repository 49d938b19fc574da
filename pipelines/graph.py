"""The DALI graph: file, decode, one warp, light and normalise. It holds no random state and no cursor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
from nvidia.dali import Pipeline, pipeline_def

Device = Literal["cpu", "gpu"]

# One batch as the graph wants it: paths as uint8 arrays, height and width to shrink to before the warp float32 [N, 2]
# (0, 0: as decoded), matrices float32 [N, 3, 3], shift and scale float32 [N, 3].
GraphInput = tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _decode(encoded: Any, device: Device) -> Any:
    """RGB as displayed: the EXIF orientation is applied."""
    if device == "gpu":
        # Fancy upsampling makes the chroma of the GPU's decoder agree with the CPU's.
        return fn.decoders.image(
            encoded, device="mixed", output_type=types.DALIImageType.RGB, jpeg_fancy_upsampling=True
        )
    return fn.decoders.image(encoded, device="cpu", output_type=types.DALIImageType.RGB)


@pipeline_def(enable_conditionals=True)
def define(source: Iterator[GraphInput], size: int, device: Device, half: bool) -> Any:
    paths, shrunk, matrices, shift, scale = fn.external_source(
        source=source,
        num_outputs=5,
        dtype=[types.DALIDataType.UINT8] + [types.DALIDataType.FLOAT] * 4,
        ndim=[1, 1, 2, 1, 1],
    )
    images = _decode(fn.io.file.read(paths), device)
    if shrunk[0] > 0:  # per sample: most are read as they were decoded
        images = fn.resize(images, size=shrunk, interp_type=types.DALIInterpType.INTERP_LINEAR, antialias=True)
    images = fn.experimental.warp_perspective(
        images,
        matrices.gpu() if device == "gpu" else matrices,
        size=[size, size],
        inverse_map=True,
        pixel_origin="corner",
        border_mode="reflect_101",
        interp_type=types.DALIInterpType.INTERP_LINEAR,
    )
    # Light and normalise are one multiply-add: (x - shift) / scale, per sample and channel.
    return fn.crop_mirror_normalize(
        images,
        mean=shift,
        std=scale,
        dtype=types.DALIDataType.FLOAT16 if half else types.DALIDataType.FLOAT,
        output_layout="HWC",
    )


def build(
    source: Iterator[GraphInput],
    *,
    size: int,
    batch: int,
    device: Device,
    device_id: int | None,
    threads: int,
    half: bool = False,
) -> Pipeline:
    """A built pipeline that gives float NHWC batches of `size` pixels until `source` ends.

    Args:
        source: yields one `GraphInput` a batch; it is read up to two batches ahead.
        batch: most samples in a batch.
        device: where images are decoded, warped and normalised.
        device_id: index of the GPU; `None` on the CPU, where no driver is needed.
        threads: CPU threads for reading and decoding.
        half: float16 output instead of float32.
    """
    pipeline = define(
        source,
        size,
        device,
        half,
        batch_size=batch,
        num_threads=threads,
        device_id=device_id if device == "gpu" else None,
        prefetch_queue_depth=2,
    )
    pipeline.build()
    return pipeline


@pipeline_def
def _decode_alone() -> Any:
    path = fn.external_source(name="path", dtype=types.DALIDataType.UINT8, ndim=1)
    return _decode(fn.io.file.read(path, dont_use_mmap=True), "cpu")


def decoded(path: str) -> np.ndarray:
    """The pixels of one file as the warp reads them on a CPU, uint8 [H, W, 3].

    Raises:
        RuntimeError: DALI cannot decode the file.
    """
    pipeline = _decode_alone(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    pipeline.build()
    pipeline.feed_input("path", [np.frombuffer(os.fsencode(path), np.uint8)])
    (images,) = pipeline.run()
    return np.array(images.at(0))
