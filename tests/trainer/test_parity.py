"""One rank, two or three: the same losses, the same verdicts."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from pipelines.manifest import Manifest
from tests.ranks import on_ranks
from tests.runs import newest
from trainer import evaluate
from trainer.journal import read
from trainer.ranks import Ranks
from trainer.worker import run


def train(ranks, path):
    run(path, "train", ranks)


def losses(path):
    return np.array([event["loss"] for event in read(path / "journal.jsonl") if event["event"] == "step"])


def epochs(path):
    return [event for event in read(path / "journal.jsonl") if event["event"] == "epoch"]


def test_every_step_has_the_loss_of_one_rank(prepared, copies):
    alone = prepared("alone", epochs=6, freeze_epochs=2, lr=2e-3, batch=7, seed=1)
    others = {world: copies(alone, f"on-{world}") for world in (2, 3)}
    run(alone, "train", Ranks())
    one = losses(alone)
    assert len(one) == 8 * (53 // 7) >= 50
    assert one[-3:].mean() < one[:3].mean() - 0.05  # it learns: equal losses are not those of a dead model
    for world, together in others.items():
        on_ranks(world, train, together)
        np.testing.assert_allclose(losses(together), one, rtol=1e-4)
        for a, b in zip(epochs(alone), epochs(together), strict=True):
            assert a["error_rate"] == b["error_rate"]
            assert a["valid_loss"] == pytest.approx(b["valid_loss"], rel=1e-4)


def look_at_ids(ranks, path):
    """What the validation of a run reads on this rank, saved for the test to compare."""
    from pipelines.loader import Loader

    manifest = Manifest.read(path / "manifest.parquet")
    loader = Loader(manifest.valid, size=32, global_batch=5, rank=ranks.rank, world_size=ranks.world_size)
    seen = [i for batch in loader.epoch(0) for i in batch.ids_N.tolist()]
    np.save(path / f"seen{ranks.rank}of{ranks.world_size}.npy", np.array(seen))


@pytest.mark.parametrize("world", [2, 3])
def test_validation_counts_each_image_once(prepared, world):
    path = prepared("run")
    on_ranks(world, look_at_ids, path)
    seen = np.concatenate([np.load(path / f"seen{rank}of{world}.npy") for rank in range(world)])
    manifest = Manifest.read(path / "manifest.parquet")
    assert len(manifest.valid) == 23
    assert sorted(seen.tolist()) == manifest.valid.ids_N.tolist()


def test_a_sample_counted_twice_is_noticed(prepared, monkeypatch):
    path = prepared("run", epochs=1, freeze_epochs=0, lr=1e-3)
    monkeypatch.setattr(evaluate.torch, "searchsorted", lambda sorted_V, ids_N: ids_N * 0)
    with pytest.raises(RuntimeError, match="counted"):
        run(path, "train", Ranks())


def test_files_that_go_bad_after_the_scan_are_told_and_no_rank_waits(prepared, copies):
    alone = prepared("alone", epochs=1, freeze_epochs=1, lr=2e-3, batch=7, seed=1)
    together = copies(alone, "together")
    manifest = Manifest.read(alone / "manifest.parquet")
    hidden = [manifest.root / part.paths[2] for part in (manifest.train, manifest.valid)]
    try:
        for path in hidden:
            path.rename(path.with_suffix(".hidden"))
        run(alone, "train", Ranks())
        on_ranks(2, train, together)
    finally:
        for path in hidden:
            path.with_suffix(".hidden").rename(path)
    for path in (alone, together):
        told = [event["path"] for event in read(path / "journal.jsonl") if event["event"] == "quarantined"]
        assert sorted(told) == [manifest.train.paths[2], manifest.valid.paths[2]]
        assert manifest.valid.paths[2] in (path / "quarantine.txt").read_text()
    assert len(losses(alone)) == len(losses(together)) == 2 * (53 // 7)
    assert np.abs(losses(together) / losses(alone) - 1).max() < 1e-4
    for a, b in zip(epochs(alone), epochs(together), strict=True):
        assert a["error_rate"] == b["error_rate"]
        assert round(a["error_rate"] * 22, 6) % 1 == 0  # of the 22 that are left


def test_losses_mixing_averages_and_metrics_are_those_of_one_rank(prepared, copies):
    recipe = {
        "loss": "focal",
        "label_smoothing": 0.1,
        "class_weights": "inverse",
        "mixup": 0.4,
        "cutmix": 1.0,
        "ema": 0.99,
    }
    alone = prepared("alone", epochs=2, freeze_epochs=1, lr=2e-3, batch=8, seed=1, **recipe)
    together = copies(alone, "together")
    run(alone, "train", Ranks())
    on_ranks(2, train, together)
    assert np.abs(losses(together) / losses(alone) - 1).max() < 1e-4
    for a, b in zip(epochs(alone), epochs(together), strict=True):
        assert a["error_rate"] == b["error_rate"]
        for name in ("valid_loss", "top5_accuracy", "macro_f1", "calibration_error"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    one, two = (safetensors.torch.load_file(path / "model.safetensors") for path in (alone, together))
    last = safetensors.torch.load_file(newest(alone) / "model.safetensors")
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)
    assert any(
        not torch.allclose(one[name], last[name], atol=1e-4) for name in one
    )  # the average is kept, not the last


def interrupted(ranks, path):
    """Two runs of one configuration on these ranks: one undisturbed, one that stops after two epochs and goes on."""
    run(path / "undisturbed", "train", ranks)
    told = []

    def stop(metrics):
        told.append(metrics)
        if len(told) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(path / "stopped", "train", ranks, report=stop)
    run(path / "stopped", "train", ranks)


def test_two_ranks_go_on_with_an_averaged_run_to_the_bit(prepared, copies):
    # With batch statistics and dropout of their own on each rank.
    settings = {"model": "test_resnet", "head": "fastai", "size": 32, "mixup": 0.2, "ema": 0.9, "lr": 1e-3}
    undisturbed = prepared("undisturbed", epochs=2, freeze_epochs=1, **settings)
    stopped = copies(undisturbed, "stopped")
    on_ranks(2, interrupted, undisturbed.parent)
    assert losses(stopped).tolist() == losses(undisturbed).tolist()
    assert len(losses(stopped)) == 3 * (53 // 8)
    whole, again = (
        [safetensors.torch.load_file(folder / "model.safetensors") for folder in (path, newest(path))]
        for path in (undisturbed, stopped)
    )
    for ours, expected in zip(again, whole, strict=True):
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert any(not torch.equal(whole[0][name], whole[1][name]) for name in whole[0])  # the average is kept
    states = [json.loads((newest(path) / "state.json").read_text()) for path in (undisturbed, stopped)]
    assert states[0]["averaged"] == states[1]["averaged"] == 3 * (53 // 8)
    for a, b in zip(epochs(undisturbed), epochs(stopped), strict=True):
        assert {name: a[name] for name in ("train_loss", "valid_loss", "error_rate")} == {
            name: b[name] for name in ("train_loss", "valid_loss", "error_rate")
        }


def compressed(ranks, path):
    for name in ("none", "bf16", "fp16"):
        run(path / name, "train", ranks)


def test_compressed_gradients_change_little_and_something(prepared, tmp_path):
    for name in ("none", "bf16", "fp16"):
        prepared(
            name, model="test_convnext", size=32, epochs=2, freeze_epochs=0, lr=2e-3, seed=1, grad_compression=name
        )
    on_ranks(2, compressed, tmp_path)
    plain, bf16, fp16 = (losses(tmp_path / name) for name in ("none", "bf16", "fp16"))
    assert 0 < np.abs(bf16 / plain - 1).max() < 1e-2
    assert 0 < np.abs(fp16 / plain - 1).max() < 1e-3
    assert np.abs(fp16 - plain).max() < np.abs(bf16 - plain).max()
