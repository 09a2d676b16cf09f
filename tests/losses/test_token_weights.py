"""`weights` of the losses of tokens: against the twin, from every source and plan, and what they mean."""

import math

import pytest
import torch
from family_batches import Batch
from helpers import relative

import fused_losses as fl
from fused_losses.losses import FAMILY

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = [name for name, entry in FAMILY.items() if "weights" in entry.options and entry.batch == "tokens"]
HOW = [{}, {"plan": "row_blocks"}, {"plan": "vocab_chunks"}, {"reduction": "sum"}, {"num_items": 7}]


def weighted(name, packed=False):
    made = Batch(name, next(iter(FAMILY[name].variants)), packed)
    made.extra["weights"] = torch.rand(made.y.shape)
    made.extra["weights"].view(-1)[::4] = 0
    made.extra["weights"][made.y == -100] = math.nan
    return made


def test_all_losses_of_tokens_take_them():
    assert {name for name, entry in FAMILY.items() if entry.batch == "tokens"} == set(TOKENS)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("name", TOKENS)
def test_match_the_twin(monkeypatch, name, how, packed):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    if name == "topk_distillation_loss" and how.get("plan") == "row_blocks":
        how = {}
    made, ref = weighted(name, packed), None if FAMILY[name].ref == "unused" else "hidden"
    made.compare("hidden", ref, **how)
    if "plan" not in how:
        made.compare("logits", ref, **how)


@pytest.mark.parametrize("name", TOKENS)
def test_whole_numbers_are_repetitions(monkeypatch, name):
    """A token with weight 2 counts as two tokens, in the mean too; one with weight 0 as none."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    made, ref = Batch(name, next(iter(FAMILY[name].variants))), None if FAMILY[name].ref == "unused" else "hidden"
    times = torch.randint(0, 3, made.y.shape)
    made.extra["weights"] = times.float()
    out, _ = made.call(fl, torch.float64, "hidden", ref)
    rows = torch.arange(times.numel()).repeat_interleave(times.flatten())
    del made.extra["weights"]
    made.x, made.ref_x, made.y = (x.flatten(0, 1)[rows] for x in (made.x, made.ref_x, made.y))
    made.extra = {n: x.flatten(0, 1)[rows] for n, x in made.extra.items()}
    repeated, _ = made.call(fl, torch.float64, "hidden", ref)
    torch.testing.assert_close(out.loss, repeated.loss)


def test_the_parts_of_the_loss_add_up():
    """Micro-batches without num_items: amounts and counts of the parts give the weighted mean of the whole."""
    z, y = torch.randn(4, 5, 7), torch.randint(7, (4, 5))
    w = torch.rand(4, 5)
    whole = fl.cross_entropy_loss(z, y, weights=w, shift=False)
    parts = [
        fl.cross_entropy_loss(z[i], y[i], weights=w[i], shift=False).parts["loss"][0] for i in (slice(2), slice(2, 4))
    ]
    total = sum(p.amounts.sum() for p in parts) / sum(p.counts.sum() for p in parts)
    torch.testing.assert_close(total, whole.loss)


def test_flags_and_nothing():
    z, y = torch.randn(3, 4, 7, requires_grad=True), torch.randint(7, (3, 4))
    kept = torch.rand(3, 4) > 0.4
    out = fl.cross_entropy_loss(z, y, weights=kept, shift=False)
    torch.testing.assert_close(out.loss, fl.cross_entropy_loss(z, y.masked_fill(~kept, -100), shift=False).loss)
    none = fl.cross_entropy_loss(z, y, weights=torch.zeros(3, 4), shift=False)
    (g,) = torch.autograd.grad(none.loss, z)
    assert none.loss == 0 and not g.any()


def test_dft_is_its_formula():
    z, y = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True), torch.randint(7, (3, 4))
    y[0, 1:] = -100
    logps = z.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None]).squeeze(-1)
    truth = (-logps.exp().detach() * logps)[y != -100].mean()
    out = fl.cross_entropy_loss(z, y, loss_type="dft", shift=False)
    torch.testing.assert_close(out.loss, truth)
    found, exact = (torch.autograd.grad(x, z)[0] for x in (out.loss, truth))
    assert relative(found, exact) <= 1e-12


Z, Y = torch.zeros(3, 4, 5), torch.zeros(3, 4, dtype=torch.long)
BAD = [
    (lambda: fl.cross_entropy_loss(Z, Y, weights=torch.ones(3), shift=False), ValueError,
     r"weights: expected \[3, 4\] on cpu, got \[3\]"),
    (lambda: fl.cross_entropy_loss(Z, Y, weights=torch.ones(3, 4), shift=True), ValueError, "leave its number out"),
    (lambda: fl.cross_entropy_loss(Z, Y, weights=2.0, shift=False), TypeError,
     "weights: expected a float or bool tensor, got float"),
    (lambda: fl.topk_distillation_loss(Z, Y, Z[..., :2], Y[..., None].expand(3, 4, 2), weights=Y, shift=False), TypeError,
     "weights: expected a float or bool tensor, got torch.int64"),
    (lambda: fl.cross_entropy_loss(Z, Y, loss_type="DFT", shift=False), ValueError, "expected one of nll, dft, got 'DFT'"),
    (lambda: fl.cross_entropy_loss(Z, Y, loss_type="dft", z_loss=0.1, shift=False), ValueError, "'dft' has neither"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
