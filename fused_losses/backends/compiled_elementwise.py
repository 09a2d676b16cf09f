"""Elementwise functions for loops that Inductor makes, and bind(), which gives them to a formula.

They compute what core/elementwise.py computes. Inductor calls the C library's log1p for one number after the other, and expm1
costs three times an exponential; what is here stays in vector registers.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

from torch import Tensor, log, where

from ..core import elementwise
from ..core.elementwise import INF, absolute
from .block import exp_


def finite_exp(x: Tensor) -> Tensor:
    """Compute e^x, and 0 where it would be infinite."""
    e = exp_(x)
    return where(e == INF, 0.0, e)


def _expm1_near(t: Tensor) -> Tensor:
    """Compute expm1(t) for |t| <= 1/4 by Taylor's series, with a relative error below 2^-24."""
    u = 1 / 120 + t * (1 / 720)
    u = 1 / 24 + t * u
    u = 1 / 6 + t * u
    u = 0.5 + t * u
    return t + t * t * u


def expm1(t: Tensor) -> Tensor:
    """Compute e^t - 1 without cancellation near 0."""
    return where(absolute(t) < 0.25, _expm1_near(t), exp_(t) - 1.0)


def log1p(x: Tensor) -> Tensor:
    """Compute log(1 + x) for x > -1 with a relative error of a few roundings.

    The rounding error of u = 1 + x cancels in log(u) / (u - 1), which changes little with u.
    """
    u = 1.0 + x
    return where(u == 1.0, x, log(u) * (x / where(u == 1.0, 1.0, u - 1.0)))


def difference(p: Tensor, q: Tensor, t: Tensor) -> Tensor:
    """Compute p - q from t = log p - log q, exact to rounding near p = q."""
    return where(absolute(t) < 0.25, q * _expm1_near(t), p - q)


def drop(t: Tensor) -> Tensor:
    """Compute e^(-|t|) - 1 without cancellation near 0."""
    return expm1(-absolute(t))


def even_mix(t: Tensor) -> Tensor:
    """Compute log(m / max(p, q)) of m = (p + q) / 2."""
    return log1p(0.5 * drop(t))


def mixed_excess(t: Tensor, w: float) -> Tensor:
    """Compute (p - q) / m of the mixture of logmix()."""
    x = drop(t)
    y = x / (1.0 + x * where(t > 0, 1.0 - w, w))
    return where(t > 0, -y, y)


def logmix(t: Tensor, w: float) -> tuple[Tensor, Tensor]:
    """Compute log(m/q) and log(m/p) of the mixture m = w p + (1 - w) q, for 0 < w < 1."""
    common = log1p(drop(t) * where(t > 0, 1.0 - w, w))
    return common + t.clamp(min=0), common - t.clamp(max=0)


# exp_ is a power of 2: Inductor would write exp() to memory where it is used twice
EVERY = {"exp": exp_, "finite_exp": finite_exp}
FLOAT32 = EVERY | {f.__name__: f for f in (expm1, log1p, difference, drop, even_mix, logmix, mixed_excess)}


@functools.cache
def bind(formula: Callable, double: bool) -> Callable:
    """Return a formula that calls the functions of this module in place of those with the same name.

    double: the formula computes in float64, for which polynomials of this module have too few terms.
    """
    if not isinstance(formula, types.FunctionType):
        return formula
    own, names = EVERY if double else FLOAT32, dict(formula.__globals__)
    names.pop("__name__", None)  # by which torch.compile would look up names in the module of the formula, not here
    for name in formula.__code__.co_names:
        value = names.get(name)
        if name in own and value is getattr(elementwise, name):
            names[name] = own[name]
        elif isinstance(value, types.FunctionType) and value.__module__ != elementwise.__name__:
            names[name] = bind(value, double)
    return types.FunctionType(formula.__code__, names, formula.__name__, formula.__defaults__, formula.__closure__)
