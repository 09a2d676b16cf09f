"""The arguments of kernels, by name: what launch.py builds, and kernels read.

Tensors are pointers inside a kernel. core/layout.py has those that are the same on every backend, as Outputs.

Triton compiles a kernel again for an integer that is 1, for one that is a multiple of 16, and for a pointer to an address that
is one. A kernel can decline that for its arguments, but not for the fields of a structure. So what changes with the batch is an
argument of its own, or is passed as odd(n).
"""

from typing import Any, NamedTuple


def odd(n: int) -> int:
    """Return 2 n + 3, which Triton does not compile again for; row_stats.number takes n >= 0 back."""
    return 2 * n + 3


class RowLayout(NamedTuple):
    """Where the rows of logits begin: row i at (i // size) * stride + (i % size) * inner_stride. Each number is odd()."""

    stride: Any
    inner_stride: Any
    size: Any  # None: row i is at i * stride
    aligned: Any  # 1: strides are given in units of 16 bytes; None: in elements
    peeled: Any  # 1: the policy's rows are not aligned, and these are as far from the next aligned address as they are


class Logits(NamedTuple):
    """Logits [rows, V] of one side and the options of its head, or the place for their gradients.

    An absent side has no pointer. (On Triton 3.6 a tuple with None inside cannot be compared with None itself.)
    """

    pointer: Any  # None: absent
    layout: Any  # RowLayout
    stride: Any  # between vocabulary entries, odd(); None: 1
    softcap: Any  # None: no softcap
    multiplier: Any  # None: 1
    factors: Any = None  # [rows], each a factor beside the multiplier, which is then not None; None: 1


class LowRankRows(NamedTuple):
    """A low-rank addition to logits: scaling * product b^T."""

    product: Any  # [rows, rank]
    product_stride: Any
    b: Any  # [V, rank]
    b_stride: Any
    rank: Any
    scaling: Any


class Hidden(NamedTuple):
    """The tensors that the logits of one side are computed from, and the options of its head."""

    x: Any  # [rows, width]; None: this side is absent
    x_stride: Any
    weight: Any  # [V, width]
    weight_stride: Any
    width: Any
    bias: Any  # [V], or None
    low_rank: Any  # LowRankRows, or None
    softcap: Any
    multiplier: Any


class Numbers(NamedTuple):
    """The numbers of divergences: the parameters and the degree of each, and the distinct powers that they need."""

    params: tuple
    powers: tuple
    degrees: tuple


class Formulas(NamedTuple):
    """The compiled formulas of each divergence, as in divergences.Divergence; None where it has no such formula."""

    row: tuple
    term: tuple
    grad_p: tuple
    grad_q: tuple
    power: tuple  # the index of its power among Numbers.powers; -1: it needs none


class Wanted(NamedTuple):
    """Which sums are needed besides those of the exponentials."""

    entropy: Any
    collision: Any
    moments: Any  # those of the differences of both sides


class Steps(NamedTuple):
    """How a kernel loops over a row: a step is [unroll, lanes] vocabulary entries."""

    unroll: int
    lanes: int
    stages: int


class TileShape(NamedTuple):
    """How a kernel with products loops: over tiles of [rows, columns] logits, each in steps of depth hidden dimensions."""

    rows: int
    columns: int
    depth: int
    stages: int
