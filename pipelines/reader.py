"""The batches of a CPU: threads that each decode a few images and warp them at once, while they lie in its cache."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch

from pipelines import graph
from pipelines.geometry import Padding
from pipelines.kernel import warp
from pipelines.shrink import shrink

_CHUNK = 16  # images: few enough that their pixels stay in the cache, enough that the cost of a run of DALI is small
_AHEAD = 3  # batches at work, the next one included


class _Chunk(NamedTuple):
    """Some images of a batch, and where they go."""

    given: graph.GraphInput
    part: slice
    out_NSS3: np.ndarray


class _Batch(NamedTuple):
    chunks: list[Future[list[np.ndarray | None]]]
    images_NSS3: np.ndarray


class Reader:
    """Float NHWC batches of `size` pixels, in the order of `source`, which is read up to two batches ahead.

    What comes out depends on what goes in alone, and not on which thread takes which images.

    Args:
        source: yields one `GraphInput` a batch.
        hands: do the work; a thread for each.
        size: of the output, pixels.
        batch: most samples in a batch.
        half: float16 output instead of float32; slow.
    """

    def __init__(
        self,
        source: Iterator[graph.GraphInput],
        hands: Hands,
        *,
        size: int,
        batch: int,
        half: bool = False,
    ) -> None:
        self._source, self._hands, self._half = source, hands, half
        self._buffers = _Buffers((batch, size, size, 3))
        self._batches: deque[_Batch] = deque()
        self._pool = ThreadPoolExecutor(hands.count, "read")
        # Whoever drops a reader halfway wants no more of it: what is queued is never begun.
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def run(self) -> tuple[torch.Tensor, list[np.ndarray | None]]:
        """The next batch [N, size, size, 3]; and of a mixed one, the whole image of each that was `NOT_STORED`.

        Raises:
            RuntimeError: an image of it cannot be decoded.
            StopIteration: there is none.
        """
        while len(self._batches) < _AHEAD and (given := next(self._source, None)) is not None:
            self._batches.append(self._begin(given))
        if not self._batches:
            raise StopIteration
        chunks, images_NSS3 = self._batches.popleft()
        try:
            whole = [image for chunk in chunks for image in chunk.result()]
        except BaseException:
            # The error holds this frame, and the frame the error: without help both would live on for a while, and
            # with them threads that go on decoding.
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._batches.clear()
            raise
        images = torch.from_numpy(images_NSS3)
        return images.half() if self._half else images, whole

    def _begin(self, given: graph.GraphInput) -> _Batch:
        n = len(given.images)
        out_NSS3 = self._buffers.take(n)
        parts = [slice(start, min(start + _CHUNK, n)) for start in range(0, n, _CHUNK)]
        return _Batch([self._pool.submit(self._hands.do, _Chunk(given, part, out_NSS3)) for part in parts], out_NSS3)


class Hands:
    """What works for a reader: DALI's pipelines, which outlive it.

    Made anew for each epoch, they would leave the memory of the process in ever smaller pieces. And they are not the
    threads' own: a fork ends those, and would take the pipelines down in the child.

    Args:
        count: how many work at a time.
        kind: where the images are.
        padding: what the warp reads outside an image.
        quality: "high" takes matrices from an output of twice the size, and four times as long to warp.
    """

    def __init__(
        self, count: int, *, kind: graph.Kind, padding: Padding = "reflect", quality: graph.Quality = "normal"
    ) -> None:
        self.count = count
        self._new = partial(_Work, kind, padding, 1 if quality == "normal" else 2)
        self._idle: SimpleQueue[_Work] = SimpleQueue()
        for _ in range(count):
            self._idle.put(self._new())

    def do(self, chunk: _Chunk) -> list[np.ndarray | None]:
        """Write the images of a chunk; the whole image of each that a mixed batch had not stored."""
        work = self._idle.get()
        try:
            return work.do(chunk)
        except BaseException:
            work = self._new()  # a pipeline that failed is finished
            raise
        finally:
            self._idle.put(work)


class _Work:
    """What one thread at a time does, and the DALI pipelines for it."""

    def __init__(self, kind: graph.Kind, padding: Padding, points: int) -> None:
        self._kind, self._padding, self._points = kind, padding, points
        self._memory = np.empty(0, np.uint8)

    @cached_property
    def _decoder(self) -> graph.RowsDecoder:
        return graph.RowsDecoder("encoded" if self._kind == "encoded" else "files", _CHUNK)

    def _memory_of(self, size: int) -> np.ndarray:
        """Memory for one shrunk image, which is read before the next one is made."""
        if len(self._memory) < size:
            self._memory = np.empty(size, np.uint8)
        return self._memory

    def do(self, chunk: _Chunk) -> list[np.ndarray | None]:
        """Write the images of a chunk; the whole image of each that a mixed batch had not stored."""
        given, part, out_NSS3 = chunk
        rows_N2, shrunk_N2 = given.rows_N2[part], given.shrunk_N2[part]
        images, whole = given.images[part], [None] * len(rows_N2)
        if given.paths is not None:
            images, whole = self._decode_missing(images, given.paths[part], rows_N2)
        elif self._kind != "decoded":
            images = self._decoder.run(images, rows_N2)
        numbers = zip(given.matrix_N33[part], given.shift_N3[part], given.scale_N3[part], out_NSS3[part], strict=True)
        for image, (height, width), (matrix_33, shift_3, scale_3, out_SS3) in zip(
            images, shrunk_N2.astype(np.int64).tolist(), numbers, strict=True
        ):
            if height:
                image = shrink(image, height, width, self._memory_of(3 * height * width))
            warp(image, matrix_33, shift_3, scale_3, out_SS3, padding=self._padding, points=self._points)
        return whole

    def _decode_missing(
        self, stored: list[np.ndarray], paths: list[np.ndarray], rows_N2: np.ndarray
    ) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
        """The rows of all images, and the whole image of each that was not stored."""
        missing = [i for i, image in enumerate(stored) if image is graph.NOT_STORED]
        images, whole = list(stored), [None] * len(stored)
        if missing:
            everything_N2 = np.tile(np.array([0, np.iinfo(np.int32).max], np.int32), (len(missing), 1))
            for i, image in zip(missing, self._decoder.run([paths[i] for i in missing], everything_N2), strict=True):
                if len(image) < rows_N2[i, 1]:
                    raise RuntimeError(f"an image has {len(image)} rows and had {rows_N2[i, 1]} or more when scanned")
                whole[i] = image = image.copy()  # DALI decodes the next ones into the same memory
                images[i] = image[rows_N2[i, 0] : rows_N2[i, 1]]
        return images, whole


class _Buffers:
    """Memory for batches, which is used again when nobody holds the batch any more.

    New memory costs a page fault each 4 KiB, which together take as long as half the warp.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._free: deque[np.ndarray] = deque(maxlen=_AHEAD + 1)

    def take(self, n: int) -> np.ndarray:
        buffer = self._free.pop() if self._free else np.empty(self._shape, np.float32)
        batch = buffer[:n]
        weakref.finalize(batch, self._free.append, buffer).atexit = False  # a tensor made from it holds it
        return batch
