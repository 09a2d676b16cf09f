"""The pages in docs/ run as they stand, quote messages that exist, and name the versions, divergences and modules of today."""

import ast
import re
import sys
from pathlib import Path

import pytest
import yaml
from ranks import Ranks

from fused_losses import divergences
from fused_losses.core.policy_options import POLICY_LOSSES

for package in ("transformers", "trl", "peft", "accelerate", "datasets"):
    pytest.importorskip(package)
pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def pages(entries=None):
    """The pages of the menu in their order."""
    for entry in yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"] if entries is None else entries:
        value = entry if isinstance(entry, str) else next(iter(entry.values()))
        if isinstance(value, str):
            yield DOCS / value
        else:
            yield from pages(value)


PAGES = list(pages())


def text(page):
    return (DOCS / page).read_text("utf-8")


def blocks(page):
    return list(re.finditer(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S))


def run_pages(rank, group):
    """All blocks in their order, those in comments too; tracebacks have the page's lines. Pages that import torch themselves
    stand alone, the others go on where the DPO loop has ended."""
    sys.path.insert(0, str(ROOT / "examples"))
    shared: dict = {}
    count = 0
    for page in PAGES:
        found = blocks(page)
        alone = bool(found) and found[0][1].startswith("import torch")
        namespace = {} if alone else shared
        for block in found:
            line = page.read_text("utf-8")[: block.start(1)].count("\n")
            exec(compile("\n" * line + block[1], str(page), "exec"), namespace)
            count += 1
    assert count > 40


@pytest.mark.slow
def test_blocks_run():
    one = Ranks(1)
    try:
        one.run(1, run_pages)
    finally:
        one.kill()


def test_every_page_is_in_the_menu():
    assert set(PAGES) == set(DOCS.rglob("*.md"))


def strings():
    """Every string in the package; of f-strings what is written out."""
    for path in (ROOT / "fused_losses").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_exist():
    whole = text("how-to/errors.md")
    table = whole[whole.index("## Messages") :]
    messages = re.findall(r"^\| `([^`]+)` \|", table, re.M)
    assert len(messages) > 20
    known = "\n".join(strings())
    for message in messages:
        for part in message.split("..."):
            assert part in known, message


def test_versions_are_those_that_are_tested():
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    for page in ("how-to/index.md", "how-to/frameworks.md"):
        named = re.findall(r"\b([a-z][\w-]+) (\d+\.\d+\.\d+)", text(page))
        assert len(named) >= 5
        for name, version in named:
            assert pinned.get(name, pinned.get(name.replace("-", "_"))) == version, name


def test_table_of_divergences_is_complete():
    rows = dict(re.findall(r"^\| `(\w+)(?:\([^)]*\))?` \|.*\| (\d) \| .* \|$", text("reference/divergences.md"), re.M))
    assert set(rows) == set(divergences.names())
    for name, reads in rows.items():
        d = divergences.get(name)
        assert int(reads) == (2 if d.term is not None else 1), name
        refused = re.search(rf"^\| `{name}[`(].*\| refused: .* \|$", text("reference/divergences.md"), re.M) is not None
        assert refused == (d.link is None), name


def test_tree_names_every_module():
    """But for those of losses/ and reference/, which have the names of the losses."""
    tree = text("explanation/architecture.md")
    named = ("losses", "reference", "experimental")
    for folder in ("fused_losses", "kernels", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name not in ("__init__.py", "__main__.py") and path.parent.name not in named:
                assert path.name in tree or path.name.startswith("test_"), path


def test_every_loss_type_has_a_divisor_in_the_table_of_frameworks():
    table = text("how-to/frameworks.md")
    table = table[table.index("| `fl.grpo_loss`") :]
    named = set(re.findall(r"\w+", " ".join(re.findall(r"^\| ([^|]+) \|", table, re.M))))
    assert set(POLICY_LOSSES) <= named
