"""The threads of a CPU against DALI's graph of the same, and against themselves."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import graph
from pipelines.decode import decoded
from pipelines.geometry import Augment, compose, draw, prefilter
from pipelines.graph import NOT_STORED, GraphInput
from pipelines.reader import Hands, Reader
from pipelines.window import below, rows
from tests.conftest import picture

SIZE = 40
SHAPES = [(131, 97), (60, 90), (41, 44), (300, 400), (120, 120)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """21 pictures, of which every fifth is so large that it is shrunk first."""
    root = tmp_path_factory.mktemp("reader")
    rng = np.random.default_rng(3)
    for i in range(21):
        exif = Image.Exif()
        exif[0x0112] = 1 + i % 8
        picture(rng, *SHAPES[i % len(SHAPES)]).save(root / f"{i:02d}.jpg", exif=exif)
    return sorted(map(str, root.iterdir()))


def given(paths, points=SIZE, seed=0, augment=None):
    """A batch of random views as the loader makes them, and the whole images."""
    whole = [decoded(path) for path in paths]
    heights_N, widths_N = (np.array([pixels.shape[axis] for pixels in whole]) for axis in (0, 1))
    rng = np.random.default_rng(seed)
    matrix_N33 = compose(draw(augment or Augment(), rng.random((len(paths), 20))), heights_N, widths_N, points)
    shrunk_N2, matrix_N33 = prefilter(matrix_N33, heights_N, widths_N, points)
    all_N2 = np.stack([np.zeros_like(heights_N), heights_N], axis=1)
    rows_N2 = np.where(shrunk_N2[:, :1] > 0, all_N2, rows(matrix_N33, heights_N, points))
    batch = GraphInput(
        images=[np.frombuffer(os.fsencode(path), np.uint8) for path in paths],
        shrunk_N2=shrunk_N2.astype(np.float32),
        matrix_N33=below(matrix_N33, rows_N2[:, 0]).astype(np.float32),
        shift_N3=rng.uniform(50, 200, (len(paths), 3)).astype(np.float32),
        scale_N3=rng.uniform(50, 90, (len(paths), 3)).astype(np.float32),
        rows_N2=rows_N2.astype(np.int32),
    )
    return whole, batch


def read(*batches, threads=2, half=False, kind="files", **options):
    hands = Hands(threads, kind=kind, **options)
    reader = Reader(iter(batches), hands, size=SIZE, batch=max(len(batch.images) for batch in batches), half=half)
    return [reader.run() for _ in batches]


@pytest.mark.parametrize("quality", ["normal", "high"])
@pytest.mark.parametrize("padding", ["reflect", "zeros", "border"])
def test_it_gives_what_the_graph_gives_up_to_rounding(paths, padding, quality):
    augment = Augment(max_rotate=90, min_zoom=0.6, p_affine=1)
    _, batch = given(paths, SIZE if quality == "normal" else 2 * SIZE, augment=augment)
    assert (batch.shrunk_N2[:, 0] > 0).any() and (batch.shrunk_N2[:, 0] == 0).any()
    ((images, _),) = read(batch, padding=padding, quality=quality)
    options = {"size": SIZE, "batch": len(paths), "padding": padding, "quality": quality}
    (expected,) = graph.build(iter([batch]), device="cpu", device_id=None, threads=2, **options).run()
    levels = np.abs(images.numpy() - np.array(expected.as_tensor())) * batch.scale_N3[:, None, None]
    assert levels.mean() < 0.3
    assert np.quantile(levels, 0.99) < 1.1


def test_wherever_the_images_are_and_whoever_reads_them_the_bits_are_the_same(paths):
    whole, batch = given(paths)
    ((from_files, nothing),) = read(batch)
    assert nothing == [None] * len(paths)
    for threads in (1, 3):
        assert np.array_equal(read(batch, threads=threads)[0][0], from_files)
    encoded = [np.fromfile(path, np.uint8) for path in paths]
    assert np.array_equal(read(batch._replace(images=encoded), kind="encoded")[0][0], from_files)
    views = [pixels[first:stop] for pixels, (first, stop) in zip(whole, batch.rows_N2, strict=True)]
    assert np.array_equal(read(batch._replace(images=views), kind="decoded")[0][0], from_files)
    for stored in (lambda i: i % 3 == 0, lambda i: True, lambda i: False):
        some = [view if stored(i) else NOT_STORED for i, view in enumerate(views)]
        ((images, fresh),) = read(batch._replace(images=some, paths=batch.images), kind="mixed")
        assert np.array_equal(images, from_files)
        for i, pixels in enumerate(whole):
            assert fresh[i] is None if stored(i) else np.array_equal(fresh[i], pixels)


def test_half_is_the_same_rounded(paths):
    _, batch = given(paths)
    ((full, _),), ((half, _),) = read(batch), read(batch, half=True)
    assert np.array_equal(half, full.half())


def test_batches_that_somebody_holds_are_left_alone(paths):
    batches = [given(paths[: 5 + seed % 3], seed=seed)[1] for seed in range(12)]
    expected = [read(batch)[0][0].clone() for batch in batches]
    reader = Reader(iter(batches), Hands(2, kind="files"), size=SIZE, batch=7)
    held, places = {}, set()
    for i in range(len(batches)):
        images, _ = reader.run()
        assert np.array_equal(images, expected[i])
        places.add(images.data_ptr())
        if i % 3 == 0:
            held[i] = images[1:].permute(0, 3, 1, 2)  # part of it, seen in another way
        del images
    for i, part in held.items():
        assert np.array_equal(part.permute(0, 2, 3, 1), expected[i][1:])
    assert len(places) < len(batches)  # and the others' memory is used again
    with pytest.raises(StopIteration):
        reader.run()


def test_a_reader_that_is_dropped_stops_its_threads(paths):
    def threads():
        return {thread for thread in threading.enumerate() if thread.name.startswith("read")}

    earlier = threads()  # of other tests: they may end at any time
    _, batch = given(paths)
    reader = Reader(iter([batch] * 50), Hands(2, kind="files"), size=SIZE, batch=len(paths))
    reader.run()
    assert len(threads() - earlier) == 2
    del reader
    deadline = time.monotonic() + 20
    while threads() - earlier and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads() - earlier


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "gone"])
def test_a_file_that_went_bad_is_an_error_of_its_batch(paths, tmp_path, damage):
    bad = tmp_path / "bad.jpg"
    contents = {"empty": b"", "text": b"<html>" * 99, "cut": Path(paths[0]).read_bytes()[:150]}
    if damage in contents:
        bad.write_bytes(contents[damage])
    _, good = given(paths)
    images = [*good.images[:-1], np.frombuffer(os.fsencode(bad), np.uint8)]
    reader = Reader(iter([good, good._replace(images=images)]), Hands(2, kind="files"), size=SIZE, batch=len(paths))
    reader.run()
    with pytest.raises(RuntimeError):
        reader.run()


def test_an_image_that_became_smaller_is_read_within_its_bounds(paths, tmp_path):
    Image.new("RGB", (20, 9), (10, 20, 30)).save(tmp_path / "small.png")
    _, batch = given(paths[:1])
    for first, stop in ((3, 90), (40, 90)):
        smaller = batch._replace(
            images=[np.frombuffer(os.fsencode(tmp_path / "small.png"), np.uint8)],
            rows_N2=np.array([[first, stop]], np.int32),
            shift_N3=np.zeros((1, 3), np.float32),
            scale_N3=np.ones((1, 3), np.float32),
        )
        ((images, _),) = read(smaller)
        assert np.abs(images.numpy() - [10, 20, 30]).max() < 1e-4
