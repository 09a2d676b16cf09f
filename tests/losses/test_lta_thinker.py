"""LTA-Thinker's two losses on hidden states: twins, closed-form gradients, examples without thoughts or steps."""

import math

import pytest
import torch
from helpers import relative

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")

B, J, H = 3, 4, 6


def states(device="cpu", dtype=torch.float64):
    q, thoughts, steps, answers = (
        torch.randn(s, device=device, dtype=torch.float64).to(dtype).requires_grad_()
        for s in ((B, H), (B, J, H), (B, J, H), (B, H))
    )
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool, device=device)
    return q, thoughts, steps, answers, mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("how", [{}, {"reduction": "none"}, {"num_items": 8}], ids=str)
def test_alignment_matches_the_twin(backend, device, masked, how):
    q, z, *_, mask = states(device, torch.float32)
    mask = mask if masked else None
    ours = fl.semantic_alignment_loss(q, z, mask=mask, **how)
    q64, z64 = (x.detach().double().requires_grad_() for x in (q, z))
    twin = fl.reference.semantic_alignment_loss(q64, z64, mask=mask, **how)
    assert ours.shape == twin.shape and relative(ours, twin) <= 1e-6
    found, exact = torch.autograd.grad(ours.sum(), (q, z)), torch.autograd.grad(twin.sum(), (q64, z64))
    for g, e in zip(found, exact, strict=True):
        assert relative(g, e) <= 2e-6


def test_alignment_by_hand(monkeypatch):
    """KL(P || Q) with the question first: Q - P at a thought, P ((log P - log Q) - KL) at the question; gradcheck."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    q, z, *_ = states()
    log_p, log_q = q.detach().log_softmax(-1)[:, None], z.detach().log_softmax(-1)
    p = log_p.exp()
    kl = (p * (log_p - log_q)).sum(-1)
    loss = fl.semantic_alignment_loss(q, z)
    assert loss.item() == pytest.approx(kl.mean().item(), rel=1e-12)
    to_q, to_z = torch.autograd.grad(loss, (q, z))
    torch.testing.assert_close(to_z, (log_q.exp() - p) / (B * J))
    torch.testing.assert_close(to_q, (p * (log_p - log_q - kl[..., None])).sum(1) / (B * J))
    assert torch.autograd.gradcheck(fl.semantic_alignment_loss, (q, z))
    same = fl.semantic_alignment_loss(q, q[:, None].expand(-1, J, -1))
    assert abs(same.item()) < 1e-15


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("masked", [False, True])
def test_focus_matches_the_twin(masked, temperature):
    q, _, steps, answers, mask = states()
    mask = mask if masked else None
    for how in ({}, {"reduction": "none"}, {"num_items": 8}):
        ours, twin = (
            f.reasoning_focus_loss(q, steps, answers, mask=mask, temperature=temperature, **how)
            for f in (fl, fl.reference)
        )
        torch.testing.assert_close(ours, twin)
        found, exact = (torch.autograd.grad(x.sum(), (q, steps)) for x in (ours, twin))
        for g, e in zip(found, exact, strict=True):
            torch.testing.assert_close(g, e)
    assert torch.autograd.grad(ours.sum(), answers, allow_unused=True) == (None,)
    call = lambda q, s: fl.reasoning_focus_loss(q, s, answers.detach(), mask=mask, temperature=temperature)  # noqa: E731
    assert torch.autograd.gradcheck(call, (q, steps))


def test_focus_by_hand():
    """Orthogonal steps: the positive is the one along the answer, however long anything is."""
    steps = torch.eye(4, dtype=torch.float64)[None, :3] * 5
    answers, question = torch.tensor([[0, 9.0, 1, 0]], dtype=torch.float64), steps[:, 1] / 7
    loss = fl.reasoning_focus_loss(question, steps, answers).item()
    assert loss == pytest.approx(math.log1p(2 * math.exp(-10)), rel=1e-12)
    assert fl.reasoning_focus_loss(steps[:, 0], steps, answers).item() == pytest.approx(10 + loss, rel=1e-12)


def test_nothing_to_align_or_to_focus_on(backend, device):
    q, z, steps, answers, mask = states(device, torch.float32)
    mask = mask & (torch.arange(B, device=device) != 2)[:, None]  # examples 1 and 2 have nothing
    wild = z.detach().masked_fill(~mask[..., None], math.nan).requires_grad_()
    losses = fl.semantic_alignment_loss(q, wild, mask=mask, reduction="none")
    assert losses[0] > 0 and losses[1:].tolist() == [0, 0]
    for g in torch.autograd.grad(losses.sum(), (q, wild)):
        assert g.isfinite().all() and g[0].any() and not g[1:].any()
    losses = fl.reasoning_focus_loss(q, steps * mask[..., None], answers, mask=mask, reduction="none")
    assert losses[0] > 0 and losses[1:].tolist() == [0, 0]
    for g in torch.autograd.grad(losses.sum(), (q, steps)):
        assert g.isfinite().all() and g[0].any() and not g[1:].any()
    for loss, x in (
        (fl.semantic_alignment_loss(q, z[:, :0]), z),
        (fl.reasoning_focus_loss(q, steps[:, :0], answers), steps),
        (fl.semantic_alignment_loss(q[:0], z[:0]), z),
        (fl.reasoning_focus_loss(q[:0], steps[:0], answers[:0]), steps),
    ):
        assert loss == 0
        for g in torch.autograd.grad(loss, (q, x)):
            assert not g.any()


def test_low_precision_is_computed_in_float32(backend, device):
    q, z, steps, answers, _ = states(device, torch.bfloat16)
    for name, args in (("semantic_alignment_loss", (q, z)), ("reasoning_focus_loss", (q, steps, answers))):
        ours = getattr(fl, name)(*args)
        exact = getattr(fl.reference, name)(*(x.detach().double() for x in args))
        assert ours.dtype == torch.float32 and ours.item() == pytest.approx(exact.item(), rel=1e-5)


def test_the_whole(backend, device):
    """0.33 of each part, and gradients to both sides of all of them."""
    q, thoughts, steps, answers, mask = states(device, torch.float32)
    z = torch.randn(B, 5, 9, device=device).requires_grad_()
    y = torch.randint(0, 9, (B, 5), device=device)
    y[0, :2] = -100
    masks = {"thought_mask": mask, "step_mask": mask}
    out = fl.lta_thinker_loss(z, y, q, thoughts, steps, answers, shift=True, **masks)
    ce = torch.nn.functional.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten())
    focus = fl.reasoning_focus_loss(q, steps, answers, mask=mask)
    alignment = fl.semantic_alignment_loss(q, thoughts, mask=mask)
    torch.testing.assert_close(out.loss, 0.33 * (ce + focus + alignment))
    for name, x in (("sft", ce), ("reasoning_focus", focus), ("semantic_alignment", alignment)):
        torch.testing.assert_close(out.metrics[name], x.detach())
    twin = fl.reference.lta_thinker_loss(z, y, q, thoughts, steps, answers, shift=True, **masks)
    found, exact = (torch.autograd.grad(x.loss, (z, q, thoughts, steps)) for x in (out, twin))
    for g, e in zip(found, exact, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)
    nothing = fl.lta_thinker_loss(z, torch.full_like(y, -100), q, thoughts[:, :0], steps[:, :0], answers, shift=False)
    assert nothing.loss == 0 and not torch.autograd.grad(nothing.loss, z)[0].any()


Q, Z, Y = torch.zeros(2, 3), torch.zeros(2, 4, 3), torch.zeros(2, 4, dtype=torch.long)
SA, RF, LTA = fl.semantic_alignment_loss, fl.reasoning_focus_loss, fl.lta_thinker_loss
BAD = [
    (lambda: SA(Z, Z), ValueError, r"question: expected \[B, H\], got \[2, 4, 3\]"),
    (lambda: SA(Q, Q), ValueError, r"thoughts: expected \[2, any, 3\] for question \[2, 3\], got \[2, 3\]"),
    (lambda: SA(Q, Z[:1]), ValueError, "thoughts: expected"),
    (lambda: SA(Q, Z.double()), TypeError, "thoughts: expected torch.float32 on cpu as question, got torch.float64"),
    (lambda: SA(Q.long(), Z), TypeError, "question: expected a float tensor, got torch.int64"),
    (lambda: SA(Q, Z, mask=Y), ValueError, r"mask: expected bool \[2, 4\] as thoughts, got torch.int64"),
    (lambda: SA(Q, Z, reduction="avg"), ValueError, "reduction"),
    (lambda: RF(Q, Z, Z), ValueError, r"answers: expected \[2, 3\] for question"),
    (lambda: RF(Q, Z, Q, temperature=0), ValueError, "temperature: expected a finite number > 0"),
    (lambda: RF(Q, Z, Q, mask=Y[:1] > 0), ValueError, r"mask: expected bool \[2, 4\] as steps"),
    (
        lambda: LTA(Z, Y, Q[:1], Z, Z, Q, shift=False),
        ValueError,
        r"question: expected \[2, H\], one for each sequence, got \[1, 3\]",
    ),
    (
        lambda: LTA(Z, Y, Q, Z, Z, Q, weights=(1, 2), shift=False),
        ValueError,
        r"weights: expected three finite numbers >= 0, got \(1, 2\)",
    ),
    (lambda: LTA(Z, Y, Q, Z, Z, Q, weights=(1, -2, 0), shift=False), ValueError, "weights"),
    (lambda: LTA(Z, Y, Q, Z, Z, Q, beta=0.1), TypeError, "beta"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_gets_words(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()
