"""Files that go bad after the scan: each is named, the others are read as planned, and no step is lost."""

import dataclasses
import os

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.cache import Cache
from pipelines.errors import UserError
from pipelines.geometry import Augment
from pipelines.loader import Loader
from pipelines.scanning import scan
from tests.conftest import make_folder

COMMON = {"size": 40, "global_batch": 8, "seed": 5}


@pytest.fixture
def manifest(tmp_path):
    return scan(make_folder(tmp_path / "data", train=53, valid=23))


def file(samples, position):
    return samples.root / samples.paths[position]


def damage(path, pixels_only=True):
    """Break the stream but keep the file's size and time: only decoding can tell."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    if pixels_only:
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    else:
        data[:8] = b"nothing!"
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def spoil(samples):
    """Make six files bad, each in its own way, and touch one that stays good; positions -> part of the reason."""
    file(samples, 3).unlink()
    file(samples, 4).write_bytes(file(samples, 4).read_bytes()[:700])
    file(samples, 17).write_bytes(b"")
    Image.new("RGB", (31, 47)).save(file(samples, 18))
    damage(file(samples, 30))
    damage(file(samples, 52), pixels_only=False)
    os.utime(file(samples, 9))
    return {3: "cannot be read", 4: "", 17: "empty", 18: "now 31 x 47 pixels", 30: "", 52: "not an image"}


def rule(labels_N, bad, position):
    """The documented one, the slow way."""
    n = len(labels_N)
    while position in bad:
        label = labels_N[position]
        position = next(
            p % n for p in range(position + 1, position + n) if labels_N[p % n] == label and p % n not in bad
        )
    return position


@pytest.mark.parametrize("world", [1, 2])
def test_training_goes_on_with_stand_ins(manifest, world):
    samples = manifest.train
    whole = list(Loader(samples, augment=Augment(), **COMMON).epoch(1))
    bad = spoil(samples)
    loaders = [Loader(samples, augment=Augment(), rank=rank, world_size=world, **COMMON) for rank in range(world)]
    parts = [list(loader.epoch(1)) for loader in loaders]
    for step, before in enumerate(whole):
        images_NCHW = torch.cat([part[step].images_NCHW for part in parts])
        ids_N = torch.cat([part[step].ids_N for part in parts])
        planned_N = loaders[0].plan.batch(1, step)
        assert ids_N.tolist() == samples.ids_N[[rule(samples.labels_N, bad, p) for p in planned_N]].tolist()
        assert torch.equal(torch.cat([part[step].labels_N for part in parts]), before.labels_N)
        good = torch.tensor([p not in bad for p in planned_N.tolist()])
        assert torch.equal(images_NCHW[good], before.images_NCHW[good])
    assert all([batch.step for batch in part] == list(range(53 // 8)) for part in parts)
    came_up = set(np.concatenate([loaders[0].plan.batch(1, step) for step in range(53 // 8)]).tolist())
    found = {spoiled.path: spoiled.reason for loader in loaders for spoiled in loader.spoiled}
    assert {samples.paths[p] for p in bad if p in came_up} <= set(found) <= {samples.paths[p] for p in bad}
    for position, part in bad.items():
        assert part in found.get(samples.paths[position], part)


def test_a_stand_in_is_read_with_the_draw_of_the_sample_it_replaces(manifest):
    samples = manifest.train
    loader = Loader(samples, augment=Augment(), **COMMON)
    gone = int(loader.plan.batch(1, 2)[5])
    file(samples, gone).unlink()
    batch = next(loader.epoch(1, 2))
    other = rule(samples.labels_N, {gone}, gone)
    assert batch.ids_N[5] == samples.ids_N[other]
    # The same file under the id of the one that is gone draws that one's numbers.
    disguised = dataclasses.replace(samples.subset([other]), ids_N=samples.ids_N[[gone]])
    alone = Loader(disguised, size=40, global_batch=1, seed=5, augment=Augment())
    assert torch.equal(batch.images_NCHW[5], next(alone.epoch(1)).images_NCHW[0])


def test_validation_leaves_them_out(manifest):
    samples = manifest.valid
    file(samples, 0).unlink()
    damage(file(samples, 7))
    seen = []
    loaders = [Loader(samples, rank=rank, world_size=2, size=40, global_batch=5) for rank in range(2)]
    for loader in loaders:
        seen += [i for batch in loader.epoch(0) for i in batch.ids_N.tolist()]
    assert sorted(seen) == np.delete(samples.ids_N, [0, 7]).tolist()
    assert sorted(s.id for loader in loaders for s in loader.spoiled) == samples.ids_N[[0, 7]].tolist()


def test_a_class_without_any_image_left_is_stood_in_for_by_another(manifest):
    samples = manifest.train
    for position in np.flatnonzero(samples.labels_N == 1):
        file(samples, position).unlink()
    batches = list(Loader(samples, augment=Augment(), **COMMON).epoch(0))
    assert len(batches) == 53 // 8
    assert set(torch.cat([batch.labels_N for batch in batches]).tolist()) == {0, 2}


def test_when_all_are_gone_it_says_so(manifest):
    for path in manifest.paths:
        (manifest.root / path).unlink()
    with pytest.raises(UserError, match="None of the 53 images under .* can be read any more.*Put the images back"):
        next(Loader(manifest.train, augment=Augment(), **COMMON).epoch(0))


def test_a_file_that_changes_twice_is_looked_at_twice(manifest):
    samples = manifest.train
    loader = Loader(samples, augment=Augment(), **COMMON)
    batch = next(loader.epoch(0))
    position = int(loader.plan.batch(0, 0)[0])
    os.utime(file(samples, position))
    assert torch.equal(next(loader.epoch(0)).images_NCHW, batch.images_NCHW)
    assert loader.spoiled == ()
    Image.new("RGB", (300, 8)).save(file(samples, position))
    next(loader.epoch(0))
    assert [spoiled.id for spoiled in loader.spoiled] == [samples.ids_N[position]]


def test_with_a_cache_they_are_stood_in_for_as_well(manifest, tmp_path):
    bad = spoil(manifest.train)
    plain = list(Loader(manifest.train, augment=Augment(), **COMMON).epoch(1))
    with Cache.open(manifest, parent=tmp_path / "cache") as cache:
        for _ in range(2):
            cached = list(Loader(manifest.train, augment=Augment(), cache=cache, **COMMON).epoch(1))
            for a, b in zip(plain, cached, strict=True):
                assert torch.equal(a.images_NCHW, b.images_NCHW)
        assert not any(cache.get(int(manifest.train.ids_N[position])) is not None for position in bad)


@pytest.mark.parametrize("world", [1, 3])
def test_read_once_an_augmented_sample_has_its_own_draw_and_no_stand_in(manifest, world):
    samples = manifest.train
    whole = Loader(samples, augment=Augment(), **COMMON)
    trained = {}  # where each is drawn by its id, wherever it comes up
    for batch in whole.epoch(6):
        trained |= dict(zip(batch.ids_N.tolist(), batch.images_NCHW, strict=True))
    assert len(trained) == 48
    bad = spoil(samples)
    seen: list[int] = []
    for rank in range(world):
        loader = Loader(samples, augment=Augment(), each_once=True, rank=rank, world_size=world, **COMMON)
        assert loader.steps == 7
        for batch in loader.epoch(6):
            seen += batch.ids_N.tolist()
            for id, image_CHW in zip(batch.ids_N.tolist(), batch.images_NCHW, strict=True):
                assert id not in trained or torch.equal(image_CHW, trained[id])
        if world == 1:
            assert seen == sorted(seen)
            assert {one.id for one in loader.spoiled} == set(samples.ids_N[list(bad)].tolist())
    assert sorted(seen) == [id for i, id in enumerate(samples.ids_N.tolist()) if i not in bad]


def test_read_once_there_may_be_fewer_samples_than_ranks_or_than_a_batch(manifest):
    two = manifest.valid.subset([4, 9])
    common = {**COMMON, "augment": Augment(), "each_once": True, "world_size": 3}
    loaders = [Loader(two, rank=rank, **common) for rank in range(3)]
    seen = [batch.ids_N.tolist() for loader in loaders for batch in loader.epoch(0)]
    assert seen == [[two.ids_N[0]], [two.ids_N[1]]]
