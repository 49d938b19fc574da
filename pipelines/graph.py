"""The DALI graph: image, decode, one warp, light and normalise. It holds no random state and no cursor.

On a GPU it is the whole way of a batch. On a CPU the `reader` takes one part of it, `RowsDecoder`, and shrinks and
warps by itself; the whole graph runs there too, for tests of it, and of the reader against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import tee
from typing import Any, Literal, NamedTuple

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.math as dmath
import nvidia.dali.types as types
from nvidia.dali import Pipeline, pipeline_def
from nvidia.dali.pipeline import do_not_convert

from pipelines.geometry import Padding

Device = Literal["cpu", "gpu"]
Kind = Literal["files", "encoded", "decoded", "mixed"]
"""Where images are: in files; in memory, as the bytes of files; in memory, decoded; some in files, some decoded."""
Quality = Literal["normal", "high"]
"""Bilinear interpolation at each output pixel, or the mean of it at 2 x 2 points of each."""

_BORDER_MODE = {"reflect": "reflect_101", "zeros": "constant", "border": "replicate"}
_FLOAT, _INT32, _UINT8 = types.DALIDataType.FLOAT, types.DALIDataType.INT32, types.DALIDataType.UINT8
_RGB = types.DALIImageType.RGB

NOT_STORED = np.zeros((1, 1, 3), np.uint8)
"""Stands for the pixels of an image of a mixed batch that is still to be decoded. No image is that small."""


class GraphInput(NamedTuple):
    """One batch as the graph wants it."""

    images: list[np.ndarray]
    """uint8: paths, the bytes of files, or pixels [rows, W, 3], by the kind of graph. Pixels and bytes are read where
    they lie, without a copy: they must not change until their batch is out. DALI holds a reference until then."""
    shrunk_N2: np.ndarray
    """float32, height and width to shrink to before the warp; 0, 0: as decoded."""
    matrix_N33: np.ndarray
    """float32, from the output to the rows that are read, shrunk."""
    shift_N3: np.ndarray
    """float32; an output value is (x - shift) / scale."""
    scale_N3: np.ndarray
    """float32."""
    rows_N2: np.ndarray
    """int32, first row to decode and the one after the last. Pixels given are those rows already. See `reads_rows`."""
    paths: list[np.ndarray] | None = None
    """uint8, of a mixed batch: the path of each image that is `NOT_STORED`, anything for the others."""


def reads_rows(kind: Kind, device: Device) -> bool:
    """Whether a graph reads the rows of `GraphInput.rows_N2` alone; otherwise whole images.

    The hardware decoder of a GPU decodes whole images at full speed, and gives parts to the slower software.
    """
    return device == "cpu" or kind in ("decoded", "mixed")


@do_not_convert  # plain Python: DALI's rewriting of `if` is for what depends on a sample
def _inputs(source: Iterator[GraphInput], kind: Kind, device: Device) -> tuple[Any, dict[str, Any]]:
    """The images of a batch, and all that is small."""
    names = ["shrunk_N2", "matrix_N33", "shift_N3", "scale_N3"]
    dtypes, ndims = [_FLOAT] * 4, [1, 2, 1, 1]
    if reads_rows(kind, device) and kind != "decoded":
        names, dtypes, ndims = [*names, "rows_N2"], [*dtypes, _INT32], [*ndims, 1]
    if kind == "mixed":
        names, dtypes, ndims = [*names, "paths"], [*dtypes, _UINT8], [*ndims, 1]
    # Two sources, because copying is quicker for what is small: DALI then keeps no Python object alive for each.
    first, second = tee(source)
    (images,) = fn.external_source(
        source=((batch.images,) for batch in first),
        num_outputs=1,
        dtype=[_UINT8],
        ndim=[3 if kind in ("decoded", "mixed") else 1],
        layout=["HWC" if kind in ("decoded", "mixed") else ""],
        no_copy=kind != "files",
    )
    numbers = fn.external_source(
        source=(tuple(getattr(batch, name) for name in names) for batch in second),
        num_outputs=len(names),
        dtype=dtypes,
        ndim=ndims,
    )
    return images, dict(zip(names, numbers, strict=True))


def _read(paths: Any) -> Any:
    # Without mmap, a file that another process cuts short meanwhile is an error instead of a SIGBUS; also quicker.
    return fn.io.file.read(paths, dont_use_mmap=True)


def _decode_rows(encoded: Any, rows: Any | None) -> Any:
    """RGB as displayed, the EXIF orientation applied; all rows, or those from `rows[0]` to before `rows[1]`.

    Where DALI's parser rejects one image of a batch, the decoder (2.4) raises while its threads still work on the
    others, and the process may die. The peek raises cleanly; and it goes first, because the slice depends on it. It
    also keeps the slice inside an image that has become smaller since its size was noted.
    """
    height = fn.peek_image_shape(encoded, dtype=_INT32)[0]
    if rows is None:
        start, stop = height * 0, height
    else:
        stop = dmath.min(rows[1], height)
        start = dmath.min(rows[0], stop - 1)
    return fn.decoders.image_slice(
        encoded,
        start=fn.stack(start),
        end=fn.stack(stop),
        axis_names="H",
        output_type=_RGB,
    )


def _decode_on_gpu(encoded: Any, largest: tuple[int, int], hardware_share: float) -> Any:
    # The peek runs on the CPU, all of whose operators come before the decoder's. See `_decode_rows`.
    fn.peek_image_shape(encoded, preserve=True)
    return fn.decoders.image(
        encoded,
        device="mixed",
        output_type=_RGB,
        jpeg_fancy_upsampling=True,  # the chroma of the GPU's decoder agrees with the CPU's
        hw_decoder_load=hardware_share,
        preallocate_height_hint=largest[0],
        preallocate_width_hint=largest[1],
    )


def _shrink(images: Any, sizes: Any) -> Any:
    return fn.resize(images, size=sizes, interp_type=types.DALIInterpType.INTERP_LINEAR, antialias=True)


@pipeline_def(enable_conditionals=True)
def define(
    source: Iterator[GraphInput],
    *,
    kind: Kind,
    size: int,
    device: Device,
    half: bool,
    padding: Padding,
    quality: Quality,
    largest: tuple[int, int],
    hardware_share: float,
) -> Any:
    given, numbers = _inputs(source, kind, device)
    matrices, shift, scale = numbers["matrix_N33"], numbers["shift_N3"], numbers["scale_N3"]
    whole = None
    if kind == "mixed":
        if given.shape()[0] > 1:  # per sample: it is stored
            images, whole = given, given
        else:
            whole = _decode_rows(_read(numbers["paths"]), None)
            first = numbers["rows_N2"][0]
            images = fn.slice(whole, start=fn.stack(first), end=fn.stack(numbers["rows_N2"][1]), axis_names="H")
    elif kind == "decoded":
        images = given
    else:
        encoded = _read(given) if kind == "files" else given
        if device == "gpu":
            images = _decode_on_gpu(encoded, largest, hardware_share)
        else:
            images = _decode_rows(encoded, numbers["rows_N2"])
    if device == "gpu":
        images, matrices = images.gpu(), matrices.gpu()

    shrunk = numbers["shrunk_N2"]
    if shrunk[0] > 0:  # per sample: most are read as they were decoded
        images = _shrink(images, shrunk)
    points = size if quality == "normal" else 2 * size
    images = fn.experimental.warp_perspective(
        images,
        matrices,
        size=[points, points],
        inverse_map=True,
        pixel_origin="corner",
        border_mode=_BORDER_MODE[padding],
        fill_value=[0.0, 0.0, 0.0],
        interp_type=types.DALIInterpType.INTERP_LINEAR,
    )
    if quality == "high":
        images = fn.reductions.mean(fn.reshape(images, shape=[size, 2, size, 2, 3], layout=""), axes=[1, 3])
        images = fn.reshape(images, layout="HWC")
    # Light and normalise are one multiply-add, per sample and channel.
    dtype = types.DALIDataType.FLOAT16 if half else _FLOAT
    images = fn.crop_mirror_normalize(images, mean=shift, std=scale, dtype=dtype, output_layout="HWC")
    return images if whole is None else (images, whole)


def build(
    source: Iterator[GraphInput],
    *,
    size: int,
    batch: int,
    device: Device,
    device_id: int | None,
    threads: int,
    kind: Kind = "files",
    half: bool = False,
    padding: Padding = "reflect",
    quality: Quality = "normal",
    largest: tuple[int, int] = (0, 0),
    hardware_share: float = 0.65,
) -> Pipeline:
    """A built pipeline that gives float NHWC batches of `size` pixels until `source` ends.

    Of a mixed graph, the second output holds the whole images, uint8 HWC, of those that were `NOT_STORED`.

    Args:
        source: yields one `GraphInput` a batch; it is read up to two batches ahead.
        batch: most samples in a batch.
        device: where images are decoded, warped and normalised. A mixed graph always decodes on the CPU.
        device_id: index of the GPU; `None` on the CPU, where no driver is needed.
        threads: CPU threads for reading and decoding.
        kind: where the images are.
        half: float16 output instead of float32.
        padding: what the warp reads outside an image.
        quality: "high" takes matrices from an output of twice the size, and four times as long to warp.
        largest: height and width of the largest image, for the GPU's decoder; 0, 0: unknown.
        hardware_share: share of the JPEGs that a GPU's hardware decoder takes, 0 to 1, where it has one.
    """
    pipeline = define(
        source,
        kind=kind,
        size=size,
        device=device,
        half=half,
        padding=padding,
        quality=quality,
        largest=largest,
        hardware_share=hardware_share,
        batch_size=batch,
        num_threads=threads,
        device_id=device_id if device == "gpu" else None,
        prefetch_queue_depth=2,
    )
    pipeline.build()
    return pipeline


@pipeline_def
def _rows_alone(read: bool) -> Any:
    given = fn.external_source(name="given", dtype=_UINT8, ndim=1, no_copy=True)
    rows = fn.external_source(name="rows", dtype=_INT32, ndim=1)
    return _decode_rows(_read(given) if read else given, rows)


class _Alone:
    """A part of the graph on a CPU, on one thread, at once: for a caller that has threads of its own."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        pipeline.build()

    def _run(self, **inputs: Any) -> list[np.ndarray]:
        for name, values in inputs.items():
            self._pipeline.feed_input(name, values)
        outputs: Any = self._pipeline.run()
        return [np.asarray(image) for image in outputs[0]]


_AT_ONCE = {
    "num_threads": 1,
    "device_id": None,
    "prefetch_queue_depth": 1,
    "exec_async": False,
    "exec_pipelined": False,
}


class RowsDecoder(_Alone):
    """Decodes rows of at most `batch` images at a time, from files or from their bytes; see `GraphInput`."""

    def __init__(self, kind: Literal["files", "encoded"], batch: int) -> None:
        super().__init__(_rows_alone(kind == "files", batch_size=batch, **_AT_ONCE))

    def run(self, given: list[np.ndarray], rows_N2: np.ndarray) -> list[np.ndarray]:
        """The rows of each image, uint8 [rows, W, 3], valid until the next run.

        Raises:
            RuntimeError: DALI cannot decode one of them, and no other from now on.
        """
        return self._run(given=given, rows=rows_N2)
