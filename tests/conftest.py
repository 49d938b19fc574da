"""Small data sets that tests train on, and the photographs where they are there."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # ranks share few cores: threads that wait must not spin

# isort: split
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PHOTOS = Path(os.environ.get("ONEWARP_PHOTOS", Path(__file__).parents[1] / "../shared/data/clothing")).resolve()

SHAPES = [
    (96, 128),
    (131, 97),
    (120, 120),
    (101, 149),
    (160, 90),
]  # height, width: odd, even, both orientations


def picture(rng: np.random.Generator, height: int, width: int, label: int = 0) -> Image.Image:
    """Smooth random colours with stripes whose direction is the label: learnable within a few steps."""
    coarse = Image.fromarray(rng.integers(40, 216, (6, 6, 3), dtype=np.uint8).astype(np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    y, x = np.mgrid[:height, :width]
    angle = label * np.pi / 3
    stripes = 40 * np.sin((x * np.cos(angle) + y * np.sin(angle)) * 0.6)
    return Image.fromarray((pixels + stripes[..., None]).clip(0, 255).astype(np.uint8))


def make_folder(root: Path, *, train: int, valid: int, classes: int = 3, suffix: str = "jpg") -> Path:
    """`train/` and `valid/` with class folders; image i has class i mod `classes`."""
    rng = np.random.default_rng(7)
    for split, count in (("train", train), ("valid", valid)):
        for i in range(count):
            folder = root / split / f"class{i % classes}"
            folder.mkdir(parents=True, exist_ok=True)
            height, width = SHAPES[i % len(SHAPES)]
            picture(rng, height, width, i % classes).save(folder / f"{i:03d}.{suffix}")
    return root


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:
    """What tests keep for later, processes that they start included, stays out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONEWARP_CACHE", str(tmp_path_factory.mktemp("cache")))
        # torch makes this folder when it is imported: not where a command's own leavings are looked for.
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """53 training and 23 validation images (both prime) in 3 classes."""
    return make_folder(tmp_path_factory.mktemp("data") / "small", train=53, valid=23)


@pytest.fixture(scope="session")
def lossless_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, in PNG: every decoder gives the same pixels."""
    return make_folder(tmp_path_factory.mktemp("data") / "lossless", train=53, valid=23, suffix="png")


@pytest.fixture(scope="session")
def photos() -> Path:
    """A folder of real photographs with train/ and validation/."""
    if not PHOTOS.is_dir():
        pytest.skip(f"no photographs at {PHOTOS}; set ONEWARP_PHOTOS")
    return PHOTOS
