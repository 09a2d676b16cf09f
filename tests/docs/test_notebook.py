"""The notebook runs from its first cell to its last."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_look.ipynb"
pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_runs(monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    matplotlib.use("Agg")
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    namespace: dict = {}
    for i, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, "clear the outputs before a commit"
            exec(compile("".join(cell["source"]), f"cell {i}", "exec"), namespace)
    by_hand, ours = namespace["found"].values()
    assert by_hand[-1] > 4 * ours[-1]  # MiB
    namespace["plt"].close("all")
