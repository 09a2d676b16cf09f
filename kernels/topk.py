"""Find the largest logits of a row, and where they are: one program for each row, which reads it once.

The row's best are kept in registers, each as one integer: first the order of its value, then its id, counted down. So all are
different, and a larger one is a larger value or, of equal values, the lower id. A block of the row is searched for its
largest entry as long as that is larger than the least of the best, which it then replaces: at most k times a block, and in
a row in random order about k (1 + log(V / k)) times.
"""

import triton
import triton.language as tl

from .row_stats import pointers, row_start

EMPTY = tl.constexpr(-(2**31))  # below the order of every value
LAST = tl.constexpr(2**31 - 1)  # above every id


@triton.jit
def value_order(x):
    """Return integers in the order of float32 numbers: NaN is the largest, and both zeros are equal."""
    return tl.where(x == x, in_order((x + 0.0).to(tl.int32, bitcast=True)), 0x7FFFFFFF)  # -0.0 + 0.0 is 0.0


@triton.jit
def in_order(bits):
    """Convert the bits of float32 numbers to integers of the same order, or such integers to bits."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def entry_order(order, token):
    """Return one integer for an entry, from the order of its value and its id."""
    return (order.to(tl.int64) << 32) | (token ^ LAST).to(tl.int64)  # LAST - token


@triton.jit
def searched(order, v, first, best, least, bar):
    """Put what is larger in a block than the least of the best in its place. v: positions in the block, first: its first id.

    bar: the order of the value of the least. What is searched later has higher ids, so that its value has to be larger.
    """
    top = tl.max(order, 0)
    while top > bar:
        at = tl.min(tl.where(order == top, v, LAST), 0)
        best = tl.where(best == least, entry_order(top, first + at), best)
        order = tl.where(v == at, EMPTY, order)
        least = tl.min(best, 0)
        bar = (least >> 32).to(tl.int32)
        top = tl.max(order, 0)
    return best, least, bar


@triton.jit(do_not_specialize=["V", "first", "k"], do_not_specialize_on_alignment=["values", "ids"])
def top_entries(logits, values, ids, V, first, k, FRESH: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the k largest of the row and of what values and ids [rows, k] hold already; FRESH: they hold nothing yet."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    empty = entry_order(tl.full([SLOTS], EMPTY, tl.int32), slot)
    values += row * k
    ids += row * k
    if FRESH:
        best = empty
    else:
        best = entry_order(
            value_order(tl.load(values + slot, mask=slot < k, other=0.0)),
            tl.load(ids + slot, mask=slot < k, other=0).to(tl.int32),
        )
    best = tl.where(slot < k, best, 0x7FFFFFFFFFFFFFFF)
    least = tl.min(best, 0)
    bar = (least >> 32).to(tl.int32)
    start = row_start(logits, row)
    whole = V - V % BLOCK
    v = tl.arange(0, BLOCK)
    for block in range(0, whole, BLOCK):
        order = value_order(tl.load(pointers(start, logits, block + v)).to(tl.float32))
        best, least, bar = searched(order, v, first + block, best, least, bar)
    if whole < V:
        x = tl.load(pointers(start, logits, whole + v), mask=whole + v < V, other=0.0)
        order = tl.where(whole + v < V, value_order(x.to(tl.float32)), EMPTY)
        best, least, bar = searched(order, v, first + whole, best, least, bar)
    best = tl.where(slot < k, best, empty)
    for i in range(k):
        found = tl.max(best, 0)
        tl.store(values + i, in_order((found >> 32).to(tl.int32)).to(tl.float32, bitcast=True))
        tl.store(ids + i, (found & LAST) ^ LAST)
        best = tl.where(best == found, empty, best)
