"""make test-fast leaves out what is slow, and still says something about every module."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import compare_sources, double, hidden_leaves, hidden_source, labels_for, relative

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
MODULES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix()
    for folder in ("fused_losses", "kernels")
    for path in (ROOT / folder).rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py") and "fused_losses/kernels" not in path.as_posix()
)
# Modules whose own names no test calls, and the words in a test that reach them.
BEHIND = {
    "fused_losses/core/validation": ("test_defaults", '"num_items"'),
    "fused_losses/engine/plan_frozen": ("test_hidden", '"frozen_head"'),
    "fused_losses/engine/plan_rows": ("test_hidden", '"row_blocks"'),
    "fused_losses/engine/hidden_ops": ("test_hidden", '"vocab_chunks"'),
    "fused_losses/engine/stats_outputs": ("test_hidden", '"vocab_chunks"'),
    "fused_losses/engine/operators": ("test_operators", "fl.token_stats("),
    "fused_losses/backends/torch_backend": ("test_token_stats", "fl.token_stats("),
    "fused_losses/backends/block": ("test_token_stats", "fl.token_stats("),
    "fused_losses/backends/compiled_elementwise": ("test_compiled", "SOME"),
    "fused_losses/engine/token_stats": ("test_token_stats", "fl.token_stats("),
    "fused_losses/core/elementwise": ("test_divergences", "divergences.get("),
    "fused_losses/nn/head_layers": ("test_head_layers", "fl.find_head("),
    "fused_losses/integrations/adapters": ("test_ref_logps", "adapter="),
    "fused_losses/integrations/batches": ("test_trainer", "FusedTrainer("),
    "fused_losses/integrations/trainer_metrics": ("test_trainer", "fused_metrics"),
    "fused_losses/losses/matrix": ("test_family_rules", "table.row"),
    "fused_losses/losses/pair_losses": ("test_preference_types", "loss_type=name"),
    "fused_losses/reference/common": ("test_twins", "fl.reference"),
    "kernels/token_stats": ("test_modules", "fl.token_stats("),
    "kernels/arguments": ("test_modules", "fl.token_stats("),
    "kernels/row_stats": ("test_modules", "fl.token_stats("),
    "kernels/elementwise": ("test_modules", "fl.token_stats("),
    "kernels/launch": ("test_modules", "fl.token_stats("),
    "kernels/vocab_chunks": ("test_modules", '"vocab_chunks"'),
    "kernels/fused_linear": ("test_modules", '"on_chip"'),
    "kernels/pair_loss": ("test_modules", "dpo_loss("),
    "kernels/topk": ("test_top_ids", "fl.topk("),
}


def is_slow(node):
    return any("mark.slow" in ast.unparse(decorator) for decorator in getattr(node, "decorator_list", ()))


def fast(path):
    """The source of a test file without its slow tests; nothing of one that is slow as a whole."""
    tree = ast.parse(path.read_text("utf-8"))
    marks = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign)]
    if any(text.startswith("pytestmark") and "mark.slow" in text for text in marks):
        return ""
    tree.body = [node for node in tree.body if not is_slow(node) and not isinstance(node, ast.Import | ast.ImportFrom)]
    return ast.unparse(tree).replace(repr(BEHIND), "")


def public_names(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"}


def test_every_module_has_a_test_that_is_not_slow():
    """It calls what only this module defines (the twins have the names of what they define), or module.something."""
    tests = {path.stem: fast(path) for path in (ROOT / "tests").rglob("test_*.py")}
    words = set(re.findall(r"\w+", " ".join(tests.values())))
    attributes = set(re.findall(r"\b(\w+)\.\w+", " ".join(tests.values())))
    names = {module: public_names(module) for module in MODULES}
    twins = "fused_losses/reference/"
    defined = Counter(name for module in MODULES if not module.startswith(twins) for name in names[module])
    for module in MODULES:
        if module in BEHIND:
            test, text = BEHIND[module]
            assert text in tests[test].replace("'", '"'), module
        else:
            own = {name for name in names[module] if module.startswith(twins) or defined[name] == 1}
            assert own & words or module.rpartition("/")[2] in attributes, module


def test_kernels_of_token_stats(monkeypatch, device):
    """Forward and backward, with a tail behind a whole step and rows that are ignored."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton")
    pytest.importorskip("triton")
    z, w = (torch.randn(3, 1100, device=device).requires_grad_() for _ in range(2))
    y = labels_for((3,), 1100, device)
    mine = fl.token_stats(z, y, w, divergence="js", entropy=True, shift=False)
    z64, w64 = double(z), double(w)
    truth = fl.reference.token_stats(z64, y, w64, divergence="js", entropy=True, shift=False)
    total = lambda s: (s.logps + s.divergence["js"] - s.entropy).sum()  # noqa: E731
    assert relative(mine.logps, truth.logps) <= 1e-6
    for g, t in zip(
        torch.autograd.grad(total(mine), (z, w)), torch.autograd.grad(total(truth), (z64, w64)), strict=True
    ):
        assert relative(g, t) <= 1e-5


@pytest.mark.parametrize("plan", ["vocab_chunks", "on_chip"])
def test_kernels_of_hidden_states(monkeypatch, device, plan):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton")
    pytest.importorskip("triton")
    leaves = (
        hidden_leaves((2,), 6, 41, device) + [x.detach() for x in hidden_leaves((2,), 9, 41, device)[:3]] + [None] * 2
    )
    build = lambda x: (hidden_source(x[:5]), hidden_source(x[5:]))  # noqa: E731
    y = torch.tensor([40, 3], device=device)
    how = {"plan": plan, "workspace": 4000} if plan == "vocab_chunks" else {"plan": plan}
    compare_sources(build, leaves, y, 3e-5, each=False, how=how, divergence="forward_kl")


def test_kernels_of_pairs(monkeypatch, device):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton")
    pytest.importorskip("triton")
    p, q = (torch.randn(4, 5, device=device).requires_grad_() for _ in range(2))
    y, exact = labels_for((4, 5), 9, device), [double(p), double(q)]
    found, truth = (
        library.dpo_loss(fl.LogProbs(p), y, fl.LogProbs(q), beta=0.3, divergence="forward_kl", shift=False).loss
        for library, p, q in ((fl, p, q), (fl.reference, *exact))
    )
    assert relative(found, truth) <= 1e-6
    for g, t in zip(torch.autograd.grad(found, (p, q)), torch.autograd.grad(truth, exact), strict=True):
        assert relative(g, t) <= 1e-5
