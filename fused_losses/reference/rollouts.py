"""Reference implementations of numbers of sampled responses: advantages, importance weights of rollouts, masks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["entropy_quantile_mask", "group_advantages", "optimal_values", "rollout_weights"]


def rollout_weights(
    old_logps: Tensor,
    rollout_logps: Tensor,
    mask: Tensor,
    *,
    level: str,
    mode: str,
    low: float | None = None,
    high: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Compute fl.rollout_weights, one sequence after another."""
    weights = torch.ones_like(old_logps)
    rows = (
        range(len(old_logps)) if cu_seqlens is None else zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)
    )
    for row in rows:
        where = row if isinstance(row, int) else slice(*row)
        d = (old_logps[where] - rollout_logps[where])[mask[where]]
        d = torch.where(d.isfinite(), d, 0.0)
        if level != "token":
            total = d.sum() / (max(len(d), 1) if level == "geometric" else 1)
            d = total.expand(len(d))
        r = d.exp()
        least, most = low or 0.0, math.inf if high is None else high
        weights[where][mask[where]] = r.clamp(least, most) if mode == "truncate" else r * ((r >= least) & (r <= most))
    return weights


def entropy_quantile_mask(entropy: Tensor, mask: Tensor, top: float, group: None = None) -> Tensor:
    """Compute fl.entropy_quantile_mask with torch.quantile, on one rank."""
    values = entropy[mask]
    return mask & (entropy >= torch.quantile(values, 1 - top)) if len(values) else mask.clone()


def group_advantages(rewards: Tensor, group_size: int, scale: str = "group") -> Tensor:
    """Compute fl.group_advantages, one group after another."""
    advantages = torch.zeros_like(rewards)
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        scored = group[~group.isnan()]
        among = {"group": scored, "batch": rewards[~rewards.isnan()], "none": None}[scale]
        divisor: Tensor | float = 1.0
        if among is not None:
            divisor = (among.std() if len(among) > 1 else 0.0) + 1e-4
        advantages[start : start + group_size] = torch.where(group.isnan(), 0.0, (group - scored.mean()) / divisor)
    return advantages


def optimal_values(rewards: Tensor, group_size: int, beta: float) -> Tensor:
    """Compute fl.optimal_values, one group after another."""
    values = torch.empty_like(rewards)
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        scored = group[~group.isnan()]
        values[start : start + group_size] = beta * (scored / beta).exp().mean().log() if len(scored) else math.nan
    return values
