"""Every loss of the registry against its float64 twin: value, gradients and metrics, from logits, hidden states and log-probs,
padded and packed, in every plan."""

from __future__ import annotations

import pytest
import torch
from family_batches import CASES, Batch, sources_of
from helpers import EPS, double, kernels_of, one_of_each

import fused_losses as fl
from fused_losses.core.batch import EACH
from fused_losses.losses import FAMILY

pytestmark = pytest.mark.usefixtures("one_thread")


BATCHES = [
    (*case, packed) for case in CASES for packed in ((False,) if FAMILY[case[0]].batch == "tokens" else (False, True))
]


@pytest.mark.parametrize(("name", "variant", "packed"), BATCHES)  # tokens are packed as they come
def test_matches_the_twin(monkeypatch, name, variant, packed):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    batch = Batch(name, variant, packed)
    for source, ref in sources_of(batch.entry):
        batch.compare(source, ref)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_plans_and_options(monkeypatch, name, variant):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    batch = Batch(name, variant, seed=1)
    ref = None if batch.entry.ref == "unused" else "hidden"
    batch.compare("hidden", ref, plan="vocab_chunks", entropy=True, reduction="sum")
    batch.compare("hidden", ref, num_items=7)
    batch.compare("hidden", ref, reduction="none")
    if not any("per token" in kind for kind in batch.entry.inputs.values()):
        batch.compare("hidden", ref, shift=True)


def logits_of(name, variant, device="cpu"):
    """A batch, and what call() and compare() take for logits on both sides."""
    batch = Batch(name, variant, seed=2, device=device)
    return batch, "logits", None if batch.entry.ref == "unused" else "logits"


def kernels(case):
    batch, *sources = logits_of(*case)
    return kernels_of(lambda: batch.call(fl, torch.float32, *sources))


def pytest_generate_tests(metafunc):
    if "interpreted" in metafunc.fixturenames:
        metafunc.parametrize("interpreted", one_of_each(CASES, kernels), ids="-".join)


@pytest.mark.slow
def test_on_the_triton_backend(monkeypatch, device, interpreted):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton")
    batch, *sources = logits_of(*interpreted, device)
    batch.compare(*sources, 2e-5)


@pytest.mark.parametrize(("name", "variant", "packed"), BATCHES)
def test_parts_are_what_metrics_are_made_of(monkeypatch, name, variant, packed):
    """Their values add up to the metrics and to the loss; and those of some units to the metrics of these alone."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    batch = Batch(name, variant, packed, seed=3)
    ref = None if batch.entry.ref == "unused" else fl.Hidden(batch.ref_x, batch.ref_weight)
    count = len(batch.options["cu_seqlens"]) - 1 if packed else len(batch.y)
    count //= EACH[batch.entry.batch]

    def value(terms):
        return sum(x.value() for x in terms)

    def rounding(terms):
        """What a sum of the amounts, which may cancel, is off by: a few roundings of the sum of their sizes."""
        return 16 * EPS[torch.float32] * value([x._replace(amounts=x.amounts.abs()) for x in terms]).nan_to_num()

    for how in ({}, {"plan": "vocab_chunks"}):
        out = batch.loss(fl, torch.float32, fl.Hidden(batch.x, batch.weight), ref, entropy=True, **how)
        assert out.parts.keys() == out.metrics.keys() | {"loss"}
        for n, terms in out.parts.items():
            assert all(len(x.amounts) == count and not x.amounts.requires_grad for x in terms), n
            whole = out.loss if n == "loss" else out.metrics[n]
            if n == "loss" and "num_nll_tokens" in batch.options:
                continue  # those of a larger batch, of which this loss is no mean
            atol = max(1e-6, rounding(terms).item())
            torch.testing.assert_close(value(terms), whole, rtol=1e-5, atol=atol, equal_nan=True, msg=n)
    if packed:
        return
    units = torch.arange(2)
    rows = torch.cat([units + part * count for part in range(EACH[batch.entry.batch])])
    for n in ("x", "y", "ref_x"):
        setattr(batch, n, getattr(batch, n)[rows])
    batch.extra = {n: x[rows] for n, x in batch.extra.items()}
    ref = None if ref is None else fl.Hidden(batch.ref_x, batch.ref_weight)
    some = batch.loss(fl, torch.float32, fl.Hidden(batch.x, batch.weight), ref, entropy=True)
    for n, x in some.metrics.items():
        kept = value([part.first(2, count) for part in out.parts[n]])
        torch.testing.assert_close(kept, x, rtol=1e-4, atol=1e-5, equal_nan=True, msg=n)


def test_twins_are_there():
    for name in FAMILY:
        assert getattr(fl, name) is FAMILY[name].call
        assert getattr(fl.reference, name) is not getattr(fl, name)


def test_double_is_double():  # what the comparisons rest on
    assert double(torch.zeros(1)).dtype == torch.float64
