"""Compute log-probs, divergences and entropy of each token from one read of each logit, gradients from one more.

    token_stats_forward    one program for each row (token): sweep() over it, then its outputs; a second sweep computes the
                           term divergences
    token_stats_backward   one program for each row: it reads the logits and writes their gradients

Bytes, V entries of b bytes: forward bV or 2bV (4bV with a term divergence), backward 2bV or 3bV. The device functions are in
row_stats.py, the final arithmetic of a row in core/moments.py, the formulas of each divergence in core/divergences.py.
"""

import triton
import triton.language as tl

from ..core import moments
from ..core.layout import SavedRow
from ..core.moments import PowerMoments, RowMoments
from .elementwise import HUGE, LN2, LOG2E, in_bits, jit
from .row_stats import (
    INF,
    LOW,
    SAVED_AT,
    SAVED_FIELDS,
    TIED,
    Coefs,
    LanePower,
    LaneSums,
    TermSums,
    add_step_terms,
    entry,
    finite,
    load_saved,
    load_step,
    pointers,
    row_starts,
    slope_pointers,
    slopes,
    sweep,
    sweep_start,
    token_label,
    wrapped,
)

close_moments, close_power, log_totals = jit(moments.close_moments), jit(moments.close_power), jit(moments.log_totals)

# Errors in fp32: that of a log-ratio of two sums of exponentials near 1, and that of z - r relative to its size.
NOISE = tl.constexpr(3e-7)
HALF_ULP = tl.constexpr(2.0**-24)


@triton.jit
def row_sums(starts, policy, ref, y, V, powers, WANTED: tl.constexpr, STEPS: tl.constexpr):
    """Sweep once over a row; return its RowMoments, and a PowerMoments of each power.

    The logits are centred on those of column y, which are among the sums.
    """
    REF: tl.constexpr = ref.pointer is not None
    RAISED: tl.constexpr = WANTED.entropy or WANTED.moments or len(powers) > 0
    first = y * 0 - starts.head
    y -= starts.head
    label_p = entry(starts.policy, starts.factor_p, policy, y)
    label_q = label_p
    if REF:
        label_q = entry(starts.ref, starts.factor_q, ref, y)
    known = (label_p > LOW) & (label_q > LOW)
    # A constant close to z - r: that of column y, or that of column 0 if column y is an outlier.
    center = tl.where(known, label_p - label_q, 0.0)
    if REF:
        first_p = entry(starts.policy, starts.factor_p, policy, first)
        first_q = entry(starts.ref, starts.factor_q, ref, first)
        other = (first_p > LOW) & (first_q > LOW) & (tl.abs(center) > 64.0)
        center = tl.where(other, first_p - first_q, center)
    shift_q = tl.where(label_q > LOW, tl.floor(label_q * LOG2E), LOW)
    tied = shift_q + tl.floor(center * LOG2E + 0.5)
    tied = tl.where(known & (label_p * LOG2E > tied - TIED), tied, tl.floor(label_p * LOG2E))
    shift_p = tl.where(label_p > LOW, tied, LOW)

    LANES: tl.constexpr = STEPS.lanes
    BLOCK: tl.constexpr = STEPS.unroll * LANES
    lanes = tl.arange(0, LANES)[None, :]
    v = tl.arange(0, STEPS.unroll)[:, None] * LANES + lanes
    zero = tl.zeros([LANES], tl.float32)
    low = tl.sum(zero) + LOW
    lane_powers = ()
    for i in tl.static_range(len(powers)):  # noqa: B007
        lane_powers = lane_powers + (LanePower(zero, low),)
    sums = LaneSums(shift_p, shift_q, label_p, label_q, zero, zero, zero, zero, zero, zero, zero, lane_powers)
    main = (V - starts.head) // BLOCK * BLOCK
    for start in tl.range(0, main, BLOCK, num_stages=STEPS.stages):
        step = load_step(starts, policy, ref, start + v, V, False, RAISED)
        sums = sweep(step, sums, center, powers, REF, WANTED)
    for start in tl.range(main, V, LANES, num_stages=1):
        step = load_step(starts, policy, ref, start + lanes, V, True, RAISED)
        sums = sweep(step, sums, center, powers, REF, WANTED)

    found = RowMoments(
        shift_p=sums.shift_p,
        sum_p=tl.sum(sums.sum_p),
        max_p=sums.max_p,
        label_p=label_p,
        sum_p_log=tl.sum(sums.sum_p_log),
        shift_q=sums.shift_q,
        sum_q=tl.sum(sums.sum_q),
        label_q=label_q,
        center=center,
        excess=tl.sum(sums.sum_p - sums.sum_q),
        sum_pd=tl.sum(sums.sum_pd),
        sum_qd=tl.sum(sums.sum_qd),
        sum_qdd=tl.sum(sums.sum_qdd),
        sum_pp=tl.sum(sums.sum_pp) if WANTED.collision else 0.0,
    )
    found_powers = ()
    for i in tl.static_range(len(powers)):
        total, shift = sums.powers[i]
        one = PowerMoments(tl.sum(total), shift, tl.sum(total * tl.exp2(shift) - sums.sum_q))
        found_powers = found_powers + (one,)
    return found, found_powers


@triton.jit
def term_sums(starts, policy, ref, V, row, params, FORMULAS: tl.constexpr, STEPS: tl.constexpr):
    """Compute the TermSums of each term divergence in a second sweep; other divergences get zeros."""
    LANES: tl.constexpr = STEPS.lanes
    BLOCK: tl.constexpr = STEPS.unroll * LANES
    lanes = tl.arange(0, LANES)[None, :]
    v = tl.arange(0, STEPS.unroll)[:, None] * LANES + lanes
    zero = tl.zeros([LANES], tl.float32)
    sums = ()
    for i in tl.static_range(len(FORMULAS.term)):
        if FORMULAS.term[i] is not None:
            sums = sums + (TermSums(zero, zero),)
        else:
            sums = sums + (TermSums(0.0, 0.0),)
    main = (V - starts.head) // BLOCK * BLOCK
    for start in tl.range(0, main, BLOCK, num_stages=STEPS.stages):
        step = load_step(starts, policy, ref, start + v, V, False)
        sums = add_step_terms(step.policy, step.ref, row, sums, params, FORMULAS, 0)
    for start in tl.range(main, V, LANES, num_stages=1):
        step = load_step(starts, policy, ref, start + lanes, V, True)
        sums = add_step_terms(step.policy, step.ref, row, sums, params, FORMULAS, 0)
    found = ()
    for i in tl.static_range(len(FORMULAS.term)):
        if FORMULAS.term[i] is not None:
            value, slope = sums[i]
            found = found + (TermSums(tl.sum(value), tl.sum(slope)),)
        else:
            found = found + (sums[i],)
    return found


@triton.jit
def store_ignored(row, rows, out, n: tl.constexpr):
    """Write zeros to all outputs of a row that is ignored, of n divergences."""
    tl.store(out.logps + row, 0.0)
    tl.store(out.lse + row, 0.0)
    if out.ref_logps is not None:
        tl.store(out.ref_logps + row, 0.0)
    if out.entropy is not None:
        tl.store(out.entropy + row, 0.0)
    if out.collision is not None:
        tl.store(out.collision + row, 0.0)
    for i in tl.static_range(n):
        tl.store(out.divergence + i * rows + row, 0.0)
    for i in tl.static_range(SAVED_FIELDS + 2 * n):
        tl.store(out.saved + i * rows + row, 0.0)
    tl.store(out.hit + row, 0)


@triton.jit
def log_total(total, label, shift):
    """Return log2 of the total of a row, and whether the term of the label is the whole total.

    If it is, the logarithm is the exponent of this term, so the probability of the label is 1, whatever exp2 and log2 round to.
    """
    exponent = in_bits(label, shift)
    alone = (label > LOW) & (tl.exp2(exponent) == total)
    return tl.where(alone, exponent, tl.log2(total)), alone


@triton.jit
def log_prob(label, shift, log_sum):
    """Compute the log-prob of a label from its logit."""
    logp = (in_bits(label, shift) - log_sum) * LN2
    return tl.where(label > LOW, tl.minimum(logp, 0.0, propagate_nan=tl.PropagateNan.ALL), -INF)


@triton.jit
def close_row(row, rows, valid, sums, power_sums, numbers, out, FORMULAS: tl.constexpr, MOMENTS: tl.constexpr):
    """Write the outputs of a row, except term divergences, from its RowMoments and PowerMoments.

    Return the SavedRow that term_sums needs, and whether the row has at least one token on each side.
    """
    # Each saved number is stored as soon as it is known: kept until the end, they would take registers.
    at: tl.constexpr = SAVED_AT.value
    bad = float("nan")
    has_p = sums.sum_p != 0
    log_sum_p, alone = log_total(sums.sum_p, sums.label_p, sums.shift_p)
    logp = log_prob(sums.label_p, sums.shift_p, log_sum_p)
    entropy = tl.maximum((log_sum_p - sums.sum_p_log / sums.sum_p) * LN2, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out.logps + row, tl.where(valid & has_p, logp, bad))
    tl.store(out.lse + row, (sums.shift_p + log_sum_p) * LN2)
    tl.store(out.hit + row, (sums.label_p >= sums.max_p) & valid)
    tl.store(out.saved + at.shift_p * rows + row, sums.shift_p)
    tl.store(out.saved + at.log_sum_p * rows + row, tl.where(has_p, log_sum_p, 0.0))
    if out.entropy is not None:
        tl.store(out.entropy + row, entropy)
    if out.collision is not None:
        collision = tl.minimum((tl.log2(sums.sum_pp) - 2.0 * log_sum_p) * LN2, 0.0, propagate_nan=tl.PropagateNan.ALL)
        collision = tl.where(alone, 0.0, collision)
        tl.store(out.collision + row, tl.where(has_p, collision, bad))
    saved_entropy = finite(entropy) if out.entropy is not None else 0.0
    tl.store(out.saved + at.entropy * rows + row, saved_entropy)
    if out.ref_logps is not None:
        has_q = sums.sum_q != 0
        log_sum_q, _ = log_total(sums.sum_q, sums.label_q, sums.shift_q)
        logq = log_prob(sums.label_q, sums.shift_q, log_sum_q)
        tl.store(out.ref_logps + row, tl.where(valid & has_q, logq, bad))
        _, log_mean = log_totals(sums)
        if MOMENTS:
            noise = NOISE + HALF_ULP * tl.abs(sums.center)
            closed = close_moments(sums, noise)
            log_mean = closed.log_mean
        tl.store(out.saved + at.shift_q * rows + row, sums.shift_q)
        tl.store(out.saved + at.log_sum_q * rows + row, tl.where(has_q, log_sum_q, 0.0))
        tl.store(out.saved + at.center * rows + row, sums.center)
        tl.store(out.saved + at.log_mean * rows + row, log_mean)
        alive = has_p & has_q
        for i in tl.static_range(len(FORMULAS.row)):
            if FORMULAS.row[i] is not None:
                power = 0.0
                if FORMULAS.power[i] >= 0:
                    of = PowerMoments(*power_sums[FORMULAS.power[i]])
                    power = close_power(of, sums.sum_q, closed, numbers.powers[FORMULAS.power[i]], noise)
                value, slope = FORMULAS.row[i](closed.reverse, closed.forward, power, *numbers.params[i])
                store_divergence(out, i, row, rows, value, slope, numbers.degrees[i], alive)
        found = SavedRow(sums.shift_p, log_sum_p, sums.shift_q, log_sum_q, sums.center, log_mean, saved_entropy)
        return found, alive
    else:
        tl.store(out.saved + at.shift_q * rows + row, 0.0)
        tl.store(out.saved + at.log_sum_q * rows + row, 0.0)
        tl.store(out.saved + at.center * rows + row, 0.0)
        tl.store(out.saved + at.log_mean * rows + row, 0.0)
        found = SavedRow(sums.shift_p, log_sum_p, sums.shift_p, log_sum_p, sums.center, sums.center, saved_entropy)
        return found, has_p


@triton.jit
def store_divergence(out, i: tl.constexpr, row, rows, value, slope, degree, alive):
    """Store divergence i of a row, and the sums that backward needs, as layout.write_divergence does."""
    value = tl.where(value > HUGE, INF, tl.where(value < 0, 0.0, value))
    other = finite(degree * value) - finite(slope)
    tl.store(out.divergence + i * rows + row, tl.where(alive, value, float("nan")))
    to_p, to_q = slope_pointers(out.saved, rows, row, i)
    tl.store(to_p, tl.where(alive, finite(slope), 0.0))
    tl.store(to_q, tl.where(alive, other, 0.0))


@triton.jit(do_not_specialize=["length"], do_not_specialize_on_alignment=["labels"])
def token_stats_forward(
    policy,
    ref,
    labels,
    length,
    ignore_index,
    out,
    V,
    numbers,
    FORMULAS: tl.constexpr,
    WANTED: tl.constexpr,
    SECOND: tl.constexpr,
    SHIFT: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Compute log p(y), log q(y), lse, entropy, divergences, whether y is the argmax, and log sum p^2.

    policy, ref: Logits, ref absent without a reference. labels: [rows]. length: of a sequence, where labels are shifted.
    out: Outputs. numbers: Numbers.
    """
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    label = token_label(labels, row, length, ignore_index, SHIFT)
    if label == ignore_index:
        store_ignored(row, rows, out, len(FORMULAS.row))
        return
    valid = (label >= 0) & (label < V)
    starts = row_starts(policy, ref, row)
    sums, power_sums = row_sums(starts, policy, ref, tl.where(valid, label, 0), V, numbers.powers, WANTED, STEPS)
    saved, alive = close_row(row, rows, valid, sums, power_sums, numbers, out, FORMULAS, WANTED.moments)
    if SECOND:
        found = term_sums(starts, policy, ref, V, saved, numbers.params, FORMULAS, STEPS)
        for i in tl.static_range(len(FORMULAS.term)):
            if FORMULAS.term[i] is not None:
                value, slope = found[i]
                store_divergence(out, i, row, rows, value, slope, numbers.degrees[i], alive)


@triton.jit
def backward_step(
    starts,
    policy,
    ref,
    start_p,
    d_policy,
    start_q,
    d_ref,
    v,
    V,
    label,
    saved,
    coefs,
    params,
    FORMULAS: tl.constexpr,
    REF: tl.constexpr,
    ENTROPY: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write the gradients at positions v [BLOCK] of the sweep over a row; label: the position of the label."""
    step = load_step(starts, policy, ref, v, V, MASKED)
    to_policy, to_ref = slopes(
        step,
        v,
        label,
        saved,
        coefs,
        params,
        FORMULAS,
        REF,
        ENTROPY,
        d_policy.pointer is not None,
        d_ref.pointer is not None,
    )
    inside = v < V
    if MASKED:
        v = wrapped(v, V, starts.head, policy)
    if d_policy.pointer is not None:
        if MASKED:
            tl.store(pointers(start_p, d_policy, v), to_policy, mask=inside)
        else:
            tl.store(pointers(start_p, d_policy, v), to_policy)
    if d_ref.pointer is not None:
        if MASKED:
            tl.store(pointers(start_q, d_ref, v), to_ref, mask=inside)
        else:
            tl.store(pointers(start_q, d_ref, v), to_ref)


@triton.jit
def store_zeros(start, logits, policy, begin, head, width, v):
    """Write zeros to columns begin to width of a row; begin: 0, or behind all that the sweep over the row writes."""
    BLOCK: tl.constexpr = v.shape[0]
    main = tl.where(begin == 0, (width - head) // BLOCK * BLOCK, begin - head)
    for at in range(0 if begin == 0 else main, main, BLOCK):
        tl.store(pointers(start, logits, at + v), 0.0)
    end = tl.where(begin == 0, width, width - head)
    for at in range(main, end, BLOCK):
        to = wrapped(at + v, width, head, policy)
        tl.store(pointers(start, logits, to), 0.0, mask=at + v < end)


@triton.jit(
    do_not_specialize=["length", "first"],
    do_not_specialize_on_alignment=[
        "labels",
        "grad_logps",
        "grad_ref_logps",
        "grad_lse",
        "grad_entropy",
        "grad_divergence",
        "saved",
    ],
)
def token_stats_backward(
    policy,
    ref,
    d_policy,
    d_ref,
    labels,
    length,
    ignore_index,
    grad_logps,
    grad_ref_logps,
    grad_lse,
    grad_entropy,
    grad_divergence,
    saved,
    V,
    first,
    width_p,
    width_q,
    numbers,
    FORMULAS: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute dz = p (coef - g_ent log p) + sum_i g_i h_i + g_logp 1[v = y], times the slope of softcap and multiplier.

    policy, ref: Logits, ref absent where nothing asks for q. d_policy, d_ref: Logits, absent where not wanted.
    labels, length: as in token_stats_forward. grad_...: those of Grads. Column 0 is the token `first`; columns from V to the
    width of a side get 0.
    """
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    n: tl.constexpr = len(FORMULAS.grad_p)
    REF: tl.constexpr = ref.pointer is not None
    ENTROPY: tl.constexpr = grad_entropy is not None
    label = token_label(labels, row, length, ignore_index, SHIFT)
    v = tl.arange(0, BLOCK)
    starts = row_starts(policy, ref, row)
    head = starts.head
    start_p = sweep_start(d_policy, row, head) if d_policy.pointer is not None else 0
    start_q = sweep_start(d_ref, row, head) if d_ref.pointer is not None else 0
    done = label == ignore_index
    if d_policy.pointer is not None:
        store_zeros(start_p, d_policy, policy, 0 if done else V, head, width_p, v)
    if d_ref.pointer is not None:
        store_zeros(start_q, d_ref, policy, 0 if done else V, head, width_q, v)
    if done:
        return

    label -= first
    if policy.layout.peeled is not None:
        label = tl.where((label < 0) | (label >= V), -1, tl.where(label < head, label + V, label) - head)
    of_row = load_saved(saved, rows, row)
    label_p = tl.load(grad_logps + row).to(tl.float32) if grad_logps is not None else 0.0
    label_q = tl.load(grad_ref_logps + row).to(tl.float32) if grad_ref_logps is not None else 0.0
    to_lse = tl.load(grad_lse + row).to(tl.float32) if grad_lse is not None else 0.0
    to_entropy = tl.load(grad_entropy + row).to(tl.float32) if ENTROPY else 0.0
    coef_p = to_lse - label_p
    if ENTROPY:
        coef_p -= to_entropy * of_row.entropy
    coef_q = -label_q
    to_divergences = ()
    for i in tl.static_range(n):
        g = tl.load(grad_divergence + i * rows + row).to(tl.float32)
        at_p, at_q = slope_pointers(saved, rows, row, i)
        coef_p -= g * tl.load(at_p)
        coef_q -= g * tl.load(at_q)
        to_divergences = to_divergences + (g,)
    coefs = Coefs(label_p, label_q, to_entropy, coef_p, coef_q, to_divergences)

    main = (V - head) // BLOCK * BLOCK
    for start in tl.range(0, main, BLOCK, num_stages=STAGES):
        backward_step(
            starts,
            policy,
            ref,
            start_p,
            d_policy,
            start_q,
            d_ref,
            start + v,
            V,
            label,
            of_row,
            coefs,
            numbers.params,
            FORMULAS,
            REF,
            ENTROPY,
            False,
        )
    for start in tl.range(main, V, BLOCK, num_stages=1):
        backward_step(
            starts,
            policy,
            ref,
            start_p,
            d_policy,
            start_q,
            d_ref,
            start + v,
            V,
            label,
            of_row,
            coefs,
            numbers.params,
            FORMULAS,
            REF,
            ENTROPY,
            True,
        )
