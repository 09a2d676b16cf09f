"""Reference implementation of UPO, a preference loss with advantage-weighted log-likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.inputs import Source, check_labels
from ..core.options import LARGEST, check_advantages
from ..core.outputs import LossOutput
from ..core.validation import Count, check_reduction
from .common import cut, joined, reduced
from .preference import preference_loss

__all__ = ["expectile_loss", "upo_loss"]


def upo_loss(
    policy: Source, labels: Tensor, ref: Source | None, advantages: Tensor | tuple[Tensor, Tensor], *,
    base: str | Sequence[str] | Callable[..., LossOutput] = "sigmoid", tau: float = 1.0, weight: float = 1.0,
    clip: float | None = None, reduction: str = "mean", num_items: Count | None = None,
    cu_seqlens: Tensor | None = None, **options: Any,
) -> LossOutput:  # fmt: skip
    """Compute fl.upo_loss, one sequence after another.

    `base` is a name, or another reference implementation.
    """
    check_reduction(reduction, num_items)
    call = base if callable(base) else partial(preference_loss, loss=base)
    out = call(policy, labels, ref=ref, cu_seqlens=cu_seqlens, reduction="none", **options)
    batch = {name: options[name] for name in ("shift", "ignore_index") if name in options}
    stats, every = cut(policy, labels, cu_seqlens=cu_seqlens, **batch)
    a = check_advantages(advantages, len(every), check_labels(labels).device)
    highest = LARGEST if clip is None else math.log(clip)
    w = [math.exp(min(x / tau, highest)) for x in a.tolist()]
    nll = [-s.log_p for s in every]
    terms = [weight * x * y for x, y in zip(w, nll, strict=True)]
    if len(out.loss) != len(every):
        terms = [(x + y) / 2 for x, y in zip(terms[: len(every) // 2], terms[len(every) // 2 :], strict=True)]
    count = max(len(every), 1)
    means = {"advantages": a.sum() / count, "weights": a.new_tensor(sum(w)) / count}
    means["nll"] = joined(nll, stats).detach().sum() / count
    return LossOutput(reduced(out.loss + joined(terms, stats), reduction, num_items), out.metrics | means, out.stats)


def expectile_loss(
    rewards: Tensor,
    values: Tensor,
    q: float = 0.7,
    *,
    reduction: str = "mean",
    num_items: Count | None = None,
) -> Tensor:
    """Compute fl.expectile_loss, |q - 1(R - V < 0)| (R - V)^2."""
    off = rewards.detach() - values
    return reduced((q - (off < 0).to(off.dtype)).abs() * torch.pow(off, 2), reduction, num_items)
