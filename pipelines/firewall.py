"""Decode every file once before training does, and name those that training could not have read.

Two walls, one behind the other. The header, read by Pillow, costs almost nothing and keeps out what should
never reach a decoder: files that are no images, formats the decoder lacks, headers that promise a hundred
megapixels. Then DALI decodes the pixels, because DALI is what training decodes with: a file is good when the
very operator that will read it in every epoch can read it, and its size is the size that operator gave.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
from nvidia.dali import Pipeline, pipeline_def
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

MAX_PIXELS = 100_000_000
MIN_SIDE = 2
MAX_ASPECT = 100

_HEADER_WINDOW = 256  # files in one task of the pool that reads headers ahead of the decoder
_BATCH_FILES = 64
_BATCH_PIXELS = 64_000_000  # a batch holds about 190 MB of decoded pixels, or one larger image
_REASON_LENGTH = 200

# Naming the readers, rather than calling Image.open, leaves only these five parsers within a hostile file's
# reach, and makes `max_pixels` the only limit on size: Pillow's own is a process-wide setting.
_READERS: dict[str, type[ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
}
_MAGIC = (
    ("JPEG", rb"\xff\xd8\xff"),
    ("PNG", rb"\x89PNG\r\n\x1a\n"),
    ("WEBP", rb"RIFF....WEBP"),
    ("BMP", rb"BM"),
    ("TIFF", rb"II[*+]\0|MM\0[*+]"),
    ("GIF", rb"GIF8"),
    ("AVIF", rb"....ftypavi[fs]"),
    ("HEIC", rb"....ftyp(hei|hev|mif1|msf1)"),
    ("JPEG 2000", rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    ("JPEG XL", rb"\xff\x0a|\0\0\0\x0cJXL "),
    ("PSD", rb"8BPS"),
    ("ICO", rb"\0\0\x01\0"),
    ("SVG", rb"\s*(<\?xml.*|<!--.*)?<svg"),
)


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What the decoder made of a good file."""

    height: int
    """Rows as displayed, with the EXIF orientation applied."""
    width: int
    """Columns as displayed."""
    format: str
    """By content, whatever the file's name says: JPEG, PNG, WEBP, BMP or TIFF."""


class Header(NamedTuple):
    """What a file says of itself."""

    format: str
    pixels: int


def examine(
    files: Sequence[str],
    *,
    threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> list[Decoded | str]:
    """Decode each file and say, in the order of `files`, what came out or, as a string, why nothing did.

    `files` are absolute paths of regular files, as `os.fsdecode` gives them. `progress(done, total)` is
    called after each batch, on the caller's thread. Python's warnings are off for the process, and what
    other threads write to file descriptor 2 while a batch decodes is lost, until this returns.
    """
    windows = [files[start : start + _HEADER_WINDOW] for start in range(0, len(files), _HEADER_WINDOW)]
    verdicts: list[Decoded | str] = []
    # Pillow warns about odd metadata, once for each new wording; here the pixels alone decide.
    with warnings.catch_warnings(), tempfile.TemporaryFile() as log, ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")
        peek, decode = _Stage("peek", threads, log), _Stage("decode", threads, log)
        headers = pool.map(lambda window: [read_header(file, max_pixels) for file in window], windows)
        try:
            for batch in _batches(zip(files, chain.from_iterable(headers), strict=True)):
                sizes = _sizes(peek, decode, [file for file, header in batch if isinstance(header, Header)])
                for file, header in batch:
                    verdicts.append(header if isinstance(header, str) else _verdict(file, header, next(sizes)))
                if progress is not None:
                    progress(len(verdicts), len(files))
        finally:  # an interrupt need not wait for the headers still queued
            pool.shutdown(cancel_futures=True)
    return verdicts


def read_header(file: str, max_pixels: int = MAX_PIXELS) -> Header | str:
    """What the header of a file promises, or why the file cannot be trained on."""
    try:
        with open(file, "rb") as stream:
            start = stream.read(512)
            stream.seek(0)
            name = next((name for name, magic in _MAGIC if re.match(magic, start, re.DOTALL)), None)
            if not start:
                return "the file is empty"
            if name is None:
                return f"not an image: it starts with {start[:16].decode('ascii', 'backslashreplace')!r}"
            if name not in _READERS:
                return f"{name} is not supported by the decoder; convert it to JPEG or PNG"
            try:
                width, height = _READERS[name](stream).size
            except Exception as error:  # a parser may raise anything at all on a hostile header
                return f"the {name} header is damaged: {_short(str(error))}"
    except OSError as error:
        return f"the file cannot be read: {_short(error.strerror or str(error))}"
    if width * height > max_pixels:
        limit = f"{max_pixels / 1e6:g} megapixels"
        return f"the header promises {width} x {height} pixels, more than the limit of {limit}"
    if min(width, height) < MIN_SIDE:
        return f"{width} x {height} pixels: a side is shorter than {MIN_SIDE}"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"{width} x {height} pixels: one side is more than {MAX_ASPECT} times the other"
    return Header(name, width * height)


_Item = tuple[str, Header | str]


def _batches(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    """Group files so that neither their number nor their pixels, and with them the memory, grow large."""
    batch: list[_Item] = []
    total = 0
    for item in items:
        pixels = item[1].pixels if isinstance(item[1], Header) else 0
        if len(batch) == _BATCH_FILES or (batch and total + pixels > _BATCH_PIXELS):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += pixels
    if batch:
        yield batch


def _verdict(file: str, header: Header, size: _Size | str) -> Decoded | str:
    if not isinstance(size, str):
        return Decoded(height=size[0], width=size[1], format=header.format)
    try:
        with open(file, "rb") as stream:
            _READERS[header.format](stream).load()
    except Exception as error:  # see read_header
        return f"the pixels cannot be decoded: {_short(str(error))}"
    return f"DALI cannot decode this {header.format} though Pillow can; save it as PNG or JPEG: {size}"


def _short(words: str) -> str:
    words = " ".join(words.split())
    return words if len(words) <= _REASON_LENGTH else words[: _REASON_LENGTH - 1] + "…"


@pipeline_def
def _graph(stage: Literal["peek", "decode"]) -> Any:
    path = fn.external_source(name="path", dtype=types.DALIDataType.UINT8, ndim=1)
    # Without mmap, a file that another process cuts short meanwhile is an error instead of a SIGBUS.
    encoded = fn.io.file.read(path, dont_use_mmap=True)
    if stage == "peek":
        return fn.peek_image_shape(encoded)
    return fn.decoders.image(encoded, output_type=types.DALIImageType.RGB).shape()


_Size = tuple[int, int]


def _sizes(peek: _Stage, decode: _Stage, files: list[str]) -> Iterator[_Size | str]:
    """(height, width) of each decoded file, or DALI's own words on why it failed.

    Where DALI's parser rejects one image of a batch, `decoders.image` (2.4) raises while its threads still
    work on the others, and the process dies of a segmentation fault about every second time. So the same
    parser goes first, in `peek_image_shape`, which raises cleanly; the decoder sees only what it accepted.
    """
    peeked = peek.sizes(files)
    decoded = iter(decode.sizes([file for file, size in zip(files, peeked, strict=True) if isinstance(size, tuple)]))
    return (size if isinstance(size, str) else next(decoded) for size in peeked)


class _Stage:
    """A pipeline of one stage, for batches with bad files among the good."""

    def __init__(self, stage: Literal["peek", "decode"], threads: int, log: IO[bytes]) -> None:
        self._stage = stage
        self._threads = threads
        self._log = log
        self._pipeline: Pipeline | None = None

    def sizes(self, files: list[str]) -> list[_Size | str]:
        """(height, width) of each file, or DALI's own words on why it failed."""
        if not files:
            return []
        try:
            return self._run(files)
        except RuntimeError as error:
            # One bad file fails its whole batch and leaves the pipeline unusable.
            self._pipeline = None
            if len(files) == 1:
                return [self._words(error)]
        # In eighths rather than halves: a run that fails costs more than decoding a few files again.
        part = -(-len(files) // 8)
        return [size for at in range(0, len(files), part) for size in self.sizes(files[at : at + part])]

    def _run(self, files: list[str]) -> list[_Size | str]:
        if self._pipeline is None:
            self._pipeline = _graph(
                self._stage,
                device_id=None,
                batch_size=_BATCH_FILES,
                num_threads=self._threads,
                prefetch_queue_depth=1,
            )
            self._pipeline.build()
        self._pipeline.feed_input("path", [np.frombuffer(os.fsencode(file), np.uint8) for file in files])
        with _stderr_to(self._log):
            outputs: Any = self._pipeline.run()
        return [(int(height), int(width)) for height, width, _ in outputs[0].as_array()]

    def _words(self, error: RuntimeError) -> str:
        self._log.seek(0)
        log = re.sub(r"\x1b\[[\d;]*m", "", self._log.read().decode("utf-8", "backslashreplace"))
        # DALI's message quotes the graph's source first, and often only counts the sample that failed.
        lines = log.splitlines() + str(error).partition("encountered:")[2].splitlines() + [str(error)]
        return _short(next(line for line in lines if line.strip()))


_STDERR = threading.Lock()


@contextmanager
def _stderr_to(file: IO[bytes]) -> Generator[None]:
    """Send file descriptor 2 into `file`, emptied first.

    The C libraries below the decoder (libjpeg, libpng, libtiff, OpenCV) print what ails a file straight to
    descriptor 2, where no Python object can stop it: on a person's terminal, in the midst of the progress
    display. In `file` it is the best explanation of a failure that there is.
    """
    with _STDERR:
        file.seek(0)
        file.truncate()
        sys.stderr.flush()
        saved = os.dup(2)
        try:
            os.dup2(file.fileno(), 2)
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
