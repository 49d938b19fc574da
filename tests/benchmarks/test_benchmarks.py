"""Each benchmark runs to its end on a small set, and what it records hangs together; how fast, no test can say."""

import json
import multiprocessing
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import interpolation, loaders, megapixels, peers, steady
from pipelines import scan
from pipelines.decode import decoded
from pipelines.geometry import compose
from pipelines.loader import Loader


def rows(record, column):
    return {figure.row: figure for figure in record.figures if figure.column == column}


@pytest.fixture(scope="module", autouse=True)
def _threads_as_before():
    """A benchmark sets the threads of its process, which here is also that of other tests."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def loaders_record(small_set, tmp_path_factory):
    json_file = tmp_path_factory.mktemp("record") / "loaders.json"
    return loaders.main(loaders.LoaderOptions(data=str(small_set), quick=True, size=64, batch=8, json=json_file))


def test_loaders_measures_or_names_every_way_and_leaves_no_worker(loaders_record):
    speeds = rows(loaders_record, loaders.SPEED)
    assert set(speeds) | set(loaders_record.skipped) == {way.name for way in loaders.WAYS}
    assert not set(speeds) & set(loaders_record.skipped)
    assert all(name.startswith(("albumentations", "fastai", "SPDL")) for name in loaders_record.skipped)
    assert all(figure.samples[0] > 0 for figure in rows(loaders_record, loaders.MEMORY).values())
    assert set(rows(loaders_record, f"{loaders.COST} of 0.1 MP")) == set(loaders.LAW)
    assert not multiprocessing.active_children()


def test_loaders_takes_its_ratios_within_a_round(loaders_record):
    speeds, faster = rows(loaders_record, loaders.SPEED), rows(loaders_record, loaders.FASTER)
    costs, cheaper = rows(loaders_record, loaders.COST), rows(loaders_record, loaders.CHEAPER)
    assert set(faster) == set(cheaper) == set(speeds) - {loaders.OURS}
    for name in faster:
        for i in range(2):
            ours, this = speeds[loaders.OURS].samples[i], speeds[name].samples[i]
            assert faster[name].samples[i] == pytest.approx(ours / this)
            ours, this = costs[loaders.OURS].samples[i], costs[name].samples[i]
            assert 0 < cheaper[name].samples[i] == pytest.approx(this / ours)


def test_loaders_writes_what_it_measured(loaders_record):
    written = json.loads(loaders_record.options.json.read_text())
    assert [figure["row"] for figure in written["figures"]] == [figure.row for figure in loaders_record.figures]
    assert all(figure["n"] == len(figure["samples"]) for figure in written["figures"])
    assert all(figure["n"] == 2 for figure in written["figures"] if figure["column"] == loaders.SPEED)


def test_the_law_of_sizes_is_the_line_through_its_points(small_set, tmp_path):
    fixed, each = megapixels.slope([0.1, 1, 12], [2 + 3 * size for size in (0.1, 1, 12)])
    assert (fixed, each) == pytest.approx((2, 3))
    samples = megapixels.at(0.02, scan(small_set).train, 6, tmp_path)
    assert len(samples) == 6
    assert samples.heights_N * samples.widths_N == pytest.approx(20_000, rel=0.02)


def test_core_time_counts_workers(small_set):
    samples = scan(small_set).train
    before = loaders.core_seconds()
    batches = peers.torchvision_chain(samples, size=224, batch=16, threads=1)
    for _ in range(3):
        next(batches)
    main_process_alone = loaders.time.process_time()
    assert multiprocessing.active_children()
    assert loaders.core_seconds() - main_process_alone > 0.1  # 48 images by the repeated chain take far longer
    assert loaders.core_seconds() > before
    batches.close()


def test_decoding_alone_reads_each_file_once(small_set):
    paths = peers.files(scan(small_set).train)
    assert list(peers.dali_decode_only(paths, batch=20, threads=1)) == [20, 20, 13]


@pytest.fixture(scope="module")
def interpolation_record(small_set, tmp_path_factory):
    json_file = tmp_path_factory.mktemp("record") / "interpolation.json"
    options = {"data": str(small_set), "quick": True, "size": 64, "json": json_file}
    return interpolation.main(interpolation.InterpolationOptions(**options))


def test_interpolation_ranks_one_warp_over_repeated_interpolation(interpolation_record):
    psnr, ssim = rows(interpolation_record, "PSNR, dB"), rows(interpolation_record, "SSIM")
    assert all(len(figure.samples) == (2 if "in a row" in figure.row else 4) for figure in interpolation_record.figures)
    assert psnr[interpolation.OURS].value > 36  # of values from 0 to 255
    assert psnr[interpolation.OURS].value > psnr["repeated interpolation"].value + 3
    assert ssim[interpolation.OURS].value > ssim["repeated interpolation"].value
    assert all(value <= 1 for figure in ssim.values() for value in figure.samples)
    for ours, column in interpolation.DIFFERENCES.items():
        differences = rows(interpolation_record, column)["repeated interpolation"].samples
        expected = np.subtract(psnr[ours].samples, psnr["repeated interpolation"].samples)
        np.testing.assert_allclose(differences, expected)


def test_interpolation_adds_up_in_a_chain_and_not_in_one_warp(interpolation_record):
    once, chain, gap = (rows(interpolation_record, column) for column in interpolation.CHAIN)
    assert [row.split()[0] for row in once] == list("123456")
    for row, figure in gap.items():
        np.testing.assert_allclose(figure.samples, np.subtract(once[row].samples, chain[row].samples))
    values = [figure.value for figure in chain.values()]
    assert values[0] > values[2] > values[5]  # each transform costs something
    assert gap["6 transforms in a row"].value > gap["1 transform in a row"].value > 0


def test_interpolation_draws_what_it_measured(interpolation_record):
    with Image.open(interpolation_record.options.json.with_suffix(".png")) as picture:
        assert min(picture.size) > 500


def test_interpolation_enlarges_and_compares_with_antialiased_filters(small_set):
    record = interpolation.main(
        interpolation.InterpolationOptions(data=str(small_set), images=2, size=64, megapixels=0.4),
    )
    psnr = rows(record, "PSNR, dB")
    assert {f"Pillow's {name} filter, then one warp" for name in ("bilinear", "bicubic", "lanczos")} < set(psnr)
    assert all(figure.value > 20 for figure in psnr.values())  # wrong geometry would be far below


def test_pictures_of_one_colour_are_left_out(small_set, tmp_path):
    shutil.copytree(small_set, tmp_path / "set")
    for number, folder in enumerate(sorted((tmp_path / "set" / "train").iterdir())):
        Image.new("RGB", (200, 150), (90 * number, 0, 0)).save(folder / "plain.png")
    options = {"data": str(tmp_path / "set"), "images": 500, "size": 32, "json": tmp_path / "record.json"}
    record = interpolation.main(interpolation.InterpolationOptions(**options))
    (left_out,) = (name for name in record.skipped if "photographs" in name)
    assert left_out == "3 of the photographs"
    written = options["json"].read_text()
    assert not re.search(r"\b(NaN|Infinity)\b", written)


def test_an_enlarged_picture_has_the_size_asked_for_and_goes_away(small_set):
    with interpolation.enlarged(scan(small_set).train, 3, 0.3, seed=0) as samples:
        assert len(samples) == 3
        assert set(zip(samples.heights_N, samples.widths_N, strict=True)) == {(474, 632)}
        root = samples.root
    assert not root.exists()


def test_fastai_is_held_against_its_own_ideal(small_set):
    pytest.importorskip("fastai")
    samples = scan(small_set).train
    loader = Loader(samples, size=96, global_batch=1, augment=interpolation.UNLIT)
    for position in range(6):
        image_HWC = decoded(str(samples.root / samples.paths[position]))
        draws = loader.draws(0, np.array([position]))
        outcome = interpolation.fastai_presizing(image_HWC, draws, 96)
        ideal_HWC, _ = interpolation.oracle.ideal(image_HWC, outcome.ideal_from_output_33, 96)
        assert interpolation.oracle.psnr(outcome.picture_HWC, ideal_HWC) > 30
        # The whole pixels that it moved to are near those of the draw.
        height, width = image_HWC.shape[:2]
        drawn_33 = compose(draws, np.array([height]), np.array([width]), 96)[0]
        corners = np.array([0.0, 96.0])
        moved = np.subtract(
            interpolation.oracle.source_points(outcome.ideal_from_output_33, corners, corners),
            interpolation.oracle.source_points(drawn_33, corners, corners),
        )
        assert np.abs(moved).max() < 1.5


def test_steady_measures_all_that_should_not_grow(small_set, tmp_path, monkeypatch):
    monkeypatch.setattr(steady, "_LARGE", 200_000)  # ten million take seconds, and prove no more here
    monkeypatch.setenv("ONEWARP_CACHE", str(tmp_path))
    record = steady.main(steady.SteadyOptions(data=str(small_set), quick=True, size=64, steps=20, warm_up=5))
    figures = rows(record, "figure")
    assert len(figures) == len(record.figures) == 14
    assert all(np.isfinite(sample) for figure in record.figures for sample in figure.samples)
    assert steady.os.environ["ONEWARP_CACHE"] == str(tmp_path)


def test_the_peak_is_what_was_held_at_once_and_the_resident_memory_what_is_still_held():
    with steady.peak() as risen:
        before = steady.resident()
        np.ones(60_000_000, np.uint8)  # more than malloc may keep when it is freed
        kept = np.ones(80_000_000, np.uint8)
    assert risen[0] == pytest.approx(80, abs=8)
    assert steady.resident() - before == pytest.approx(80, abs=8)
    del kept
    with steady.peak() as risen:
        pass
    assert risen[0] < 8
