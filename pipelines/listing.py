"""The image files of a folder, as the file system shows them: no file is opened."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

# The second row is what the decoder cannot read: listed all the same, so that the firewall names each file.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff"),
    *(".gif", ".svg", ".heic", ".heif", ".avif"),
)


class Found(NamedTuple):
    """A file's state when it was listed; a later change shows in one of the two."""

    bytes: int
    mtime_ns: int


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Files by their path relative to the folder, with "/" between the parts.

    Names that are not UTF-8 hold surrogate escapes, as from `os.fsdecode`.
    """

    files: dict[str, Found] = field(default_factory=dict)
    """Regular files, by path."""
    rejected: dict[str, str] = field(default_factory=dict)
    """Reason, by path, for what bears an image's name and is no readable file."""
    folders: set[str] = field(default_factory=set)
    """Folders, without the hidden ones."""
    twins: dict[str, str] = field(default_factory=dict)
    """Folders not entered, because a link had led to them before: the folder's real path, by path."""

    def digest(self) -> str:
        """Changes whenever a file appears, vanishes, or has another size or time of modification."""
        rows = sorted((path, *found) for path, found in self.files.items()), sorted(self.rejected)
        return hashlib.sha256(repr(rows).encode()).hexdigest()


def walk(root: Path) -> Listing:
    """All image files below `root`, judged by suffix. Hidden files and folders are passed over."""
    listing = Listing()
    visited = {os.path.realpath(root)}
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(root / folder) as entries:
                ordered = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            listing.rejected[folder or "."] = f"the folder cannot be read: {error.strerror}"
            continue
        below = []
        for entry in ordered:
            path = f"{folder}/{entry.name}".lstrip("/")
            if entry.name.startswith("."):
                continue
            if entry.name.lower().endswith(IMAGE_SUFFIXES):
                _add(listing, root, path)
            elif os.path.isdir(root / path):  # unlike entry.is_dir(), False for a link to itself
                below.append((entry.is_symlink(), path))
        # A folder itself comes before links to it, which also ends a loop of links.
        for _, path in sorted(below):
            real = os.path.realpath(root / path)
            if real in visited:
                listing.twins[path] = real
                continue
            visited.add(real)
            listing.folders.add(path)
            pending.append(path)
    return listing


def look_up(root: Path, paths: Iterable[str]) -> tuple[Listing, list[str]]:
    """The files at `paths`, and those of `paths` where there is nothing."""
    listing, missing = Listing(), []
    for path in paths:
        if os.path.lexists(root / path):
            _add(listing, root, path)
        else:
            missing.append(path)
    return listing, missing


def _add(listing: Listing, root: Path, path: str) -> None:
    try:
        status = os.stat(os.path.join(root, path))
    except OSError as error:
        dangling = isinstance(error, FileNotFoundError)
        listing.rejected[path] = "a link to nowhere" if dangling else f"cannot be read: {error.strerror}"
        return
    if stat.S_ISREG(status.st_mode):
        listing.files[path] = Found(status.st_size, status.st_mtime_ns)
    else:
        kind = "folder" if stat.S_ISDIR(status.st_mode) else "device, pipe or socket"
        listing.rejected[path] = f"a {kind}, not an image file"
