"""speculative_loss: values by hand, a draft vocabulary that is a part of the target's, ends of the acceptance, bad input."""

import math

import pytest
import torch
from helpers import double, logits, relative

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")

TYPES = ("tv", "neg_log_acceptance", "lk_hybrid")


def by_hand(z, w, loss_type, eta=3.0):
    """As the package speculators has them."""
    p, q = z.softmax(-1), w.softmax(-1)
    alpha = torch.minimum(p, q).sum(-1)
    if loss_type == "tv":
        return 1 - alpha
    if loss_type == "neg_log_acceptance":
        return -alpha.clamp(min=1e-5).log()
    weight = (-eta * alpha.detach()).exp()
    return weight * (q * (q.log() - p.log())).sum(-1) + (1 - weight) * (1 - alpha)


@pytest.mark.parametrize("loss_type", TYPES)
def test_by_hand(own_backend, device, loss_type):
    z, w = logits((3, 4, 29), device)
    y = torch.zeros(3, 4, dtype=torch.long, device=device)
    y[0, 1:] = -100
    out = fl.speculative_loss(z, y, w.detach(), loss_type=loss_type, shift=False)
    z64 = double(z)
    each = by_hand(z64, w.detach().double(), loss_type)
    truth = each[y != -100].mean()
    assert relative(out.loss, truth) <= 1e-5
    assert relative(*(torch.autograd.grad(x, t)[0] for x, t in ((out.loss, z), (truth, z64)))) <= 1e-5
    alpha = 1 - by_hand(z64, w.detach().double(), "tv")[y != -100].mean()
    assert out.metrics["acceptance"].item() == pytest.approx(alpha.item(), rel=1e-5)
    assert ("kl" in out.metrics) == (loss_type == "lk_hybrid")


def test_eta_goes_from_the_kl_to_tv(own_backend):
    z, w = torch.randn(4, 9), torch.randn(4, 9)
    y = torch.zeros(4, dtype=torch.long)
    kl = fl.distillation_loss(z, y, w, beta=0.0).loss
    tv = fl.speculative_loss(z, y, w, loss_type="tv").loss
    ends = [fl.speculative_loss(z, y, w, loss_type="lk_hybrid", eta=eta).loss for eta in (1e-9, 1e3)]
    torch.testing.assert_close(torch.stack(ends), torch.stack([kl, tv]))


def test_a_draft_vocabulary_is_a_part_of_the_targets(own_backend):
    """The target's rows of the head for these ids; a decay with the position in a block as weights."""
    ids = torch.tensor([2, 3, 5, 7, 11, 13])
    draft = fl.Hidden(torch.randn(2, 5, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True))
    states, weight = torch.randn(2, 5, 8), torch.randn(17, 8)
    y, decay = torch.zeros(2, 5, dtype=torch.long), (-torch.arange(5) / 4).exp().expand(2, 5)
    target = fl.Hidden(states, weight[ids])
    out = fl.speculative_loss(draft, y, target, loss_type="neg_log_acceptance", weights=decay, shift=False)
    whole = states @ weight.T
    each = by_hand(draft.hidden @ draft.weight.T, whole[..., ids], "neg_log_acceptance")
    torch.testing.assert_close(out.loss, (each * decay).sum() / decay.sum())


def test_nothing_is_accepted():
    """Disjoint distributions: the loss is bounded, the gradient finite."""
    z = torch.tensor([[0.0, -200.0]], requires_grad=True)
    w = torch.tensor([[-200.0, 0.0]])
    for loss_type, value in (("tv", 1.0), ("neg_log_acceptance", -math.log(1e-5)), ("lk_hybrid", 200.0)):
        out = fl.speculative_loss(z, torch.tensor([0]), w, loss_type=loss_type)
        (g,) = torch.autograd.grad(out.loss, z)
        assert out.loss.item() == pytest.approx(value, rel=1e-4) and g.isfinite().all()


Z, Y = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
BAD = [
    (lambda: fl.speculative_loss(Z, Y, Z, loss_type="tvd", shift=False), ValueError, "did you mean 'tv'"),
    (lambda: fl.speculative_loss(Z, Y, Z, loss_type="lk_hybrid", eta=0.0, shift=False), ValueError, "eta: expected"),
    (lambda: fl.speculative_loss(Z, Y, Z, loss_type="tv", eta=2.0, shift=False), ValueError, "eta: is for"),
    (
        lambda: fl.speculative_loss(Z, Y, None, loss_type="tv", shift=False),
        ValueError,
        "ref: expected fl.Hidden or logits",
    ),
    (lambda: fl.speculative_loss(Z, Y, Z, shift=False), TypeError, "loss_type"),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
