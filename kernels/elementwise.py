"""Triton versions of the functions of core/elementwise.py, and jit(), which compiles a formula that calls them."""

import functools
import types

import triton
import triton.language as tl

from ..core import elementwise

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HUGE = tl.constexpr(elementwise.HUGE)
LARGEST = tl.constexpr(elementwise.LARGEST)
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def in_bits(x, shift):
    """Compute x log2(e) - shift with one rounding; the fma of the interpreter would round twice."""
    if INTERPRET:
        return (x.to(tl.float64) * LOG2E - shift.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(x, LOG2E, -shift)


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def log(x):
    return tl.log(x)


@triton.jit
def absolute(x):
    return tl.abs(x)


@triton.jit
def maximum(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def where(c, x, y):
    return tl.where(c, x, y)


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x * 0.0))


@triton.jit
def sigmoid(x):
    e = exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p(exp(-tl.abs(x)))


@triton.jit
def cap(x):
    return tl.minimum(x, LARGEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def finite_exp(x):
    return tl.where(x > 88.0, 0.0, exp(x))


@triton.jit
def _expm1_near(t):  # Taylor: relative error below 2^-24 for |t| <= 1/4
    u = 1 / 120 + t * (1 / 720)
    u = 1 / 24 + t * u
    u = 1 / 6 + t * u
    u = 0.5 + t * u
    return t + t * t * u


@triton.jit
def expm1(t):
    return tl.where(tl.abs(t) < 0.25, _expm1_near(t), exp(t) - 1.0)


@triton.jit
def drop(t):
    """Compute e^(-|t|) - 1 with a relative error of a few roundings.

    Where |t| < 1/4 the terms from the square on are a fit with a relative error of 3e-9.
    """
    s = tl.abs(t)
    u = 0.0415001295 + s * -0.00753016752
    u = -0.166652894 + s * u
    u = 0.499999643 + s * u
    return tl.where(s < 0.25, s * s * u - s, exp(-s) - 1.0)


@triton.jit
def log1p(x):
    """Compute log(1 + x) for -1 < x <= 1 with a relative error of at most 1e-7.

    1 + x = 2^e (1 + f) with f in [sqrt(1/2) - 1, sqrt(2) - 1]. Where 1 + x needs no scaling (e = 0), f is x itself, so no digit
    of x is lost. The terms from the cubic on are a fit with a relative error of 3e-8.
    """
    bits = (1.0 + x).to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) & -0x800000  # shifted to the place of an exponent
    scale = (0x3F800000 - e).to(tl.float32, bitcast=True)
    f = x * scale + (scale - 1.0)  # 2^-e (1 + x) - 1
    u = -0.14267479 + f * 0.0870027467
    u = 0.149148147 + f * u
    u = -0.16577586 + f * u
    u = 0.199630599 + f * u
    u = -0.25001337 + f * u
    u = 0.333339108 + f * u
    return f + f * f * (f * u - 0.5) + e.to(tl.float32) * 8.262958294867817e-08  # log(2) / 2^23


@triton.jit
def difference(p, q, t):
    return tl.where(tl.abs(t) < 0.25, q * _expm1_near(t), p - q)


@triton.jit
def _of_smaller(t, w):
    return tl.where(t > 0, 1.0 - w, w)


@triton.jit
def logmix(t, w):
    common = log1p(drop(t) * _of_smaller(t, w))
    far = common + tl.abs(t)
    return tl.where(t > 0, far, common), tl.where(t > 0, common, far)


@triton.jit
def even_mix(t):
    # log1p() for arguments between -1/2 and 0, which need no scaling; the fit has a relative error of 3e-8
    x = 0.5 * drop(t)
    u = 1.40263514 + x * 1.29991726
    u = 1.0086195 + x * u
    u = 0.0923637272 + x * u
    u = 0.241783473 + x * u
    u = -0.24665039 + x * u
    u = 0.333434102 + x * u
    return x + x * x * (x * u - 0.5)


@triton.jit
def mixed_excess(t, w):
    x = drop(t)
    root = tl.rsqrt(1.0 + x * _of_smaller(t, w))  # a quotient takes more instructions
    y = x * (root * root)
    return tl.where(t > 0, -y, y)


@triton.jit
def bounded(t):
    return tl.where(tl.abs(t) > HUGE, 0.0, t)


@triton.jit
def tanh(x):
    e = expm1(2.0 * tl.minimum(tl.abs(x), 20.0, propagate_nan=tl.PropagateNan.ALL))
    y = e / (e + 2.0)
    return tl.where(x < 0, -y, y)


LN2_HI = tl.constexpr(0.693359375)  # LN2_HI k is exact for integers |k| < 2^15
LN2_LO = tl.constexpr(-2.12194440e-4)


@triton.jit
def rescale(x):
    return tl.exp2(x)


@triton.jit
def nats(x):
    return x * LN2


@triton.jit
def frame(c, mp, mq):
    apart = mp - mq  # whole bits
    return (c - apart * LN2_HI) - apart * LN2_LO


@functools.cache
def jit(formula):
    """Compile a formula for Triton.

    The source is the same. Functions that it calls are replaced by those of this module with the same name (others are
    compiled too), NamedTuples stay what they are, and its global constants become constexpr.
    """
    names = {"__builtins__": __builtins__, "__name__": formula.__module__, "tl": tl}  # the interpreter looks for tl
    for name in formula.__code__.co_names:
        if name in globals():
            names[name] = globals()[name]
        elif name not in formula.__globals__:  # a field of a NamedTuple
            continue
        elif isinstance(value := formula.__globals__[name], types.FunctionType):
            names[name] = jit(value)
        else:
            names[name] = value if isinstance(value, type) else tl.constexpr(value)
    return triton.jit(types.FunctionType(formula.__code__, names, formula.__name__, formula.__defaults__))
