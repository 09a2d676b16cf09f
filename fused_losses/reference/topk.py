"""Distillation from the K best tokens of a teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..divergences import Divergence, from_key
from ..layout import shift_packed
from ..losses.common import Count, LossOutput
from ..losses.topk import check_teacher, check_topk
from ..sources import Source, as_source, check_labels
from .distillation import token_mean
from .stats import token_stats, transformed

__all__ = ["topk_distillation_loss"]


def topk_distillation_loss(
    student: Source, labels: Tensor, topk_logps: Tensor, topk_ids: Tensor, *, tail: str = "bucket",
    divergence: str | Divergence = "forward_kl", soft: float = 1.0, hard: float = 0.0, reduction: str = "mean",
    num_items: Count | None = None, cu_seqlens: Tensor | None = None, shift: bool = False, ignore_index: int = -100,
    entropy: bool = False, **_: Any,
) -> LossOutput:  # fmt: skip
    """fl.topk_distillation_loss, from all probabilities of the student."""
    labels, d = check_labels(labels), from_key(divergence)
    check_topk(tail, d)
    if shift and cu_seqlens is not None:
        labels, shift = shift_packed(labels, cu_seqlens, ignore_index), False
    stats = token_stats(student, labels, shift=shift, ignore_index=ignore_index, entropy=entropy)
    check_teacher(topk_logps, topk_ids, stats.mask)
    every = transformed(as_source("student", student)).softmax(-1)  # type: ignore[arg-type]
    every = every[..., :-1, :] if shift else every
    there = stats.mask.unsqueeze(-1) & (topk_logps > -torch.inf)
    p = torch.where(there, every.gather(-1, topk_ids.long().masked_fill(~there, 0)), 0)
    q = torch.where(there, topk_logps.detach().to(p.dtype), -torch.inf).exp()
    mass = p.sum(-1, keepdim=True)
    if tail == "bucket":
        rest = [(1 - x.sum(-1, keepdim=True)).clamp(min=0) for x in (p, q)]
        parts = [torch.cat(both, dim=-1) for both in zip((p, q), rest, strict=True)]
    else:
        totals = (mass, q.sum(-1, keepdim=True)) if tail == "renormalise" else (torch.ones_like(mass),) * 2
        parts = [x / total.where(total > 0, 1) for x, total in zip((p, q), totals, strict=True)]
    entries = torch.cat([there, torch.ones_like(there[..., :1])], dim=-1) if tail == "bucket" else there
    rows = zip(*(x[stats.mask] for x in (*parts, entries)), strict=True)
    tokens = [d.define(p[those], q[those]) for p, q, those in rows]  # entries that are not there have no slope either
    kl = torch.zeros_like(stats.logps)
    kl = kl.masked_scatter(stats.mask, torch.stack(tokens)) if tokens else kl
    losses, count = soft * kl - hard * stats.logps, stats.mask.sum().clamp(min=1)
    numbers = {"kl": kl, "topk_mass": mass.squeeze(-1), "logps": stats.logps}
    numbers |= {} if stats.entropy is None else {"entropy": stats.entropy}
    metrics = {name: (x.sum() / count).detach() for name, x in numbers.items()}
    return LossOutput(token_mean(losses, count, reduction, num_items), metrics, stats)
