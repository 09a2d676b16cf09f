"""Reference implementation of REBEL and A*-PO."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core.batch import read_batch, read_options
from ..core.inputs import Source
from ..core.options import check_regression
from ..core.outputs import LossOutput
from .common import cut, joined, pair_metrics, reduced

__all__ = ["a2po_loss", "rebel_loss"]


def rebel_loss(
    policy: Source, labels: Tensor, ref: Source | None, rewards: Tensor, *, beta: float, **options: Any
) -> LossOutput:
    """Compute fl.rebel_loss, one pair after another."""
    batch, call = read_batch(labels, "pairs", options), read_options(options)
    check_regression("rewards", rewards, batch, beta)
    stats, sequences = cut(policy, batch, ref, entropy=call.entropy)
    pairs = list(zip(sequences[: len(sequences) // 2], sequences[len(sequences) // 2 :], strict=True))
    apart = [rewards[i] - rewards[i + len(pairs)] for i in range(len(pairs))]
    losses = [(beta * (a.h - b.h) - gap.detach()) ** 2 for (a, b), gap in zip(pairs, apart, strict=True)]
    metrics = pair_metrics([(beta * a.h, beta * b.h) for a, b in pairs], [(a.log_p, b.log_p) for a, b in pairs], stats)
    return LossOutput(reduced(joined(losses, stats), call.reduction, call.num_items), metrics, stats)


def a2po_loss(
    policy: Source, labels: Tensor, ref: Source | None, advantages: Tensor, *, beta: float, **options: Any
) -> LossOutput:
    """Compute fl.a2po_loss, one sequence after another."""
    batch, call = read_batch(labels, "sequences", options), read_options(options)
    check_regression("advantages", advantages, batch, beta)
    stats, sequences = cut(policy, batch, ref, entropy=call.entropy)
    losses = [(beta * y.h - a.detach()) ** 2 for y, a in zip(sequences, advantages, strict=True)]
    metrics = {
        "rewards": reduced(joined([beta * y.h for y in sequences], stats)).detach(),
        "advantages": reduced(joined(list(advantages.detach()), stats)),
    }
    if stats.entropy is not None:
        metrics["entropy"] = stats.entropy.detach().sum() / stats.mask.sum().clamp(min=1)
    return LossOutput(reduced(joined(losses, stats), call.reduction, call.num_items), metrics, stats)
