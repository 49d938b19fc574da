"""What goes with an exported model reads an image as validation does, with Pillow and NumPy alone."""

import ast
import io
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import Centre, Loader, preprocess
from pipelines.decode import decoded
from pipelines.scanning import scan_to_apply
from tests.conftest import picture
from tests.hostile import bad_files, good_files

LEVELS = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
GOOD = good_files()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of many shapes, without loss."""
    root = tmp_path_factory.mktemp("shapes")
    for i, (height, width) in enumerate([(64, 64), (90, 140), (141, 90), (333, 500), (640, 427), (70, 1000)]):
        picture(np.random.default_rng(i), height, width).save(root / f"{i}.png")
    return root


@pytest.mark.parametrize("quality", ["normal", "high"])
@pytest.mark.parametrize(("size", "crop_pct"), [(96, 1.0), (64, 0.875), (48, 0.95), (33, 1.0), (160, 1.0), (31, 0.5)])
def test_it_agrees_with_the_loader(folder, size, crop_pct, quality):
    samples = scan_to_apply(folder, labels=None).samples
    loader = Loader(
        samples, size=size, global_batch=len(samples), augment=Centre(crop_pct=crop_pct), quality=quality, **LEVELS
    )
    (batch,) = loader.epoch(0)
    preprocessing = {"size": size, "crop_pct": crop_pct, "quality": quality, **LEVELS}
    for path, image_CHW in zip(samples.paths, batch.images_NCHW.numpy(), strict=True):
        read_CHW = preprocess.read(folder / path, preprocessing)
        assert read_CHW.dtype == np.float32 and read_CHW.flags.c_contiguous
        off_CHW = np.abs(read_CHW - image_CHW)
        # The filter that shrinks rounds to whole levels: where it lies halfway, one library goes up, another down.
        assert off_CHW.max() <= 1.01 and off_CHW.mean() < 0.005, path
        if min(Image.open(folder / path).size) * crop_pct / size <= (2 if quality == "normal" else 4):
            assert off_CHW.max() < 0.02, path


def test_values_are_normalised():
    preprocessing = {"size": 8, "crop_pct": 1.0, "quality": "normal", "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 2.0)}
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 51, 0)).save(file, "PNG")
    image_CHW = preprocess.read(file, preprocessing)
    assert image_CHW[:, 3, 4].tolist() == pytest.approx([0.9 / 0.5, 0.0, -0.3 / 2.0], abs=1e-6)


@pytest.mark.parametrize("name", GOOD)
def test_files_of_all_kinds_have_the_decoders_pixels(tmp_path, name):
    (tmp_path / name).write_bytes(GOOD[name])
    pixels_HWC = np.asarray(preprocess.upright(tmp_path / name)).astype(int)
    # Pillow keeps the upper eight of 16 bits of colour, and does not round.
    assert np.abs(pixels_HWC - decoded(str(tmp_path / name))).max() <= (1 if name.startswith("deep") else 0)


BAD = bad_files()
# Damage that it does not see, and shapes that training refuses.
READ_ALL_THE_SAME = ["flipped.jpg", "flipped progressive.jpg", "dot.png", "line.png", "strip.png", "fax.tif"]


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_an_os_error(tmp_path, name):
    (tmp_path / name).write_bytes(BAD[name][0])
    with nullcontext() if name in READ_ALL_THE_SAME else pytest.raises(OSError, match="."):
        preprocess.read(tmp_path / name, {"size": 16, "crop_pct": 1.0, "quality": "normal", **LEVELS})


def test_it_needs_pillow_and_numpy_alone():
    tree = ast.parse(Path(preprocess.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"__future__", "os", "collections.abc", "typing", "numpy", "PIL"}
