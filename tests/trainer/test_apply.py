"""A trained run applied to images: the numbers, by hand; any number of ranks; the files and folders people have."""

import csv
import io
import json
import pickle
import shutil
from functools import partial
from types import SimpleNamespace

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image
from rich.console import Console

from pipelines import Augment, pack, scan
from pipelines.errors import UserError
from pipelines.geometry import UNIFORMS, compose, draw
from pipelines.plan import TEST_TIME_EPOCH, uniforms
from pipelines.scanning import scan_to_apply
from tests.conftest import picture
from tests.hostile import make_hostile_folder
from tests.ranks import on_ranks
from tests.trainer.conftest import PLAIN
from trainer import (
    EvaluateConfig,
    PredictConfig,
    TrainConfig,
    apply,
    evaluate_run,
    evaluating,
    fine_tune,
    models,
    predict,
    predictions,
)
from trainer.evaluate import judge
from trainer.journal import read
from trainer.losses import CrossEntropy, Focal, OneVsRest
from trainer.ranks import Ranks
from trainer.trained import Trained, open_run

# Where the warp reads pixels less than two apart, nothing is shrunk first, and any bilinear warp is an oracle.
SIZE = 75
UNLIT = {"max_lighting": 0.0}
TINY = {**PLAIN, "model": "test_convnext"}


@pytest.fixture(scope="module")
def run(lossless_set, tmp_path_factory):
    """A run that learned a little, of PNGs. Tests that change it take a copy."""
    config = {**TINY, "size": SIZE, "data": str(lossless_set), "augment": UNLIT, "workers": 0, "name": "run"}
    config |= {"runs": str(tmp_path_factory.mktemp("runs")), "epochs": 1, "freeze_epochs": 0, "lr": 4e-3, "seed": 5}
    return fine_tune(TrainConfig.from_dict(config), Console(file=io.StringIO())).folder


@pytest.fixture
def changed(run, tmp_path):
    """`changed(loss="focal")`: a copy of the run with other settings, as if it had been trained with them."""

    def change(**settings):
        path = tmp_path / "changed"
        shutil.copytree(run, path)
        values = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**values, **settings}))
        return path

    return change


@pytest.fixture
def unlabelled(lossless_set, tmp_path):
    """The validation images, somewhere below a folder, and without their classes."""
    (tmp_path / "pictures/deep/er").mkdir(parents=True)
    for i, file in enumerate(sorted((lossless_set / "valid").rglob("*.png"))):
        shutil.copy(file, tmp_path / "pictures" / ("", "deep", "deep/er")[i % 3] / f"{i:02d}.png")
    return tmp_path / "pictures"


def ours(run, data, tmp_path, quiet, **settings):
    settings = {"workers": 0, "out": tmp_path / "p.csv", **settings}
    return predict(PredictConfig(run=run, data=data, **settings), quiet)


def judged(run, quiet, data=None, **settings):
    return evaluate_run(EvaluateConfig(run=run, data=data, **{"workers": 0, **settings}), quiet)


def rows(file):
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def by_hand(run, files, epoch=None):
    """Probabilities [N, C] by Pillow, OpenCV and torch: of the central squares, or as `epoch` augments row 0, 1, ….

    Only the draws and the matrices made of them are the loader's.
    """
    config = TrainConfig.read(run / "config.json")
    classes = 3
    model = models.build(config.model, head=config.head, classes=classes, size=config.size)
    model.load_state_dict(safetensors.torch.load_file(run / "model.safetensors"))
    model.eval()
    centres = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    images = []
    for row, file in enumerate(files):
        pixels_HWC = np.asarray(Image.open(file).convert("RGB"))
        height, width = pixels_HWC.shape[:2]
        side = min(height, width)
        scale = side / SIZE
        matrix_33 = np.array([[scale, 0, (width - side) / 2], [0, scale, (height - side) / 2], [0, 0, 1]])
        if epoch is not None:
            draws = draw(Augment(**UNLIT), uniforms(config.seed, epoch, np.array([row]), UNIFORMS))
            matrix_33 = compose(draws, np.array([height]), np.array([width]), SIZE)[0]
        images.append(
            cv2.warpPerspective(
                pixels_HWC.astype(np.float32),
                np.linalg.inv(centres) @ matrix_33 @ centres,
                (SIZE, SIZE),
                flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                borderMode=cv2.BORDER_REFLECT_101,
            )
        )
    mean, std = 0.5, 0.5  # not those of ImageNet
    images_NHWC = (np.stack(images) / 255 - mean) / std
    with torch.inference_mode():
        return model(torch.from_numpy(images_NHWC).float().permute(0, 3, 1, 2)).softmax(dim=1)


def test_predictions_are_those_of_the_model_on_central_squares(run, unlabelled, tmp_path, quiet):
    result = ours(run, unlabelled, tmp_path, quiet)
    files = sorted(unlabelled.rglob("*.png"), key=lambda file: str(file.relative_to(unlabelled)))
    assert list(result.paths) == [str(file.relative_to(unlabelled)) for file in files]
    expected_NC = by_hand(run, files)
    best_NK, probabilities_NK = (column.numpy() for column in apply.best(expected_NC))
    assert np.abs(result.probabilities_NK - probabilities_NK).max() < 3e-3
    assert np.array_equal(result.best_NK[:, 0], best_NK[:, 0])
    assert len(set(result.predicted)) > 1  # not a dead model's
    table = rows(tmp_path / "p.csv")
    assert [row["path"] for row in table] == list(result.paths)
    assert [row["predicted"] for row in table] == result.predicted == [f"class{i}" for i in best_NK[:, 0]]
    assert [float(row["probability2"]) for row in table] == pytest.approx(result.probabilities_NK[:, 1])
    assert not list(tmp_path.glob("*quarantine*")) and not list(tmp_path.glob(".*"))


def test_test_time_augmentation_is_fastais_blend(run, unlabelled, tmp_path, quiet):
    files = sorted(unlabelled.rglob("*.png"), key=lambda file: str(file.relative_to(unlabelled)))
    plain_NC = by_hand(run, files)
    augmented_NC = torch.stack([by_hand(run, files, epoch=TEST_TIME_EPOCH + i) for i in range(3)]).mean(dim=0)
    expected_NC = torch.lerp(augmented_NC, plain_NC, 0.25)
    result = ours(run, unlabelled, tmp_path, quiet, tta=3)
    ours_NC = np.zeros(expected_NC.shape)
    np.put_along_axis(ours_NC, result.best_NK, result.probabilities_NK, axis=1)
    assert np.abs(ours_NC - expected_NC.numpy()).max() < 3e-3
    for other_NC in (plain_NC, augmented_NC, torch.lerp(plain_NC, augmented_NC, 0.25)):
        assert np.abs(ours_NC - other_NC.numpy()).max() > 1e-2
    again = ours(run, unlabelled, tmp_path, quiet, tta=3)
    assert np.array_equal(again.probabilities_NK, result.probabilities_NK)


CASES = [(images, tta) for images in (23, 2) for tta in (0, 2)]  # of 2, three ranks leave one without an image


def score_all(ranks, path):
    for images, tta in CASES:
        apply.score(path / f"{images}-{tta}", ranks, lambda metrics: None)


def test_one_two_and_three_ranks_say_the_same(run, tmp_path):
    trained, manifest = open_run(run, "last")
    together = {}
    for world in (1, 2, 3):
        for images, tta in CASES:
            folder = tmp_path / f"{world}/{images}-{tta}"
            folder.mkdir(parents=True)
            task = apply.Task(trained=trained, samples=manifest.valid.subset(np.arange(images)), tta=tta)
            (folder / apply.TASK).write_bytes(pickle.dumps(task))
        if world == 1:
            score_all(Ranks(), tmp_path / "1")
        else:
            on_ranks(world, score_all, tmp_path / str(world))
        for images, tta in CASES:
            files = sorted((tmp_path / f"{world}/{images}-{tta}").glob("part-*"))
            parts = [pickle.loads(file.read_bytes()) for file in files]
            assert len(parts) == world
            # Each image is read on one rank, and they share the work.
            assert sorted(np.concatenate([part.positions_N for part in parts]).tolist()) == list(range(images))
            assert max(len(part.positions_N) for part in parts) <= -(-images // world) + 1
            together[world, images, tta] = apply._together(parts, manifest.valid.subset(np.arange(images)))
    for images, tta in CASES:
        one, *others = (together[world, images, tta] for world in (1, 2, 3))
        for other in others:
            for name in ("positions_N", "best_NK", "places_N"):
                assert np.array_equal(getattr(one, name), getattr(other, name)), name
            assert np.abs(one.probabilities_NK - other.probabilities_NK).max() < 1e-6
            assert one.losses_N == pytest.approx(other.losses_N, abs=1e-5)
    augmented, plain = together[1, 23, 2].probabilities_NK, together[1, 23, 0].probabilities_NK
    assert np.abs(augmented - plain).max() > 1e-3


def test_an_image_read_twice_or_not_at_all_is_noticed(run, tmp_path, quiet):
    trained, manifest = open_run(run, "last")
    samples = manifest.valid.subset(np.arange(2))
    one = apply.apply(trained, samples, tta=0, workers=0, scratch=tmp_path, console=quiet)
    with pytest.raises(RuntimeError, match=f"'{samples.paths[0]}' was read 2 times"):
        apply._together([one, one], samples)
    with pytest.raises(RuntimeError, match=f"'{manifest.valid.paths[2]}' was read 0 times"):
        apply._together([one], manifest.valid.subset(np.arange(3)))


def test_how_much_is_held_at_a_time_changes_nothing(run, quiet, tmp_path, monkeypatch):
    trained, manifest = open_run(run, "last")
    found = []
    for cells in (apply.CELLS, 3 * 8):
        monkeypatch.setattr(apply, "CELLS", cells)  # then one step of 8 images and 3 classes at a time
        found.append(apply.apply(trained, manifest.valid, tta=2, workers=0, scratch=tmp_path, console=quiet))
    for name in ("positions_N", "best_NK", "probabilities_NK", "losses_N"):
        assert np.array_equal(getattr(found[0], name), getattr(found[1], name)), name


def test_a_run_judged_by_its_own_images_has_the_error_it_ended_with(run, quiet):
    result = judged(run, quiet)
    finished = read(run / "journal.jsonl")[-1]
    (epoch,) = (event for event in read(run / "journal.jsonl") if event["event"] == "epoch")
    assert result.metrics.error_rate == finished["error_rate"]
    assert result.loss == pytest.approx(finished["valid_loss"], rel=1e-5)
    assert [vars(row) for row in result.metrics.per_class] == finished["per_class"]
    assert [list(row) for row in result.most_confused[:5]] == finished["most_confused"]
    for name in ("top5_accuracy", "macro_f1", "calibration_error"):
        assert getattr(result.metrics, name) == pytest.approx(epoch[name], rel=1e-5)
    assert result.folder == run / "evaluation-lossless"
    assert result.trained_on == 0
    for name in ("confused.png", "confusion.png", "top_losses.png"):
        assert (result.folder / name).read_bytes() == (run / name).read_bytes()
    record = json.loads((result.folder / "evaluation.json").read_text())
    assert (record["images"], record["right"]) == (23, result.metrics.right)
    table = rows(result.folder / "predictions.csv")
    assert [row["label"] for row in table] == [row["path"].split("/")[1] for row in table]
    assert sum(row["label"] != row["predicted"] for row in table) == 23 - result.metrics.right
    assert sorted(path.name for path in result.folder.iterdir()) == [
        *("confused.png", "confusion.png", "evaluation.json", "predictions.csv", "top_losses.png")
    ]


def test_a_share_of_the_images_is_judged_by_the_same_share(lossless_set, tmp_path, quiet):
    config = {**TINY, "size": 64, "data": str(lossless_set), "workers": 0, "name": "run", "runs": str(tmp_path)}
    config |= {"epochs": 1, "freeze_epochs": 0, "lr": 1e-3, "subset": 0.5, "crop_pct": 0.8, "quality": "high"}
    trained = fine_tune(TrainConfig.from_dict(config | {"head": "fastai", "ema": 0.9}), quiet)
    result = judged(trained.folder, quiet)
    assert result.metrics.images == 12
    assert result.metrics.error_rate == trained.error_rate
    assert result.loss == pytest.approx(trained.valid_loss, rel=1e-4)


def test_of_a_split_folder_the_validation_part_is_judged_and_else_everything(run, lossless_set, tmp_path, quiet):
    own = judged(run, quiet)
    split = judged(run, quiet, lossless_set, out=tmp_path / "split")
    assert split.metrics == own.metrics
    assert split.images == f"the validation part (by folders) of {lossless_set}"
    whole = judged(run, quiet, lossless_set / "valid", out=tmp_path / "whole")
    assert whole.metrics == own.metrics
    assert whole.images == f"all of {lossless_set}/valid"
    train = judged(run, quiet, lossless_set / "train", out=tmp_path / "train")
    assert (train.metrics.images, train.trained_on) == (53, 53)
    assert "53 of them were trained on" in quiet.file.getvalue()
    table = tmp_path / "labels.csv"
    files = sorted(str(p.relative_to(lossless_set)) for p in (lossless_set / "valid").rglob("*.png"))
    lines = [f"{file},{file.split('/')[1]},{'train' if i % 2 else 'valid'}" for i, file in enumerate(files)]
    table.write_text("\n".join(["path,label,split", *lines]))
    half = judged(run, quiet, lossless_set, label_csv=table, out=tmp_path / "half")
    assert half.metrics.images == 12
    assert half.images.startswith("the validation part (by the table)")


def test_classes_are_matched_by_name(run, lossless_set, tmp_path, quiet):
    whole = judged(run, quiet)
    for name, new in (("class2", "class2"), ("class0", "class0")):
        one = tmp_path / name / "data"
        shutil.copytree(lossless_set / "valid" / name, one / new)
        result = judged(run, quiet, one, out=tmp_path / name / "out")
        row = next(row for row in whole.metrics.per_class if row.name == name)
        assert (result.metrics.images, result.metrics.right) == (row.images, row.right)
    (one / "class0").rename(one / "klass0")
    with pytest.raises(UserError, match=r"'klass0', which the run run does not know; classes of like names: 'class"):
        judged(run, quiet, one, out=tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    (one / "klass0").rename(one / "zebra")
    with pytest.raises(UserError, match=r"'zebra', .*it knows 'class0', 'class1', 'class2'\. Rename"):
        judged(run, quiet, one)


def test_a_store_is_judged_and_predicted(run, lossless_set, tmp_path, quiet):
    pack(scan(lossless_set), tmp_path / "packed", kind="encoded")
    own = judged(run, quiet)
    stored = judged(run, quiet, tmp_path / "packed", out=tmp_path / "out")
    assert stored.metrics == own.metrics
    everything = ours(run, tmp_path / "packed", tmp_path, quiet)
    assert len(everything.paths) == 76
    folder = ours(run, lossless_set, tmp_path, quiet)
    assert everything.paths == folder.paths
    assert np.array_equal(everything.probabilities_NK, folder.probabilities_NK)


def test_bad_files_are_named_and_all_others_predicted(run, tmp_path, quiet):
    hostile = make_hostile_folder(tmp_path / "hostile", plain=2, each=1)
    result = ours(run, hostile.root, tmp_path, quiet, out=tmp_path / "p.parquet", tta=1)
    assert result.paths == hostile.good
    assert len(pq.read_table(tmp_path / "p.parquet")) == len(hostile.good)
    left_out = {bad.path: bad.reason for bad in result.left_out}
    assert set(left_out) == set(hostile.bad)
    assert all(words in left_out[path] for path, words in hostile.bad.items())
    listed = (tmp_path / "p-quarantine.txt").read_text().splitlines()
    assert dict(line.split("\t") for line in listed) == left_out
    predictions.summary(result, quiet)
    told = quiet.file.getvalue()
    assert f"left out  {len(hostile.bad)} files, all named in {tmp_path}/p-quarantine.txt" in told
    assert f"images    {len(hostile.good)}\n" in told
    # The same table of good files alone: an older list does not stay.
    (tmp_path / "good").mkdir()
    picture(np.random.default_rng(0), 90, 90).save(tmp_path / "good/a.jpg")
    ours(run, tmp_path / "good", tmp_path, quiet, out=tmp_path / "p.parquet")
    assert not (tmp_path / "p-quarantine.txt").exists()


def test_a_single_image_whatever_its_name(run, unlabelled, tmp_path, quiet):
    whole = ours(run, unlabelled, tmp_path, quiet)
    alone = tmp_path / "upload.tmp"
    shutil.copy(unlabelled / whole.paths[3], alone)
    result = ours(run, alone, tmp_path, quiet)
    assert result.paths == ("upload.tmp",)
    assert result.predicted == whole.predicted[3:4]
    assert np.abs(result.probabilities_NK - whole.probabilities_NK[3]).max() < 1e-6
    alone.write_text("no image")
    with pytest.raises(UserError, match="'upload.tmp': not an image: it starts with 'no image'"):
        ours(run, alone, tmp_path, quiet)


@pytest.mark.parametrize("tta", [0, 1])
def test_files_gone_since_the_scan_are_left_out(run, unlabelled, tmp_path, quiet, tta):
    samples = scan_to_apply(unlabelled, labels=None).samples
    trained, _ = open_run(run, "last")
    go = partial(apply.apply, trained, samples, tta=tta, workers=0, scratch=tmp_path, console=quiet)
    before = go()
    (unlabelled / samples.paths[4]).unlink()
    (unlabelled / samples.paths[9]).write_bytes((unlabelled / samples.paths[9]).read_bytes()[:500])
    after = go()
    assert [bad.path for bad in after.spoiled] == [samples.paths[4], samples.paths[9]]
    assert after.positions_N.tolist() == [i for i in range(23) if i not in (4, 9)]
    assert np.abs(after.probabilities_NK - before.probabilities_NK[after.positions_N]).max() < 1e-6
    for path in samples.paths:
        (unlabelled / path).unlink(missing_ok=True)
    with pytest.raises(UserError, match="None of the 23 images .* can be read any more"):
        go()


def test_below_the_threshold_an_image_is_none_of_the_classes(run, changed, unlabelled, tmp_path, quiet):
    sure = ours(run, unlabelled, tmp_path, quiet)
    threshold = float(np.median(sure.probabilities_NK[:, 0]))
    doubted = ours(run, unlabelled, tmp_path, quiet, threshold=threshold)
    expected = [
        name if p >= threshold else None
        for name, p in zip(sure.predicted, sure.probabilities_NK[:, 0].tolist(), strict=True)
    ]
    assert doubted.predicted == expected
    assert 8 < expected.count(None) < 14
    assert [row["predicted"] for row in rows(tmp_path / "p.csv")] == [name or "" for name in expected]
    predictions.summary(doubted, quiet)
    assert f"{expected.count(None)}  none of the classes: the best is less probable than" in quiet.file.getvalue()
    # Evaluating tells both: all of them as before, and those that are left.
    found = judged(run, quiet, threshold=threshold, out=tmp_path / "judged")
    table = rows(tmp_path / "judged/predictions.csv")
    left = [row for row in table if float(row["probability"]) >= threshold - 1e-6]
    assert found.declined == len(table) - len(left) == expected.count(None)
    assert found.answered_error_rate == np.mean([row["predicted"] != row["label"] for row in left])
    assert found.metrics.error_rate == np.mean([row["predicted"] != row["label"] for row in table])
    evaluating.summary(found, quiet)
    assert f"declined      {found.declined} of 23   (best class below {threshold:g}); error" in quiet.file.getvalue()
    assert judged(run, quiet, out=tmp_path / "all").declined == 0
    # One against the rest: each class says for itself whether it is there, and 0.5 is where it says no.
    free = ours(changed(loss="one-vs-rest"), unlabelled, tmp_path, quiet)
    files = [unlabelled / path for path in free.paths]
    softmax_NC = by_hand(run, files)
    assert free.threshold == 0.5
    assert [name is None for name in free.predicted] == (free.probabilities_NK[:, 0] < 0.5).tolist()
    odds_NK = np.log(free.probabilities_NK / (1 - free.probabilities_NK))  # these are the logits
    gaps_N = torch.log(apply.best(softmax_NC)[1][:, 0] / apply.best(softmax_NC)[1][:, 1]).numpy()
    assert odds_NK[:, 0] - odds_NK[:, 1] == pytest.approx(gaps_N, abs=0.03)


@pytest.mark.parametrize("loss", [CrossEntropy(), Focal(gamma=2.0), OneVsRest()])
def test_probabilities_lead_back_to_the_loss_of_the_logits(loss):
    generator = torch.Generator().manual_seed(0)
    logits_NC = 6 * torch.randn(50, 7, generator=generator, dtype=torch.float64)
    labels_N = torch.randint(7, (50,), generator=generator)
    back_NC = loss.logits(loss.probabilities(logits_NC))
    assert torch.allclose(loss.each(back_NC, labels_N), loss.each(logits_NC, labels_N), rtol=1e-6)
    certain_NC = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    assert loss.each(loss.logits(certain_NC), torch.tensor([1])).isfinite().all()


@pytest.mark.parametrize("loss", ["focal", "one-vs-rest"])
def test_the_loss_told_is_that_of_training(changed, quiet, loss):
    path = changed(loss=loss, label_smoothing=0.1, class_weights="inverse")
    result = judged(path, quiet)
    trained, manifest = open_run(path, "last")
    ranks = Ranks()
    learner = SimpleNamespace(
        model=trained.model(ranks), ranks=ranks, loss=trained.loss(), precision=trained.precision(ranks)
    )
    learner.judged = learner.model
    expected = judge(learner, trained.loader(manifest.valid, ranks, device=ranks.device))
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)
    assert result.metrics.error_rate == expected.error_rate


def test_best_weights_are_read_where_they_are_kept(changed, unlabelled, tmp_path, quiet):
    path = changed()
    (path / "best.safetensors").unlink()
    with pytest.raises(UserError, match=r"no best weights: there is no best\.safetensors in it"):
        ours(path, unlabelled, tmp_path, quiet, weights="best")
    weights = safetensors.torch.load_file(path / "model.safetensors")
    weights["head.1.bias"] = weights["head.1.bias"] + torch.tensor([0.0, 0.0, 50.0])
    safetensors.torch.save_file(weights, path / "best.safetensors")
    assert set(ours(path, unlabelled, tmp_path, quiet, weights="best").predicted) == {"class2"}
    assert set(ours(path, unlabelled, tmp_path, quiet).predicted) != {"class2"}


def test_the_most_confused_from_a_count_on(run, quiet, tmp_path):
    every = judged(run, quiet, out=tmp_path / "a").most_confused
    most = every[0][2]
    assert judged(run, quiet, out=tmp_path / "b", min_count=most).most_confused == tuple(
        row for row in every if row[2] == most
    )


def test_what_is_said_of_an_evaluation(run, quiet, tmp_path):
    result = judged(run, quiet, out=tmp_path / "out")
    evaluating.summary(result, quiet)
    told = quiet.file.getvalue()
    assert f"images    23: the run's own validation images of {tmp_path.parent}"[:50] in told
    assert f"error rate    {result.metrics.error_rate:.4f}" in told
    for row in result.metrics.per_class:
        line = next(line for line in told.splitlines() if line.startswith(f"{row.name} "))
        assert line.split()[1] == str(row.images)
        assert line.split()[3] == f"{row.recall:.3f}"
    assert "confused.png, confusion.png, evaluation.json, predictions.csv, top_losses.png" in told


def empty(path):
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("do", "words"),
    [
        (lambda run, tmp: PredictConfig(run=tmp / "none", data=tmp), r"The run .*/none does not exist\. Give the"),
        (
            lambda run, tmp: PredictConfig(run=run.parent / "rum", data=tmp),
            r"rum .*; runs beside it: run\.",
        ),
        (lambda run, tmp: PredictConfig(run=run / "config.json", data=tmp), "config.json is a file"),
        (lambda run, tmp: PredictConfig(run=empty(tmp / "x"), data=tmp), "is no run: there is no config.json"),
        (lambda run, tmp: PredictConfig(run=run, data=tmp / "none"), "'.*/none' does not exist"),
        (lambda run, tmp: PredictConfig(run=run, data=empty(tmp / "x")), "There are no images in '.*/x'"),
        (lambda run, tmp: PredictConfig(run=run, data=tmp, tta=-1), "--tta is -1; it must be between 0"),
        (lambda run, tmp: PredictConfig(run=run, data=tmp, threshold=1.5), "--threshold is 1.5; it must be between 0"),
        (lambda run, tmp: PredictConfig(run=run, data=tmp, threshold=float("nan")), "--threshold is nan"),
        (lambda run, tmp: PredictConfig(run=run, data=tmp, out="p.xlsx"), r"must end in \.csv or \.parquet"),
        (lambda run, tmp: PredictConfig(run=run, data=tmp, out="/dev/null/p.csv"), "/dev/null cannot be written"),
        (lambda run, tmp: PredictConfig(run=run, data=tmp, out=tmp / "no/p.csv"), "/no cannot be written"),
        (lambda run, tmp: PredictConfig(run=run, data=tmp, workers=4000), "--workers 4000: this machine has"),
        (lambda run, tmp: PredictConfig(run=run, data=tmp, workers=-1), "--workers is -1"),
        (lambda run, tmp: EvaluateConfig(run=run, min_count=0), "--min-count is 0"),
        (lambda run, tmp: EvaluateConfig(run=run, label_regex="(.)"), "there is no --data"),
        (lambda run, tmp: EvaluateConfig(run=run, data=str(tmp / "none")), "'.*/none' does not exist"),
        (lambda run, tmp: EvaluateConfig(run=run, out="/dev/null/x"), "/dev/null/x cannot be written"),
        (lambda run, tmp: EvaluateConfig(run=run, data=str(empty(tmp / "x"))), "There are no images"),
    ],
)
def test_mistakes_are_answered_in_one_paragraph(run, tmp_path, quiet, do, words):
    before = sorted(run.iterdir())

    def go():
        config = do(run, tmp_path)
        (predict if isinstance(config, PredictConfig) else evaluate_run)(config, quiet)

    with pytest.raises(UserError, match=words) as caught:
        go()
    assert "\n" not in str(caught.value)
    assert sorted(run.iterdir()) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"x"}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: (run / "model.safetensors").unlink(), r"has not finished: .*same settings and --name changed"),
        (lambda run: (run / "model.safetensors").write_bytes(b"x" * 99), "weights .* cannot be read"),
        (lambda run: (run / "manifest.parquet").unlink(), "is no manifest"),
        (lambda run: (run / "config.json").write_text("{"), "no configuration in JSON"),
        (
            lambda run: (run / "config.json").write_text((run / "config.json").read_text().replace("plain", "fastai")),
            "do not fit the model test_convnext with a fastai head",
        ),
        (
            lambda run: (run / "config.json").write_text((run / "config.json").read_text().replace("convnext", "conv")),
            r"trained with the model test_conv, which neither torchvision nor timm has here \(timm \d",
        ),
    ],
)
def test_a_run_that_cannot_be_used_says_why(changed, unlabelled, tmp_path, quiet, spoil, words):
    path = changed()
    spoil(path)
    with pytest.raises(UserError, match=words) as caught:
        ours(path, unlabelled, tmp_path, quiet)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "p.csv").exists()


def test_images_that_are_gone_are_said_before_any_worker_starts(changed, quiet, tmp_path):
    path = changed()
    table = pq.read_table(path / "manifest.parquet")
    meta = json.loads(table.schema.metadata[b"onewarp"]) | {"root": str(tmp_path / "moved")}
    pq.write_table(table.replace_schema_metadata({"onewarp": json.dumps(meta)}), path / "manifest.parquet")
    with pytest.raises(UserError, match="are gone: the folder '.*/moved' does not exist"):
        judged(path, quiet)


def test_a_run_in_tf32_is_applied_in_fp32_where_there_is_no_such_unit(tmp_path):
    trained = Trained(path=tmp_path, config=TrainConfig(precision="tf32"), classes=(), weights=tmp_path)
    assert trained.precision(Ranks()).name == "fp32"
