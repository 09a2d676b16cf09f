"""The references in float32, where logits are small and where they are large, against float64 of the same numbers: they may be
off by what rounding these numbers, and what is computed from them, changes. As they define what is correct, nothing may
underflow or overflow on the way."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from family_batches import CASES, Batch
from helpers import EPS
from rounding import RoundedAsFloat32

import fused_losses as fl
from fused_losses import divergences

pytestmark = pytest.mark.usefixtures("one_thread")

SCALES = [(1.0, 0.0), (30.0, 0.0), (100.0, 0.0), (1.0, 300.0)]  # of logits, and what is added to all
HIGHEST = 1e30  # what float32 is to hold, with gradients of which some cancel


def moved(x):
    """With its last digits of float32 lost."""
    return x + x.abs() * torch.randn_like(x) * EPS[torch.float32]


def check(call, leaves, others=()):
    """call(leaves, others) -> named tensors; both tuples are of one dtype."""
    wide = [x.double() for x in leaves], [x.double() for x in others]
    exact = answers(call, *wide)
    found = answers(call, leaves, others)

    @cache
    def roughs():
        with RoundedAsFloat32():
            return [answers(call, *([moved(x) for x in xs] for xs in wide)) for _ in range(4)]

    largest = max(1.0, max(x.abs().max().item() for x in leaves))
    for name, x in exact.items():
        if name == "rewards/accuracies":  # bounded rewards are equal where rounding leaves nothing of the difference
            continue
        mine, size, value = found[name].double(), x.norm(), exact[name.partition(", gradient")[0]].norm()
        # of a log-prob, however small it is; and of a value, of which gradients are differences
        lost = 4 * EPS[torch.float32] * max(largest, value.item())
        if not x.isfinite().all():
            assert torch.equal(mine.isfinite(), x.isfinite()), name
        elif value < HIGHEST:
            assert mine.isfinite().all(), name
            error, allowed = (mine - x).norm(), 1e-5 * size + lost
            if error > allowed:
                off = max((rough[name] - x).norm() for rough in roughs())
                assert error <= 30 * off + allowed, f"{name}: {error:.1e} of {size:.1e}, rounded {off:.1e}"
        elif "gradient" not in name:
            assert not mine.isnan().any(), name


def answers(call, leaves, others):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    named = call(leaves, others)
    found = {n: x.detach() for n, x in named.items()}
    for n, x in named.items():
        if x.requires_grad:
            for i, g in enumerate(torch.autograd.grad(x.sum(), leaves, retain_graph=True, allow_unused=True)):
                found[f"{n}, gradient {i}"] = torch.zeros_like(leaves[i]) if g is None else g
    return found


@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_losses(name, variant, scale):
    batch = Batch(name, variant, seed=8)
    z, w = (x @ head.T * scale[0] + scale[1] for x, head in ((batch.x, batch.weight), (batch.ref_x, batch.ref_weight)))
    leaves = [z] if batch.entry.ref == "unused" else [z, w]
    for n, kind in batch.entry.inputs.items():
        if "vector" in kind:  # hidden states, of which a softmax is taken
            batch.extra[n] = batch.extra[n] * scale[0]
    floats = [n for n, x in batch.extra.items() if x.is_floating_point()]

    def call(leaves, others):
        batch.extra |= dict(zip(floats, others, strict=True))
        out = batch.loss(fl.reference, leaves[0].dtype, *leaves, *[None] * (2 - len(leaves)))
        return {"loss": out.loss, **out.metrics}

    check(call, leaves, [batch.extra[n] for n in floats])


@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("key", [*divergences.names(), "js(beta=0.05)", "alpha(a=0.9)", "alpha_beta(a=1.5, b=0.2)"])
def test_divergences(key, scale):
    y = torch.randint(0, 29, (1,))

    def call(leaves, _):
        stats = fl.reference.token_stats(
            leaves[0], y, leaves[1], divergence=key, entropy=True, collision=True, shift=False
        )
        return {"logps": stats.logps, "entropy": stats.entropy, "collision": stats.collision, **stats.divergence}

    for _ in range(3):  # a row whose value float32 does not hold leaves no gradient to others
        check(call, [torch.randn(1, 29) * scale[0] + scale[1] for _ in range(2)])


@pytest.mark.parametrize("key", divergences.linkable())
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_links(key, scale):
    """f-DPO: exponentials of a sequence's log-ratio."""
    z, w = (torch.randn(4, 3, 17) * scale[0] + scale[1] for _ in range(2))
    y = torch.randint(0, 17, (4, 3))

    def call(leaves, _):
        return {"loss": fl.reference.dpo_loss(leaves[0], y, leaves[1], divergence=key, shift=False).loss}

    check(call, [z, w])


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_what_needs_no_model(scale):
    a, b = (torch.randn(2, 3, 11) * scale[0] + scale[1] for _ in range(2))
    y = torch.randint(0, 11, (2, 3))

    def call(leaves, _):
        a, b = leaves
        f = fl.reference
        named = {f"jsd {beta}": f.generalized_jsd_loss(a, b, beta=beta) for beta in (0.0, 0.1, 0.5, 0.9, 1.0)}
        return named | {
            "entropy": f.entropy_from_logits(a),
            "log-probs": f.selective_log_softmax(a, y, 0.7),
            "ranking": f.plackett_luce_loss(a),
            "pairs": f.bradley_terry_loss(a, b),
            "alignment": f.semantic_alignment_loss(a[:, 0], b),
            "focus": f.reasoning_focus_loss(a[:, 0], b, a[:, 1], temperature=0.005),
            "preferences": f.upo_loss(a, y, b, (a[:, 0, 0] * 10).detach(), shift=False).loss,
        }

    check(call, [a, b])


@pytest.mark.parametrize("name", divergences.names())
def test_tokens_that_neither_side_has(name):
    """Suppressed by -inf on both: as if the vocabulary were without them, in the gradient too."""
    z, w = (torch.randn(3, 9, dtype=torch.float64) for _ in range(2))
    less = [torch.cat([x, torch.full((3, 2), -torch.inf, dtype=torch.float64)], -1) for x in (z, w)]
    found = []
    for leaves in ([z, w], less):
        leaves = [x.clone().requires_grad_() for x in leaves]
        (value,) = fl.reference.token_stats(
            leaves[0], torch.zeros(3).long(), leaves[1], divergence=name, shift=False
        ).divergence.values()
        found.append((value, *(g[:, :9] for g in torch.autograd.grad(value.sum(), leaves))))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)
