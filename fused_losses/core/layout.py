"""The memory layout of rows, and what a backend is given: what is asked for (a spec), and tensors by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from .divergences import Divergence
from .elementwise import HUGE, INF

BLOCK_BYTES = 1 << 20  # size of one temporary of the torch backend: about ten of them fit in a processor's cache


def stats_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the statistics of x: float64 if x is float64, otherwise float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class StatsSpec(NamedTuple):
    """What token_stats is asked for: all arguments of a call that are not tensors and do not say how to compute it."""

    divergences: tuple[Divergence, ...]
    entropy: bool
    collision: bool
    shift: bool
    ignore_index: int
    vocab: int  # valid columns, the same on both sides
    softcap: float = 0.0  # 0.0: no softcap
    multiplier: float = 1.0  # scale / temperature
    ref_softcap: float = 0.0
    ref_multiplier: float = 1.0
    first: int = 0  # the token id of column 0; it can differ from 0 for a slice of the vocabulary


SymInt = Annotated[int, "SymInt"]  # an int that torch.compile may keep as a symbol


class PairLossSpec(NamedTuple):
    """What pair_loss is asked for: all arguments of a call that are not tensors and do not say how to compute it."""

    divergence: Divergence
    term: Callable  # the loss as a formula of the margin: (margin, *term_params) -> loss, dloss/dmargin
    term_params: tuple[float, ...]
    beta: float
    sequences: SymInt  # 2 B
    ref_summed: bool  # reference log-probs are given as one per sequence


class SavedRow(NamedTuple):
    """The numbers of a row that backward needs, in the order of the first rows of `saved`; moments.py has their formulas.

    Shifts and logarithms of sums are in the backend's unit. After these rows, `saved` has two for each divergence: see
    slope_rows().
    """

    shift_p: Any  # m_p
    log_sum_p: Any  # log A
    shift_q: Any  # m_q
    log_sum_q: Any  # log B
    center: Any  # c
    log_mean: Any  # K
    entropy: Any  # 0 where it was not asked for, or is infinite


SAVED_FIELDS = len(SavedRow._fields)


def saved_rows(divergences: int) -> int:
    """Return the number of rows of `saved` for as many divergences."""
    return SAVED_FIELDS + 2 * divergences


def slope_rows(i: int) -> tuple[int, int]:
    """Return the rows of `saved` that hold sum_v h and sum_v k of divergence i."""
    return SAVED_FIELDS + 2 * i, SAVED_FIELDS + 2 * i + 1


def term_rows(i: int) -> tuple[int, int]:
    """Return the rows of the sums [2 n, rows] of a second sweep that hold sum_v c and sum_v h of divergence i."""
    return 2 * i, 2 * i + 1


def saved_row(saved: Tensor) -> SavedRow:
    """Return the first rows of `saved` by name, as views."""
    return SavedRow(*(saved[i] for i in range(SAVED_FIELDS)))


class Outputs(NamedTuple):
    """The statistics of rows [rows], those of divergences [n, rows]; those not asked for are None.

    saved: [saved_rows(n), rows], what backward needs.
    """

    logps: Tensor
    ref_logps: Tensor | None
    lse: Tensor
    entropy: Tensor | None
    divergence: Tensor | None
    hit: Tensor  # bool: the label has the largest logit
    collision: Tensor | None  # log sum p^2
    saved: Tensor


class RowFactors(NamedTuple):
    """The factors [rows] on the logits of each row, beside the multiplier of the spec, in their stats_dtype. None: 1."""

    policy: Tensor | None = None
    ref: Tensor | None = None


NO_FACTORS = RowFactors()


class Grads(NamedTuple):
    """The incoming gradients of the outputs [rows], that of divergences [n, rows]. None: no gradient."""

    logps: Tensor | None = None
    ref_logps: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    divergence: Tensor | None = None


class PairOutputs(NamedTuple):
    """The results of a preference batch: losses [B], and for each sequence [2B] the log-probs and the loss's slope."""

    losses: Tensor
    seq_logps: Tensor
    seq_ref: Tensor
    coef: Tensor  # d loss / dh, h = sum log p - sum log q


class PairGrads(NamedTuple):
    """The incoming gradients of losses [B], and of the sequences' log-probs of both models [2B]. None: no gradient."""

    losses: Tensor | None = None
    seq_logps: Tensor | None = None
    seq_ref: Tensor | None = None


class LowRankRows(NamedTuple):
    """A low-rank addition to the logits: scaling * product b^T."""

    product: Tensor  # x a^T [rows, rank]
    b: Tensor  # [V, rank]
    scaling: float


class HiddenRows(NamedTuple):
    """The tensors that the logits of one side are computed from, the last dimension of each contiguous."""

    x: Tensor  # [rows, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    low_rank: LowRankRows | None


def effective(grads: Grads, vocab: int) -> Grads:
    """Return the incoming gradients that have an effect on a logit.

    A distribution over one token is a constant: only lse depends on the logit. The other gradients are then replaced by
    None, which is exact; their terms would cancel only up to rounding.
    """
    return Grads(lse=grads.lse) if vocab == 1 else grads


def finite(x: Tensor) -> Tensor:
    """Return x with 0 where it is infinite: the slope of an infinite value is left out of the gradient."""
    return x.masked_fill(x.isinf(), 0)


def write_divergence(spec: StatsSpec, i: int, value: Tensor, slope: Tensor, rows: Tensor | slice, out: Outputs) -> None:
    """Write divergence i of some rows, and the sums sum_v h (slope) and sum_v k that backward needs."""
    if out.ref_logps is None or out.divergence is None:
        raise AssertionError("a divergence has no place in these outputs")
    empty = (out.logps[rows] + out.ref_logps[rows]).isnan()  # no token on one side
    value = value.clamp(min=0).masked_fill(value > HUGE, INF)
    ref_slope = finite(spec.divergences[i].degree * value) - finite(slope)
    out.divergence[i, rows] = value.masked_fill(empty, float("nan"))
    for at, total in zip(slope_rows(i), (finite(slope), ref_slope), strict=True):
        out.saved[at, rows] = total.masked_fill(empty, 0)


def shifted_labels(labels: Tensor, shift: bool, ignore_index: int) -> Tensor:
    """Return the label that each position predicts; the last position gets ignore_index."""
    if not shift or labels.shape[-1] == 0:
        return labels
    return torch.cat([labels[..., 1:], labels.new_full((*labels.shape[:-1], 1), ignore_index)], dim=-1)


def shift_packed(labels: Tensor, cu_seqlens: Tensor, ignore_index: int) -> Tensor:
    """Return the label of the next token within each packed sequence; the last token gets ignore_index."""
    if labels.numel() == 0:
        return labels
    # An empty sequence marks the end of the sequence before it again; one at the start marks the last token, also an end.
    ends = (cu_seqlens[1:].long() - 1) % labels.numel()
    return labels.roll(-1).index_fill_(0, ends, ignore_index)


def sequence_sums(x: Tensor, mask: Tensor, sequences: int, cu_seqlens: Tensor | None) -> Tensor:
    """Return the sums [S] of x [n] over the tokens of each sequence that count.

    sequences: their number S. cu_seqlens: the offsets [S + 1] of packed sequences; None: they are of equal length.
    """
    x = x.masked_fill(~mask, 0)
    if cu_seqlens is None:
        return x.view(sequences, len(x) // max(1, sequences)).sum(1)
    # unsafe: the offsets were checked when the batch was read
    return torch.segment_reduce(x, "sum", offsets=cu_seqlens.long(), initial=0.0, unsafe=True)


def spread_sequences(x: Tensor, tokens: int, cu_seqlens: Tensor | None) -> Tensor:
    """Return x [S] repeated [tokens]: each token gets the number of its sequence."""
    if cu_seqlens is None:
        return x[:, None].expand(-1, tokens // max(1, len(x))).reshape(-1)
    return x.repeat_interleave(cu_seqlens.diff().long(), output_size=tokens)


def collapse(x: Tensor, trailing: int) -> list[tuple[int, int]]:
    """Return (size, stride) of the leading dimensions, merged as far as the strides allow without a copy."""
    lead = x.dim() - trailing
    dims: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:lead], x.stride()[:lead], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    return dims


def _outer_inner(x: Tensor, trailing: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (size, stride) of an outer and of an inner dimension that together index the rows."""
    dims = collapse(x, trailing)
    if len(dims) > 2:
        raise AssertionError(f"rows of {tuple(x.shape)} with strides {x.stride()} do not lie on two strides")
    dims = [(1, 0)] * (2 - len(dims)) + dims
    return dims[0], dims[1]


def row_layout(x: Tensor, trailing: int) -> tuple[int, int, int]:
    """Return (inner size, outer stride, inner stride) of the rows.

    Row i is at offset (i // inner size) * outer stride + (i % inner size) * inner stride. Rows on one stride give
    (1, stride, 0), without the number of rows: Triton would compile again for numbers with another divisibility.
    """
    outer, inner = _outer_inner(x, trailing)
    return (1, inner[1], 0) if outer[0] == 1 else (inner[0], outer[1], inner[1])


def rows_view(x: Tensor, trailing: int) -> Tensor:
    """Return x as a view [outer, inner, *trailing dimensions]."""
    outer, inner = _outer_inner(x, trailing)
    lead = x.dim() - trailing
    return x.as_strided(
        (outer[0], inner[0], *x.shape[lead:]), (outer[1], inner[1], *x.stride()[lead:]), x.storage_offset()
    )


def labels_mask(labels: Tensor, shift: bool, ignore_index: int) -> Tensor:
    return (labels[..., 1:] if shift else labels) != ignore_index
