"""How rows lie in memory, and the description of one token_stats problem that ops hand to a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import Divergence


def stats_dtype(x: Tensor) -> torch.dtype:
    """Statistics are float32, or float64 for float64 logits."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Problem(NamedTuple):
    """Everything about a token_stats call that is not a tensor."""

    divergences: tuple[Divergence, ...]
    entropy: bool
    collision: bool
    shift: bool
    ignore_index: int
    vocab: int  # valid columns, the same on both sides
    softcap: float  # 0.0: none
    multiplier: float  # scale / temperature
    ref_softcap: float
    ref_multiplier: float
    first: int = 0  # the token that column 0 stands for: not 0 in a slice of the vocabulary


class PairProblem(NamedTuple):
    """Everything about a pair_loss call that is not a tensor."""

    divergence: Divergence
    term: Callable  # the loss as a formula of the margin: (margin, *term_params) -> loss, dloss/dmargin
    term_params: tuple[float, ...]
    beta: float
    sequences: int  # 2 B
    ref_summed: bool  # reference log-probs come one per sequence


Grads = tuple[Tensor | None, ...]  # to logps, ref_logps, lse, entropy [n], divergences [n_div, n]; None: none


def effective(grads: Grads, vocab: int) -> Grads:
    """Those of the incoming gradients that reach a logit. A distribution over one token is a constant, of which only lse moves:
    exactly so, while sums of terms that cancel would be rounded."""
    return (None, None, grads[2], None, None) if vocab == 1 else grads


def shifted_labels(labels: Tensor, shift: bool, ignore_index: int) -> Tensor:
    """The label that each position predicts; none at the last."""
    if not shift or labels.shape[-1] == 0:
        return labels
    return torch.cat([labels[..., 1:], labels.new_full((*labels.shape[:-1], 1), ignore_index)], dim=-1)


def shift_packed(labels: Tensor, cu_seqlens: Tensor, ignore_index: int) -> Tensor:
    """The next token's label inside each sequence; none at its end."""
    if labels.numel() == 0:
        return labels
    # An empty sequence marks its predecessor's end once more; one at the very start, the last token, which ends a sequence.
    ends = (cu_seqlens[1:].long() - 1) % labels.numel()
    return labels.roll(-1).index_fill_(0, ends, ignore_index)


def collapse(x: Tensor, trailing: int) -> list[tuple[int, int]]:
    """(size, stride) of the leading dimensions, merged as far as the strides allow without a copy."""
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
    """(size, stride) of an outer and an inner dimension that hold the rows between them."""
    dims = collapse(x, trailing)
    if len(dims) > 2:
        raise AssertionError(f"rows of {tuple(x.shape)} with strides {x.stride()} do not lie on two strides")
    dims = [(1, 0)] * (2 - len(dims)) + dims
    return dims[0], dims[1]


def row_layout(x: Tensor, trailing: int) -> tuple[int, int, int]:
    """(inner size, outer stride, inner stride): row i lies at (i // inner) * outer + (i % inner) * inner stride.

    Rows on one stride are (1, stride, 0): the row count stays out of it, for Triton would compile anew for counts of
    another divisibility.
    """
    outer, inner = _outer_inner(x, trailing)
    return (1, inner[1], 0) if outer[0] == 1 else (inner[0], outer[1], inner[1])


def rows_view(x: Tensor, trailing: int) -> Tensor:
    """x as [outer, inner, *trailing], a view."""
    outer, inner = _outer_inner(x, trailing)
    lead = x.dim() - trailing
    return x.as_strided(
        (outer[0], inner[0], *x.shape[lead:]), (outer[1], inner[1], *x.stride()[lead:]), x.storage_offset()
    )  # fmt: skip


def labels_mask(labels: Tensor, shift: bool, ignore_index: int) -> Tensor:
    return (labels[..., 1:] if shift else labels) != ignore_index
