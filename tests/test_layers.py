"""Imports run one way: pipelines <- trainer <- cluster; the engines stay behind their seams."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {"pipelines": set(), "trainer": {"pipelines"}, "cluster": {"pipelines", "trainer"}}
LAYERS["benchmarks"] = {"pipelines", "trainer"}
ENGINES = {
    "ray": {f"cluster/{name}.py" for name in ("engine", "launch", "leaving", "join", "examine", "rounds")},
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
