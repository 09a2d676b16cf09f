"""Compute the sums of rows from hidden states and head weights.

Only one tile [BLOCK_T, BLOCK_V] of logits exists at a time, in registers.

    tile_sums   one program for each block of rows and each range of the vocabulary; it loops over the tiles of the range:
                z = transform_logits(X W^T + scaling XA B^T + bias), and those of the reference in the same way; then
                first sweep: the sums of the tile are merged into those of the rows, or
                second sweep: the sums of the term divergences are computed from the saved numbers of the rows

Bytes requested, with R blocks of rows: R times the weights, V / BLOCK_V times the hidden states. Programs are numbered so
that the programs which run at the same time are the row blocks of one group times all ranges. The hidden states of a group
stay in L2, so a tile of W is read from memory once per group. merge_states merges the ranges of a row afterwards.
"""

import triton
import triton.language as tl

from ..core.layout import SavedRow
from ..core.moments import PowerMoments, RowMoments
from .elementwise import INTERPRET, LOG2E, in_bits
from .row_stats import FLOOR, INF, LOW, SAVED_FIELDS, TermSums, add_step_terms, shifts, transform_logits
from .vocab_chunks import merged


@triton.jit
def dot(x, weight, acc):
    """Compute acc + x weight^T in fp32 without TF32.

    The interpreter converts to fp32 first; it would multiply the bit patterns of bf16.
    """
    weight = weight.to(x.dtype)
    if INTERPRET:
        x, weight = x.to(tl.float32), weight.to(tl.float32)
    return tl.dot(x, tl.trans(weight), acc, input_precision="ieee")


@triton.jit
def product(acc, x, x_stride, weight, weight_stride, width, t, live, v, V, SHAPE: tl.constexpr):
    """Compute acc + x[t] weight[v]^T over width columns; rows where live is False and columns v >= V are not read."""
    k = tl.arange(0, SHAPE.depth)
    x += t[:, None].to(tl.int64) * x_stride + k[None, :]
    weight += v[:, None].to(tl.int64) * weight_stride + k[None, :]
    for start in tl.range(0, width, SHAPE.depth, num_stages=SHAPE.stages):
        inside = (k < width - start)[None, :]
        x_tile = tl.load(x + start, mask=live[:, None] & inside, other=0.0)
        weight_tile = tl.load(weight + start, mask=(v < V)[:, None] & inside, other=0.0)
        acc = dot(x_tile, weight_tile, acc)
    return acc


@triton.jit
def logits(side, t, live, start, V, SHAPE: tl.constexpr):
    """Compute a tile of logits of one side after softcap and multiplier, FLOOR for columns beyond V."""
    BLOCK_T: tl.constexpr = SHAPE.rows
    BLOCK_V: tl.constexpr = SHAPE.columns
    v = start + tl.arange(0, BLOCK_V)
    acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    if side.low_rank is not None:
        low = side.low_rank
        acc = product(acc, low.product, low.product_stride, low.b, low.b_stride, low.rank, t, live, v, V, SHAPE)
        acc = acc * low.scaling
    acc = product(acc, side.x, side.x_stride, side.weight, side.weight_stride, side.width, t, live, v, V, SHAPE)
    if side.bias is not None:
        acc += tl.load(side.bias + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    z = transform_logits(acc, side.softcap, side.multiplier)[0]
    if start + BLOCK_V > V:
        z = tl.where((v < V)[None, :], z, FLOOR)
    return z


@triton.jit
def empty(rows: tl.constexpr, n: tl.constexpr):
    """Return the sums of rows over a part of the vocabulary without columns, and those of n powers."""
    zero = tl.zeros([rows], tl.float32)
    low = zero + LOW
    powers = ()
    for i in tl.static_range(n):  # noqa: B007
        powers = powers + (PowerMoments(zero, low, zero),)
    none = RowMoments(
        shift_p=low,
        sum_p=zero,
        max_p=low,
        label_p=zero - INF,
        sum_p_log=zero,
        shift_q=low,
        sum_q=zero,
        label_q=zero - INF,
        center=zero,
        excess=zero,
        sum_pd=zero,
        sum_qd=zero,
        sum_qdd=zero,
        sum_pp=zero,
    )
    return none, powers


@triton.jit
def column(x, v, y, old):
    """Return x [BLOCK_T, BLOCK_V] of column y, or old if y is not in this tile."""
    here = v[None, :] == y[:, None]
    return tl.where(tl.max(here.to(tl.int32), 1) > 0, tl.sum(tl.where(here, x, 0.0), 1), old)


@triton.jit
def tile_state(z, r, v, y, center, fresh, powers, REF: tl.constexpr, WANTED: tl.constexpr):
    """Compute the sums of rows over one tile of logits alone.

    Its constant is center. Where that is not chosen yet (fresh), it is the difference of the maxima of both sides.
    """
    max_p = tl.max(z, 1)
    zero = tl.zeros_like(max_p)
    label_p, label_q, sum_p_log, sum_q, excess = zero - INF, zero - INF, zero, zero, zero
    sum_pd, sum_qd, sum_qdd, sum_pp = zero, zero, zero, zero
    shift_p, shift_q = tl.maximum(tl.ceil(max_p * LOG2E), LOW), zero
    if REF:
        max_q = tl.max(r, 1)
        known = (max_p > LOW) & (max_q > LOW)
        center = tl.where(fresh, tl.where(known, max_p - max_q, 0.0), center)
        shift_p, shift_q = shifts(max_p, max_q, center)
    if tl.max(((y >= tl.min(v, 0)) & (y <= tl.max(v, 0))).to(tl.int32), 0) > 0:
        label_p = column(z, v, y, label_p)
        if REF:
            label_q = column(r, v, y, label_q)
    x = in_bits(z, shift_p[:, None])
    a = tl.exp2(x)
    sum_p = tl.sum(a, 1)
    if WANTED.entropy:
        sum_p_log = tl.sum(a * x, 1)
    if WANTED.collision:
        sum_pp = tl.sum(a * a, 1)
    found_powers = ()
    if REF:
        q = in_bits(r, shift_q[:, None])
        b = tl.exp2(q)
        sum_q = tl.sum(b, 1)
        if WANTED.moments:
            d = (z - r) - center[:, None]
            excess = tl.sum(a - b, 1)
            sum_pd = tl.sum(a * d, 1)
            sum_qd = tl.sum(b * d, 1)
            sum_qdd = tl.sum(b * d * d, 1)
        for i in tl.static_range(len(powers)):
            e = x * powers[i] + q * (1.0 - powers[i])
            shift = tl.maximum(tl.ceil(tl.max(e, 1)), LOW)
            total = tl.exp2(e - shift[:, None])
            lost = tl.sum(total * tl.exp2(shift)[:, None] - b, 1)
            found_powers = found_powers + (PowerMoments(tl.sum(total, 1), shift, lost),)
    found = RowMoments(
        shift_p,
        sum_p,
        max_p,
        label_p,
        sum_p_log,
        shift_q,
        sum_q,
        label_q,
        center,
        excess,
        sum_pd,
        sum_qd,
        sum_qdd,
        sum_pp,
    )
    return found, found_powers


@triton.jit
def kept(sums, zero, REF: tl.constexpr, WANTED: tl.constexpr):
    """Return RowMoments with zero for those that are not needed.

    The zeros need no registers and no instructions.
    """
    return RowMoments(
        shift_p=sums.shift_p,
        sum_p=sums.sum_p,
        max_p=sums.max_p,
        label_p=sums.label_p,
        sum_p_log=sums.sum_p_log if WANTED.entropy else zero,
        shift_q=sums.shift_q if REF else zero,
        sum_q=sums.sum_q if REF else zero,
        label_q=sums.label_q if REF else zero,
        center=sums.center if REF else zero,
        excess=sums.excess if WANTED.moments else zero,
        sum_pd=sums.sum_pd if WANTED.moments else zero,
        sum_qd=sums.sum_qd if WANTED.moments else zero,
        sum_qdd=sums.sum_qdd if WANTED.moments else zero,
        sum_pp=sums.sum_pp if WANTED.collision else zero,
    )


@triton.jit(
    do_not_specialize=["N", "first", "per", "stride", "split_stride", "saved_stride"],
    do_not_specialize_on_alignment=["labels", "saved", "out"],
)
def tile_sums(
    policy,
    ref,
    labels,
    ignore_index,
    saved,
    saved_stride,
    out,
    stride,
    split_stride,
    N,
    V,
    first,
    per,
    numbers,
    FORMULAS: tl.constexpr,
    WANTED: tl.constexpr,
    GROUP: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Write to out [fields, splits, N] the states of rows over each range, or with saved the TermSums [2 n, splits, N].

    policy, ref: Hidden, ref absent without a reference. saved: [fields, N], or None. Column 0 is the token `first`. per: the
    number of tiles in a range.
    """
    REF: tl.constexpr = ref.x is not None
    BLOCK_T: tl.constexpr = SHAPE.rows
    BLOCK_V: tl.constexpr = SHAPE.columns
    blocks = tl.cdiv(N, BLOCK_T)
    splits = tl.num_programs(0) // blocks
    group = tl.program_id(0) // (GROUP * splits) * GROUP  # the last one may be smaller
    inside = tl.program_id(0) - group * splits
    size = tl.minimum(blocks - group, GROUP)
    split = inside // size
    t = (group + inside % size) * BLOCK_T + tl.arange(0, BLOCK_T)
    label = tl.load(labels + t, mask=t < N, other=ignore_index).to(tl.int64)
    live = label != ignore_index
    if tl.max(live.to(tl.int32), 0) == 0:
        return
    y = tl.where((label >= first) & (label < first + V), label - first, -1).to(tl.int32)

    state, power_sums = empty(BLOCK_T, len(numbers.powers))
    row, terms = (), ()
    if saved is not None:
        for i in tl.static_range(SAVED_FIELDS):
            row = row + (tl.load(saved + i * saved_stride + t, mask=live, other=0.0)[:, None],)
        row = SavedRow(*row)
        for i in tl.static_range(len(FORMULAS.term)):  # noqa: B007
            terms = terms + (TermSums(tl.zeros([BLOCK_T], tl.float32), tl.zeros([BLOCK_T], tl.float32)),)
    begin = split * per * BLOCK_V
    end = tl.minimum(begin + per * BLOCK_V, V)
    for start in tl.range(begin, end, BLOCK_V, disable_licm=True):  # addresses kept over the loop would spill
        z = logits(policy, t, live, start, V, SHAPE)
        r = z
        if REF:
            r = logits(ref, t, live, start, V, SHAPE)
        if saved is not None:
            terms = add_step_terms(z, r, row, terms, numbers.params, FORMULAS, 1)
        else:
            v = start + tl.arange(0, BLOCK_V)
            fresh = (state.sum_p == 0) & (state.sum_q == 0)
            new, new_powers = tile_state(z, r, v, y, state.center, fresh, numbers.powers, REF, WANTED)
            new, power_sums = merged(state, power_sums, new, new_powers, numbers.powers)
            state = kept(new, tl.zeros([BLOCK_T], tl.float32), REF, WANTED)

    out += split.to(tl.int64) * split_stride + t
    found = ()
    if saved is None:
        found = found + state
        for i in tl.static_range(len(power_sums)):
            found = found + power_sums[i]
    else:
        for i in tl.static_range(len(terms)):
            found = found + terms[i]
    for i in tl.static_range(len(found)):
        tl.store(out + i * stride.to(tl.int64), found[i], mask=live)
