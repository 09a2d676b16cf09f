"""fl.verify_divergence: every entry of the registry is right on both backends, and what is wrong with a broken one is said."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import python

import fused_losses as fl
from fused_losses.cli import findings, formula_source
from fused_losses.cli.verify_divergence import verify_divergence
from fused_losses.core import divergences
from fused_losses.core.elementwise import difference, exp, sigmoid

pytestmark = pytest.mark.usefixtures("one_thread")
KEYS = (*divergences.names(), "js(beta=0.1)", "alpha_beta(a=1, b=1)")


@pytest.mark.parametrize("key", KEYS)
def test_the_registry_is_right(key, backend, device):
    report = verify_divergence(key, device=device, backends=[backend])
    assert report.ok and not report.findings, report
    assert str(report).splitlines() == [
        f"divergence {divergences.from_key(key).key}: nothing is wrong",
        f"  ran: formulas on {backend}, formulas in float64, token_stats on {backend}",
    ]


# The triangular discrimination sum (p - q)^2 / (p + q) (Vincze, Le Cam), right and wrong.
def define(lp, lq):
    none = lp.isneginf() & lq.isneginf()
    t = lp.masked_fill(none, 0) - lq.masked_fill(none, 0)
    return ((lp.exp() - lq.exp()) * (t / 2).tanh()).sum(-1)


def term(p, q, t, lp, lq):
    return difference(p, q, t) * (2.0 * sigmoid(t) - 1.0)


def grad_p(p, q, t, lp, lq):
    s = sigmoid(-t)
    return p * (1.0 - 4.0 * s * s)


def grad_q(p, q, t, lp, lq):
    s = sigmoid(t)
    return q * (1.0 - 4.0 * s * s)


RIGHT = divergences.Divergence(
    define,
    grad_p,
    grad_q,
    term=term,
    f=lambda u: (u - 1) ** 2 / (u + 1),
    f_prime=lambda u: 1 - 4 / (1 + u) ** 2,
    no_link="f'(0) = -3 is finite",
)


def naive_term(p, q, t, lp, lq):
    return (p - q) * (p - q) / (p + q)


def naive_grad_p(p, q, t, lp, lq):
    return p * (1.0 - 4.0 * (q / (p + q)) * (q / (p + q)))


def wrong_sign(p, q, t, lp, lq):
    return -p * (1.0 - 4.0 * sigmoid(-t) * sigmoid(-t))


def half(p, q, t, lp, lq):
    return 0.5 * q * (1.0 - 4.0 * sigmoid(t) * sigmoid(t))


def with_torch(p, q, t, lp, lq):
    return difference(p, q, t) * torch.tanh(0.5 * t)


def with_a_method(p, q, t, lp, lq):
    return (p - q) * (0.5 * t).clamp(-9, 9)


def through_a_helper(p, q, t, lp, lq):
    return helper(p) * q


def helper(p):
    return math.log(2.0) * p


def unbounded(p, q, t, lp, lq):
    return p * exp(t)


def constant(p, q, t, lp, lq):
    return 1.0 - 4.0 * sigmoid(t) * sigmoid(t)


def without_p(p, q, t, lp, lq):
    return -p * 4.0 * sigmoid(-t) * sigmoid(-t)


def negative_scaling(x, y):
    return exp(x), exp(y)


def closure(number):
    def formula(p, q, t, lp, lq):
        return p * number

    return formula


def nan_define(lp, lq):
    p, q = lp.exp(), lq.exp()
    return ((p - q).square() / (p + q)).sum(-1)


def underflowing_define(lp, lq):
    p, q = lp.exp(), lq.exp()
    total = p + q
    return ((p - q).square() / total.where(total > 0, 1)).sum(-1)


BROKEN = {
    "0/0 in the term": (
        {"term": naive_term},
        r"term: NaN at p = q = 0 \(tokens that are suppressed on both sides, and padding\), t = 0; do not divide by p, q or "
        r"p \+ q: write a ratio as a function of t \(p / \(p \+ q\) is sigmoid\(t\)\)",
    ),
    "0/0 in a gradient": ({"grad_p": naive_grad_p}, r"grad_p: NaN at p = q = 0 "),
    "a sign": (
        {"grad_p": wrong_sign},
        "grad_p: has the wrong sign: it is -1 times dD/dlog p by autograd of the definition, on random rows",
    ),
    "a factor": ({"grad_q": half}, "grad_q: is 0.5 times dD/dlog q by autograd of the definition: a factor is missing"),
    "sides exchanged": ({"grad_q": grad_p}, "grad_q: (is|differs)"),
    "a torch function": ({"term": with_torch}, r"term: uses torch.tanh, which Triton does not have; call only the"),
    "a method": ({"term": with_a_method}, r"term: uses .clamp, which Triton's numbers do not have"),
    "a helper": ({"grad_q": through_a_helper}, "grad_q: calls helper, which uses math.log, which Triton does not have"),
    "a lambda": ({"term": lambda p, q, t, lp, lq: p - q}, "term: is a lambda"),
    "a closure": ({"grad_p": closure(2.0)}, "grad_p: uses number of the function around it; pass numbers in `params`"),
    "infinite": ({"grad_p": unbounded}, "grad_p: (NaN|infinite) at"),
    "not 0": ({"grad_q": constant}, r"grad_q: not 0 at p = q = 0 .*; multiply by p or q"),
    "a multiple of p": ({"grad_p": without_p}, r"degree: sum_v \(grad_p \+ grad_q\) is .* lacks a multiple of p or q"),
    "the degree": ({"degree": 2.0}, "degree: sum_v .* is 1 D on random rows, but degree is 2"),
    "the definition": ({"define": nan_define}, "define: NaN on rows with p = q = 0 at some tokens; replace"),
    "the definition's slope": (
        {"define": underflowing_define},
        "define: its gradient by autograd is NaN where probabilities underflow .*; write ratios of p and q",
    ),
    "f": ({"f": lambda u: (u - 1) ** 2}, "f: sum_v q f"),
    "f'": ({"f_prime": lambda u: 1 + 4 / (1 + u) ** 2}, "f_prime: differs from the derivative of f"),
    "scaling": ({"scaling": negative_scaling}, "scaling: a grad_p"),
    "arguments": ({"params": (0.5,)}, "grad_p: expected the arguments p, q, t, lp, lq and 1 parameters, got 5 arguments"),
    "no value": ({"term": None}, "row, term: expected one of them, got neither"),
    "no reason": ({"no_link": ""}, "no_link: say why"),
    "parts": ({"parts": ("kl",)}, "parts: expected names of the registry, got kl"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_said(case):
    changes, words = BROKEN[case]
    report = fl.verify_divergence(replace(RIGHT, **changes), device="cpu", backends=["torch"])
    assert not report.ok
    with pytest.raises(AssertionError, match=words):
        raise AssertionError("\n".join(report.findings))


def test_triton_says_the_same(backend, device):
    """0/0 where Triton computes it; and what Triton would not compile is said before it tries."""
    report = verify_divergence(replace(RIGHT, term=naive_term, grad_q=with_torch), device=device, backends=[backend])
    assert any("term: NaN at p = q = 0" in x and x.endswith(f"[{backend}]") for x in report.findings), report
    assert any("grad_q: uses torch.tanh" in x for x in report.findings)


def row(reverse, forward, power):
    return reverse, forward


def link(h):
    return h, 2.0 + 0.0 * h


def test_closed_forms_and_links():
    d = divergences.get("reverse_kl")
    found = verify_divergence(replace(d, row=row, link=link, name=""), device="cpu", backends=["torch"]).findings
    assert any(x.startswith("row: its second number is not sum_v grad_p on random rows") for x in found)
    assert any(x.startswith("link: its second number is 2 times the derivative of `score`") for x in found)


def test_an_entry_need_not_be_registered(backend, device):
    before = divergences.names()
    report = verify_divergence(RIGHT, device=device, backends=[backend])
    assert report.ok, report
    assert divergences.names() == before
    with pytest.raises(ValueError, match=r"expected one made by fl.divergences.get\(\)"):
        divergences.from_key(RIGHT)
    with divergences.registered(divergences.get("js")) as d:
        assert d is divergences.get("js")


def test_reports():
    report = findings.Report("divergence x", ran=["a", "b"], left_out=["c"])
    report.add("grad_p: NaN", "torch")
    report.add("grad_p: NaN", "triton")
    report.add_first("f", "one")
    report.add_first("f", "two")
    lines = ["divergence x: 2 findings", "  - grad_p: NaN [torch, triton]", "  - f: one", "  ran: a, b", "  not run: c"]
    assert str(report).splitlines() == lines and not report.ok


def test_what_formulas_call():
    for name in divergences.names():
        d = divergences.get(name)
        for formula in (d.grad_p, d.grad_q, d.term, d.row, d.link, d.scaling):
            assert formula is None or not list(formula_source.outside_of_elementwise(formula)), formula
    assert list(formula_source.outside_of_elementwise(torch.exp)) == [
        "is a builtin_function_or_method; write it as a plain function (def) at the top of the file"
    ]


def test_it_is_imported_with_the_first_use():
    code = "import sys, fused_losses as fl; print('fused_losses.cli' in sys.modules, callable(fl.verify_divergence))"
    assert python("-c", code, check=True).stdout.split() == ["False", "True"]
    with pytest.raises(AttributeError, match="no attribute 'verify_nothing'"):
        fl.verify_nothing  # noqa: B018
