"""Reference implementation of distillation from the K best tokens of a teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.divergences import Divergence, from_key
from ..core.inputs import Source, as_source, check_labels
from ..core.layout import shift_packed
from ..core.options import check_teacher, check_topk
from ..core.outputs import LossOutput
from ..core.validation import Count
from .distillation import token_mean
from .stats import token_stats, transformed

__all__ = ["topk_distillation_loss"]


def topk_distillation_loss(
    student: Source, labels: Tensor, topk_logps: Tensor, topk_ids: Tensor, *, tail: str = "bucket",
    divergence: str | Divergence = "forward_kl", soft: float = 1.0, hard: float = 0.0, reduction: str = "mean",
    num_items: Count | None = None, cu_seqlens: Tensor | None = None, shift: bool = False, ignore_index: int = -100,
    entropy: bool = False, **_: Any,
) -> LossOutput:  # fmt: skip
    """Compute fl.topk_distillation_loss from all log-probs of the student, one token after another."""
    labels, d = check_labels(labels), from_key(divergence)
    check_topk(tail, d)
    if shift and cu_seqlens is not None:
        labels, shift = shift_packed(labels, cu_seqlens, ignore_index), False
    stats = token_stats(student, labels, shift=shift, ignore_index=ignore_index, entropy=entropy)
    check_teacher(topk_logps, topk_ids, stats.mask)
    every = transformed(as_source("student", student)).log_softmax(-1)  # type: ignore[arg-type]
    every = every[..., :-1, :] if shift else every
    rows = zip(
        every[stats.mask], topk_ids[stats.mask].long(), topk_logps[stats.mask].detach().to(every.dtype), strict=True
    )
    tokens, masses = [], []
    for log_p, ids, log_q in rows:
        ids, log_q = ids[log_q != -torch.inf], log_q[log_q != -torch.inf]
        p, q = log_p[ids], log_q
        if tail == "bucket":
            others = torch.ones_like(log_p, dtype=torch.bool).index_fill(0, ids, False)
            rest = torch.log(-torch.expm1(q.logsumexp(0).clamp(max=0)))  # 1 - sum_k q_k
            p, q = torch.cat([p, log_p[others].logsumexp(0, keepdim=True)]), torch.cat([q, rest[None]])
        elif tail == "renormalise":
            p, q = p.log_softmax(0), q.log_softmax(0)
        tokens.append(d.define(p, q))
        masses.append(log_p[ids].exp().sum())
    kl = torch.zeros_like(stats.logps)
    kl = kl.masked_scatter(stats.mask, torch.stack(tokens)) if tokens else kl
    mass = torch.zeros_like(kl).masked_scatter(stats.mask, torch.stack(masses)) if masses else kl
    losses, count = soft * kl - hard * stats.logps, stats.mask.sum().clamp(min=1)
    numbers = {"kl": kl, "topk_mass": mass, "logps": stats.logps}
    numbers |= {} if stats.entropy is None else {"entropy": stats.entropy}
    metrics = {name: (x.sum() / count).detach() for name, x in numbers.items()}
    return LossOutput(token_mean(losses, count, reduction, num_items), metrics, stats)
