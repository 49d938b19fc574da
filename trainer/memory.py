"""How much memory there is, which batch fits into it, and whether an error means that it ran out.

What a worker takes is close to a line in the images that it computes at once: a base (libraries, weights, gradients,
the optimiser's state) and a part for each image (activations). `rehearsal` measures points of that line.
"""

from __future__ import annotations

import errno
import math
import resource
import traceback
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.errors import UserError, first_line

MEMORY, ADDRESSES, GPU = "memory", "address space", "GPU memory"

STEPS = 20  # of an epoch, that a batch chosen for memory must leave: fewer teach little
FEW, MOST = 8, 1024  # images a worker: below, batch-norm is noisy; above, a larger batch is no faster
ROUND = 8
SLACK = 1.1  # an image may take so much more than was measured: memory is given out in pieces
KEPT = 0.05  # share of all memory that stays free: Ray ends workers when 95% are in use
ENGINE, ENGINE_WORKER = int(1.4e9), int(0.2e9)  # bytes of Ray itself, and of its libraries in each worker
NCCL = int(0.5e9)  # bytes of nccl's buffers on each GPU


class OutOfMemoryError(UserError):
    """The memory ran out while a model learned; what the message lacks is advice (see `rehearsal.advice`)."""


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Most that one worker took while it learned from so many images at once."""

    images: int
    bytes: Mapping[str, int]
    """By kind of memory: of the machine, its address space, of the GPU."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """bytes = base + image * images."""

    base: float
    image: float

    def at(self, images: int) -> float:
        return self.base + self.image * images

    def images(self, room: float) -> int:
        """Most images that fit into `room` bytes; 0 where the base alone does not."""
        if self.base > room:
            return 0
        return int((room - self.base) / self.image) if self.image > 0 else MOST


def fit(images_K: Sequence[int], bytes_K: Sequence[int]) -> Line:
    """The line of least squares through K points, K at least 2, raised until none lies above it."""
    images, taken = np.asarray(images_K, np.float64), np.asarray(bytes_K, np.float64)
    centred = images - images.mean()
    image = max(0.0, float(centred @ taken / (centred @ centred)))
    return Line(base=float((taken - image * images).max()), image=image)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a batch may be, memory aside; images over all workers."""

    unit: int
    """It is a multiple of this: two images for each worker (batch-norm; pairs to mix), whole groups of repeats."""
    most: int
    """And at most this, a multiple of `unit`."""
    reason: str
    """Why not more."""

    def round(self, batch: int) -> int:
        """The nearest batch below: a multiple of 8 as well, where that is not 0; 0 where there is none."""
        rounder = math.lcm(self.unit, ROUND)
        return batch // rounder * rounder or batch // self.unit * self.unit


def bounds(count: int, workers: int, repeats: int = 1) -> Bounds:
    """The bounds for a training set of `count` images: 20 steps an epoch, unless that is below 8 images a worker.

    Raises:
        UserError: the set is smaller than the smallest batch.
    """
    unit = math.lcm(2 * workers, repeats)
    if count < unit:
        raise UserError(
            f"--batch auto: a batch for {workers} workers has {unit} images or more, and there are {count} to train "
            "on. Choose fewer --workers, or train on more images."
        )
    steps, few, most = count // STEPS, min(FEW * workers, count), MOST * workers
    limits = {
        f"at most {MOST} images a worker": most,
        f"at least {STEPS} steps an epoch": steps,
    }
    reason, limit = min(limits.items(), key=lambda item: item[1])
    if limit < few:
        reason, limit = f"at least {FEW} images a worker" if few < count else "no more images to train on", few
    return Bounds(unit=unit, most=max(unit, limit // unit * unit), reason=reason)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The batch to train with."""

    batch: int
    """Over all workers; 0 where not even the smallest fits."""
    reason: str
    """What bounds it."""
    images: int
    """Most that one worker holds, were it for memory alone."""
    kind: str
    """The kind of memory that is scarcest."""
    room: float
    """Bytes of it for one worker."""
    peaks: Sequence[Peak]
    """What was measured."""
    line: Line | None
    """Of the scarcest kind; None where there were too few points."""

    def words(self, workers: int, count: int) -> str:
        """The choice in one line, for `count` images to train on."""
        each = f", {self.batch / workers:g} a worker" if workers > 1 else ""
        sizes = [str(peak.images) for peak in self.peaks]
        tried = " and ".join(filter(None, [", ".join(sizes[:-1]), *sizes[-1:]]))
        line = self.line
        cost = "" if line is None else f" took {in_words(line.base)} and {in_words(line.image)} an image;"
        return (
            f"{self.batch}{each}, {count // self.batch} steps an epoch; bound by: {self.reason}. Two steps with "
            f"{tried} images were tried:{cost} {in_words(self.room)} of {self.kind} for each worker hold "
            f"{self.images:,} images"
        )


def choose(peaks: Sequence[Peak], room: Mapping[str, float], workers: int, allowed: Bounds, *, failed: bool) -> Choice:
    """The largest batch that is allowed and fits into the `room` of each worker, bytes by kind of memory.

    Args:
        peaks: measured, by rising number of images; may be empty.
        failed: the memory ran out at the next larger number of images: nothing beyond those measured is trusted.
    """
    images = max((p.images for p in peaks if all(p.bytes[k] <= room[k] for k in room)), default=0)
    kind, line = min(room, key=lambda k: room[k]), None
    if len(peaks) > 1:
        lines = {k: fit([p.images for p in peaks], [p.bytes[k] for p in peaks]) for k in room}
        fits = {k: Line(base=line.base, image=SLACK * line.image).images(room[k]) for k, line in lines.items()}
        kind = min(fits, key=lambda k: fits[k])
        line = lines[kind]
        if not failed:
            images = max(images, fits[kind])
    return Choice(
        batch=allowed.round(min(images * workers, allowed.most)),
        reason=allowed.reason if images * workers >= allowed.most else f"the {kind}",
        images=images,
        kind=kind,
        room=room[kind],
        peaks=peaks,
        line=line,
    )


def room(
    workers: int, machine: Sequence[tuple[int, int]], *, engine: bool, gpu: tuple[int, int] | None = None
) -> dict[str, float]:
    """Bytes that each of `workers` on this machine may take, by kind of memory.

    Args:
        machine: bytes free and in all, as `machine()` tells them.
        engine: Ray starts them, and takes memory itself.
        gpu: bytes free and in all on the fullest of their GPUs.
    """
    kept = ENGINE if engine else 0
    each = ENGINE_WORKER if engine else 0
    free = min(free - KEPT * total for free, total in machine)
    rooms = {MEMORY: (free - kept) / workers - each}
    addresses = resource.getrlimit(resource.RLIMIT_AS)[0]
    if addresses != resource.RLIM_INFINITY:
        rooms[ADDRESSES] = addresses * (1 - KEPT)
    if gpu is not None:
        free, total = gpu
        rooms[GPU] = free - KEPT * total - (NCCL if workers > 1 else 0)
    return rooms


def machine(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> list[tuple[int, int]]:
    """(free, total) bytes of this machine and of each control group around this process that has a limit.

    Memory that holds nothing but files' contents counts as free: the kernel takes it back when it is asked for.
    """
    values = _table(proc / "meminfo")
    total = values["MemTotal"]
    found = [(values["MemAvailable"], total)]
    for line in _text(proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            hierarchy, limit, used, inactive = groups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            hierarchy, inactive = groups / "memory", "total_inactive_file"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # In a container the path may be that of the host, and what is mounted the group itself.
        inner = hierarchy / path.strip("/")
        for folder in (inner, *(parent for parent in inner.parents if parent.is_relative_to(hierarchy))):
            most, now = _text(folder / limit).strip(), _text(folder / used).strip()
            if most.isdecimal() and now.isdecimal() and int(most) < total:
                files = _table(folder / "memory.stat").get(inactive, 0)
                found.append((int(most) - int(now) + files, int(most)))
    return found


def in_words(count: float) -> str:
    """Bytes, in gigabytes or megabytes."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def taken(proc: Path = Path("/proc")) -> dict[str, int]:
    """Most bytes that this process has taken so far: of memory since `forget`, of address space ever."""
    values = _table(proc / "self/status")
    return {MEMORY: values["VmHWM"], ADDRESSES: values["VmPeak"]}


def forget() -> None:
    """Begin anew to note the most memory that this process takes (proc(5), `clear_refs`), where the kernel can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def killed(proc: Path = Path("/proc")) -> int:
    """How many processes the kernel has ended for want of memory since the machine started."""
    return _table(proc / "vmstat").get("oom_kill", 0)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _table(path: Path) -> dict[str, int]:
    """The numbers of a file of the kernel's with a name and a number a line, in bytes where it says kB."""
    table = {}
    for line in _text(path).splitlines():
        words = line.replace(":", " ").split()
        if len(words) > 1 and words[1].isdecimal():
            table[words[0]] = int(words[1]) * (1024 if words[2:] == ["kB"] else 1)
    return table


# How allocators say it: torch's on GPUs and on the CPU, C++, DALI, CUDA's libraries, the system.
_SAID = (
    "DefaultCPUAllocator",
    "bad_alloc",
    "out of memory",
    "OUT_OF_MEMORY",
    "ALLOC_FAILED",
    "Cannot allocate memory",
)


def ran_out(error: BaseException) -> bool:
    """Whether the error, or what it came from, means that there was no memory left."""
    met: BaseException | None = error
    while met is not None:
        if isinstance(met, (MemoryError, OutOfMemoryError)):
            return True
        if isinstance(met, OSError) and met.errno == errno.ENOMEM:
            return True
        if isinstance(met, RuntimeError) and any(words in str(met) for words in _SAID):
            return True
        met = met.__cause__ or met.__context__
    return False


@contextmanager
def told(rank: int) -> Generator[None]:
    """Turn an error that means that the memory ran out into `OutOfMemoryError`; let go of what the failed step held."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemoryError) or not ran_out(error):
            raise
        import torch  # not before: who only asks `killed` does without

        words = first_line(error)
        traceback.clear_frames(error.__traceback__)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        raise OutOfMemoryError(f"The memory of worker {rank} ran out ({words}).") from None
