"""The elementwise functions that formulas call: torch functions here, Triton functions in kernels/elementwise.py.

A formula (the gradient of a divergence, a link, a pair term, the final arithmetic of a row) is written once, as a plain
function of these elementwise functions and of + - * /. The torch backend calls it directly. The Triton backend compiles
the same source with the functions of kernels/elementwise.py. So both backends always compute the same formula.

Shifts of running sums are in nats here and in whole bits in Triton. Formulas that call rescale(), nats() and frame() do not
depend on this unit.

Logits below FLOOR (and -inf) are raised to FLOOR before any other step. exp() still maps them to exactly 0, but inf - inf
and 0 * inf cannot occur: p * t is 0 where p is 0. If a suppressed token does contribute to a sum, the sum is larger than
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
# Formulas have the next two numbers as literals: torch.compile(dynamic=True) makes an input of a float that it reads from a
# module, and traces once more where a comparison needs its value.
LARGEST = 80.0  # bound of a log-ratio or an exponent: its exponential is finite in float32
FAR = 1e30  # stands for infinity where a product of it and 0, or a difference, has to be finite

__all__ = [
    "FAR", "FLOOR", "HUGE", "INF", "LARGEST", "absolute", "bounded", "cap", "difference", "drop", "even_mix", "exp", "expm1",
    "finite_exp", "frame", "log", "log1p", "logmix", "maximum", "mixed_excess", "nats", "rescale",
    "sigmoid", "sign", "softplus", "where",
]  # fmt: skip

sigmoid, sign, where = torch.sigmoid, torch.sign, torch.where


def softplus(x: Tensor) -> Tensor:
    """Compute log(1 + e^x), exact to rounding for every x.

    torch's own softplus switches to x above x = 20.
    """
    return torch.logaddexp(x, torch.zeros_like(x))


def cap(x: Tensor) -> Tensor:
    """Compute min(x, 80), so that links that grow exponentially stay finite in fp32; TRL uses the same bound."""
    return x.clamp(max=80.0)


def finite_exp(x: Tensor) -> Tensor:
    """Compute exp(x), and 0 where it would be infinite: as bounded(), for a slope that is an exponential."""
    e = exp(x)
    return e.masked_fill_(e == INF, 0.0)


def difference(p: Tensor, q: Tensor, t: Tensor) -> Tensor:
    """Compute p - q from t = log p - log q.

    The result is exact to rounding even where p and q differ only in the last digit.
    """
    return expm1(absolute(t).neg_()).mul_(maximum(p, q)).mul_(sign(t)).neg_()


def drop(t: Tensor) -> Tensor:
    """Compute e^(-|t|) - 1, exact to rounding for every t."""
    return expm1(absolute(t).neg_())


def logmix(t: Tensor, w: float) -> tuple[Tensor, Tensor]:
    """Compute log(m/q) and log(m/p) of the mixture m = w p + (1 - w) q, for 0 < w < 1.

    It does not overflow, and near t = 0 it loses no accuracy.
    """
    common = drop(t).mul_(_of_smaller(t, w)).log1p_()
    return common + t.clamp(min=0), common.sub_(t.clamp(max=0))


def even_mix(t: Tensor) -> Tensor:
    """Compute log(m / max(p, q)) of m = (p + q) / 2: the smaller result of logmix(t, 1/2)."""
    return drop(t).mul_(0.5).log1p_()


def _of_smaller(t: Tensor, w: float) -> Tensor:
    """Return the weight in m = w p + (1 - w) q of the smaller of p and q; it is irrelevant at t = 0."""
    return sign(t).mul_(0.5 - w).add_(0.5)


def mixed_excess(t: Tensor, w: float) -> Tensor:
    """Compute (p - q) / m of the mixture of logmix(), exact to rounding also near t = 0."""
    x = drop(t)
    return x.div_((x * _of_smaller(t, w)).add_(1.0)).mul_(sign(t)).neg_()


def bounded(t: Tensor) -> Tensor:
    """Return t, and 0 where one side is suppressed: the slope of an infinite value is left out of the gradient."""
    return t * (absolute(t) < HUGE)


def rescale(x: Tensor) -> Tensor:
    """Compute the factor by which a sum changes when its shift changes by x <= 0."""
    return exp(x)


def nats(x: Tensor) -> Tensor:
    """Convert a shift to nats: here it is in nats already."""
    return x


def frame(c: Tensor, mp: Tensor, mq: Tensor) -> Tensor:
    """Compute c - (mp - mq) in nats, without the rounding error of mp - mq."""
    apart = mp - mq
    back = apart - mp
    lost = (mp - (apart - back)) - (mq + back)
    return (c - apart) - lost


def transform_logits(
    x: Tensor, softcap: float | Tensor, multiplier: float | Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | float]:
    """Compute softcap tanh(x / softcap) * multiplier in a dtype, raised to at least FLOOR, and its derivative.

    softcap 0.0 means no softcap. Both may be tensors of one element, multiplier also one of each row [rows, 1].
    """
    x = x.to(dtype)
    slope: Tensor | float = multiplier
    if isinstance(softcap, Tensor) or softcap:
        y = (x / softcap).tanh_()
        slope = (1 - y * y).mul_(multiplier)
        x = y.mul_(softcap)
    if isinstance(multiplier, Tensor) or multiplier != 1.0:
        x = x * multiplier
    return x.clamp(min=FLOOR), slope
