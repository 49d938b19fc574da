"""The verb that looks at every file: `scan`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tyro
from rich.console import Console

from cluster import environment
from cluster.source import Source, scanned
from pipelines.errors import UserError
from pipelines.limits import MAX_PIXELS
from trainer.bar import counted
from trainer.run_folder import RunFolder, absolute

if TYPE_CHECKING:
    from pipelines.manifest import Manifest
    from pipelines.scanning import Examine


@dataclass(frozen=True, kw_only=True)
class Scan(Source):
    """Adds how they are looked at."""

    max_pixels: int = MAX_PIXELS
    """Images with more pixels than this are left out."""
    near_duplicates: bool = False
    """Also find pictures that look alike (needs the package imagehash)."""
    address: str | None = None
    """Scan with Ray: `local` starts it on this machine, `auto` or `ray://HOST:PORT` joins a cluster."""
    threads: int | None = None
    """Threads to decode with, without Ray. Default: the machine's cores."""
    reuse: bool = True
    """Decode only what is new or has changed since an earlier scan; `--no-reuse` decodes every file."""
    out: Path = Path("scan")
    """Folder for manifest.parquet and quarantine.txt."""

    def __post_init__(self) -> None:
        for flag, value in (("max-pixels", self.max_pixels), ("threads", self.threads)):
            if value is not None and value < 1:
                raise UserError(f"--{flag} is {value}; it must be at least 1.")


def scan(config: tyro.conf.OmitArgPrefixes[Scan]) -> None:
    """Decode every file once, say what was found, and write the manifest and the list of files left out.

    Files that cannot be used are no failure: the exit code is 0. `train` takes over what a scan found.
    """
    from pipelines import duplicates  # which takes seconds
    from trainer.images import found

    console = Console()
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    settings = config.config()
    if config.near_duplicates:
        duplicates.hasher()  # before the scan, which may take long
    folder = RunFolder(absolute(config.out))
    threads = config.threads or len(os.sched_getaffinity(0))
    try:
        manifest, _ = scanned(
            settings,
            console,
            max_pixels=config.max_pixels,
            threads=threads,
            examine=_over_ray(config.address),
            reuse=config.reuse,
        )
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; nothing was written")
        sys.exit(130)
    found(manifest, settings, console, f"in {folder.quarantine}")
    if config.near_duplicates:
        say(f"alike     {_alike(manifest, threads, console)}")
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        manifest.write(folder.manifest)
        folder.write_quarantine(manifest.quarantine)
    except OSError as error:
        raise UserError(
            f"The folder {folder.path} cannot be written ({error.strerror}). Choose another --out."
        ) from None
    say(f"manifest  {folder.manifest}")
    say(f"left out  {len(manifest.quarantine):,} files, named in {folder.quarantine}")


def _over_ray(address: str | None) -> Examine | None:
    if address is None:
        return None
    if address == "local":
        address = None
    else:
        os.environ.setdefault(environment.OTHERS, "1")
    from cluster.examine import over_ray  # which takes seconds

    return over_ray(address)


def _alike(manifest: Manifest, threads: int, console: Console) -> str:
    """What pictures look alike, in words; pairs across the split come first."""
    from pipelines import duplicates  # which takes seconds

    with counted(console, "Comparing pictures") as progress:
        files = [os.path.join(manifest.root, path) for path in manifest.paths]
        hashes_M, rows_M = duplicates.perceptual(files, manifest.formats, threads=threads, progress=progress)
    pairs_P2 = rows_M[duplicates.near(hashes_M)]
    same_P = (manifest.hashes_N16[pairs_P2[:, 0]] == manifest.hashes_N16[pairs_P2[:, 1]]).all(axis=1)
    pairs_P2 = pairs_P2[~same_P]
    across_P = manifest.valid_N[pairs_P2].sum(axis=1) == 1
    pairs_P2 = pairs_P2[np.argsort(~across_P, kind="stable")]
    words = (
        f"{len(pairs_P2):,} pairs of pictures differ in at most {duplicates.DISTANCE} of 64 bits of their perceptual "
        f"hashes, {across_P.sum():,} of them across training and validation"
    )
    return f"{words}: {duplicates.listed(pairs_P2, manifest.paths, '~')}" if len(pairs_P2) else words
