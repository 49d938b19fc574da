"""An epoch is the same to the bit from files, from stores and from a cache, on any number of ranks, from any step."""

import hashlib
import itertools
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines import Augment, Cache, Centre, Loader, balanced, pack, scan
from tests.conftest import make_folder
from tests.hostile import make_hostile_folder

BATCH = 12  # divides into 1, 2, 3 and 4 ranks, and unequally into 5
OPTIONS = {
    "plain": {},
    "balanced": {"weights": True},
    "repeated": {"repeats": 3},
    "high": {"quality": "high"},
    "resized, black outside": {"augment": Augment(crop="resized", min_scale=0.1, max_rotate=60, padding="zeros")},
}


@pytest.fixture(scope="module")
def manifest(small_set):
    return scan(small_set)


def loaders(manifest, world, options):
    options = {"augment": Augment(), **options}
    if options.pop("weights", False):
        options["weights_N"] = balanced(manifest.train.labels_N)
    common = {"size": 40, "global_batch": BATCH, "seed": 3, "world_size": world, **options}
    return [Loader(manifest.train, rank=rank, **common) for rank in range(world)]


def digest(manifest, world=1, *, start=0, stop=None, **options):
    """Of the ids, labels and pixels of the global batches of epoch 2, as `world` ranks read them together."""
    ranks = loaders(manifest, world, options)
    parts = [list(loader.epoch(2, start)) for loader in ranks]
    whole = hashlib.sha256()
    for step, slices in enumerate(zip(*parts, strict=True), start):
        if stop is not None and step >= stop:
            break
        assert {batch.step for batch in slices} == {step}
        for name in ("ids_N", "labels_N", "images_NCHW"):
            whole.update(torch.cat([getattr(batch, name) for batch in slices]).contiguous().numpy().tobytes())
    return whole.hexdigest()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_to_five_ranks_read_one_sequence(manifest, options):
    alone = digest(manifest, **options)
    assert [digest(manifest, world, **options) for world in (2, 3, 4, 5)] == [alone] * 4


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_from_any_step_the_rest_is_the_same(manifest, options):
    steps = 53 // BATCH
    for start in range(steps):
        whole = list(loaders(manifest, 1, options)[0].epoch(2))[start:]
        rest = list(loaders(manifest, 1, options)[0].epoch(2, start))
        assert all(torch.equal(a.images_NCHW, b.images_NCHW) for a, b in zip(whole, rest, strict=True))
    assert digest(manifest, 2, start=2, **options) == digest(manifest, 4, start=2, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["decoded", "encoded"])
def test_a_store_gives_the_pixels_of_the_files(manifest, kind, options, tmp_path):
    store = pack(manifest, tmp_path / "store", kind=kind)
    assert digest(store.manifest, **options) == digest(manifest, **options)
    assert digest(scan(tmp_path / "store"), 3, **options) == digest(manifest, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_cache_gives_the_pixels_of_the_files_while_it_fills_and_after(manifest, options, tmp_path):
    plain = digest(manifest, **options)
    with Cache.open(manifest, parent=tmp_path) as cache:
        assert digest(manifest, 2, cache=cache, **options) == plain
        assert 0 < len(cache) <= 53
        found = len(cache)
        assert digest(manifest, cache=cache, **options) == plain
        assert len(cache) == found
    limit = 5 * int(3 * 100 * 130 * 1.2)
    with Cache.open(manifest, parent=tmp_path, limit=limit) as cache:
        for _ in range(2):
            assert digest(manifest, cache=cache, **options) == plain
        assert 0 < len(cache) < found


def test_training_from_a_cache_does_not_open_the_files(tmp_path):
    manifest = scan(make_folder(tmp_path / "images", train=24, valid=8))
    plain = digest(manifest)
    with Cache.open(manifest, parent=tmp_path / "cache") as cache:
        loader = Loader(manifest.train, size=40, global_batch=BATCH, augment=Augment(), cache=cache)
        for epoch in range(2):
            list(loader.epoch(epoch))
        assert len(cache) == 24
        for path in manifest.train.paths:  # as long and as old as before, and no image any more
            file = manifest.root / path
            status = file.stat()
            file.write_bytes(bytes(status.st_size))
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert digest(manifest, cache=cache) == plain


def test_balanced_epochs_see_classes_equally_often_and_new_draws_each_time(tmp_path):
    root = make_folder(tmp_path / "images", train=60, valid=9)
    for i in range(3, 60):  # leaves one image of class 0, twenty of the others
        if i % 3 == 0:
            (root / "train" / "class0" / f"{i:03d}.jpg").unlink()
    train = scan(root).train
    assert np.bincount(train.labels_N).tolist() == [1, 20, 20]
    loader = Loader(train, size=40, global_batch=41, augment=Augment(), weights_N=balanced(train.labels_N))
    (batch,) = loader.epoch(0)
    counts = np.bincount(batch.labels_N)
    assert counts.sum() == 41 and counts.max() - counts.min() <= 2
    lone = batch.images_NCHW[batch.labels_N == 0]
    assert len(lone) > 10
    for i in range(len(lone)):
        assert not any(torch.equal(lone[i], lone[j]) for j in range(i))


def test_repeats_stand_in_one_batch_with_other_draws(manifest):
    loader = Loader(manifest.train, size=40, global_batch=12, augment=Augment(), repeats=4)
    for batch in loader.epoch(1):
        ids_34 = batch.ids_N.view(3, 4)
        assert (ids_34 == ids_34[:, :1]).all()
        assert len(set(ids_34[:, 0].tolist())) == 3
        for four in batch.images_NCHW.unflatten(0, (3, 4)):
            assert len({image.numpy().tobytes() for image in four}) == 4


def test_without_drop_last_the_rest_comes_too(manifest):
    loader = Loader(manifest.train, size=32, global_batch=BATCH, augment=Augment(), drop_last=False)
    batches = list(loader.epoch(0))
    assert [len(batch.ids_N) for batch in batches] == [12, 12, 12, 12, 5]
    assert sorted(torch.cat([batch.ids_N for batch in batches]).tolist()) == manifest.train.ids_N.tolist()


def test_validation_with_a_margin_is_the_middle_of_the_square(manifest):
    """The share 0.5 of the side at 32 px shows the pixels that the middle of 64 px shows."""
    whole, middle = (
        next(Loader(manifest.valid, size=size, global_batch=23, augment=Centre(crop_pct=share)).epoch(0)).images_NCHW
        for size, share in ((64, 1.0), (32, 0.5))
    )
    assert torch.equal(middle, whole[:, :, 16:48, 16:48])


def test_a_subset_keeps_each_class_and_belongs_to_its_seed(manifest):
    few = manifest.train.share(0.2, seed=1)
    assert np.bincount(few.labels_N).tolist() == np.rint(0.2 * np.bincount(manifest.train.labels_N)).tolist()
    assert few.ids_N.tolist() == manifest.train.share(0.2, seed=1).ids_N.tolist()
    assert few.ids_N.tolist() != manifest.train.share(0.2, seed=2).ids_N.tolist()
    assert set(few.ids_N) <= set(manifest.train.share(0.5, seed=1).ids_N)


def test_among_hostile_files_every_good_one_is_read_once_an_epoch_and_every_bad_one_named(tmp_path):
    hostile = make_hostile_folder(tmp_path / "images", plain=200, each=3)
    manifest = scan(hostile.root)
    reasons = {bad.path: bad.reason for bad in manifest.quarantine}
    assert set(reasons) == set(hostile.bad)
    assert all(words in reasons[path] for path, words in hostile.bad.items())
    assert manifest.paths == hostile.good
    for epoch in range(2):
        seen = []
        for rank in range(2):
            common = {"size": 32, "global_batch": 16, "rank": rank, "world_size": 2, "drop_last": False}
            loader = Loader(manifest.train, augment=Augment(), **common)
            seen += [i for batch in loader.epoch(epoch) for i in batch.ids_N.tolist()]
            assert not loader.spoiled
        assert sorted(seen) == manifest.train.ids_N.tolist()


def test_photographs_are_one_sequence_on_any_number_of_ranks_and_from_any_step(photos):
    manifest = scan(photos)
    few = replace(manifest, valid_N=~np.isin(np.arange(len(manifest.paths)), manifest.train.share(0.25).ids_N))
    alone = digest(few)
    assert [digest(few, world) for world in (2, 3, 4)] == [alone] * 3
    steps = len(few.train) // BATCH
    for start in np.random.default_rng(0).integers(1, steps, 5).tolist():
        assert digest(few, 2, start=start) == digest(few, 3, start=start)
    whole = hashlib.sha256()
    for start in range(0, steps, 16):  # an epoch that is stopped every 16 steps and goes on
        for batch in itertools.islice(loaders(few, 1, {})[0].epoch(2, start), 16):
            for name in ("ids_N", "labels_N", "images_NCHW"):
                whole.update(getattr(batch, name).contiguous().numpy().tobytes())
    assert whole.hexdigest() == alone
