"""Imports run one way: pipelines <- trainer <- cluster; the engines stay behind their seams."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {"pipelines": set(), "trainer": {"pipelines"}, "cluster": {"pipelines", "trainer", "benchmarks"}}
LAYERS["benchmarks"] = {"pipelines", "trainer"}
ENGINES = {
    "ray": {
        f"cluster/{name}.py"
        for name in ("engine", "examine", "join", "launch", "leaving", "meeting", "restarts", "room", "rounds")
    },
    "wandb": {"trainer/tracking.py"},
    "nvidia": {
        *("pipelines/graph.py", "pipelines/decode.py", "pipelines/firewall.py"),
        "trainer/worker.py",  # it tells DALI's version
        "benchmarks/peers.py",  # DALI without us
    },
}


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_what_lies_below_it(layer):
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    for file in files:
        above = imported(file) & set(LAYERS) - LAYERS[layer] - {layer}
        assert not above, f"{file.relative_to(ROOT)} imports {above}"


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_is_imported_in_its_own_files_alone(engine):
    users = {
        str(file.relative_to(ROOT))
        for layer in LAYERS
        for file in (ROOT / layer).rglob("*.py")
        if engine in imported(file)
    }
    assert users <= ENGINES[engine]
    assert users


# What comes late: whoever asks for help, or starts workers again, must not wait for it.
HEAVY = {"torch", "torchvision", "timm", "nvidia", "wandb", "matplotlib", "numba"}


@pytest.mark.parametrize("module", ["cluster.cli", "cluster.launch", "trainer.job", "pipelines", "trainer"])
def test_what_takes_seconds_comes_when_it_is_needed(module):
    told = subprocess.run(
        [sys.executable, "-c", f"import sys, {module}; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    assert not HEAVY & set(told.stdout.split())


def test_packages_hold_what_they_say():
    import pipelines
    import trainer

    for package in (pipelines, trainer):
        for name in package.__all__:
            assert getattr(package, name).__module__.split(".")[0] in ("pipelines", "trainer")
        with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
            _ = package.nothing
