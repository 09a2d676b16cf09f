"""preference_loss and dpo_loss on both backends: values, gradients, batches, reductions, references, bad input."""

import math

import pytest
import torch
from helpers import double, logits, relative

import fused_losses as fl
from fused_losses import divergences

LINKS = divergences.linkable()


def batch(device, pairs=3, length=7, vocab=61, dtype=torch.float32, spread=0.3):
    z, w = logits((2 * pairs, length, vocab), device, dtype, spread=spread)
    y = torch.randint(0, vocab, (2 * pairs, length), device=device)
    y[:, :2] = -100
    y[1, 5:] = -100
    return z, w, y


def both(call, z, w, y):
    """The loss and its gradients, ours and the float64 twin's."""
    ours = call(fl, z, w, y)
    z64, w64 = double(z), double(w)
    truth = call(fl.reference, z64, w64, y)
    return ours, truth, torch.autograd.grad(ours.loss.sum(), (z, w)), torch.autograd.grad(truth.loss.sum(), (z64, w64))


KEYS = [*LINKS, "js(beta=0.2)", "alpha(a=0.9)"]
OPTIONS = [(smoothing, shift) for smoothing in (0.0, 0.1) for shift in (False, True)]


# The pair kernel is compiled for a link. Smoothing is a number in it and the shift lies before it, so that in the interpreter
# the links take turns with these.
@pytest.mark.parametrize(
    ("backend", "key", "smoothing", "shift"),
    [("torch", key, *options) for key in KEYS for options in OPTIONS]
    + [("triton", key, *OPTIONS[i % len(OPTIONS)]) for i, key in enumerate(KEYS)],
    indirect=["backend"],
)
def test_every_link_matches_the_twin(backend, device, key, smoothing, shift):
    z, w, y = batch(device)
    call = lambda f, z, w, y: f.dpo_loss(z, y, w, divergence=key, label_smoothing=smoothing, shift=shift, beta=0.3)  # noqa: E731
    ours, truth, grads, exact = both(call, z, w, y)
    assert relative(ours.loss, truth.loss) <= 1e-5
    for g, t in zip(grads, exact, strict=True):
        assert relative(g, t) <= 1e-5
    for name, value in truth.metrics.items():
        torch.testing.assert_close(ours.metrics[name].double(), value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("key", LINKS)
def test_low_precision_is_never_worse_than_eager(device, key, dtype, monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton" if device.type != "cpu" else "torch")
    z, w, y = batch(device, dtype=dtype)
    call = lambda f, z, w, y: f.dpo_loss(z, y, w, divergence=key, shift=False)  # noqa: E731
    ours, truth, grads, exact = both(call, z, w, y)
    eager = fl.reference.dpo_loss(z, y, w, divergence=key, shift=False)
    rough = torch.autograd.grad(eager.loss, (z, w))
    assert relative(ours.loss, truth.loss) <= max(1e-5, relative(eager.loss, truth.loss))
    for g, e, t in zip(grads, rough, exact, strict=True):
        assert relative(g, t) <= max(relative(e, t), torch.finfo(dtype).eps / 2) * 1.0001


def test_reductions_and_micro_batches(own_backend, device):
    z, w, y = batch(device, pairs=4)
    none = fl.dpo_loss(z, y, w, reduction="none", shift=False).loss
    assert none.shape == (4,)
    torch.testing.assert_close(fl.dpo_loss(z, y, w, reduction="sum", shift=False).loss, none.sum())
    torch.testing.assert_close(fl.dpo_loss(z, y, w, shift=False).loss, none.mean())
    whole = torch.autograd.grad(fl.dpo_loss(z, y, w, shift=False).loss, z)[0]
    for count in (4, torch.tensor(4, device=device)):
        total = 0
        for rows in ([0, 4], [1, 2, 5, 6], [3, 7]):  # chosen then rejected rows of each micro-batch
            total = total + fl.dpo_loss(z[rows], y[rows], w[rows], num_items=count, shift=False).loss
        torch.testing.assert_close(torch.autograd.grad(total, z)[0], whole)


def packed(z, w, y):
    """Rows of unequal lengths end to end, one of them empty."""
    lengths = [5, 0, 7, 3, 6, 7]
    keep = torch.cat([i * y.shape[1] + torch.arange(n) for i, n in enumerate(lengths)]).to(y.device)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(y.device)
    short = y.clone()
    for i, n in enumerate(lengths):
        short[i, n:] = -100
    flat = lambda x: x.flatten(0, 1)[keep]  # noqa: E731
    return flat(z), flat(w), y.flatten()[keep], cu, short


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_packed_equals_padded(backend, device, shift, kind):
    z, w, y = batch(device)
    pz, pw, py, cu, short = packed(z, w, y)
    padded = fl.dpo_loss(z, short, w, shift=shift, divergence="js", reduction="none")
    ours = fl.dpo_loss(pz, py, pw, cu_seqlens=cu.to(kind), shift=shift, divergence="js", reduction="none")
    twin = fl.reference.dpo_loss(
        pz.double(), py, pw.double(), cu_seqlens=cu, shift=shift, divergence="js", reduction="none"
    )
    torch.testing.assert_close(ours.loss, padded.loss)
    torch.testing.assert_close(ours.loss.double(), twin.loss, rtol=1e-5, atol=1e-6)
    for g, t in zip(
        torch.autograd.grad(ours.loss.sum(), (z, w)), torch.autograd.grad(padded.loss.sum(), (z, w)), strict=True
    ):
        torch.testing.assert_close(g, t)


def test_reference_given_four_ways(own_backend, device):
    z, w, y = batch(device)
    logits_ref = fl.dpo_loss(z, y, w.detach(), shift=True)
    tokens = fl.token_stats(w.detach(), y, shift=True).logps
    for given in (
        tokens,
        tokens.sum(1),
        tokens.masked_fill(tokens == 0, math.nan),
    ):  # masked positions may hold anything
        out = fl.dpo_loss(z, y, fl.LogProbs(given), shift=True)
        torch.testing.assert_close(out.loss, logits_ref.loss)
        torch.testing.assert_close(
            torch.autograd.grad(out.loss, z), torch.autograd.grad(logits_ref.loss, z, retain_graph=True)
        )
    free = fl.dpo_loss(z, y, None, shift=True)
    truth = fl.reference.dpo_loss(z.double(), y, None, shift=True)
    torch.testing.assert_close(free.loss.double(), truth.loss, rtol=1e-5, atol=1e-6)


def test_policy_as_log_probs(backend, device):
    """The pair kernel alone: gradients to per-token log-probs of both sides."""
    y = torch.zeros(4, 3, dtype=torch.long, device=device)
    y[2, 1:] = -100
    p, q = (torch.randn(4, 3, device=device).requires_grad_() for _ in range(2))
    ours = fl.dpo_loss(fl.LogProbs(p), y, fl.LogProbs(q), beta=0.7, shift=False)
    p64, q64 = double(p), double(q)
    truth = fl.reference.dpo_loss(fl.LogProbs(p64), y, fl.LogProbs(q64), beta=0.7, shift=False)
    found, exact = torch.autograd.grad(ours.loss, (p, q)), torch.autograd.grad(truth.loss, (p64, q64))
    for g, t in zip(found, exact, strict=True):
        torch.testing.assert_close(g.double(), t, rtol=1e-5, atol=1e-8)
        assert not g[2, 1:].any()
    s = torch.randn(4, device=device).requires_grad_()
    s64 = double(s)
    ours = torch.autograd.grad(fl.dpo_loss(fl.LogProbs(p), y, fl.LogProbs(s), shift=False).loss, s)[0]
    truth = torch.autograd.grad(fl.reference.dpo_loss(fl.LogProbs(p64), y, fl.LogProbs(s64), shift=False).loss, s64)[0]
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
def test_golden_dpo(own_backend, device, beta):
    """Against the formula itself, written out once more, with a reference that matters."""
    z, w, y = batch(device)
    mask = y != -100
    per_token = lambda x: x.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None]).squeeze(-1) * mask  # noqa: E731
    h = (per_token(z) - per_token(w)).sum(1)
    loss = -torch.nn.functional.logsigmoid(beta * (h[:3] - h[3:])).mean()
    out = fl.dpo_loss(z, y, w, beta=beta, shift=False)
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(out.metrics["rewards/chosen"], beta * h[:3].mean())
    torch.testing.assert_close(out.metrics["rewards/margins"], beta * (h[:3] - h[3:]).mean())
    torch.testing.assert_close(out.metrics["rewards/accuracies"], (h[:3] > h[3:]).float().mean())
    assert not any(v.requires_grad for v in out.metrics.values())


def test_published_values(monkeypatch):
    """h_chosen = 0.7, h_rejected = -0.4, beta = 0.1."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    h, y = torch.tensor([[0.7], [-0.4]], dtype=torch.float64), torch.zeros(2, 1, dtype=torch.long)
    assert fl.dpo_loss(fl.LogProbs(h), y, None, shift=False).loss.item() == pytest.approx(0.639658918622423, rel=1e-12)
    assert fl.dpo_loss(fl.LogProbs(h), y, None, label_smoothing=0.1, shift=False).loss.item() == pytest.approx(
        0.650658918622423, rel=1e-12
    )


def test_extreme_margins_stay_finite(backend, device):
    y = torch.zeros(4, 1, dtype=torch.long, device=device)
    for key in LINKS:
        h = torch.tensor([[3000.0], [-3000.0], [-3000.0], [3000.0]], device=device).requires_grad_()
        out = fl.dpo_loss(
            fl.LogProbs(h), y, fl.LogProbs(torch.zeros_like(h)), divergence=key, label_smoothing=0.1, shift=False
        )
        assert out.loss.isfinite() and torch.autograd.grad(out.loss, h)[0].isfinite().all(), key


def test_masked_sequences_and_batches(backend, device, poison):
    z, w, y = batch(device)
    y[1], y[4] = -100, -100  # both sequences of the middle pair
    out = fl.dpo_loss(z, y, w, reduction="none", shift=False)
    assert out.loss[1].item() == pytest.approx(math.log(2))
    g = torch.autograd.grad(out.loss.sum(), z)[0]
    assert g.isfinite().all() and not g[1].any() and not g[4].any()
    out = fl.dpo_loss(z, torch.full_like(y, -100), w, shift=False)
    assert out.loss.item() == pytest.approx(math.log(2)) and not torch.autograd.grad(out.loss, z)[0].any()


@pytest.mark.parametrize("shape", [(0, 5), (4, 0)], ids=str)
def test_empty_batches(backend, device, shape):
    z, w = logits((*shape, 9), device)
    out = fl.dpo_loss(z, torch.zeros(shape, dtype=torch.long, device=device), w, shift=False)
    none = fl.dpo_loss(z, torch.zeros(shape, dtype=torch.long, device=device), w, reduction="none", shift=False).loss
    assert none.tolist() == pytest.approx([math.log(2)] * (shape[0] // 2))
    assert out.loss.isfinite() and all(v.isfinite() for v in out.metrics.values())
    out.loss.backward()
    assert not z.grad.any()
    nothing = torch.zeros(1, dtype=torch.int32, device=device)
    assert (
        fl.dpo_loss(
            z.reshape(-1, 9)[:0], torch.zeros(0, dtype=torch.long, device=device), None, cu_seqlens=nothing, shift=False
        ).loss
        == 0
    )


def test_log_probs_of_any_stride(backend, device):
    """Slices and expansions of per-token and per-sequence numbers, and a shift that leaves one column of two."""
    z, w, y = batch(device, length=2)
    y[:, 1] = 3
    mine, truth = fl.dpo_loss(z, y, w, shift=True), fl.reference.dpo_loss(z.double(), y, w.double(), shift=True)
    torch.testing.assert_close(mine.loss.double(), truth.loss, rtol=1e-5, atol=1e-6)
    wide = torch.randn(12, 2, device=device)
    a, b = fl.LogProbs(wide[::2]), fl.LogProbs(wide[::2].clone())
    assert torch.equal(fl.dpo_loss(z, y, a, shift=False).loss, fl.dpo_loss(z, y, b, shift=False).loss)
    a, b = fl.LogProbs(wide[0, :1].expand(6)), fl.LogProbs(wide[0, :1].repeat(6))
    assert torch.equal(fl.dpo_loss(z, y, a, shift=False).loss, fl.dpo_loss(z, y, b, shift=False).loss)


def test_long_sequences_keep_their_ratio(backend, device):
    """h is a small difference of sums of thousands: each token's ratio is taken before it is summed."""
    logps = -10 * torch.rand(2, 3000, device=device)
    ref = logps + 0.001 * torch.randn(2, 3000, device=device)
    y = torch.zeros(2, 3000, dtype=torch.long, device=device)
    ours = fl.dpo_loss(fl.LogProbs(logps), y, fl.LogProbs(ref), divergence="neyman_chi2", beta=1.0, shift=False)
    truth = fl.reference.dpo_loss(
        fl.LogProbs(logps.double()), y, fl.LogProbs(ref.double()), divergence="neyman_chi2", beta=1.0, shift=False
    )
    assert relative(ours.loss, truth.loss) <= 1e-5


def test_alpha_link_near_reverse_kl(backend, device):
    h, y = torch.tensor([[0.7], [-0.4]], device=device), torch.zeros(2, 1, dtype=torch.long, device=device)
    out = fl.dpo_loss(fl.LogProbs(h), y, fl.LogProbs(torch.zeros_like(h)), divergence="alpha(a=1e-6)", shift=False)
    assert out.loss.item() == pytest.approx(0.639658918622423, rel=1e-5)


def test_entropy_metric_and_inplace(backend, device):
    z, w, y = batch(device)
    out = fl.dpo_loss(z, y, w, entropy=True, shift=False)
    p = z.softmax(-1)
    expected = -(p * p.log()).sum(-1)[y != -100].mean()
    torch.testing.assert_close(out.metrics["entropy"], expected.detach())
    held = z * 1
    held.retain_grad()
    fl.dpo_loss(held, y, w, inplace_backward=True, shift=False).loss.backward()
    torch.testing.assert_close(held.grad, torch.autograd.grad(out.loss, z)[0])


Z, Y = torch.zeros(4, 3, 5), torch.zeros(4, 3, dtype=torch.long)
CU = torch.tensor([0, 3, 6, 9, 12])
BAD = [
    (lambda: fl.dpo_loss(Z[:3], Y[:3], None, shift=False), ValueError, r"labels: expected \[2B, T\].*got \[3, 3\]"),
    (lambda: fl.dpo_loss(Z[0], Y[0], None, shift=False), ValueError, r"labels: expected \[2B, T\]"),
    (lambda: fl.preference_loss(Z, Y, None, loss_type="dpo", shift=False), ValueError,
     "loss_type: unknown name 'dpo'; the loss of DPO is 'sigmoid'"),
    (lambda: fl.dpo_loss(Z, Y, None, loss_type="sigmoid", shift=False), TypeError, "dpo_loss: `loss_type` is fixed"),
    (lambda: fl.dpo_loss(Z, Y, Z, divergence="kl", shift=False), ValueError,
     "unknown name 'kl'; .*mean 'reverse_kl' or 'forward_kl'"),
    (lambda: fl.dpo_loss(Z, Y, None, divergence="js", shift=False), ValueError,
     "divergence: 'js' needs a reference, got ref=None"),
    (lambda: fl.dpo_loss(Z, Y, None, beta=0, shift=False), ValueError, "beta: expected a finite number > 0, got 0"),
    (lambda: fl.dpo_loss(Z, Y, None, beta=float("nan"), shift=False), ValueError, "beta"),
    (lambda: fl.dpo_loss(Z, Y, None, label_smoothing=0.5, shift=False), ValueError,
     r"label_smoothing: expected a number in \[0, 0.5\)"),
    (lambda: fl.dpo_loss(Z, Y, None, reduction="avg", shift=False), ValueError,
     "reduction: expected one of mean, sum, none, got 'avg'"),
    (lambda: fl.dpo_loss(Z, Y, None, reduction="sum", num_items=3, shift=False), ValueError,
     "num_items: only goes with reduction='mean'"),
    (lambda: fl.dpo_loss(Z, Y, None, num_items=-1, shift=False), ValueError, "num_items"),
    (lambda: fl.dpo_loss(Z, Y, fl.LogProbs(torch.zeros(2)), shift=False), ValueError, r"ref: expected fl.LogProbs \[4, 3\]"),
    (lambda: fl.dpo_loss(Z, Y, None, cu_seqlens=CU, shift=False), ValueError, "labels: expected packed labels"),
    (lambda: fl.dpo_loss(Z.flatten(0, 1), Y.flatten(), None, cu_seqlens=CU[:4], shift=False), ValueError,
     r"cu_seqlens: expected \[2B \+ 1\]"),
    (lambda: fl.dpo_loss(Z.flatten(0, 1), Y.flatten(), None, cu_seqlens=CU.float(), shift=False), TypeError,
     "cu_seqlens: expected an int32"),
    (lambda: fl.dpo_loss(Z.flatten(0, 1), Y.flatten(), None, cu_seqlens=CU + 1, shift=False), ValueError,
     "rising from 0 to 12"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_gets_words(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()
