"""What earlier scans made of each file of a folder, kept so that an unchanged file is decoded once.

One Parquet file for each scanned folder in `cache_folder()`. It is a convenience: where it is damaged, of
another version, or cannot be written, files are decoded again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import parquet
from pipelines.firewall import DECODER, Decoded, Refused
from pipelines.listing import Found
from pipelines.synthetic import cache_folder

_VERSION = 1  # of the verdicts: whatever makes the firewall judge a file differently makes a new version
_KEY = b"onewarp verdicts"
_NO_CACHE = (OSError, RuntimeError)  # the second where nothing says what the user's home is

_SCHEMA = pa.schema(
    [
        ("path", pa.binary()),
        ("bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("reason", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("format", pa.string()),
        ("orientation", pa.uint8()),
        ("transparent", pa.bool_()),
        ("hash", pa.binary(16)),
    ]
)


class Known(NamedTuple):
    """A verdict, and the state of the file that it was passed on."""

    found: Found
    verdict: Decoded | Refused


def recall(root: Path) -> dict[str, Known]:
    """Verdicts by path relative to `root`; none where nothing usable was kept."""
    try:
        table = pq.read_table(_file(root))
        if (table.schema.metadata or {}).get(_KEY) != _stamp(root) or table.schema.names != _SCHEMA.names:
            return {}
        return {os.fsdecode(row["path"]): _known(row) for row in table.to_pylist()}
    except (*_NO_CACHE, pa.ArrowException):
        return {}


def remember(root: Path, known: Mapping[str, Known]) -> None:
    """Keep the verdicts that last, in place of those kept before."""
    lasting = {path: one for path, one in known.items() if isinstance(one.verdict, Decoded) or one.verdict.lasting}
    rows = [{"path": os.fsencode(path), **one.found._asdict(), **vars(one.verdict)} for path, one in lasting.items()]
    table = pa.Table.from_pylist(rows, _SCHEMA.with_metadata({_KEY: _stamp(root)}))
    with contextlib.suppress(*_NO_CACHE):
        file = _file(root)
        file.parent.mkdir(parents=True, exist_ok=True)
        parquet.write(table, file)


def _known(row: dict) -> Known:
    found = Found(row.pop("bytes"), row.pop("mtime_ns"))
    del row["path"]
    reason = row.pop("reason")
    return Known(found, Decoded(**row) if reason is None else Refused(reason=reason))


def _file(root: Path) -> Path:
    name = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    return cache_folder().expanduser() / "scans" / f"{name}.parquet"


def _stamp(root: Path) -> bytes:
    return json.dumps([_VERSION, DECODER, str(root)]).encode()
