"""Imports between the layers of the package go downwards only; each layer's file heads say what it is for."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fused_losses"
# What the modules of a layer may import of the package, beside their own layer. kernels/ are loaded by backends/ on demand.
# fused_losses: the package itself, for its version.
BELOW = {
    "core": set(),
    "kernels": {"core"},
    "backends": {"core", "kernels"},
    "engine": {"core", "backends"},
    "losses": {"core", "engine"},
    "nn": {"core", "engine", "losses"},
    "reference": {"core"},
    "integrations": {"core", "backends", "engine", "losses", "nn"},
    "cli": {"core", "kernels", "backends", "engine", "losses", "nn", "reference", "integrations", "fused_losses"},
}
FILES = sorted(path for layer in BELOW for path in (PACKAGE / layer).rglob("*.py"))


def imports(path):
    """The modules of the package that a file imports, as paths of names below it."""
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[: len(here) - node.level + 1], *(node.module or "").split(".")]
            yield [part for part in base if part]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fused_losses":
            yield node.module.split(".")[1:]


def test_every_module_has_a_layer():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"} == set(BELOW)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_downwards(path):
    layer = path.relative_to(PACKAGE).parts[0]
    for target in imports(path):
        assert (target[0] if target else "fused_losses") in BELOW[layer] | {layer}
