"""Preference losses of pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..divergences import Divergence
from ..losses.common import LossOutput, check_pairs, check_reduction
from ..losses.preference import Options, options
from ..sources import Source, check_labels
from .common import Sequence, cut, joined, reduced

__all__ = ["dpo_loss", "preference_loss"]


def _sigmoid(chosen: Sequence, rejected: Sequence, o: Options) -> Tensor:
    """DPO eq. 7, with the link of f-DPO (2309.16240): s(h) = f'(e^h), for DPO s(h) = h; cDPO where eps > 0."""
    assert o.link.score is not None
    margin, eps = o.beta * (o.link.score(chosen.h) - o.link.score(rejected.h)), o.label_smoothing
    return -(1 - eps) * logsigmoid(margin) - eps * logsigmoid(-margin)


LOSSES: dict[str, Callable[[Sequence, Sequence, Options], Tensor]] = {"sigmoid": _sigmoid}


def preference_loss(
    policy: Source, labels: Tensor, ref: Source | None = None, *, loss: str = "sigmoid",
    divergence: str | Divergence = "reverse_kl", beta: float = 0.1, label_smoothing: float = 0.0, reduction: str = "mean",
    num_items: int | Tensor | None = None, cu_seqlens: Tensor | None = None, **batch: Any,
) -> LossOutput:  # fmt: skip
    """fl.preference_loss, one pair after another."""
    o = options(loss, divergence, beta, label_smoothing, ref is not None)
    check_reduction(reduction, num_items)
    check_pairs(check_labels(labels), cu_seqlens)
    stats, every = cut(policy, labels, ref, cu_seqlens=cu_seqlens, **batch)
    pairs = list(zip(every[: len(every) // 2], every[len(every) // 2 :], strict=True))
    losses = joined([LOSSES[loss](chosen, rejected, o) for chosen, rejected in pairs], stats)
    return LossOutput(reduced(losses, reduction, num_items), metrics(pairs, beta, stats), stats)


def metrics(pairs: list[tuple[Sequence, Sequence]], beta: float, stats: Any) -> dict[str, Tensor]:
    """TRL's, means over the pairs."""

    def mean(numbers: list[Tensor]) -> Tensor:
        return (torch.stack(numbers).mean() if numbers else stats.logps.new_zeros(())).detach()

    found = {
        "rewards/chosen": mean([beta * w.h for w, _ in pairs]),
        "rewards/rejected": mean([beta * l.h for _, l in pairs]),
        "rewards/margins": mean([beta * (w.h - l.h) for w, l in pairs]),
        "rewards/accuracies": mean([(w.h > l.h).to(stats.logps.dtype) for w, l in pairs]),
        "logps/chosen": mean([w.log_p for w, _ in pairs]),
        "logps/rejected": mean([l.log_p for _, l in pairs]),
    }
    if stats.entropy is not None:
        found["entropy"] = stats.entropy.detach().sum() / stats.mask.sum().clamp(min=1)
    return found


def dpo_loss(policy: Source, labels: Tensor, ref: Source | None = None, **options: Any) -> LossOutput:
    """fl.dpo_loss."""
    return preference_loss(policy, labels, ref, loss="sigmoid", **options)
