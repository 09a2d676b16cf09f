"""The divergence registry: every divergence D(policy, reference) over the vocabulary has one entry below.

Notation: p = policy, q = reference probability of one token, t = log p - log q, u = p / q.

    f-divergence      D = sum_v q f(p / q),  f convex, f(1) = 0
    gradients         dD/dz_v = h_v - p_v sum_u h_u,   h = dD/dlog p = p f'(u)            -> grad_p
                      dD/dr_v = k_v - q_v sum_u k_u,   k = dD/dlog q,  sum (h + k) = degree * D   -> grad_q
    value             either in closed form from one pass over the row                    -> row
                      or summed over terms >= 0 once the normalisers are known (two passes) -> term
    f-DPO link        s(h) = f'(e^h) of a sequence's log-ratio h, with ds/dh               -> link

To add a divergence, write grad_p, grad_q and either row or term as plain functions that call only the functions of
elementwise.py. Then write a factory with the textbook f, f' and definition. Both backends, the reference implementation,
`check` and the tests iterate over the registry. fl.verify_divergence says in words what is wrong with an entry. See
CONTRIBUTING.md.

The kernels call a formula on every column, also on those of suppressed tokens and of padding. So every formula must satisfy:
    - It is 0 at p = q = 0, where log p and log q are about -1e37 and t can have any size up to 1e37.
    - It does not divide by a number that can be 0: p, q, p + q. Write such ratios as functions of t: p / (p + q) is sigmoid(t).
    - It is finite for every finite t: compute exponentials with finite_exp, or cap their argument.
And near p = q the first order of a term cancels. p and q are rounded on their own, so it cancels best inside one factor: a
function of t, times max(p, q).
"""

from __future__ import annotations

import inspect
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor, log, logaddexp
from torch.compiler import is_dynamo_compiling

from .elementwise import (
    absolute,
    bounded,
    cap,
    difference,
    drop,
    even_mix,
    exp,
    expm1,
    finite_exp,
    logmix,
    maximum,
    mixed_excess,
    sigmoid,
    sign,
    where,
)
from .inputs import kind_of
from .names import unknown

Formula = Callable[..., Tensor]


@dataclass(frozen=True)
class Divergence:
    """One divergence with its parameters bound; formulas take (p, q, t, log p, log q, *params) unless noted."""

    define: Callable[[Tensor, Tensor], Tensor]  # textbook value from log p, log q [..., V] -> [...]
    grad_p: Formula  # h = dD/dlog p
    grad_q: Formula  # k = dD/dlog q
    row: Callable | None = None  # (KL(p||q), KL(q||p), log sum p^s q^(1-s), *params) -> D, sum_v h
    term: Formula | None = None  # c_v >= 0 (up to rounding) with D = sum_v c_v
    power: float | None = None  # the s that `row` needs
    params: tuple[float, ...] = ()
    scaling: Callable | None = (
        None  # (x, y, *params) -> a, b:  grad_p(e^x p, e^y q) = a grad_p(p, q) + b p, for x, y <= 0
    )
    parts: tuple[str, ...] = ()  # names of the divergences that it is the sum of
    degree: float = 1.0  # D(x p, x q) = x^degree D(p, q); 1 for every f-divergence
    f: Callable[[Tensor], Tensor] | None = None
    f_prime: Callable[[Tensor], Tensor] | None = None
    link: Callable | None = None  # (h, *params) -> s(h), ds/dh
    score: Callable[[Tensor], Tensor] | None = None  # the same s(h) as a textbook formula
    no_link: str = ""  # why f-DPO does not allow it
    name: str = ""
    key: str = ""  # name, or name(a=0.3) where a parameter is not the default; from_key() parses it

    def __str__(self) -> str:
        return self.key

    def __reduce__(self):
        return from_key, (self.key,)

    def f_dpo_link(self) -> Callable:
        """Return the link s(h) of f-DPO (Wang et al. 2024, 2309.16240).

        Raise a ValueError with the reason if this divergence has no link.
        """
        if self.link is None:
            raise ValueError(
                f"divergence: {self.key!r} cannot be used as an f-DPO link: {self.no_link}. "
                f"f-DPO needs f' invertible with 0 outside its domain; allowed: {', '.join(linkable())}"
            )
        return self.link


# ---- formulas ------------------------------------------------------------------------------------------------------


def _reverse_grad_p(p, q, t, lp, lq):
    return p * bounded(t)


def _reverse_grad_q(p, q, t, lp, lq):
    return -difference(p, q, t)


def _reverse_row(reverse, forward, power):
    return reverse, reverse


def _reverse_link(h):
    return h, 1.0 + 0.0 * sigmoid(h)  # 1, of h's shape, also where h is infinite


def _forward_grad_p(p, q, t, lp, lq):
    return difference(p, q, t)


def _forward_grad_q(p, q, t, lp, lq):
    return -q * bounded(t)


def _forward_row(reverse, forward, power):
    return forward, 0.0 * power


def _forward_scaling(x, y):
    return exp(y), difference(exp(x), exp(y), x - y)


def _forward_link(h):
    e = exp(cap(-h))
    return -e, where(h > -80.0, e, 0.0)


def _jeffreys_grad_p(p, q, t, lp, lq):
    return p * bounded(t) + difference(p, q, t)


def _jeffreys_grad_q(p, q, t, lp, lq):
    return -q * bounded(t) - difference(p, q, t)


def _jeffreys_row(reverse, forward, power):
    return reverse + forward, reverse


def _jeffreys_link(h):
    e = exp(cap(-h))
    return h + 1.0 - e, 1.0 + where(h > -80.0, e, 0.0)


# The power family: weight * sum (q u^s - p s + (s - 1) q) / (s (s - 1)) = weight * (sum p^s q^(1-s) - 1) / (s (s - 1)).
# r = p^s q^(1-s) is taken relative to p (or q), so that r - p stays exact near p = q.


def _power_grad_p(p, q, t, lp, lq, s, weight):
    return difference(finite_exp(lp + (s - 1.0) * t), p, (s - 1.0) * t) * (weight / (s - 1.0))


def _power_grad_q(p, q, t, lp, lq, s, weight):
    return difference(finite_exp(lq + s * t), q, s * t) * (-weight / s)


def _power_row(reverse, forward, power, s, weight):
    gain = expm1(power) * (weight / (s - 1.0))
    return gain / s, gain


def _power_scaling(x, y, s, weight):
    r = s * x + (1.0 - s) * y
    return exp(r), difference(exp(r), exp(x), r - x) * (weight / (s - 1.0))


def _power_link(h, s, weight):
    x = cap((s - 1.0) * h)
    return expm1(x) * (weight / (s - 1.0)), where(x < 80.0, weight * exp(x), 0.0)


def _js_term(p, q, t, lp, lq, beta):
    to_q, to_p = logmix(t, 1.0 - beta)  # log(m/q), log(m/p), m = beta q + (1 - beta) p
    return -beta * q * to_q - (1.0 - beta) * p * to_p


def _js_grad_p(p, q, t, lp, lq, beta):
    to_q, to_p = logmix(t, 1.0 - beta)
    return -((1.0 - beta) * p * to_p)


def _js_grad_q(p, q, t, lp, lq, beta):
    to_q, to_p = logmix(t, 1.0 - beta)
    return -beta * q * to_q


def _js_even_term(p, q, t, lp, lq, beta):
    near = even_mix(t)  # log(m / max(p, q))
    return -0.5 * (maximum(p, q) * (near + (1.0 + drop(t)) * (near + absolute(t))))


def _js_even_grad_p(p, q, t, lp, lq, beta):
    near = even_mix(t)
    return -0.5 * (p * where(t > 0.0, near, near + absolute(t)))


def _js_even_grad_q(p, q, t, lp, lq, beta):
    near = even_mix(t)
    return -0.5 * (q * where(t > 0.0, near + absolute(t), near))


def _js_link(h, beta):
    to_q, to_p = logmix(h, 1.0 - beta)
    return -to_p, 1.0 / (1.0 + (1.0 - beta) / beta * exp(h))


def _tv_term(p, q, t, lp, lq):
    return 0.5 * absolute(difference(p, q, t))


def _tv_grad_p(p, q, t, lp, lq):
    return 0.5 * p * sign(t)


def _tv_grad_q(p, q, t, lp, lq):
    return -0.5 * q * sign(t)


def _skew_forward_term(p, q, t, lp, lq, lam):
    to_q, to_p = logmix(t, 1.0 - lam)  # m = lam q + (1 - lam) p
    x = drop(t)  # p - q = -x p where t > 0, else x q
    return maximum(p, q) * where(t > 0.0, (lam - 1.0) * x - (1.0 + x) * to_q, (1.0 - lam) * x - to_q)


def _skew_forward_grad_p(p, q, t, lp, lq, lam):
    return (1.0 - lam) * (1.0 - lam) * p * mixed_excess(t, 1.0 - lam)


def _skew_forward_grad_q(p, q, t, lp, lq, lam):
    to_q, to_p = logmix(t, 1.0 - lam)
    return -q * (to_q - lam * (1.0 - lam) * mixed_excess(t, 1.0 - lam))


def _skew_reverse_term(p, q, t, lp, lq, lam):
    to_q, to_p = logmix(t, lam)  # m = (1 - lam) q + lam p
    x = drop(t)
    return maximum(p, q) * where(t > 0.0, (1.0 - lam) * x - to_p, (lam - 1.0) * x - (1.0 + x) * to_p)


def _skew_reverse_grad_p(p, q, t, lp, lq, lam):
    to_q, to_p = logmix(t, lam)
    return -p * (to_p + lam * (1.0 - lam) * mixed_excess(t, lam))


def _skew_reverse_grad_q(p, q, t, lp, lq, lam):
    return -(1.0 - lam) * (1.0 - lam) * q * mixed_excess(t, lam)


def _skew_reverse_link(h, lam):
    to_q, to_p = logmix(h, lam)
    g = 1.0 / (1.0 + lam / (1.0 - lam) * exp(h))
    return -to_p - lam * expm1(-to_p), g * g


# With x_c = e^(-c |t|) - 1 and x_(a + b) = x_a + x_b + x_a x_b, all is relative to max(p, q)^(a + b): nothing overflows, the
# first order cancels exactly, and value and slope share their exponentials.


def _alpha_beta_term(p, q, t, lp, lq, a, b):
    xa, xb = drop(a * t), drop(b * t)
    c = where(t > 0.0, a * (xb + xa * xb) - b * xa, b * (xa + xa * xb) - a * xb)
    return exp((a + b) * maximum(lp, lq)) * c * (1.0 / (a * b * (a + b)))


def _alpha_beta_grad_p(p, q, t, lp, lq, a, b):
    xa = drop(a * t)
    return exp((a + b) * maximum(lp, lq)) * where(t > 0.0, -xa, xa * exp(-absolute(b * t))) * (1.0 / a)


def _alpha_beta_grad_q(p, q, t, lp, lq, a, b):
    xb = drop(b * t)
    return exp((a + b) * maximum(lp, lq)) * where(t > 0.0, xb * exp(-absolute(a * t)), -xb) * (1.0 / b)


# ---- registry ------------------------------------------------------------------------------------------------------

_FACTORIES: dict[str, Callable[..., Divergence]] = {}
_DEFAULTS: dict[str, dict[str, float]] = {}  # of the parameters of those that have some


def _divergence(factory: Callable[..., Divergence]) -> Callable[..., Divergence]:
    _FACTORIES[factory.__name__] = factory
    _DEFAULTS[factory.__name__] = {k: v.default for k, v in inspect.signature(factory).parameters.items()}
    return factory


def _between(name: str, value: float, low: float, high: float, hint: str = "") -> None:
    if not low < value < high:
        raise ValueError(f"{name}: expected a number in ({low:g}, {high:g}), got {value!r}{hint}")


# Definitions take log-probs: a small probability can be 0 in float32 where its logarithm, and ratios, are not.


def _kl(a: Tensor, b: Tensor) -> Tensor:
    """Compute sum (p log p - p log q) from a = log p and b = log q."""
    p = a.exp()
    return (p * a.where(p > 0, 0) - p * b.where(p > 0, 0)).sum(-1)


def _mix(a: Tensor, b: Tensor, w: float) -> Tensor:
    """Compute log(w e^a + (1 - w) e^b)."""
    absent = (a == -math.inf) & (b == -math.inf)  # where logaddexp has no slope
    return logaddexp(a.masked_fill(absent, 0) + math.log(w), b + math.log1p(-w)).masked_fill(absent, -math.inf)


@_divergence
def reverse_kl() -> Divergence:
    """Return the reverse KL divergence, KL(policy || ref) = sum p log(p/q).

    f = u log u. DPO and KL-regularised RL use this divergence.
    """
    return Divergence(
        _kl,
        _reverse_grad_p,
        _reverse_grad_q,
        _reverse_row,
        f=lambda u: u * log(u),
        f_prime=lambda u: log(u) + 1,
        link=_reverse_link,
        score=lambda h: h,
    )


@_divergence
def forward_kl() -> Divergence:
    """Return the forward KL divergence, KL(ref || policy) = sum q log(q/p).

    f = -log u. It is the sequential KL of TDPO and the usual distillation loss.
    """
    return Divergence(
        lambda lp, lq: _kl(lq, lp),
        _forward_grad_p,
        _forward_grad_q,
        _forward_row,
        scaling=_forward_scaling,
        f=lambda u: -log(u),
        f_prime=lambda u: -1 / u,
        link=_forward_link,
        score=lambda h: -cap(-h).exp(),
    )


@_divergence
def jeffreys() -> Divergence:
    """Return the Jeffreys divergence, KL(policy || ref) + KL(ref || policy), with f = (u - 1) log u."""
    return Divergence(
        lambda lp, lq: _kl(lp, lq) + _kl(lq, lp),
        _jeffreys_grad_p,
        _jeffreys_grad_q,
        _jeffreys_row,
        f=lambda u: (u - 1) * log(u),
        f_prime=lambda u: log(u) + 1 - 1 / u,
        link=_jeffreys_link,
        score=lambda h: h - cap(-h).exp(),
        parts=("reverse_kl", "forward_kl"),
    )


@_divergence
def js(beta: float = 0.5) -> Divergence:
    """Return the generalised Jensen-Shannon divergence, beta KL(ref || m) + (1 - beta) KL(policy || m).

    m = beta ref + (1 - beta) policy, 0 < beta < 1 (the convention of TRL and GKD). f' is
    (1 - beta) log(u / (beta + (1 - beta) u)). The link omits the factor 1 - beta, which can be part of DPO's beta: at
    beta = 1/2 the link is f-DPO's log(2u / (1 + u)), and the JSD of f-DPO is twice this one. The divergence tends to 0 as
    beta tends to 0 or 1. TRL treats beta = 0 and 1 as special cases; they are forward_kl and reverse_kl here.
    """
    _between("js beta", beta, 0, 1, " (0 and 1 are forward_kl and reverse_kl in TRL: ask for those)")

    def define(lp: Tensor, lq: Tensor) -> Tensor:
        m = _mix(lq, lp, beta)
        return beta * _kl(lq, m) + (1 - beta) * _kl(lp, m)

    even = _js_even_grad_p, _js_even_grad_q, _js_even_term
    grad_p, grad_q, term = even if beta == 0.5 else (_js_grad_p, _js_grad_q, _js_term)
    return Divergence(
        define,
        grad_p,
        grad_q,
        term=term,
        params=(beta,),
        link=_js_link,
        f=lambda u: (1 - beta) * u * log(u) - (beta + (1 - beta) * u) * log(beta + (1 - beta) * u),
        f_prime=lambda u: (1 - beta) * log(u / (beta + (1 - beta) * u)),
        score=lambda h: -logaddexp(torch.full_like(h, math.log1p(-beta)), math.log(beta) - h),
    )


def _power(s: float, weight: float) -> Divergence:
    def define(lp: Tensor, lq: Tensor) -> Tensor:
        none = lp.isneginf() & lq.isneginf()
        ends = (s * lp + (1 - s) * lq).masked_fill(none, -math.inf)
        # log p^s q^(1-s), the same as ends but for rounding
        terms = torch.where(lp.isinf() | lq.isinf(), ends, lq + s * (lp - lq))
        return weight * expm1(terms.logsumexp(-1)) / (s * (s - 1))

    return Divergence(
        define,
        _power_grad_p,
        _power_grad_q,
        _power_row,
        power=s,
        params=(s, weight),
        scaling=_power_scaling if 0 < s < 1 else None,
        f=lambda u: weight * (u**s - s * u + s - 1) / (s * (s - 1)),
        f_prime=lambda u: weight * (u ** (s - 1) - 1) / (s - 1),
        link=_power_link if s < 1 else None,
        score=lambda h: weight * cap((s - 1) * h).exp() / (s - 1),
        no_link=f"f'(0) = {weight / (1 - s):g} is finite" if s > 1 else "",
    )


@_divergence
def alpha(a: float = 0.5) -> Divergence:
    """Return the alpha divergence, (1 - sum p^(1-a) q^a) / (a (1 - a)), for 0 < a < 1.

    This is f-DPO's convention, with f' = (1 - u^-a) / a. The limit a -> 0 is reverse_kl and a -> 1 is forward_kl. TRL's
    `f_alpha_divergence_coef` is 1 - a, so the two numbers are equal only at 0.5: TRL's 0 and 1 are forward_kl and
    reverse_kl. TRL up to version 0.28 used the same a as here.
    """
    _between("alpha a", a, 0, 1, " (the ends are reverse_kl and forward_kl)")
    return _power(1 - a, 1.0)


@_divergence
def pearson_chi2() -> Divergence:
    """Return the Pearson chi-squared divergence, sum p^2/q - 1, with f = (u - 1)^2."""
    return _power(2.0, 2.0)


@_divergence
def neyman_chi2() -> Divergence:
    """Return the Neyman chi-squared divergence, sum q^2/p - 1, with f = (u - 1)^2 / u and f' = 1 - 1/u^2."""
    return _power(-1.0, 2.0)


@_divergence
def squared_hellinger() -> Divergence:
    """Return the squared Hellinger distance, 1/2 sum (sqrt p - sqrt q)^2 = 1 - sum sqrt(p q).

    f = (sqrt u - 1)^2 / 2.
    """
    return replace(_power(0.5, 0.25), define=lambda lp, lq: 0.5 * (exp(lp / 2) - exp(lq / 2)).square().sum(-1))


@_divergence
def total_variation() -> Divergence:
    """Return the total variation distance, 1/2 sum |p - q|, with f = |u - 1| / 2."""
    return Divergence(
        lambda lp, lq: 0.5 * (exp(lp) - exp(lq)).abs().sum(-1),
        _tv_grad_p,
        _tv_grad_q,
        term=_tv_term,
        f=lambda u: 0.5 * (u - 1).abs(),
        f_prime=lambda u: 0.5 * (u - 1).sign(),
        no_link="f' takes only two values, so it is not invertible",
    )


@_divergence
def skew_forward_kl(lam: float = 0.1) -> Divergence:
    """Return the skew forward KL divergence, KL(ref || lam ref + (1 - lam) policy), for 0 < lam < 1.

    This is the SKL of DistiLLM, including the entropy of the teacher.
    """
    _between("skew_forward_kl lam", lam, 0, 1)
    return Divergence(
        lambda lp, lq: _kl(lq, _mix(lq, lp, lam)),
        _skew_forward_grad_p,
        _skew_forward_grad_q,
        term=_skew_forward_term,
        params=(lam,),
        f=lambda u: -log(lam + (1 - lam) * u),
        f_prime=lambda u: -(1 - lam) / (lam + (1 - lam) * u),
        no_link=f"f'(0) = {-(1 - lam) / lam:g} is finite",
    )


@_divergence
def skew_reverse_kl(lam: float = 0.1) -> Divergence:
    """Return the skew reverse KL divergence, KL(policy || (1 - lam) ref + lam policy), for 0 < lam < 1.

    This is the SRKL of DistiLLM.
    """
    _between("skew_reverse_kl lam", lam, 0, 1)
    odds = math.log(lam) - math.log1p(-lam)
    return Divergence(
        lambda lp, lq: _kl(lp, _mix(lp, lq, lam)),
        _skew_reverse_grad_p,
        _skew_reverse_grad_q,
        term=_skew_reverse_term,
        params=(lam,),
        link=_skew_reverse_link,
        f=lambda u: u * log(u / (1 - lam + lam * u)),
        f_prime=lambda u: log(u / (1 - lam + lam * u)) + (1 - lam) / (1 - lam + lam * u),
        score=lambda h: sigmoid(-h - odds) - logaddexp(torch.full_like(h, math.log(lam)), math.log1p(-lam) - h),
    )


@_divergence
def alpha_beta(a: float = 0.2, b: float = 0.7) -> Divergence:
    """Return the alpha-beta divergence, sum [a/(a+b) q^(a+b) + b/(a+b) p^(a+b) - q^a p^b] / (a b), for a, b > 0.

    The convention is that of ABKD: a is the exponent of the teacher (ref), b that of the policy. The limit
    (a, b) -> (1, 0) is forward_kl, (0, 1) is reverse_kl, and (1, 1) is 1/2 |p - q|^2. The value is a sum of terms over the
    vocabulary (two passes), because near p = q the three power sums cancel and only noise remains; the terms do not cancel.
    """
    _between("alpha_beta a", a, 0, float("inf"), " (the limit a = 0 at b = 1 is reverse_kl)")
    _between("alpha_beta b", b, 0, float("inf"), " (the limit b = 0 at a = 1 is forward_kl)")
    s = a + b
    return Divergence(
        lambda lp, lq: (a / s * exp(s * lq) + b / s * exp(s * lp) - exp(a * lq + b * lp)).sum(-1) / (a * b),
        _alpha_beta_grad_p,
        _alpha_beta_grad_q,
        term=_alpha_beta_term,
        params=(a, b),
        degree=s,
        no_link="it is not an f-divergence (unless a + b = 1, which is alpha)",
    )


def names() -> tuple[str, ...]:
    """Return the names of all registered divergences."""
    return tuple(_FACTORIES)


def linkable() -> tuple[str, ...]:
    """Return the names of the divergences that f-DPO allows, with their default parameters."""
    return tuple(n for n in _FACTORIES if get(n).link is not None)


def _bind(name: str, values: tuple[tuple[str, float], ...], default: bool) -> Divergence:
    key = name if default else f"{name}({', '.join(f'{k}={v!r}' for k, v in values)})"
    return replace(_FACTORIES[name](**dict(values)), name=name, key=key)


# One object for each key as long as anybody holds it, so that from_key recognises what get made.
_made: WeakValueDictionary[str, Divergence] = WeakValueDictionary()
_making = threading.Lock()


@lru_cache(maxsize=1024)
def _bound(name: str, values: tuple[tuple[str, float], ...], default: bool) -> Divergence:
    made = _bind(name, values, default)
    with _making:
        return _made.setdefault(made.key, made)


# of names that are used only once, because _bound would return the divergence that had the name before
_numbers = count()


def get(name: str, **params: float) -> Divergence:
    """Return the divergence of the given name with its parameters bound, e.g. get("alpha", a=0.3).

    An unknown name raises a ValueError, an unknown parameter a TypeError.
    """
    if name not in _FACTORIES:
        raise unknown("divergence", name, _FACTORIES)
    defaults = _DEFAULTS.get(name, {})
    if others := params.keys() - defaults.keys():
        raise TypeError(f"divergence {name!r}: unknown parameter {', '.join(others)}; it takes: {list(defaults)}")
    values = defaults | {k: float(v) for k, v in params.items()}
    # where torch.compile traces this line, it would ignore the cache and warn about it
    return (_bind if is_dynamo_compiling() else _bound)(name, tuple(values.items()), values == defaults)


def from_key(key: str | Divergence) -> Divergence:
    """Return the divergence that a string such as "js" or "js(beta=0.3)" names; return a Divergence unchanged."""
    if isinstance(key, Divergence):
        # where torch.compile traces this line, they are not unique
        if key.name not in _FACTORIES or not (is_dynamo_compiling() or from_key(key.key) is key):
            raise ValueError(
                f"divergence: expected one made by fl.divergences.get(), got {key.key or 'a Divergence of your own'}; use it "
                "inside `with fl.divergences.registered(divergence) as mine:`, or add a factory to core/divergences.py"
            )
        return key
    if not isinstance(key, str):
        raise TypeError(f"divergence: expected a name or a Divergence, got {kind_of(key, Divergence)}")
    if key in _FACTORIES:
        return get(key)
    match = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", key)
    if match is None:
        raise ValueError(f"divergence: expected a name such as 'js' or 'js(beta=0.3)', got {key!r}")
    name, arguments = match.groups()
    try:
        pairs = [part.split("=") for part in (arguments or "").split(",") if part.strip()]
        params = {k.strip(): float(v) for k, v in pairs}
    except ValueError:
        raise ValueError(f"divergence: expected parameters such as '(beta=0.3)', got {key!r}") from None
    return get(name, **params)


@contextmanager
def registered(divergence: Divergence) -> Iterator[Divergence]:
    """Make the library accept a divergence in the context; outside of it, only those of the registry are accepted.

    The value of the context is the divergence under a name of its own, or unchanged if it is in the registry.
    """
    if divergence.name in _FACTORIES and from_key(divergence.key) is divergence:
        yield divergence
        return
    name = f"unregistered_{next(_numbers)}"
    _FACTORIES[name] = lambda: divergence
    try:
        yield get(name)
    finally:
        del _FACTORIES[name]


def parse(divergence: str | Divergence | Sequence[str | Divergence] | None) -> tuple[Divergence, ...]:
    """Convert the argument of a caller (None, one or several) to a tuple of distinct divergences."""
    if divergence is None:
        return ()
    if isinstance(divergence, str | Divergence):
        divergence = (divergence,)
    if not isinstance(divergence, Sequence):  # the values of a dict would be ignored
        raise TypeError(
            f"divergence: expected a name, a Divergence or a sequence of them, got {kind_of(divergence, Divergence)}"
        )
    parsed = [from_key(d) for d in divergence]
    return tuple({d.key: d for d in parsed}.values())


Asked = str | Divergence | Sequence[str | Divergence] | None
