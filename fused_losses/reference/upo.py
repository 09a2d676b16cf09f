"""Reference implementation of UPO, a preference loss with advantage-weighted log-likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.batch import read_batch, read_options
from ..core.elementwise import LARGEST
from ..core.inputs import Source
from ..core.options import check_advantages
from ..core.outputs import LossOutput
from ..core.validation import Count
from .common import cut, joined, reduced
from .preference import preference_loss

__all__ = ["expectile_loss", "upo_loss"]


def upo_loss(
    policy: Source,
    labels: Tensor,
    ref: Source | None,
    advantages: Tensor | tuple[Tensor, Tensor],
    *,
    loss_type: str | Sequence[str] | Callable[..., LossOutput] = "sigmoid",
    tau: float = 1.0,
    weight: float = 1.0,
    clip: float | None = None,
    **options: Any,
) -> LossOutput:
    """Compute fl.upo_loss, one sequence after another.

    `loss_type` is a name, or another reference implementation.
    """
    batch, call = read_batch(labels, "sequences", options), read_options(options)
    base = loss_type if callable(loss_type) else partial(preference_loss, loss_type=loss_type)
    out = base(policy, labels, ref=ref, **{**options, "reduction": "none", "num_items": None})
    stats, sequences = cut(policy, batch)
    a = check_advantages(advantages, batch)
    highest = LARGEST if clip is None else math.log(clip)
    w = [math.exp(min(x / tau, highest)) for x in a.tolist()]
    nll = [-s.log_p for s in sequences]
    terms = [weight * x * y for x, y in zip(w, nll, strict=True)]
    if len(out.loss) != len(sequences):
        terms = [(x + y) / 2 for x, y in zip(terms[: len(sequences) // 2], terms[len(sequences) // 2 :], strict=True)]
    count = max(len(sequences), 1)
    means = {"advantages": a.sum() / count, "weights": a.new_tensor(sum(w)) / count}
    means["nll"] = joined(nll, stats).detach().sum() / count
    return LossOutput(
        reduced(out.loss + joined(terms, stats), call.reduction, call.num_items), out.metrics | means, out.stats
    )


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
