"""The verb that puts the images of a folder into a store: `pack`."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro
from rich.console import Console

from cluster.source import Source, scanned
from pipelines.errors import UserError
from trainer.bar import counted
from trainer.run_folder import printable


@dataclass(frozen=True, kw_only=True)
class Pack(Source):
    """Adds what is stored, and where."""

    out: tyro.conf.Positional[Path]
    """Folder to write: it must not exist."""
    decoded: bool = False
    """Store pixels: the fastest to train on, 10 to 30 times the size of JPEGs."""
    encoded: bool = False
    """Store the files as they are: little more than their size."""
    short_side: int | None = None
    """Shrink images whose shorter side is longer than this many pixels; with --encoded they become new JPEGs."""
    quality: int | None = None
    """Quality of those JPEGs, 1 to 100; their chroma is not subsampled. Default: 90."""

    def __post_init__(self) -> None:
        if self.decoded == self.encoded:
            raise UserError(
                f"--decoded and --encoded {'exclude each other' if self.decoded else 'are both missing'}: give one of "
                "them. Decoded pixels are faster to train on, encoded files take a tenth of the disk or less."
            )
        if self.quality is not None and (self.decoded or self.short_side is None):
            raise UserError(f"--quality {self.quality} is for JPEGs that --encoded with --short-side writes.")


def pack(config: tyro.conf.OmitArgPrefixes[Pack]) -> None:
    """Put the images of a folder, with their labels and split, into a few large files that training reads faster.

    Train on them with `--data OUT`. An interrupted pack leaves nothing behind.
    """
    from pipelines import packing  # which takes seconds

    console = Console()
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    try:
        with _termination_interrupts():
            packing.check_place(config.out)
            manifest, _ = scanned(config.config(), console)
            there = config.out.exists()
            started = time.perf_counter()
            with counted(console, f"Packing into {config.out}") as progress:
                store = packing.pack(
                    manifest,
                    config.out,
                    kind="decoded" if config.decoded else "encoded",
                    short_side=config.short_side,
                    quality=packing.QUALITY if config.quality is None else config.quality,
                    threads=len(os.sched_getaffinity(0)),
                    progress=progress,
                )
    except KeyboardInterrupt:
        Console(stderr=True).print(f"interrupted; nothing was left at {config.out}", highlight=False, markup=False)
        sys.exit(130)
    read, written = packing.in_words(int(manifest.bytes_N.sum())), packing.in_words(store.bytes)
    for note in manifest.notes:
        say(f"note      {note}")
    for bad in manifest.quarantine[:5]:
        say(f"left out  {printable(bad.path)}: {bad.reason}")
    if len(manifest.quarantine) > 5:
        say(f"left out  … and {len(manifest.quarantine) - 5} more files; each run names them all in its quarantine.txt")
    if there:
        say(f"packed    before: {config.out} holds just these images, {written}")
    else:
        seconds = time.perf_counter() - started
        say(f"packed    {len(store):,} images, {read} of files into {written} {store.kind}, in {seconds:.1f} s")
    say(f"train     {shlex.join(['onewarp', 'train', '--data', str(config.out)])}")


@contextmanager
def _termination_interrupts() -> Generator[None]:
    """SIGTERM as Ctrl-C: what `kill` or a batch system ends must clean up as well."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
