"""The best weights are those that were judged best, whenever a run stops."""

import math

import pytest
import safetensors.torch
import torch

from pipelines.geometry import Centre
from pipelines.loader import Loader
from pipelines.manifest import Manifest
from trainer import checkpoint, evaluate, losses, models, optim, precision
from trainer.best import Best, kept, taken_up
from trainer.config import TrainConfig
from trainer.journal import read
from trainer.loop import Learner
from trainer.ranks import Ranks
from trainer.worker import run


def of(epoch, error, loss=1.0):
    return Best(epoch=epoch, error_rate=error, valid_loss=loss)


def test_the_lower_error_wins_then_the_lower_loss_then_the_earlier_epoch():
    assert of(0, 0.5).beats(None)
    assert of(1, 0.4, 9.0).beats(of(0, 0.5, 1.0))
    assert not of(1, 0.5, 0.1).beats(of(0, 0.4, 9.0))
    assert of(1, 0.5, 0.9).beats(of(0, 0.5, 1.0))
    assert not of(1, 0.5).beats(of(0, 0.5))
    assert of(1, 0.5, 9.0).beats(of(0, 0.5, math.nan))
    assert not of(1, 0.5, math.nan).beats(of(0, 0.5, 9.0))


def judged(path, name, folder):
    """The verdict of a run's validation on the weights in `name`, by a model of its own."""
    config, manifest = TrainConfig.read(folder / "config.json"), Manifest.read(folder / "manifest.parquet")
    model = models.build(config.model, head=config.head, classes=3, size=config.size)
    model.load_state_dict(safetensors.torch.load_file(path / f"{name}.safetensors"))
    learner = Learner(
        model=model.to(memory_format=torch.channels_last),
        optimizer=optim.build(model, 0.0, config.size),
        precision=precision.resolve("fp32", torch.device("cpu")),
        ranks=Ranks(),
        loss=losses.CrossEntropy(),
    )
    statistics = models.statistics(config.model)
    loader = Loader(
        manifest.valid,
        size=config.size,
        global_batch=config.batch,
        augment=Centre(),
        mean=statistics.mean,
        std=statistics.std,
    )
    return evaluate.judge(learner, loader)


# A rate that is far too high in the middle of the cycle, so that the best epoch is not the last.
WILD = {
    "model": "mobilenetv3_small_050",
    "head": "fastai",
    "size": 32,
    "epochs": 3,
    "freeze_epochs": 1,
    "lr": 0.05,
    "ema": 0.5,
}


def test_best_and_last_weights_are_kept_and_are_what_they_are_said_to_be(prepared):
    path = prepared("run", **WILD)
    run(path, "train", Ranks())
    events = read(path / "journal.jsonl")
    epochs = [event for event in events if event["event"] == "epoch"]
    finished = events[-1]
    lowest = min(epochs, key=lambda event: (event["error_rate"], event["valid_loss"]))
    assert finished["best"] == {key: lowest[key] for key in ("epoch", "error_rate", "valid_loss")}
    assert lowest is not epochs[-1]  # else the two files would be the same
    for name, said in (("best", lowest), ("model", epochs[-1])):
        verdict = judged(path, name, path)
        assert verdict.error_rate == said["error_rate"]
        assert verdict.loss == pytest.approx(said["valid_loss"], rel=1e-5)
    assert kept(path / "best.safetensors") == Best(**finished["best"])
    assert not list(path.glob(".*partial"))


@pytest.mark.parametrize("moment", ["before its checkpoint", "before its file"])
def test_a_run_killed_at_its_best_epoch_has_the_same_best_in_the_end(prepared, copies, monkeypatch, moment):
    undisturbed = prepared("undisturbed", **WILD)
    killed = copies(undisturbed, "killed")
    run(undisturbed, "train", Ranks())
    last = kept(undisturbed / "best.safetensors")
    write, keep = checkpoint.Checkpoints._write, checkpoint.keep

    class KilledError(Exception):
        pass

    def write_or_die(self, done, files, numbers, position, best):
        if moment == "before its checkpoint" and position.best == last:
            raise KilledError
        write(self, done, files, numbers, position, best)

    def keep_or_die(path, tensors, best):
        if best == last:
            raise KilledError
        keep(path, tensors, best)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "_write", write_or_die)
        patch.setattr(checkpoint, "keep", keep_or_die)
        with pytest.raises(KilledError):
            run(killed, "train", Ranks())
    assert kept(killed / "best.safetensors") != last
    run(killed, "train", Ranks())
    for name in ("best", "model"):
        ours, theirs = (safetensors.torch.load_file(path / f"{name}.safetensors") for path in (killed, undisturbed))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    assert kept(killed / "best.safetensors") == kept(undisturbed / "best.safetensors")


def test_a_file_that_is_gone_is_made_again_from_its_own_checkpoint_or_sought_anew(tmp_path):
    path, tensors = tmp_path / "best.safetensors", {"weight": torch.arange(3.0)}
    assert taken_up(path, None, tensors, 1) is None
    assert taken_up(path, of(0, 0.5), tensors, 1) is None  # these are the weights of epoch 1
    assert not path.exists()
    assert taken_up(path, of(1, 0.5), tensors, 1) == of(1, 0.5)
    assert kept(path) == of(1, 0.5)
    assert torch.equal(safetensors.torch.load_file(path)["weight"], tensors["weight"])
    assert taken_up(path, of(1, 0.5), {}, 3) == of(1, 0.5)  # it is there: nothing is written
    path.write_bytes(path.read_bytes()[:20])
    assert kept(path) is None
    assert taken_up(path, of(1, 0.5), {}, 3) is None
