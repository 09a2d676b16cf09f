"""Device functions for a row of logits: its layout, one step of it, running sums, normalised probabilities, slopes.

The mathematics of sweep() and of its accuracy near p = q is in core/moments.py. Accumulation is in fp32, in base 2.
"""

import triton
import triton.language as tl

from ..core import elementwise
from .elementwise import LN2, LOG2E, in_bits, tanh

FLOOR = tl.constexpr(elementwise.FLOOR)  # suppressed logits are raised to this
LOW = tl.constexpr(
    -elementwise.HUGE
)  # a logit below this counts as suppressed; also the shift of a side that has only had such logits
INF = tl.constexpr(elementwise.INF)
TIED = tl.constexpr(40.0)  # bits: shifts() ties both sides if each shift is less than this above its maximum


@triton.jit
def head(x, side):
    """Compute softcap tanh(x / softcap) * multiplier, raised to at least FLOOR, and its derivative.

    side = (softcap or None, multiplier or None).
    """
    slope = 1.0
    x = x.to(tl.float32)
    if side[0] is not None:
        y = tanh(x / side[0])
        x = y * side[0]
        slope = 1.0 - y * y
    if side[1] is not None:
        x = x * side[1]
        slope = slope * side[1]
    return tl.maximum(x, FLOOR, propagate_nan=tl.PropagateNan.ALL), slope


@triton.jit
def pointers(X, v, stride):
    """Return the addresses of vocabulary entries v of a row; with stride 1 (None) offsets stay in 32 bits."""
    if stride is None:
        return X + v
    else:
        return X + v.to(tl.int64) * stride


@triton.jit
def tile(X, v, V, stride, side, MASKED: tl.constexpr):
    """Load one step of a row.

    Return the logits after the head, FLOOR for columns beyond V, and the slope of the head.
    """
    if MASKED:
        x, slope = head(tl.load(pointers(X, v, stride), mask=v < V, other=0.0), side)
        return tl.where(v < V, x, FLOOR), slope
    else:
        return head(tl.load(pointers(X, v, stride)), side)


@triton.jit
def pair(Z, z_stride, z_side, W, w_stride, w_side, v, V, MASKED: tl.constexpr):
    """Return z, w and the slopes of their heads for one step; without a reference, z takes the place of w."""
    z, slope_z = tile(Z, v, V, z_stride, z_side, MASKED)
    if W is not None:
        w, slope_w = tile(W, v, V, w_stride, w_side, MASKED)
        return z, w, slope_z, slope_w
    else:
        return z, z, slope_z, slope_z


@triton.jit
def row_offset(row, layout):
    """Return the int64 offset of a row in a tensor with two leading strides.

    layout = (inner size, outer stride, inner stride).
    """
    return (row // layout[0]) * layout[1] + (row % layout[0]) * layout[2]


@triton.jit
def shifts(zmax, wmax, c):
    """Return integer base-2 shifts of both sides that are at least their maxima.

    The shifts differ by round(c log2 e), so a/b = e^d up to a known constant. If a side's own maximum would be a factor of 2^40
    below its shift, the sides get independent shifts, so that neither exponentials nor their squares underflow.
    """
    p = tl.maximum(tl.ceil(zmax * LOG2E), LOW)
    q = tl.maximum(tl.ceil(wmax * LOG2E), LOW)
    k = tl.floor(c * LOG2E + 0.5)
    m = tl.maximum(q, p - k)
    tied = (m - q < TIED) & (m + k - p < TIED)
    return tl.where(tied, m + k, p), tl.where(tied, m, q)


@triton.jit
def sweep(
    z, w, state, c, powers,
    REF: tl.constexpr, MOMENTS: tl.constexpr, ENTROPY: tl.constexpr, COLLISION: tl.constexpr,
):  # fmt: skip
    """Add one step [UNROLL, LANES] to the sums of the row, which are stored per lane.

    The shifts change only when a maximum exceeds them by a factor of 4; few steps take this branch.
    """
    mp, mq, zmax, wmax, A, B, A1, B1, B2, E, S, R = state
    zmax = tl.maximum(zmax, tl.max(tl.max(z, 0), 0))
    grown = zmax * LOG2E - mp
    if REF:
        wmax = tl.maximum(wmax, tl.max(tl.max(w, 0), 0))
        grown = tl.maximum(grown, wmax * LOG2E - mq)
    if grown > 2.0:
        p, q = shifts(zmax, wmax, c)
        x = mp - p
        y = mq - q
        scale_p = tl.exp2(x)
        scale_q = tl.exp2(y)
        E = (E + A * x) * scale_p
        if COLLISION:
            S = S * (scale_p * scale_p)
        A, A1 = A * scale_p, A1 * scale_p
        B, B1, B2 = B * scale_q, B1 * scale_q, B2 * scale_q
        moved = ()
        for i in tl.static_range(len(powers)):
            moved = moved + ((R[i][0], R[i][1] + powers[i] * x + (1.0 - powers[i]) * y),)
        R = moved
        mp, mq = p, q
    x = in_bits(z, mp)
    a = tl.exp2(x)
    A += tl.sum(a, 0)
    if ENTROPY:
        E += tl.sum(a * x, 0)
    if COLLISION:
        S += tl.sum(a * a, 0)
    if REF:
        y = in_bits(w, mq)
        b = tl.exp2(y)
        B += tl.sum(b, 0)
        if MOMENTS:
            d = (z - w) - c
            A1 += tl.sum(a * d, 0)
            bd = b * d
            B1 += tl.sum(bd, 0)
            B2 += tl.sum(bd * d, 0)
        added = ()
        for i in tl.static_range(len(powers)):  # each has its own shift, because e has no other bound outside 0 < s < 1
            e = powers[i] * x + (1.0 - powers[i]) * y
            shift = tl.maximum(R[i][1], tl.ceil(tl.max(tl.max(e, 0), 0)))
            added = added + ((R[i][0] * tl.exp2(R[i][1] - shift) + tl.sum(tl.exp2(e - shift), 0), shift),)
        R = added
    return mp, mq, zmax, wmax, A, B, A1, B1, B2, E, S, R


@triton.jit
def normalised(z, w, row):
    """Return p, q, t = log p - log q, log p and log q of one step, from the saved numbers of the row."""
    mp, log_a, mq, log_b, c, k = row
    lp = in_bits(z, mp) - log_a
    lq = in_bits(w, mq) - log_b
    return tl.exp2(lp), tl.exp2(lq), (z - w - c) - k, lp * LN2, lq * LN2


@triton.jit
def terms(z, w, row, sums, numbers, TERMS: tl.constexpr, GRADS: tl.constexpr):
    """Add one step of the second sweep to sum_v c_v and sum_v h_v of every term divergence."""
    p, q, t, lp, lq = normalised(z, w, row)
    new = ()
    for i in tl.static_range(len(TERMS)):
        if TERMS[i] is not None:
            c, h = TERMS[i](p, q, t, lp, lq, *numbers[i]), GRADS[i](p, q, t, lp, lq, *numbers[i])
            new = new + ((sums[i][0] + tl.sum(c, 0), sums[i][1] + tl.sum(h, 0)),)
        else:
            new = new + (sums[i],)
    return new


@triton.jit
def token_label(Labels, layout, row, T, ignore_index, SHIFT: tl.constexpr):
    """Return the label of a row.

    With SHIFT it is the label of the next position, and ignore_index at the last position.
    """
    if SHIFT:
        last = row % T == T - 1
        label = tl.load(Labels + row_offset(tl.where(last, row, row + 1), layout)).to(tl.int64)
        return tl.where(last, ignore_index, label)
    else:
        return tl.load(Labels + row_offset(row, layout)).to(tl.int64)


@triton.jit
def finite(x):
    """Return x with 0 where it is infinite: the slope of an infinite value is left out of the gradient."""
    return tl.where(tl.abs(x) == INF, 0.0, x)


@triton.jit
def slopes(
    tiles, v, y, row, coefs, g_div, numbers,
    GRADS_P: tl.constexpr, GRADS_Q: tl.constexpr, REF: tl.constexpr, ENTROPY: tl.constexpr,
    WANT_P: tl.constexpr, WANT_Q: tl.constexpr,
):  # fmt: skip
    """Compute the gradients dz and dw of one step."""
    z, w, slope_z, slope_w = tiles
    g_logp, g_ref, g_entropy, coef_p, coef_q = coefs
    if REF:
        p, q, t, lp, lq = normalised(z, w, row)
    else:
        lp = in_bits(z, row[0]) - row[1]
        p = tl.exp2(lp)
        lp = lp * LN2
    dz = p
    dw = p
    if WANT_P:
        dz = p * coef_p
        if ENTROPY:
            dz -= p * lp * g_entropy
        for i in tl.static_range(len(GRADS_P)):
            dz += GRADS_P[i](p, q, t, lp, lq, *numbers[i]) * g_div[i]
        dz = (dz + tl.where(v == y, g_logp, 0.0)) * slope_z
    if WANT_Q:
        dw = q * coef_q
        for i in tl.static_range(len(GRADS_Q)):
            dw += GRADS_Q[i](p, q, t, lp, lq, *numbers[i]) * g_div[i]
        dw = (dw + tl.where(v == y, g_ref, 0.0)) * slope_w
    return dz, dw
