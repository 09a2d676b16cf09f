"""EAFT and ASFT as LLaMA-Factory 0.9.5 writes them, and at their ends."""

import math

import pytest
import torch
from torch.nn import functional as F

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")

V = 61


def batch():
    z, y = torch.randn(3, 7, V, dtype=torch.float64), torch.randint(V, (3, 7))
    y[0, 4:] = -100
    return z.requires_grad_(), y


def shifted(z, y):
    flat, target = z[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1)
    return flat[target != -100], target[target != -100]


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_eaft_as_llama_factory_writes_it(monkeypatch, alpha):
    """Apart from its 3.0 for log 20."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, y = batch()
    source, target = shifted(z, y)
    with torch.no_grad():
        top = torch.topk(source, k=20, dim=-1).values
        logs = top - torch.logsumexp(top, dim=-1, keepdim=True)
        weight = (-(logs.exp() * logs).sum(-1) / math.log(20)) ** alpha
    expected = (F.cross_entropy(source, target, reduction="none") * weight).mean()
    out = fl.eaft_loss(z, y, alpha=alpha, shift=True)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(out.loss, z), torch.autograd.grad(expected, z))
    torch.testing.assert_close(out.metrics["gate"], weight.mean())


def test_asft_as_llama_factory_writes_it(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    (z, y), w = batch(), torch.randn(3, 7, V, dtype=torch.float64)
    source, target = shifted(z, y)
    nll = F.cross_entropy(source, target, reduction="none")
    kl = F.kl_div(source.log_softmax(-1), shifted(w, y)[0].softmax(-1), reduction="none").sum(-1)
    expected = (nll * torch.exp(-nll).detach()).mean() + 0.1 * kl.mean()
    out = fl.asft_loss(z, y, w, kl_weight=0.1, shift=True)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(out.loss, z), torch.autograd.grad(expected, z))


def test_gates_at_their_ends(backend):
    """A sure token and a suppressed vocabulary have the gate 0, k equal logits have 1; hidden states and logits agree."""
    z = torch.full((3, V), -30.0)
    z[0, 5] = 60.0
    z[1, :20] = 7.0
    z[2, 1:] = -torch.inf
    y = torch.tensor([5, 3, 0])
    gates = [fl.eaft_loss(z[[i]], y[[i]], shift=False).metrics["gate"].item() for i in range(3)]
    assert gates == pytest.approx([0.0, 1.0, 0.0], abs=1e-6)
    x, weight = torch.randn(3, 8), torch.randn(V, 8)
    torch.testing.assert_close(
        fl.eaft_loss(fl.Hidden(x, weight), y, shift=False).loss, fl.eaft_loss(x @ weight.T, y, shift=False).loss
    )


Z, Y = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
BAD = [
    (lambda: fl.eaft_loss(Z, Y, k=1, shift=False), ValueError, "k: expected an int from 2 to 128, got 1"),
    (lambda: fl.eaft_loss(Z, Y, shift=False), ValueError, "k: expected at most the number of tokens, 5, got 20"),
    (lambda: fl.eaft_loss(Z, Y, k=3, alpha=-1.0, shift=False), ValueError, "alpha: expected a finite number >= 0"),
    (lambda: fl.eaft_loss(fl.LogProbs(Z[..., 0]), Y, k=3, shift=False), ValueError, "policy: fl.LogProbs has no logits"),
    (lambda: fl.asft_loss(Z, Y, None, kl_weight=0.1, shift=False), ValueError, "ref: expected fl.Hidden or logits"),
    (lambda: fl.asft_loss(Z, Y, Z, shift=False), TypeError, "kl_weight"),
    (lambda: fl.asft_loss(Z, Y, Z, kl_weight=-0.1, shift=False), ValueError, "kl_weight: expected a finite number >= 0"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_gets_words(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()
