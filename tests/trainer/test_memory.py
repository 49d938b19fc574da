"""What fits into memory: the numbers behind `--batch auto`, and errors of memory that are real."""

import json
import os
import re
import resource
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import pack, scan
from pipelines.errors import UserError
from tests.ranks import on_ranks
from tests.trainer.conftest import PLAIN
from trainer import TrainConfig, fine_tune, memory, rehearsal, worker
from trainer.journal import read
from trainer.loop import train_epoch
from trainer.memory import ADDRESSES, GPU, MEMORY, Bounds, Line, Peak

SMALL = {**PLAIN, "size": 32, "workers": 0, "name": "run"}


def peaks(line, *images, kind=MEMORY):
    return [Peak(images=n, bytes={kind: int(line.at(n))}) for n in images]


def test_the_line_goes_through_points_on_it_and_below_none():
    assert memory.fit([8, 16, 32], [1_400, 1_800, 2_600]) == Line(base=pytest.approx(1_000), image=pytest.approx(50))
    rng = np.random.default_rng(0)
    for _ in range(20):
        taken = 1_000 + 50 * np.array([8, 16, 32]) + rng.normal(0, 40, 3)
        line = memory.fit([8, 16, 32], taken)
        assert all(line.at(n) >= value - 1e-6 for n, value in zip([8, 16, 32], taken, strict=True))
        assert line.image == pytest.approx(np.polyfit([8, 16, 32], taken, 1)[0])
    assert memory.fit([8, 16], [500, 400]) == Line(base=500, image=0)


def test_images_that_fit_below_the_line():
    line = Line(base=1e9, image=50e6)
    assert [line.images(room) for room in (0.9e9, 1e9, 1.049e9, 1.05e9, 4e9)] == [0, 0, 0, 1, 60]


@pytest.mark.parametrize(
    ("count", "workers", "repeats", "unit", "most", "batch", "reason"),
    [
        (3068, 2, 1, 4, 152, 152, "at least 20 steps an epoch"),
        (3068, 2, 3, 12, 144, 144, "at least 20 steps an epoch"),
        (3068, 8, 1, 16, 144, 144, "at least 20 steps an epoch"),
        (3068, 3, 1, 6, 150, 144, "at least 20 steps an epoch"),
        (53, 1, 1, 2, 8, 8, "at least 8 images a worker"),
        (53, 2, 1, 4, 16, 16, "at least 8 images a worker"),
        (7, 1, 1, 2, 6, 6, "no more images to train on"),
        (10**7, 8, 1, 16, 8192, 8192, "at most 1024 images a worker"),
    ],
)
def test_bounds_of_the_batch(count, workers, repeats, unit, most, batch, reason):
    allowed = memory.bounds(count, workers, repeats)
    assert allowed == Bounds(unit=unit, most=most, reason=reason)
    assert allowed.round(allowed.most) == batch
    assert batch % (2 * workers) == batch % repeats == 0


def test_a_batch_is_a_multiple_of_eight_where_it_can_be():
    allowed = Bounds(unit=4, most=1000, reason="")
    assert [allowed.round(n) for n in (3, 4, 7, 8, 63, 64, 71)] == [0, 4, 4, 8, 56, 64, 64]


def test_a_set_smaller_than_any_batch_is_refused():
    with pytest.raises(UserError, match="a batch for 2 workers has 4 images or more, and there are 3"):
        memory.bounds(3, 2)


def test_the_choice_is_what_memory_or_the_set_allows():
    allowed = memory.bounds(3068, 2)
    measured = peaks(Line(base=1e9, image=50e6), 8, 16, 32)
    # An image counts a tenth more than measured: (4 - 1) / 0.055 = 54.5 images for each of two workers.
    found = memory.choose(measured, {MEMORY: 4e9}, 2, allowed, failed=False)
    assert (found.batch, found.images, found.reason) == (104, 54, "the memory")
    assert found.line == Line(base=pytest.approx(1e9), image=pytest.approx(50e6))
    found = memory.choose(measured, {MEMORY: 20e9}, 2, allowed, failed=False)
    assert (found.batch, found.images, found.reason) == (152, 345, "at least 20 steps an epoch")
    words = found.words(2, 3068)
    assert words.startswith("152, 76 a worker, 20 steps an epoch; bound by: at least 20 steps an epoch.")
    assert "with 8, 16 and 32 images" in words
    assert "took 1.00 GB and 50 MB an image; 20.00 GB of memory for each worker hold 345 images" in words


def test_the_scarcest_kind_of_memory_decides():
    allowed = memory.bounds(3068, 1)
    measured = [
        Peak(images=n, bytes={MEMORY: int(1e9 + n * 1e6), ADDRESSES: int(7e9 + n * 50e6), GPU: int(2e8 + n * 1e8)})
        for n in (8, 16, 32)
    ]
    rooms = {MEMORY: 4e9, ADDRESSES: 9.75e9, GPU: 80e9}
    found = memory.choose(measured, rooms, 1, allowed, failed=False)
    assert (found.kind, found.images, found.batch, found.reason) == (ADDRESSES, 50, 48, "the address space")
    found = memory.choose(measured, rooms | {GPU: 3.5e9}, 1, allowed, failed=False)
    assert (found.kind, found.images, found.batch, found.room) == (GPU, 32, 32, 3.5e9)  # 30 by the line, 32 were tried


def test_nothing_is_trusted_beyond_what_ran_out():
    allowed = memory.bounds(3068, 1)
    line = Line(base=1e9, image=50e6)
    assert memory.choose(peaks(line, 8, 16), {MEMORY: 20e9}, 1, allowed, failed=True).batch == 16
    assert memory.choose(peaks(line, 8), {MEMORY: 20e9}, 1, allowed, failed=True).batch == 8
    assert memory.choose([], {MEMORY: 20e9}, 1, allowed, failed=True).batch == 0
    assert memory.choose(peaks(line, 8, 16, 32), {MEMORY: 0.5e9}, 1, allowed, failed=False).batch == 0


def test_rehearsals_are_larger_where_images_are_smaller():
    sizes = {size: rehearsal.rehearsed(size, 1000) for size in (32, 160, 224, 1024)}
    assert sizes == {32: [32, 64, 128], 160: [8, 16, 32], 224: [4, 8, 16], 1024: [2, 4, 8]}
    assert [rehearsal.rehearsed(160, most) for most in (2, 3, 8, 20)] == [[2], [2], [2, 4, 8], [4, 10, 20]]


def written(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def proc(tmp_path):
    meminfo = "MemTotal:    16000000 kB\nMemFree:      1000000 kB\nMemAvailable:   10000000 kB\nHugePages_Total: 0\n"
    return written(tmp_path / "proc", meminfo=meminfo, self__cgroup="")


def test_memory_of_the_machine_and_of_control_groups(proc, tmp_path):
    whole = (10_240_000_000, 16_384_000_000)
    assert memory.machine(proc, tmp_path / "absent") == [whole]

    # Version 2: the group has no limit of its own, the one around it has.
    written(proc, self__cgroup="0::/user/job\n")
    two = written(
        tmp_path / "two",
        **{"user/job/memory.max": "max\n", "user/job/memory.current": "7\n", "user/memory.max": "8000000000\n"},
        **{"user/memory.current": "6000000000\n", "user/memory.stat": "anon 1\ninactive_file 1500000000\n"},
    )
    assert memory.machine(proc, two) == [whole, (3_500_000_000, 8_000_000_000)]

    # Version 1, in a container: the path is the host's, the mount is the group itself; 2^63 - 4096 means no limit.
    written(proc, self__cgroup="9:cpu:/docker/ab\n4:memory:/docker/ab\n0::/\n")
    one = written(
        tmp_path / "one",
        **{"memory/memory.limit_in_bytes": "4000000000\n", "memory/memory.usage_in_bytes": "1000000000\n"},
        **{"memory/memory.stat": "total_inactive_file 250000000\n"},
    )
    assert memory.machine(proc, one) == [whole, (3_250_000_000, 4_000_000_000)]
    written(one, **{"memory/memory.limit_in_bytes": "9223372036854771712\n"})
    assert memory.machine(proc, one) == [whole]


def test_numbers_of_a_process_and_of_the_kernel(proc):
    status = "Name:\tpython\nVmPeak:\t 7000000 kB\nVmHWM:\t 1500000 kB\nVmRSS:\t 1200000 kB\nThreads:\t4\nSigQ:\t0/9\n"
    written(proc, self__status=status, vmstat="nr_free_pages 12\noom_kill 3\n")
    assert memory.taken(proc) == {MEMORY: 1_536_000_000, ADDRESSES: 7_168_000_000}
    assert memory.killed(proc) == 3
    assert memory.killed() >= 0


def test_what_a_process_took_at_most_is_noted_and_forgotten():
    """In a process of its own: here, what other tests have left may be freed meanwhile."""
    code = """
        import numpy as np
        from trainer import memory
        memory.forget()
        before = memory.taken()[memory.MEMORY]
        held = np.ones(30_000_000)
        grown = memory.taken()[memory.MEMORY] - before
        assert 0.9 * held.nbytes < grown < 1.3 * held.nbytes, grown
        del held
        memory.forget()
        assert memory.taken()[memory.MEMORY] < before + 0.3 * grown
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=Path(__file__).parents[2], check=True)


def test_room_is_divided_among_workers():
    limits = [(11e9, 20e9), (6e9, 10e9)]  # the second is the narrower
    assert memory.room(1, limits, engine=False) == {MEMORY: 5.5e9}
    assert memory.room(2, limits, engine=False) == {MEMORY: 2.75e9}
    assert memory.room(2, limits, engine=True) == {MEMORY: (5.5e9 - memory.ENGINE) / 2 - memory.ENGINE_WORKER}
    rooms = memory.room(2, limits, engine=False, gpu=(70 * 10**9, 80 * 10**9))
    assert rooms == {MEMORY: 2.75e9, GPU: 70e9 - 4e9 - memory.NCCL}
    assert memory.room(1, limits, engine=False, gpu=(70 * 10**9, 80 * 10**9))[GPU] == 70e9 - 4e9


def huge_tensor():
    torch.empty(2**50)


def huge_array():
    np.empty(2**60, np.uint8)


def other_error():
    torch.empty(-1)


def test_errors_of_memory_are_told_from_others():
    for fail in (huge_tensor, huge_array):
        with pytest.raises(memory.OutOfMemoryError, match="The memory of worker 3 ran out .*allocate"), memory.told(3):
            fail()
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
    ):
        with pytest.raises(memory.OutOfMemoryError), memory.told(0):
            raise ValueError("a step failed") from error
    with pytest.raises(RuntimeError, match="negative") as caught, memory.told(0):
        other_error()
    assert not isinstance(caught.value, UserError)
    with pytest.raises(UserError, match="mine") as caught, memory.told(0):
        raise UserError("mine")
    assert not isinstance(caught.value, memory.OutOfMemoryError)


def test_what_a_failed_step_held_is_let_go():
    held = []

    def step():
        activations = torch.ones(1000)
        held.append(weakref.ref(activations))
        huge_tensor()

    with pytest.raises(memory.OutOfMemoryError) as caught, memory.told(0):
        step()
    assert caught.value is not None  # alive, with its traceback
    assert held[0]() is None


def test_a_rehearsal_takes_the_largest_images(small_set, tmp_path):
    manifest = scan(small_set)
    pixels = np.sort(manifest.heights_N.astype(int) * manifest.widths_N)[::-1]
    small = rehearsal.excerpt(manifest, 6)
    assert (len(small.train), len(small.valid)) == (12, 6)
    assert np.array_equal(np.sort(small.heights_N.astype(int) * small.widths_N)[::-1], pixels[:18])
    large = rehearsal.excerpt(manifest, 40)  # more than there are: some of them again
    assert (len(large.train), len(large.valid)) == (80, 40)
    pack(manifest, tmp_path / "packed", kind="decoded")
    stored = rehearsal.excerpt(scan(tmp_path / "packed"), 6)
    assert (len(stored.train), len(stored.valid)) == (12, 6)
    assert stored.paths == manifest.paths[:18]


def test_batch_auto_from_the_choice_to_a_resumed_run(small_set, tmp_path, quiet):
    settings = {**SMALL, "data": str(small_set), "runs": str(tmp_path), "epochs": 1, "freeze_epochs": 0, "lr": 1e-3}
    wanted = TrainConfig.from_dict({**settings, "batch": "auto"})
    first = fine_tune(wanted, quiet)
    told = quiet.file.getvalue()
    (line,) = [line for line in told.splitlines() if line.startswith("batch ")]
    assert re.fullmatch(
        r"batch     8, 6 steps an epoch; bound by: at least 8 images a worker. Two steps with 2, 4 and 8 images were "
        r"tried: took [\d.]+ [GM]B and [\d.]+ MB an image; [\d.]+ GB of memory for each worker hold [\d,]+ images",
        line,
    ), line
    assert json.loads((tmp_path / "run/config.json").read_text())["batch"] == 8
    events = read(tmp_path / "run/journal.jsonl")
    assert events[0]["config"]["batch"] == 8
    assert len([event for event in events if event["event"] == "step"]) == 53 // 8

    again = fine_tune(wanted, quiet)
    assert again.error_rate == first.error_rate
    assert "was finished before" in quiet.file.getvalue()
    assert quiet.file.getvalue().count("batch     ") == 1  # nothing is tried again
    with pytest.raises(UserError, match="--batch was 8 and is now 16"):
        fine_tune(TrainConfig.from_dict({**settings, "batch": 16}), quiet)
    with pytest.raises(UserError, match="--lr was 0.001 and is now 0.002"):
        fine_tune(TrainConfig.from_dict({**settings, "batch": "auto", "lr": 2e-3}), quiet)


def test_a_rehearsal_that_fails_otherwise_is_told_in_words(small_set, tmp_path, quiet):
    settings = {**SMALL, "data": str(small_set), "runs": str(tmp_path), "batch": "auto"}
    config = TrainConfig.from_dict({**settings, "threads": 1})
    manifest = scan(small_set)
    with pytest.raises(UserError, match="two steps were tried, and ended with: .*No such file"):
        rehearsal.measure(config, manifest, tmp_path / "absent.safetensors", [2])


LIMITED = """
import resource, sys
from pathlib import Path
from trainer import TrainConfig, fine_tune, memory
from trainer.worker import run
from pipelines.errors import UserError

if __name__ == "__main__":
    config, limit = Path(sys.argv[1]), int(sys.argv[2])
    if not limit:
        limit = memory.taken()[memory.ADDRESSES] + 4_000_000_000
        print("limit", limit)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        print("done", fine_tune(TrainConfig.read(config)).folder)
    except UserError as error:
        sys.exit(f"user error: {error}")
"""


def test_memory_that_runs_out_names_a_batch_that_then_fits(small_set, tmp_path):
    """Under a limit of address space, which an allocator meets like a machine that is full."""
    settings = {**SMALL, "data": str(small_set), "runs": str(tmp_path), "model": "tf_efficientnet_lite0"}
    settings |= {"head": "fastai", "size": 192, "threads": 1, "epochs": 1, "freeze_epochs": 0, "lr": 1e-3}
    (tmp_path / "limited.py").write_text(LIMITED)

    def limited(batch, limit):
        config = tmp_path / f"{batch}.json"
        config.write_text(json.dumps({**settings, "batch": batch, "name": f"run{batch}"}))
        command = [sys.executable, str(tmp_path / "limited.py"), str(config), str(limit)]
        environment = {**os.environ, "PYTHONPATH": str(Path(rehearsal.__file__).parents[1])}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    failed = limited(52, 0)
    assert failed.returncode == 1, failed.stdout + failed.stderr
    told = failed.stderr.strip().splitlines()[-1]
    assert told.startswith("user error: The memory of worker 0 ran out ("), failed.stderr
    assert "That was with --batch 52 at --size 192 on 1 worker." in told
    assert "--micro-batch" in told
    found = re.search(r"Choose --batch (\d+), which fits", told)
    assert found, told
    batch = int(found[1])
    assert 8 <= batch <= 39
    passed = limited(batch, int(failed.stdout.split("limit ")[1].split()[0]))
    assert passed.returncode == 0, passed.stderr
    assert read(tmp_path / f"run{batch}/journal.jsonl")[-1]["event"] == "finished"


def starve_from_the_first_step():
    """This process may take 0.6 GB more from where its steps begin: enough for some layers' activations."""

    def starved(*args, **options):
        limit = memory.taken()[ADDRESSES] + 600_000_000
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return train_epoch(*args, **options)

    worker.train_epoch = starved


def starve_the_second(ranks, path):
    if ranks.rank == 1:
        starve_from_the_first_step()
    try:
        worker.run(path, "train", ranks)
        ended = "well"
    except Exception as error:
        ended = f"{type(error).__name__}: {error}"
    (path / f"ended{ranks.rank}").write_text(ended)


def test_no_rank_waits_for_one_whose_memory_ran_out(prepared):
    settings = {"model": "tf_efficientnet_lite0", "size": 160, "batch": 52, "threads": 1, "lr": 1e-3}
    path = prepared("run", **settings, epochs=1, freeze_epochs=0)
    on_ranks(2, starve_the_second, path)
    first, second = ((path / f"ended{rank}").read_text() for rank in (0, 1))
    assert second.startswith("OutOfMemoryError: The memory of worker 1 ran out (")
    assert first.startswith("RuntimeError")
    assert not (path / "model.safetensors").exists()
