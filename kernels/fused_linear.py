"""Compute the sums of rows from hidden states and head weights.

Only one tile [BLOCK_T, BLOCK_V] of logits exists at a time, in registers.

    tile_sums   one program for each block of rows and each range of the vocabulary; it loops over the tiles of the range:
                z = head(X W^T + scaling XA B^T + bias), and w in the same way; then
                first sweep: the state of the tile (moments.SIDES) is merged into that of the rows, or
                second sweep: the sums of the term divergences are computed from the saved numbers of the rows

Bytes requested, with R blocks of rows: R times the weights, V / BLOCK_V times the hidden states. Programs are numbered so
that the programs which run at the same time are the row blocks of one group times all ranges. The hidden states of a group
stay in L2, so a tile of W is read from memory once per group. merge_states merges the ranges of a row afterwards.
"""

import triton
import triton.language as tl

from .elementwise import INTERPRET, LOG2E, in_bits
from .row_stats import FLOOR, INF, LOW, head, normalised, shifts
from .vocab_chunks import merged


@triton.jit
def dot(x, w, acc):
    """Compute acc + x w^T in fp32 without TF32.

    The interpreter converts to fp32 first; it would multiply the bit patterns of bf16.
    """
    w = w.to(x.dtype)
    if INTERPRET:
        x, w = x.to(tl.float32), w.to(tl.float32)
    return tl.dot(x, tl.trans(w), acc, input_precision="ieee")


@triton.jit
def product(
    acc, X, x_stride, W, w_stride, K, t, live, v, V,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute acc + X[t] W[v]^T over K columns; rows where live is False and columns v >= V are not read."""
    k = tl.arange(0, BLOCK)
    X += t[:, None].to(tl.int64) * x_stride + k[None, :]
    W += v[:, None].to(tl.int64) * w_stride + k[None, :]
    for start in tl.range(0, K, BLOCK, num_stages=STAGES):
        inside = (k < K - start)[None, :]
        x = tl.load(X + start, mask=live[:, None] & inside, other=0.0)
        w = tl.load(W + start, mask=(v < V)[:, None] & inside, other=0.0)
        acc = dot(x, w, acc)
    return acc


@triton.jit
def logits(
    side, t, live, start, V,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute a tile of logits of one side after the head, FLOOR for columns beyond V.

    side: see launch._hidden.
    """
    X, x_stride, W, w_stride, H, bias, lora, transform = side
    v = start + tl.arange(0, BLOCK_V)
    acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    if lora is not None:
        A, a_stride, B, b_stride, rank, scaling = lora
        acc = product(acc, A, a_stride, B, b_stride, rank, t, live, v, V, BLOCK_H, STAGES) * scaling
    acc = product(acc, X, x_stride, W, w_stride, H, t, live, v, V, BLOCK_H, STAGES)
    if bias is not None:
        acc += tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    z = head(acc, transform)[0]
    if start + BLOCK_V > V:
        z = tl.where((v < V)[None, :], z, FLOOR)
    return z


@triton.jit
def empty(rows: tl.constexpr, n: tl.constexpr):
    """Return the state of a part of the vocabulary without columns."""
    zero = tl.zeros([rows], tl.float32)
    low = zero + LOW
    P = ()
    for i in tl.static_range(n):  # noqa: B007
        P = P + ((zero, low, zero),)
    return (low, zero, low, zero - INF, zero, low, zero, zero - INF, zero, zero, zero, zero, zero, zero), P


@triton.jit
def column(x, v, y, old):
    """Return x of column y, or old if y is not in this tile."""
    here = v[None, :] == y[:, None]
    return tl.where(tl.max(here.to(tl.int32), 1) > 0, tl.sum(tl.where(here, x, 0.0), 1), old)


@triton.jit
def tile_state(
    z, w, v, y, c, fresh, powers,
    REF: tl.constexpr, MOMENTS: tl.constexpr, ENTROPY: tl.constexpr, COLLISION: tl.constexpr,
):  # fmt: skip
    """Compute the state of one tile alone.

    Its constant is c. Where c is not chosen yet (fresh), it is the difference of the maxima of z and w.
    """
    zmax = tl.max(z, 1)
    zero = tl.zeros_like(zmax)
    zy, wy, E, B, excess, A1, B1, B2, S = zero - INF, zero - INF, zero, zero, zero, zero, zero, zero, zero
    mp, mq = tl.maximum(tl.ceil(zmax * LOG2E), LOW), zero
    if REF:
        wmax = tl.max(w, 1)
        known = (zmax > LOW) & (wmax > LOW)
        c = tl.where(fresh, tl.where(known, zmax - wmax, 0.0), c)
        mp, mq = shifts(zmax, wmax, c)
    if tl.max(((y >= tl.min(v, 0)) & (y <= tl.max(v, 0))).to(tl.int32), 0) > 0:
        zy = column(z, v, y, zy)
        if REF:
            wy = column(w, v, y, wy)
    x = in_bits(z, mp[:, None])
    a = tl.exp2(x)
    A = tl.sum(a, 1)
    if ENTROPY:
        E = tl.sum(a * x, 1)
    if COLLISION:
        S = tl.sum(a * a, 1)
    P = ()
    if REF:
        q = in_bits(w, mq[:, None])
        b = tl.exp2(q)
        B = tl.sum(b, 1)
        if MOMENTS:
            d = (z - w) - c[:, None]
            excess = tl.sum(a - b, 1)
            A1 = tl.sum(a * d, 1)
            B1 = tl.sum(b * d, 1)
            B2 = tl.sum(b * d * d, 1)
        for i in tl.static_range(len(powers)):
            e = x * powers[i] + q * (1.0 - powers[i])
            shift = tl.maximum(tl.ceil(tl.max(e, 1)), LOW)
            r = tl.exp2(e - shift[:, None])
            P = P + ((tl.sum(r, 1), shift, tl.sum(r * tl.exp2(shift)[:, None] - b, 1)),)
    return (mp, A, zmax, zy, E, mq, B, wy, c, excess, A1, B1, B2, S), P


@triton.jit
def kept(sums, zero, REF: tl.constexpr, MOMENTS: tl.constexpr, ENTROPY: tl.constexpr, COLLISION: tl.constexpr):
    """Return the sums of a state, with zero for those that are not needed.

    The zeros need no registers and no instructions.
    """
    mp, A, zmax, zy, E, mq, B, wy, c, excess, A1, B1, B2, S = sums
    if not ENTROPY:
        E = zero
    if not COLLISION:
        S = zero
    if not REF:
        mq, B, wy, c = zero, zero, zero, zero
    if not MOMENTS:
        excess, A1, B1, B2 = zero, zero, zero, zero
    return mp, A, zmax, zy, E, mq, B, wy, c, excess, A1, B1, B2, S


@triton.jit
def add_tile(z, w, saved, sums, numbers, TERMS: tl.constexpr, GRADS: tl.constexpr):
    """Add sum_v c and sum_v h of every term divergence in this tile to sums and return the result."""
    p, q, t, lp, lq = normalised(z, w, saved)
    new = ()
    for i in tl.static_range(len(TERMS)):
        if TERMS[i] is not None:
            c, h = TERMS[i](p, q, t, lp, lq, *numbers[i]), GRADS[i](p, q, t, lp, lq, *numbers[i])
            new = new + (sums[2 * i] + tl.sum(c, 1), sums[2 * i + 1] + tl.sum(h, 1))
        else:
            new = new + (sums[2 * i], sums[2 * i + 1])
    return new


@triton.jit(do_not_specialize=["N", "per", "stride", "split_stride"])
def tile_sums(
    P, Q, Labels, ignore_index, Saved, saved_stride, numbers, powers,  # P, Q: the sides (Q None: no reference)
    Out, stride, split_stride,  # [fields or 2 n, splits, N]: states, or with Saved the sums of the terms
    N, V, first, per,  # tiles in a range
    TERMS: tl.constexpr, GRADS: tl.constexpr, ENTROPY: tl.constexpr, COLLISION: tl.constexpr, MOMENTS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    REF: tl.constexpr = Q is not None
    blocks = tl.cdiv(N, BLOCK_T)
    splits = tl.num_programs(0) // blocks
    group = tl.program_id(0) // (GROUP * splits) * GROUP  # the last one may be smaller
    inside = tl.program_id(0) - group * splits
    size = tl.minimum(blocks - group, GROUP)
    split = inside // size
    t = (group + inside % size) * BLOCK_T + tl.arange(0, BLOCK_T)
    label = tl.load(Labels + t, mask=t < N, other=ignore_index).to(tl.int64)
    live = label != ignore_index
    if tl.max(live.to(tl.int32), 0) == 0:
        return
    y = tl.where((label >= first) & (label < first + V), label - first, -1).to(tl.int32)

    state, R = empty(BLOCK_T, len(powers))
    saved, sums = (), ()
    if Saved is not None:
        for i in tl.static_range(6):
            saved = saved + (tl.load(Saved + i * saved_stride + t, mask=live, other=0.0)[:, None],)
        for i in tl.static_range(2 * len(TERMS)):  # noqa: B007
            sums = sums + (tl.zeros([BLOCK_T], tl.float32),)
    begin = split * per * BLOCK_V
    end = tl.minimum(begin + per * BLOCK_V, V)
    for start in tl.range(begin, end, BLOCK_V, disable_licm=True):  # addresses kept over the loop would spill
        z = logits(P, t, live, start, V, BLOCK_T, BLOCK_V, BLOCK_H, STAGES)
        w = z
        if REF:
            w = logits(Q, t, live, start, V, BLOCK_T, BLOCK_V, BLOCK_H, STAGES)
        if Saved is not None:
            sums = add_tile(z, w, saved, sums, numbers, TERMS, GRADS)
        else:
            v = start + tl.arange(0, BLOCK_V)
            fresh = (state[1] == 0) & (state[6] == 0)
            new, T = tile_state(z, w, v, y, state[8], fresh, powers, REF, MOMENTS, ENTROPY, COLLISION)
            new, R = merged(state, R, new, T, powers)
            state = kept(new, tl.zeros([BLOCK_T], tl.float32), REF, MOMENTS, ENTROPY, COLLISION)

    Out += split.to(tl.int64) * split_stride + t
    if Saved is None:
        sums = state
        for i in tl.static_range(len(powers)):
            sums = sums + R[i]
    for i in tl.static_range(len(sums)):
        tl.store(Out + i * stride.to(tl.int64), sums[i], mask=live)
