"""The README's snippets run as they stand, its table names every divergence, and its tree names every module."""

import re
from pathlib import Path

import fused_losses as fl
from fused_losses import divergences

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def test_snippets_run(capsys):
    namespace: dict = {}
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(snippets) >= 2
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), namespace)  # later ones build on earlier ones
    assert "tensor(" in capsys.readouterr().out


def test_table_of_divergences_is_complete():
    rows = dict(re.findall(r"^\| `(\w+)(?:\([^)]*\))?` \|.*\| (\d) \| .* \|$", README, re.M))
    assert set(rows) == set(divergences.names())
    for name, reads in rows.items():
        d = divergences.get(name)
        assert int(reads) == (2 if d.term is not None else 1), name
        refused = re.search(rf"^\| `{name}[`(].*\| refused: .* \|$", README, re.M) is not None
        assert refused == (d.link is None), name


def test_tree_names_every_module():
    """But for those of losses/ and reference/, which have the names of the losses."""
    named = ("losses", "reference", "experimental")
    for folder in ("fused_losses", "kernels", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name not in ("__init__.py", "__main__.py") and path.parent.name not in named:
                assert path.name in README or path.name.startswith("test_"), path


def test_the_citation_is_of_this_version():
    fields = dict(re.findall(r"^([\w-]+): (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.M))
    assert (fields["type"], fields["title"], fields["version"]) == ("software", fl.__name__, fl.__version__)
