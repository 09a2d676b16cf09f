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


def shift_hint(got: Tensor, shape: tuple[int, ...]) -> str:
    """Return what an error says where numbers of tokens are one position too many for `shape`, or an empty string."""
    if shape and tuple(got.shape) == (*shape[:-1], shape[-1] + 1):
        return "; with shift=True the first label is not predicted: leave its number out, x[..., 1:]"
    return ""


def given_logps(name: str, source: LogProbs, mask: Tensor) -> Tensor:
    """Check precomputed log-probs for each token and return them, zero where the mask is False."""
    if source.logps.shape != mask.shape:
        raise ValueError(
            f"{name}: expected fl.LogProbs {list(mask.shape)}, one for each output token (a reference of sequences may also "
            f"have one for each sequence), got {list(source.logps.shape)}{shift_hint(source.logps, mask.shape)}"
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
