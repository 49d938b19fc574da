"""Data sets that are known by a name."""

from __future__ import annotations

import urllib.error
from pathlib import Path

from pipelines.errors import UserError, first_line
from pipelines.synthetic import breeds, cache_folder

NAMES = ("breeds", "pets")
PETS_REGEX = r"^(.+)_\d+\.jpg$"


def named_dataset(name: str) -> tuple[Path, str] | None:
    """The folder of a named data set, made or downloaded on first use, and the regular expression of its labels.

    `breeds`: drawn by this package. `pets`: Oxford-IIIT pets, by torchvision. Any other name: `None`.
    """
    if name == "breeds":
        return breeds(), PETS_REGEX
    if name == "pets":
        cache = cache_folder().expanduser()
        import torchvision  # which takes seconds

        try:
            torchvision.datasets.OxfordIIITPet(str(cache), download=True)
        except (urllib.error.URLError, RuntimeError, OSError) as error:
            raise UserError(
                f"--data pets: the Oxford-IIIT pets could not be downloaded ({first_line(error)}). Check the network, "
                f"or put the folder oxford-iiit-pet into {cache}; --data breeds needs no network."
            ) from None
        return cache / "oxford-iiit-pet" / "images", PETS_REGEX
    return None
