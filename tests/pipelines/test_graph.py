"""The CPU graph against NumPy, OpenCV and itself; the GPU graph against DALI's schemas, which need no GPU."""

import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from pipelines.decode import decoded
from pipelines.geometry import Augment, compose, draw
from pipelines.graph import NOT_STORED, GraphInput, build, define, reads_rows
from pipelines.window import below, rows
from tests.conftest import picture

SIZE = 40
PLAIN = {
    "kind": "files",
    "size": 64,
    "device": "cpu",
    "half": False,
    "padding": "reflect",
    "quality": "normal",
    "largest": (0, 0),
    "hardware_share": 0.65,
}


def operators(**options):
    """(operator, device of each input, device of each output, arguments), in order, of the defined graph."""
    pipeline = define(iter([]), **PLAIN | options, batch_size=4, num_threads=1, device_id=None)
    found = []
    pipeline._build_graph()
    for operator in pipeline._ops:
        text = str(operator.spec)
        name = re.search(r"OpSpec for (\S+):", text)[1]
        inputs, outputs = re.search(r"Inputs:(.*?)Outputs:(.*?)Arguments:", text, re.DOTALL).groups()
        arguments = dict(re.findall(r"^ +(\w+): (.+)$", text.split("Arguments:")[1], re.MULTILINE))
        devices = [re.findall(r"_(cpu|gpu)\s", part) for part in (inputs, outputs)]
        found.append((name, *devices, arguments))
    return found


def one(found, fragment):
    (match,) = [operator for operator in found if fragment.lower() in operator[0].lower()]
    return match


@pytest.mark.parametrize("kind", ["files", "encoded"])
@pytest.mark.parametrize("half", [False, True])
def test_everything_after_the_gpu_decoder_stays_on_the_gpu(kind, half):
    found = operators(device="gpu", kind=kind, half=half, largest=(3000, 4000), hardware_share=0.75)
    _, inputs, outputs, arguments = one(found, "decoders__Image")
    assert (inputs, outputs, arguments["device"]) == (["cpu"], ["gpu"], "mixed")
    assert arguments["jpeg_fancy_upsampling"] in ("True", "true", "1")
    assert (arguments["preallocate_height_hint"], arguments["preallocate_width_hint"]) == ("3000", "4000")
    assert float(arguments["hw_decoder_load"]) == 0.75
    assert not reads_rows(kind, "gpu")  # it decodes whole images: the matrices must be those of whole images
    assert not [name for name, *_ in found if "Slice" in name]
    _, _, outputs, arguments = one(found, "PeekImageShape")
    assert outputs == ["cpu"]
    assert arguments["preserve"] in ("True", "true", "1")  # nothing reads it, and it must run all the same
    _, inputs, outputs, _ = one(found, "WarpPerspective")
    assert (inputs, outputs) == (["gpu", "gpu"], ["gpu"])
    _, inputs, outputs, arguments = one(found, "Resize")
    assert inputs[0] == "gpu"
    assert outputs == ["gpu"]
    _, inputs, outputs, arguments = one(found, "CropMirrorNormalize")
    assert inputs == ["gpu", "cpu", "cpu"]  # images; shift and scale are arguments
    assert outputs == ["gpu"]
    assert arguments["output_layout"] == "HWC"
    float16, float32 = "8", "9"
    assert arguments["dtype"] == (float16 if half else float32)


@pytest.mark.parametrize("kind", ["decoded", "mixed"])
def test_stored_pixels_go_to_the_gpu_before_the_warp(kind):
    found = operators(device="gpu", kind=kind)
    assert not [name for name, *_, arguments in found if arguments.get("device") == "mixed"]
    assert reads_rows(kind, "gpu")
    _, inputs, outputs, _ = one(found, "WarpPerspective")
    assert (inputs, outputs) == (["gpu", "gpu"], ["gpu"])
    assert one(found, "CropMirrorNormalize")[2] == ["gpu"]


def test_the_mean_of_high_quality_is_taken_on_the_gpu():
    found = operators(device="gpu", quality="high")
    assert one(found, "Mean")[1:3] == (["gpu"], ["gpu"])
    assert one(found, "CropMirrorNormalize")[2] == ["gpu"]


@pytest.mark.parametrize("kind", ["files", "encoded", "decoded", "mixed"])
@pytest.mark.parametrize("quality", ["normal", "high"])
def test_nothing_of_the_cpu_graph_needs_a_gpu(kind, quality):
    for name, inputs, outputs, arguments in operators(kind=kind, quality=quality):
        assert "gpu" not in (*inputs, *outputs, arguments.get("device")), name


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("kind", ["files", "encoded", "decoded", "mixed"])
def test_each_image_is_warped_once(kind, device):
    names = [name for name, *_ in operators(kind=kind, device=device)]
    assert sum("warp" in name.lower() for name in names) == 1


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """One picture in every format and orientation; names by what they are."""
    root = tmp_path_factory.mktemp("graph")
    rng = np.random.default_rng(11)
    original = picture(rng, 131, 97)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        original.save(root / f"turned{turn}.jpg", exif=exif, subsampling=2)
    original.save(root / "progressive.jpg", progressive=True, subsampling=2)
    original.save(root / "full_chroma.jpg", subsampling=0)
    original.convert("L").save(root / "grey.jpg")
    original.convert("CMYK").save(root / "cmyk.jpg")
    for suffix in ("png", "webp", "bmp", "tiff"):
        original.save(root / f"original.{suffix}")
    original.quantize(32).save(root / "palette.png")
    return sorted(map(str, root.iterdir()))


def given(paths, matrix_N33, rows_N2, scale=1.0, **options):
    n = len(paths)
    return GraphInput(
        images=[as_path(path) for path in paths],
        shrunk_N2=np.zeros((n, 2), np.float32),
        matrix_N33=below(matrix_N33, rows_N2[:, 0]).astype(np.float32),
        shift_N3=np.zeros((n, 3), np.float32),
        scale_N3=np.full((n, 3), scale, np.float32),
        rows_N2=rows_N2.astype(np.int32),
    )._replace(**options)


def as_path(path):
    return np.frombuffer(os.fsencode(path), np.uint8)


def run(batch, size=SIZE, **options):
    pipeline = build(
        iter([batch]), size=size, batch=len(batch.images), device="cpu", device_id=None, threads=2, **options
    )
    return [np.array(output.as_tensor()) if i == 0 else output for i, output in enumerate(pipeline.run())]


def test_rows_are_the_same_whether_decoded_alone_or_in_the_whole_image(photographs):
    """At whole steps the warp copies pixels, so that the decoder's own can be compared, to the bit."""
    n = len(photographs)
    whole = [decoded(path) for path in photographs]
    for first in (0, 1, 7, 16, 33, 50):
        rows_N2 = np.tile([first, first + SIZE], (n, 1))
        matrix_33 = np.array([[1, 0, 5], [0, 1, first], [0, 0, 1.0]])
        (images,) = run(given(photographs, np.tile(matrix_33, (n, 1, 1)), rows_N2))
        for path, image, pixels in zip(photographs, images, whole, strict=True):
            assert np.array_equal(image, pixels[first : first + SIZE, 5 : 5 + SIZE]), path


def drawn(paths, augment, size=SIZE):
    """A batch of random views, and whole images."""
    whole = [decoded(path) for path in paths]
    heights_N, widths_N = (np.array([pixels.shape[axis] for pixels in whole]) for axis in (0, 1))
    draws = draw(augment, np.random.default_rng(5).random((len(paths), 20)))
    matrix_N33 = compose(draws, heights_N, widths_N, size)
    return whole, matrix_N33, rows(matrix_N33, heights_N, size), heights_N


@pytest.mark.parametrize("padding", ["reflect", "zeros", "border"])
def test_rows_alone_give_the_picture_of_the_whole_image(photographs, padding):
    """Coordinates are rounded in float32 elsewhere, so that here and there a value may turn out one level apart."""
    augment = Augment(max_rotate=180, max_warp=0.3, min_scale=0.3)
    _, matrix_N33, rows_N2, heights_N = drawn(photographs, augment)
    all_N2 = np.stack([np.zeros_like(heights_N), heights_N], axis=1)
    assert (rows_N2 != all_N2).any(axis=1).sum() > 5
    (some,) = run(given(photographs, matrix_N33, rows_N2), padding=padding)
    (everything,) = run(given(photographs, matrix_N33, all_N2), padding=padding)
    assert np.abs(some - everything).max() <= 1
    assert (some != everything).mean() < 1e-3


@pytest.mark.parametrize(
    ("padding", "border"),
    [("reflect", cv2.BORDER_REFLECT_101), ("zeros", cv2.BORDER_CONSTANT), ("border", cv2.BORDER_REPLICATE)],
)
def test_padding_is_what_opencv_calls_it(photographs, padding, border):
    paths = [path for path in photographs if path.endswith("png")]
    whole, matrix_N33, rows_N2, _ = drawn(paths, Augment(max_rotate=180, p_affine=1, min_scale=1))
    (images,) = run(given(paths, matrix_N33, rows_N2), padding=padding)
    centres = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    for image, pixels, matrix_33 in zip(images, whole, matrix_N33, strict=True):
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        matrix_33 = np.linalg.inv(centres) @ matrix_33 @ centres
        expected = cv2.warpPerspective(pixels, matrix_33, (SIZE, SIZE), flags=flags, borderMode=border)
        assert np.abs(image - expected).mean() < 0.6
        assert np.quantile(np.abs(image - expected), 0.99) < 3


def test_high_quality_is_the_mean_of_two_by_two(photographs):
    _, matrix_N33, rows_N2, _ = drawn(photographs, Augment(), size=2 * SIZE)
    batch = given(photographs, matrix_N33, rows_N2, scale=3.0)
    (fine,) = run(batch, size=2 * SIZE)
    (high,) = run(batch, quality="high")
    assert np.abs(high - fine.reshape(-1, SIZE, 2, SIZE, 2, 3).mean(axis=(2, 4))).max() < 1e-4


def test_light_and_normalisation_are_one_multiply_add(photographs):
    _, matrix_N33, rows_N2, _ = drawn(photographs, Augment())
    rng = np.random.default_rng(0)
    shift_N3, scale_N3 = rng.uniform(50, 200, (2, len(photographs), 3))
    lit = {"shift_N3": shift_N3.astype(np.float32), "scale_N3": scale_N3.astype(np.float32)}
    (plain,) = run(given(photographs, matrix_N33, rows_N2))
    expected = (plain - shift_N3[:, None, None]) / scale_N3[:, None, None]
    (images,) = run(given(photographs, matrix_N33, rows_N2, **lit))
    assert np.abs(images - expected).max() < 1e-5


def test_wherever_the_images_are_the_bits_are_the_same(photographs):
    whole, matrix_N33, rows_N2, _ = drawn(photographs, Augment())
    batch = given(photographs, matrix_N33, rows_N2)
    (from_files,) = run(batch)
    encoded = [np.fromfile(path, np.uint8) for path in photographs]
    (from_bytes,) = run(batch._replace(images=encoded), kind="encoded")
    views = [pixels[first:stop] for pixels, (first, stop) in zip(whole, rows_N2, strict=True)]
    (from_pixels,) = run(batch._replace(images=views), kind="decoded")
    assert np.array_equal(from_files, from_bytes)
    assert np.array_equal(from_files, from_pixels)
    for stored in (lambda i: i % 3 == 0, lambda i: True, lambda i: False):
        some = [view if stored(i) else NOT_STORED for i, view in enumerate(views)]
        paths = [np.zeros(1, np.uint8) if stored(i) else as_path(path) for i, path in enumerate(photographs)]
        mixed, fresh = run(batch._replace(images=some, paths=paths), kind="mixed")
        assert np.array_equal(from_files, mixed)
        for i, pixels in enumerate(whole):
            assert stored(i) or np.array_equal(np.array(fresh.at(i)), pixels)


def test_dali_keeps_what_it_reads_in_place(photographs):
    """Views that nobody else holds, batch after batch, each of other contents."""
    whole, matrix_N33, _, heights_N = drawn(photographs, None)
    rows_N2 = np.stack([np.zeros_like(heights_N), heights_N], axis=1)
    batch = given(photographs, matrix_N33, rows_N2)

    def source():
        for level in range(12):
            yield batch._replace(images=[np.full_like(pixels, level) for pixels in whole])

    pipeline = build(source(), size=SIZE, batch=len(whole), device="cpu", device_id=None, threads=2, kind="decoded")
    for level in range(12):
        (images,) = pipeline.run()
        assert (np.array(images.as_tensor()) == level).all()
    with pytest.raises(StopIteration):
        pipeline.run()


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "gone"])
def test_a_file_that_went_bad_is_an_error_and_not_a_crash(photographs, tmp_path, damage):
    bad = tmp_path / "bad.jpg"
    contents = {"empty": b"", "text": b"<html>" * 99, "cut": Path(photographs[0]).read_bytes()[:150]}
    if damage in contents:
        bad.write_bytes(contents[damage])
    paths = [*photographs, str(bad), *photographs]
    n = len(paths)
    batch = given(paths, np.tile(np.eye(3), (n, 1, 1)), np.tile([0, 60], (n, 1)))
    for _ in range(3):
        with pytest.raises(RuntimeError):
            run(batch)


def test_an_image_that_became_smaller_is_read_within_its_bounds(photographs, tmp_path):
    Image.new("RGB", (20, 9), (10, 20, 30)).save(tmp_path / "small.png")
    rows_N2 = np.array([[3, 90], [40, 90]])
    (images,) = run(given([str(tmp_path / "small.png")] * 2, np.tile(np.eye(3), (2, 1, 1)), rows_N2))
    assert (images == [10, 20, 30]).all()
