"""A cache: decoded pixels, kept while the first epoch decodes them, read by all workers of a machine in later ones.

The manifest knows every image's height and width, so where each goes is known before the first is decoded:

    index.npy      int64 [N, 3], a row for each image: offset (-1: beyond the limit), height, width
    pixels.bin     as long as all images together and sparse: it takes the place of those that are there
    complete.bin   uint8 [N]: 1 once all pixels of the row are written
    cache.json     whose cache it is; written last
    lock           shared by those who use the cache, so that the last of them, and nobody else, removes it

Processes share it without waiting for one another. Whoever decodes an image writes it, and then its byte; two who
write the same image write the same bytes; a process that dies before the byte is written leaves the row absent.
Files are written by system calls, never through the mapping: a full disk is then an error, not a SIGBUS.

It lies in the cache folder ($ONEWARP_CACHE): on a local disk, where the page cache gives what fits into memory at
memory's speed and the disk holds the rest. /dev/shm would take memory from training and is 64 MB in many
containers; a run's folder is often on a network file system, which is slow, and where mapped memory is not shared.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from pipelines.errors import UserError, first_line
from pipelines.manifest import Manifest
from pipelines.plan import permutation
from pipelines.store import aligned, mapped, rows_digest
from pipelines.synthetic import cache_folder

_VERSION = 1
_INDEX, _PIXELS, _COMPLETE, _META, _LOCK = "index.npy", "pixels.bin", "complete.bin", "cache.json", "lock"
_STREAM = 2**63 + 2  # an epoch, to the generator: none that the order of training or of the split ever reaches


class Cache:
    """Decoded images by row of the manifest, shared by the processes of a machine; open one with `Cache.open`."""

    def __init__(self, folder: Path, lock: int, warn: Callable[[str], object]) -> None:
        self.folder = folder
        self._lock: int | None = lock
        self._warn = warn
        self._stopped = False
        self._index_N3 = np.asarray(np.load(folder / _INDEX, mmap_mode="r"))
        self._complete_N = mapped(folder / _COMPLETE)
        self._pixels = mapped(folder / _PIXELS)
        self._pixels_file = os.open(folder / _PIXELS, os.O_WRONLY)
        self._complete_file = os.open(folder / _COMPLETE, os.O_WRONLY)

    @staticmethod
    def open(
        manifest: Manifest,
        *,
        parent: str | os.PathLike[str] | None = None,
        limit: int | None = None,
        keep: bool = False,
        warn: Callable[[str], object] = warnings.warn,
    ) -> Cache:
        """The cache of a manifest on this machine: the one that others use or have left, or a new one.

        Args:
            manifest: whose rows are kept; its labels and split do not matter.
            parent: the folder that the cache's own folder lies in. Default: `synthetic.cache_folder()`.
            limit: bytes of pixels. Rows are taken in a seeded order until the first that does not fit. Default: half of
                what is free on the disk as the cache is made, or the limit of the cache that is there. One that was
                kept with another limit than the one given is made anew.
            keep: leave the cache behind for the next run; otherwise the last process that closes it removes it.
            warn: told, once, when the disk is full and nothing more is kept.

        Raises:
            UserError: the folder cannot be written, or others use the cache with another limit.
        """
        digest = rows_digest(manifest)
        place = (cache_folder() if parent is None else Path(parent)).expanduser().absolute()
        # The machine's name is in it: where the folder is shared by several, each has its own.
        ours = f"decoded-{re.sub(r'[^A-Za-z0-9.]+', '-', platform.node())}-"
        folder = place / f"{ours}{digest[:16]}"
        try:
            place.mkdir(parents=True, exist_ok=True)
            for doomed in place.glob(f".{ours}*"):  # whose removal was cut short
                shutil.rmtree(doomed, ignore_errors=True)
            for other in place.glob(ours + "[0-9a-f]" * 16):
                if other != folder:
                    _sweep(other)
            while (lock := _join(folder, manifest, digest, limit, keep)) is None:
                pass
            return Cache(folder, lock, warn)
        except OSError as error:
            raise UserError(
                f"The cache of decoded images cannot be written to {str(place)!r}: {first_line(error)}. Point the "
                "environment variable ONEWARP_CACHE at a folder with free space and write permission."
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get(self, row: int) -> np.ndarray | None:
        """The pixels of a row, uint8 [H, W, 3], a read-only view; None where they are not there (yet)."""
        # Reader and writer need no fence: the writer's two system calls are in order, and between the two reads here
        # lie a thousand instructions of the interpreter.
        if not self._complete_N[row]:
            return None
        offset, height, width = self._index_N3[row].tolist()
        return self._pixels[offset : offset + 3 * height * width].reshape(height, width, 3)

    def wants(self, row: int) -> bool:
        """Whether `put` would keep the row: it is not there yet, and neither limit nor disk is in the way."""
        return not (self._stopped or self._complete_N[row] or self._index_N3[row, 0] < 0)

    def put(self, row: int, pixels_HWC: np.ndarray) -> None:
        """Keep the pixels of a row, uint8 and of the manifest's height and width, if it is wanted.

        Raises:
            ValueError: they are of another size or type.
        """
        if not self.wants(row):
            return
        offset, height, width = self._index_N3[row].tolist()
        if pixels_HWC.shape != (height, width, 3) or pixels_HWC.dtype != np.uint8:
            raise ValueError(f"row {row} is uint8 [{height}, {width}, 3], not {pixels_HWC.dtype} {pixels_HWC.shape}")
        try:
            _write(self._pixels_file, np.ascontiguousarray(pixels_HWC).data.cast("B"), offset)
            _write(self._complete_file, memoryview(b"\1"), row)
        except OSError as error:
            self._stopped = True
            self._warn(
                f"The cache of decoded images in {self.folder.parent} cannot grow any more ({first_line(error)}): the "
                "images that are not in it are decoded again in each epoch."
            )

    def __len__(self) -> int:
        """Rows that are there."""
        return int(np.count_nonzero(self._complete_N))

    @property
    def capacity(self) -> int:
        """Rows that fit under the limit."""
        return int(np.count_nonzero(self._index_N3[:, 0] >= 0))

    def close(self) -> None:
        """Leave the cache; whoever is last removes it, or makes sure that it outlives a power cut.

        Views that were got before stay valid.
        """
        if self._lock is None:
            return
        if _alone(self._lock):
            meta = _read(self.folder)
            if meta.get("keep"):
                os.fsync(self._pixels_file)
                os.fsync(self._complete_file)
                _write_meta(self.folder, meta | {"boot": None})
            else:
                _remove(self.folder)
        for descriptor in (self._pixels_file, self._complete_file, self._lock):
            os.close(descriptor)
        self._lock, self._stopped = None, True


def _join(folder: Path, manifest: Manifest, digest: str, limit: int | None, keep: bool) -> int | None:
    """The lock of a cache that is ready for use, held; None where it was removed meanwhile."""
    with suppress(FileExistsError):  # not exist_ok: that looks again, and it may be gone by then
        os.mkdir(folder)
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        return None
    try:
        alone = _alone(lock)
        if alone and _is_at(lock, folder):
            if not _fits(folder, digest, limit):
                _make(folder, manifest, digest, limit)
            # Until it is closed in order, what is in it is what the page cache of this boot says.
            _write_meta(folder, _read(folder) | {"boot": _boot(), "keep": keep})
        fcntl.flock(lock, fcntl.LOCK_SH)  # waits for whoever is making or removing it
        if not _is_at(lock, folder):
            os.close(lock)
            return None
        meta = _read(folder)
        if not _fits(folder, digest, limit):
            if alone or not meta:  # its maker failed, or it changed hands
                os.close(lock)
                return None
            raise UserError(
                f"The cache of decoded images {str(folder)!r} is in use with a limit of {meta['limit']:,} bytes. Give "
                "--cache-limit the same, or wait for the other run to end."
            )
        if keep and not meta["keep"]:
            _write_meta(folder, meta | {"keep": True})
        return lock
    except BaseException:
        with suppress(OSError):
            os.close(lock)
        raise


def _make(folder: Path, manifest: Manifest, digest: str, limit: int | None) -> None:
    """An empty cache in a folder that nobody else uses, whatever was in it."""
    for name in (_META, _PIXELS, _COMPLETE, _INDEX):
        (folder / name).unlink(missing_ok=True)
    if limit is None:
        limit = shutil.disk_usage(folder).free // 2
    n = len(manifest.paths)
    sizes_N2 = np.stack([manifest.heights_N, manifest.widths_N], axis=1).astype(np.int64)
    bytes_N = aligned(3 * sizes_N2.prod(axis=1))
    # A seeded order, so that each batch finds about the same share of its images here.
    order_N = permutation(0, _STREAM, n)
    fits_N = np.zeros(n, bool)
    fits_N[order_N] = np.cumsum(bytes_N[order_N]) <= limit
    ends_N = np.cumsum(np.where(fits_N, bytes_N, 0))
    np.save(folder / _INDEX, np.column_stack([np.where(fits_N, ends_N - bytes_N, -1), sizes_N2]))
    with open(folder / _PIXELS, "wb") as stream:
        stream.truncate(max(1, int(ends_N[-1])))  # an empty file cannot be mapped
    (folder / _COMPLETE).write_bytes(bytes(n))
    files = {name: (folder / name).stat().st_size for name in (_INDEX, _PIXELS, _COMPLETE)}
    meta = {"version": _VERSION, "rows": digest, "limit": limit, "files": files, "boot": _boot(), "keep": False}
    _write_meta(folder, meta)


def _fits(folder: Path, digest: str, limit: int | None) -> bool:
    """Whether a cache can be used as it is. One that was not closed before the machine went down cannot."""
    meta = _read(folder)
    return (
        (meta.get("version"), meta.get("rows")) == (_VERSION, digest)
        and limit in (None, meta["limit"])
        and meta["boot"] in (None, _boot())
        and all(
            (folder / name).is_file() and (folder / name).stat().st_size == length
            for name, length in meta["files"].items()
        )
    )


def _read(folder: Path) -> dict[str, Any]:
    """`cache.json`; empty where there is none, or none that can be read."""
    with suppress(OSError, ValueError):
        meta = json.loads((folder / _META).read_bytes())
        return meta if isinstance(meta, dict) else {}
    return {}


def _write_meta(folder: Path, meta: dict[str, Any]) -> None:
    partial = folder / f".{_META}-{uuid.uuid4().hex}"
    with open(partial, "w", encoding="utf-8") as stream:
        json.dump(meta, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, folder / _META)


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _boot() -> str:
    """Another one each time the machine starts."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _alone(lock: int) -> bool:
    """Whether nobody else uses the cache; if so, nobody else begins to while the lock is held."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(lock: int, folder: Path) -> bool:
    """Whether an open lock is still the one in the folder."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(folder / _LOCK))
    except FileNotFoundError:
        return False


def _sweep(folder: Path) -> None:
    """Remove a cache that a killed run left behind, unless it was to be kept."""
    with suppress(OSError):
        lock = os.open(folder / _LOCK, os.O_RDWR)
        try:
            if _alone(lock) and _is_at(lock, folder) and not _read(folder).get("keep"):
                _remove(folder)
        finally:
            os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a cache that nobody else uses: renamed first, since someone may begin a new one under its name at once."""
    doomed = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # whoever opens another cache now may be at it as well
