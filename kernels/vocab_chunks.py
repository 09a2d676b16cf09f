"""Process a vocabulary in parts: kernels on states, which are the running sums of rows over the parts read so far.

    fold_slice     one program for each row: computes the sums of one slice of logits and merges them into the row's state
    add_terms      the second sweep over a slice, after close_states: adds to the sums of the term divergences
    merge_states   merges the states of two disjoint parts (tiles, and later ranks)
    close_states   computes log-probs, divergences, entropy and the numbers for backward from states of the whole vocabulary

Backward needs no separate kernel: token_stats_backward also accepts a slice. A state is [fields, rows]: the fields of
moments.RowMoments, then those of moments.PowerMoments for each power. The states of ignored rows are not changed.
"""

import triton
import triton.language as tl

from ..core import moments
from ..core.moments import PowerMoments, RowMoments
from .elementwise import jit
from .row_stats import INF, load_saved, row_starts
from .token_stats import close_row, row_sums, store_ignored, term_sums

merge, merge_power = jit(moments.merge), jit(moments.merge_power)
# As their names, so that compiled kernels are not used again where their order has changed.
ROW_FIELDS, POWER_FIELDS = tl.constexpr(RowMoments._fields), tl.constexpr(PowerMoments._fields)


@triton.jit
def load_state(state, stride, row, n: tl.constexpr):
    """Return the RowMoments of a row, and a PowerMoments of each of n powers."""
    start = state + row
    sums = ()
    for i in tl.static_range(len(ROW_FIELDS.value)):
        sums = sums + (tl.load(start + i * stride),)
    powers = ()
    for k in tl.static_range(n):
        power = ()
        for i in tl.static_range(len(POWER_FIELDS.value)):
            at = len(ROW_FIELDS.value) + len(POWER_FIELDS.value) * k + i
            power = power + (tl.load(start + at * stride),)
        powers = powers + (PowerMoments(*power),)
    return RowMoments(*sums), powers


@triton.jit
def store_state(state, stride, row, sums, powers):
    """Store what load_state returns."""
    start = state + row
    for i in tl.static_range(len(ROW_FIELDS.value)):
        tl.store(start + i * stride, sums[i])
    for k in tl.static_range(len(powers)):
        for i in tl.static_range(len(POWER_FIELDS.value)):
            at = len(ROW_FIELDS.value) + len(POWER_FIELDS.value) * k + i
            tl.store(start + at * stride, powers[k][i])


@triton.jit
def merged(sums, power_sums, other, other_powers, powers):
    """Merge the RowMoments and PowerMoments of two disjoint parts."""
    both, moved, moved_other = merge(sums, other)
    found = ()
    for i in tl.static_range(len(powers)):
        # named again: on Triton 3.6 what a tuple holds may have lost its names
        one, more = PowerMoments(*power_sums[i]), PowerMoments(*other_powers[i])
        found = found + (merge_power(one, more, moved, moved_other, powers[i]),)
    return both, found


@triton.jit(do_not_specialize=["stride", "V", "first"], do_not_specialize_on_alignment=["labels", "state"])
def fold_slice(
    policy,
    ref,
    labels,
    ignore_index,
    state,
    stride,
    V,
    first,
    powers,
    FRESH: tl.constexpr,
    WANTED: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Add the sums of a slice of logits [rows, V] to a state; FRESH: the state holds none yet."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row).to(tl.int64)
    if label == ignore_index:
        return
    here = (label >= first) & (label < first + V)
    starts = row_starts(policy, ref, row)
    sums, power_sums = row_sums(starts, policy, ref, tl.where(here, label - first, 0), V, powers, WANTED, STEPS)
    sums = RowMoments(
        shift_p=sums.shift_p,
        sum_p=sums.sum_p,
        max_p=sums.max_p,
        label_p=tl.where(here, sums.label_p, -INF),
        sum_p_log=sums.sum_p_log,
        shift_q=sums.shift_q,
        sum_q=sums.sum_q,
        label_q=tl.where(here, sums.label_q, -INF),
        center=sums.center,
        excess=sums.excess,
        sum_pd=sums.sum_pd,
        sum_qd=sums.sum_qd,
        sum_qdd=sums.sum_qdd,
        sum_pp=sums.sum_pp,
    )
    if not FRESH:
        old, old_powers = load_state(state, stride, row, len(powers))
        sums, power_sums = merged(old, old_powers, sums, power_sums, powers)
    store_state(state, stride, row, sums, power_sums)


@triton.jit(
    do_not_specialize=["saved_stride", "stride", "V"], do_not_specialize_on_alignment=["labels", "saved", "sums"]
)
def add_terms(
    policy,
    ref,
    labels,
    ignore_index,
    saved,
    saved_stride,
    sums,
    stride,
    V,
    numbers,
    FORMULAS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Add the term divergences of a slice of logits to their sums [2 n, rows]."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(labels + row) == ignore_index:
        return
    of_row = load_saved(saved, saved_stride, row)
    found = term_sums(row_starts(policy, ref, row), policy, ref, V, of_row, numbers.params, FORMULAS, STEPS)
    for i in tl.static_range(len(FORMULAS.term)):
        if FORMULAS.term[i] is not None:
            value, slope = found[i]
            at_value = sums + 2 * i * stride + row
            at_slope = sums + (2 * i + 1) * stride + row
            tl.store(at_value, tl.load(at_value) + value)
            tl.store(at_slope, tl.load(at_slope) + slope)


@triton.jit(do_not_specialize=["stride", "other_stride"], do_not_specialize_on_alignment=["state", "other"])
def merge_states(state, stride, other, other_stride, powers):
    """Merge the other state into a state."""
    row = tl.program_id(0).to(tl.int64)
    sums, power_sums = load_state(state, stride, row, len(powers))
    more, more_powers = load_state(other, other_stride, row, len(powers))
    sums, power_sums = merged(sums, power_sums, more, more_powers, powers)
    store_state(state, stride, row, sums, power_sums)


@triton.jit(do_not_specialize=["stride"], do_not_specialize_on_alignment=["state", "labels"])
def close_states(state, stride, labels, ignore_index, out, V, numbers, FORMULAS: tl.constexpr, MOMENTS: tl.constexpr):
    """Write the outputs of a row from its state."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    label = tl.load(labels + row).to(tl.int64)
    if label == ignore_index:
        store_ignored(row, rows, out, len(FORMULAS.row))
        return
    sums, power_sums = load_state(state, stride, row, len(numbers.powers))
    close_row(row, rows, (label >= 0) & (label < V), sums, power_sums, numbers, out, FORMULAS, MOMENTS)
