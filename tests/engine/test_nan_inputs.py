"""NaN in what a loss is given beside the model: it reaches the loss where it counts, and nothing where it does not."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from family_batches import CASES, Batch

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")

PLANS = ("auto", "vocab_chunks", "row_blocks", "keep_logits")


def call(batch, ref, dtype=torch.float32, library=fl, logps=None, **how):
    """Output and gradients; ref "given": log-probs of the tokens, which are `logps`."""
    x, weight = (t.to(dtype).clone().requires_grad_() for t in (batch.x, batch.weight))
    other = None
    if ref == "hidden":
        other = fl.Hidden(batch.ref_x.to(dtype), batch.ref_weight.to(dtype))
    elif ref == "given":
        other = fl.LogProbs(logps.to(dtype))
    out = batch.loss(library, dtype, fl.Hidden(x, weight), other, **how)
    return out, torch.autograd.grad(out.loss.sum(), (x, weight))


def inputs_of(batch, ref):
    """Tensors of floats by name, with how many dimensions belong to tokens (2) or sequences (1)."""
    found = {
        n: 2 if "per token" in kind else 1
        for n, kind in batch.entry.inputs.items()
        if batch.extra[n].is_floating_point()
    }
    return found | ({"reference": 2} if ref == "given" else {})


@contextmanager
def plus(batch, logps, name, where, number=torch.nan):
    """The batch's tensor with so much more there."""
    holder, key = (batch.extra, name) if name != "reference" else (logps, "reference")
    before = holder[key]
    holder[key] = before.clone()
    holder[key][where] += number
    yield
    holder[key] = before


# Advantages of grpo_loss are per sequence or per token.
GIVEN = [
    (name, variant, tokens)
    for name, variant in CASES
    for tokens in ((False, True) if name == "grpo_loss" else (False,))
]


def prepared(name, variant, tokens):
    batch = Batch(name, variant, seed=7)
    ref = None if batch.entry.ref == "unused" else "hidden" if batch.entry.distribution else "given"
    if tokens:
        batch.extra["advantages"] = torch.randn(batch.y.shape)
    logps = {"reference": torch.randn(batch.y.shape) - 3}
    return batch, ref, logps, inputs_of(batch, ref) | ({"advantages": 2} if tokens else {})


@pytest.mark.parametrize(("name", "variant", "tokens"), GIVEN)
def test_where_it_does_not_count(monkeypatch, name, variant, tokens):
    """Bit for bit as without it."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    batch, ref, logps, kinds = prepared(name, variant, tokens)
    ignored = batch.y == -100
    for tensor in [n for n, dims in kinds.items() if dims == 2]:
        for how in ({}, {"plan": "vocab_chunks"}, {"reduction": "none"}):
            expected, exact = call(batch, ref, logps=logps["reference"], **how)
            with plus(batch, logps, tensor, ignored):
                found, grads = call(batch, ref, logps=logps["reference"], **how)
            assert torch.equal(found.loss, expected.loss), (tensor, how)
            for g, e in zip(grads, exact, strict=True):
                assert torch.equal(g, e), (tensor, how)
            for metric, x in expected.metrics.items():
                torch.testing.assert_close(found.metrics[metric], x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "variant", "tokens"), GIVEN)
def test_where_it_counts(monkeypatch, name, variant, tokens):
    """The loss is NaN in every plan, and the twin's is, wherever it depends on that number at all."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    batch, ref, logps, kinds = prepared(name, variant, tokens)

    def twin():
        out, grads = call(batch, ref, torch.float64, fl.reference, logps=logps["reference"])
        return torch.cat([out.loss.reshape(1), *(g.flatten() for g in grads)])

    for tensor, dims in kinds.items():
        where = tuple((batch.y != -100).nonzero()[3]) if dims == 2 else (2,)
        before, moved = twin(), []
        for number in (-50.0, -0.5, 0.5, 50.0):  # bounds hide some
            with plus(batch, logps, tensor, where, number):
                moved.append(twin())
        reads = any(not torch.equal(x, before) for x in moved)
        with plus(batch, logps, tensor, where):
            assert twin()[0].isnan() == reads, tensor
            for plan in PLANS:
                try:
                    out, _ = call(batch, ref, logps=logps["reference"], plan=plan)
                except ValueError as refusal:
                    assert "is not possible here" in str(refusal)  # a plan that this loss does not have
                else:
                    assert out.loss.isnan() == reads, (tensor, plan)
