"""Reference implementation of the GRPO family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.batch import read_batch, read_options
from ..core.divergences import Divergence
from ..core.elementwise import LARGEST
from ..core.inputs import Source
from ..core.names import present
from ..core.options import grpo_config
from ..core.outputs import LossOutput
from ..core.validation import Count
from .common import Sequence, cut, joined, part

__all__ = ["group_advantages", "grpo_loss"]


def grpo_loss(
    policy: Source,
    labels: Tensor,
    advantages: Tensor,
    *,
    old_logps: Tensor | None = None,
    ref: Source | None = None,
    loss_type: str = "grpo",
    importance: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    kl: str | Divergence = "k3",
    use_bias_correction_kl: bool = False,
    max_completion_length: int | None = None,
    **options: Any,
) -> LossOutput:
    """Compute fl.grpo_loss, one sequence after another."""
    o = grpo_config(
        loss_type,
        importance,
        epsilon,
        epsilon_high,
        delta,
        beta,
        kl,
        max_completion_length,
        use_bias_correction_kl,
    )
    batch, call = read_batch(labels, "sequences", options), read_options(options)
    batch_size, num_items = batch.sequences, call.num_items
    whole = advantages.shape == (batch_size,)
    each = {} if whole else {"A": advantages}
    each |= {} if old_logps is None else {"old": old_logps}
    stats, sequences = cut(
        policy,
        batch,
        ref,
        divergences=() if ref is None else o.divergences,
        entropy=call.entropy,
        per_token=each,
        per_sequence={"A": advantages} if whole else {},
    )

    def ratio_of(s: Sequence) -> Tensor:
        """Return the ratio of each token [tokens], or one number for the sequence."""
        x = s.logps - (s.extra["old"] if old_logps is not None else s.logps.detach())
        x = x if importance == "token" else x.sum() / max(len(s), 1)
        return torch.exp(x.clamp(max=LARGEST))

    def kl_of(s: Sequence) -> Tensor:
        if o.divergences:
            return next(iter(s.divergence.values()))
        d = present("ref", s.ref_logps) - s.logps
        if kl == "k3":
            d = d.clamp(max=LARGEST)
            return torch.expm1(d) - d
        return -d if kl == "k1" else d**2 / 2

    high = epsilon if epsilon_high is None else epsilon_high
    totals, lows, highs = [], [], []
    for s in sequences:
        ratio, a = ratio_of(s), s.extra["A"]
        if loss_type == "cispo":
            tokens = -ratio.clamp(max=high).detach() * a * s.logps
        else:
            first = ratio if delta is None else ratio.clamp(max=delta)
            tokens = -torch.minimum(first * a, ratio.clamp(1 - epsilon, 1 + high) * a)
        if beta != 0:
            tokens = tokens + beta * (ratio if use_bias_correction_kl else 1) * kl_of(s)
        tokens = tokens.expand(len(s))
        totals.append(tokens.sum())
        lows.append(((ratio < 1 - epsilon) & (a < 0)).reshape(-1))
        highs.append(((ratio > (high if loss_type == "cispo" else 1 + high)) & (a > 0)).reshape(-1))
    if loss_type == "grpo":
        totals = [x / max(len(s), 1) for x, s in zip(totals, sequences, strict=True)]
    if loss_type == "dr_grpo":
        totals = [x / present("max_completion_length", max_completion_length) for x in totals]

    total = joined(totals, stats)
    if call.reduction != "none":
        count: Count = batch_size if loss_type in ("grpo", "dr_grpo") else stats.mask.sum()
        count = 1 if call.reduction == "sum" else max(int(count), 1) if num_items is None else num_items
        total = part(total.sum(), count)
    metrics = {} if ref is None else {"kl": mean([kl_of(s) for s in sequences], stats.logps)}
    low, above = (mean([x.to(stats.logps.dtype) for x in flags], stats.logps) for flags in (lows, highs))
    if loss_type == "cispo":
        metrics["cispo_clip_ratio"] = above
    else:
        metrics |= {"clip_ratio/low_mean": low, "clip_ratio/high_mean": above, "clip_ratio/region_mean": low + above}
    if stats.entropy is not None:
        metrics["entropy"] = stats.entropy.detach().sum() / stats.mask.sum().clamp(min=1)
    return LossOutput(total, metrics, stats)


def mean(parts: list[Tensor], like: Tensor) -> Tensor:
    numbers = torch.cat(parts) if parts else like.new_zeros(0)
    return numbers.detach().sum() / max(len(numbers), 1)


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
