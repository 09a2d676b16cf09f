"""Reference implementation of topk, and of distillation from the K best tokens of a teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.batch import read_batch, read_options
from ..core.divergences import Divergence, from_key
from ..core.inputs import Logits, LogProbs, Source, as_source
from ..core.options import check_teacher, check_topk
from ..core.outputs import LossOutput, TopK
from .distillation import token_output
from .stats import batch_stats, projected, transformed

__all__ = ["topk", "topk_distillation_loss"]


def topk(policy: Source, k: int, *, log_probs: bool = False, workspace: int | None = None) -> TopK:
    """Compute fl.topk from all logits of each position, sorted. The values have gradients. workspace is ignored."""
    source = as_source("policy", policy)
    if isinstance(source, LogProbs):
        raise ValueError("policy: fl.LogProbs has no logits; expected fl.Hidden or logits")
    z = source.logits if isinstance(source, Logits) else projected(source)
    ids = z[..., : source.vocab].sort(dim=-1, descending=True, stable=True).indices[..., :k]
    values = transformed(source)
    return TopK((values.log_softmax(-1) if log_probs else values).gather(-1, ids), ids)


def topk_distillation_loss(
    student: Source,
    labels: Tensor,
    topk_logps: Tensor,
    topk_ids: Tensor,
    *,
    tail: str = "bucket",
    divergence: str | Divergence = "forward_kl",
    soft: float = 1.0,
    hard: float = 0.0,
    **options: Any,
) -> LossOutput:
    """Compute fl.topk_distillation_loss from all log-probs of the student, one token after another."""
    batch, call, d = read_batch(labels, "tokens", options), read_options(options), from_key(divergence)
    check_topk(tail, d)
    stats = batch_stats(student, batch, entropy=call.entropy)
    check_teacher(topk_logps, topk_ids, stats.mask)
    all_logps = transformed(as_source("student", student)).log_softmax(-1)  # type: ignore[arg-type]
    all_logps = all_logps[..., :-1, :] if batch.shift else all_logps
    rows = zip(
        all_logps[stats.mask],
        topk_ids[stats.mask].long(),
        topk_logps[stats.mask].detach().to(all_logps.dtype),
        strict=True,
    )
    tokens, masses = [], []
    for log_p, ids, log_q in rows:
        ids, log_q = ids[log_q != -torch.inf], log_q[log_q != -torch.inf]
        p, q = log_p[ids], log_q
        if tail == "bucket":
            others = torch.ones_like(log_p, dtype=torch.bool).index_fill(0, ids, False)
            log_remaining = torch.log(-torch.expm1(q.logsumexp(0).clamp(max=0)))  # 1 - sum_k q_k
            p, q = torch.cat([p, log_p[others].logsumexp(0, keepdim=True)]), torch.cat([q, log_remaining[None]])
        elif tail == "renormalise":
            p, q = p.log_softmax(0), q.log_softmax(0)
        tokens.append(d.define(p, q))
        masses.append(log_p[ids].exp().sum())
    kl = torch.zeros_like(stats.logps)
    kl = kl.masked_scatter(stats.mask, torch.stack(tokens)) if tokens else kl
    mass = torch.zeros_like(kl).masked_scatter(stats.mask, torch.stack(masses)) if masses else kl
    known = torch.where(stats.mask, topk_logps.detach().to(mass.dtype).exp().sum(-1), 0.0)
    losses = soft * kl - hard * stats.logps
    return token_output(losses, stats, call, options, kl=kl, topk_mass=mass, teacher_mass=known)
