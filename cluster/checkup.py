"""What a machine of a cluster is like, and whether a training can run on it and its mates."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import os
import platform
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.decode import DecodeError, Decoder, decoded_on_gpu
from pipelines.errors import first_line
from trainer.memory import in_words

PACKAGES = ("onewarp", "torch", "torchvision", "nvidia-dali-cuda130", "ray")
DISK, SHM, FILES, STORE, SKEW = 2e9, 60e6, 4096, 75e6, 1.0  # bytes free, bytes, descriptors, bytes, seconds
LISTED = 1000  # entries of the data's folder that machines compare
VISIBLE = 10.0  # seconds that a file may take to be seen by the others: network file systems keep listings for some


@dataclass(frozen=True, kw_only=True)
class Facts:
    """One machine, as it sees itself."""

    host: str
    versions: dict[str, str]
    data: str = ""
    """What the folder of images looks like from there; or why it does not, in `cannot_read`."""
    cannot_read: str = ""
    cannot_write: str = ""
    """Why nothing can be written into the folder of runs."""
    unseen: tuple[str, ...] = ()
    """Machines whose files in the folder of runs it does not see."""
    disk: int
    """Bytes free where temporary files lie."""
    shm: int
    """Bytes free in /dev/shm."""
    files: int
    """Most open files of a process."""
    gpus: tuple[str, ...] | None = None
    """Their names, as torch sees them; `None` where nobody looked."""
    cannot_decode: str = ""
    store: float = 0.0
    """Bytes of Ray's object store, as Ray says."""
    promised: int = 0
    """GPUs, as Ray says."""
    ahead: float = 0.0
    """Seconds that its clock is ahead of the asking machine's, at least; negative: behind."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing about one machine."""

    host: str
    what: str
    found: str
    fix: str = ""
    """What to do; empty where it is well."""


@dataclass(frozen=True, kw_only=True)
class Visit:
    """What a machine is asked to look at; its own name and those of all others come from Ray."""

    data: Path | None
    runs: Path
    name: str
    others: tuple[str, ...] = ()
    thorough: bool = True
    """Look for GPUs and decode an image, too, which takes seconds."""


def look(visit: Visit) -> Facts:
    """The machine that this runs on. Its mark, `visit.name`, stays in the folder `visit.runs` for the others."""
    data, cannot_read = _data(visit.data)
    return Facts(
        host=socket.gethostname(),
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        data=data,
        cannot_read=cannot_read,
        cannot_write=_mark(visit.runs / visit.name),
        disk=shutil.disk_usage(tempfile.gettempdir()).free,
        shm=shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0,
        files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        gpus=_gpus() if visit.thorough else None,
        cannot_decode=_decode() if visit.thorough else "",
    )


def unseen(visit: Visit, patience: float = VISIBLE) -> tuple[str, ...]:
    """Those of `visit.others` whose marks this machine does not see."""
    deadline = time.monotonic() + patience
    while True:
        try:
            there = set(os.listdir(visit.runs))
        except OSError:
            there = set()
        missing = tuple(name for name in visit.others if name not in there)
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.2)


def judge(machines: Sequence[Facts], *, data: Path | None, runs: Path) -> list[Check]:
    """Everything about every machine; the first of them is what the others are held against."""
    return [check for facts in machines for check in _judge(facts, machines[0], data, runs)]


def _judge(facts: Facts, first: Facts, data: Path | None, runs: Path) -> Iterable[Check]:
    def check(what: str, found: str, good: bool, fix: str) -> Check:
        return Check(host=facts.host, what=what, found=found, fix="" if good else fix)

    other = {name: version for name, version in facts.versions.items() if version != first.versions[name]}
    told = ", ".join(f"{name} {version}, and {first.versions[name]} on {first.host}" for name, version in other.items())
    yield check(
        "versions",
        told or f"onewarp {facts.versions['onewarp']}",
        not other,
        "install the same on each machine: one image for all, or pip with these versions",
    )
    if data is not None:
        same = not facts.cannot_read and facts.data == first.data
        yield check(
            "data",
            facts.cannot_read or facts.data,
            same,
            f"mount {data} at the same path on each machine, readable, with the same files in it",
        )
    missing = f"does not see what {', '.join(facts.unseen)} wrote" if facts.unseen else ""
    yield check(
        "runs",
        facts.cannot_write or missing or "written, seen by all",
        not (facts.cannot_write or facts.unseen),
        f"mount one shared, writable folder at {runs} on each machine, or choose another with --runs",
    )
    yield check("disk", in_words(facts.disk), facts.disk >= DISK, "free some where temporary files lie, or set TMPDIR")
    yield check(
        "shm",
        in_words(facts.shm),
        facts.shm >= SHM,
        "give the container a larger /dev/shm: docker run --shm-size=2g, or an emptyDir of medium Memory",
    )
    yield check(
        "store", in_words(facts.store), facts.store >= STORE, "start Ray with --object-store-memory=100000000 or more"
    )
    yield check("files", f"{facts.files:,}", facts.files >= FILES, f"allow more open files: ulimit -n {16 * FILES}")
    if facts.gpus is not None:
        seen = len(facts.gpus)
        yield check(
            "GPUs",
            ", ".join(f"{facts.gpus.count(name)} × {name}" for name in dict.fromkeys(facts.gpus)) or "none",
            seen >= facts.promised,
            f"Ray counts {facts.promised}, and torch sees {seen}: install a driver that serves torch's CUDA, or start "
            "Ray with the --num-gpus that there are",
        )
        well = not facts.cannot_decode
        yield check("decoding", facts.cannot_decode or "well", well, "install nvidia-dali-cuda130 anew")
    yield check(
        "clock",
        f"{facts.ahead:+.1f} s" if abs(facts.ahead) >= 0.05 else "well",
        abs(facts.ahead) <= SKEW,
        "let the machines keep the same time: timedatectl set-ntp true",
    )


def _gpus() -> tuple[str, ...]:
    import torch

    return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _data(folder: Path | None) -> tuple[str, str]:
    if folder is None:
        return "", ""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return "", error.strerror or first_line(error)
    digest = hashlib.blake2b("\0".join(names[:LISTED]).encode(errors="surrogateescape"), digest_size=4).hexdigest()
    return f"{len(names):,} entries ({digest})", ""


def _mark(path: Path) -> str:
    """Why nothing can be written to `path`; it is there now, otherwise."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(b"x" * 4096)
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or first_line(error)
    return ""


def _decode() -> str:
    """Why DALI does not decode a JPEG as Pillow does; on a GPU too, where there is one."""
    pixels_HWC = np.add.outer(np.arange(64), np.arange(96))[..., None] % 256 * np.ones(3, int)
    stream = io.BytesIO()
    Image.fromarray(pixels_HWC.astype(np.uint8)).save(stream, "JPEG", quality=95)
    expected_HWC = np.asarray(Image.open(stream), int)
    try:
        (found_HWC,) = Decoder(1, 1).run([stream.getvalue()])
        error = np.abs(found_HWC - expected_HWC).max()
        if _gpus():
            error = max(error, np.abs(decoded_on_gpu(stream.getvalue()).astype(int) - expected_HWC).max())
    except (DecodeError, RuntimeError, OSError) as failed:
        return first_line(failed)
    return "" if error <= 4 else f"pixels differ from Pillow's by up to {error}"
