"""From a folder to its manifest: every file listed, labelled, decoded once, and put to one side of the split.

files --> listing --> labels --> firewall --> split --> manifest
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from pipelines import duplicates, firewall, verdicts
from pipelines.errors import UserError
from pipelines.firewall import Decoded, Progress, Refused
from pipelines.labels import Labelled, Labels, SplitFrom, digest_now, no_labels, read_labels
from pipelines.limits import MAX_PIXELS
from pipelines.listing import Found
from pipelines.manifest import Manifest, Quarantined, Samples, rows16
from pipelines.plan import permutation
from pipelines.store import Store, is_store

_SPLIT_STREAM = 2**63  # an epoch, to the generator: none that the order of training ever reaches


class Examine(Protocol):
    """Whatever does the work of `firewall.examine`, here or on other machines."""

    def __call__(
        self, files: Sequence[str], *, progress: Progress | None, max_pixels: int
    ) -> list[Decoded | Refused]: ...


def scan(
    root: str | os.PathLike[str],
    *,
    labels: Labels = "folder",
    valid_fraction: float = 0.2,
    split_seed: int = 42,
    max_pixels: int = MAX_PIXELS,
    threads: int = 2,
    progress: Progress | None = None,
    examine: Examine | None = None,
    reuse: bool = True,
) -> Manifest:
    """List, label and decode every image of a folder, or take what a store holds.

    What becomes of each file is kept in `cache_folder()`, and taken from there as long as the file has the same
    size and time of modification: another split, other labels or one more file decode what is new alone.

    Args:
        root: the folder. Where it holds train/ and one of valid/, validation/ and val/, those are the split. Or a
            store (see `store`), which has its labels and its split already.
        labels: "folder" takes the first folder below the root, or below train/ and so on, as the class.
        valid_fraction: share of the images to draw for validation where neither folders nor a table say.
        split_seed: seed of that draw, which also depends on the number of usable images.
        max_pixels: images with more are refused.
        threads: threads to decode with.
        progress: called with (files decoded, files to decode) now and then; never where nothing is to be decoded.
        examine: does the decoding instead of this process's threads.
        reuse: False decodes all files again, as may be wise after a disk failed.

    Raises:
        UserError: the folder, the labels or the split cannot be used as they are.
    """
    folder = _folder(root)
    if is_store(folder):
        return _stored(folder, labels)
    if not 0 < valid_fraction < 1:
        raise UserError(f"valid_fraction is {valid_fraction}; it must lie between 0 and 1, both excluded.")
    labelling = read_labels(folder, labels)
    # Before the files are decoded, which takes long, and again after, with what is left of them.
    _check_split(
        [file.label for file in labelling.files],
        [file.valid for file in labelling.files],
        labelling.split_from,
    )

    examine = examine or partial(firewall.examine, threads=threads)
    usable, quarantine = _sort_out(
        folder,
        labelling.files,
        labelling.rejected,
        max_pixels=max_pixels,
        progress=progress,
        examine=examine,
        reuse=reuse,
    )
    names = [file.label for file, _ in usable]
    if labelling.split_from == "random":
        valid_N = _draw(len(usable), valid_fraction, split_seed)
    else:
        valid_N = np.array([bool(file.valid) for file, _ in usable])
    _check_split(names, valid_N.tolist(), labelling.split_from)
    classes = tuple(sorted(set(names)))
    lost = sorted({file.label for file in labelling.files} - set(names))
    notes = [*labelling.notes, *(f"the class {name!r} has no usable image and was left out" for name in lost)]
    notes += _transparent(usable)
    paths = tuple(file.path for file, _ in usable)
    hashes_N16 = rows16([decoded.hash for _, decoded in usable])
    groups = duplicates.identical(hashes_N16)
    if groups:
        copies = sum(map(len, groups)) - len(groups)
        some = duplicates.listed(np.stack([group[:2] for group in groups]), paths, "=")
        notes.append(f"groups of identical files: {len(groups):,}, with {copies:,} to spare: {some}")
    warnings = []
    leaks_P2 = duplicates.leaks(groups, valid_N)
    if len(leaks_P2):
        warnings.append(
            f"{len(leaks_P2):,} of {valid_N.sum():,} validation images are in training too, byte for byte, which makes "
            f"the error look smaller than it is: {duplicates.listed(leaks_P2, paths, '=')}"
        )
    label_of = {name: label for label, name in enumerate(classes)}
    return Manifest(
        root=folder,
        classes=classes,
        paths=paths,
        labels_N=np.array([label_of[name] for name in names], np.int64),
        valid_N=valid_N,
        heights_N=np.array([decoded.height for _, decoded in usable], np.int32),
        widths_N=np.array([decoded.width for _, decoded in usable], np.int32),
        formats=tuple(decoded.format for _, decoded in usable),
        bytes_N=np.array([file.found.bytes for file, _ in usable], np.int64),
        mtimes_N=np.array([file.found.mtime_ns for file, _ in usable], np.int64),
        orientations_N=np.array([decoded.orientation for _, decoded in usable], np.uint8),
        hashes_N16=hashes_N16,
        quarantine=quarantine,
        notes=tuple(notes),
        warnings=tuple(warnings),
        split_from=labelling.split_from,
        table=labelling.table,
        digest=labelling.digest,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class ToApply:
    """Images that a trained model is applied to."""

    samples: Samples
    """Not empty."""
    hashes_N16: np.ndarray
    """uint8, the first 16 bytes of the SHA-256 of each file."""
    part_of: SplitFrom | None
    """Where the split comes from whose validation part they are; None where they are all images there are."""
    quarantine: tuple[Quarantined, ...]
    """In the order of their paths."""
    notes: tuple[str, ...]
    """What the user should know, in words."""


def scan_to_apply(
    root: str | os.PathLike[str],
    *,
    labels: Labels | None,
    max_pixels: int = MAX_PIXELS,
    threads: int = 2,
    progress: Progress | None = None,
) -> ToApply:
    """List and decode the images that a model is to be applied to, or take what a store holds.

    Labelled images are judged: where the folder, the table or the store brings a split they are its validation part,
    else all of them; nothing is drawn, and one class is enough. Without labels they are all images there are.

    Args:
        root: the folder, or a store. Without labels it may be a single file, whatever its name.
        labels: see `scan`; None is for images that nothing is known of.
        max_pixels, threads, progress: see `scan`.

    Raises:
        UserError: the folder or the labels cannot be used as they are, or no image of them.
    """
    path = Path(os.path.abspath(root))
    single = labels is None and path.is_file()
    folder = path.parent if single else _folder(root)
    if not single and is_store(folder):
        manifest = _stored(folder, labels or "folder")
        rows_N = np.ones_like(manifest.valid_N) if labels is None else manifest.valid_N
        return ToApply(
            samples=manifest.samples.subset(np.flatnonzero(rows_N)),
            hashes_N16=manifest.hashes_N16[rows_N],
            part_of=None if labels is None else manifest.split_from,
            quarantine=manifest.quarantine,
            notes=(),
        )
    if labels is None:
        labelling, part_of = no_labels(folder, path.name if single else None), None
    else:
        labelling = read_labels(folder, labels)
        part_of = None if labelling.split_from == "random" else labelling.split_from
    files = [file for file in labelling.files if part_of is None or file.valid]
    if not files:
        raise UserError(
            f"The split ({part_of}) of {str(folder)!r} leaves no image for validation. Give it at least one."
        )
    rejected = labelling.rejected
    if part_of == "folders":
        beside = files[0].path.partition("/")[0] + "/"
        rejected = {name: why for name, why in rejected.items() if name.startswith(beside)}
    examine = partial(firewall.examine, threads=threads)
    usable, quarantine = _sort_out(
        folder, files, rejected, max_pixels=max_pixels, progress=progress, examine=examine, reuse=True
    )
    names = [file.label for file, _ in usable]
    classes = () if labels is None else tuple(sorted(set(names)))
    label_of = {name: label for label, name in enumerate(classes)}
    samples = Samples(
        root=folder,
        classes=classes,
        paths=tuple(file.path for file, _ in usable),
        labels_N=np.array([label_of.get(name, -1) for name in names], np.int64),
        heights_N=np.array([decoded.height for _, decoded in usable], np.int32),
        widths_N=np.array([decoded.width for _, decoded in usable], np.int32),
        bytes_N=np.array([file.found.bytes for file, _ in usable], np.int64),
        mtimes_N=np.array([file.found.mtime_ns for file, _ in usable], np.int64),
        ids_N=np.arange(len(usable)),
    )
    return ToApply(
        samples=samples,
        hashes_N16=rows16([decoded.hash for _, decoded in usable]),
        part_of=part_of,
        quarantine=quarantine,
        notes=(*labelling.notes, *_transparent(usable)),
    )


def is_current(manifest: Manifest, spoiled: Collection[str] = ()) -> bool:
    """Whether a new scan with the same options would see the same files: none opened, all looked at.

    False when an image appeared, vanished or has another size or time of modification, the quarantined
    ones and those left alone included, or when the table says something else; or when the store is another.

    Args:
        spoiled: images that are known to have gone bad since, by path: they do not count.
    """
    try:
        if manifest.store is not None:
            return Store.open(manifest.store).digest == manifest.digest
        known = {
            path: Found(int(size), int(mtime))
            for path, size, mtime in zip(manifest.paths, manifest.bytes_N, manifest.mtimes_N, strict=True)
            if path in spoiled
        }
        return digest_now(manifest.root, manifest.table, known) == manifest.digest
    except UserError:
        return False


def changes(manifest: Manifest) -> list[str]:
    """What has become of its images since: a sentence for each kind of change, with the first paths."""
    if manifest.store is not None:
        return ["the store is another"]
    gone, altered = [], []
    for path, size, mtime in zip(manifest.paths, manifest.bytes_N, manifest.mtimes_N, strict=True):
        try:
            now = os.stat(os.path.join(manifest.root, path))
        except OSError:
            gone.append(path)
        else:
            if (now.st_size, now.st_mtime_ns) != (size, mtime):
                altered.append(path)
    found = [_some(len(paths), paths, words) for paths, words in ((gone, "gone"), (altered, "altered")) if paths]
    return found or ["there are new ones, or others were left out then"]


def _some(count: int, paths: Sequence[str], words: str) -> str:
    names = ", ".join(repr(path) for path in paths[:3])
    return f"{count} {'is' if count == 1 else 'are'} {words} ({names}{', …' if count > 3 else ''})"


def _folder(root: str | os.PathLike[str]) -> Path:
    folder = Path(os.path.abspath(root))
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"The image folder {str(folder)!r} {what}. Give the folder that holds the images.")
    return folder


def _stored(folder: Path, labels: Labels) -> Manifest:
    if labels != "folder":
        raise UserError(f"{str(folder)!r} is a store, whose labels are packed. Leave out where to take them from.")
    return Store.open(folder).manifest


def _sort_out(
    folder: Path,
    files: Sequence[Labelled],
    rejected: dict[str, str],
    *,
    max_pixels: int,
    progress: Progress | None,
    examine: Examine,
    reuse: bool,
) -> tuple[list[tuple[Labelled, Decoded]], tuple[Quarantined, ...]]:
    """The files that can be used, and all those that cannot, `rejected` ones with them.

    Raises:
        UserError: none can be used.
    """
    verdict_of = _verdicts(folder, {file.path: file.found for file in files}, max_pixels, progress, examine, reuse)
    pairs = [(file, verdict_of[file.path]) for file in files]
    usable = [(file, verdict) for file, verdict in pairs if isinstance(verdict, Decoded)]
    refused = {file.path: verdict.reason for file, verdict in pairs if isinstance(verdict, Refused)}
    quarantine = tuple(Quarantined(path=path, reason=why) for path, why in sorted((rejected | refused).items()))
    if not usable:
        first = f"{quarantine[0].path!r}: {quarantine[0].reason}"
        raise UserError(f"None of the {len(pairs)} images in {str(folder)!r} is usable; {first}. Mend or replace them.")
    return usable, quarantine


def _transparent(usable: Sequence[tuple[Labelled, Decoded]]) -> list[str]:
    count = sum(decoded.transparent for _, decoded in usable)
    return [f"{count:,} images have transparent parts: the colours stored there are read as they are"] if count else []


def _verdicts(
    folder: Path, files: dict[str, Found], max_pixels: int, progress: Progress | None, examine: Examine, reuse: bool
) -> dict[str, Decoded | Refused]:
    """The verdict on each file, remembered or new."""
    known = verdicts.recall(folder) if reuse else {}
    still = {
        path: one
        for path, one in known.items()
        if one.found == files.get(path)
        and (isinstance(one.verdict, Refused) or one.verdict.height * one.verdict.width <= max_pixels)
    }
    new = [path for path in files if path not in still]
    if new:
        examined = examine([os.path.join(folder, path) for path in new], progress=progress, max_pixels=max_pixels)
        fresh = {path: verdicts.Known(files[path], one) for path, one in zip(new, examined, strict=True)}
        # Files that this scan was not about are remembered too, unless they are gone.
        others = {path: one for path, one in known.items() if path not in files and os.path.lexists(folder / path)}
        still |= fresh
        verdicts.remember(folder, others | still)
    return {path: one.verdict for path, one in still.items()}


def _draw(n: int, fraction: float, seed: int) -> np.ndarray:
    """Which of `n` images are for validation, bool [n]: about `fraction` of them, at least one, not all."""
    valid_N = np.zeros(n, bool)
    valid_N[permutation(seed, _SPLIT_STREAM, n)[: min(max(round(n * fraction), 1), n - 1)]] = True
    return valid_N


def _check_split(names: Sequence[str], valid: Sequence[bool | None], split_from: SplitFrom) -> None:
    """Raise unless there are two classes, and images of known classes in both parts of the split.

    `valid` holds None where the split is yet to be drawn.
    """
    if len(set(names)) < 2:
        raise UserError(
            f"There is only one class, {names[0]!r}, and it takes two or more to tell apart. Check where the "
            "labels come from."
        )
    if None in valid:
        return
    trained, validated = (
        {name for name, is_valid in zip(names, valid, strict=True) if is_valid == part} for part in (False, True)
    )
    for part, classes in (("training", trained), ("validation", validated)):
        if not classes:
            raise UserError(f"The split ({split_from}) leaves no usable image for {part}. Give that part at least one.")
    unseen = sorted(validated - trained)
    if unseen:
        cause = "the draw left them no training image; add images, or try another split_seed"
        if split_from != "random":
            cause = "they have no training image; add some, correct the spelling, or take those images out"
        some = ", ".join(map(repr, unseen[:5])) + (", ..." if len(unseen) > 5 else "")
        raise UserError(f"Validation has classes that training never sees ({some}): {cause}.")
