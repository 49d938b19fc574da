"""A trained model over a set of images, on any number of workers: each image's best classes.

The workers share nothing while they work. Each takes its part of every batch, keeps for each image a few numbers and
not its row of all classes, and leaves them in a file; this process puts the files together, and counts that each image
stands in them once.

Test-time augmentation is fastai's `Learner.tta`: the mean of the probabilities over `tta` epochs of training
augmentation, a = mean_i p_i, and those of the plain image, p, are blended: lerp(a, p, 0.25) = 0.75 a + 0.25 p. What
an image's epoch does to it is drawn from (seed, epoch, row), so it is the same on any number of workers.
"""

from __future__ import annotations

import pickle
import tempfile
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from pipelines.errors import UserError
from pipelines.loader import Loader
from pipelines.manifest import Samples
from pipelines.plan import TEST_TIME_EPOCH, rank_slice
from pipelines.standin import Spoiled
from trainer import journal
from trainer.bar import counted
from trainer.crew import Crew
from trainer.journal import Journal
from trainer.metrics import places
from trainer.predictions import BEST
from trainer.ranks import Ranks, Report
from trainer.starting import default_workers, launcher
from trainer.trained import Trained

PLAIN_SHARE = 0.25  # fastai's beta
CELLS = 2**24  # probabilities that a worker holds at a time: 128 MB
FEW = 256  # readings that this process has done before others would have started

TASK, TOLD = "task.pickle", "told.jsonl"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the workers are to do."""

    trained: Trained
    samples: Samples
    tta: int
    """Augmented epochs."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the model says of N of a set's images, in the order of the set. K = min(5, C)."""

    positions_N: np.ndarray
    """Their places in the set: all of them, but those whose files have gone bad since the scan."""
    best_NK: np.ndarray
    """The most probable classes, int64, most probable first; see `best`."""
    probabilities_NK: np.ndarray
    """Their probabilities, float64."""
    losses_N: np.ndarray | None
    """Nats; see `Trained.loss`. None where the set has no labels."""
    places_N: np.ndarray | None
    """Classes more probable than the true one."""
    spoiled: tuple[Spoiled, ...]
    """The images left out."""


@contextmanager
def scratch_in(folder: Path, flag: str) -> Generator[Path]:
    """A folder for the workers' files in `folder`, gone at the end: on whatever disk the results go to.

    Raises:
        UserError: nothing can be written there; better before the images are read than after.
    """
    try:
        scratch = tempfile.TemporaryDirectory(prefix=".onewarp-", dir=folder)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be written ({error.strerror}). Choose another {flag}.") from None
    with scratch as path:
        yield Path(path)


def apply(
    trained: Trained, samples: Samples, *, tta: int, workers: int | None, scratch: Path, console: Console
) -> Scores:
    """Read all `samples` on `workers` processes, behind a bar, and put together what they found.

    Raises:
        UserError: the weights do not fit, or no image can be read any more.
    """
    if workers is None:
        workers = 0 if len(samples) * (1 + tta) <= FEW else default_workers()
    (scratch / TASK).write_bytes(pickle.dumps(Task(trained=trained, samples=samples, tta=tta)))
    with counted(console, f"Applying {trained.path.name}") as progress, _following(scratch / TOLD, progress):
        crew = Crew(workers, workers)
        with launcher(crew)(partial(score, scratch), crew) as wait:
            wait()
    parts: list[Scores] = [pickle.loads(file.read_bytes()) for file in sorted(scratch.glob("part-*.pickle"))]
    return _together(parts, samples)


def score(scratch: Path, ranks: Ranks, report: Report) -> None:
    """One worker's part: what `scratch` holds as a task, written to `scratch` as `Scores`."""
    torch.set_num_threads(ranks.cores)
    task: Task = pickle.loads((scratch / TASK).read_bytes())
    told = Journal(scratch / TOLD if ranks.rank == 0 else None)
    part = _part(task, ranks, lambda done, total: told.write("read", done=done, total=total))
    told.close()
    (scratch / f"part-{ranks.rank:05d}.pickle").write_bytes(pickle.dumps(part))


def _part(task: Task, ranks: Ranks, tell: Callable[[int, int], None]) -> Scores:
    trained, samples, device = task.trained, task.samples, ranks.device
    model, numbers, loss = trained.model(ranks), trained.precision(ranks), trained.loss()
    numbers.set_tf32()
    labelled, classes = bool((samples.labels_N >= 0).all()), len(trained.classes)
    plain = trained.loader(samples, ranks, device=device)
    views: list[tuple[Loader, int, float]] = [(plain, 0, PLAIN_SHARE if task.tta else 1.0)]
    if task.tta:
        augmented = trained.loader(samples, ranks, device=device, augmented=True)
        views += [(augmented, TEST_TIME_EPOCH + i, (1 - PLAIN_SHARE) / task.tta) for i in range(task.tta)]

    parts: list[tuple[np.ndarray, ...]] = []
    done = 0
    # A block of steps at a time, each through all views, so that the table of all classes stays small.
    for steps in _blocks(plain, rows=max(1, CELLS // classes)):
        planned = [rank_slice(plain.plan.batch(0, step), ranks.rank, ranks.world_size) for step in steps]
        positions_R = np.concatenate(planned)
        ids_R = torch.from_numpy(samples.ids_N[positions_R])  # ascending, as those of the set
        table_RC = torch.zeros(len(ids_R), classes, dtype=torch.float64, device=device)
        seen_R = torch.zeros(len(ids_R), dtype=torch.int64)
        for loader, epoch, share in views:
            with torch.inference_mode():
                for batch in takewhile(lambda batch: batch.step < steps.stop, loader.epoch(epoch, steps.start)):  # noqa: B023
                    with numbers.autocast():
                        logits_NC = model(batch.images_NCHW)
                    rows_N = torch.searchsorted(ids_R, batch.ids_N)
                    seen_R[rows_N] += 1
                    table_RC[rows_N.to(device)] += share * loss.probabilities(logits_NC.double())
                    tell(done + batch.step - steps.start + 1, plain.steps * len(views))
            done += len(steps)
        whole_R = seen_R == len(views)  # a file that has gone bad on the way is no longer read
        table_NC, positions_N = table_RC[whole_R.to(device)], positions_R[whole_R.numpy()]
        columns = [*best(table_NC)]
        if labelled:
            labels_N = torch.from_numpy(samples.labels_N[positions_N]).to(device)
            columns += [loss.each(loss.logits(table_NC), labels_N), places(table_NC, labels_N)]
        parts.append((positions_N, *(column.cpu().numpy() for column in columns)))
    positions_N, best_NK, probabilities_NK, *judged = (np.concatenate(column) for column in zip(*parts, strict=True))
    losses_N, places_N = judged or (None, None)
    return Scores(
        positions_N=positions_N,
        best_NK=best_NK,
        probabilities_NK=probabilities_NK,
        losses_N=losses_N,
        places_N=places_N,
        spoiled=tuple({bad.id: bad for loader, _, _ in views for bad in loader.spoiled}.values()),
    )


def best(probabilities_NC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The K = min(5, C) most probable classes, int64 [N, K], most probable first, and their probabilities, [N, K].

    Of equal probabilities the lower class comes first, on any device.
    """
    sorted_NC, order_NC = probabilities_NC.sort(dim=1, descending=True, stable=True)
    return order_NC[:, :BEST], sorted_NC[:, :BEST]


def _blocks(loader: Loader, rows: int) -> list[range]:
    """The steps of an epoch in blocks, in each of which a rank has about `rows` samples."""
    length = max(1, rows * loader.world_size // loader.plan.global_batch)
    return [range(start, min(start + length, loader.steps)) for start in range(0, loader.steps, length)]


def _together(parts: list[Scores], samples: Samples) -> Scores:
    """The workers' parts as one, in the order of the set; each image is in one of them, or told to be bad."""
    spoiled = {bad.id: bad for part in parts for bad in part.spoiled}
    positions_N = np.concatenate([part.positions_N for part in parts])
    order_N = np.argsort(positions_N, kind="stable")
    bad_N = np.isin(samples.ids_N, list(spoiled))
    if not np.array_equal(positions_N[order_N], np.flatnonzero(~bad_N)):
        times_N = np.bincount(positions_N, minlength=len(samples))
        wrong = np.flatnonzero(times_N != ~bad_N)[0]
        raise RuntimeError(f"{samples.paths[wrong]!r} was read {times_N[wrong]} times")
    if not len(positions_N):
        first = next(iter(spoiled.values()))
        raise UserError(
            f"None of the {len(samples)} images under {str(samples.root)!r} can be read any more; {first.path!r}: "
            f"{first.reason}. Put the images back, then repeat the command."
        )

    def column(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])[order_N]

    labelled = parts[0].losses_N is not None
    return Scores(
        positions_N=positions_N[order_N],
        best_NK=column("best_NK"),
        probabilities_NK=column("probabilities_NK"),
        losses_N=column("losses_N") if labelled else None,
        places_N=column("places_N") if labelled else None,
        spoiled=tuple(spoiled[id] for id in sorted(spoiled)),
    )


@contextmanager
def _following(told: Path, progress: Callable[[int, int], None]) -> Generator[None]:
    """Move a bar by what the first worker tells, until the end."""
    stop = threading.Event()

    def follow() -> None:
        for event in journal.follow(told, stop):
            progress(event["done"], event["total"])

    reader = threading.Thread(target=follow)
    reader.start()
    try:
        yield
    finally:
        stop.set()
        reader.join()
