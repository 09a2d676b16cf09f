"""Reference implementation of the losses of single responses that are desirable or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..core.batch import read_batch, read_options
from ..core.inputs import Source, TokenStats
from ..core.options import check_bco, check_kto
from ..core.outputs import LossOutput
from ..core.running_delta import RunningDelta
from .common import Sequence, cut, joined, reduced

__all__ = ["bco_loss", "kto_baseline", "kto_loss"]


def kto_loss(
    policy: Source,
    labels: Tensor,
    ref: Source | None,
    desirable: Tensor,
    *,
    loss_type: str = "kto",
    baseline: Tensor | float | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    **options: Any,
) -> LossOutput:
    """Compute fl.kto_loss as in 2402.01306: lambda_y - v(x, y), with the value v of eq. 7."""
    batch, call = read_batch(labels, "sequences", options), read_options(options)
    z0 = check_kto(batch, desirable, loss_type, baseline, beta, desirable_weight, undesirable_weight)

    def value(s: Sequence, good: Tensor) -> Tensor:
        if good:
            return desirable_weight * torch.sigmoid(-beta * (s.h - z0))  # 1 - sigmoid(x) = sigmoid(-x)
        return undesirable_weight * torch.sigmoid(-beta * (z0 - s.h))

    stats, sequences = cut(policy, batch, ref, entropy=call.entropy)
    losses = joined([value(s, good) for s, good in zip(sequences, desirable, strict=True)], stats)
    all_metrics = metrics(sequences, desirable, beta, stats) | {"kl": stats.logps.new_zeros(()) + z0}
    return LossOutput(reduced(losses, call.reduction, call.num_items), all_metrics, stats)


@torch.no_grad()
def kto_baseline(policy: Source, labels: Tensor, ref: Source | None, **options: Any) -> Tensor:
    """Compute fl.kto_baseline over one process."""
    stats, sequences = cut(policy, read_batch(labels, "sequences", options), ref)
    ratios = joined([s.h for s in sequences], stats)
    return (ratios.sum() / max(len(sequences), 1)).relu()


def bco_loss(
    policy: Source,
    labels: Tensor,
    ref: Source | None,
    desirable: Tensor,
    *,
    delta: RunningDelta | Tensor | float = 0.0,
    weights: Tensor | None = None,
    beta: float = 0.1,
    **options: Any,
) -> LossOutput:
    """Compute fl.bco_loss."""
    batch, call = read_batch(labels, "sequences", options), read_options(options)
    check_bco(batch, desirable, weights, beta)
    stats, sequences = cut(policy, batch, ref, entropy=call.entropy)
    shift = (
        delta.update(beta * joined([s.h for s in sequences], stats).detach())
        if isinstance(delta, RunningDelta)
        else delta
    )
    losses = []
    for i, s in enumerate(sequences):
        x = beta * s.h - shift
        losses.append(-logsigmoid(x if desirable[i] else -x) * (1.0 if weights is None else weights[i]))
    all_metrics = metrics(sequences, desirable, beta, stats) | {"delta": stats.logps.new_zeros(()) + shift}
    return LossOutput(reduced(joined(losses, stats), call.reduction, call.num_items), all_metrics, stats)


def metrics(sequences: list[Sequence], desirable: Tensor, beta: float, stats: TokenStats) -> dict[str, Tensor]:
    """Return means over the desirable and over the undesirable sequences, NaN where there are none."""
    means = {}
    for name, kind in (("chosen", True), ("rejected", False)):
        of_kind = [s for s, good in zip(sequences, desirable.tolist(), strict=True) if good == kind]
        means[f"rewards/{name}"] = joined([beta * s.h for s in of_kind], stats).mean().detach()
        means[f"logps/{name}"] = joined([s.log_p for s in of_kind], stats).mean().detach()
        means[f"count/{name}"] = stats.logps.new_tensor(len(of_kind))
    means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    if stats.entropy is not None:
        means["entropy"] = stats.entropy.detach().sum() / stats.mask.sum().clamp(min=1)
    return means
