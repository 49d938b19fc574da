"""Saving a run and taking it up again: a checkpoint is there whole or not at all, and nothing is ever unpickled.

A checkpoint is a folder: the tensors of model, optimiser and average in safetensors, what is no tensor in JSON, and
last the size and SHA-256 of each file. Order, augmentation, mixing and dropout are functions of (seed, epoch, step), so
there is no random state to save.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch

from pipelines.errors import UserError, first_line
from trainer.best import Tensors, keep
from trainer.journal import Journal
from trainer.loop import Learner
from trainer.position import Position
from trainer.ranks import Ranks

STATISTICS = ("running_mean", "running_var")
WARN_EVERY = 60.0  # seconds between complaints about a storage that takes nothing
WAITING = 3  # checkpoints that a slow storage keeps in memory
PATIENCE = 5.0  # seconds that a step waits for a slow storage
CHECKSUMS = "checksums.json"
READS, READ_AGAIN = 3, 5.0  # how often a storage that fails is asked, and seconds in between
LOOK = 10  # steps, at least, from one look at the clock to the next

T = TypeVar("T")


class Checkpoints:
    """The checkpoints of a run: written by a thread of rank 0 while training goes on.

    A storage that is full, gone or read-only costs checkpoints and not the run: it is told once a minute, the last
    whole checkpoint stays, and the next one is tried in its turn.

    Args:
        folder: holds the checkpoints; the same on every rank.
        journal: told of each that is written, and of what goes wrong.
        every: global batches from one to the next, between those at the end of each epoch; None: none between them.
        minutes: most time from one to the next, likewise.
        keep: how many of the newest stay.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        journal: Journal,
        *,
        every: int | None = None,
        minutes: float | None = None,
        keep: int = 2,
    ) -> None:
        self._folder, self._ranks, self._journal, self._every, self._keep = folder, ranks, journal, every, keep
        self._minutes = minutes
        self._last = 0  # global batches done at the last checkpoint
        self._looked, self._since = 0, time.monotonic()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: list[Future[None]] = []
        self._warned = -WARN_EVERY

    def due(self, done: int) -> bool:
        """Whether enough global batches, or minutes, have passed since the last checkpoint; the same on every rank.

        Every rank asks at the same steps: rank 0's clock is everybody's.
        """
        if self._every is not None and done - self._last >= self._every:
            return True
        if self._minutes is None or done - self._looked < LOOK:
            return False
        self._looked = done
        over = time.monotonic() - self._since >= 60 * self._minutes
        return self._ranks.gather([over] if self._ranks.rank == 0 else [])[0]

    def save(
        self, learner: Learner, position: Position, done: int, *, best: Path | None = None, needed: bool = True
    ) -> None:
        """Write where the run stands, `done` global batches after its beginning; every rank calls it at the same step.

        Returns when the state is copied, and the checkpoint before is written; but where the storage takes more than
        `PATIENCE` for that, some checkpoints wait while training goes on.

        Args:
            best: a file that takes the judged weights too, once the checkpoint is there (see `best.taken_up`).
            needed: else it is left out where it would have to wait.
        """
        self._last, self._looked, self._since = done, done, time.monotonic()
        files, numbers = snapshot(learner)
        if self._ranks.rank:
            return
        written, waiting = wait(self._writing, timeout=PATIENCE)
        for writing in written:
            writing.result()  # what the thread could not handle is raised here
        self._writing = list(waiting)
        if self._writing and not needed:
            self._warn(f"{self._folder.parent} has not taken the last checkpoint yet, so there is none of step {done}")
            return
        if len(self._writing) > WAITING:
            self._writing.pop(1).cancel()  # the oldest of those that only wait
        self._writing.append(self._thread.submit(self._write, done, files, numbers, position, best))

    def wait(self) -> None:
        """Return when the checkpoints are written, or the storage did not take them."""
        for writing in self._writing:
            if not writing.cancelled():
                writing.result()

    def load(self, learner: Learner) -> Position | None:
        """Bring the learner to where the newest whole checkpoint stands; None where there is none.

        Rank 0 chooses for all. One that is damaged is told of, set aside as `….damaged`, and the one before it serves.

        Raises:
            UserError: there are some, and none is whole; or the storage does not give what it holds.
        """
        chosen = self._ranks.gather([self._newest()] if self._ranks.rank == 0 else [])[0]
        if chosen is None:
            return None
        self._last = self._looked = int(chosen.removeprefix("step-"))
        return restore(learner, self._folder / chosen)

    def _newest(self) -> str | None:
        damaged: list[tuple[Path, str]] = []
        for found in reversed(_all(self._folder)):
            damage = self._patiently(lambda found=found: damage_of(found))
            if damage is None:
                for each, why in damaged:
                    self._set_aside(each, why)
                return found.name
            damaged.append((found, damage))
        if damaged:
            told = ", ".join(f"{each.name}: {why}" for each, why in damaged)
            raise UserError(
                f"All checkpoints in {self._folder} are damaged ({told}). Put back one that is whole, or begin anew "
                "with --restart, which keeps what is there under another name."
            )
        return None

    def _set_aside(self, damaged: Path, why: str) -> None:
        aside = damaged.with_name(f"{damaged.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        damaged.rename(aside)
        self._journal.write(
            "warning", message=f"The checkpoint {damaged.name} is damaged ({why}) and is not used; see {aside}."
        )

    def _patiently(self, read: Callable[[], T]) -> T:
        """What `read` returns; a storage that fails is asked again, as what it holds may be whole."""
        for _ in range(READS - 1):
            with suppress(OSError):
                return read()
            time.sleep(READ_AGAIN)
        try:
            return read()
        except OSError as error:
            raise UserError(
                f"{self._folder} cannot be read ({first_line(error)}). When it can, go on with the same command and "
                "the run's --name."
            ) from None

    def _write(
        self, done: int, files: dict[str, Tensors], numbers: dict[str, Any], position: Position, best: Path | None
    ) -> None:
        broken = next((name for name, value in files["model"].items() if not value.isfinite().all()), None)
        if broken is not None:
            self._warn(f"{broken} holds values that are no numbers: there is no checkpoint of step {done}")
            return
        target = self._folder / f"step-{done:08d}"
        partial = self._folder / f".{target.name}.partial"
        try:
            for left in self._folder.glob(".*.partial"):  # by a process that was killed while it wrote
                shutil.rmtree(left)
            if damage_of(target) is not None:  # one of this very step is whole where a stop came right behind it
                self._fill(partial, files, numbers | {"position": asdict(position)})
                shutil.rmtree(target, ignore_errors=True)
                partial.rename(target)
                _flush(self._folder)
            for old in _all(self._folder)[: -self._keep]:
                shutil.rmtree(old, ignore_errors=True)
            self._journal.write("checkpoint", step=done, path=f"{self._folder.name}/{target.name}")
            if best is not None and position.best is not None:
                keep(best, files.get("average", files["model"]), position.best)
        except (OSError, safetensors.SafetensorError, UserError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            self._warn(f"{self._folder.parent} takes no checkpoint or best weights ({first_line(error)})")

    def _fill(self, partial: Path, files: dict[str, Tensors], numbers: dict[str, Any]) -> None:
        """A checkpoint's files, on the disk."""
        partial.mkdir(parents=True)
        for name, tensors in files.items():
            safetensors.torch.save_file(tensors, partial / f"{name}.safetensors")
        (partial / "state.json").write_text(json.dumps(numbers))
        checksums = {file.name: _checksum(file) for file in sorted(partial.iterdir())}
        (partial / CHECKSUMS).write_text(json.dumps(checksums))
        for path in (*partial.iterdir(), partial):
            _flush(path)

    def _warn(self, message: str) -> None:
        if time.monotonic() - self._warned >= WARN_EVERY:
            self._warned = time.monotonic()
            self._journal.write("warning", message=f"{message}; training goes on.")


def snapshot(learner: Learner) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """The learner's state, as tensors on the CPU that training no longer changes, by file, and as plain values.

    Batch statistics differ from rank to rank in mid-epoch. Each rank's own are kept, so that as many ranks go on to
    the bit, and the model's file holds their mean. Every rank must call this.
    """
    models = {"model": learner.model} | ({} if learner.ema is None else {"average": learner.ema.model})
    local_V = torch.cat([torch.zeros(0), *(each.flatten().cpu() for m in models.values() for each in _statistics(m))])
    local_RV = learner.ranks.stack(local_V)
    if learner.ranks.rank:
        return {}, {}
    files = {name: tensors(model) for name, model in models.items()}
    mean_V, offset = local_RV.double().mean(dim=0).to(local_RV.dtype), 0  # what is equal on all ranks keeps its bits
    for name, model in models.items():
        for key, buffer in model.named_buffers():
            if key.endswith(STATISTICS):
                files[name][key] = mean_V[offset : offset + buffer.numel()].view(buffer.shape).clone()
                offset += buffer.numel()
    if learner.ranks.world_size > 1:
        files["ranks"] = {str(rank): local_RV[rank].clone() for rank in range(len(local_RV))}
    state = learner.optimizer.state_dict()
    groups = [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
    parts = {f"{index}": entries for index, entries in state["state"].items()}
    parts |= {f"group{index}": entries for index, entries in enumerate(groups)}  # LAMB counts its steps there
    files["optimizer"] = {
        f"{part}/{key}": _copy(value)
        for part, entries in parts.items()
        for key, value in entries.items()
        if isinstance(value, torch.Tensor)
    }
    numbers = {
        "groups": [
            {key: value for key, value in group.items() if not isinstance(value, torch.Tensor)} for group in groups
        ],
        "scaler": learner.scaler.state_dict(),
        "averaged": learner.ema and learner.ema.updates,
        "world_size": learner.ranks.world_size,
    }
    return files, numbers


def restore(learner: Learner, folder: Path) -> Position:
    """Bring the learner to the state in `folder`, on any number of ranks; see `snapshot`."""
    device = str(learner.ranks.device)

    def read(name: str) -> Tensors:
        return safetensors.torch.load_file(folder / f"{name}.safetensors", device=device)

    numbers = json.loads((folder / "state.json").read_text())
    models = [learner.model]
    learner.model.load_state_dict(read("model"))
    if learner.ema is not None:
        learner.ema.load_state_dict({"model": read("average"), "updates": numbers["averaged"]})
        models.append(learner.ema.model)
    if numbers["world_size"] == learner.ranks.world_size > 1:
        local_V, offset = read("ranks")[str(learner.ranks.rank)], 0
        for buffer in (each for model in models for each in _statistics(model)):
            buffer.copy_(local_V[offset : offset + buffer.numel()].view(buffer.shape))
            offset += buffer.numel()
    own = learner.optimizer.state_dict()["param_groups"]
    groups = [group | saved for group, saved in zip(own, numbers["groups"], strict=True)]
    parameters = [parameter for group in learner.optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, value in read("optimizer").items():
        part, _, key = name.partition("/")
        if part.startswith("group"):
            groups[int(part.removeprefix("group"))][key] = value.cpu()
            continue
        like = parameters[int(part)]
        if value.shape == like.shape:  # fused optimisers walk through memory, so it must lie as the parameter does
            value = torch.empty_like(like, dtype=value.dtype).copy_(value)
        state.setdefault(int(part), {})[key] = value
    learner.optimizer.load_state_dict({"state": state, "param_groups": groups})
    if numbers["scaler"]:  # none was needed where there is none
        learner.scaler.load_state_dict(numbers["scaler"])
    return Position.from_dict(numbers["position"])


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None where each of its files is as it was written.

    Raises:
        OSError: the storage does not say.
    """
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text())
        for name, expected in checksums.items():
            if _checksum(folder / name) != expected:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, AttributeError) as error:
        return f"{CHECKSUMS}: {first_line(error)}"
    return None


def tensors(model: torch.nn.Module) -> Tensors:
    """The model's state as safetensors wants it: contiguous, on the CPU, its own copy."""
    return {name: _copy(value) for name, value in model.state_dict().items()}


def _copy(value: torch.Tensor) -> torch.Tensor:
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _statistics(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    return (buffer for name, buffer in model.named_buffers() if name.endswith(STATISTICS))


def _checksum(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _all(folder: Path) -> list[Path]:
    """The checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".damaged") if folder.is_dir() else []
