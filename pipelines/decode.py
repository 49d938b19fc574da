"""Decoding without anything behind it: the pixels of many files, as `graph` decodes them on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
from nvidia.dali import Pipeline, pipeline_def


class DecodeError(Exception):
    """DALI cannot decode the file at `position` of those given; the text is DALI's own."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position


def decoded(path: str) -> np.ndarray:
    """The pixels of one file as the warp reads them on a CPU, uint8 [H, W, 3].

    Raises:
        DecodeError: DALI cannot decode it.
    """
    return Decoder(1, 1).run([Path(path).read_bytes()])[0]


def decoded_on_gpu(encoded: bytes) -> np.ndarray:
    """The pixels of one JPEG as the first GPU decodes them, uint8 [H, W, 3]."""

    @pipeline_def(batch_size=1, num_threads=1, device_id=0)
    def graph() -> Any:
        source = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8, ndim=1)
        return fn.decoders.image(source, device="mixed", jpeg_fancy_upsampling=True)

    pipeline = graph()
    pipeline.build()
    pipeline.feed_input("encoded", [np.frombuffer(encoded, np.uint8)])
    return np.asarray(pipeline.run()[0].as_cpu().at(0))


@pipeline_def
def _graph(peek: bool) -> Any:
    encoded = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8, ndim=1)
    return fn.peek_image_shape(encoded) if peek else fn.decoders.image(encoded, output_type=types.DALIImageType.RGB)


class Decoder:
    """Decodes files of at most `batch` at a time on `threads` threads; a file that fails makes it unusable."""

    def __init__(self, batch: int, threads: int) -> None:
        self._threads = threads
        self._peek, self._decode = self._build(True, batch), self._build(False, batch)

    def run(self, files: list[bytes]) -> list[np.ndarray]:
        """The pixels of each file, uint8 [H, W, 3].

        Raises:
            DecodeError: one of them is no image that DALI decodes.
        """
        if not files:
            return []
        try:
            # DALI's parser first, and alone: where it rejects one image of a batch within the decoder, the
            # process may crash (see the firewall's `_decode`).
            self._run(self._peek, files)
            images = self._run(self._decode, files)
        except RuntimeError as error:
            raise self._blamed(files, error) from None
        return [np.asarray(images.at(i)) for i in range(len(files))]

    def _build(self, peek: bool, batch: int) -> Pipeline:
        pipeline = _graph(peek, batch_size=batch, num_threads=self._threads, device_id=None, prefetch_queue_depth=1)
        pipeline.build()
        return pipeline

    def _run(self, pipeline: Pipeline, files: list[bytes]) -> Any:
        pipeline.feed_input("encoded", [np.frombuffer(file, np.uint8) for file in files])
        outputs: Any = pipeline.run()
        return outputs[0]

    def _blamed(self, files: list[bytes], error: RuntimeError) -> DecodeError:
        """Which file it was: each is decoded alone, for DALI tells of the batch."""
        for i, file in enumerate(files):
            try:
                self._run(self._build(False, 1), [file])
            except RuntimeError as alone:
                return DecodeError(i, str(alone))
        raise error  # of none of the files
