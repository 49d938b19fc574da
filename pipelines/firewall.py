"""Decode every file once before training does, and name those that training could not have read.

Two walls, one behind the other. The header, read by Pillow, costs almost nothing and keeps out what should
never reach a decoder: files that are no images, formats the decoder lacks, headers that promise a hundred
megapixels. Then DALI decodes the pixels, because DALI is what training decodes with: a file is good when the
very operator that will read it in every epoch reads it without a complaint, and its size is the size that
operator gave.

A complaint need not be an error. libjpeg goes on after a broken stream, makes up the rest and prints a line:
so what the decoders print is read as well. Where libtiff gives up, DALI (2.4) falls back on a reader that leaves
the rest blank, and prints through std::cerr, which stays silent for the life of a process once it failed to write:
so a TIFF is decoded by Pillow too. A flipped bit that no decoder notices, as in most places of a JPEG without
restart markers, stays unnoticed.

Colours are read as they are stored. An alpha channel is dropped, not blended with a background that nobody
named: OpenCV and torchvision do the same. Sixteen bits become eight by value / 257, rounded. CMYK, grey and
palettes become RGB, and the EXIF orientation is applied; one that stands in XMP alone is not.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import struct
import sys
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import nvidia.dali
import nvidia.dali.fn as fn
import nvidia.dali.types as types
from nvidia.dali import Pipeline, pipeline_def
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pipelines.jpeg import plain_header
from pipelines.limits import MAX_ASPECT, MAX_BYTES, MAX_PIXELS, MIN_SIDE

DECODER = f"DALI {nvidia.dali.__version__}"

_BATCH_FILES = 128
_BATCH_PIXELS = 64_000_000  # a batch holds about 190 MB of decoded pixels, or one larger image
_STATIONS = 2  # batches at work: what is not decoding must not keep the decoder waiting
_GROUP_FILES = 16  # files in one task of the pool that reads ahead of the decoder,
_GROUP_BYTES = 16_000_000  # or so many that they first hold more
_REASON_LENGTH = 200
_EXIF_ORIENTATION = 0x0112

# By `Decoded.format`. Naming the readers, rather than calling Image.open, leaves only these five parsers within a
# hostile file's reach, and makes `max_pixels` the only limit on size: Pillow's own is a process-wide setting.
READERS: dict[str, type[ImageFile]] = {
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
    orientation: int
    """Of the stored pixels, 1 to 8 as EXIF counts; 1 where nothing is said."""
    transparent: bool
    """The file has an alpha channel or transparent colours, which the decoder drops."""
    hash: bytes
    """The first 16 bytes of the SHA-256 of the file."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """Why a file cannot be trained on."""

    reason: str
    """In words, one line."""
    lasting: bool = True
    """True for as long as the file's bytes stay the same; permissions and limits may change without them."""


class Header(NamedTuple):
    """What a file says of itself."""

    format: str
    width: int
    """As stored."""
    height: int
    orientation: int
    transparent: bool


Progress = Callable[[int, int], None]


def examine(
    files: Sequence[str],
    *,
    threads: int = 2,
    progress: Progress | None = None,
    max_pixels: int = MAX_PIXELS,
) -> list[Decoded | Refused]:
    """Decode each file and say, in the order of `files`, what came out or why nothing did.

    `files` are absolute paths of regular files, as `os.fsdecode` gives them. Each is read once.
    `progress(done, total)` is called after each batch, on the caller's thread. Python's warnings are off for
    the process, and what other threads write to file descriptor 2 while a batch decodes is lost, until this
    returns.
    """
    verdicts: list[Decoded | Refused] = []
    files_per_batch = max(_BATCH_FILES, 8 * threads)
    # Pillow warns about odd metadata, once for each new wording; here the pixels alone decide.
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(threads) as pool,
        ThreadPoolExecutor(_STATIONS) as judges,
        ExitStack() as closing,
    ):
        warnings.simplefilter("ignore")
        stations: SimpleQueue[_Station] = SimpleQueue()
        for _ in range(_STATIONS):
            stations.put(_Station(files_per_batch, threads, closing.enter_context(tempfile.TemporaryFile())))
        pending: deque[Future[list[Decoded | Refused]]] = deque()

        def judge(batch: list[_Loaded | Refused]) -> list[Decoded | Refused]:
            station = stations.get()
            try:
                return station.judge(batch)
            finally:
                stations.put(station)

        def take() -> None:
            verdicts.extend(pending.popleft().result())
            if progress is not None:
                progress(len(verdicts), len(files))

        try:
            for batch in _batches(_read_ahead(pool, files, max_pixels, threads + 1), files_per_batch):
                pending.append(judges.submit(judge, batch))
                if len(pending) > _STATIONS:
                    take()
            while pending:
                take()
        finally:  # an interrupt need not wait for the files still queued
            pool.shutdown(cancel_futures=True)
            judges.shutdown(cancel_futures=True)
    return verdicts


def read_header(file: str, max_pixels: int = MAX_PIXELS) -> Header | Refused:
    """What the header of a file promises, or why the file cannot be trained on."""
    loaded = _load(file, max_pixels)
    return loaded if isinstance(loaded, Refused) else loaded.header


class _Loaded(NamedTuple):
    """A file whose header promises an image."""

    header: Header
    encoded: bytes
    hash: bytes

    @property
    def weight(self) -> int:
        """What it adds to a batch's memory, in pixels: those it will have, or its bytes where they are more."""
        return max(self.header.width * self.header.height, len(self.encoded))


def _load(file: str, max_pixels: int) -> _Loaded | Refused:
    try:
        with open(file, "rb") as stream:
            start = stream.read(512)
            name = next((name for name, magic in _MAGIC if re.match(magic, start, re.DOTALL)), None)
            if not start:
                return Refused(reason="the file is empty")
            if name is None:
                words = start[:16].decode("ascii", "backslashreplace")
                return Refused(reason=f"not an image: it starts with {words!r}")
            if name not in READERS:
                return Refused(reason=f"{name} is not supported by the decoder; convert it to JPEG or PNG")
            size = os.fstat(stream.fileno()).st_size
            if size > MAX_BYTES:
                return Refused(reason=f"the file has {size:,} bytes, more than the limit of {MAX_BYTES:,}")
            stream.seek(0)
            encoded = stream.read()
    except OSError as error:
        return Refused(reason=f"the file cannot be read: {_short(error.strerror or str(error))}", lasting=False)
    header = _header(name, encoded)
    if isinstance(header, Refused):
        return header
    width, height = header.width, header.height
    if width * height > max_pixels:
        limit = f"{max_pixels / 1e6:g} megapixels"
        words = f"the header promises {width} x {height} pixels, more than the limit of {limit}"
        return Refused(reason=words, lasting=False)
    if min(width, height) < MIN_SIDE:
        return Refused(reason=f"{width} x {height} pixels: a side is shorter than {MIN_SIDE}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        return Refused(reason=f"{width} x {height} pixels: one side is more than {MAX_ASPECT} times the other")
    return _Loaded(header, encoded, hashlib.sha256(encoded).digest()[:16])


def _header(format: str, encoded: bytes) -> Header | Refused:
    plain = plain_header(encoded) if format == "JPEG" else None
    if plain is not None:
        return Header(format, plain.width, plain.height, plain.orientation, transparent=False)
    try:
        image = READERS[format](io.BytesIO(encoded))
        width, height = image.size
    except Exception as error:  # a parser may raise anything at all on a hostile header
        return Refused(reason=f"the {format} header is damaged: {_short(str(error))}")
    transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    return Header(format, width, height, _orientation(image, encoded), transparent)


def _orientation(image: ImageFile, encoded: bytes) -> int:
    """1 to 8. From EXIF alone, as the decoder has it: Pillow's own `getexif` also looks into XMP."""
    if isinstance(image, TiffImageFile):
        value = image.tag_v2.get(_EXIF_ORIENTATION)
    else:
        exif = Image.Exif()
        try:
            exif.load(image.info.get("exif") or (_png_exif(encoded) if isinstance(image, PngImageFile) else b""))
        except Exception:  # see _header
            return 1
        value = exif.get(_EXIF_ORIENTATION)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _png_exif(encoded: bytes) -> bytes:
    """The EXIF chunk wherever it stands: the decoder heeds it behind the pixels too, where Pillow has yet to come."""
    at = 8
    while at + 8 <= len(encoded):
        length, kind = struct.unpack_from(">I4s", encoded, at)
        if kind == b"eXIf":
            return encoded[at + 8 : at + 8 + length]
        at += 12 + length
    return b""


def _read_ahead(pool: Executor, files: Sequence[str], max_pixels: int, ahead: int) -> Iterator[_Loaded | Refused]:
    """Each file read, in order, by threads that stay at most `ahead` groups in front of whoever asks."""
    groups = (files[at : at + _GROUP_FILES] for at in range(0, len(files), _GROUP_FILES))
    tasks = deque(pool.submit(_load_some, group, max_pixels) for group in itertools.islice(groups, ahead))
    while tasks:
        loaded, rest = tasks.popleft().result()
        if rest:
            tasks.appendleft(pool.submit(_load_some, rest, max_pixels))
        else:
            tasks.extend(pool.submit(_load_some, group, max_pixels) for group in itertools.islice(groups, 1))
        yield from loaded


def _load_some(files: Sequence[str], max_pixels: int) -> tuple[list[_Loaded | Refused], Sequence[str]]:
    """The first files, and the paths of the rest where those hold much already."""
    loaded, total = [], 0
    while len(loaded) < len(files) and total < _GROUP_BYTES:
        loaded.append(_load(files[len(loaded)], max_pixels))
        total += len(loaded[-1].encoded) if isinstance(loaded[-1], _Loaded) else 0
    return loaded, files[len(loaded) :]


def _batches(items: Iterable[_Loaded | Refused], files: int) -> Iterator[list[_Loaded | Refused]]:
    """Group files so that neither their number nor their pixels, and with them the memory, grow large."""
    batch: list[_Loaded | Refused] = []
    total = 0
    for item in items:
        weight = item.weight if isinstance(item, _Loaded) else 0
        if len(batch) == files or (batch and total + weight > _BATCH_PIXELS):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += weight
    if batch:
        yield batch


def _short(words: str) -> str:
    words = " ".join(words.encode("utf-8", "backslashreplace").decode().split())
    return words if len(words) <= _REASON_LENGTH else words[: _REASON_LENGTH - 1] + "…"


_StageName = Literal["peek", "decode"]
_STAGES: tuple[_StageName, _StageName] = ("peek", "decode")


@pipeline_def
def _graph(stage: _StageName) -> Any:
    encoded = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8, ndim=1)
    if stage == "peek":
        return fn.peek_image_shape(encoded)
    return fn.decoders.image(encoded, output_type=types.DALIImageType.RGB).shape()


class _Result(NamedTuple):
    """What a stage made of one file."""

    size: tuple[int, int] | None
    """(height, width) as displayed, or None where the stage failed."""
    complaints: str
    """What was printed meanwhile, if it tells of trouble, or DALI's own words."""


# Lines that make it worth while to look at the files of a batch one by one: an error that a second decoder
# took over from, and the warnings of libjpeg (jerror.h) after which the pixels are not those of the file.
_DAMAGE = re.compile(
    r"Corrupt JPEG data(?!: bad ICC)|Premature end of JPEG|Inconsistent progression|Input file read error"
    r"|Unsupported marker|Bogus"
)
_TROUBLE = re.compile(rf"\[ERROR|{_DAMAGE.pattern}")


class _Station:
    """Judges batches, one at a time. Of several, one decodes while the others sort out theirs."""

    def __init__(self, batch: int, threads: int, log: IO[bytes]) -> None:
        self._peek, self._decode = (_Stage(stage, batch, threads, log) for stage in _STAGES)
        self._log = log

    def judge(self, batch: list[_Loaded | Refused]) -> list[Decoded | Refused]:
        """What the decoder makes of the files that were loaded, and of the others what is known already."""
        loaded = [item for item in batch if isinstance(item, _Loaded)]
        found = iter(_decode(self._peek, self._decode, loaded, self._log))
        return [item if isinstance(item, Refused) else next(found) for item in batch]


def _decode(peek: _Stage, decode: _Stage, files: list[_Loaded], log: IO[bytes]) -> list[Decoded | Refused]:
    """What the decoder makes of each file.

    Where DALI's parser rejects one image of a batch, `decoders.image` (2.4) raises while its threads still
    work on the others, and the process dies of a segmentation fault about every second time. So the same
    parser goes first, in `peek_image_shape`, which raises cleanly; the decoder sees only what it accepted.
    """
    peeked = peek.run([file.encoded for file in files])
    accepted = [file.encoded for file, result in zip(files, peeked, strict=True) if result.size]
    decoded = iter(decode.run(accepted))
    return [
        _verdict(file, next(decoded) if result.size else result, log)
        for file, result in zip(files, peeked, strict=True)
    ]


def _verdict(file: _Loaded, result: _Result, log: IO[bytes]) -> Decoded | Refused:
    header, size, complaints = file.header, result.size, result.complaints
    if complaints or header.format == "TIFF":
        try:
            with _stderr_to(log):
                READERS[header.format](io.BytesIO(file.encoded)).load()
        except Exception as error:  # see _header
            return Refused(reason=f"the pixels cannot be decoded: {_short(str(error))}")
        damage = next((line for line in complaints.splitlines() if _DAMAGE.search(line)), None)
        if damage is not None:
            return Refused(reason=f"the pixels are damaged: {_short(damage)}; save it again if it looks whole")
    if size is None:
        words = _short(next(line for line in complaints.splitlines() if line.strip()))
        return Refused(
            reason=f"DALI cannot decode this {header.format} though Pillow can; save it as PNG or JPEG: {words}"
        )
    return Decoded(
        height=size[0],
        width=size[1],
        format=header.format,
        orientation=header.orientation,
        transparent=header.transparent,
        hash=file.hash,
    )


class _Stage:
    """A pipeline of one stage, for batches with bad files among the good."""

    def __init__(self, stage: _StageName, batch: int, threads: int, log: IO[bytes]) -> None:
        self._stage = stage
        self._batch = batch
        self._threads = threads
        self._log = log
        self._pipeline: Pipeline | None = None

    def run(self, files: list[bytes]) -> list[_Result]:
        """The result for each file, none of them another's fault."""
        if not files:
            return []
        try:
            sizes = self._sizes(files)
        except RuntimeError as error:
            # One bad file fails its whole batch and leaves the pipeline unusable.
            self._pipeline = None
            if len(files) == 1:
                # DALI's message quotes the graph's source first, and often only counts the sample that failed.
                return [
                    _Result(None, "\n".join([self._printed(), str(error).partition("encountered:")[2], str(error)]))
                ]
        else:
            printed = self._printed()
            if not _TROUBLE.search(printed):
                return [_Result(size, "") for size in sizes]
            if len(files) == 1:
                return [_Result(sizes[0], printed)]
        # In eighths rather than halves: a run that fails costs more than decoding a few files again.
        part = -(-len(files) // 8)
        return [result for at in range(0, len(files), part) for result in self.run(files[at : at + part])]

    def _sizes(self, files: list[bytes]) -> list[tuple[int, int]]:
        if self._pipeline is None:
            self._pipeline = _graph(
                self._stage,
                device_id=None,
                batch_size=self._batch,
                num_threads=self._threads,
                prefetch_queue_depth=1,
            )
            self._pipeline.build()
        self._pipeline.feed_input("encoded", [np.frombuffer(file, np.uint8) for file in files])
        with _stderr_to(self._log):
            outputs: Any = self._pipeline.run()
        return [(int(height), int(width)) for height, width, _ in outputs[0].as_array()]

    def _printed(self) -> str:
        self._log.seek(0)
        return re.sub(r"\x1b\[[\d;]*m", "", self._log.read().decode("utf-8", "backslashreplace"))


_STDERR = threading.Lock()


@contextmanager
def _stderr_to(file: IO[bytes]) -> Generator[None]:
    """Send file descriptor 2 into `file`, emptied first.

    The C libraries below DALI and Pillow (libjpeg, libpng, libtiff, OpenCV) print what ails a file straight to
    descriptor 2, where no Python object can stop it: on a person's terminal, in the midst of the progress
    display. In `file` it is the best explanation of a failure that there is, and for some the only sign.
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
