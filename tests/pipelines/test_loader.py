"""What comes out of the loader, against oracles that share no code with it."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.errors import UserError
from pipelines.geometry import Augment, compose
from pipelines.loader import Loader
from pipelines.scanning import scan

UNLIT = Augment(max_lighting=0)


@pytest.fixture(scope="module")
def manifest(lossless_set):
    return scan(lossless_set)


def decoded(samples, row):
    return np.asarray(Image.open(samples.root / samples.paths[row]).convert("RGB"))


def warp_oracles(image_HWC, matrix_33, size):
    """The same read by OpenCV (integer pixel centres, hence the shifts) and by torch's grid_sample in float64."""
    centres = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    by_opencv = cv2.warpPerspective(
        image_HWC,
        np.linalg.inv(centres) @ matrix_33 @ centres,
        (size, size),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REFLECT_101,
    )
    margin = 60
    wide = cv2.copyMakeBorder(image_HWC, *[margin] * 4, cv2.BORDER_REFLECT_101)
    y, x = np.mgrid[:size, :size] + 0.5
    source = np.stack([x, y, np.ones_like(x)], axis=-1) @ matrix_33.T
    source = source[..., :2] / source[..., 2:] + margin
    grid = torch.from_numpy(source / [wide.shape[1], wide.shape[0]] * 2 - 1)[None]
    by_torch = torch.nn.functional.grid_sample(
        torch.from_numpy(wide).permute(2, 0, 1)[None].double(), grid, mode="bilinear", align_corners=False
    )
    return by_opencv.astype(float), by_torch[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", [64, 75])
def test_fifty_draws_agree_with_opencv_and_grid_sample(manifest, size):
    samples = manifest.train.subset(np.arange(50))
    loader = Loader(samples, size=size, global_batch=50, seed=size, augment=UNLIT)
    (batch,) = loader.epoch(4)
    for i, row in enumerate(loader.plan.batch(4, 0)):
        draws = loader.draws(4, np.array([row]))
        image_HWC = decoded(samples, row)
        matrix_33 = compose(draws, np.array([image_HWC.shape[0]]), np.array([image_HWC.shape[1]]), size)[0]
        ours = loader.pictures(batch)[i].astype(float)
        for oracle in warp_oracles(image_HWC, matrix_33, size):
            assert np.abs(ours - oracle).mean() < 0.6
            assert np.quantile(np.abs(ours - oracle), 0.99) < 3


@pytest.fixture(scope="module")
def large_set(tmp_path_factory):
    """Two large pictures: a slow gradient, and a chequerboard of single pixels."""
    root = tmp_path_factory.mktemp("large")
    y, x = np.mgrid[:611, :903]
    gradient = np.stack([x / 902 * 255, y / 610 * 255, (x + y) / 1512 * 255], axis=-1)
    for name, pixels in (("gradient", gradient), ("board", np.repeat(((x + y) % 2 * 255)[..., None], 3, axis=-1))):
        for split in ("train", "valid"):
            (root / split / name).mkdir(parents=True)
            Image.fromarray(pixels.round().astype(np.uint8)).save(root / split / name / "a.png")
    return root


@pytest.mark.parametrize("size", [64, 100, 224])
def test_large_images_are_shrunk_without_aliasing_and_without_a_shift(large_set, size):
    samples = scan(large_set).valid
    loader = Loader(samples, size=size, global_batch=2)
    (batch,) = loader.epoch(0)
    board, gradient = loader.pictures(batch).astype(float)
    expected = Image.open(samples.root / samples.paths[1]).crop((146, 0, 757, 611))
    expected = np.asarray(expected.resize((size, size), Image.Resampling.BOX), float)
    inside = slice(2, -2)  # where the antialiasing filter does not meet the border
    assert np.abs(gradient - expected)[inside, inside].max() < 1.5
    assert np.abs(board - 127.5)[inside, inside].max() < 26  # read unfiltered it would be black and white


def test_a_square_of_the_same_size_is_read_unchanged(manifest):
    row = next(i for i in range(len(manifest.train)) if manifest.train.heights_N[i] == manifest.train.widths_N[i])
    one = manifest.train.subset(np.array([row]))
    loader = Loader(one, size=int(one.widths_N[0]), global_batch=1)
    (batch,) = loader.epoch(0)
    assert np.array_equal(loader.pictures(batch)[0], decoded(one, 0))


def test_a_flip_of_a_flip_is_the_identity_to_the_pixel(manifest):
    flip = Augment(flip=1, max_rotate=0, max_zoom=1, max_warp=0, min_scale=1, max_lighting=0)
    rows = [i for i in range(53) if manifest.train.heights_N[i] == manifest.train.widths_N[i]]
    squares = manifest.train.subset(np.array(rows))
    loader = Loader(squares, size=120, global_batch=len(squares), augment=flip)
    (batch,) = loader.epoch(0)
    for flipped, row in zip(loader.pictures(batch), loader.plan.batch(0, 0), strict=True):
        assert np.array_equal(flipped[:, ::-1], decoded(squares, row))


def test_light_and_normalisation_follow_their_formula(manifest):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    common = {"size": 48, "global_batch": 53, "seed": 2}
    lit = Loader(manifest.train, augment=Augment(max_lighting=0.4), mean=mean, std=std, **common)
    plain = Loader(manifest.train, augment=UNLIT, mean=(0, 0, 0), std=(1, 1, 1), **common)
    (lit_batch,), (plain_batch,) = lit.epoch(0), plain.epoch(0)
    draws = lit.draws(0, lit.plan.batch(0, 0))
    contrast, brightness = (torch.from_numpy(a)[:, None, None, None] for a in (draws.contrast_N, draws.brightness_N))
    shifted = (plain_batch.images_NCHW - 0.5) * contrast + 0.5 + brightness
    expected = (shifted - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert (contrast != 1).sum() > 20
    assert (brightness != 0).sum() > 20
    assert (lit_batch.images_NCHW - expected).abs().max() < 1e-5


def test_batches_are_channels_last_tensors_with_labels_and_ids(manifest):
    batch = next(Loader(manifest.train, size=40, global_batch=8, augment=Augment()).epoch(0))
    assert batch.images_NCHW.shape == (8, 3, 40, 40)
    assert batch.images_NCHW.dtype == torch.float32
    assert batch.images_NCHW.is_contiguous(memory_format=torch.channels_last)
    row_of = {int(row): i for i, row in enumerate(manifest.train.ids_N)}
    assert [manifest.train.labels_N[row_of[i]] for i in batch.ids_N.tolist()] == batch.labels_N.tolist()


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_reads_the_same_global_batches(manifest, world):
    common = {"size": 40, "global_batch": 8, "seed": 5, "augment": Augment()}
    whole = list(Loader(manifest.train, **common).epoch(1))
    assert len(whole) == 53 // 8
    parts = [list(Loader(manifest.train, rank=rank, world_size=world, **common).epoch(1)) for rank in range(world)]
    for step, batch in enumerate(whole):
        slices = [part[step] for part in parts]
        assert [s.step for s in slices] == [step] * world
        assert torch.equal(torch.cat([s.ids_N for s in slices]), batch.ids_N)
        assert torch.equal(torch.cat([s.labels_N for s in slices]), batch.labels_N)
        assert torch.equal(torch.cat([s.images_NCHW for s in slices]), batch.images_NCHW)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_reads_each_image_once(manifest, world):
    seen = []
    for rank in range(world):
        loader = Loader(manifest.valid, size=32, global_batch=5, rank=rank, world_size=world)
        for batch in loader.epoch(0):
            seen += batch.ids_N.tolist()
    assert sorted(seen) == manifest.valid.ids_N.tolist()
    assert len(seen) == 23


def test_an_epoch_can_begin_at_any_step(manifest):
    loader = Loader(manifest.train, size=32, global_batch=8, augment=Augment())
    whole = list(loader.epoch(3))
    for start in (0, 4, 5, 6):
        rest = list(loader.epoch(3, start_step=start))
        assert [b.step for b in rest] == list(range(start, 6))
        assert all(torch.equal(a.images_NCHW, b.images_NCHW) for a, b in zip(rest, whole[start:], strict=True))


def test_epochs_differ_and_an_abandoned_one_leaves_no_trace(manifest):
    loader = Loader(manifest.train, size=32, global_batch=8, augment=Augment())
    first = next(loader.epoch(0))
    assert not torch.equal(first.ids_N, next(loader.epoch(1)).ids_N)
    assert torch.equal(first.images_NCHW, next(loader.epoch(0)).images_NCHW)


def test_a_batch_larger_than_the_data_is_refused(manifest):
    with pytest.raises(UserError, match="batch of 54 is larger than the 53 training images"):
        Loader(manifest.train, size=32, global_batch=54, augment=Augment())
