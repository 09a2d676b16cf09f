"""Device functions for a row of logits: its layout, one step of it, running sums, normalised probabilities, slopes.

The mathematics of sweep() and of its accuracy near p = q is in core/moments.py. Accumulation is in fp32, in base 2.
Shapes: a step of a sweep is [UNROLL, LANES], a step of a backward [BLOCK], a tile [BLOCK_T, BLOCK_V].
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..core import elementwise
from ..core.layout import SAVED_FIELDS as _SAVED_FIELDS
from ..core.layout import SavedRow
from .elementwise import LN2, LOG2E, in_bits, tanh

FLOOR = tl.constexpr(elementwise.FLOOR)  # suppressed logits are raised to this
# A logit below this counts as suppressed. It is also the shift of a side that has only had such logits.
LOW = tl.constexpr(-elementwise.HUGE)
INF = tl.constexpr(elementwise.INF)
TIED = tl.constexpr(40.0)  # bits: shifts() ties both sides if each shift is less than this above its maximum
PEELED = tl.constexpr(16)  # elements: where rows are not aligned, a sweep begins at a multiple of it
SAVED_FIELDS = tl.constexpr(_SAVED_FIELDS)
SAVED_AT = tl.constexpr(SavedRow(*range(_SAVED_FIELDS)))  # the row of each field


class Starts(NamedTuple):
    """Where the sweep over a row of both sides begins: at column `head`, from which on addresses are aligned.

    Position v of the sweep is column v + head, and column v + head - V where that is beyond the row. (A field of Logits cannot
    be replaced, for on Triton 3.6 no tuple with None is built.)
    """

    policy: Any
    ref: Any
    head: Any
    factor_p: Any  # that of the row, where the logits have factors
    factor_q: Any


class Step(NamedTuple):
    """One step of both sides: logits after softcap and multiplier, and the slopes of these functions."""

    policy: Any
    ref: Any
    slope_p: Any
    slope_q: Any


class LaneSums(NamedTuple):
    """The running sums of a row: shifts and maxima are numbers, the sums have one of each lane [LANES]."""

    shift_p: Any
    shift_q: Any
    max_p: Any
    max_q: Any
    sum_p: Any
    sum_q: Any
    sum_pd: Any
    sum_qd: Any
    sum_qdd: Any
    sum_p_log: Any
    sum_pp: Any
    powers: Any  # a LanePower of each power


class LanePower(NamedTuple):
    total: Any  # [LANES]
    shift: Any


class TermSums(NamedTuple):
    """The sums sum_v c and sum_v h of a term divergence."""

    value: Any
    slope: Any


class Coefs(NamedTuple):
    """The factors of a row's gradients: dz = p (policy - entropy log p) + label_p 1[v = y] + sum_i divergence_i h_i."""

    label_p: Any
    label_q: Any
    entropy: Any
    policy: Any
    ref: Any
    divergence: Any  # one of each divergence


@triton.jit
def transform_logits(x, softcap, multiplier, RAISED: tl.constexpr = True):
    """Compute softcap tanh(x / softcap) * multiplier, RAISED to at least FLOOR, and its derivative."""
    slope = 1.0
    x = x.to(tl.float32)
    if softcap is not None:
        y = tanh(x / softcap)
        x = y * softcap
        slope = 1.0 - y * y
    if multiplier is not None:
        x = x * multiplier
        slope = slope * multiplier
    if RAISED:
        x = tl.maximum(x, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    return x, slope


@triton.jit
def number(x):
    """Return n of arguments.odd(n)."""
    return (x >> 1) - 1


@triton.jit
def row_start(logits, row):
    """Return the address of a row of Logits."""
    layout = logits.layout
    if layout.size is None:
        offset = row * number(layout.stride)
    else:
        size = number(layout.size)
        offset = (row // size) * number(layout.stride) + (row % size) * number(layout.inner_stride)
    if layout.aligned is not None:
        offset = offset * (128 // logits.pointer.dtype.element_ty.primitive_bitwidth)
    return logits.pointer + offset


@triton.jit
def row_head(policy, row):
    """Return the number of columns before the first aligned one of a row; 0 where rows are aligned, or never are together."""
    if policy.layout.peeled is not None:
        elements = row_start(policy, row).to(tl.int64) // (policy.pointer.dtype.element_ty.primitive_bitwidth // 8)
        return (-elements & (PEELED - 1)).to(tl.int32)
    else:
        return 0


@triton.jit
def sweep_start(logits, row, head):
    """Return the address of column `head` of a row."""
    if logits.stride is None:
        start = row_start(logits, row) + head
    else:
        start = row_start(logits, row) + tl.cast(head, tl.int64) * number(logits.stride)
    return start if logits.layout.peeled is None else tl.multiple_of(start, 16)


@triton.jit
def row_starts(policy, ref, row):
    """Return where the sweep over a row begins; without a reference, the policy takes its place."""
    head = row_head(policy, row)
    start = sweep_start(policy, row, head)
    factor = row_factor(policy, row)
    if ref.pointer is not None:
        return Starts(start, sweep_start(ref, row, head), head, factor, row_factor(ref, row))
    else:
        return Starts(start, start, head, factor, factor)


@triton.jit
def row_factor(logits, row):
    """Return the multiplier of a row where the logits have factors, else a number that nobody reads."""
    if logits.factors is not None:
        return tl.load(logits.factors + row).to(tl.float32) * logits.multiplier
    else:
        return 1.0


@triton.jit
def transformed(x, factor, logits, RAISED: tl.constexpr = True):
    """Compute transform_logits() with the options of a side, and the factor of the row."""
    if logits.factors is None:
        return transform_logits(x, logits.softcap, logits.multiplier, RAISED)
    else:
        return transform_logits(x, logits.softcap, factor, RAISED)


@triton.jit
def wrapped(v, V, head, policy):
    """Return positions v < V of a sweep as columns, counted from column `head`."""
    return v if policy.layout.peeled is None else tl.where(v < V - head, v, v - V)


@triton.jit
def pointers(start, logits, v):
    """Return the addresses of vocabulary entries v of a row; with stride 1 (None) offsets stay in 32 bits."""
    if logits.stride is None:
        return start + v
    else:
        return start + v.to(tl.int64) * number(logits.stride)


@triton.jit
def entry(start, factor, logits, v):
    """Load one entry of a row, after softcap and multiplier; v: its column, counted from column `head`."""
    return transformed(tl.load(pointers(start, logits, v)), factor, logits)[0]


@triton.jit
def load_side(start, factor, logits, v, inside, MASKED: tl.constexpr, RAISED: tl.constexpr):
    """Load one step of a row.

    Return the logits after softcap and multiplier, FLOOR for entries that are not inside the row, and the slope.
    """
    if MASKED:
        x = tl.load(pointers(start, logits, v), mask=inside, other=0.0)
        x, slope = transformed(x, factor, logits, RAISED)
        return tl.where(inside, x, FLOOR), slope
    else:
        return transformed(tl.load(pointers(start, logits, v)), factor, logits, RAISED)


@triton.jit
def load_step(starts, policy, ref, v, V, MASKED: tl.constexpr, RAISED: tl.constexpr = True):
    """Load positions v [UNROLL, LANES] or [BLOCK] of both sides; without a reference, the policy takes its place.

    RAISED: whether suppressed logits are raised to FLOOR, as all but their exponentials needs it.
    """
    inside = v < V
    if MASKED:
        v = wrapped(v, V, starts.head, policy)
    z, slope_p = load_side(starts.policy, starts.factor_p, policy, v, inside, MASKED, RAISED)
    if ref.pointer is not None:
        r, slope_q = load_side(starts.ref, starts.factor_q, ref, v, inside, MASKED, RAISED)
        return Step(z, r, slope_p, slope_q)
    else:
        return Step(z, z, slope_p, slope_p)


@triton.jit
def shifts(max_p, max_q, center):
    """Return integer base-2 shifts of both sides that are at least their maxima.

    The shifts differ by round(c log2 e), so a/b = e^d up to a known constant. If a side's own maximum would be a factor of 2^40
    below its shift, the sides get independent shifts, so that neither exponentials nor their squares underflow.
    """
    p = tl.maximum(tl.ceil(max_p * LOG2E), LOW)
    q = tl.maximum(tl.ceil(max_q * LOG2E), LOW)
    k = tl.floor(center * LOG2E + 0.5)
    m = tl.maximum(q, p - k)
    tied = (m - q < TIED) & (m + k - p < TIED)
    return tl.where(tied, m + k, p), tl.where(tied, m, q)


@triton.jit
def sweep(step, sums, center, powers, REF: tl.constexpr, WANTED: tl.constexpr):
    """Add one step [UNROLL, LANES] to the LaneSums of the row.

    The shifts change only when a maximum exceeds them by a factor of 4; few steps take this branch.
    """
    shift_p, shift_q, max_p, max_q, sum_p, sum_q, sum_pd, sum_qd, sum_qdd, sum_p_log, sum_pp, lane_powers = sums
    max_p = tl.maximum(max_p, tl.max(tl.max(step.policy, 0), 0))
    grown = max_p * LOG2E - shift_p
    if REF:
        max_q = tl.maximum(max_q, tl.max(tl.max(step.ref, 0), 0))
        grown = tl.maximum(grown, max_q * LOG2E - shift_q)
    if grown > 2.0:
        new_p, new_q = shifts(max_p, max_q, center)
        x = shift_p - new_p
        y = shift_q - new_q
        scale_p = tl.exp2(x)
        scale_q = tl.exp2(y)
        sum_p_log = (sum_p_log + sum_p * x) * scale_p
        if WANTED.collision:
            sum_pp = sum_pp * (scale_p * scale_p)
        sum_p, sum_pd = sum_p * scale_p, sum_pd * scale_p
        sum_q, sum_qd, sum_qdd = sum_q * scale_q, sum_qd * scale_q, sum_qdd * scale_q
        moved = ()
        for i in tl.static_range(len(powers)):
            total, shift = lane_powers[i]
            moved = moved + (LanePower(total, shift + powers[i] * x + (1.0 - powers[i]) * y),)
        lane_powers = moved
        shift_p, shift_q = new_p, new_q
    x = in_bits(step.policy, shift_p)
    a = tl.exp2(x)
    sum_p += tl.sum(a, 0)
    if WANTED.entropy:
        sum_p_log += tl.sum(a * x, 0)
    if WANTED.collision:
        sum_pp += tl.sum(a * a, 0)
    if REF:
        y = in_bits(step.ref, shift_q)
        b = tl.exp2(y)
        sum_q += tl.sum(b, 0)
        if WANTED.moments:
            d = (step.policy - step.ref) - center
            sum_pd += tl.sum(a * d, 0)
            bd = b * d
            sum_qd += tl.sum(bd, 0)
            sum_qdd += tl.sum(bd * d, 0)
        added = ()
        for i in tl.static_range(len(powers)):  # each has its own shift, because e has no other bound outside 0 < s < 1
            old = LanePower(*lane_powers[i])
            e = powers[i] * x + (1.0 - powers[i]) * y
            shift = tl.maximum(old.shift, tl.ceil(tl.max(tl.max(e, 0), 0)))
            total = old.total * tl.exp2(old.shift - shift) + tl.sum(tl.exp2(e - shift), 0)
            added = added + (LanePower(total, shift),)
        lane_powers = added
    return LaneSums(
        shift_p, shift_q, max_p, max_q, sum_p, sum_q, sum_pd, sum_qd, sum_qdd, sum_p_log, sum_pp, lane_powers
    )


@triton.jit
def normalised(z, r, row):
    """Return p, q, t = log p - log q, log p and log q of logits of both sides, from the SavedRow."""
    lp = in_bits(z, row.shift_p) - row.log_sum_p
    lq = in_bits(r, row.shift_q) - row.log_sum_q
    return tl.exp2(lp), tl.exp2(lq), (z - r - row.center) - row.log_mean, lp * LN2, lq * LN2


@triton.jit
def add_step_terms(z, r, row, sums, params, FORMULAS: tl.constexpr, AXIS: tl.constexpr):
    """Add logits of both sides, in the second sweep, to the TermSums of every term divergence."""
    p, q, t, lp, lq = normalised(z, r, row)
    new = ()
    for i in tl.static_range(len(FORMULAS.term)):
        if FORMULAS.term[i] is not None:
            c = FORMULAS.term[i](p, q, t, lp, lq, *params[i])
            h = FORMULAS.grad_p[i](p, q, t, lp, lq, *params[i])
            value, slope = sums[i]
            new = new + (TermSums(value + tl.sum(c, AXIS), slope + tl.sum(h, AXIS)),)
        else:
            new = new + (sums[i],)
    return new


@triton.jit
def token_label(labels, row, length, ignore_index, SHIFT: tl.constexpr):
    """Return the label of a row.

    With SHIFT it is the label of the next position of its sequence, and ignore_index at the last position.
    """
    if SHIFT:
        last = row % length == length - 1
        label = tl.load(labels + tl.where(last, row, row + 1)).to(tl.int64)
        return tl.where(last, ignore_index, label)
    else:
        return tl.load(labels + row).to(tl.int64)


@triton.jit
def finite(x):
    """Return x with 0 where it is infinite: the slope of an infinite value is left out of the gradient."""
    return tl.where(tl.abs(x) == INF, 0.0, x)


@triton.jit
def load_saved(saved, stride, row):
    """Return the SavedRow of a row."""
    found = ()
    for i in tl.static_range(SAVED_FIELDS):
        found = found + (tl.load(saved + i * stride + row),)
    return SavedRow(*found)


@triton.jit
def slope_pointers(saved, stride, row, i: tl.constexpr):
    """Return the addresses of sum_v h and sum_v k of divergence i, as in layout.slope_rows."""
    return saved + (SAVED_FIELDS + 2 * i) * stride + row, saved + (SAVED_FIELDS + 2 * i + 1) * stride + row


@triton.jit
def slopes(
    step,
    v,
    y,
    row,
    coefs,
    params,
    FORMULAS: tl.constexpr,
    REF: tl.constexpr,
    ENTROPY: tl.constexpr,
    WANT_P: tl.constexpr,
    WANT_Q: tl.constexpr,
):
    """Compute the gradients at both sides' logits of one step."""
    if REF:
        p, q, t, lp, lq = normalised(step.policy, step.ref, row)
    else:
        lp = in_bits(step.policy, row.shift_p) - row.log_sum_p
        p = tl.exp2(lp)
        lp = lp * LN2
    d_policy = p
    d_ref = p
    if WANT_P:
        d_policy = p * coefs.policy
        if ENTROPY:
            d_policy -= p * lp * coefs.entropy
        for i in tl.static_range(len(FORMULAS.grad_p)):
            d_policy += FORMULAS.grad_p[i](p, q, t, lp, lq, *params[i]) * coefs.divergence[i]
        d_policy = (d_policy + tl.where(v == y, coefs.label_p, 0.0)) * step.slope_p
    if WANT_Q:
        d_ref = q * coefs.ref
        for i in tl.static_range(len(FORMULAS.grad_q)):
            d_ref += FORMULAS.grad_q[i](p, q, t, lp, lq, *params[i]) * coefs.divergence[i]
        d_ref = (d_ref + tl.where(v == y, coefs.label_q, 0.0)) * step.slope_q
    return d_policy, d_ref
