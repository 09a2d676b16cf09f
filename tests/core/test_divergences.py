"""The registry: every entry's formulas against one another, published values, and what bad input gets."""

import copy
import dataclasses
import importlib
import math
import pickle
import re

import pytest
import torch

import fused_losses as fl
from fused_losses import divergences

NAMES = divergences.names()
STUDENT = torch.tensor([1.0, 0.0, -1.0, 0.5], dtype=torch.float64)
TEACHER = torch.tensor([0.2, 0.7, -0.5, 0.1], dtype=torch.float64)
VALUES = {  # policy = softmax(STUDENT), ref = softmax(TEACHER)
    "forward_kl": 0.20718619920862485,
    "reverse_kl": 0.19223995023397894,
    "jeffreys": 0.20718619920862485 + 0.19223995023397894,
    "js(beta=0.1)": 0.018347160585359564,
    "js(beta=0.5)": 0.04880754272985516,
    "js(beta=0.9)": 0.017299460992734984,
    "total_variation": 0.29116732164497566,
    "skew_forward_kl(lam=0.1)": 0.16265580513595868,
    "skew_reverse_kl(lam=0.1)": 0.1558032867870694,
    "alpha_beta(a=0.2, b=0.7)": 0.22151925950571963,
    "alpha_beta(a=1, b=1)": 0.056622094756793834,
    "alpha(a=0.5)": 0.19743812815378975,
}


def random_pair(n=64, v=33):
    return torch.randn(n, v, dtype=torch.float64).softmax(-1), torch.randn(n, v, dtype=torch.float64).softmax(-1)


@pytest.mark.parametrize("key", VALUES)
def test_published_values(key, backend, device):
    z, w = STUDENT.float().to(device), TEACHER.float().to(device)
    ours = fl.token_stats(
        z[None], torch.zeros(1, dtype=torch.long, device=device), w[None], divergence=key, shift=False
    )
    (value,) = ours.divergence.values()
    assert value.item() == pytest.approx(VALUES[key], rel=3e-6)
    assert divergences.from_key(key).define(STUDENT.log_softmax(-1), TEACHER.log_softmax(-1)).item() == pytest.approx(
        VALUES[key], rel=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
def test_definition_is_the_f_divergence_of_f(name):
    d = divergences.get(name)
    p, q = random_pair()
    if d.f is None:
        assert "not an f-divergence" in d.no_link
        return
    torch.testing.assert_close(d.define(p.log(), q.log()), (q * d.f(p / q)).sum(-1))
    u = torch.linspace(0.05, 4, 80, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(d.f(u).sum(), u)
    torch.testing.assert_close(slope, d.f_prime(u))
    assert d.f(torch.ones(1, dtype=torch.float64)).abs() < 1e-15 and (slope.diff() >= -1e-12).all()


@pytest.mark.parametrize("name", NAMES)
def test_formulas_agree_with_the_definition(name):
    """grad_p, grad_q and term against autograd of the definition in log p and log q; Euler's identity for the degree."""
    d = divergences.get(name)
    p, q = random_pair()
    lp, lq = p.log().requires_grad_(), q.log().requires_grad_()
    x = (p, q, (lp - lq).detach(), lp.detach(), lq.detach())
    dp, dq = torch.autograd.grad(d.define(lp, lq).sum(), (lp, lq))
    project = lambda g, prob: g - prob * g.sum(-1, keepdim=True)  # noqa: E731  what softmax lets through
    torch.testing.assert_close(project(d.grad_p(*x, *d.params), p), project(dp, p))
    torch.testing.assert_close(project(d.grad_q(*x, *d.params), q), project(dq, q))
    total = (d.grad_p(*x, *d.params) + d.grad_q(*x, *d.params)).sum(-1)
    torch.testing.assert_close(total, d.degree * d.define(p.log(), q.log()))
    if d.term is not None:
        c = d.term(*x, *d.params)
        torch.testing.assert_close(c.sum(-1), d.define(p.log(), q.log()))
        assert name == "js" or (c > -1e-15).all()
    else:
        assert d.row is not None


TERMS = [n for n in NAMES if divergences.get(n).term is not None] + [
    "js(beta=0.3)",
    "skew_forward_kl(lam=0.9)",
    "alpha_beta(a=1.5, b=2)",
]


@pytest.mark.parametrize("key", TERMS)
def test_terms_of_one_token(backend, device, key):
    """A few roundings of the first order, which cancels near p = q; and nothing but zeros where neither side has the token."""
    d = divergences.from_key(key)
    t = torch.cat([s * torch.logspace(-7, 1.9, 300, dtype=torch.float64) for s in (-1, 1)]).float().to(device)
    larger = torch.rand(t.shape, dtype=torch.float64, device=device)
    exact = t.double()
    log_p, log_q = larger.log() + exact.clamp(max=0), larger.log() - exact.clamp(min=0)
    columns = torch.stack([log_p.exp(), log_q.exp(), exact, log_p, log_q])
    nothing = torch.tensor([0.0, 1e-3, -1e-3, 1e20, -1e20, 1e37, -1e37], device=device)
    suppressed = torch.full_like(nothing, -1e37)

    def computed(formula, x):
        if backend == "torch":
            return formula(*x, *d.params)
        return importlib.import_module("fused_losses.cli.formula_kernel").computed(formula, x, d.params)

    for formula in (d.term, d.grad_p, d.grad_q):
        assert not computed(formula, torch.stack([nothing * 0, nothing * 0, nothing, suppressed, suppressed])).any()
        truth = formula(*columns, *d.params)
        first_order = torch.maximum(columns[0], columns[1]) ** d.degree * exact.abs().clamp(max=1)
        error = (computed(formula, columns.float()) - truth).abs() / (2.0**-24 * first_order + 2e-6 * truth.abs())
        assert error.max() <= 16, f"{formula.__name__}: {error.max():.1f}"


@pytest.mark.parametrize("name", divergences.linkable())
def test_link_is_f_prime(name):
    """s(h) = f'(e^h) up to a constant and a factor; the fused formula, its slope and the textbook form agree."""
    d = divergences.get(name)
    h = torch.linspace(-3, 3, 61, dtype=torch.float64, requires_grad=True)
    s, slope = d.link(h.detach(), *d.params)
    (expected,) = torch.autograd.grad(d.score(h).sum(), h)
    torch.testing.assert_close(slope, expected)
    torch.testing.assert_close(s - s[0], (d.score(h) - d.score(h)[0]).detach())
    (f_slope,) = torch.autograd.grad(d.f_prime(h.exp()).sum(), h)
    ratio = slope / f_slope
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


REFUSED = {
    "pearson_chi2": "finite", "skew_forward_kl": "finite", "total_variation": "not invertible", "alpha_beta": "not an f-div",
}  # fmt: skip


def test_every_divergence_has_a_link_or_a_reason():
    """The registry knows the reason: those above are only examples."""
    refused = set(NAMES) - set(divergences.linkable())
    assert refused >= set(REFUSED)
    for name in refused:
        reason = divergences.get(name).no_link
        assert reason and REFUSED.get(name, "") in reason
        with pytest.raises(ValueError, match=re.escape(reason)):
            fl.dpo_loss(
                torch.randn(2, 1, 5),
                torch.zeros(2, 1, dtype=torch.long),
                torch.randn(2, 1, 5),
                divergence=name,
                shift=False,
            )


def test_identities():
    p, q = random_pair()
    lp, lq = p.log(), q.log()
    get = divergences.get
    for beta in (0.1, 0.5, 0.8):
        torch.testing.assert_close(get("js", beta=beta).define(lp, lq), get("js", beta=1 - beta).define(lq, lp))
    torch.testing.assert_close(get("alpha", a=1e-6).define(lp, lq), get("reverse_kl").define(lp, lq), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        get("alpha", a=1 - 1e-6).define(lp, lq), get("forward_kl").define(lp, lq), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        get("alpha_beta", a=1, b=1e-6).define(lp, lq), get("forward_kl").define(lp, lq), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(get("alpha_beta", a=1, b=1).define(lp, lq), 0.5 * (p - q).square().sum(-1))
    torch.testing.assert_close(get("pearson_chi2").define(lp, lq), get("neyman_chi2").define(lq, lp))
    torch.testing.assert_close(get("squared_hellinger").define(lp, lq), 1 - (p * q).sqrt().sum(-1))


def test_parsing():
    assert divergences.parse(None) == ()
    assert [d.key for d in divergences.parse(["js", "js(beta=0.3)", "js"])] == ["js", "js(beta=0.3)"]
    assert (
        divergences.get("alpha", a=0.5) is divergences.from_key("alpha") is divergences.from_key(" alpha( a = 0.5 ) ")
    )


def test_divergences_travel():
    d = divergences.get("js", beta=0.3)
    assert pickle.loads(pickle.dumps(d)) is d and copy.deepcopy(d) is d
    with pytest.raises(ValueError, match=r"expected one made by fl.divergences.get\(\), got .*; use it inside `with"):
        divergences.parse(dataclasses.replace(d, params=(0.1,)))


def test_one_object_for_each_key(monkeypatch):
    """However many are made after it, and while torch.compile runs code that it does not trace (an operator's fake kernel)."""
    d = divergences.get("js", beta=0.123)
    for n in range(1100):
        divergences.get("js", beta=0.2 + n / 2000)
    assert divergences.from_key(d) is d and divergences.from_key(d.key) is d
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    inside = divergences.get("js", beta=0.124)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", False)
    assert divergences.get("js", beta=0.124) is inside


@pytest.mark.parametrize(
    ("key", "error", "words"),
    [
        ("kl", ValueError, "unknown name 'kl'; known: reverse_kl"),
        ("js(beta=0)", ValueError, r"js beta: expected a number in \(0, 1\), got 0"),
        ("js(beta=1.5)", ValueError, "got 1.5"),
        ("alpha(a=1)", ValueError, "alpha a"),
        ("alpha(b=.5)", TypeError, "unknown parameter b"),
        ("skew_forward_kl(lam=1)", ValueError, "lam"),
        ("alpha_beta(a=-1)", ValueError, "alpha_beta a"),
        ("js(0.3)", ValueError, "expected parameters such as"),
        ("js(beta=nan)", ValueError, "got nan"),
        (3, TypeError, "expected a name or a Divergence"),
    ],
)
def test_bad_names(key, error, words):
    with pytest.raises(error, match=words):
        divergences.from_key(key)


@pytest.mark.parametrize(("asked", "kind"), [({"js": 0.1}, "dict"), ({"js"}, "set"), (3, "int")])
def test_neither_weights_nor_sets_are_names(asked, kind):
    z, y = torch.zeros(2, 5), torch.zeros(2, dtype=torch.long)
    with pytest.raises(TypeError, match=f"divergence: expected a name, a Divergence or a sequence of them, got {kind}"):
        fl.token_stats(z, y, z, divergence=asked, shift=False)


def test_f_dpo_check_values():
    """h_chosen = 0.7, h_rejected = -0.4, beta = 0.1, and the gradients there."""
    expected = {
        "reverse_kl": (0.639658918622423, -0.04725276953054802, 0.04725276953054802),
        "forward_kl": (0.6446228270324563, -0.02359473089130759, 0.07088248887843207),
        "js": (0.6679805924730173, -0.01616778405599817, 0.02917147712278023),
        "alpha(a=0.3)": (0.641722675953669, None, None),
        "alpha(a=0.5)": (0.6428100903328066, -0.03341540971701917, 0.05791735974147727),
        "alpha(a=0.7)": (0.643684177622221, None, None),
    }
    y = torch.zeros(2, 1, dtype=torch.long)
    for key, (loss, dw, dl) in expected.items():
        h = torch.tensor([[0.7], [-0.4]], dtype=torch.float64, requires_grad=True)
        ref = fl.LogProbs(torch.zeros(2, 1, dtype=torch.float64))
        out = fl.dpo_loss(fl.LogProbs(h), y, ref, divergence=key, shift=False)
        assert out.loss.item() == pytest.approx(loss, rel=1e-12), key
        out.loss.backward()
        if dw is not None:
            assert h.grad.view(-1).tolist() == pytest.approx([dw, dl], rel=1e-9), key
        at_zero = fl.dpo_loss(fl.LogProbs(torch.zeros(2, 1, dtype=torch.float64)), y, ref, divergence=key, shift=False)
        assert at_zero.loss.item() == pytest.approx(math.log(2), rel=1e-12)
