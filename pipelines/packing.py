"""Writing a store: the images of a manifest, as they are, bounded in size, or decoded."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines import store
from pipelines.decode import DecodeError, Decoder
from pipelines.errors import UserError, first_line
from pipelines.manifest import Manifest
from pipelines.store import Kind, Store

# Few enough that mapping all shards of some terabytes stays below the usual limit of 1,024 open files.
SHARD_BYTES = 4 * 2**30
QUALITY = 90

_BATCH_FILES = 64
_BATCH_PIXELS = 64_000_000  # as in the firewall: about 190 MB of decoded pixels, or one larger image


def pack(
    manifest: Manifest,
    out: str | os.PathLike[str],
    *,
    kind: Kind,
    short_side: int | None = None,
    quality: int = QUALITY,
    threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Store:
    """Write the images of a manifest into the new folder `out`, whole or not at all.

    The same manifest gives the same shards and index, byte by byte. A store of the same images, made in the
    same way, that is there already is returned as it is.

    Args:
        manifest: of image files, as `scan` gives it; its quarantine is kept in the store's manifest.
        out: in a folder that exists.
        kind: "encoded" copies the bytes of the files, EXIF orientation included; "decoded" stores pixels.
        short_side: images whose shorter side is longer are shrunk to it by Pillow's Lanczos filter, from the decoded
            pixels as displayed, and in an encoded store become JPEG without subsampling of the chroma.
        quality: of that JPEG.
        threads: CPU threads that read, decode, shrink and encode.
        progress: called with (images written, images in all) now and then.

    Raises:
        UserError: `out` exists or cannot be written, the disk is too small, or a file changed after the scan.
    """
    if short_side is not None and short_side < 1:
        raise UserError(f"short_side is {short_side}; it must be 1 pixel or more.")
    if not 1 <= quality <= 100:
        raise UserError(f"quality is {quality}; it must lie between 1 and 100.")
    if manifest.store is not None:
        raise UserError(f"{str(manifest.store)!r} is a store already. Give the folder of the image files to pack it.")
    recipe = {"short_side": short_side, "quality": quality if kind == "encoded" and short_side else None}
    path = Path(os.path.abspath(out))
    sources = hashlib.sha256(store.rows_digest(manifest).encode())
    sources.update(repr(manifest.classes).encode() + manifest.labels_N.tobytes() + manifest.valid_N.tobytes())
    source = sources.hexdigest()
    check_place(path)
    if path.exists():
        return _same(path, kind, recipe, source)
    plan = _Plan(manifest, kind, short_side, quality)
    _check_space(path, plan.needed(), kind)
    try:
        with _workplace(path) as folder:
            with closing(_Writer(folder)) as writer, closing(plan.images(threads)) as images:
                for row, (data, height, width) in enumerate(images):
                    writer.add(data, height, width)
                    if progress is not None and (row % 64 == 63 or row == len(manifest.paths) - 1):
                        progress(row + 1, len(manifest.paths))
                index_N5, shards = writer.finish()
            meta = store.new_meta(folder, kind=kind, recipe=recipe, source=source, rows=len(index_N5), shards=shards)
            replace(
                manifest,
                heights_N=index_N5[:, 3].astype(np.int32),
                widths_N=index_N5[:, 4].astype(np.int32),
                formats=tuple(
                    "JPEG" if kind == "encoded" and shrunk else form
                    for form, shrunk in zip(manifest.formats, plan.shrunk_N, strict=True)
                ),
                orientations_N=np.where(plan.decode_N, 1, manifest.orientations_N).astype(np.uint8),
                digest=meta["digest"],
                store=path,
            ).write(folder / store.MANIFEST)
            store.write_meta(folder, meta)
            os.rename(folder, path)
    except OSError as error:
        raise UserError(
            f"The store {str(path)!r} cannot be written: {error.strerror or first_line(error)}. Nothing of it was left "
            "behind. Choose a place with free space and write permission."
        ) from None
    return Store.open(path)


def check_place(out: str | os.PathLike[str]) -> None:
    """Raise UserError where no store could be written, whatever is packed: to say so before a long scan."""
    path = Path(os.path.abspath(out))
    if os.path.lexists(path) and not store.is_store(path):
        raise UserError(f"{str(path)!r} exists and is no store. Choose another place, or remove it.")
    if not path.parent.is_dir():
        raise UserError(
            f"There is no folder {str(path.parent)!r}, in which {path.name!r} is to be written. Make it, or choose "
            "another place."
        )


def _same(path: Path, kind: Kind, recipe: dict[str, Any], source: str) -> Store:
    """The store at `path`, which must be what would be written there."""
    there = Store.open(path)
    if (there.kind, there.recipe) != (kind, recipe):
        made = ", ".join(f"{key} {value}" for key, value in there.recipe.items() if value is not None)
        raise UserError(
            f"{str(path)!r} exists and is a store made in another way ({there.kind}{made and ', ' + made}). Choose "
            "another place, or delete it."
        )
    if there.source != source:
        raise UserError(
            f"{str(path)!r} exists and is a store of other images, or of these with other labels or before they "
            "changed. Choose another place, or delete it."
        )
    return there


class _Plan:
    """What becomes of each image."""

    def __init__(self, manifest: Manifest, kind: Kind, short_side: int | None, quality: int) -> None:
        self.manifest, self.kind, self.quality = manifest, kind, quality
        sizes_N2 = np.stack([manifest.heights_N, manifest.widths_N], axis=1).astype(np.int64)
        short_N = sizes_N2.min(axis=1)
        self.pixels_N = sizes_N2.prod(axis=1)
        """int64, of the image in its file."""
        self.shrunk_N = short_N > (short_side or np.inf)
        """bool: the image is larger than asked for."""
        scale_N = np.where(self.shrunk_N, (short_side or 0) / short_N, 1.0)
        self.sizes_N2 = np.rint(sizes_N2 * scale_N[:, None]).astype(np.int64)
        """Height and width of what is stored."""
        self.decode_N = self.shrunk_N | (kind == "decoded")
        """bool: the pixels are asked for, not the bytes of the file."""

    def needed(self) -> int:
        """Bytes that the images will take; those encoded anew are guessed at one byte a pixel."""
        stored_N = self.sizes_N2.prod(axis=1)
        if self.kind == "decoded":
            return int(store.aligned(3 * stored_N).sum())
        return int(store.aligned(np.where(self.shrunk_N, stored_N, self.manifest.bytes_N)).sum())

    def images(self, threads: int) -> Generator[tuple[memoryview, int, int]]:
        """What is stored, with height and width, row by row."""
        decoder = Decoder(_BATCH_FILES, threads) if self.decode_N.any() else None
        with ThreadPoolExecutor(threads) as pool:
            for rows in _batches(self.pixels_N):
                files = list(pool.map(self._read, rows))
                pixels: list[np.ndarray | None] = [None] * len(rows)
                if decoder is not None:
                    decoded = [i for i, row in enumerate(rows) if self.decode_N[row]]
                    try:
                        for i, image_HWC in zip(decoded, decoder.run([files[i] for i in decoded]), strict=True):
                            pixels[i] = image_HWC
                    except DecodeError as error:
                        raise self._changed(rows[decoded[error.position]], "it can no longer be decoded") from None
                stored = pool.map(self._finish, rows, files, pixels)
                for data, (height, width) in zip(stored, self.sizes_N2[rows].tolist(), strict=True):
                    yield data, height, width

    def _changed(self, row: int, why: str = "it is no longer as it was") -> UserError:
        return UserError(
            f"{self.manifest.paths[row]!r} in {str(self.manifest.root)!r} changed after it was scanned: {why}. Let "
            "nothing write to the folder, and pack it again."
        )

    def _read(self, row: int) -> bytes:
        """The bytes of a file that is as it was scanned."""
        try:
            with open(os.path.join(self.manifest.root, self.manifest.paths[row]), "rb") as stream:
                status = os.fstat(stream.fileno())
                data = stream.read()
        except OSError as error:
            raise self._changed(row, error.strerror or first_line(error)) from None
        expected = self.manifest.bytes_N[row], self.manifest.mtimes_N[row]
        if (len(data), status.st_mtime_ns) != expected:
            raise self._changed(row)
        return data

    def _finish(self, row: int, file: bytes, image_HWC: np.ndarray | None) -> memoryview:
        """What is stored of an image, from its file or its pixels."""
        if image_HWC is None:
            return memoryview(file)
        if image_HWC.shape[:2] != (self.manifest.heights_N[row], self.manifest.widths_N[row]):
            raise self._changed(row)
        if not self.shrunk_N[row]:
            return image_HWC.data.cast("B")
        height, width = self.sizes_N2[row].tolist()
        image = Image.fromarray(image_HWC).resize((width, height), Image.Resampling.LANCZOS)
        if self.kind == "decoded":
            return memoryview(image.tobytes())
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=self.quality, subsampling="4:4:4")
        return stream.getbuffer()


def _batches(pixels_N: np.ndarray) -> Iterator[list[int]]:
    """Consecutive rows, so that neither their number nor their pixels, and with them the memory, grow large."""
    rows: list[int] = []
    total = 0
    for row, pixels in enumerate(pixels_N.tolist()):
        if len(rows) == _BATCH_FILES or (rows and total + pixels > _BATCH_PIXELS):
            yield rows
            rows, total = [], 0
        rows.append(row)
        total += pixels
    yield rows


class _Writer:
    """Writes shards and index into a folder; closed early, it leaves a part of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index: list[tuple[int, int, int, int, int]] = []
        self._shards: list[int] = []
        self._stream: io.FileIO | None = None

    def add(self, data: memoryview, height: int, width: int) -> None:
        """Append an image; a shard grows beyond `SHARD_BYTES` only if a single image does."""
        offset = store.aligned(self._shards[-1]) if self._shards else 0
        if self._stream is None or (offset and offset + len(data) > SHARD_BYTES):
            self._finish_shard()
            self._stream = open(self._folder / store.shard_name(len(self._shards)), "wb", buffering=0)  # noqa: SIM115
            self._shards.append(0)
            offset = 0
        self._index.append((len(self._shards) - 1, offset, len(data), height, width))
        self._shards[-1] = offset + len(data)
        self._stream.seek(offset)  # what is passed over reads as zeros
        while data:
            data = data[self._stream.write(data) :]

    def finish(self) -> tuple[np.ndarray, list[int]]:
        """The index, which is written, and the lengths of the shards."""
        self._finish_shard()
        index_N5 = np.array(self._index, np.int64)
        with open(self._folder / store.INDEX, "wb") as stream:
            np.save(stream, index_N5)
            stream.flush()
            os.fsync(stream.fileno())
        return index_N5, self._shards

    def _finish_shard(self) -> None:
        if self._stream is not None:
            os.fsync(self._stream.fileno())  # `store.json` must not outlive a power cut that the shards do not
        self.close()

    def close(self) -> None:
        """Close the shard under way."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _check_space(path: Path, needed: int, kind: Kind) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        less = "--encoded, or a smaller --short-side" if kind == "decoded" else "a smaller --short-side"
        raise UserError(
            f"The store {str(path)!r} will take {in_words(needed)}, and {in_words(free)} are free there. Choose "
            f"another place, or {less}."
        )


def in_words(count: int) -> str:
    """A number of bytes, to read."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


@contextmanager
def _workplace(path: Path) -> Generator[Path]:
    """A new folder beside `path`, gone at the end unless it was renamed, as are those of packs that were killed.

    The lock on it, which ends with the process, tells the folder of a living pack from that of a dead one.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}-*.packing"):
        with suppress(OSError), _locked(left):
            shutil.rmtree(left)
    scratch = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-", suffix=".packing")
    with scratch, _locked(Path(scratch.name)):
        folder = Path(scratch.name) / path.name  # made anew, since the scratch folder is closed to other users
        folder.mkdir()
        yield folder


@contextmanager
def _locked(folder: Path) -> Generator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
