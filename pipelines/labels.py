"""Where labels come from: the folders, the names of the files, or a table."""

from __future__ import annotations

import csv
import hashlib
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from pipelines.errors import UserError
from pipelines.listing import Found, Listing, look_up, walk

SplitFrom = Literal["folders", "csv", "random"]

_VALID_NAMES = ("valid", "validation", "val")
_IS_VALID = {"train": False} | dict.fromkeys(_VALID_NAMES, True)


@dataclass(frozen=True)
class Regex:
    """The class is group 1 of `re.search(pattern, file name)`."""

    pattern: str


@dataclass(frozen=True)
class Csv:
    """The class stands in a table with the columns path, label and, if wanted, split.

    Paths in it are relative to the image folder; split is train, or one of valid, validation and val.
    """

    path: str
    """Relative to the working directory or, where it is not there, to the image folder."""


Labels = Literal["folder"] | Regex | Csv


class Labelled(NamedTuple):
    """A file and what is known of it before it is opened."""

    path: str
    label: str
    valid: bool | None
    """Whether it is for validation; None where nothing says so."""
    found: Found


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """The labelled files of a folder."""

    files: list[Labelled]
    """In the order of their paths; none is empty."""
    rejected: dict[str, str]
    """Reason, by path, for what bears an image's name and is no file, or has no label."""
    notes: list[str]
    split_from: SplitFrom
    table: Path | None
    """The table's absolute path, where labels come from one."""
    digest: str
    """See `digest_now`."""


def read_labels(root: Path, labels: Labels) -> Labelling:
    """List the images of the folder `root` and label them; opens none.

    Raises:
        UserError: there are no images, or the pattern or the table does not fit them.
    """
    if isinstance(labels, Csv):
        return _from_table(root, _find_table(root, labels.path))
    return _from_tree(root, labels.pattern if isinstance(labels, Regex) else None)


def no_labels(root: Path, name: str | None = None) -> Labelling:
    """List the images of the folder `root`, or the file `name` in it whatever it is called; their label is empty.

    Raises:
        UserError: there are no images.
    """
    listing = _images(root) if name is None else look_up(root, [name])[0]
    return Labelling(
        files=[Labelled(path, "", None, found) for path, found in sorted(listing.files.items())],
        rejected=listing.rejected,
        notes=_twins(listing),
        split_from="random",
        table=None,
        digest=listing.digest(),
    )


def digest_now(root: Path, table: Path | None, known: Mapping[str, Found]) -> str:
    """Changes with the name, size or time of any file that `read_labels` looks at, and with the table.

    Args:
        known: files that are taken for what they were, whatever has become of them, by path.

    Raises:
        UserError: the table cannot be read.
    """
    rows = None if table is None else _read_table(table)
    listing = walk(root) if rows is None else look_up(root, rows)[0]
    listing.files.update(known)
    for path in known:
        listing.rejected.pop(path, None)
    return listing.digest() if rows is None else _table_digest(rows, listing)


def _from_tree(root: Path, pattern: str | None) -> Labelling:
    label_of = _class_folder if pattern is None else _searcher(pattern)
    listing = _images(root)
    parts = _split_folders(listing, needs_class_folders=pattern is None)
    files, unlabelled, left_alone = [], {}, Counter[str]()
    for path, found in sorted(listing.files.items()):
        top, _, below = path.partition("/")
        if parts and not (below and top in parts):
            left_alone[repr(top + "/") if below else "the folder itself"] += 1
            continue
        label = label_of(below if parts else path)
        if label:
            files.append(Labelled(path, _text(label), parts.get(top), found))
        else:
            unlabelled[path] = "no class folder" if pattern is None else f"the name does not match '{pattern}'"
    if not files:
        path = min(unlabelled)
        raise _no_class_folders(root, path) if pattern is None else _no_match(pattern, path)

    notes = _twins(listing)
    if left_alone:
        places = ", ".join(f"{count} in {place}" for place, count in left_alone.items())
        notes.append(f"images outside the split folders were left alone: {places}")
    if None in parts.values():
        notes.append("there is no validation folder beside 'train/': all images are of 'train/'")
    rejected = {path: why for path, why in listing.rejected.items() if not parts or path.split("/")[0] in parts}
    return Labelling(
        files=files,
        rejected=rejected | unlabelled,
        notes=notes,
        split_from="folders" if True in parts.values() else "random",
        table=None,
        digest=listing.digest(),
    )


def _images(root: Path) -> Listing:
    listing = walk(root)
    if not listing.files:
        passed = "".join(f" {path!r} was passed over: {why}." for path, why in sorted(listing.rejected.items())[:1])
        raise UserError(f"There are no images in {str(root)!r}.{passed} Give the folder that holds the image files.")
    return listing


def _twins(listing: Listing) -> list[str]:
    return [f"{path!r} was not read a second time: it leads to {real!r}" for path, real in listing.twins.items()]


def _split_folders(listing: Listing, *, needs_class_folders: bool) -> dict[str, bool | None]:
    """The folders that make up the split: is it for validation? Empty where the folder is not split.

    A class may be called "train": the folder of that name is the training part only if class folders lie in
    it (where classes are folders), or a folder of another part beside it.
    """
    tops = {folder.lower(): folder for folder in sorted(listing.folders) if "/" not in folder}
    if "train" not in tops:
        return {}
    train = tops["train"]
    valid = [tops[name] for name in _VALID_NAMES if name in tops]
    depth = 2 if needs_class_folders else 1
    filled = any(path.startswith(train + "/") and path.count("/") >= depth for path in listing.files)
    if not (filled or valid or "test" in tops):
        return {}
    if len(valid) > 1:
        names = " and ".join(repr(name + "/") for name in valid)
        raise UserError(f"There are several validation folders beside {train + '/'!r}: {names}. Keep one of them.")
    parts: dict[str, bool | None] = {train: False, valid[0]: True} if valid else {train: None}
    for name in parts:
        if not any(path.startswith(name + "/") for path in listing.files):
            raise UserError(
                f"The folder {name + '/'!r} holds no images, while other parts of the data set stand "
                "beside it. Put its images there, or remove a validation folder to have images drawn for it."
            )
    return parts


def _class_folder(path: str) -> str:
    return path.rpartition("/")[0].partition("/")[0]


def _searcher(pattern: str) -> Callable[[str], str | None]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"The label pattern '{pattern}' is not a regular expression: {error}. Correct it.") from None
    if not compiled.groups:
        raise UserError(
            f"The label pattern '{pattern}' has no group. Put round brackets around the part that names "
            r"the class, as in '(.+)_\d+\.jpg$'."
        )

    def search(path: str) -> str | None:
        match = compiled.search(posixpath.basename(path))
        return match.group(1) if match else None

    return search


def _no_match(pattern: str, path: str) -> UserError:
    return UserError(
        f"The label pattern '{pattern}' matches none of the file names, for example "
        f"{posixpath.basename(path)!r}. Change it so that its first group is the class."
    )


def _no_class_folders(root: Path, path: str) -> UserError:
    name = posixpath.basename(path)
    numbered = re.fullmatch(r"(.*[^\d_.-])([_.-]?)\d+(\.\w+)", name)
    if numbered:
        label, separator, suffix = numbered.groups()
        pattern = rf"(.+){re.escape(separator)}\d+{re.escape(suffix)}$"
        hint = f"--label-regex '{pattern}' would read {label!r} from {name!r}"
    else:
        hint = f"--label-regex takes a pattern whose first group finds the class in names such as {name!r}"
    return UserError(
        f"No image in {str(root)!r} lies in a class folder, as <folder>/<class>/<image> does. If the names "
        f"hold the classes, {hint}; otherwise give --label-csv a table with the columns path and label."
    )


class _Row(NamedTuple):
    label: str
    valid: bool | None


def _find_table(root: Path, path: str) -> Path:
    candidates = [os.path.abspath(path), os.path.abspath(root / path)]
    for candidate in candidates:
        if os.path.isfile(candidate):
            return Path(candidate)
    places = " nor ".join(repr(candidate) for candidate in dict.fromkeys(candidates))
    raise UserError(f"The label table {path!r} was not found: there is no file {places}. Give its path.")


def _from_table(root: Path, table: Path) -> Labelling:
    rows = _read_table(table)
    listing, missing = look_up(root, rows)
    if missing:
        some = ", ".join(repr(path) for path in missing[:5])
        raise UserError(
            f"{len(missing)} of the {len(rows)} files in {str(table)!r} are not in {str(root)!r}: {some}"
            f"{', ...' if len(missing) > 5 else ''}. Paths in the table are relative to the image folder."
        )
    if not listing.files:
        path, why = min(listing.rejected.items())
        raise UserError(f"None of the paths in {str(table)!r} is a file; {path!r} is {why}. Correct the table.")
    return Labelling(
        files=[Labelled(path, *rows[path], found) for path, found in sorted(listing.files.items())],
        rejected=listing.rejected,
        notes=[],
        split_from="random" if None in {row.valid for row in rows.values()} else "csv",
        table=table,
        digest=_table_digest(rows, listing),
    )


def _table_digest(rows: dict[str, _Row], listing: Listing) -> str:
    return hashlib.sha256(repr((sorted(rows.items()), listing.digest())).encode()).hexdigest()


def _read_table(table: Path) -> dict[str, _Row]:
    try:
        # surrogateescape: names that are not UTF-8 come out as os.fsdecode gives them.
        with open(table, newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
            reader = csv.DictReader(stream)
            columns = [name.strip().lower() for name in reader.fieldnames or ()]
            if not {"path", "label"} <= set(columns):
                found = ", ".join(map(repr, columns)) or "(none)"
                raise UserError(
                    f"The label table {str(table)!r} has the columns {found}; "
                    "its first line must name path and label, and may name split."
                )
            reader.fieldnames = columns
            rows: dict[str, _Row] = {}
            for fields in reader:
                where = f"Line {reader.line_num} of the label table {str(table)!r}"
                path, row = _read_row(fields, where)
                if path in rows:
                    raise UserError(f"{where} names {path!r} a second time. Keep one line for each file.")
                rows[path] = row
    except (OSError, csv.Error) as error:
        raise UserError(f"The label table {str(table)!r} cannot be read: {error}. Give a CSV file.") from None
    if not rows:
        raise UserError(f"The label table {str(table)!r} has no lines below its header. Add one for each image.")
    return rows


def _read_row(fields: dict[str, str | None], where: str) -> tuple[str, _Row]:
    path, label = fields["path"] or "", (fields["label"] or "").strip()
    if not path or not label:
        raise UserError(f"{where} lacks a {'label' if path else 'path'}. Fill it in, or remove the line.")
    normal = posixpath.normpath(path)
    if normal.startswith("/") or normal.split("/")[0] == "..":
        raise UserError(f"{where} has the path {path!r}. Paths must lead into the image folder, relative to it.")
    if "split" not in fields:
        return normal, _Row(_text(label), None)
    word = (fields["split"] or "").strip().lower()
    if word not in _IS_VALID:
        raise UserError(f"{where} has the split {fields['split']!r}. Write train or valid.")
    return normal, _Row(_text(label), _IS_VALID[word])


def _text(name: str) -> str:
    """A class's name is written to journals, reports and screens: bytes that are not UTF-8 become escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
