"""Reference implementation of distillation from a teacher, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.batch import CallOptions, read_batch, read_options
from ..core.divergences import Divergence, parse
from ..core.inputs import Source
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
    losses, count = soft * d - hard * stats.logps, stats.mask.sum().clamp(min=1)
    names = {"kl": d, "logps": stats.logps} | ({} if stats.entropy is None else {"entropy": stats.entropy})
    metrics = {name: (x.sum() / count).detach() for name, x in names.items()}
    return LossOutput(token_mean(losses, stats.mask, call, options.get("weights")), metrics, stats)


def sampled_distillation_loss(
    student: Source,
    labels: Tensor,
    teacher: Source,
    **options: Any,
) -> LossOutput:
    """Compute fl.sampled_distillation_loss."""
    batch, call = read_batch(labels, "tokens", options), read_options(options)
    stats = batch_stats(student, batch, teacher, entropy=call.entropy)
    kl, count = (stats.logps - present("teacher", stats.ref_logps)).detach(), stats.mask.sum().clamp(min=1)
    names = {"kl": kl, "logps": stats.logps} | ({} if stats.entropy is None else {"entropy": stats.entropy})
    metrics = {name: (x.sum() / count).detach() for name, x in names.items()}
    return LossOutput(token_mean(kl * stats.logps, stats.mask, call, options.get("weights")), metrics, stats)


def token_mean(losses: Tensor, mask: Tensor, call: CallOptions, weights: Tensor | None) -> Tensor:
    counts = mask.to(losses.dtype)
    if weights is not None:
        counts = torch.where(mask, weights.detach().to(losses.dtype), 0.0)
        losses = losses * counts
    if call.reduction == "none":
        return losses
    count = counts.sum() if call.num_items is None else call.num_items
    return part(torch.sum(losses), 1 if call.reduction == "sum" else count)
