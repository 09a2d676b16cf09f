"""The pages in docs/ run as they stand, quote messages that exist, and name the versions that are tested."""

import ast
import re
import sys
from pathlib import Path

import pytest
from ranks import Ranks

for package in ("transformers", "trl", "peft", "accelerate", "datasets"):
    pytest.importorskip(package)
pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/move-your-trainer-over.md"
TEXT = PAGE.read_text("utf-8")


def run_page(rank, group):
    """All blocks in their order, those in comments too; tracebacks have the page's lines."""
    sys.path.insert(0, str(ROOT / "examples"))
    namespace: dict = {}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", TEXT, re.M | re.S))
    assert len(blocks) > 20
    for block in blocks:
        line = TEXT[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(PAGE), "exec"), namespace)


@pytest.mark.slow
def test_blocks_run():
    one = Ranks(1)
    try:
        one.run(1, run_page)
    finally:
        one.kill()


def strings():
    """Every string in the package; of f-strings what is written out."""
    for path in (ROOT / "fused_losses").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_exist():
    table = TEXT[TEXT.index("## Messages") :]
    messages = re.findall(r"^\| `([^`]+)` \|", table, re.M)
    assert len(messages) > 20
    known = "\n".join(strings())
    for message in messages:
        for part in message.split("..."):
            assert part in known, message


def test_links_lead_to_sections():
    """As GitHub names them."""
    titles = re.findall(r"^#+ (.*)$", TEXT, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    links = re.findall(r"\]\(#([^)]+)\)", TEXT)
    assert len(links) > 10 and set(links) <= anchors


def test_versions_are_those_that_are_tested():
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    named = re.findall(r"(\w+) (\d+\.\d+\.\d+)", re.search(r"^Tested with (.*)\.$", TEXT, re.M)[1])
    assert len(named) == 5 and all(pinned[name] == version for name, version in named)
