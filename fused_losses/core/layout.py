"""The memory layout of rows, and the descriptions of calls that are passed to a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from .divergences import Divergence


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


class Grads(NamedTuple):
    """The gradients at the statistics of n rows. None: no gradient."""

    logps: Tensor | None = None  # [n], and so are the others
    ref_logps: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    divergence: Tensor | None = None  # [number of divergences, n]


def effective(grads: Grads, vocab: int) -> Grads:
    """Return the incoming gradients that have an effect on a logit.

    A distribution over one token is a constant: only lse depends on the logit. The other gradients are then replaced by
    None, which is exact; their terms would cancel only up to rounding.
    """
    return Grads(lse=grads.lse) if vocab == 1 else grads


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
