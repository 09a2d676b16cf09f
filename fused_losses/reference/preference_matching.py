"""Reference implementation of PM-RLHF, and of Bradley-Terry and Plackett-Luce ranking losses.

PM-RLHF has the preference-matching regulariser, rewards and metrics.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ..core.batch import read_batch, read_options
from ..core.inputs import Source, TokenStats
from ..core.names import present
from ..core.options import check_matching, check_threshold
from ..core.outputs import LossOutput
from ..core.validation import Count
from .common import Sequence, cut, joined, reduced

__all__ = [
    "bradley_terry_loss", "conditional_preference_matching_loss", "plackett_luce_loss", "preference_matching_gap",
    "preference_matching_loss", "preference_matching_reward",
]  # fmt: skip


def preference_matching_loss(
    policy: Source,
    labels: Tensor,
    *,
    loss_type: str = "entropy",
    beta: float = 1.0,
    baseline: Tensor | None = None,
    **options: Any,
) -> LossOutput:
    """Compute fl.preference_matching_loss, one sequence after another."""
    batch, call = read_batch(labels, "sequences", options), read_options(options)
    extra = check_matching(batch, loss_type, beta, baseline)
    stats, sequences = cut(policy, batch, entropy=call.entropy or loss_type == "entropy", per_sequence=extra)
    losses = []
    for s in sequences:
        exact = loss_type == "entropy"
        losses.append(-beta * present("entropy", s.entropy).sum() if exact else beta * _sampled(s, s.log_p))
    return LossOutput(reduced(joined(losses, stats), call.reduction, call.num_items), _metrics(sequences, stats), stats)


def conditional_preference_matching_loss(
    policy: Source,
    labels: Tensor,
    ref: Source,
    *,
    threshold: float = 0.01,
    beta: float = 1.0,
    baseline: Tensor | None = None,
    **options: Any,
) -> LossOutput:
    """Compute fl.conditional_preference_matching_loss, one sequence after another."""
    batch, call = read_batch(labels, "sequences", options), read_options(options)
    extra = check_matching(batch, "sampled", beta, baseline)
    check_threshold(threshold)
    stats, sequences = cut(policy, batch, ref, entropy=call.entropy, per_sequence=extra)
    losses, inside = [], stats.logps.new_zeros(())
    for s in sequences:
        ref_logps = present("ref", s.ref_logps)
        likely = (ref_logps > math.log(threshold)).to(s.logps.dtype)
        penalty = likely * s.logps + (1 - likely) * (s.logps - ref_logps)
        losses.append(beta * _sampled(s, penalty.sum()))
        inside = inside + likely.sum()
    metrics = _metrics(sequences, stats) | {"support": inside.detach() / stats.mask.sum().clamp(min=1)}
    return LossOutput(reduced(joined(losses, stats), call.reduction, call.num_items), metrics, stats)


def _sampled(s: Sequence, penalty: Tensor) -> Tensor:
    """Return the penalty, with the gradient (penalty - baseline) grad log p(y), where the bracket is a constant."""
    weight = (penalty - s.extra.get("baseline", 0)).detach()
    return penalty.detach() + weight * (s.log_p - s.log_p.detach())


def _metrics(sequences: list[Sequence], stats: TokenStats) -> dict[str, Tensor]:
    total = joined([s.log_p for s in sequences], stats).sum()
    metrics = {"logps": total.detach() / max(len(sequences), 1)}
    if stats.entropy is not None:
        metrics["entropy"] = stats.entropy.detach().sum() / stats.mask.sum().clamp(min=1)
    return metrics


def preference_matching_reward(
    logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    beta: float = 1.0,
    threshold: float | None = None,
    scores: Tensor | None = None,
    clip: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute fl.preference_matching_reward, one token after another."""
    rewards = torch.zeros_like(logps.detach()).reshape(-1, logps.shape[-1])
    for row in range(rewards.shape[0]):
        p = logps.detach().reshape(rewards.shape)[row]
        q = None if ref_logps is None else ref_logps.detach().reshape(rewards.shape)[row]
        counts = [t for t in range(len(p)) if mask is None or mask.reshape(rewards.shape)[row, t]]
        for t in counts:
            likely = q is None or threshold is None or q[t] > math.log(threshold)
            rewards[row, t] = -beta * (p[t] if likely else p[t] - q[t])  # type: ignore[index]
        if counts and scores is not None:
            score = float(scores.reshape(-1)[row])
            rewards[row, counts[-1]] += score if clip is None else max(-clip, min(clip, score))
    return rewards.reshape(logps.shape)


def preference_matching_gap(logps: Tensor, rewards: Tensor, *, beta: float = 1.0) -> Tensor:
    """Compute fl.preference_matching_gap, one pair after another."""
    logps, rewards = logps.detach(), rewards.detach()
    pairs = list(combinations(range(logps.shape[-1]), 2))
    gaps = [((rewards[..., i] - rewards[..., j]) - beta * (logps[..., i] - logps[..., j])) ** 2 for i, j in pairs]
    return torch.stack(gaps).mean() if logps.numel() else logps.new_zeros(())


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | float = 0.0,
    reduction: str = "mean",
    num_items: Count | None = None,
) -> Tensor:
    """Compute fl.bradley_terry_loss, -log P(chosen > rejected)."""
    return reduced(-torch.nn.functional.logsigmoid(chosen - rejected - margin), reduction, num_items)


def plackett_luce_loss(
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: Count | None = None,
) -> Tensor:
    """Compute fl.plackett_luce_loss, one ranking after another.

    It is -log of the product over places of e^r_i / sum_{j >= i} e^r_j.
    """
    losses = []
    for row in range(math.prod(rewards.shape[:-1])):
        r = rewards.reshape(-1, rewards.shape[-1])[row]
        r = r if mask is None else r[mask.reshape(-1, rewards.shape[-1])[row]]
        terms = [r[i] - r[i:].logsumexp(0) for i in range(len(r))]
        losses.append(-torch.stack(terms).sum() if terms else rewards.new_zeros(()))
    stacked = torch.stack(losses) if losses else rewards.sum(-1)
    return reduced(stacked.reshape(rewards.shape[:-1]), reduction, num_items)
