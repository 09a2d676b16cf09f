"""Reference implementation of distillation from a teacher, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.divergences import Divergence
from ..core.inputs import Source, check_labels
from ..core.outputs import LossOutput
from ..core.validation import Count
from .common import part
from .stats import token_stats

__all__ = ["distillation_loss", "sampled_distillation_loss"]


def distillation_loss(
    student: Source, labels: Tensor, teacher: Source, *, divergence: str | Divergence | None = None, beta: float = 0.5,
    soft: float = 1.0, hard: float = 0.0, reduction: str = "mean", num_items: Count | None = None, shift: bool = False,
    ignore_index: int = -100, entropy: bool = False, **_: Any,
) -> LossOutput:  # fmt: skip
    """Compute fl.distillation_loss."""
    if divergence is None:
        divergence = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, f"js(beta={beta})")
    given = {"shift": shift, "ignore_index": ignore_index, "entropy": entropy}
    stats = token_stats(student, check_labels(labels), teacher, divergence=divergence, **given)  # type: ignore[arg-type]
    (d,) = stats.divergence.values()
    losses, count = soft * d - hard * stats.logps, stats.mask.sum().clamp(min=1)
    names = {"kl": d, "logps": stats.logps} | ({} if stats.entropy is None else {"entropy": stats.entropy})
    metrics = {name: (x.sum() / count).detach() for name, x in names.items()}
    return LossOutput(token_mean(losses, count, reduction, num_items), metrics, stats)


def sampled_distillation_loss(
    student: Source, labels: Tensor, teacher: Source, *, reduction: str = "mean", num_items: Count | None = None,
    shift: bool = False, ignore_index: int = -100, entropy: bool = False, **_: Any,
) -> LossOutput:  # fmt: skip
    """Compute fl.sampled_distillation_loss."""
    stats = token_stats(student, check_labels(labels), teacher, shift=shift, ignore_index=ignore_index, entropy=entropy)
    assert stats.ref_logps is not None
    kl, count = (stats.logps - stats.ref_logps).detach(), stats.mask.sum().clamp(min=1)
    names = {"kl": kl, "logps": stats.logps} | ({} if stats.entropy is None else {"entropy": stats.entropy})
    metrics = {name: (x.sum() / count).detach() for name, x in names.items()}
    return LossOutput(token_mean(kl * stats.logps, count, reduction, num_items), metrics, stats)


def token_mean(losses: Tensor, count: Tensor, reduction: str, num_items: Count | None) -> Tensor:
    if reduction == "none":
        return losses
    return part(torch.sum(losses), 1 if reduction == "sum" else count if num_items is None else num_items)
