"""cross_entropy_loss against torch's: values and gradients from logits and hidden states, padded vocabularies, bad input."""

import math

import pytest
import torch
from helpers import compare_sources, double, doubles, gradients_of, hidden_leaves, hidden_source, logits, relative
from torch.nn.functional import cross_entropy

import fused_losses as fl
from fused_losses.losses import shared

pytestmark = pytest.mark.usefixtures("one_thread")

V = 29
Y = torch.tensor([[3, -100, 7, 0], [28, 5, -100, 11]])
EPS = [0.0, 0.1, 1.0]


def exact(z, y, smoothing, z_loss=0.0, reduction="mean"):
    """torch's cross entropy of transformed logits, and z-loss."""
    flat, y = z.reshape(-1, z.shape[-1]), y.reshape(-1)
    losses = cross_entropy(flat, y, label_smoothing=smoothing, reduction="none")
    losses = losses + z_loss * flat.logsumexp(-1).square() * (y != -100)
    return losses if reduction == "none" else losses.sum() / (y != -100).sum()


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("smoothing", EPS)
def test_is_torchs(backend, device, smoothing, z_loss):
    z, _ = logits((2, 4, V), device)
    y, z64 = Y.to(device), double(z)
    out = fl.cross_entropy_loss(z, y, label_smoothing=smoothing, z_loss=z_loss, shift=False)
    truth = exact(z64, y, smoothing, z_loss)
    assert relative(out.loss, truth) <= 1e-6
    assert relative(torch.autograd.grad(out.loss, z)[0], torch.autograd.grad(truth, z64)[0]) <= 1e-6
    none = fl.cross_entropy_loss(z, y, label_smoothing=smoothing, z_loss=z_loss, reduction="none", shift=False).loss
    assert none.shape == y.shape
    torch.testing.assert_close(none.flatten().double(), exact(z64, y, smoothing, z_loss, "none"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("smoothing", EPS)
def test_low_precision_is_never_worse_than_torch(device, smoothing, dtype, monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton" if device.type != "cpu" else "torch")
    z, _ = logits((2, 4, V), device, dtype)
    y, z64 = Y.to(device), double(z)
    truth, eager, ours = (
        exact(z64, y, smoothing),
        exact(z, y, smoothing),
        fl.cross_entropy_loss(z, y, label_smoothing=smoothing, shift=False).loss,
    )
    assert relative(ours, truth) <= max(1e-6, relative(eager, truth))
    (g,), (e,), (t,) = (torch.autograd.grad(x, leaf) for x, leaf in ((ours, z), (eager, z), (truth, z64)))
    assert g.dtype == dtype and relative(g, t) <= max(relative(e, t), torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("plan", ["auto", "row_blocks", "vocab_chunks", "frozen_head"])
@pytest.mark.parametrize("smoothing", EPS)
def test_from_hidden_states_with_every_option_of_a_head(monkeypatch, smoothing, plan):
    """A padded vocabulary: smoothing spreads over the tokens that exist."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    x, weight, bias, a, b = hidden_leaves((2, 4), 6, V + 3, "cpu", rank=2)
    if plan == "frozen_head":
        weight, bias, a, b = (t.detach() for t in (weight, bias, a, b))
    y = torch.where(V <= Y, V - 1, Y)
    head = {"softcap": 5.0, "scale": 0.7, "temperature": 1.3, "valid_vocab": V}

    def loss(f, leaves, how):
        source = hidden_source(leaves, **head)
        return f.cross_entropy_loss(source, y, label_smoothing=smoothing, z_loss=1e-2, **how, shift=False).loss

    leaves = [x, weight, bias, a, b]
    wide = doubles(leaves)
    z = wide[0] @ (wide[1] + 0.7 * wide[4] @ wide[3]).T + wide[2]
    truth = exact((5 * torch.tanh(z / 5) * 0.7 / 1.3)[..., :V], y, smoothing, 1e-2)
    assert loss(fl.reference, wide, {}).item() == pytest.approx(truth.item(), rel=1e-12)
    ours = loss(fl, leaves, {"plan": plan})
    assert relative(ours, truth) <= 1e-6
    for g, t in zip(gradients_of(ours, leaves), gradients_of(truth, wide), strict=True):
        assert relative(g, t) <= 2e-6


def test_half_precision_hidden_states(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    leaves = hidden_leaves((2, 4), 6, V, "cpu", bias=False, dtype=torch.bfloat16)
    wide = doubles(leaves)
    ours = fl.cross_entropy_loss(hidden_source(leaves), Y, label_smoothing=0.2, shift=False).loss
    truth = exact(wide[0] @ wide[1].T, Y, 0.2)
    assert relative(ours, truth) <= 1e-6
    for g, t in zip(gradients_of(ours, leaves), gradients_of(truth, wide), strict=True):
        assert g.dtype == torch.bfloat16 and relative(g, t) <= 2**-8


def test_gradient_in_closed_form(backend, device):
    """dL/dz = p - (1 - eps) onehot - eps / V + 2 z_loss lse p."""
    z, _ = logits((5, V), device)
    y = torch.arange(5, device=device)
    out = fl.cross_entropy_loss(z, y, label_smoothing=0.25, z_loss=0.01, reduction="sum", shift=False)
    p, lse = z.detach().softmax(-1), z.detach().logsumexp(-1, keepdim=True)
    expected = p - 0.75 * torch.nn.functional.one_hot(y, V) - 0.25 / V + 0.02 * lse * p
    torch.testing.assert_close(torch.autograd.grad(out.loss, z)[0], expected, rtol=1e-5, atol=1e-6)


def test_known_values(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    y = torch.tensor([2, 0])
    uniform = torch.full((2, 7), 3.0, dtype=torch.float64)
    for eps in EPS:  # log V, however smooth
        assert fl.cross_entropy_loss(uniform, y, label_smoothing=eps, shift=False).loss.item() == pytest.approx(
            math.log(7), rel=1e-14
        )
    out = fl.cross_entropy_loss(uniform, y, z_loss=0.5, shift=False)
    assert out.loss.item() == pytest.approx(math.log(7) + 0.5 * (3 + math.log(7)) ** 2, rel=1e-14)
    z = torch.tensor([[1.0, 0.0, -1.0, 0.5]], dtype=torch.float64)
    assert fl.cross_entropy_loss(z, y[1:], shift=False).loss.item() == pytest.approx(
        -math.log(0.473990846254078), rel=1e-12
    )


def test_the_uniform_distribution_takes_one_element(monkeypatch):
    seen = []
    whole = shared.evaluate
    monkeypatch.setattr(
        shared, "evaluate", lambda f, policy, batch, ref, *rest: seen.append(ref) or whole(f, policy, batch, ref, *rest)
    )
    for z in (torch.randn(2, 4, V), torch.randn(2, 4, V, dtype=torch.bfloat16)):
        fl.cross_entropy_loss(z, Y, label_smoothing=0.1, shift=False)
        fl.cross_entropy_loss(z, Y, z_loss=0.1, shift=False)
        ref, none = seen[-2:]
        assert ref.logits.shape == z.shape and ref.logits.dtype == z.dtype and none is None
        assert ref.logits.untyped_storage().nbytes() == z.element_size()


def test_metrics(own_backend, device):
    z, _ = logits((2, 4, V), device)
    y = Y.to(device)
    out = fl.cross_entropy_loss(z, y, entropy=True, label_smoothing=0.1, shift=False)
    count, p = y != -100, z.detach().log_softmax(-1)
    expected = {
        "logps": p.gather(-1, y.clamp(min=0)[..., None]).squeeze(-1)[count].mean(),
        "lse": z.detach().logsumexp(-1)[count].mean(),
        "mean_token_accuracy": (z.argmax(-1) == y)[count].float().mean(),
        "entropy": -(p.exp() * p).sum(-1)[count].mean(),
    }
    assert out.metrics.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(out.metrics[name], x, rtol=1e-5, atol=1e-6, msg=name)


def test_micro_batches_packed_rows_and_shift(own_backend, device):
    z, _ = logits((2, 4, V), device)
    y = Y.to(device)
    whole = torch.autograd.grad(fl.cross_entropy_loss(z, y, label_smoothing=0.1, shift=False).loss, z)[0]
    parts = [fl.cross_entropy_loss(z[i], y[i], label_smoothing=0.1, num_items=6, shift=False).loss for i in (0, 1)]
    torch.testing.assert_close(torch.autograd.grad(sum(parts), z)[0], whole)
    shifted = fl.cross_entropy_loss(z[:, :-1], y[:, 1:], label_smoothing=0.1, shift=False).loss
    torch.testing.assert_close(fl.cross_entropy_loss(z, y, label_smoothing=0.1, shift=True).loss, shifted)
    cu = torch.tensor([0, 4, 8], device=device)
    flat = fl.cross_entropy_loss(z.flatten(0, 1), y.flatten(), label_smoothing=0.1, shift=True, cu_seqlens=cu).loss
    torch.testing.assert_close(flat, shifted)


def test_nothing_counts(backend, device, poison):
    z, _ = logits((2, 4, V), device)
    with torch.no_grad():
        z[0] = math.nan
    for y in (Y.clone().to(device), torch.full_like(Y, -100).to(device)):
        y[0] = -100
        out = fl.cross_entropy_loss(z, y, label_smoothing=0.1, z_loss=0.1, shift=False)
        g = torch.autograd.grad(out.loss, z)[0]
        assert out.loss.isfinite() and g.isfinite().all() and not g[0].any()
        assert (out.loss == 0) == bool((y == -100).all())


def test_log_probs_are_enough_without_smoothing():
    logps = torch.randn(2, 4).requires_grad_()
    out = fl.cross_entropy_loss(fl.LogProbs(logps), Y, shift=False)
    torch.testing.assert_close(out.loss, -logps[Y != -100].mean())
    torch.testing.assert_close(fl.reference.cross_entropy_loss(fl.LogProbs(logps), Y, shift=False).loss, out.loss)
    assert out.metrics.keys() == {"logps"}


def test_second_derivatives_from_the_twin():
    z = torch.randn(3, V, dtype=torch.float64).requires_grad_()
    y = torch.tensor([1, -100, 4])
    loss = lambda z: fl.reference.cross_entropy_loss(z, y, label_smoothing=0.1, z_loss=0.1, shift=False).loss  # noqa: E731
    assert torch.autograd.gradcheck(loss, z) and torch.autograd.gradgradcheck(loss, z)


@pytest.mark.parametrize("plan", ["auto", "vocab_chunks", "frozen_head"])
def test_a_reference_whose_rows_share_memory(monkeypatch, plan):
    """What smoothing rests on."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    leaves = hidden_leaves((2, 4), 6, V, "cpu", bias=False)
    leaves[1].requires_grad_(plan != "frozen_head")
    build = lambda leaves: (hidden_source(leaves), leaves[0].new_zeros(()).expand(2, 4, V))  # noqa: E731
    compare_sources(build, leaves, Y, how={"plan": plan}, divergence="forward_kl")


Z = torch.zeros(2, 4, V)
BAD = [
    (lambda: fl.cross_entropy_loss(Z, Y, label_smoothing=1.5, shift=False), ValueError, "label_smoothing: expected.* got 1.5"),
    (lambda: fl.cross_entropy_loss(Z, Y, label_smoothing=math.nan, shift=False), ValueError, "label_smoothing"),
    (lambda: fl.cross_entropy_loss(Z, Y, z_loss=-1, shift=False), ValueError, "z_loss: expected a finite number >= 0, got -1"),
    (lambda: fl.cross_entropy_loss(Z, Y, weight=torch.ones(V), shift=False), TypeError, "weight"),
    (lambda: fl.cross_entropy_loss(Z, Y, reduction="avg", shift=False), ValueError, "reduction"),
    (lambda: fl.cross_entropy_loss(Z, Y[:1], label_smoothing=0.1, shift=False), ValueError, "policy: expected logits"),
    (lambda: fl.cross_entropy_loss(Z, Y.float(), shift=False), TypeError, "labels: expected integer token ids"),
    (lambda: fl.cross_entropy_loss(fl.LogProbs(Z[..., 0]), Y, z_loss=0.1, shift=False), ValueError, "policy: label_smoothing"),
    (lambda: fl.cross_entropy_loss([1], Y, shift=False), TypeError, "policy: expected a tensor of logits"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_gets_words(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()
