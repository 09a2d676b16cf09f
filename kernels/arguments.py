"""The arguments of kernels, by name: what launch.py builds, and kernels read.

Tensors are pointers inside a kernel. core/layout.py has those that are the same on every backend: Outputs, Grads, PairGrads.
"""

from typing import Any, NamedTuple


class Logits(NamedTuple):
    """Logits [rows, V] of one side and the options of its head, or the place for their gradients.

    An absent side has no pointer. (On Triton 3.6 a tuple with None inside cannot be compared with None itself.)
    """

    pointer: Any  # None: absent
    layout: Any  # of the rows, see layout.row_layout
    stride: Any  # between vocabulary entries; None: 1
    softcap: Any  # None: no softcap
    multiplier: Any  # None: 1


class Labels(NamedTuple):
    pointer: Any
    layout: Any  # see layout.row_layout; None: one after another
    ignore_index: Any
    length: Any  # of a sequence, where labels are shifted


class Fields(NamedTuple):
    """A tensor [fields, rows] of numbers of rows, such as a state."""

    pointer: Any
    stride: Any  # between fields


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


class Sequences(NamedTuple):
    """Which tokens the sequences of a batch consist of."""

    mask: Any  # [tokens]: whether a token counts
    cu_seqlens: Any  # [2 B + 1], where each starts, and the end; None: all have the same length
    tokens: Any  # number of all tokens
    length: Any  # of a sequence, without cu_seqlens


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
