"""upo_loss around any base, its weights and gradient; expectile_loss."""

import math

import pytest
import torch
from helpers import products, relative

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")

A = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)


def batch(dtype=torch.float64):
    z, w = torch.randn(4, 5, 11, dtype=dtype).requires_grad_(), torch.randn(4, 5, 11, dtype=dtype)
    y = torch.randint(0, 11, (4, 5))
    y[:, 0], y[1, 3:] = -100, -100
    return z, w, y


def test_value_and_gradient(monkeypatch):
    """By hand: the base's, and -weight w_s / S at each log-prob, nothing through w."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    p, q = torch.randn(2, 4, 3, dtype=torch.float64)
    p.requires_grad_()
    y = torch.zeros(4, 3, dtype=torch.long)
    base = fl.dpo_loss(fl.LogProbs(p), y, fl.LogProbs(q), beta=0.3, shift=False)
    out = fl.upo_loss(fl.LogProbs(p), y, fl.LogProbs(q), A, tau=0.8, weight=0.25, beta=0.3, shift=False)
    w = (A / 0.8).exp()
    assert out.loss.item() == pytest.approx((base.loss - 0.25 * (w * p.sum(1)).mean()).item(), rel=1e-12)
    found = torch.autograd.grad(out.loss, p)[0] - torch.autograd.grad(base.loss, p)[0]
    torch.testing.assert_close(found, (-0.25 * w / 4)[:, None].expand(4, 3))
    assert out.metrics["weights"].item() == pytest.approx(w.mean().item())
    assert out.metrics["nll"].item() == pytest.approx(-p.sum(1).mean().item())
    assert out.metrics["rewards/margins"] == base.metrics["rewards/margins"]
    clipped = fl.upo_loss(fl.LogProbs(p), y, fl.LogProbs(q), A, tau=0.8, weight=0.25, beta=0.3, clip=1.5, shift=False)
    expected = base.loss - 0.25 * (w.clamp(max=1.5) * p.sum(1)).mean()
    assert clipped.loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_no_advantage_and_little_weight_is_the_base():
    z, w, y = batch()
    base = fl.dpo_loss(z, y, w, shift=False)
    out = fl.upo_loss(z, y, w, 0 * A, weight=1e-12, shift=False)
    assert out.loss.item() == pytest.approx(base.loss.item(), rel=1e-9)


@pytest.mark.parametrize("how", [{}, {"reduction": "sum"}, {"reduction": "none"}, {"num_items": 7}], ids=str)
@pytest.mark.parametrize("name", ["ipo", "hinge", ("sigmoid", "bco_pair"), "kto_loss", "tdpo_loss", "simpo_loss"])
def test_any_base(monkeypatch, name, how):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, w, y = batch()
    options = {"desirable": torch.tensor([True, False, True, True])} if name == "kto_loss" else {}
    bases = [getattr(f, name) if isinstance(name, str) and name.endswith("_loss") else name for f in (fl, fl.reference)]
    if name == "simpo_loss":  # it has no reference to take
        bases = [lambda policy, labels, ref, f=f, **o: f(policy, labels, **o) for f in bases]
    call = {"shift": True, "tau": 0.7, "weight": 0.1, "clip": 3.0} | how | options
    ours = fl.upo_loss(z, y, w, A, loss_type=bases[0], **call)
    twin = fl.reference.upo_loss(z, y, w, A, loss_type=bases[1], **call)
    assert ours.loss.shape == twin.loss.shape
    if how.get("reduction") == "none":
        assert len(ours.loss) == (4 if name == "kto_loss" else 2)
    torch.testing.assert_close(ours.loss, twin.loss)
    found, exact = (torch.autograd.grad(x.loss.sum(), z)[0] for x in (ours, twin))
    assert relative(found, exact) <= 1e-12
    assert ours.metrics.keys() == twin.metrics.keys()


def test_advantages_from_rewards_and_values():
    z, w, y = batch()
    values = torch.randn(4, dtype=torch.float64).requires_grad_()
    pair = fl.upo_loss(z, y, w, (A + values, values), shift=False)
    torch.testing.assert_close(pair.loss, fl.upo_loss(z, y, w, A, shift=False).loss)
    pair.loss.backward()
    assert values.grad is None  # nothing goes through the weights


def test_one_pass_from_hidden_states(monkeypatch):
    """The base and the likelihood share their pass over the vocabulary."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    x, weight = torch.randn(4, 5, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    y = torch.randint(0, 40, (4, 5))
    how = {"plan": "vocab_chunks", "shift": False}

    def run():
        fl.upo_loss(fl.Hidden(x, weight), y, None, A.float(), **how).loss.backward()

    def base():
        fl.dpo_loss(fl.Hidden(x, weight), y, None, **how).loss.backward()

    assert len(products(run)) == len(products(base))


def test_huge_advantages_and_no_tokens(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, w, y = batch(torch.float32)
    out = fl.upo_loss(z, y, w, torch.tensor([1e9, -1e9, 200.0, 0.0]), shift=False)
    assert out.loss.isfinite() and torch.autograd.grad(out.loss, z)[0].isfinite().all()
    assert out.metrics["weights"].item() == pytest.approx(2 * math.exp(80) / 4, rel=1e-5)
    out = fl.upo_loss(z, torch.full_like(y, -100), w, A.float(), shift=False)
    assert out.loss.item() == pytest.approx(math.log(2)) and not torch.autograd.grad(out.loss, z)[0].any()
    assert fl.upo_loss(z[:0], y[:0], w[:0], A[:0].float(), shift=False).loss == 0


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9])
def test_expectile(q):
    r, v = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64).requires_grad_()
    for how in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"num_items": 9}):
        torch.testing.assert_close(fl.expectile_loss(r, v, q, **how), fl.reference.expectile_loss(r, v, q, **how))
    assert torch.autograd.gradcheck(lambda v: fl.expectile_loss(r, v, q), v)
    m = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([m], max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = fl.expectile_loss(r, m.expand(50), q)
        loss.backward()
        return loss

    optimizer.step(closure)
    # What makes a constant the expectile: the distance to what lies above it is to that below as 1 - q to q.
    above, below = (r - m).clamp(min=0).sum().item(), (m - r).clamp(min=0).sum().item()
    assert q * above == pytest.approx((1 - q) * below, rel=1e-6)
    one = torch.zeros(1, dtype=torch.float64).requires_grad_()
    fl.expectile_loss(torch.ones_like(one).requires_grad_(), one, q).backward()
    assert one.grad.item() == pytest.approx(-2 * q)


Z, Y, S = torch.zeros(4, 3, 5), torch.zeros(4, 3, dtype=torch.long), torch.zeros(4)
BAD = [
    (lambda: fl.upo_loss(Z, Y, Z, S, loss_type="dpo", shift=False), ValueError, "unknown name 'dpo'"),
    (lambda: fl.upo_loss(Z, Y, Z, S, loss_type=fl.distillation_loss, shift=False), TypeError, "teacher"),
    (lambda: fl.upo_loss(Z, Y, Z, S[:3], shift=False), ValueError, r"advantages: expected \[4\].*got \[3\]"),
    (
        lambda: fl.upo_loss(Z, Y, Z, Y[:, 0], shift=False),
        TypeError,
        "advantages: expected a .*float32.* tensor, got torch.int64",
    ),
    (lambda: fl.upo_loss(Z, Y, Z, (S, S[:3]), shift=False), ValueError, r"values: expected \[4\]"),
    (
        lambda: fl.upo_loss(Z, Y, Z, [S, S], shift=False),
        TypeError,
        r"advantages: expected a tensor or \(rewards, values\), got list",
    ),
    (lambda: fl.upo_loss(Z, Y, Z, S, tau=0, shift=False), ValueError, "tau: expected a finite number > 0, got 0"),
    (lambda: fl.upo_loss(Z, Y, Z, S, weight=-1.0, shift=False), ValueError, "weight"),
    (lambda: fl.upo_loss(Z, Y, Z, S, clip=0.0, shift=False), ValueError, "clip"),
    (lambda: fl.upo_loss(Z, Y, Z, S, reduction="avg", shift=False), ValueError, "reduction"),
    (lambda: fl.upo_loss(Z, Y, Z, S, gamma=1.0, shift=False), TypeError, "gamma"),
    (
        lambda: fl.upo_loss(
            Z, Y, Z, S, loss_type=lambda p, y, ref, **o: fl.cross_entropy_loss(p, y, shift=False), shift=False
        ),
        ValueError,
        "loss_type: expected losses",
    ),
    (lambda: fl.expectile_loss(S, S, 1.0), ValueError, r"q: expected a number in \(0, 1\), got 1.0"),
    (lambda: fl.expectile_loss(S, Z), ValueError, r"values: expected \[4\] as rewards"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_gets_words(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()
