"""distillation_loss and sampled_distillation_loss: published values, closed-form gradients, ends of ranges, bad input."""

import math

import pytest
import torch
from helpers import ULP, double, logits, relative

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")

STUDENT, TEACHER = [1.0, 0.0, -1.0, 0.5], [0.2, 0.7, -0.5, 0.1]
VALUES = [
    ({"beta": 0.0}, 0.20718619920862485),  # KL(teacher || student)
    ({"beta": 1.0}, 0.19223995023397894),
    ({"beta": 0.1}, 0.018347160585359564),
    ({"beta": 0.5}, 0.04880754272985516),
    ({}, 0.04880754272985516),
    ({"beta": 0.9}, 0.017299460992734984),
    ({"divergence": "forward_kl"}, 0.20718619920862485),
    ({"divergence": "reverse_kl"}, 0.19223995023397894),
    ({"divergence": "js(beta=0.1)"}, 0.018347160585359564),  # DistiLLM's js_distance(lam=0.9)
    ({"divergence": "total_variation"}, 0.29116732164497566),
    ({"divergence": "skew_forward_kl"}, 0.16265580513595868),
    ({"divergence": "skew_reverse_kl(lam=0.1)"}, 0.1558032867870694),
    ({"divergence": "alpha_beta"}, 0.22151925950571963),  # a = 0.2, b = 0.7
    ({"divergence": "alpha_beta(a=1, b=1)"}, 0.056622094756793834),
    ({"divergence": "alpha(a=0.5)"}, 0.19743812815378975),  # Amari's
]


def published(*logits):
    return [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in logits]


@pytest.mark.parametrize(("options", "value"), VALUES, ids=[str(o) for o, _ in VALUES])
def test_published_values(monkeypatch, options, value):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, w = published(STUDENT, TEACHER)
    for library in (fl, fl.reference):
        out = library.distillation_loss(z, torch.tensor([0]), w, **options, shift=False)
        assert out.loss.item() == pytest.approx(value, rel=1e-11)
        assert out.metrics["kl"].item() == pytest.approx(value, rel=1e-11)


def test_the_published_form_of_distillm_differs_by_a_constant(monkeypatch):
    """Its code returns the cross entropy: the teacher's entropy is left out."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, w = published(STUDENT, TEACHER)
    own = fl.distillation_loss(z, torch.tensor([0]), w, divergence="skew_forward_kl", shift=False).loss
    assert (own + fl.entropy_from_logits(w)).item() == pytest.approx(1.4660370175676445, rel=1e-12)


A, B, LAM = 0.2, 0.7, 0.1
SLOPES = {  # w_v = dD/dp_v with p the student, q the teacher: then dD/dz = p (w - <p, w>)
    "forward_kl": lambda p, q: -q / p,
    "reverse_kl": lambda p, q: (p / q).log(),
    "js(beta=0.3)": lambda p, q: 0.7 * (p / (0.3 * q + 0.7 * p)).log(),
    "skew_forward_kl": lambda p, q: -(1 - LAM) * q / (LAM * q + (1 - LAM) * p),
    "skew_reverse_kl": lambda p, q: (p / (LAM * p + (1 - LAM) * q)).log() + 1 - LAM * p / (LAM * p + (1 - LAM) * q),
    "total_variation": lambda p, q: 0.5 * (p - q).sign(),
    "alpha_beta": lambda p, q: -(q**A * p ** (B - 1) - p ** (A + B - 1)) / A,
}


@pytest.mark.parametrize("kind", SLOPES)
def test_gradient_in_closed_form(own_backend, device, kind):
    z, w = logits((3, 4, 29), device)
    y = torch.zeros(3, 4, dtype=torch.long, device=device)
    y[0, 1:] = -100
    out = fl.distillation_loss(z, y, w, divergence=kind, reduction="sum", soft=2.0, hard=0.5, shift=False)
    p, q = (x.detach().double().softmax(-1) for x in (z, w))
    slope = SLOPES[kind](p, q)
    onehot = torch.nn.functional.one_hot(y.clamp(min=0), 29)
    expected = 2 * p * (slope - (p * slope).sum(-1, keepdim=True)) + 0.5 * (p - onehot)
    expected = expected * (y != -100).unsqueeze(-1)
    assert relative(torch.autograd.grad(out.loss, z)[0], expected) <= 1e-5


def test_forward_kl_pulls_by_the_difference(backend, device):
    """dKL(teacher || student)/dz = p - q."""
    z, w = logits((5, 29), device)
    out = fl.distillation_loss(
        z, torch.zeros(5, dtype=torch.long, device=device), w, beta=0, reduction="sum", shift=False
    )
    expected = z.detach().softmax(-1) - w.detach().softmax(-1)
    torch.testing.assert_close(torch.autograd.grad(out.loss, z)[0], expected, rtol=1e-5, atol=1e-6)


def test_identities(own_backend, device):
    z, w = logits((2, 3, 11), device)
    y = torch.randint(0, 11, (2, 3), device=device)
    for beta in (0.1, 0.5, 0.8):  # gJSD(beta) of (p, q) is gJSD(1 - beta) of (q, p)
        one, other = (
            fl.distillation_loss(z, y, w, beta=beta, shift=False).loss,
            fl.distillation_loss(w, y, z, beta=1 - beta, shift=False).loss,
        )
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    for options in ({"beta": 0}, {}, *({"divergence": kind} for kind in SLOPES)):  # a student that is its teacher
        out = fl.distillation_loss(z, y, z.detach().clone(), **options, shift=False)
        assert out.loss.abs() <= 1e-6 and torch.autograd.grad(out.loss, z)[0].abs().max() <= 1e-6
    plain = fl.distillation_loss(z, y, w, soft=0.0, hard=1.0, shift=False).loss
    torch.testing.assert_close(plain, torch.nn.functional.cross_entropy(z.flatten(0, 1), y.flatten()))


def test_ends_of_gkd_are_no_limits(own_backend, device):
    """TRL's beta = 0 and 1 are the plain divergences; what lies between tends to 0 there."""
    z, w = logits((3, 4, 29), device)
    y = torch.zeros(3, 4, dtype=torch.long, device=device)
    for end, near in ((0.0, 1e-4), (1.0, 1 - 1e-4)):
        at, by = (fl.distillation_loss(z, y, w, beta=beta, shift=False).loss for beta in (end, near))
        assert at > 0.05 and 0 < by < 1e-3
        torch.testing.assert_close(by / 1e-4, at, rtol=5e-2, atol=0)


# ---- sampled tokens --------------------------------------------------------------------------------------------------


def test_sampled_tokens(backend, device):
    z, w = logits((3, 4, 29), device)
    y = torch.randint(0, 29, (3, 4), device=device)
    y[0, 1:] = -100
    out = fl.sampled_distillation_loss(z, y, w, shift=False)
    z64, count = double(z), y != -100
    at = y.clamp(min=0).unsqueeze(-1)
    logp, logq = (x.log_softmax(-1).gather(-1, at).squeeze(-1) for x in (z64, w.detach().double()))
    ratio = (logp - logq).detach()
    truth = (ratio * logp)[count].mean()
    # two roundings of the log-probs of each token: their products with log p have both signs, and may cancel
    allowed = 2 * ULP * ((logp.abs() + logq.abs()) * logp.abs())[count].mean()
    assert (out.loss - truth).abs() <= allowed
    kl = ratio[count].mean().item()  # terms of both signs, which may cancel
    assert out.metrics["kl"].item() == pytest.approx(kl, rel=1e-5, abs=1e-6)
    to_student, to_teacher = torch.autograd.grad(out.loss, (z, w))
    assert relative(to_student, torch.autograd.grad(truth, z64)[0]) <= 1e-5 and not to_teacher.any()


def test_sampled_tokens_estimate_the_divergence(monkeypatch):
    """The mean over all tokens, weighted by their probabilities, has the gradient of KL(student || teacher)."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, w = published(STUDENT, TEACHER)
    every, y = z.expand(4, 4), torch.arange(4)
    p = z.detach().softmax(-1).squeeze(0)
    out = fl.sampled_distillation_loss(every, y, w.detach().expand(4, 4), reduction="none", shift=False)
    exact = fl.distillation_loss(z, y[:1], w.detach(), divergence="reverse_kl", shift=False)
    mine, truth = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in ((out.loss * p).sum(), exact.loss))
    torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-12)
    kl = fl.sampled_distillation_loss(
        fl.LogProbs(p.log()), y, fl.LogProbs(w.detach().log_softmax(-1).squeeze(0)), shift=False
    )
    assert kl.metrics["kl"].item() == pytest.approx((p.log() - w.log_softmax(-1)).mean().item(), rel=1e-12)


Z, Y = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
BAD = [
    (lambda: fl.distillation_loss(Z, Y, Z, beta=1.1, shift=False), ValueError, r"beta: expected a number in \[0, 1\], got 1.1"),
    (lambda: fl.distillation_loss(Z, Y, Z, soft=-1, shift=False), ValueError, "soft: expected a finite number >= 0, got -1"),
    (lambda: fl.distillation_loss(Z, Y, Z, hard=math.inf, shift=False), ValueError, "hard: expected"),
    (lambda: fl.distillation_loss(Z, Y, Z, divergence="kl", shift=False), ValueError, "unknown name 'kl'"),
    (lambda: fl.distillation_loss(Z, Y, Z, divergence="alpha_beta(a=1, b=0)", shift=False), ValueError, "is forward_kl"),
    (lambda: fl.distillation_loss(Z, Y, fl.LogProbs(Z[..., 0]), shift=False), ValueError,
     "teacher: expected fl.Hidden or logits.*got fl.LogProbs"),
    (lambda: fl.distillation_loss(Z, Y, Z[..., :4], shift=False), ValueError,
     "ref: expected the policy's vocabulary of 5, got 4"),
    (lambda: fl.distillation_loss(Z, Y, Z, temperature=2.0, shift=False), TypeError, "temperature"),
    (lambda: fl.sampled_distillation_loss(Z, Y, None, shift=False), TypeError, "teacher: expected a tensor of logits"),
    (lambda: fl.sampled_distillation_loss(Z, Y, Z, beta=0.5, shift=False), TypeError, "beta"),
    (lambda: fl.sampled_distillation_loss(Z, Y, fl.LogProbs(Z[0, :, 0]), shift=False), ValueError,
     r"ref: expected fl.LogProbs \[2, 3\]"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_gets_words(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()
