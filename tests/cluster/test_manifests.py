"""The ready files: they parse, and what they call is what the commands take."""

import importlib
import itertools
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tyro
import yaml
from click.testing import CliRunner

import cluster
from trainer import TrainConfig

FOLDER = Path(cluster.__file__).parent / "manifests"
FILES = sorted(FOLDER.iterdir())
SWEEP = FOLDER / "sweep.yaml"
JOBS = [FOLDER / f"rayjob-{kind}.yaml" for kind in ("cpu", "gpu")]
VARIABLES = {"DATA": "/data", "RUNS": "/runs", "NAME": "run", "address": "10.0.0.1:6379", "workers": "8"}


def commands(path):
    """The words after `onewarp train` in a file, its shell variables filled in."""
    text = re.sub(r"\$(\w+)", lambda name: VARIABLES.get(name[1], name[0]), path.read_text())
    text = re.sub(r"\n#? {4,}(?=--)", " ", text)  # a command that goes on
    for line in re.findall(r"onewarp train ([^\n']*)", text):
        yield [word for word in shlex.split(line) if word != "&"]


def environment(job):
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    return {each["name"]: each["value"] for each in head["env"]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_says_at_its_top_what_it_wants_and_what_was_tried(path):
    top = "".join(line for line in path.read_text().splitlines(keepends=True)[:20] if line.startswith("#"))
    assert "Fill in:" in top and "Tried:" in top


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix and path != SWEEP], ids=lambda path: path.name)
def test_each_calls_the_command_as_it_is(path):
    found = list(commands(path))
    assert len(found) == 1
    config = tyro.cli(TrainConfig, args=found[0])
    assert config.name is not None  # so that it goes on when it is started again
    assert config.workers is not None
    assert config.address is not None or path in JOBS  # to which Ray tells it


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_jobs_have_a_token_and_time_for_a_checkpoint(path):
    job, policy = yaml.safe_load_all(path.read_text())
    spec = job["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"}
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    drain = float(environment(job)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    selected = policy["spec"]["podSelector"]["matchLabels"].items()
    for group in groups:
        template = group["template"]
        assert drain < template["spec"]["terminationGracePeriodSeconds"]
        assert selected <= template["metadata"]["labels"].items()
        assert template["spec"]["securityContext"]["runAsNonRoot"]
    # As many workers as the machines have room for, and at least one for each machine that must be there.
    config = tyro.cli(TrainConfig, args=next(commands(path)))
    (workers,) = spec["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    each = int(container["resources"]["limits"].get("nvidia.com/gpu", workers["rayStartParams"].get("num-cpus", 0)))
    assert (config.crew.least, config.crew.most) == (each * workers["minReplicas"], each * workers["maxReplicas"])


def test_the_script_is_one(tmp_path):
    script = FOLDER / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert re.search(r"^#SBATCH --signal=B:TERM@\d+$", script.read_text(), re.MULTILINE)


def test_ray_takes_the_words_it_is_started_with():
    importlib.import_module("cluster.engine")  # which sets what Ray reads when it is imported
    from ray.scripts.scripts import start

    options = set(re.findall(r"--[a-z-]+", CliRunner().invoke(start, ["--help"]).output))
    cloud = yaml.safe_load((FOLDER / "ray-up.yaml").read_text())
    script = (FOLDER / "slurm.sh").read_text().replace("\\\n", " ")
    lines = [*cloud["head_start_ray_commands"], *cloud["worker_start_ray_commands"], *script.splitlines()]
    words = " ".join(re.sub(r".*ray start", "", line) for line in lines if "ray start" in line or "common=(" in line)
    used = set(re.findall(r"--[a-z-]+", words))
    assert len(used) > 8
    assert used <= options


def test_a_cloud_cluster_is_one_in_rays_eyes():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((FOLDER / "ray-up.yaml").read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["file_mounts"]["/home/ray/.ray/auth_token"]


def test_a_sweep_asks_for_what_the_command_takes_and_tells():
    sweep = yaml.safe_load(SWEEP.read_text())
    onewarp, train, *words = sweep["command"]
    assert (onewarp, train, words.pop()) == ("onewarp", "train", "${args}")
    spans = {name: span.get("values") or [span["min"], span["max"]] for name, span in sweep["parameters"].items()}
    assert {len(set(values)) > 1 for values in spans.values()} == {True}
    for chosen in itertools.product(*spans.values()):
        tried = dict(zip(spans, chosen, strict=True))
        # As the agent writes them: https://docs.wandb.ai/guides/sweeps/define-sweep-configuration
        config = tyro.cli(TrainConfig, args=[*words, *(f"--{name}={value}" for name, value in tried.items())])
        assert {name: getattr(config, name) for name in tried} == tried
        assert config.wandb == "online"
    assert sweep["metric"] == {"name": "error_rate", "goal": "minimize"}  # which tests/trainer/test_tracking.py finds
