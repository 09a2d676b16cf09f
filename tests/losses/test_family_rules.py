"""What holds for every loss of the registry: how long it may be, what it may touch, what it refuses, that it compiles, that
micro-batches add up, and that the README's table says what there is."""

from __future__ import annotations

import ast
import functools
import inspect
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from family_batches import CASES, Batch
from helpers import Judge, relative

import fused_losses as fl
from fused_losses import losses
from fused_losses.core import policy_options
from fused_losses.core.batch import EACH
from fused_losses.losses import FAMILY
from fused_losses.losses import matrix as table

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
FILES = sorted(Path(losses.__file__).parent.rglob("*.py"))


def functions(path):
    return [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.FunctionDef)]


def code_lines(function):
    """Lines of its body that are neither docstring nor blank nor comment."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    source = Path(function.path).read_text("utf-8").splitlines()
    lines = range(body[0].lineno - 1, body[-1].end_lineno) if body else ()
    return sum(bool(source[i].strip()) and not source[i].strip().startswith("#") for i in lines)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_loss_is_short(path):
    for function in functions(path):
        function.path = path
        assert code_lines(function) <= 30, function.name


VOCABULARY = {
    "softmax", "log_softmax", "logsumexp", "cross_entropy", "kl_div", "gather", "take_along_dim", "matmul", "einsum",
}  # fmt: skip
ALLOWED = {
    "__init__": {"cross_entropy"},  # a module
    "topk": {"log_softmax", "logsumexp", "gather"},  # over the K tokens
    "preference_matching": {"logsumexp"},  # over responses
    "rollouts": {"logsumexp"},  # over the answers to a prompt
    "fine_tuning": {"log_softmax"},  # over the k largest
    "lta_thinker": {"cross_entropy", "gather"},  # over steps
}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_no_loss_touches_a_vocabulary_axis(path):
    """They leave that to token_stats. (Plackett-Luce's axis is that of the responses, InfoNCE's that of the steps.)"""
    tree = ast.parse(path.read_text("utf-8"))
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} | {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name)
    }
    allowed = ALLOWED.get(path.stem, set())
    assert not used & (VOCABULARY - allowed)
    assert not any(isinstance(n, ast.BinOp) and isinstance(n.op, ast.MatMult) for n in ast.walk(tree))


def test_the_table_of_losses_is_current():
    """python -m fused_losses.losses.matrix"""
    assert table.matrix() in (ROOT / "docs/reference/losses.md").read_text("utf-8")


@pytest.mark.parametrize("name", FAMILY)
def test_what_the_table_denies_is_an_error(name):
    entry = FAMILY[name]
    batch = Batch(name, next(iter(entry.variants)))
    with pytest.raises(TypeError, match="nonsense"):
        batch.options["nonsense"] = 1
        batch.call(fl, torch.float32, "hidden", None if entry.ref == "unused" else "hidden")
    del batch.options["nonsense"]
    if entry.distribution:
        with pytest.raises((ValueError, TypeError), match="LogProbs"):
            batch.call(fl, torch.float32, "log-probs", None if entry.ref == "unused" else "hidden")
        if entry.ref != "unused":
            with pytest.raises((ValueError, TypeError), match="LogProbs"):
                batch.call(fl, torch.float32, "hidden", "log-probs")
    if entry.ref == "needed":
        with pytest.raises((ValueError, TypeError), match="ref|teacher"):
            batch.call(fl, torch.float32, "hidden", None)
    batch.options["divergence"] = "js"
    takes = dict(zip(table.COLUMNS, table.row(entry), strict=True))["f-divergence"] == "yes"
    with nullcontext() if takes else pytest.raises(TypeError, match="divergence"):
        batch.call(fl, torch.float32, "hidden", None if entry.ref == "unused" else "hidden")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY)
def test_compiles_without_graph_breaks(monkeypatch, name):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    entry = FAMILY[name]
    for packed in (False, True):
        batch = Batch(name, next(iter(entry.variants)), packed, seed=3)
        ref = None if entry.ref == "unused" else "logits"
        torch._dynamo.reset()
        step = torch.compile(getattr(fl, name), fullgraph=True, backend="aot_eager")
        eager, grads = batch.call(fl, torch.float32, "logits", ref)
        library = type("Compiled", (), {name: staticmethod(step)})
        compiled, found = batch.call(library, torch.float32, "logits", ref)
        torch.testing.assert_close(compiled.loss, eager.loss)
        for g, t in zip(found, grads, strict=True):
            torch.testing.assert_close(g, t)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", FAMILY)
def test_runs_inside_a_head(monkeypatch, name):
    """Where sharding engines gather the weight: with the reference where the loss expects it, or none."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    entry = FAMILY[name]
    batch = Batch(name, next(iter(entry.variants)), seed=5)
    linear = torch.nn.Linear(*batch.weight.T.shape, bias=False)
    linear.weight.data = batch.weight.clone()
    ref = None if entry.ref == "unused" else fl.Hidden(batch.ref_x, batch.ref_weight)
    loss, options = functools.partial(entry.call, shift=False, **batch.options), batch.extra
    out = fl.FusedHead(linear)(batch.x, batch.y, ref, loss=loss, **options)
    expected, _ = batch.call(fl, torch.float32, "hidden", None if ref is None else "hidden")
    assert torch.equal(out.loss, expected.loss) and out.loss.requires_grad
    if ref is None and "ref" not in inspect.signature(entry.call).parameters:
        with pytest.raises(TypeError, match="takes no reference"):
            fl.FusedHead(linear)(batch.x, batch.y, fl.Hidden(batch.ref_x, batch.ref_weight), loss=loss, **options)


# Totals of the whole batch that micro-batches are told: options -> what is counted. COUPLED: losses that look across the
# batch, as their docstrings say.
TOTALS = {"num_items": "units"}
NLL = TOTALS | {"num_nll_tokens": "NLL tokens"}
BY_TOKENS = {"num_items": "tokens"}
COUPLED = {
    ("preference_loss", "aot"), ("preference_loss", "aot, smoothed"), ("preference_loss", "aot_unpaired"),
    ("preference_loss", "many"), ("grpo_loss", "bnpo"),
}  # fmt: skip


def given(name, variant):
    """Whether it comes with totals of its own."""
    return any(option.startswith("num_") for option in FAMILY[name].variants[variant])


def totals_of(name, variant):
    if name == "lta_thinker_loss":
        return TOTALS | {"num_nll_tokens": "tokens"}
    if name in ("simpo_loss", "cpo_loss", "orpo_loss", "tpo_loss", "preference_loss"):
        return NLL
    by_tokens = name == "grpo_loss" and FAMILY[name].variants[variant].get("loss_type") in policy_options.BY_TOKENS
    return BY_TOKENS if by_tokens else TOTALS


@pytest.mark.parametrize(("name", "variant"), [case for case in CASES if case not in COUPLED and not given(*case)])
def test_micro_batches_add_up(monkeypatch, name, variant):
    """One sequence, or pair, at a time, with the totals of the batch."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    batch = Batch(name, variant, seed=4)
    sequences, ref = len(batch.y), None if batch.entry.ref == "unused" else "hidden"
    each = EACH[batch.entry.batch]
    units = [list(range(b, sequences, sequences // each)) for b in range(sequences // each)]
    counts = {"units": len(units), "tokens": int((batch.y != -100).sum())}
    texts = batch.y[: sequences // 2] if each == 2 else batch.y[-(sequences // each) :]
    counts["NLL tokens"] = int((texts != -100).sum())
    if batch.entry.batch == "tokens":
        counts["units"] = counts["tokens"]
    whole, exact = batch.call(fl, torch.float32, "hidden", ref)
    loss, size, grads = 0.0, 0.0, [torch.zeros_like(g) for g in exact]
    x, ref_x, y, extra = batch.x, batch.ref_x, batch.y, batch.extra
    batch.options |= {option: counts[what] for option, what in totals_of(name, variant).items()}
    for rows in units:
        batch.x, batch.ref_x, batch.y = x[rows], ref_x[rows], y[rows]
        batch.extra = {n: t[rows] for n, t in extra.items()}
        out, found = batch.call(fl, torch.float32, "hidden", ref)
        loss, size = loss + out.loss, size + out.loss.abs()
        grads[0][rows] += found[0]
        grads[1] += found[1]
    assert (loss - whole.loss).abs() <= 1e-5 * size  # losses of both signs may cancel
    for g, t in zip(grads, exact, strict=True):
        assert relative(g, t.double()) <= 1e-5


def test_entries_are_documented():
    for name, entry in FAMILY.items():
        text = inspect.getdoc(entry.call) or ""
        assert ("metrics" in text or "as there" in text) and any(
            s in text for s in entry.source.replace(",", " ").split()
        ), name
        assert all(f"{n}" in text for n in entry.inputs), name


# ---- what users give and nobody thinks of ------------------------------------------------------------------------------


def test_log_probs_of_low_precision_are_summed_in_float32(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    logps, y = torch.full((2000,), -1.0), torch.zeros(2000, dtype=torch.long)
    cu = torch.tensor([0, 1000, 2000])
    for dtype in (torch.bfloat16, torch.float16):
        out = fl.cpo_loss(fl.LogProbs(logps.to(dtype)), y, cu_seqlens=cu, shift=False)
        assert out.loss.dtype == torch.float32 and out.metrics["logps/chosen"] == -1000
        odds = fl.orpo_loss(fl.LogProbs(-logps.to(dtype) * 1e-4), y, cu_seqlens=cu, shift=False).loss
        assert odds.isfinite()


@pytest.mark.parametrize("name", ["sigmoid", "cdpo", "robust", "hinge", "discopop", "aot"])
@pytest.mark.parametrize("where", ["policy", "reference"])
def test_a_suppressed_label_leaves_gradients_finite(backend, device, name, where):
    """-inf at the label of a chosen or a rejected token; with h = +inf the loss is 0."""
    for row, smoothing in ((0, 0.0), (2, 0.0)):
        z = torch.randn(4, 3, 11, device=device)
        w, y = torch.randn_like(z), torch.ones(4, 3, dtype=torch.long, device=device)
        (z if where == "policy" else w)[row, 1, 1] = -torch.inf
        z.requires_grad_()
        out = fl.preference_loss(z, y, w, loss_type=name, label_smoothing=smoothing, reduction="none", shift=False)
        assert not out.loss.isnan().any()
        (g,) = torch.autograd.grad(out.loss.sum(), z)
        assert g.isfinite().all()


def test_topk_from_hidden_states_of_any_stride(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    # Small: what the student gives to the rest is 1 - the mass of the K, in which a rest near 0 would cancel.
    x = torch.randn(3, 2, 5).mul(0.5).transpose(0, 1).requires_grad_()
    weight = torch.randn(11, 5).mul(0.5).requires_grad_()
    y, ids = torch.ones(2, 3, dtype=torch.long), torch.arange(4).expand(2, 3, 4)
    logps = torch.randn(2, 3, 5).log_softmax(-1)[..., :4]
    logps[0, 0, 2:] = -torch.inf  # fewer than K
    for tail in ("bucket", "renormalise", "ignore"):
        calls = [
            lambda leaves, f=f, tail=tail: f.topk_distillation_loss(
                fl.Hidden(*leaves), y, logps, ids, tail=tail, shift=False
            )
            for f in (fl, fl.reference)
        ]
        Judge(*calls, [x, weight]).gradients(tail, lambda out: out.loss)


@pytest.mark.parametrize("name", [n for n, entry in FAMILY.items() if entry.batch == "tokens"])
@pytest.mark.parametrize("cu", [[0, 5], [0, 20], [1, 6], [0.0, 6.0]], ids=str)
def test_offsets_of_tokens_are_checked(monkeypatch, name, cu):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    batch = Batch(name, next(iter(FAMILY[name].variants)))
    batch.x, batch.ref_x, batch.y = batch.x[0], batch.ref_x[0], batch.y[0]
    batch.extra = {n: x[0] for n, x in batch.extra.items()}
    batch.options["cu_seqlens"] = torch.tensor(cu)
    with pytest.raises((TypeError, ValueError), match="cu_seqlens"):
        batch.call(fl, torch.float32, "hidden", None if batch.entry.ref == "unused" else "hidden", {"shift": False})


def test_steps_that_are_not_there_may_be_nan():
    question, steps, answers = torch.randn(2, 4, requires_grad=True), torch.randn(2, 3, 4), torch.randn(2, 4)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    steps[~mask] = torch.nan
    steps.requires_grad_()
    loss = fl.reasoning_focus_loss(question, steps, answers, mask=mask)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (question, steps)))


Z, Y = torch.zeros(4, 3, 7), torch.zeros(4, 3, dtype=torch.long)
BAD = [
    (
        lambda: fl.dpo_loss(Z, Y, None, num_items=torch.ones(2), shift=False),
        r"num_items: expected a finite number >= 0 or a tensor of one element, got \[2\]",
    ),
    (lambda: fl.dpo_loss(Z, Y, None, num_items="3", shift=False), "num_items: expected a finite number >= 0.*got '3'"),
    (
        lambda: fl.dpo_loss(Z, Y, None, num_items=float("nan"), shift=False),
        "num_items: expected a finite number >= 0.*got nan",
    ),
    (lambda: fl.distillation_loss(Z, Y, Z, divergence="js", beta=0.3, shift=False), "beta: is of GKD's divergence"),
    (
        lambda: fl.upo_loss(Z, Y, Z, torch.zeros(4), loss_type="sigmoid", loss="hinge", shift=False),
        "unknown option 'loss'",
    ),
    (lambda: fl.dpo_loss(Z, Y, None, per_token={}, shift=False), "per_token"),
    (lambda: fl.cross_entropy_loss(Z, Y, divergences=(), shift=False), "divergences"),
]


@pytest.mark.parametrize(("call", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_input(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call()
