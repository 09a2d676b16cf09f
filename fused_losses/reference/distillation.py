"""Reference implementation of distillation from a teacher, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.batch import CallOptions, read_batch, read_options
from ..core.divergences import Divergence, parse
from ..core.inputs import Source, TokenStats
from ..core.names import present
from ..core.outputs import LossOutput
from .common import part
from .stats import batch_stats

__all__ = ["distillation_loss", "sampled_distillation_loss"]


def distillation_loss(
    student: Source,
    labels: Tensor,
    teacher: Source,
    *,
    divergence: str | Divergence | None = None,
    beta: float = 0.5,
    soft: float = 1.0,
    hard: float = 0.0,
    **options: Any,
) -> LossOutput:
    """Compute fl.distillation_loss."""
    if divergence is None:
        divergence = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, f"js(beta={beta})")
    batch, call = read_batch(labels, "tokens", options), read_options(options)
    stats = batch_stats(student, batch, teacher, parse(divergence), entropy=call.entropy)
    (d,) = stats.divergence.values()
    return token_output(soft * d - hard * stats.logps, stats, call, options, kl=d)


def sampled_distillation_loss(
    student: Source,
    labels: Tensor,
    teacher: Source,
    **options: Any,
) -> LossOutput:
    """Compute fl.sampled_distillation_loss."""
    batch, call = read_batch(labels, "tokens", options), read_options(options)
    stats = batch_stats(student, batch, teacher, entropy=call.entropy)
    kl = (stats.logps - present("teacher", stats.ref_logps)).detach()
    return token_output(kl * stats.logps, stats, call, options, kl=kl)


def token_output(
    losses: Tensor, stats: TokenStats, call: CallOptions, options: dict[str, Any], **numbers: Tensor
) -> LossOutput:
    """Return the result of a loss of tokens, whose metrics are the means of numbers of the tokens, 0 where not counted."""
    numbers |= {"logps": stats.logps} | ({} if stats.entropy is None else {"entropy": stats.entropy})
    metrics = {name: (x.sum() / stats.mask.sum().clamp(min=1)).detach() for name, x in numbers.items()}
    return LossOutput(token_mean(losses, stats.mask, call, options.get("weights")), metrics, stats)


def token_mean(losses: Tensor, mask: Tensor, call: CallOptions, weights: Tensor | None) -> Tensor:
    counts = mask.to(losses.dtype)
    if weights is not None:
        counts = torch.where(mask, weights.detach().to(losses.dtype), 0.0)
        losses = losses * counts
    if call.reduction == "none":
        return losses
    count = counts.sum() if call.num_items is None else call.num_items
    return part(torch.sum(losses), 1 if call.reduction == "sum" else count)
