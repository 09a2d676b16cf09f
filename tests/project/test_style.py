"""What no linter checks: formatting is skipped in tables of data alone, and the package has no asserts."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("fused_losses", "kernels", "bench", "tests", "examples")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
TABLES = (ast.List, ast.Tuple, ast.Dict, ast.Set, ast.BinOp)
SKIP = "# fmt: " + "skip"


def in_table(tree, line):
    """Whether the line is in a table that is assigned to a name, or in the cases of a test."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and node.lineno <= line <= node.end_lineno:
            table = node.value
            if isinstance(table, ast.Call) and len(table.args) == 1:  # frozenset({...})
                table = table.args[0]
            if isinstance(table, TABLES):
                return True
        elif isinstance(node, ast.FunctionDef) and any(d.lineno <= line <= d.end_lineno for d in node.decorator_list):
            return True
    return False


@pytest.mark.parametrize("folder", FOLDERS)
def test_formatting_is_skipped_in_tables_alone(folder):
    for path in FILES:
        if path.relative_to(ROOT).parts[0] == folder:
            text = path.read_text("utf-8")
            assert "# fmt: " + "off" not in text, path
            lines = [i for i, line in enumerate(text.splitlines(), 1) if SKIP in line]
            tree = ast.parse(text)
            assert [i for i in lines if not in_table(tree, i)] == [], path


def test_the_package_has_no_asserts():
    """A type is right by construction, and bad input raises an error in words."""
    for path in FILES:
        if path.relative_to(ROOT).parts[0] in ("fused_losses", "kernels"):
            found = [
                node.lineno for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Assert)
            ]
            assert not found, path
