"""Process a vocabulary in parts: kernels on states, which are the running sums of rows over the parts read so far.

    fold_slice     one program for each row: computes the sums of one slice of logits and merges them into the row's state
    add_terms      the second sweep over a slice, after close_states: adds to the sums of the term divergences
    merge_states   merges the states of two disjoint parts (tiles, and later ranks)
    close_states   computes log-probs, divergences, entropy and the numbers for backward from states of the whole vocabulary

Backward needs no separate kernel: token_stats_backward also accepts a slice. A state is [fields, rows], with the fields of
moments.SIDES and of each power; `stride` is the distance between fields. The states of ignored rows are not changed.
"""

import triton
import triton.language as tl

from ..core.moments import SIDES
from ..core.moments import merge as _merge
from ..core.moments import merge_power as _merge_power
from .elementwise import jit
from .row_stats import INF, row_offset, token_label
from .token_stats import close_row, row_sums, store_ignored, term_sums

merge, merge_power = jit(_merge), jit(_merge_power)
N = tl.constexpr(len(SIDES))


@triton.jit
def load_state(State, stride, row, n: tl.constexpr):
    sums = ()
    for i in tl.static_range(N):
        sums = sums + (tl.load(State + i * stride + row),)
    P = ()
    for i in tl.static_range(n):
        at = State + (N + 3 * i) * stride + row
        P = P + ((tl.load(at), tl.load(at + stride), tl.load(at + 2 * stride)),)
    return sums, P


@triton.jit
def store_state(State, stride, row, sums, P):
    for i in tl.static_range(N):
        tl.store(State + i * stride + row, sums[i])
    for i in tl.static_range(len(P)):
        for j in tl.static_range(3):
            tl.store(State + (N + 3 * i + j) * stride + row, P[i][j])


@triton.jit
def merged(s, P, t, Q, powers):
    both, moves = merge(s, t)
    R = ()
    for i in tl.static_range(len(powers)):
        R = R + (merge_power(P[i], Q[i], (s[6], t[6]), moves, powers[i]),)
    return both, R


@triton.jit
def fold_slice(
    Z, z_layout, z_stride, z_side, W, w_layout, w_stride, w_side,  # [rows, V] logits of a slice
    Labels, ignore_index, State, stride, V, first, powers,
    FRESH: tl.constexpr, ENTROPY: tl.constexpr, COLLISION: tl.constexpr, MOMENTS: tl.constexpr,
    UNROLL: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    REF: tl.constexpr = W is not None
    label = tl.load(Labels + row).to(tl.int64)
    if label == ignore_index:
        return
    here = (label >= first) & (label < first + V)
    Z += row_offset(row, z_layout)
    if REF:
        W += row_offset(row, w_layout)
    sums, P = row_sums(
        Z, z_stride, z_side, W, w_stride, w_side, tl.where(here, label - first, 0), V, powers,
        ENTROPY, COLLISION, MOMENTS, UNROLL, LANES, STAGES,
    )  # fmt: skip
    mp, A, zmax, zy, E, mq, B, wy, c, excess, A1, B1, B2, S = sums
    zy, wy = tl.where(here, zy, -INF), tl.where(here, wy, -INF)
    sums = (mp, A, zmax, zy, E, mq, B, wy, c, excess, A1, B1, B2, S)
    if not FRESH:
        old, Q = load_state(State, stride, row, len(powers))
        sums, P = merged(old, Q, sums, P, powers)
    store_state(State, stride, row, sums, P)


@triton.jit
def add_terms(
    Z, z_layout, z_stride, z_side, W, w_layout, w_stride, w_side,
    Labels, ignore_index, Saved, saved_stride, Sums, sums_stride, V, numbers,  # Sums: [2 n, rows]
    TERMS: tl.constexpr, GRADS: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(Labels + row).to(tl.int64) == ignore_index:
        return
    saved = ()
    for i in tl.static_range(6):
        saved = saved + (tl.load(Saved + i * saved_stride + row),)
    Z += row_offset(row, z_layout)
    W += row_offset(row, w_layout)
    found = term_sums(Z, z_stride, z_side, W, w_stride, w_side, V, saved, numbers, TERMS, GRADS, UNROLL, LANES, STAGES)
    for i in tl.static_range(len(TERMS)):
        if TERMS[i] is not None:
            for j in tl.static_range(2):
                at = Sums + (2 * i + j) * sums_stride + row
                tl.store(at, tl.load(at) + found[i][j])


@triton.jit
def merge_states(State, stride, Other, other_stride, powers):
    row = tl.program_id(0).to(tl.int64)
    s, P = load_state(State, stride, row, len(powers))
    t, Q = load_state(Other, other_stride, row, len(powers))
    sums, R = merged(s, P, t, Q, powers)
    store_state(State, stride, row, sums, R)


@triton.jit
def close_states(
    State, stride, Labels, ignore_index, Logp, RefLogp, Lse, Entropy, Div, Hit, Collision, Saved, V, numbers, powers, degrees,
    ROWS: tl.constexpr, POWER: tl.constexpr, MOMENTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    REF: tl.constexpr = RefLogp is not None
    label = token_label(Labels, (1, 1, 0), row, 1, ignore_index, False)
    if label == ignore_index:
        store_ignored(row, rows, len(ROWS), REF, Logp, RefLogp, Lse, Entropy, Div, Hit, Collision, Saved)
        return
    sums, P = load_state(State, stride, row, len(powers))
    close_row(
        row, rows, (label >= 0) & (label < V), sums, P, numbers, powers, degrees,
        Logp, RefLogp, Lse, Entropy, Div, Hit, Collision, Saved, ROWS, POWER, MOMENTS, REF,
    )  # fmt: skip
