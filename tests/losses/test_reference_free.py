"""simpo_loss, cpo_loss and orpo_loss: published values, gradients in closed form, token means of the batch, edges."""

import math

import pytest
import torch
from helpers import double, logits, relative
from torch.nn.functional import cross_entropy, logsigmoid

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")

LOSSES = {
    "simpo": lambda f, z, y, **o: f.simpo_loss(z, y, cpo_alpha=0.3, **{"shift": False, **o}),
    "cpo": lambda f, z, y, **o: f.cpo_loss(z, y, **{"shift": False, **o}),
    "orpo": lambda f, z, y, **o: f.orpo_loss(z, y, **{"shift": False, **o}),
}


def batch(device, pairs=3, length=6, vocab=23):
    """Logits and labels, of which a different number counts in each sequence."""
    z = logits((2 * pairs, length, vocab), device)[0]
    y = torch.randint(0, vocab, (2 * pairs, length), device=device)
    y[:, 0] = -100
    for i in range(2 * pairs):
        y[i, 2 + i % 4 + (i == 0) :] = -100
    return z, y


def means(*values):
    """Log-probs of sequences of 2 tokens, or 1, that have these means; and labels."""
    x = torch.tensor([[v - 0.1, v + 0.1] if i % 2 == 0 else [v, 7] for i, v in enumerate(values)], dtype=torch.float64)
    return x, torch.tensor([[0, 0] if i % 2 == 0 else [0, -100] for i in range(len(values))])


def test_published_values():
    """Mean log-probs of -0.9 and -1.3."""
    x, y = means(-0.9, -1.3)
    for library in (fl, fl.reference):
        out = library.simpo_loss(fl.LogProbs(x), y, beta=2.0, gamma=0.5, shift=False)
        assert out.loss.item() == pytest.approx(0.5543552444685271, rel=1e-12)
        assert out.metrics["rewards/chosen"].item() == pytest.approx(-1.8)
        assert out.metrics["logps/rejected"].item() == pytest.approx(-1.3)
        out = library.orpo_loss(fl.LogProbs(x), y, beta=0.1, shift=False)
        assert out.loss.item() == pytest.approx(0.9 + 0.04361959567485065, rel=1e-12)
        assert out.metrics["log_odds_ratio"].item() == pytest.approx(-0.4361959567485065, rel=1e-12)
        assert out.metrics["nll_loss"].item() == pytest.approx(0.9)
        odds = math.log(math.expm1(1.3) / math.expm1(0.9))  # m / (1 - m) = 1 / (e^-log m - 1)
        assert out.metrics["log_odds_chosen"].item() == pytest.approx(odds, rel=1e-12)


def test_cpo_is_dpo_without_a_reference(backend, device):
    """h_chosen = 0.7, h_rejected = -0.4 as published for DPO; and the NLL on top is torch's cross entropy."""
    h, y = torch.tensor([[0.7], [-0.4]], dtype=torch.float64), torch.zeros(2, 1, dtype=torch.long)
    if backend == "torch":
        values = {0.639658918622423: {}, 0.650658918622423: {"label_smoothing": 0.1}, 0.89: {"loss_type": "hinge"}}
        values[15.21] = {"loss_type": "ipo"}
        for value, options in values.items():
            out = fl.cpo_loss(fl.LogProbs(h), y, cpo_alpha=0, **options, shift=False)
            assert out.loss.item() == pytest.approx(value, rel=1e-12)
    z, y = batch(device)
    nll = cross_entropy(z[:3].flatten(0, 1), y[:3].flatten())
    mine, dpo = fl.cpo_loss(z, y, cpo_alpha=0.7, beta=0.4, shift=False), fl.dpo_loss(z, y, None, beta=0.4, shift=False)
    torch.testing.assert_close(mine.loss, dpo.loss + 0.7 * nll)
    torch.testing.assert_close(mine.metrics["nll_loss"], nll.detach())
    expected = torch.autograd.grad(dpo.loss + 0.7 * nll, z)[0]
    torch.testing.assert_close(torch.autograd.grad(mine.loss, z)[0], expected)


@pytest.mark.parametrize("loss", ["simpo", "orpo", "ipo"])
def test_gradients_in_closed_form(loss):
    """At the tokens' log-probs: half of a chosen response's, all of a rejected one's."""
    x, y = means(-0.9, -1.3)
    x.requires_grad_()
    if loss == "simpo":
        g = 2 / (1 + math.exp(2 * 0.4 - 0.5))
        out, expected = fl.simpo_loss(fl.LogProbs(x), y, beta=2, gamma=0.5, shift=False), [-g, g]
    elif loss == "orpo":
        g = 0.3 * math.expm1(0.9) / (math.expm1(0.9) + math.expm1(1.3))  # sigmoid(-log odds ratio)
        out, expected = (
            fl.orpo_loss(fl.LogProbs(x), y, beta=0.3, shift=False),
            [g / math.expm1(-0.9) - 1, -g / math.expm1(-1.3)],
        )
    else:
        g = 2 * (0.4 - 1 / 0.6)
        out, expected = fl.cpo_loss(fl.LogProbs(x), y, beta=0.3, loss_type="ipo", shift=False), [g - 1, -g]
    found = torch.autograd.grad(out.loss, x)[0]
    chosen, rejected = expected
    torch.testing.assert_close(found, torch.tensor([[chosen / 2, chosen / 2], [rejected, 0]], dtype=torch.float64))


@pytest.mark.parametrize("name", LOSSES)
def test_nll_is_a_token_mean_of_the_batch(device, monkeypatch, name):
    """Padded, shifted and packed: what is left of the loss without the pairs' terms."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, y = batch(device)
    weight = 0.3 if name == "simpo" else 1
    keep = torch.cat([torch.arange(6) + 6 * i for i in (0, 1, 2, 4, 5)]).to(device)  # the first rejected is empty
    cu = torch.tensor([0, 6, 12, 18, 18, 24, 30], device=device)
    free = {"simpo": {"cpo_alpha": 0}, "cpo": {"cpo_alpha": 0}, "orpo": {}}[name]
    for a, b, options, logits_of, ids in (
        (z, y, {"shift": False}, z[:3], y[:3]),
        (z, y, {"shift": True}, z[:3, :-1], y[:3, 1:]),
        (z.flatten(0, 1)[keep], y.flatten()[keep], {"cu_seqlens": cu, "shift": False}, z[:3], y[:3]),
        (z.flatten(0, 1)[keep], y.flatten()[keep], {"cu_seqlens": cu, "shift": True}, z[:3, :-1], y[:3, 1:]),
    ):
        out = LOSSES[name](fl, a, b, **options)
        nll = cross_entropy(logits_of.flatten(0, 1), ids.flatten())
        if name == "orpo":
            term = -0.1 * out.metrics["log_odds_ratio"]
        else:
            term = getattr(fl, f"{name}_loss")(a, b, **free, **options).loss
        torch.testing.assert_close(out.loss, term + weight * nll)
        none = LOSSES[name](fl, a, b, reduction="none", **options).loss
        assert none.shape == (3,)
        torch.testing.assert_close(none.mean(), out.loss)


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches(device, monkeypatch, name):
    """With the pairs and the chosen tokens of the whole batch; with the pairs alone, means of micro-batches."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, y = batch(device)
    whole = LOSSES[name](fl, z, y)
    tokens = (y[:3] != -100).sum()
    assert len({int((y[rows] != -100).sum()) for rows in range(3)}) > 1
    parts = ([0, 3], [1, 2, 4, 5])
    for items, chosen in ((3, int(tokens)), (torch.tensor(3, device=device), tokens)):
        total = sum(LOSSES[name](fl, z[r], y[r], num_items=items, num_nll_tokens=chosen).loss for r in parts)
        torch.testing.assert_close(total, whole.loss)
        found = torch.autograd.grad(total, z)[0]
        torch.testing.assert_close(found, torch.autograd.grad(whole.loss, z, retain_graph=True)[0])
    own = [LOSSES[name](fl, z[r], y[r]).loss for r in parts]
    total = sum(LOSSES[name](fl, z[r], y[r], num_items=3).loss for r in parts)
    torch.testing.assert_close(total, (own[0] + 2 * own[1]) / 3)


def test_alphapo():
    """Its reward is (1 - m^-alpha) / alpha, SimPO's in the limit, and stays finite where it grows exponentially."""
    x, y = means(-0.9, -1.3)
    for alpha in (0.25, 1.0, -0.5):
        gap = (math.exp(1.3 * alpha) - math.exp(0.9 * alpha)) / alpha
        loss = fl.simpo_loss(fl.LogProbs(x), y, beta=2.5, gamma=0.2, alpha=alpha, shift=False).loss
        assert loss.item() == pytest.approx(math.log1p(math.exp(0.2 - 2.5 * gap)), rel=1e-12)
    near, simpo = (fl.simpo_loss(fl.LogProbs(x), y, alpha=a, shift=False).loss.item() for a in (1e-7, 0.0))
    assert near == pytest.approx(simpo, rel=1e-6) and near != simpo
    far = torch.tensor([[-3000.0], [-1.0]]).requires_grad_()
    out = fl.simpo_loss(fl.LogProbs(far), torch.zeros(2, 1, dtype=torch.long), alpha=1.0, shift=False)
    assert out.loss.isfinite() and torch.autograd.grad(out.loss, far)[0].isfinite().all()


@pytest.mark.parametrize("chosen", [-1e-7, -1e-3, -0.69, -5.0, -200.0])
@pytest.mark.parametrize("rejected", [-1e-7, -0.7, -200.0])
def test_orpo_odds_are_accurate(chosen, rejected):
    x = torch.tensor([[chosen], [rejected]]).requires_grad_()
    y, x64 = torch.zeros(2, 1, dtype=torch.long), double(x)
    mine, truth = fl.orpo_loss(fl.LogProbs(x), y, shift=False), fl.reference.orpo_loss(fl.LogProbs(x64), y, shift=False)
    m = [math.exp(v) for v in x64.flatten().tolist()]
    log_odds = [math.log(m) - math.log(-math.expm1(v)) for m, v in zip(m, x64.flatten().tolist(), strict=True)]
    expected = log_odds[0] - log_odds[1]
    assert truth.metrics["log_odds_chosen"].item() == pytest.approx(expected, rel=1e-9)
    assert mine.metrics["log_odds_chosen"].item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    found, exact = torch.autograd.grad(mine.loss, x)[0], torch.autograd.grad(truth.loss, x64)[0]
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-7)


def test_orpo_of_a_certain_response():
    """Probability 1, or no tokens: finite odds that ask for nothing; the NLL's gradient is there."""
    y = torch.tensor([[0], [0], [0], [-100]])
    x = torch.tensor([[0.0], [-1.0], [0.0], [-1.0]]).requires_grad_()
    out = fl.orpo_loss(fl.LogProbs(x), y, reduction="none", shift=False)
    assert out.loss.isfinite().all() and all(v.isfinite() for v in out.metrics.values())
    assert out.loss[0].item() == pytest.approx(0.1 * math.log(2))
    g = torch.autograd.grad(out.loss.sum(), x)[0]
    assert g.isfinite().all() and g[0] == -1 and g[2] == 0 and g[3] == 0 and g[1] < -1


def naive_orpo(z, labels, ids, beta):
    """As TRL has it, of aligned logits: ids mark prompt and completion, labels the completion."""
    each = z.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) * (labels != -100)
    m = (each.sum(1) / (labels != -100).sum(1)).exp()
    odds = torch.log(m / (1 - m))
    pairs = len(z) // 2
    nll = cross_entropy(z[:pairs].flatten(0, 1), ids[:pairs].flatten())
    return nll - beta * logsigmoid(odds[:pairs] - odds[pairs:]).mean()


@pytest.mark.parametrize("shift", [False, True])
def test_orpo_nll_over_the_prompt_too(own_backend, device, shift):
    z, y = batch(device)
    ids = torch.randint(0, 23, y.shape, device=device).where(y == -100, y)
    ids[1, 5:] = -100
    a, b, c = (z[:, :-1], y[:, 1:], ids[:, 1:]) if shift else (z, y, ids)
    truth = naive_orpo(double(z)[:, : a.shape[1]], b, c, 0.2)
    out = fl.orpo_loss(z, y, nll_labels=ids, beta=0.2, shift=shift, entropy=True)
    torch.testing.assert_close(out.loss.double(), truth, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(naive_orpo(a, b, c, 0.2), z)[0]
    torch.testing.assert_close(torch.autograd.grad(out.loss, z)[0], expected, rtol=1e-4, atol=1e-6)
    twin = fl.reference.orpo_loss(double(z), y, nll_labels=ids, beta=0.2, shift=shift, entropy=True)
    torch.testing.assert_close(twin.loss, truth)
    for name, value in twin.metrics.items():
        torch.testing.assert_close(out.metrics[name].double(), value, rtol=1e-5, atol=1e-5, msg=name)
    other = ids.clone()
    other[3:] = 5  # the rejected rows do not matter, and need not be there
    torch.testing.assert_close(fl.orpo_loss(z, y, nll_labels=other, beta=0.2, shift=shift).loss, out.loss)


@pytest.mark.parametrize("plan", ["row_blocks", "vocab_chunks"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("shift", [False, True])
def test_orpo_prompts_from_hidden_states(monkeypatch, plan, packed, shift):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    y = batch("cpu")[1]
    ids = torch.randint(0, 23, y.shape).where(y == -100, y)
    x, weight, options = torch.randn(6, 6, 8), torch.randn(23, 8), {"shift": shift, "num_items": 5}
    if packed:
        keep = torch.cat([torch.arange(6) + 6 * i for i in (0, 1, 2, 4, 5)])
        x, y, ids = x.flatten(0, 1)[keep], y.flatten()[keep], ids.flatten()[keep]
        options["cu_seqlens"] = torch.tensor([0, 6, 12, 18, 18, 24, 30])
    leaves, exact = [x.requires_grad_(), weight.requires_grad_()], [double(x), double(weight)]
    mine = fl.orpo_loss(fl.Hidden(*leaves), y, nll_labels=ids, plan=plan, **options)
    truth = fl.reference.orpo_loss(fl.Hidden(*exact), y, nll_labels=ids, **options)
    assert relative(mine.loss, truth.loss) <= 1e-5
    for g, t in zip(torch.autograd.grad(mine.loss, leaves), torch.autograd.grad(truth.loss, exact), strict=True):
        assert relative(g, t) <= 1e-5
    for name, value in truth.metrics.items():
        torch.testing.assert_close(mine.metrics[name].double(), value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_counts(backend, device, poison, name):
    z, y = batch(device)
    y[1], y[4] = -100, -100  # a pair
    out = LOSSES[name](fl, z, y, reduction="none")
    g = torch.autograd.grad(out.loss.sum(), z)[0]
    assert out.loss.isfinite().all() and g.isfinite().all() and g[0].any() and not g[1].any() and not g[4].any()
    out = LOSSES[name](fl, z, torch.full_like(y, -100))
    assert out.loss.isfinite() and not torch.autograd.grad(out.loss, z)[0].any()
    out = LOSSES[name](fl, z[:0], y[:0])
    assert out.loss == 0 and all(v.isfinite() for v in out.metrics.values())


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_compiles_in_one_graph(device, monkeypatch, packed):
    """So nothing is read on the host."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, y = batch(device)
    options = {"shift": True}
    if packed:
        z, y = z.detach().flatten(0, 1), y.flatten()
        options["cu_seqlens"] = torch.arange(7, device=device) * 6
    call = lambda z, y, **o: fl.orpo_loss(z, y, nll_labels=y.clamp(min=0), **o).loss  # noqa: E731
    torch.testing.assert_close(
        torch.compile(call, fullgraph=True, backend="eager")(z, y, **options), call(z, y, **options)
    )


Z, Y = torch.zeros(4, 3, 5), torch.zeros(4, 3, dtype=torch.long)
BAD = [
    (lambda f: f.simpo_loss(Z, Y, gamma=-1, shift=False), ValueError, "gamma: expected a finite number >= 0, got -1"),
    (lambda f: f.simpo_loss(Z, Y, beta=0, shift=False), ValueError, "beta: expected a finite number > 0"),
    (lambda f: f.simpo_loss(Z, Y, alpha=math.inf, shift=False), ValueError, "alpha: expected a finite number, got inf"),
    (lambda f: f.simpo_loss(Z, Y, cpo_alpha=None, shift=False), ValueError, "cpo_alpha"),
    (lambda f: f.simpo_loss(Z, Y, label_smoothing=0.5, shift=False), ValueError,
     r"label_smoothing: expected a number in \[0, 0.5\)"),
    (lambda f: f.cpo_loss(Z, Y, loss_type="simpo", shift=False), ValueError, "for 'simpo' call fl.simpo"),
    (lambda f: f.cpo_loss(Z, Y, loss_type="ipo", label_smoothing=0.1, shift=False), ValueError,
     "label_smoothing: only goes with loss_type='sigmoid'"),
    (lambda f: f.cpo_loss(Z, Y, cpo_alpha=-0.1, shift=False), ValueError, "cpo_alpha: expected a finite number >= 0"),
    (lambda f: f.cpo_loss(Z, Y, num_nll_tokens=-1, shift=False), ValueError,
     "num_nll_tokens: expected a finite number >= 0.*got -1"),
    (lambda f: f.cpo_loss(Z[:3], Y[:3], shift=False), ValueError, r"labels: expected \[2B, T\]"),
    (lambda f: f.cpo_loss(Z, Y, reduction="avg", shift=False), ValueError, "reduction"),
    (lambda f: f.cpo_loss(Z, Y, reduction="sum", num_items=3, shift=False), ValueError, "num_items"),
    (lambda f: f.orpo_loss(Z, Y, nll_labels=Y[:2], shift=False), ValueError,
     r"nll_labels: expected token ids \[4, 3\].*got \[2, 3\]"),
    (lambda f: f.orpo_loss(Z, Y, nll_labels=7, shift=False), ValueError, "nll_labels: expected token ids.*got int"),
    (lambda f: f.orpo_loss(Z, Y, beta=-1, shift=False), ValueError, "beta"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_gets_words(case):
    call, error, words = BAD[case]
    for library in (fl, fl.reference):
        with pytest.raises(error, match=words):
            call(library)


@pytest.mark.parametrize("name", LOSSES)
def test_unknown_options_are_refused(name):
    for options in ({"ref": Z}, {"divergence": "js"}, {"unit": "pair"}):
        with pytest.raises(TypeError, match=next(iter(options))):
            LOSSES[name](fl, Z, Y, **options)
