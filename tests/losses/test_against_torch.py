"""Losses of tokens, and their twins, against torch.nn.functional."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import relative

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")

LIBRARIES = pytest.mark.parametrize("library", [fl, fl.reference], ids=["fused", "twin"])


@pytest.fixture
def sides():
    """Logits of both sides [3, 7, 41] in float64 and labels, a third of them ignored."""
    z, w = torch.randn(2, 3, 7, 41, dtype=torch.float64) * 2
    y = torch.randint(0, 41, (3, 7))
    y.view(-1)[::3] = -100
    return z.requires_grad_(), w.requires_grad_(), y


def same(mine, theirs, leaves):
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    for a, b in zip(torch.autograd.grad(mine, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        assert relative(a, b) <= 1e-9


@LIBRARIES
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_kl_div(sides, library, name):
    z, w, y = sides
    p, q = z.log_softmax(-1), w.log_softmax(-1)
    order = (p, q) if name == "forward_kl" else (q, p)  # torch's target comes first in KL(. || .)
    kl = F.kl_div(*(x[y != -100] for x in order), log_target=True, reduction="batchmean")
    same(library.distillation_loss(z, y, w, divergence=name, shift=False).loss, kl, [z, w])


@LIBRARIES
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy(sides, library, smoothing, reduction):
    z, _, y = sides
    given = {"label_smoothing": smoothing, "reduction": reduction}
    same(
        library.cross_entropy_loss(z, y, **given, shift=False).loss,
        F.cross_entropy(z.flatten(0, 1), y.flatten(), **given),
        [z],
    )


@LIBRARIES
def test_cross_entropy_of_each_token(sides, library):
    z, _, y = sides
    each = F.cross_entropy(z.movedim(-1, 1), y, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(
        library.cross_entropy_loss(z, y, reduction="none", label_smoothing=0.2, shift=False).loss, each
    )


@LIBRARIES
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_linear_cross_entropy(library, smoothing):
    leaves = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((12, 9), (41, 9), (41,))]
    y = torch.randint(0, 41, (12,))
    y[::4] = -100
    x, weight, bias = leaves
    theirs = F.linear_cross_entropy(x, weight, y, linear_bias=bias, label_smoothing=smoothing)
    same(library.cross_entropy_loss(fl.Hidden(*leaves), y, label_smoothing=smoothing, shift=False).loss, theirs, leaves)


@LIBRARIES
def test_entropy_is_that_of_a_categorical(sides, library):
    z, _, y = sides
    stats = library.token_stats(z, y, entropy=True, shift=False)
    categorical = torch.distributions.Categorical(logits=z)
    torch.testing.assert_close(stats.entropy, categorical.entropy().masked_fill(y == -100, 0))
    torch.testing.assert_close(stats.logps, categorical.log_prob(y.clamp(min=0)).masked_fill(y == -100, 0))
