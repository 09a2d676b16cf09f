"""Check arguments that several functions take, and return the values that are read from them."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .inputs import FLOATS, LogProbs, kind_of, ordinary, positive
from .layout import stats_dtype
from .names import not_one_of
from .running_delta import RunningDelta

Count = int | float | Tensor  # the type of num_items and num_nll_tokens, which count over the whole batch


REDUCTIONS = ("mean", "sum", "none")


def check_positive(**numbers: float) -> None:
    for name, x in numbers.items():
        positive(name, x)


def check_weights(**weights: float) -> None:
    for name, x in weights.items():
        if not isinstance(x, int | float) or not 0 <= x < float("inf"):
            raise ValueError(f"{name}: expected a finite number >= 0, got {x!r}")


def check_per_sequence(name: str, x: object, count: int, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    """Check that x is a tensor [count] on the given device with one of these dtypes."""
    if not isinstance(x, Tensor) or x.dtype not in dtypes:
        kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: expected a {kinds} tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.shape != (count,) or x.device != device:
        raise ValueError(
            f"{name}: expected [{count}] on {device}, one for each sequence, got {list(x.shape)} on {x.device}"
        )


def check_reduction(reduction: str, num_items: Count | None) -> Count | None:
    """Check reduction and num_items, and return num_items as read_count() does."""
    if reduction not in REDUCTIONS:
        raise not_one_of("reduction", reduction, REDUCTIONS)
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items: only goes with reduction='mean', got reduction={reduction!r}")
    return read_count("num_items", num_items)


def read_count(name: str, x: Any) -> Count | None:
    """Return x as a number or as a 0-d tensor; None stays None.

    A tensor must have one element. Its value is not read.
    """
    if x is None or isinstance(x, int | float | Tensor):
        count = x
    elif isinstance(x, Real):
        count = float(x)  # a number of numpy
    else:
        count = torch.as_tensor(x) if hasattr(x, "__array__") else x
    if isinstance(count, Tensor) and count.numel() == 1:
        return ordinary(count).reshape(())
    if count is not None and (not isinstance(count, int | float) or not 0 <= count < float("inf")):
        got = list(count.shape) if isinstance(count, Tensor) else repr(x)
        raise ValueError(f"{name}: expected a finite number >= 0 or a tensor of one element, got {got}")
    return count


def divided(x: Tensor, count: Count) -> Tensor:
    """Compute x / count.

    If count is 0 (an empty window of gradient accumulation), the result and the gradient of x are 0, for any x and any
    incoming gradient. If count is a tensor on another device than x, the host reads it.
    """
    if isinstance(count, Tensor) and count.device != x.device and not torch.compiler.is_compiling():
        count = count.item()
    if isinstance(count, Tensor):
        count = count.to(x.device, x.dtype)
        empty = count == 0
        return x.masked_fill(empty, 0) / count.masked_fill(empty, 1)
    return x / count if count else x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0)


def check_pairs(labels: Tensor, cu_seqlens: Tensor | None, sequence_group: object = None) -> int:
    """Check that labels hold pairs of sequences and return the number of sequences.

    With sequence_group, labels are those of this rank, and the offsets cu_seqlens are those of all ranks.
    """
    if cu_seqlens is None:
        if labels.dim() != 2 or labels.shape[0] % 2:
            raise ValueError(
                f"labels: expected [2B, T], chosen rows then rejected rows (or cu_seqlens for packed), got {list(labels.shape)}"
            )
        return labels.shape[0]
    return _check_offsets(labels, cu_seqlens, sequence_group, "[2B + 1]", 2)


def check_sequences(labels: Tensor, cu_seqlens: Tensor | None, sequence_group: object = None) -> int:
    """Check the shape of labels and return the number of sequences, as check_pairs() does for pairs."""
    if cu_seqlens is not None:
        return _check_offsets(labels, cu_seqlens, sequence_group, "[S + 1]", 1)
    if labels.dim() != 2:
        raise ValueError(f"labels: expected [S, T] (or cu_seqlens for packed), got {list(labels.shape)}")
    return labels.shape[0]


def _check_offsets(labels: Tensor, cu_seqlens: Tensor, sequence_group: object, shape: str, each: int) -> int:
    if labels.dim() != 1:
        raise ValueError(f"labels: expected packed labels [total] with cu_seqlens, got {list(labels.shape)}")
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"cu_seqlens: expected an int32 or int64 tensor, got {getattr(cu_seqlens, 'dtype', type(cu_seqlens))}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0 or (cu_seqlens.numel() - 1) % each:
        raise ValueError(f"cu_seqlens: expected {shape} offsets, got {list(cu_seqlens.shape)}")
    if cu_seqlens.device != labels.device:
        raise ValueError(f"cu_seqlens: expected on {labels.device} as the labels are, got {cu_seqlens.device}")
    if cu_seqlens.is_cpu and not torch.compiler.is_compiling():
        end = labels.numel() if sequence_group is None else int(cu_seqlens[-1])  # span_of() checks it
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != end or (cu_seqlens.diff() < 0).any():
            raise ValueError(f"cu_seqlens: expected offsets rising from 0 to {end}, got {cu_seqlens.tolist()}")
    return cu_seqlens.numel() - 1


def shift_hint(got: Tensor, shape: tuple[int, ...]) -> str:
    """Return what an error says where numbers of tokens are one position too many for `shape`, or an empty string."""
    if shape and tuple(got.shape) == (*shape[:-1], shape[-1] + 1):
        return "; with shift=True the first label is not predicted: leave its number out, x[..., 1:]"
    return ""


def given_logps(name: str, source: LogProbs, mask: Tensor) -> Tensor:
    """Check precomputed log-probs for each token and return them, zero where the mask is False."""
    if source.logps.shape != mask.shape:
        raise ValueError(
            f"{name}: expected fl.LogProbs {list(mask.shape)}, one for each output token, got {list(source.logps.shape)}"
            f"{shift_hint(source.logps, mask.shape)}"
        )
    if source.logps.device != mask.device:
        raise ValueError(f"{name}: expected fl.LogProbs on {mask.device} as the labels are, got {source.logps.device}")
    return source.logps.to(stats_dtype(source.logps)).masked_fill(~mask, 0)  # sums in bfloat16 stop growing


def check_constant(name: str, x: Tensor | float) -> Tensor | float:
    """Check that x is a number or a 0-d tensor, and return it detached from its graph."""
    if isinstance(x, Tensor):
        if x.dim() != 0 or x.dtype not in FLOATS:
            raise ValueError(f"{name}: expected a number or a 0-d float tensor, got {x.dtype} {list(x.shape)}")
        return x.detach()
    if not isinstance(x, int | float) or x != x or abs(x) == float("inf"):
        got = repr(x) if isinstance(x, int | float) else kind_of(x, RunningDelta)
        raise ValueError(f"{name}: expected a finite number or a 0-d tensor, got {got}")
    return x
