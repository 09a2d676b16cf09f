"""The functions that a backend consists of. torch_backend.py, compiled.py and kernels/launch.py are the backends.

Nothing here checks arguments: the public functions do. A backend computes on the tensors that it is given; the caller allocates
all results and gradients, and a function writes every element of them unless stated otherwise. No function returns a tensor
of vocabulary size.

Letters of shapes: `rows` rows (tokens), V vocabulary entries of this call (spec.vocab; a tensor may have more columns, which
are padding), H hidden dimensions, n divergences (len(spec.divergences)), B pairs of sequences. Statistics, states and saved
numbers are float32, or float64 where the logits are (stats_dtype; torch backend only). Logits may have any strides that
layout.row_layout can describe, and any floating dtype that the backend has.

A row is ignored where its label is spec.ignore_index. Only functions with a shape [..., V] look at spec.shift; where a
shape is [rows, V] the labels are aligned already.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..core.layout import (
    NO_FACTORS,
    Grads,
    HiddenRows,
    Outputs,
    PairGrads,
    PairLossSpec,
    PairOutputs,
    RowFactors,
    StatsSpec,
)


class Backend(Protocol):
    """The functions of a backend; its module has them as attributes."""

    def check_labels(self, spec: StatsSpec, labels: Tensor) -> None:
        """Check labels of any shape, where the backend can do so without waiting for a device.

        Raise ValueError for a label out of range, or, on a device, make torch raise later. A backend that does nothing here
        gives NaN for such a row.
        """

    # ---- rows over the whole vocabulary ------------------------------------------------------------------------------

    def forward(
        self,
        spec: StatsSpec,
        policy: Tensor,
        labels: Tensor,
        ref: Tensor | None,
        out: Outputs,
        factors: RowFactors = NO_FACTORS,
    ) -> None:
        """Compute the statistics of every row; those of ignored rows are 0.

        policy, ref: logits [..., V], of the same leading shape and any dtypes. labels: [...], integers. out: the tensors
        that are wanted; ref_logps is there if ref is, divergence if there are divergences, entropy and collision as the spec
        says. factors: contiguous.
        """

    def backward(  # noqa: PLR0913 (tensors, each by its name)
        self,
        spec: StatsSpec,
        policy: Tensor,
        labels: Tensor,
        ref: Tensor | None,
        saved: Tensor,
        grads: Grads,
        d_policy: Tensor | None,
        d_ref: Tensor | None,
        factors: RowFactors = NO_FACTORS,
    ) -> None:
        """Write the gradients of logits; those of ignored rows and of columns beyond V are 0.

        The first four arguments are those of forward(), or a tile [rows, V] of them whose column 0 is the token
        spec.first. saved [saved_rows(n), rows]: contiguous, as forward() or close() wrote it. grads: each contiguous, or
        None. d_policy, d_ref: of the shape of policy and ref, of any dtype; None: not wanted. Each may be the tensor of
        logits itself, which is then overwritten.
        """

    # ---- a vocabulary in parts ---------------------------------------------------------------------------------------

    def fold(
        self, spec: StatsSpec, policy: Tensor, labels: Tensor, ref: Tensor | None, state: Tensor, fresh: bool
    ) -> None:
        """Add the logits [rows, V] of a part of the vocabulary to a state [moments.fields(powers), rows] in place.

        Column 0 is the token spec.first; labels [rows] are ids of the whole vocabulary. fresh: the state holds no sums
        yet and is overwritten. Ignored rows of the state are not changed. Shifts in a state are in the backend's unit, so
        states of different backends cannot be merged. The state may have any stride between its fields.
        """

    def merge_states(self, spec: StatsSpec, state: Tensor, other: Tensor) -> None:
        """Merge the state `other` of a disjoint part of the vocabulary into `state` in place, both [fields, rows]."""

    def close(self, spec: StatsSpec, state: Tensor, labels: Tensor, out: Outputs) -> None:
        """Compute the statistics from states over the whole vocabulary; the spec has its size, labels are [rows].

        Divergences that are sums of terms are not written, or written as 0: terms() and layout.write_divergence() do so.
        """

    def terms(self, spec: StatsSpec, policy: Tensor, labels: Tensor, ref: Tensor, saved: Tensor, sums: Tensor) -> None:
        """Add sum_v c and sum_v h of the term divergences over logits [rows, V] to sums [2 n, rows] (layout.term_rows).

        saved [saved_rows(n), rows]: as close() wrote it for the whole vocabulary. Both may have any stride between their
        rows. Other divergences, and ignored rows, are not changed.
        """

    # ---- the largest logits ------------------------------------------------------------------------------------------

    def top(self, spec: StatsSpec, logits: Tensor, values: Tensor, ids: Tensor, fresh: bool) -> None:
        """Write the k largest logits of each row, and their ids: largest first, of equal ones the lowest id first.

        logits [..., V]: a part of the vocabulary whose column 0 is the token spec.first. values [rows, k] in the dtype of
        statistics and ids [rows, k] int64 are contiguous; they hold the k largest of the columns before, or nothing yet if
        fresh. Then k <= V. NaN counts as larger than every number. Options of the head are not applied.
        """

    # ---- the unit of shifts ------------------------------------------------------------------------------------------

    def saved_log(self, x: Tensor) -> Tensor:
        """Return the logarithm of totals in the backend's unit, in which SavedRow holds it."""

    def in_nats(self, x: Tensor) -> Tensor:
        """Convert shifts, or logarithms of totals, from the backend's unit to nats."""

    def frame(self, c: Tensor, mp: Tensor, mq: Tensor) -> Tensor:
        """Compute c - (mp - mq) in nats from shifts mp and mq, without the rounding error of their difference."""

    # ---- from hidden states, without logits in memory ------------------------------------------------------------------

    def tile_states(
        self, spec: StatsSpec, policy: HiddenRows, labels: Tensor, ref: HiddenRows | None, state: Tensor
    ) -> None:
        """Write the state [fields, rows] of the part of the vocabulary that the weights have; 0 is token spec.first.

        Ignored rows keep their values. A backend without such a kernel raises NotImplementedError; the planner asks only
        Triton.
        """

    def tile_terms(
        self, spec: StatsSpec, policy: HiddenRows, labels: Tensor, ref: HiddenRows, saved: Tensor, sums: Tensor
    ) -> None:
        """Do what terms() does, from hidden states. A backend without such a kernel raises NotImplementedError."""

    # ---- preference pairs ----------------------------------------------------------------------------------------------

    def pair_forward(
        self,
        spec: PairLossSpec,
        logps: Tensor,
        ref: Tensor | None,
        mask: Tensor,
        cu_seqlens: Tensor | None,
        out: PairOutputs,
    ) -> None:
        """Compute the losses of pairs, and the log-probs and slopes of their sequences.

        logps: [tokens]. ref: [tokens], or [2 B] with spec.ref_summed. mask: bool [tokens]. cu_seqlens: integers [2 B + 1],
        or None where all sequences have the same length. All are contiguous. Sequence i of the first B is chosen, the one
        B places after it rejected.
        """

    def pair_backward(
        self,
        spec: PairLossSpec,
        grads: PairGrads,
        coef: Tensor,
        mask: Tensor,
        cu_seqlens: Tensor | None,
        d_logps: Tensor | None,
        d_ref: Tensor | None,
    ) -> None:
        """Write the gradients of logps [tokens] and of ref, of its shape; None: not wanted.

        grads: each contiguous, or None. coef: as pair_forward() wrote it. Tokens outside every packed sequence may be left as
        they are.
        """
