"""Rehearsals of a run: two steps of it, to measure how much memory a batch takes.

A rehearsal is the run itself (`worker.run`) on an excerpt of its images, with the same model, optimiser, precision and
size, everything learning: whatever takes memory in the run takes it here. It happens in another process, so that the
one that asks keeps nothing of it, and so that the kernel, where memory runs out after all, ends that process alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipelines.errors import UserError
from pipelines.manifest import Manifest
from trainer import allocation, memory
from trainer.config import TrainConfig
from trainer.memory import Bounds, Choice, Peak
from trainer.ranks import Ranks
from trainer.run_folder import RunFolder

STEPS = 2  # the optimiser's state is there from the second on
SIZES = 8, 128  # images of the largest rehearsal


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What rehearsals told."""

    peaks: list[Peak]
    """By rising number of images, as far as the memory sufficed."""
    failed: bool
    """It did not for the last."""
    gpu: tuple[int, int] | None
    """Bytes free and in all on the fullest GPU, before."""


def choose(config: TrainConfig, manifest: Manifest, initial: Path, allowed: Bounds) -> Choice:
    """The largest batch that is allowed and fits.

    On GPUs, whose libraries take more or less as they choose, that very batch is rehearsed too, and halved until it
    passes.

    Args:
        config: with the number of workers and the precision resolved.
        initial: the weights to begin with.

    Raises:
        UserError: not even the smallest batch fits.
    """
    workers = max(1, config.crew.most)
    sizes = rehearsed(max(config.size_of_epochs), -(-allowed.most // workers))
    # Two images come first, and count only where no more fit: what a process takes once and keeps is not of the images.
    measured = measure(config, manifest, initial, [2, *sizes])
    room = memory.room(workers, memory.machine(), engine=config.crew.most > 0, gpu=measured.gpu)
    # DDP keeps the gradients from step to step, and the range test a copy of the weights; rehearsals do neither.
    more = initial.stat().st_size * (2 if workers > 1 else 1)
    trusted = measured.peaks[1:] or measured.peaks
    peaks = [Peak(images=p.images, bytes={k: n + more for k, n in p.bytes.items()}) for p in trusted]
    found = memory.choose(peaks, room, workers, allowed, failed=measured.failed)
    while measured.gpu and found.batch and measure(config, manifest, initial, [-(-found.batch // workers)]).failed:
        found = dataclasses.replace(found, batch=allowed.round(found.batch // 2), reason=f"the {memory.GPU}")
    if found.batch == 0:
        raise UserError(
            f"Not even --batch {allowed.unit} at --size {config.size} fits: "
            + (f"a worker takes {memory.in_words(peaks[0].bytes[found.kind])}, " if peaks else "two steps failed, ")
            + f"and each of {workers} may take {memory.in_words(found.room)} of {found.kind}. Choose a smaller --size, "
            "fewer --workers or a smaller --model, or end what else takes memory."
        )
    return found


def advice(config: TrainConfig, manifest: Manifest, initial: Path) -> str:
    """What to do where the memory ran out with `config`, in words: the batch that fits, and what else there is."""
    workers = max(1, config.crew.most)
    tried = f"That was with --batch {config.batch} at --size {config.size} on {workers} worker{'s'[: workers - 1]}."
    unit = math.lcm(2 * workers, config.repeats)
    most = config.global_batch * 3 // 4 // unit * unit  # a little less would soon run out too
    if most == 0:
        return f"{tried} Choose a smaller --size, fewer --workers or a smaller --model."
    try:
        found = choose(config, manifest, initial, Bounds(unit=unit, most=most, reason="it ran out with more"))
    except UserError as error:
        return f"{tried} {error}"
    return (
        f"{tried} Choose --batch {found.batch}, which fits; or keep the batch and give --micro-batch "
        f"{max(2, found.batch // workers // 2)}, the most images that a worker then computes at once; or choose a "
        "smaller --size."
    )


def rehearsed(size: int, most: int) -> list[int]:
    """Numbers of images to rehearse with, at most `most`: enough that they, and not noise, make the difference.

    The smaller the images, the more of them: 32 of 160 pixels, with a half and a quarter of that.
    """
    largest = min(max(SIZES[0], min(SIZES[1], round(32 * (160 / size) ** 2))), most)
    return sorted({max(2, largest // part // 2 * 2) for part in (4, 2, 1)})


def measure(config: TrainConfig, manifest: Manifest, initial: Path, sizes: Sequence[int]) -> Measured:
    """Rehearse with each of `sizes` images in turn, in one other process, until the memory does not suffice.

    Raises:
        UserError: a rehearsal ended with another error.
    """
    workers = max(1, config.crew.most)
    alike = allocation.environment() if config.crew.most and not torch.cuda.is_available() else {}
    gpus = min(workers, torch.cuda.device_count())
    config = dataclasses.replace(
        config,
        workers=0,
        address=None,
        threads=config.threads or max(1, len(os.sched_getaffinity(0)) // workers),
        schedule="one-cycle",
        epochs=1,
        freeze_epochs=0,
        lr=1e-6,
        lr_choice="balanced",
        sizes=None,
        size=max(config.size_of_epochs),
        subset=1.0,
        repeats=1,
        sampling="each",
        class_weights="none",
        cache="off",
        cache_limit=None,
        cache_keep=False,
    )
    with tempfile.TemporaryDirectory(prefix="onewarp-") as scratch:
        folders = []
        for i, images in enumerate(sizes):
            folder = RunFolder(Path(scratch) / f"{i}")
            folder.path.mkdir()
            folder.initial.symlink_to(initial.absolute())
            folder.figure("show_batch").touch()  # drawing takes longer than the steps
            excerpt(manifest, images).write(folder.manifest)
            folder.config.write_text(json.dumps(dataclasses.replace(config, batch=images).as_dict()))
            folders.append(str(folder.path))
        told = Path(scratch) / "told.jsonl"
        done = subprocess.run(
            [sys.executable, "-P", "-m", "trainer.rehearsal", str(told), str(gpus), *folders],
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, **alike, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            check=False,
        )
        lines = [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
    # Ended by a signal: by the kernel, or by an allocator that gives up.
    ended = {"ran out": done.returncode < 0, "error": None} | (lines[-1] if lines and "error" in lines[-1] else {})
    if not ended["ran out"] and done.returncode != 0:
        words = ended["error"] or (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"--batch auto: two steps were tried, and ended with: {words} Mend that, or give a number.")
    peaks = [Peak(images=line["images"], bytes=line["bytes"]) for line in lines if "bytes" in line]
    gpu = next(((line["free"], line["total"]) for line in lines if "free" in line), None)
    return Measured(peaks=peaks, failed=len(peaks) < len(sizes), gpu=gpu)


def excerpt(manifest: Manifest, images: int) -> Manifest:
    """A manifest of two batches of `images` to train on and one to validate: the images of the most pixels.

    Of a store it is the first images: there, ids are places.
    """
    count = (STEPS + 1) * images
    if manifest.store is None:
        pixels_N = manifest.heights_N.astype(np.int64) * manifest.widths_N
        rows_N = np.resize(np.argsort(-pixels_N, kind="stable")[:count], count)
    else:
        rows_N = np.arange(min(count, len(manifest.paths)))
    valid_N = np.arange(len(rows_N)) >= len(rows_N) - max(1, len(rows_N) // (STEPS + 1))
    return dataclasses.replace(manifest.part(rows_N), valid_N=valid_N)


class _EnoughError(Exception):
    """The rehearsal has shown what it was for: it does not go on to the figures of a finished run."""


def _enough(metrics: dict[str, float]) -> None:
    raise _EnoughError


def main(told: Path, gpus: int, paths: Sequence[Path]) -> None:
    """Rehearse in the folders `paths` in turn, telling each peak in a line of the file `told`."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # the kernel's first choice, before the one that asks
    from trainer.worker import run

    def tell(**values: object) -> None:
        with told.open("a") as file:
            file.write(json.dumps(values) + "\n")

    before = 0
    if gpus:
        before = torch.cuda.mem_get_info(0)[0]
        free, total = min(torch.cuda.mem_get_info(device) for device in range(gpus))
        tell(free=free, total=total)
    for path in paths:
        gc.collect()
        memory.forget()
        if gpus:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            run(path, "train", Ranks(), report=_enough)
        except _EnoughError:
            pass
        except UserError as error:
            tell(error=str(error), **{"ran out": isinstance(error, memory.OutOfMemoryError)})
            sys.exit(2)
        taken = memory.taken()
        if gpus:
            others = before - torch.cuda.mem_get_info(0)[0] - torch.cuda.memory_reserved()  # DALI, cuDNN
            taken[memory.GPU] = torch.cuda.max_memory_reserved() + max(0, others)
        tell(images=RunFolder(path).read_config().batch, bytes=taken)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), [Path(word) for word in sys.argv[3:]])
