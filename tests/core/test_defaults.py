"""torch's default dtype and default device belong to the caller: no value depends on them."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from family_batches import CASES, FAMILY, Batch, sources_of

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")

PLANS = ("vocab_chunks", "row_blocks", "keep_logits", "frozen_head")
DTYPES = (torch.bfloat16, torch.float16, torch.float64)


def under_default(default, f):
    """f() under another default dtype, or the default device "meta"."""
    if default == "meta":
        with torch.device("meta"):
            return f()
    try:
        torch.set_default_dtype(default)
        return f()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(params=[*DTYPES, "meta"], ids=str)
def under(request):
    """Calls a function under another default."""
    return partial(under_default, request.param)


FIRST = [(name, next(iter(entry.variants))) for name, entry in FAMILY.items()]
LOSSES = [(*case, default) for default in (DTYPES[0], "meta") for case in CASES]
LOSSES += [(*case, default) for default in DTYPES[1:] for case in FIRST]


def same(found, expected, where):
    """Of tensors in whatever nesting: bit for bit, dtypes and devices too."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and found.device == expected.device, where
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=str(where))
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            same(found[name], x, (where, name))
    elif isinstance(expected, list | tuple):
        for a, b in zip(found, expected, strict=True):
            same(a, b, where)
    elif hasattr(expected, "__dict__"):
        same(vars(found), vars(expected), where)
    else:
        assert found == expected, where


def calls(batch):
    """Of both libraries, from all sources, and in every plan where it goes; with totals as tensors of integers."""
    parameters = inspect.signature(getattr(fl, batch.name)).parameters
    totals = {"num_items": torch.tensor(7), "num_nll_tokens": torch.tensor(11)}
    totals = {n: x for n, x in totals.items() if n not in batch.options and (n in parameters or n == "num_items")}
    for source, ref in sources_of(batch.entry):
        yield (fl, source, ref, {"entropy": source != "log-probs"})
        yield (fl.reference, source, ref, {})
    source, ref = sources_of(batch.entry)[0]
    for library in (fl, fl.reference):
        yield (library, source, ref, totals)
    for plan in PLANS:
        yield (fl, source, ref, {"plan": plan})


def answer(batch, library, source, ref, how):
    try:
        dtype = torch.float32 if library is fl else torch.float64
        return batch.call(library, dtype, source, ref, how)
    except ValueError as refusal:
        return str(refusal)


@pytest.mark.parametrize(("name", "variant", "default"), LOSSES, ids=str)
def test_losses(monkeypatch, name, variant, default):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    batch = Batch(name, variant, seed=6)
    for given in calls(batch):
        expected = answer(batch, *given)
        same(under_default(default, lambda given=given: answer(batch, *given)), expected, given)


def test_token_stats(backend, under, device):
    z, w, x, head = (torch.randn(s, device=device) for s in ((1, 4, 19), (1, 4, 19), (1, 4, 6), (19, 6)))
    y = torch.randint(0, 19, (1, 4), device=device)
    y[0, :2] = -100

    def stats(source, ref, leaf, **how):
        asked = ["forward_kl", "js", "alpha(a=0.3)", "alpha_beta"] if backend == "torch" else ["js"]
        out = fl.token_stats(source, y, ref, divergence=asked, entropy=True, collision=True, shift=True, **how)
        total = sum(d.sum() for d in out.divergence.values()) + out.logps.sum() + out.entropy.sum() + out.lse.sum()
        return out, torch.autograd.grad(total, leaf)

    def every():
        a, b = z.clone().requires_grad_(), x.clone().requires_grad_()
        found = [stats(fl.Logits(a, softcap=3.0, temperature=0.7), fl.Logits(w), a)]
        plans = ("vocab_chunks", "keep_logits", "frozen_head") if backend == "torch" else ("vocab_chunks",)
        return found + [stats(fl.Hidden(b, head, softcap=3.0), fl.Hidden(x * 2, head), b, plan=plan) for plan in plans]

    expected = every()
    same(under(every), expected, "token_stats")


def test_what_needs_no_model(under):
    r, v, mask = torch.randn(4, 6), torch.randn(4, 6), torch.rand(4, 6) > 0.3
    states, thoughts = torch.randn(4, 6), torch.randn(4, 3, 6)

    def every():
        delta = fl.RunningDelta(momentum=0.7)
        delta.update(r[0])
        found = [
            delta.update(r[1]),
            delta.state_dict(),
            fl.group_advantages(r[0], 3),
            fl.bradley_terry_loss(r, v, margin=0.1),
        ]
        for f in (fl, fl.reference):
            found += [
                f.expectile_loss(r, v),
                f.plackett_luce_loss(r, mask=mask),
                f.preference_matching_gap(r, v, beta=0.3),
                f.preference_matching_reward(r, v, threshold=0.3, beta=0.1, scores=r[:, 0], mask=mask),
                f.semantic_alignment_loss(states, thoughts),
                f.reasoning_focus_loss(states, thoughts, states * 2),
                f.entropy_from_logits(r),
                f.generalized_jsd_loss(r[None], v[None], beta=0.3),
                f.selective_log_softmax(r, mask.long(), 0.7),
            ]
        stats = fl.token_stats(thoughts, torch.ones(4, 3, dtype=torch.long, device="cpu"), shift=False)
        return [*found, fl.calibration(stats)]

    expected = every()
    same(under(every), expected, "plain")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_collators(dtype):
    from fused_losses.integrations.data import PreferenceCollator

    saved = {"ref_chosen_logps": [-0.3, -1.7], "ref_rejected_logps": [-0.1]}
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]} | saved]
    collate = PreferenceCollator(pad_token_id=0)
    expected = collate(rows)
    try:
        torch.set_default_dtype(dtype)
        found = collate(rows)
    finally:
        torch.set_default_dtype(torch.float32)
    assert "ref_logps" in expected
    same(found, expected, "collator")
