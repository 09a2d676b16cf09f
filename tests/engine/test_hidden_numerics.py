"""fl.Hidden in each dtype: no plan is worse than eager code, and errors do not grow with the number of slices."""

import pytest
import torch
from helpers import (
    EPS,
    Judge,
    asking,
    compare_sources,
    doubles,
    generator_of,
    gradients_of,
    hidden_leaves,
    hidden_source,
    labels_for,
    least_workspace,
    outputs,
    relative,
)
from hidden_calls import NAMES, PAIR_PLANS, SLICED, both_sides, cases, frozen_head, judge_dpo, tight, two_sources

import fused_losses as fl
from fused_losses.engine import planner

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- dtypes ------------------------------------------------------------------------------------------------------------


LOW = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@cases(["frozen_head", "keep_logits", "vocab_chunks"], SLICED)
def test_low_precision_is_never_worse_than_eager(backend, device, plan, dtype):
    """Value and gradients against what eager torch loses in the same dtype; one rounding of a gradient is free."""
    leaves = both_sides((4,), device, vocab=60, dtype=dtype, rank=2, ref_grad=plan != "frozen_head")
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    y = labels_for((4,), 60, device)
    names = NAMES if backend == "torch" else ["reverse_kl", "js"]

    def call(f, **how):
        options = {"divergence": names, "entropy": True, **how}
        return lambda leaves: f.token_stats(two_sources(leaves)[0], y, two_sources(leaves)[1], **options, shift=False)

    judge = Judge(call(fl, plan=plan), call(fl.reference), leaves, slack=1.0)
    for key in outputs(judge.truth):
        judge.value(key, lambda stats, key=key: outputs(stats)[key])
    judge.tolerance = EPS[dtype]
    for key, value in outputs(judge.truth).items():
        if value.requires_grad and (backend == "torch" or key in ("logps", "js")):
            weight = torch.randn(value.shape, device=device)
            judge.gradients(
                key, lambda stats, key=key, w=weight: (outputs(stats)[key] * w.to(outputs(stats)[key].dtype)).sum()
            )


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("plan", [p for p in PAIR_PLANS if p != "on_chip"])
def test_gradients_are_rounded_once(device, monkeypatch, dtype, plan):
    """Summed in float32 over blocks and slices, scaled by the loss's factor of a third, and then rounded."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch" if device.type == "cpu" else "triton")
    leaves = hidden_leaves((6, 5), 16, 600, device, dtype=dtype, rank=4)
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    y = torch.randint(0, 600, (6, 5), device=device)
    build = lambda leaves: (hidden_source(leaves), None)  # noqa: E731
    call = lambda bytes: fl.dpo_loss(hidden_source(leaves), y, None, plan=plan, workspace=bytes, shift=False)  # noqa: E731
    few = (
        2 * least_workspace(call) * (2 if plan == "frozen_head" else 1)
        if plan in ("vocab_chunks", "frozen_head", "row_blocks")
        else None
    )
    judge = judge_dpo(build, leaves, y, how={"plan": plan, "workspace": few})
    wanted = gradients_of(judge.truth.loss, judge.exact)
    for g, t, x in zip(gradients_of(judge.mine.loss, leaves), wanted, asking(leaves), strict=True):
        once = relative(t.to(dtype), t)
        slack = 1.1 if device.type == "cpu" else 3.0  # dz is rounded too where products take no other factors
        assert g.dtype == dtype and relative(g, t) <= slack * once, (
            f"{list(x.shape)}: {relative(g, t) / once:.2f} roundings"
        )


@pytest.mark.parametrize("plan", [p for p in PAIR_PLANS if p != "on_chip"])
def test_loss_scaling_in_float16(device, monkeypatch, plan):
    """GradScaler's first scale, 65536, is no number in float16; the gradients it makes are."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch" if device.type == "cpu" else "triton")
    leaves = hidden_leaves((2, 3), 16, 60, device, dtype=torch.float16)
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    y = torch.randint(0, 60, (2, 3), device=device)
    judge = judge_dpo(lambda leaves: (hidden_source(leaves), None), leaves, y, 1e-3, how={"plan": plan})
    judge.gradients("scaled", lambda out: out.loss * 65536.0)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@cases(["vocab_chunks", "keep_logits", "row_blocks"], ["row_blocks"])
def test_hidden_and_weight_of_different_dtypes(backend, device, dtypes, plan):
    """Each gradient comes in the dtype of its tensor; on a CPU, where factors are never rounded, from exact products."""
    if device.type != "cpu":
        pytest.skip("products of the dtype of the hidden states")
    leaves = [x for x in hidden_leaves((2, 3), 16, 60, device) if x is not None]
    leaves = [x.detach().to(d).requires_grad_() for x, d in zip(leaves, (*dtypes, torch.float32), strict=True)]
    y = labels_for((2, 3), 60, device)
    loss, exact = fl.dpo_loss(fl.Hidden(*leaves), y, None, plan=plan, shift=False).loss, doubles(leaves)
    truth = fl.reference.dpo_loss(fl.Hidden(*exact), y, None, shift=False).loss
    assert relative(loss, truth) <= 1e-6
    for g, t, x in zip(gradients_of(loss, leaves), gradients_of(truth, exact), leaves, strict=True):
        assert g.dtype == x.dtype and relative(g, t) <= max(1e-5, EPS[x.dtype])  # one rounding


@pytest.mark.parametrize("plan", [p for p in PAIR_PLANS if p != "on_chip"])
def test_float64(device, monkeypatch, plan):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    leaves = both_sides((4, 3), device, dtype=torch.float64)
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    y = labels_for((4, 3), 41, device)
    if plan != "row_blocks":
        policy, ref = two_sources(leaves)
        how = tight(
            plan, lambda **how: fl.token_stats(policy, y, ref, divergence=NAMES, entropy=True, **how, shift=False)
        )
        compare_sources(two_sources, leaves, y, 1e-12, how=how, divergence=NAMES, entropy=True)
    judge = judge_dpo(two_sources, leaves, y, 1e-12, how={"plan": plan}, divergence="js")
    judge.value("loss", lambda out: out.loss)
    judge.gradients("loss", lambda out: 3 * out.loss)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [p for p in PAIR_PLANS if p != "on_chip"])
def test_gradcheck(monkeypatch, plan):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    leaves = [x for x in hidden_leaves((2, 2), 3, 7, "cpu", dtype=torch.float64, rank=2)]
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    ref, y = hidden_source(doubles(hidden_leaves((2, 2), 3, 7, "cpu"))), torch.tensor([[1, -100], [6, 0]])
    ref = fl.Hidden(ref.hidden.detach(), ref.weight.detach())

    def run(*leaves):
        if plan == "row_blocks":
            return fl.dpo_loss(hidden_source(leaves), y, ref, plan=plan, shift=False).loss
        stats = fl.token_stats(hidden_source(leaves), y, ref, divergence=NAMES, entropy=True, plan=plan, shift=False)
        return tuple(x for x in outputs(stats).values() if x.requires_grad)

    assert torch.autograd.gradcheck(run, leaves)


@cases(PAIR_PLANS, ["row_blocks", *SLICED])
def test_autocast(backend, device, plan):
    """Float32 leaves under autocast: products in bfloat16, as a linear layer's, and gradients in float32."""
    leaves = both_sides((2, 3), device, rank=0)
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    y = labels_for((2, 3), 41, device)

    def call(f, **how):
        def run(leaves):
            with torch.autocast(device.type, torch.bfloat16, enabled=leaves[0].dtype != torch.float64):
                return f.dpo_loss(two_sources(leaves)[0], y, two_sources(leaves)[1], **how, shift=False)

        return run

    judge = Judge(call(fl, plan=plan), call(fl.reference), leaves, 2 * EPS[torch.bfloat16], slack=1.0)
    assert judge.mine.loss.dtype == torch.float32
    judge.value("loss", lambda out: out.loss)
    judge.value("log-probs", lambda out: out.stats.logps)
    judge.gradients("loss", lambda out: out.loss)


# ---- numerics ----------------------------------------------------------------------------------------------------------


def sum_errors(monkeypatch, plan, tile):
    """Relative errors of the gradients at hidden states and weight with tiles of this shape, and those of eager code."""
    generator = generator_of(7)
    new = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    leaves = [
        new(64, 32).requires_grad_(),
        (new(16384, 32) * 0.3).requires_grad_(plan != "frozen_head"),
        None,
        None,
        None,
    ]
    y = torch.randint(0, 16384, (64,), generator=generator)
    monkeypatch.setattr(planner, "tile_shape", lambda inputs, budget: planner.Tile(*tile))

    def gradients(f, leaves, **how):
        stats = f.token_stats(hidden_source(leaves), y, entropy=True, **how, shift=False)
        return gradients_of((stats.logps - 0.1 * stats.entropy).sum(), leaves)

    truth = gradients(fl.reference, doubles(leaves))
    found = gradients(fl, leaves, plan=plan), gradients(fl.reference, leaves)
    return [[relative(g, t) for g, t in zip(grads, truth, strict=True)] for grads in found]


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["vocab_chunks", "frozen_head"])
def test_errors_do_not_grow_with_the_number_of_slices(monkeypatch, plan):
    """In 1024 slices of 16 tokens, gradients are as exact as eager code's: both have roundings of their own."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    for slices in (1, 16, 256, 1024):
        errors, eager = sum_errors(monkeypatch, plan, (64, 16384 // slices))
        assert all(e <= 1.3 * b for e, b in zip(errors, eager, strict=True)), (slices, errors, eager)


def test_errors_do_not_grow_with_the_number_of_tiles_in_a_column(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    base, _ = sum_errors(monkeypatch, "vocab_chunks", (64, 2048))
    for rows in (16, 4):
        errors, _ = sum_errors(monkeypatch, "vocab_chunks", (rows, 2048))
        assert all(e <= 1.5 * b for e, b in zip(errors, base, strict=True)), (rows, errors, base)


def test_errors_do_not_grow_with_the_number_of_row_blocks(monkeypatch):
    """Up to the 128 that the planner allows itself."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    generator = generator_of(7)
    new = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    leaves = [new(4096, 16).requires_grad_(), (new(1024, 16) * 0.3).requires_grad_(), None, None, None]
    teacher = [new(4096, 16), new(1024, 16) * 0.3, None, None, None]
    y = torch.randint(0, 1024, (4096,), generator=generator)

    def gradients(f, leaves, teacher, **how):
        options = {"divergence": "forward_kl", "hard": 1.0, **how}
        return gradients_of(
            f.distillation_loss(hidden_source(leaves), y, hidden_source(teacher), **options, shift=False).loss, leaves
        )

    truth = gradients(fl.reference, doubles(leaves), doubles(teacher))
    eager = [relative(g, t) for g, t in zip(gradients(fl.reference, leaves, teacher), truth, strict=True)]
    for blocks in (1, 16, planner.MANY):
        monkeypatch.setattr(planner, "_block_rows", lambda inputs, budget, rows=4096 // blocks: rows)
        found = gradients(fl, leaves, teacher, plan="row_blocks", workspace=1 << 30)
        errors = [relative(g, t) for g, t in zip(found, truth, strict=True)]
        assert all(e <= 1.1 * b for e, b in zip(errors, eager, strict=True)), (blocks, errors, eager)
