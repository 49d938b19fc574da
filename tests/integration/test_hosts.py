"""A run on two machines that share nothing but a cable and a file system: two network namespaces."""

import os
import subprocess

import pytest

from benchmarks.nodes import RAY, nodes, two_hosts
from benchmarks.processes import left_running
from tests.commands import events, onewarp

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers take two cores")

SETTINGS = ["--model", "test_convnext", "--head", "plain", "--no-pretrained", "--size", "48", "--batch", "8"]
SETTINGS += ["--epochs", "1", "--freeze-epochs", "0", "--lr", "1e-3", "--wandb", "off"]


@pytest.fixture
def hosts():
    try:
        with two_hosts() as pair:
            yield pair
    except PermissionError as error:
        pytest.skip(str(error))


def sent(host):
    """Bytes that have left a host over its cable."""
    path = f"/sys/class/net/{host.interface}/statistics/tx_bytes"
    return int(subprocess.run([*host.entered, "cat", path], check=True, capture_output=True).stdout)


def test_two_hosts_train_as_one_process(lossless_set, tmp_path, temporary, hosts):
    first, second = hosts
    with nodes(temporary, first) as cluster:
        cluster.add(host=first)
        cluster.add(host=second)
        place = ["--address", cluster.address, "--data", lossless_set]
        words = [*place, "--name", "two", *SETTINGS, "--workers", "2"]
        before = sent(second)
        told = onewarp(tmp_path, temporary, "train", *words, host=first, **RAY)
        assert told.returncode == 0, told.stdout + told.stderr
        assert left_running(temporary) == {}
        weights = (tmp_path / "runs/two/model.safetensors").stat().st_size
        assert sent(second) - before > 6 * weights  # the gradients of each step, at least once
        looked = onewarp(tmp_path, temporary, "doctor", "--cluster", *place, host=first, **RAY)
        assert looked.returncode == 0, looked.stdout + looked.stderr
        assert looked.stdout.count(" MB/s") == 3  # the head, and a node on each host
    alone = onewarp(tmp_path, temporary, "train", "--data", lossless_set, "--name", "one", *SETTINGS, "--workers", "0")
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert [event["world_size"] for event in events(tmp_path / "runs/two", "run")] == [2]
    two, one = ([event["loss"] for event in events(tmp_path / "runs" / name, "step")] for name in ("two", "one"))
    assert len(two) == 6
    assert two == pytest.approx(one, rel=1e-4)
