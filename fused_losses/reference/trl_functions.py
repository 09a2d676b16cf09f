"""Reference implementation of functions of TRL under TRL's names, with whole tensors of log-probs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.divergences import from_key
from .common import part
from .stats import entropy_of

__all__ = ["entropy_from_logits", "generalized_jsd_loss", "selective_log_softmax", "selective_log_softmax_and_entropy"]


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Compute fl.selective_log_softmax."""
    ids = index.unsqueeze(-1) if index.dim() < logits.dim() else index
    ids = ids.long() if row_mask is None else ids.long().masked_fill(row_mask.view(ids.shape) == 0, 0)
    logps = (logits / temperature).log_softmax(-1).gather(-1, ids).view(index.shape)
    return logps if row_mask is None else torch.where(row_mask != 0, logps, 0)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute fl.selective_log_softmax_and_entropy."""
    entropy = entropy_from_logits(logits / temperature)
    entropy = entropy if row_mask is None else torch.where(row_mask != 0, entropy, 0)
    logps = selective_log_softmax(logits, index, temperature, row_mask)
    return logps, entropy if entropy_requires_grad else entropy.detach()


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Compute fl.entropy_from_logits."""
    return entropy_of(logits.log_softmax(-1))


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """Compute fl.generalized_jsd_loss (2306.13649 eq. 1)."""
    student, teacher = ((x / temperature).log_softmax(-1) for x in (student_logits, teacher_logits))
    name = "forward_kl" if beta == 0 else "reverse_kl" if beta == 1 else f"js(beta={beta})"
    each = from_key(name).define(student, teacher)
    each = each if labels is None else each[labels != -100]
    if num_items_in_batch is not None:
        return part(each.sum(), num_items_in_batch)
    if reduction == "batchmean":
        return each.sum() / max(student_logits.shape[0] if labels is None else each.numel(), 1)
    if reduction == "mean":
        return each.sum() / max(each.numel() * student_logits.shape[-1], 1)
    if reduction == "sum":
        return each.sum()
    raise ValueError(f"reduction: expected batchmean, sum or mean, got {reduction!r}")
