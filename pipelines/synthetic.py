"""An embedded data set: "breeds", twelve kinds of animal that never lived.

It needs no download, and it is built to show what interpolation costs. The breeds come in pairs of twins
that share shape, colours and markings; only the weave of the coat tells twins apart: its period, its
direction against the hair, or a cross-hatch, at periods of about 5 pixels of a picture whose shorter side
is 375. One bilinear read to 224 x 224 keeps such detail, a chain of several washes it out.
"""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.errors import UserError
from pipelines.portrait import Breed, Look, Portrait, paint

VERSION = 1  # of the pictures: whatever changes a pixel makes a new version, hence a new folder

_EXIF_ORIENTATION = 0x0112
# EXIF orientation -> how upright pixels are turned before they are stored.
_TURNED = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}

# fmt: off
_TABBY = Look(
    ears="pointed", markings="stripes", slit=True, muzzle=0.34, width=1.08, base=(0.86, 0.53, 0.24),
    dark=(0.58, 0.27, 0.09), pale=(0.96, 0.86, 0.71), iris=(0.45, 0.68, 0.25), nose=(0.80, 0.45, 0.42))
_SPITZ = Look(
    ears="pointed", markings="mask", slit=False, muzzle=0.44, width=0.98, base=(0.50, 0.53, 0.58),
    dark=(0.30, 0.32, 0.37), pale=(0.92, 0.93, 0.95), iris=(0.42, 0.67, 0.90), nose=(0.13, 0.12, 0.14))
_OCELOT = Look(
    ears="round", markings="rosettes", slit=True, muzzle=0.38, width=1.0, base=(0.82, 0.67, 0.42),
    dark=(0.25, 0.17, 0.12), pale=(0.95, 0.90, 0.80), iris=(0.85, 0.64, 0.20), nose=(0.66, 0.37, 0.35))
_HOUND = Look(
    ears="floppy", markings="brindle", slit=False, muzzle=0.50, width=0.94, base=(0.57, 0.37, 0.24),
    dark=(0.33, 0.19, 0.12), pale=(0.80, 0.64, 0.47), iris=(0.42, 0.25, 0.10), nose=(0.14, 0.10, 0.10))
_SHORTHAIR = Look(
    ears="pointed", markings="plain", slit=True, muzzle=0.36, width=1.2, base=(0.43, 0.47, 0.57),
    dark=(0.33, 0.36, 0.46), pale=(0.55, 0.59, 0.68), iris=(0.92, 0.57, 0.14), nose=(0.30, 0.30, 0.38))
_TERRIER = Look(
    ears="folded", markings="patches", slit=False, muzzle=0.46, width=1.0, base=(0.90, 0.83, 0.70),
    dark=(0.50, 0.33, 0.22), pale=(0.97, 0.94, 0.87), iris=(0.24, 0.15, 0.09), nose=(0.12, 0.10, 0.10))
# fmt: on

BREEDS = (  # twins side by side
    Breed(name="Ember_Tabby", look=_TABBY, period=4.8, threads=(90,)),
    Breed(name="Saffron_Tabby", look=_TABBY, period=6.4, threads=(90,)),
    Breed(name="Frost_Spitz", look=_SPITZ, period=5.2, threads=(90,)),
    Breed(name="Drift_Spitz", look=_SPITZ, period=5.2, threads=(0,)),
    Breed(name="Dune_Ocelot", look=_OCELOT, period=5.2, threads=(45, 135)),
    Breed(name="Marsh_Ocelot", look=_OCELOT, period=5.2, threads=(90,)),
    Breed(name="Cinder_Hound", look=_HOUND, period=5.2, threads=()),
    Breed(name="Bramble_Hound", look=_HOUND, period=5.2, threads=(0,)),
    Breed(name="Slate_Shorthair", look=_SHORTHAIR, period=4.8, threads=()),
    Breed(name="Thistle_Shorthair", look=_SHORTHAIR, period=6.2, threads=()),
    Breed(name="Pebble_Terrier", look=_TERRIER, period=5.0, threads=(45, 135)),
    Breed(name="Biscuit_Terrier", look=_TERRIER, period=5.0, threads=(0, 90)),
)


def breeds(cache: str | os.PathLike[str] | None = None, classes: int = 12, per_class: int = 60, seed: int = 0) -> Path:
    """A folder of JPEGs named `<Breed_Name>_<number>.jpg`, painted on first use and kept.

    `cache` is the folder to keep it in: by default $ONEWARP_CACHE, else $XDG_CACHE_HOME/onewarp, else
    ~/.cache/onewarp. The first `classes` of BREEDS are taken, so that pairs stay together. A picture depends
    on (seed, breed, number) alone: a larger set holds the pictures of a smaller one. Some are stored turned,
    with the EXIF orientation that sets them upright. Raises UserError for counts out of range and for a
    cache that cannot be written.
    """
    if not 2 <= classes <= len(BREEDS):
        raise UserError(
            f"breeds(classes={classes}): there are {len(BREEDS)} breeds, and a classifier needs two. "
            f"Choose classes between 2 and {len(BREEDS)}."
        )
    if not (1 <= per_class < 2**32 and 0 <= seed < 2**63):
        raise UserError(
            f"breeds(per_class={per_class}, seed={seed}): a breed needs at least one picture, and a seed is "
            f"0 or more. Choose per_class from 1 up and seed from 0 to 2**63 - 1."
        )
    cache = (cache_folder() if cache is None else Path(cache)).expanduser()
    folder = cache / f"breeds-v{VERSION}-{classes}x{per_class}-seed{seed}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Painted beside its final place and renamed: whoever finds the folder finds all of it.
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{folder.name}-") as scratch:
            unfinished = Path(scratch) / folder.name
            unfinished.mkdir()
            _paint_all(unfinished, classes, per_class, seed)
            try:
                os.replace(unfinished, folder)
            except OSError:
                if not folder.is_dir():  # else another process was quicker, and its pictures are the same
                    raise
    except OSError as error:
        raise UserError(
            f"The breeds data set cannot be written to {cache}: {error}. Point the environment variable "
            f"ONEWARP_CACHE at a folder with free space and write permission."
        ) from error
    return folder


def portrait(breed: int, number: int, seed: int = 0) -> Portrait:
    """Picture `number` (from 1) of BREEDS[breed], upright, as it was before JPEG."""
    return paint(BREEDS[breed], (seed, breed << 32 | number))


def cache_folder() -> Path:
    """Where data sets are kept: `$ONEWARP_CACHE`, else `onewarp` in the user's cache folder."""
    if named := os.environ.get("ONEWARP_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "onewarp"


def _paint_all(folder: Path, classes: int, per_class: int, seed: int) -> None:
    # Threads scale here: nearly all the time goes into array loops that release the interpreter lock.
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        jobs = [(breed, number) for number in range(1, per_class + 1) for breed in range(classes)]
        list(pool.map(lambda job: _save(folder, *job, seed), jobs))
    finally:
        pool.shutdown(cancel_futures=True)


def _save(folder: Path, breed: int, number: int, seed: int) -> None:
    image, exif = Image.fromarray(portrait(breed, number, seed).pixels_HW3), Image.Exif()
    choice = np.random.default_rng([seed, breed, number]).random()
    orientation = 6 if choice < 0.05 else 8 if choice < 0.08 else 3 if choice < 0.09 else 1
    if orientation != 1:
        image = image.transpose(_TURNED[orientation])
        exif[_EXIF_ORIENTATION] = orientation
    image.save(folder / f"{BREEDS[breed].name}_{number}.jpg", quality=90, exif=exif)
