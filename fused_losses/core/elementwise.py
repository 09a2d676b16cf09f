"""The words that formulas are written in: each is a torch function here and a Triton device function in kernels/elementwise.py.

A formula (a divergence's gradient, a link, a pair term, the closing arithmetic of a row) is written once, as a plain
function of these words and of + - * /. The torch backend calls it as it stands; the Triton backend compiles the same
source with the words bound to kernels/elementwise.py. So the two backends cannot drift apart, and a formula has one home.

Shifts of running sums are in nats here and whole bits in Triton: rescale(), nats() and frame() hide which.

Logits below FLOOR (and -inf) are raised to it before anything else happens. exp() still maps them to exactly 0, but no
inf - inf and no 0 * inf can arise: p * t is 0 where p is 0. A sum that a suppressed token does reach is then beyond
HUGE and is reported as inf.
"""

from __future__ import annotations

import torch
from torch import Tensor, exp, expm1, log1p, maximum
from torch import abs as absolute
from torch import log as log

FLOOR = -1e37
HUGE = 1e20
INF = float("inf")

__all__ = [
    "FLOOR", "HUGE", "INF", "absolute", "bounded", "cap", "difference", "exp", "expm1", "finite_exp", "frame", "log",
    "log1p", "logmix", "maximum", "nats", "rescale", "sigmoid", "sign", "softplus", "where",
]  # fmt: skip

sigmoid, sign, where = torch.sigmoid, torch.sign, torch.where


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), exact to rounding everywhere (torch's own cuts off at x = 20)."""
    return torch.logaddexp(x, torch.zeros_like(x))


def cap(x: Tensor) -> Tensor:
    """min(x, 80), for links that grow exponentially: they stay finite in fp32 (the cap that TRL uses)."""
    return x.clamp(max=80.0)


def finite_exp(x: Tensor) -> Tensor:
    """exp(x), and 0 where that would be infinite: as bounded(), for a slope that is an exponential."""
    e = exp(x)
    return e.masked_fill_(e == INF, 0.0)


def difference(p: Tensor, q: Tensor, t: Tensor) -> Tensor:
    """p - q from t = log p - log q: exact to rounding even where p and q agree in every digit but the last."""
    return expm1(absolute(t).neg_()).mul_(maximum(p, q)).mul_(sign(t)).neg_()


def logmix(t: Tensor, w: float) -> tuple[Tensor, Tensor]:
    """log(m/q) and log(m/p) of the mixture m = w p + (1 - w) q, 0 < w < 1: no overflow, and no loss near t = 0."""
    inner = expm1(absolute(t).neg_())
    weight = sign(t).mul_(0.5 - w).add_(0.5)  # 1 - w where t > 0, w where t < 0; irrelevant at 0
    common = inner.mul_(weight).log1p_()
    return common + t.clamp(min=0), common.sub_(t.clamp(max=0))


def bounded(t: Tensor) -> Tensor:
    """t, and 0 where one side is suppressed: the slope of an infinite value is left out of the gradient."""
    return t * (absolute(t) < HUGE)


def rescale(x: Tensor) -> Tensor:
    """The factor that a move of a shift by x <= 0 means."""
    return exp(x)


def nats(x: Tensor) -> Tensor:
    """A shift in nats."""
    return x


def frame(c: Tensor, mp: Tensor, mq: Tensor) -> Tensor:
    """c - (mp - mq) in nats, without the rounding of mp - mq."""
    apart = mp - mq
    back = apart - mp
    lost = (mp - (apart - back)) - (mq + back)
    return (c - apart) - lost
