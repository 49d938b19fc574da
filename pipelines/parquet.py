"""Parquet files that are there whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def write(table: pa.Table, path: str | os.PathLike[str]) -> None:
    """Write a table beside its place and rename it: a reader never sees half of it, a failure leaves the old file."""
    temporary = f"{os.fspath(path)}.{uuid.uuid4().hex}.tmp"
    try:
        pq.write_table(table, temporary)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
