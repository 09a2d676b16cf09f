"""tdpo_loss: published values, gradients in closed form, what it is at the ends of its options, every divergence."""

import math

import pytest
import torch
from helpers import double, logits, relative

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")


def batch(device, pairs=3, length=5, vocab=23):
    z, w = logits((2 * pairs, length, vocab), device, spread=0.5)
    y = torch.randint(0, vocab, (2 * pairs, length), device=device)
    y[:, 0] = -100
    y[1, 3:] = -100
    return z, w, y


def test_published_values():
    z = [[[1, 0, -1, 0.5], [0.3, -0.2, 0.8, 0]], [[-1, 0.4, 0.2, 0.6], [0] * 4]]
    w = [[[0.2, 0.7, -0.5, 0.1], [0, 0, 0.5, 0.1]], [[-0.5, 0.3, 0, 0.2], [0] * 4]]
    z, w, y = (
        torch.tensor(z, dtype=torch.float64),
        torch.tensor(w, dtype=torch.float64),
        torch.tensor([[0, 2], [1, -100]]),
    )
    values = {
        0.6405063609831316: {"loss_type": "tdpo1"},
        0.6451564886535707: {"alpha": 0.5},
        0.6498305991132274: {"alpha": 0},
    }
    for value, options in values.items():
        for library in (fl, fl.reference):
            out = library.tdpo_loss(z, y, w, beta=0.1, **options, shift=False)
            assert out.loss.item() == pytest.approx(value, rel=1e-12)
    assert out.metrics["kl/chosen"].item() == pytest.approx(0.23170172675141876, rel=1e-12)
    assert out.metrics["kl/rejected"].item() == pytest.approx(0.035575291182849494, rel=1e-12)
    chosen = 0.1 * (0.8258374397402499 + 0.23170172675141876)
    rejected = 0.1 * (-0.06011036284009519 + 0.035575291182849494)
    assert out.metrics["rewards/chosen"].item() == pytest.approx(chosen, rel=1e-12)
    assert out.metrics["rewards/rejected"].item() == pytest.approx(rejected, rel=1e-12)
    assert out.metrics["rewards/margins"].item() == pytest.approx(chosen - rejected, rel=1e-12)
    assert out.metrics["rewards/accuracies"] == 1


@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_gradients_in_closed_form(own_backend, device, variant):
    """With g = sigmoid(-margin): TDPO1's softmax of the policy cancels; TDPO2's divergence acts on the rejected alone."""
    z, w, y = batch(device)
    beta, alpha = 0.3, 0.7
    out = fl.tdpo_loss(z, y, w.detach(), loss_type=variant, alpha=alpha, beta=beta, reduction="none", shift=False)
    found = torch.autograd.grad(out.loss.sum(), z)[0]

    log_p, log_r, counts = z.detach().double().log_softmax(-1), w.detach().double().log_softmax(-1), y != -100
    p, r = log_p.exp(), log_r.exp()
    label = torch.nn.functional.one_hot(y.clamp(min=0), z.shape[-1])
    h = (((log_p - log_r) * label).sum(-1) * counts).sum(1)
    kl = ((r * (log_r - log_p)).sum(-1) * counts).sum(1)
    weight = 1 if variant == "tdpo1" else alpha
    margin = beta * (h[:3] - h[3:] + weight * (kl[:3] - kl[3:]))
    torch.testing.assert_close(out.loss.double(), (1 + (-margin).exp()).log(), rtol=1e-5, atol=1e-6)
    g = beta * torch.sigmoid(-margin)[:, None, None]
    if variant == "tdpo1":
        expected = torch.cat([-g * (label - r)[:3], g * (label - r)[3:]])
    else:
        expected = torch.cat([-g * (label - p)[:3], g * ((label - p) + alpha * (p - r))[3:]])
    assert relative(found, expected * counts[..., None]) <= 1e-5


def test_ends_of_alpha(own_backend, device):
    z, w, y = batch(device)
    w = w.detach()

    def run(loss, **options):
        out = loss(z, y, w, beta=0.4, shift=False, **options)
        return out.loss, torch.autograd.grad(out.loss, z)[0]

    (value, grad), (dpo, dpo_grad) = run(fl.tdpo_loss, alpha=0), run(fl.dpo_loss)
    torch.testing.assert_close(value, dpo)
    torch.testing.assert_close(grad, dpo_grad)
    (value, grad), (one, one_grad) = run(fl.tdpo_loss, alpha=1), run(fl.tdpo_loss, loss_type="tdpo1")
    torch.testing.assert_close(value, one)
    assert relative(grad[:3], one_grad[:3]) > 0.01  # stopped
    torch.testing.assert_close(grad[3:], one_grad[3:])


@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
@pytest.mark.parametrize("key", [*fl.divergences.names(), "alpha(a=0.3)"])
def test_every_divergence(device, monkeypatch, key, variant):
    """Against the twin, in the gradients of both sides; and the twin's divergence is the definition's."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, w, y = batch(device)
    options = {"divergence": key, "loss_type": variant, "beta": 0.2, "alpha": 1.5}
    z64, w64 = double(z), double(w)
    mine, truth = (
        fl.tdpo_loss(z, y, w, **options, shift=False),
        fl.reference.tdpo_loss(z64, y, w64, **options, shift=False),
    )
    assert relative(mine.loss, truth.loss) <= 1e-5
    for g, t in zip(torch.autograd.grad(mine.loss, (z, w)), torch.autograd.grad(truth.loss, (z64, w64)), strict=True):
        assert relative(g, t) <= 2e-5
    d = fl.divergences.from_key(key).define(z64.log_softmax(-1), w64.log_softmax(-1)) * (y != -100)
    torch.testing.assert_close(truth.metrics["kl/chosen"], d[:3].sum(1).mean().detach())
    torch.testing.assert_close(mine.metrics["kl/rejected"].double(), d[3:].sum(1).mean().detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_policy_is_the_reference(device, monkeypatch, variant):
    """As after a hard TR-DPO update: log 2, and the gradient of DPO, for a divergence is flat at its minimum."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, _, y = batch(device)
    for key in ("forward_kl", "js", "pearson_chi2"):
        out = fl.tdpo_loss(z, y, z.detach(), loss_type=variant, divergence=key, shift=False)
        assert out.loss.item() == pytest.approx(math.log(2))
        assert out.metrics["kl/chosen"] == 0
        dpo = torch.autograd.grad(fl.dpo_loss(z, y, z.detach(), shift=False).loss, z)[0]
        torch.testing.assert_close(torch.autograd.grad(out.loss, z)[0], dpo)


def test_pairs_without_tokens(backend, device, poison):
    z, w, y = batch(device)
    y[1], y[4] = -100, -100
    out = fl.tdpo_loss(z, y, w, reduction="none", shift=False)
    assert out.loss[1].item() == pytest.approx(math.log(2))
    g = torch.autograd.grad(out.loss.sum(), z)[0]
    assert g.isfinite().all() and not g[1].any() and not g[4].any() and g[0].any()


def test_micro_batches(device, monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, w, y = batch(device)
    whole = torch.autograd.grad(fl.tdpo_loss(z, y, w, shift=False).loss, z)[0]
    parts = [fl.tdpo_loss(z[rows], y[rows], w[rows], num_items=3, shift=False).loss for rows in ([0, 3], [1, 2, 4, 5])]
    torch.testing.assert_close(torch.autograd.grad(sum(parts), z)[0], whole)


Z, Y = torch.zeros(4, 3, 5), torch.zeros(4, 3, dtype=torch.long)
BAD = [
    (lambda f: f(Z, Y, Z, loss_type="tdpo", shift=False), ValueError,
     "loss_type: expected one of tdpo1, tdpo2, got 'tdpo'; did you mean"),
    (lambda f: f(Z, Y, Z, alpha=-1, shift=False), ValueError, "alpha: expected a finite number >= 0, got -1"),
    (lambda f: f(Z, Y, Z, beta=0, shift=False), ValueError, "beta: expected a finite number > 0, got 0"),
    (lambda f: f(Z, Y, Z, divergence="kl", shift=False), ValueError, "unknown name 'kl'; known"),
    (lambda f: f(Z, Y, None, shift=False), ValueError, "ref: expected fl.Hidden or logits.*got None"),
    (lambda f: f(Z, Y, fl.LogProbs(torch.zeros(4)), shift=False), ValueError,
     "ref: expected fl.Hidden or logits.*got fl.LogProbs"),
    (lambda f: f(fl.LogProbs(torch.zeros(4, 3)), Y, Z, shift=False), ValueError, "policy: expected fl.Hidden or logits"),
    (lambda f: f(Z[:3], Y[:3], Z[:3], shift=False), ValueError, r"labels: expected \[2B, T\]"),
    (lambda f: f(Z, Y, Z, reduction="avg", shift=False), ValueError, "reduction"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_gets_words(case):
    call, error, words = BAD[case]
    for library in (fl, fl.reference):
        with pytest.raises(error, match=words):
            call(library.tdpo_loss)


def test_unknown_options_are_refused():
    for options in ({"label_smoothing": 0.1}, {"loss": "sigmoid"}, {"divergences": ()}, {"unit": "pair"}):
        with pytest.raises(TypeError, match=next(iter(options))):
            fl.tdpo_loss(Z, Y, Z, **options, shift=False)
