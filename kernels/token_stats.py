"""Compute log-probs, divergences and entropy of each token from one read of each logit, gradients from one more.

    token_stats_forward    one program for each row (token): sweep() over it, then its outputs; a second sweep computes the
                           term divergences
    token_stats_backward   one program for each row: it reads z (and w) and writes dz (and dw)

Bytes, V entries of b bytes: forward bV or 2bV (4bV with a term divergence), backward 2bV or 3bV. The device functions are in
row_stats.py, the final arithmetic of a row in core/moments.py, the formulas of each divergence in core/divergences.py.
"""

import triton
import triton.language as tl

from ..core.moments import close_pair as _close_pair
from ..core.moments import close_power as _close_power
from ..core.moments import log_totals as _log_totals
from .elementwise import HUGE, LN2, LOG2E, in_bits, jit
from .row_stats import INF, LOW, TIED, finite, head, pair, pointers, row_offset, slopes, sweep, terms, token_label

close_pair, close_power, log_totals = jit(_close_pair), jit(_close_power), jit(_log_totals)

# Errors in fp32: that of a log-ratio of two sums of exponentials near 1, and that of z - w relative to its size.
NOISE = tl.constexpr(3e-7)
HALF_ULP = tl.constexpr(2.0**-24)


@triton.jit
def row_sums(
    Z, z_stride, z_side, W, w_stride, w_side, y, V, powers,
    ENTROPY: tl.constexpr, COLLISION: tl.constexpr, MOMENTS: tl.constexpr,
    UNROLL: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sweep once over a row and return its sums in the order of moments.SIDES, and those of each power.

    The logits are centred on those of column y; z and w of this column are among the sums.
    """
    REF: tl.constexpr = W is not None
    zy = head(tl.load(pointers(Z, y, z_stride)), z_side)[0]
    wy = zy
    if REF:
        wy = head(tl.load(pointers(W, y, w_stride)), w_side)[0]
    known = (zy > LOW) & (wy > LOW)
    c = tl.where(
        known, zy - wy, 0.0
    )  # a constant close to z - w: that of column y, or that of column 0 if column y is an outlier
    if REF:
        z0, w0 = (
            head(tl.load(pointers(Z, y * 0, z_stride)), z_side)[0],
            head(tl.load(pointers(W, y * 0, w_stride)), w_side)[0],
        )
        other = (z0 > LOW) & (w0 > LOW) & (tl.abs(c) > 64.0)
        c = tl.where(other, z0 - w0, c)
    mq = tl.where(wy > LOW, tl.floor(wy * LOG2E), LOW)
    tied = mq + tl.floor(c * LOG2E + 0.5)
    tied = tl.where(known & (zy * LOG2E > tied - TIED), tied, tl.floor(zy * LOG2E))
    mp = tl.where(zy > LOW, tied, LOW)

    BLOCK: tl.constexpr = UNROLL * LANES
    v = tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    zero = tl.zeros([LANES], tl.float32)
    low = tl.sum(zero) + LOW
    R = ()
    for i in tl.static_range(len(powers)):  # noqa: B007
        R = R + ((zero, low),)
    state = (mp, mq, zy, wy, zero, zero, zero, zero, zero, zero, zero, R)
    main = V // BLOCK * BLOCK
    for start in tl.range(0, main, BLOCK, num_stages=STAGES):
        z, w, slope_z, slope_w = pair(Z, z_stride, z_side, W, w_stride, w_side, start + v, V, False)
        state = sweep(z, w, state, c, powers, REF, MOMENTS, ENTROPY, COLLISION)
    if main < V:
        z, w, slope_z, slope_w = pair(Z, z_stride, z_side, W, w_stride, w_side, main + v, V, True)
        state = sweep(z, w, state, c, powers, REF, MOMENTS, ENTROPY, COLLISION)

    mp, mq, zmax, wmax, A, B, A1, B1, B2, E, S, R = state
    own = (mp, tl.sum(A), zmax, zy, tl.sum(E))
    squares = tl.sum(S) if COLLISION else 0.0
    sums = own + (mq, tl.sum(B), wy, c, tl.sum(A - B), tl.sum(A1), tl.sum(B1), tl.sum(B2), squares)
    P = ()
    for i in tl.static_range(len(powers)):
        r, shift = R[i]
        P = P + ((tl.sum(r), shift, tl.sum(r * tl.exp2(shift) - B)),)
    return sums, P


@triton.jit
def term_sums(
    Z, z_stride, z_side, W, w_stride, w_side, V, saved, numbers,
    TERMS: tl.constexpr, GRADS: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute sum_v c and sum_v h of each term divergence in a second sweep; other divergences get (0, 0)."""
    BLOCK: tl.constexpr = UNROLL * LANES
    v = tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    zero = tl.zeros([LANES], tl.float32)
    sums = ()
    for i in tl.static_range(len(TERMS)):
        if TERMS[i] is not None:
            sums = sums + ((zero, zero),)
        else:
            sums = sums + ((0.0, 0.0),)
    main = V // BLOCK * BLOCK
    for start in tl.range(0, main, BLOCK, num_stages=STAGES):
        z, w, slope_z, slope_w = pair(Z, z_stride, z_side, W, w_stride, w_side, start + v, V, False)
        sums = terms(z, w, saved, sums, numbers, TERMS, GRADS)
    if main < V:
        z, w, slope_z, slope_w = pair(Z, z_stride, z_side, W, w_stride, w_side, main + v, V, True)
        sums = terms(z, w, saved, sums, numbers, TERMS, GRADS)
    found = ()
    for i in tl.static_range(len(TERMS)):
        if TERMS[i] is not None:
            found = found + ((tl.sum(sums[i][0]), tl.sum(sums[i][1])),)
        else:
            found = found + (sums[i],)
    return found


@triton.jit
def store_ignored(
    row, rows, n: tl.constexpr, REF: tl.constexpr, Logp, RefLogp, Lse, Entropy, Div, Hit, Collision, Saved
):  # fmt: skip
    """Write zeros to all outputs of a row that is ignored."""
    tl.store(Logp + row, 0.0)
    tl.store(Lse + row, 0.0)
    if REF:
        tl.store(RefLogp + row, 0.0)
    if Entropy is not None:
        tl.store(Entropy + row, 0.0)
    if Collision is not None:
        tl.store(Collision + row, 0.0)
    for i in tl.static_range(n):
        tl.store(Div + i * rows + row, 0.0)
    for i in tl.static_range(7 + 2 * n):
        tl.store(Saved + i * rows + row, 0.0)
    tl.store(Hit + row, 0)


@triton.jit
def log_total(total, y, shift):
    """Return log2 of the total of a row, and whether the term of the label is the whole total.

    If it is, the logarithm is the exponent of this term, so the probability of the label is 1, whatever exp2 and log2 round to.
    """
    exponent = in_bits(y, shift)
    alone = (y > LOW) & (tl.exp2(exponent) == total)
    return tl.where(alone, exponent, tl.log2(total)), alone


@triton.jit
def close_row(
    row, rows, valid, sums, P, numbers, powers, degrees, Logp, RefLogp, Lse, Entropy, Div, Hit, Collision, Saved,
    ROWS: tl.constexpr, POWER: tl.constexpr, MOMENTS: tl.constexpr, REF: tl.constexpr,
):  # fmt: skip
    """Write the outputs of a row, except term divergences, from its sums.

    Return the saved numbers that term_sums needs, and whether the row has at least one token on each side.
    """
    n: tl.constexpr = len(ROWS)
    mp, total_a, zmax, zy, E, mq, total_b, wy, c, excess, A1, B1, B2, S = sums
    bad = float("nan")
    log_a, alone = log_total(total_a, zy, mp)
    logp = (in_bits(zy, mp) - log_a) * LN2
    logp = tl.where(zy > LOW, tl.minimum(logp, 0.0, propagate_nan=tl.PropagateNan.ALL), -INF)
    entropy = tl.maximum((log_a - E / total_a) * LN2, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(Logp + row, tl.where(valid & (total_a != 0), logp, bad))
    tl.store(Lse + row, (mp + log_a) * LN2)
    tl.store(Hit + row, (zy >= zmax) & valid)
    tl.store(Saved + row, mp)
    tl.store(Saved + rows + row, tl.where(total_a == 0, 0.0, log_a))
    if Entropy is not None:
        tl.store(Entropy + row, entropy)
    if Collision is not None:
        collision = tl.minimum((tl.log2(S) - 2.0 * log_a) * LN2, 0.0, propagate_nan=tl.PropagateNan.ALL)
        collision = tl.where(alone, 0.0, collision)
        tl.store(Collision + row, tl.where(total_a == 0, bad, collision))
    tl.store(Saved + 6 * rows + row, finite(entropy) if Entropy is not None else 0.0)
    if REF:
        log_b, _ = log_total(total_b, wy, mq)
        logq = (in_bits(wy, mq) - log_b) * LN2
        logq = tl.where(wy > LOW, tl.minimum(logq, 0.0, propagate_nan=tl.PropagateNan.ALL), -INF)
        tl.store(RefLogp + row, tl.where(valid & (total_b != 0), logq, bad))
        log_ab, k = log_totals(sums)
        if MOMENTS:
            noise = NOISE + HALF_ULP * tl.abs(c)
            k, reverse, forward, log_ab, curve, j = close_pair(sums, noise)
        tl.store(Saved + 2 * rows + row, mq)
        tl.store(Saved + 3 * rows + row, tl.where(total_b == 0, 0.0, log_b))
        tl.store(Saved + 4 * rows + row, c)
        tl.store(Saved + 5 * rows + row, k)
        alive = (total_a != 0) & (total_b != 0)
        for i in tl.static_range(n):
            if ROWS[i] is not None:
                power = 0.0
                if POWER[i] >= 0:
                    power = close_power(P[POWER[i]], total_b, log_ab, curve, j, powers[POWER[i]], noise)
                value, slope = ROWS[i](reverse, forward, power, *numbers[i])
                store_divergence(i, row, rows, value, slope, degrees[i], alive, Div, Saved)
        return (mp, log_a, mq, log_b, c, k), alive
    else:
        for i in tl.static_range(2, 6):
            tl.store(Saved + i * rows + row, 0.0)
        return (mp, log_a, mp, log_a, c, c), total_a != 0


@triton.jit
def store_divergence(i: tl.constexpr, row, rows, value, slope, degree, alive, Div, Saved):
    value = tl.where(value > HUGE, INF, tl.where(value < 0, 0.0, value))
    other = finite(degree * value) - finite(slope)
    tl.store(Div + i * rows + row, tl.where(alive, value, float("nan")))
    tl.store(Saved + (7 + 2 * i) * rows + row, tl.where(alive, finite(slope), 0.0))
    tl.store(Saved + (8 + 2 * i) * rows + row, tl.where(alive, other, 0.0))


@triton.jit
def token_stats_forward(
    Z, z_layout, z_stride, z_side,  # policy logits [rows, V]
    W, w_layout, w_stride, w_side,  # reference logits [rows, V], or None
    Labels, label_layout, ignore_index, T,
    Logp, RefLogp, Lse, Entropy, Div, Hit, Collision, Saved,  # [rows] each, Div [n, rows], Saved [7 + 2 n, rows]
    V, numbers, powers, degrees,
    ROWS: tl.constexpr, TERMS: tl.constexpr, GRADS: tl.constexpr, POWER: tl.constexpr,
    SHIFT: tl.constexpr, MOMENTS: tl.constexpr, SECOND: tl.constexpr,
    UNROLL: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute log p(y), log q(y), lse, entropy, divergences, whether y is the argmax, and log sum p^2.

    Saved: see token_stats_backward.
    """
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    REF: tl.constexpr = W is not None
    label = token_label(Labels, label_layout, row, T, ignore_index, SHIFT)
    if label == ignore_index:
        store_ignored(row, rows, len(ROWS), REF, Logp, RefLogp, Lse, Entropy, Div, Hit, Collision, Saved)
        return
    valid = (label >= 0) & (label < V)
    Z += row_offset(row, z_layout)
    if REF:
        W += row_offset(row, w_layout)
    sums, P = row_sums(
        Z, z_stride, z_side, W, w_stride, w_side, tl.where(valid, label, 0), V, powers,
        Entropy is not None, Collision is not None, MOMENTS, UNROLL, LANES, STAGES,
    )  # fmt: skip
    saved, alive = close_row(
        row, rows, valid, sums, P, numbers, powers, degrees, Logp, RefLogp, Lse, Entropy, Div, Hit, Collision, Saved,
        ROWS, POWER, MOMENTS, REF,
    )  # fmt: skip
    if SECOND:
        found = term_sums(
            Z, z_stride, z_side, W, w_stride, w_side, V, saved, numbers, TERMS, GRADS, UNROLL, LANES, STAGES
        )
        for i in tl.static_range(len(TERMS)):
            if TERMS[i] is not None:
                store_divergence(i, row, rows, found[i][0], found[i][1], degrees[i], alive, Div, Saved)


@triton.jit
def token_stats_backward(
    Z, z_layout, z_stride, z_side, dZ, dz_layout, dz_stride,  # dZ None: no policy gradient
    W, w_layout, w_stride, w_side, dW, dw_layout, dw_stride,  # W None: nothing asks for q
    Labels, label_layout, ignore_index, T,
    dLogp, dRef, dLse, dEntropy, dDiv,  # incoming gradients [rows], [rows], [rows], [rows], [n, rows], each or None
    Saved,  # m_p, log2 A, m_q, log2 B, c, K, entropy, then per divergence sum_v h, sum_v k
    V, first, width_z, width_w, numbers,  # column 0 is the token `first`
    GRADS_P: tl.constexpr, GRADS_Q: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dz = p (coef - g_ent log p) + sum_i g_i h_i + g_logp 1[v = y], times the slope of the head.

    Columns beyond V get 0.
    """
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    n: tl.constexpr = len(GRADS_P)
    REF: tl.constexpr = W is not None
    WANT_P: tl.constexpr = dZ is not None
    WANT_Q: tl.constexpr = dW is not None
    ENTROPY: tl.constexpr = dEntropy is not None
    label = token_label(Labels, label_layout, row, T, ignore_index, SHIFT)
    v = tl.arange(0, BLOCK)
    if WANT_P:
        dZ += row_offset(row, dz_layout)
    if WANT_Q:
        dW += row_offset(row, dw_layout)
    done = label == ignore_index
    label -= first
    if WANT_P:
        for start in range(0 if done else V, width_z, BLOCK):
            tl.store(pointers(dZ, start + v, dz_stride), 0.0, mask=start + v < width_z)
    if WANT_Q:
        for start in range(0 if done else V, width_w, BLOCK):
            tl.store(pointers(dW, start + v, dw_stride), 0.0, mask=start + v < width_w)
    if done:
        return

    Z += row_offset(row, z_layout)
    g_logp = tl.load(dLogp + row).to(tl.float32) if dLogp is not None else 0.0
    g_ref = tl.load(dRef + row).to(tl.float32) if dRef is not None else 0.0
    g_lse = tl.load(dLse + row).to(tl.float32) if dLse is not None else 0.0
    g_entropy = tl.load(dEntropy + row).to(tl.float32) if ENTROPY else 0.0
    coef_p = g_lse - g_logp
    if ENTROPY:
        coef_p -= g_entropy * tl.load(Saved + 6 * rows + row)
    coef_q = -g_ref
    g_div = ()
    for i in tl.static_range(n):
        g = tl.load(dDiv + i * rows + row).to(tl.float32)
        coef_p -= g * tl.load(Saved + (7 + 2 * i) * rows + row)
        coef_q -= g * tl.load(Saved + (8 + 2 * i) * rows + row)
        g_div = g_div + (g,)
    coefs = (g_logp, g_ref, g_entropy, coef_p, coef_q)
    saved = (tl.load(Saved + row), tl.load(Saved + rows + row))
    if REF:
        W += row_offset(row, w_layout)
        saved = saved + (tl.load(Saved + 2 * rows + row), tl.load(Saved + 3 * rows + row))
        saved = saved + (tl.load(Saved + 4 * rows + row), tl.load(Saved + 5 * rows + row))

    main = V // BLOCK * BLOCK
    for start in tl.range(0, main, BLOCK, num_stages=STAGES):
        o = start + v
        tiles = pair(Z, z_stride, z_side, W, w_stride, w_side, o, V, False)
        dz, dw = slopes(
            tiles, o, label, saved, coefs, g_div, numbers, GRADS_P, GRADS_Q, REF, ENTROPY, WANT_P, WANT_Q
        )  # fmt: skip
        if WANT_P:
            tl.store(pointers(dZ, o, dz_stride), dz)
        if WANT_Q:
            tl.store(pointers(dW, o, dw_stride), dw)
    if main < V:
        o = main + v
        tiles = pair(Z, z_stride, z_side, W, w_stride, w_side, o, V, True)
        dz, dw = slopes(
            tiles, o, label, saved, coefs, g_div, numbers, GRADS_P, GRADS_Q, REF, ENTROPY, WANT_P, WANT_Q
        )  # fmt: skip
        if WANT_P:
            tl.store(pointers(dZ, o, dz_stride), dz, mask=o < V)
        if WANT_Q:
            tl.store(pointers(dW, o, dw_stride), dw, mask=o < V)
