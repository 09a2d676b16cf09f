"""Preference matching: what its objective leads to, the expectation of its sampled gradients; rewards, gap, rankings."""

import itertools
import math

import pytest
import torch

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")

R = torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64)
REF = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
ZERO = torch.zeros(1, 1, dtype=torch.long)


def optimum(objective):
    """The policy that minimises objective(logits [1, 1, 3])."""
    z = torch.zeros(1, 1, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([z], lr=0.5, max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure():
        optimizer.zero_grad()
        loss = objective(z)
        loss.backward()
        return loss

    optimizer.step(closure)
    return z.detach().softmax(-1)[0, 0], -objective(z).item()


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_where_the_objectives_lead(monkeypatch, beta):
    """Preference matching to softmax(r / beta), which at beta = 1 are the preferences; a KL to ref exp(r / beta)."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    gain = lambda z: (z.softmax(-1) * R).sum()  # noqa: E731
    p, value = optimum(lambda z: fl.preference_matching_loss(z, ZERO, beta=beta, shift=False).loss - gain(z))
    torch.testing.assert_close(p, (R / beta).softmax(-1), rtol=1e-6, atol=0)
    assert value == pytest.approx(beta * (R / beta).logsumexp(-1).item(), rel=1e-12)
    kl = lambda z: fl.token_stats(z, ZERO, REF.log()[None, None], divergence="reverse_kl", shift=False).divergence  # noqa: E731
    q, _ = optimum(lambda z: beta * kl(z)["reverse_kl"].sum() - gain(z))
    torch.testing.assert_close(q, (R / beta + REF.log()).softmax(-1), rtol=1e-6, atol=0)
    if beta == 1:
        assert p.tolist() == pytest.approx([0.6285317192117624, 0.23122389762214907, 0.14024438316608848], rel=1e-6)
        assert q.tolist() == pytest.approx([0.8189149163616691, 0.15063098089904464, 0.030454102739286212], rel=1e-6)
        assert value == pytest.approx(1.4643687841079451, rel=1e-12)


def sequences(vocab=3):
    """A policy over two tokens as a table of logits, and all of its responses with their probabilities."""
    table = torch.randn(1 + vocab, vocab, dtype=torch.float64, requires_grad=True)
    y = torch.tensor(list(itertools.product(range(vocab), repeat=2)))
    z = table[torch.stack([torch.zeros(len(y), dtype=torch.long), 1 + y[:, 0]], 1)]
    logp = z.log_softmax(-1).gather(-1, y[..., None]).squeeze(-1).sum(1)
    return table, z, y, logp


@pytest.mark.parametrize("baseline", [False, True])
def test_sampled_form_is_unbiased(monkeypatch, baseline):
    """Its value and gradient, averaged over all responses by their probability, are those of E log p(y)."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    table, z, y, logp = sequences()
    b = torch.full((len(y),), -1.7, dtype=torch.float64) if baseline else None
    out = fl.preference_matching_loss(z, y, loss_type="sampled", beta=0.7, baseline=b, reduction="none", shift=False)
    truth = 0.7 * (logp.exp() * logp).sum()
    mean = (logp.detach().exp() * out.loss).sum()
    assert mean.item() == pytest.approx(truth.item(), rel=1e-12)
    found, exact = (torch.autograd.grad(x, table, retain_graph=True)[0] for x in (mean, truth))
    torch.testing.assert_close(found, exact)
    if not baseline:  # the entropy form knows the value as well, and of the gradient the part with prefixes as given
        form = (
            logp.detach().exp() * fl.preference_matching_loss(z, y, beta=0.7, reduction="none", shift=False).loss
        ).sum()
        assert form.item() == pytest.approx(truth.item(), rel=1e-12)
        part = torch.autograd.grad(form, table)[0]
        torch.testing.assert_close(part[1:], exact[1:])
        assert (part[0] - exact[0]).abs().max() > 1e-3


def test_conditional_form_is_unbiased(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    table, z, y, logp = sequences()
    w = torch.randn(len(y), 2, 3, dtype=torch.float64)
    w[:] = w[0]  # a reference without memory
    q = w.log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)
    likely = q > math.log(0.3)
    assert likely.any() and not likely.all()
    penalty = (logp + torch.where(likely, 0, -q).sum(1)) * 0.7
    truth = (logp.exp() * penalty).sum()
    for ref in (w, fl.LogProbs(q)):
        out = fl.conditional_preference_matching_loss(z, y, ref, threshold=0.3, beta=0.7, reduction="none", shift=False)
        mean = (logp.detach().exp() * out.loss).sum()
        assert mean.item() == pytest.approx(truth.item(), rel=1e-12)
        found, exact = (torch.autograd.grad(x, table, retain_graph=True)[0] for x in (mean, truth))
        torch.testing.assert_close(found, exact)
        assert out.metrics["support"].item() == pytest.approx(likely.double().mean().item())


def test_from_log_probs_and_without_tokens(backend, device):
    y = torch.tensor([[0, 0], [0, -100], [-100, -100]], device=device)
    logps = torch.tensor([[-1.0, -2.0], [-0.5, math.nan], [math.nan, math.nan]], device=device).requires_grad_()
    out = fl.preference_matching_loss(fl.LogProbs(logps), y, loss_type="sampled", reduction="none", shift=False)
    assert out.loss.tolist() == [-3.0, -0.5, 0.0]
    assert torch.autograd.grad(out.loss.sum(), logps)[0].tolist() == [[-3, -3], [-0.5, 0], [0, 0]]
    z = torch.randn(3, 2, 5, device=device).requires_grad_()
    out = fl.preference_matching_loss(z, torch.full_like(y, -100), shift=False)
    assert out.loss == 0 and not torch.autograd.grad(out.loss, z)[0].any()
    empty = fl.preference_matching_loss(z[:0], y[:0], shift=False)
    assert empty.loss == 0 and empty.metrics["logps"] == 0


def test_token_rewards():
    logps = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-0.5, -0.25, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]], dtype=torch.float64)
    ref = torch.tensor([[-1.5, -9.0, -0.1, -5.0], [-9.0, -0.75, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    scores = torch.tensor([7.0, -2.0, 3.0], dtype=torch.float64)
    call = lambda f, **o: f.preference_matching_reward(logps, ref, beta=0.5, mask=mask, **o)  # noqa: E731
    out = call(fl, threshold=0.1, scores=scores, clip=5.0)  # log 0.1 = -2.3
    assert out.tolist() == [[0.5, -3.5, 0.0, -0.5 + 5.0], [-4.25, 0.125 - 2.0, 0.0, 0.0], [0.0] * 4]
    for options in (
        {"threshold": 0.1, "scores": scores, "clip": 5.0},
        {"threshold": 1.0},
        {"threshold": 1e-9, "scores": scores},
    ):
        torch.testing.assert_close(call(fl, **options), call(fl.reference, **options))
    kl = call(fl, threshold=1.0)  # ordinary RLHF
    torch.testing.assert_close(kl, (-0.5 * (logps - ref)).masked_fill(~mask, 0))
    free = fl.preference_matching_reward(logps.requires_grad_(), beta=0.5)
    torch.testing.assert_close(free, -0.5 * logps.detach())
    assert not free.requires_grad
    torch.testing.assert_close(free, fl.reference.preference_matching_reward(logps, beta=0.5))


@pytest.mark.parametrize("k", [2, 3, 5])
def test_gap(k):
    logps, rewards = (torch.randn(4, k, dtype=torch.float64) for _ in range(2))
    out = fl.preference_matching_gap(logps, rewards, beta=0.6)
    torch.testing.assert_close(out, fl.reference.preference_matching_gap(logps, rewards, beta=0.6))
    matched = (rewards / 0.6).log_softmax(-1)
    assert fl.preference_matching_gap(matched, rewards, beta=0.6) < 1e-28
    assert fl.preference_matching_gap(matched, rewards) > 1e-3
    assert fl.preference_matching_gap(logps[:0], rewards[:0]) == 0
    if k == 2:  # evaluation_pm of the released code
        expected = ((rewards[:, 0] - rewards[:, 1]) - (logps[:, 0] - logps[:, 1])).square().mean()
        torch.testing.assert_close(fl.preference_matching_gap(logps, rewards), expected)
    assert fl.preference_matching_gap(logps.bfloat16(), rewards.bfloat16()).dtype == torch.float32


def test_plackett_luce_values():
    assert fl.plackett_luce_loss(R).item() == pytest.approx(0.9384457682880516, rel=1e-12)
    every = [math.exp(-fl.plackett_luce_loss(R[list(p)]).item()) for p in itertools.permutations(range(3))]
    assert sum(every) == pytest.approx(1, rel=1e-12)
    pair = torch.tensor([[0.3, -1.2], [2.0, 5.0]], dtype=torch.float64)
    losses = fl.plackett_luce_loss(pair, reduction="none")
    torch.testing.assert_close(losses, fl.bradley_terry_loss(pair[:, 0], pair[:, 1], reduction="none"))
    torch.testing.assert_close(fl.plackett_luce_loss(pair, reduction="sum"), losses.sum())
    torch.testing.assert_close(fl.plackett_luce_loss(pair, num_items=5), losses.sum() / 5)
    assert fl.plackett_luce_loss(pair[:0]) == 0 and not fl.plackett_luce_loss(pair[:, :0]).any()


@pytest.mark.parametrize("masked", [False, True])
def test_plackett_luce_matches_the_twin(masked):
    r = (torch.randn(2, 3, 5, dtype=torch.float64) * 3).requires_grad_()
    mask = (torch.rand(2, 3, 5) < 0.6) if masked else None
    if masked:
        mask[0, 0] = False
    ours = fl.plackett_luce_loss(r, mask=mask, reduction="none")
    twin = fl.reference.plackett_luce_loss(r, mask=mask, reduction="none")
    torch.testing.assert_close(ours, twin)
    weight = torch.randn_like(ours)
    found, exact = (torch.autograd.grad((weight * x).sum(), r)[0] for x in (ours, twin))
    torch.testing.assert_close(found, exact)
    assert torch.autograd.gradcheck(lambda r: fl.plackett_luce_loss(r, mask=mask, reduction="none"), r)
    if masked:  # places that are not taken may hold anything
        wild = r.detach().masked_fill(~mask, math.nan).requires_grad_()
        again = fl.plackett_luce_loss(wild, mask=mask, reduction="none")
        torch.testing.assert_close(again, ours)
        torch.testing.assert_close(torch.autograd.grad((weight * again).sum(), wild)[0], found)


def test_rankings_stay_finite():
    r = torch.tensor([[-3e4, 0.0, 3e4], [3e4, 0.0, -3e4]]).requires_grad_()
    losses = fl.plackett_luce_loss(r, reduction="none")
    assert losses.tolist() == [9e4, 0.0]
    assert torch.autograd.grad(losses.sum(), r)[0].tolist() == [[-1, -1, 2], [0, 0, 0]]
    a, b = torch.tensor([-3e4, 3e4]).requires_grad_(), torch.tensor([3e4, -3e4])
    losses = fl.bradley_terry_loss(a, b, reduction="none")
    assert losses.tolist() == [6e4, 0.0] and torch.autograd.grad(losses.sum(), a)[0].tolist() == [-1, 0]


def test_bradley_terry():
    a, b = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    m = torch.rand(5, dtype=torch.float64)
    for margin in (0.0, 0.3, m):
        torch.testing.assert_close(
            fl.bradley_terry_loss(a, b, margin=margin), fl.reference.bradley_terry_loss(a, b, margin=margin)
        )
        assert torch.autograd.gradcheck(lambda a, b, margin=margin: fl.bradley_terry_loss(a, b, margin=margin), (a, b))
    assert fl.bradley_terry_loss(R[0], R[1]).item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-12)
    low = fl.bradley_terry_loss(a.bfloat16(), b.bfloat16())
    exact = fl.reference.bradley_terry_loss(a.bfloat16().double(), b.bfloat16().double())
    assert low.dtype == torch.float32 and low.item() == pytest.approx(exact.item(), rel=1e-6)


Z, Y = torch.zeros(4, 3, 5), torch.zeros(4, 3, dtype=torch.long)
S, T = torch.zeros(4), torch.zeros(4, 3)
PM, CPM, REWARD = fl.preference_matching_loss, fl.conditional_preference_matching_loss, fl.preference_matching_reward
BAD = [
    (
        lambda: PM(Z, Y, loss_type="exact", shift=False),
        ValueError,
        "loss_type: expected one of entropy, sampled, got 'exact'",
    ),
    (lambda: PM(Z, Y, beta=0, shift=False), ValueError, "beta: expected a finite number > 0, got 0"),
    (lambda: PM(Z, Y, baseline=S, shift=False), ValueError, "baseline: is for loss_type='sampled'"),
    (
        lambda: PM(Z, Y, loss_type="sampled", baseline=S[:3], shift=False),
        ValueError,
        r"baseline: expected \[4\].*got \[3\]",
    ),
    (lambda: PM(Z[0], Y[0], shift=False), ValueError, r"labels: expected \[S, T\]"),
    (lambda: PM(fl.LogProbs(T), Y, shift=False), ValueError, "policy: fl.LogProbs has no distribution"),
    (lambda: PM(Z, Y, threshold=0.1, shift=False), TypeError, "threshold"),
    (lambda: PM(Z, Y, reduction="avg", shift=False), ValueError, "reduction: expected"),
    (lambda: CPM(Z, Y, None, shift=False), ValueError, "ref: expected a reference, got None"),
    (
        lambda: CPM(Z, Y, fl.LogProbs(S), shift=False),
        ValueError,
        "ref: expected fl.LogProbs of each token, got one per sequence",
    ),
    (
        lambda: CPM(Z, Y, Z, threshold=0, shift=False),
        ValueError,
        r"threshold: expected a probability in \(0, 1\], got 0",
    ),
    (lambda: CPM(Z, Y, Z, loss_type="sampled", shift=False), TypeError, "loss_type"),
    (lambda: REWARD(T, threshold=0.1), ValueError, "threshold: goes with ref_logps"),
    (lambda: REWARD(T, T), ValueError, "threshold: goes with ref_logps"),
    (lambda: REWARD(T, T[:2], threshold=0.1), ValueError, r"ref_logps: expected \[4, 3\] as logps, got \[2, 3\]"),
    (lambda: REWARD(T, mask=T[0] > 0), ValueError, r"mask: expected \[4, 3\]"),
    (lambda: REWARD(T, scores=T), ValueError, r"scores: expected \[4\] for logps \[4, 3\], got \[4, 3\]"),
    (lambda: REWARD(T, clip=5.0), ValueError, "clip: is of scores"),
    (lambda: REWARD(T, scores=S, clip=-1.0), ValueError, "clip: expected a finite number > 0"),
    (lambda: REWARD(Y), TypeError, "logps: expected a float tensor, got torch.int64"),
    (lambda: fl.preference_matching_gap(T, S), ValueError, r"rewards: expected \[\.\.\., K\] with K >= 2"),
    (lambda: fl.preference_matching_gap(T[:, :1], T[:, :1]), ValueError, "rewards: expected"),
    (lambda: fl.plackett_luce_loss(S[0]), ValueError, "rewards: expected"),
    (lambda: fl.plackett_luce_loss(Y), TypeError, "rewards: expected a float tensor"),
    (lambda: fl.plackett_luce_loss(T, mask=T), ValueError, r"mask: expected bool \[4, 3\].*got torch.float32"),
    (lambda: fl.plackett_luce_loss(T, reduction="sum", num_items=2), ValueError, "num_items: only goes with"),
    (lambda: fl.bradley_terry_loss(S, T), ValueError, r"rejected: expected \[4\] as chosen, got \[4, 3\]"),
    (lambda: fl.bradley_terry_loss(S, S, margin=T), ValueError, r"margin: expected a number or \[4\]"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_gets_words(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()
