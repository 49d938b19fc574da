"""The training step: micro-batches, clipping, and steps that fp16 skips; on one rank and on two."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.errors import UserError
from pipelines.geometry import Augment
from pipelines.loader import Batch, Loader
from pipelines.manifest import Manifest
from pipelines.plan import rank_slice
from pipelines.scanning import scan
from tests.ranks import on_ranks
from trainer import checkpoint, compiling, models, optim, precision
from trainer.ema import Ema
from trainer.evaluate import judge
from trainer.journal import Journal, read
from trainer.loop import Learner, train_epoch, train_step
from trainer.micro import micro_batches
from trainer.mixing import Mixing
from trainer.position import Position
from trainer.ranks import Ranks
from trainer.schedule import fine_tune

ALONE = Ranks()


def make_learner(ranks=ALONE, *, number="fp32", optimizer="adamw", norms=False, ema=False, **options):
    """Two convolutions, at 1/4 and at 1/16, with batch-norms or without, and one linear layer; everything learns."""
    torch.manual_seed(0)

    def block(channels):
        return nn.Sequential(
            nn.Conv2d(channels, 8, 4, stride=4), nn.BatchNorm2d(8) if norms else nn.Identity(), nn.ReLU()
        )

    body = nn.Sequential(OrderedDict(early=block(3), late=block(8)))
    model = models.Classifier(body, models.build_head("plain", 8, 3))
    learner = Learner(
        model=model,
        optimizer=optim.build(model, 0.0, 32, name=optimizer),
        precision=precision.resolve(number, torch.device("cpu")),
        ranks=ranks,
        classes=3,
        ema=Ema(model, 0.9) if ema else None,
        **options,
    )
    if number == "fp16":
        learner.scaler.load_state_dict(SCALER)
    learner.train(first_group=0)
    return learner


# A first scale at which these small networks do not overflow by themselves.
SCALER = {"scale": 256.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}


def one_step(learner, size, step=0, lr=1e-2):
    """A step on this rank's part of seeded images whose brightness is their label."""
    generator = torch.Generator().manual_seed(step)
    labels_N = torch.randint(3, (size,), generator=generator)
    images_NCHW = torch.randn(size, 3, 32, 32, generator=generator) + labels_N[:, None, None, None]
    mine = rank_slice(np.arange(size), learner.ranks.rank, learner.ranks.world_size)
    batch = Batch(step=step, images_NCHW=images_NCHW[mine], labels_N=labels_N[mine], ids_N=torch.from_numpy(mine))
    return train_step(learner, batch, global_batch=size, hyper=([lr] * 3, 0.9), noise=(0, 0, step))


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


STEPS, BATCH = 6, 13  # on two ranks parts of 6 and 7, each of whole pairs


def course(ranks, most):
    """Losses and norms of some steps, the weights they lead to, and how often gradients were exchanged."""
    learner = make_learner(
        ranks,
        optimizer="sgd",  # Adam's kin make much of the last bits of a gradient that is nearly zero
        mixing=Mixing(mixup=0.4, cutmix=1.0),
        clip_norm=0.5,
        micro_batches=micro_batches(BATCH, ranks.world_size, most),
    )
    exchanges = []

    def counted(_, bucket):
        exchanges.append(bucket.index())
        return default_hooks.allreduce_hook(None, bucket)

    if ranks.world_size > 1:
        learner.network.register_comm_hook(None, counted)
    steps = [one_step(learner, BATCH, step, lr=0.03) for step in range(STEPS)]
    return {
        "losses": torch.stack([step.loss for step in steps]),
        "norms": torch.stack([step.norm for step in steps]),
        "weights": flat(learner.model),
        "exchanges": len(exchanges),
    }


def both_courses(ranks, path):
    torch.save([course(ranks, None), course(ranks, 4)], path / f"rank{ranks.rank}.pt")


def close(a, b):
    """Equal but for the order of summation."""
    assert torch.allclose(a["losses"], b["losses"], rtol=1e-5)
    assert torch.allclose(a["norms"], b["norms"], rtol=1e-4)
    assert torch.allclose(a["weights"], b["weights"], atol=1e-6)


def test_micro_batches_make_the_steps_of_the_whole_batch(tmp_path):
    assert [micro_batches(BATCH, world, 4) for world in (1, 2)] == [4, 2]
    expected, split = course(ALONE, None), course(ALONE, 4)
    assert (expected["losses"][0] - expected["losses"]).abs().max() > 0.01  # it moves
    close(split, expected)
    on_ranks(2, both_courses, tmp_path)
    together = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for whole, micro in together:
        close(whole, expected)
        close(micro, expected)
        assert whole["exchanges"] == micro["exchanges"] == STEPS
    for one, other in zip(*together, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("losses", "norms", "weights"))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("most", [2, 3, 5, 64])
def test_no_micro_batch_is_too_large_and_none_is_one_image(world, most):
    for batch in range(2 * world, 70):
        parts = [len(rank_slice(np.arange(batch), rank, world)) for rank in range(world)]
        try:
            number = micro_batches(batch, world, most)
        except UserError as error:
            # What it advises in place of it works.
            more = int(str(error).split("Choose --micro-batch ")[1].split(",")[0])
            assert more > most
            micro_batches(batch, world, more)
            continue
        sizes = [len(micro) for part in parts for micro in torch.arange(part).tensor_split(number)]
        assert 2 <= min(sizes) <= max(sizes) <= most
        assert number == 1 or max(parts) > most


def test_without_a_limit_nothing_is_split():
    assert micro_batches(1000, 3, None) == 1


def test_dropout_is_that_of_the_step_also_in_micro_batches():
    def norm(step, drawn_before):
        learner = make_learner(micro_batches=2, clip_norm=1.0)
        learner.model.head = nn.Sequential(*learner.model.head, nn.Dropout(0.5))
        learner.model.train()
        torch.manual_seed(drawn_before)
        return one_step(learner, 8, step).norm.item()

    assert norm(0, 1) == norm(0, 2) != norm(1, 1)


@pytest.mark.parametrize("number", ["fp32", "fp16"])
@pytest.mark.parametrize("clip_norm", [0.05, 1000.0])
def test_a_gradient_longer_than_the_limit_is_shortened_to_it(number, clip_norm):
    learner = make_learner(number=number, optimizer="sgd", clip_norm=clip_norm)
    before = flat(learner.model)
    norm = one_step(learner, 8, lr=1.0).norm.item()
    moved = (flat(learner.model) - before).norm().item()  # the first step of SGD, with rate 1, is the gradient
    assert 0.2 < norm < 100
    assert moved == pytest.approx(min(norm, clip_norm), rel=1e-3)
    unclipped = make_learner(optimizer="sgd")
    assert one_step(unclipped, 8, lr=1.0).norm is None
    assert norm == pytest.approx((flat(unclipped.model) - before).norm().item(), rel=1e-4 if number == "fp32" else 0.02)


@pytest.mark.parametrize("clip_norm", [0.05, 1000.0])
def test_lamb_is_clipped_once(clip_norm):
    learner = make_learner(optimizer="lamb", clip_norm=clip_norm)
    with torch.no_grad():
        learner.model.head[1].weight.mul_(20)  # a gradient longer than 1, at which timm's LAMB would clip by itself
    norm = one_step(learner, 8).norm.item()
    assert norm > 2
    averages = torch.cat([state["exp_avg"].flatten() for state in learner.optimizer.state.values()])
    assert averages.norm().item() == pytest.approx(0.1 * min(norm, clip_norm), rel=1e-4)  # after one step


class Readings(TorchDispatchMode):
    """Counts how often a tensor's value is fetched into Python: on a GPU each waits for all that is queued."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("number", "most"), [("fp32", 0), ("bf16", 0), ("fp16", 2)])
def test_only_fp16_waits_for_the_device_in_a_step(number, most):
    learner = make_learner(number=number, clip_norm=1.0)
    one_step(learner, 8)
    with Readings() as readings:
        one_step(learner, 8, step=1)
    assert readings.count == most


def snapshot(learner):
    return {
        "weights": flat(learner.model),
        "statistics": torch.cat([buffer.flatten().float() for buffer in learner.model.buffers()]),
        "average": torch.cat([value.flatten().float() for value in learner.ema.model.state_dict().values()]),
        "moments": torch.cat([value.flatten() for s in learner.optimizer.state.values() for value in s.values()])
        if learner.optimizer.state
        else torch.empty(0),
        "averaged": torch.tensor(learner.ema.updates),
        "scale": torch.tensor(learner.scaler.get_scale()),
    }


class Hostile(Loader):
    """Reads what a loader reads, but for one image of one rank's step `at`, which fp16 cannot hold."""

    def watch(self, learner, at):
        self.learner, self.at, self.states = learner, at, []
        return self

    def epoch(self, epoch, start_step=0):
        for batch in super().epoch(epoch, start_step):
            self.states.append(snapshot(self.learner))
            if batch.step == self.at and self.rank == self.world_size - 1:
                batch.images_NCHW[0] = 1e30
            yield batch


OPTIONS = (
    {"optimizer": "adamw"},
    {"optimizer": "adamw", "clip_norm": 0.5, "micro_batches": 2},
    {"optimizer": "sgd", "clip_norm": 0.5},
)
HOSTILE = 3


def with_a_hostile_image(ranks, path):
    manifest = Manifest.read(path / "manifest.parquet")
    for i, options in enumerate(OPTIONS):
        learner = make_learner(ranks, number="fp16", norms=True, ema=True, **options)
        loader = Hostile(
            manifest.train, size=32, global_batch=8, augment=Augment(), rank=ranks.rank, world_size=ranks.world_size
        ).watch(learner, HOSTILE)
        (phase,) = fine_tune(base_lr=1e-3, groups=3, steps_per_epoch=loader.steps, epochs=1, freeze_epochs=0)
        journal = Journal(path / f"journal{i}.jsonl" if ranks.rank == 0 else None)
        *_, end = train_epoch(learner, loader, phase, Position(epoch=0, base_lr=1e-3), seed=0, journal=journal)
        journal.close()
        torch.save(
            ([*loader.states, snapshot(learner)], end.updates, end.loss_sum / end.losses), path / f"{i}-{ranks.rank}.pt"
        )


def same(a, b, names):
    return [name for name in names if not torch.equal(a[name], b[name])] == []


def test_an_overflow_on_one_rank_skips_the_step_on_both_and_leaves_no_trace(small_set, tmp_path):
    scan(small_set).write(tmp_path / "manifest.parquet")
    on_ranks(2, with_a_hostile_image, tmp_path)
    for i in range(len(OPTIONS)):
        (one, updates, loss), (other, *its) = (torch.load(tmp_path / f"{i}-{rank}.pt") for rank in range(2))
        steps = 53 // 8
        assert len(one) == len(other) == steps + 1
        assert [updates, loss] == its
        assert updates == steps - 1
        assert np.isfinite(loss)
        for a, b in zip(one, other, strict=True):
            assert same(a, b, ["weights", "moments", "averaged", "scale"])
        for states in (one, other):
            before, after = states[HOSTILE], states[HOSTILE + 1]
            assert same(before, after, ["weights", "moments", "averaged", "statistics", "average"])
            assert after["scale"] == before["scale"] / 2 == 128
            for step in {*range(steps)} - {HOSTILE}:
                before, after = states[step], states[step + 1]
                assert before["scale"] == after["scale"]
                assert after["averaged"] == before["averaged"] + 1
                assert all(not torch.equal(before[name], after[name]) for name in ("weights", "statistics", "average"))
            assert all(value.isfinite().all() for value in states[-1].values())
        events = read(tmp_path / f"journal{i}.jsonl")
        assert [event["loss"] is None for event in events] == [step == HOSTILE for step in range(steps)]
        assert [event.get("skipped", False) for event in events] == [step == HOSTILE for step in range(steps)]
        assert events[HOSTILE]["lr"] == events[HOSTILE + 1]["lr"] != events[HOSTILE + 2]["lr"]
        assert loss == pytest.approx(np.mean([event["loss"] for event in events if event["loss"] is not None]))


@pytest.mark.parametrize(("batch", "told"), [(3, "at step 8 of epoch 0"), (8, "No loss of epoch 0")])
def test_fp16_that_always_overflows_ends_the_run_in_words(small_set, tmp_path, batch, told):
    learner = make_learner(number="fp16")
    with torch.no_grad():
        learner.model.head[1].weight.fill_(1e7)
    loader = Loader(scan(small_set).train, size=32, global_batch=batch, augment=Augment())
    (phase,) = fine_tune(base_lr=1e-3, groups=3, steps_per_epoch=loader.steps, epochs=1, freeze_epochs=0)
    journal = Journal(Path(tmp_path, "journal.jsonl"))
    with pytest.raises(UserError, match=f"{told}.*--precision bf16 or fp32"):
        list(train_epoch(learner, loader, phase, Position(epoch=0, base_lr=1e-3), seed=0, journal=journal))
    journal.close()
    events = read(tmp_path / "journal.jsonl")
    assert len(events) == min(9, loader.steps)  # 256 / 2^9 is less than 1
    assert all(event["skipped"] and event["loss"] is None for event in events)


def two_phases(ranks, path, **options):
    """Frozen and whole, each judged: losses, verdicts, names, and how many graphs were compiled."""
    learner = make_learner(ranks, optimizer="sgd", ema=True, **options)
    valid = Loader(
        Manifest.read(path / "manifest.parquet").valid,
        size=32,
        global_batch=4 * ranks.world_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    losses, verdicts = [], []
    for phase, first_group in enumerate((-1, 0)):
        learner.train(first_group=first_group)
        for step in range(2 * phase, 2 * phase + 2):
            losses.append(one_step(learner, 8, step).loss.item())
            learner.ema.update(learner.model)
        verdicts.append(judge(learner, valid).losses_N)
    return {
        "losses": torch.tensor(losses),
        "verdicts": torch.tensor(np.stack(verdicts)),
        "names": list(checkpoint.tensors(learner.model)) + list(checkpoint.tensors(learner.judged)),
        "graphs": counters["stats"]["unique_graphs"],
    }


def compiled(ranks, path):
    torch.save(two_phases(ranks, path, compile=True), path / f"rank{ranks.rank}.pt")


def test_a_compiled_network_learns_and_judges_the_same_and_keeps_its_names(small_set, tmp_path, monkeypatch):
    try:
        compiling.check(ALONE.device)
    except UserError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # as few processes as a network so small needs
    scan(small_set).write(tmp_path / "manifest.parquet")
    plain = two_phases(ALONE, tmp_path)
    assert plain["graphs"] == 0
    on_ranks(2, compiled, tmp_path)
    for rank in range(2):
        ours = torch.load(tmp_path / f"rank{rank}.pt")
        assert ours["graphs"] >= 3  # to train frozen, to train all, to judge
        assert torch.allclose(ours["losses"], plain["losses"], rtol=1e-5)
        assert torch.allclose(ours["verdicts"], plain["verdicts"], rtol=1e-5)
        assert ours["names"] == plain["names"]


def test_what_the_compiler_needs_is_looked_for(monkeypatch, tmp_path):
    for name in ("g++", "gcc", "ccache"):
        (tmp_path / name).touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compiling.sysconfig, "get_path", lambda _: str(tmp_path))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    compiling.check(cpu)
    (tmp_path / "g++").unlink()
    (tmp_path / "gcc").unlink()
    with pytest.raises(UserError, match=r"--compile needs a C\+\+ compiler \(g\+\+\), which .*leave --compile out"):
        compiling.check(cpu)
    with pytest.raises(UserError, match=r"--compile needs .*a C compiler \(gcc\), which"):
        compiling.check(cuda)
    monkeypatch.setenv("CXX", "ccache clang++")
    compiling.check(cpu)
    (tmp_path / "Python.h").unlink()
    with pytest.raises(UserError, match="--compile needs Python's headers"):
        compiling.check(cpu)
