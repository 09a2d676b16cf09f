"""What a loss returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import TokenStats


class Part(NamedTuple):
    """What a metric is made of, unit by unit: a unit is a pair, a sequence, or a row of tokens.

    Metrics of several batches (micro-batches, ranks, an evaluation) cannot be averaged, for batches hold different numbers of
    pairs and tokens. Amounts and counts can be added up, and units that count twice can be left out.
    """

    amounts: Tensor  # [units, ...], no graph, 0 where nothing counts
    # [units, ...]: what the sum of the amounts is divided by the sum of; None: 1 for each unit
    counts: Tensor | None = None
    kind: str = "mean"  # 0 where the counts are 0; "mean or nan": NaN there; "sum": it is not divided

    def value(self) -> Tensor:
        total = self.amounts.sum()
        if self.kind == "sum":
            return total
        if self.counts is None:
            return total / max(len(self.amounts), 1)
        count = self.counts.sum()
        return total / (count if self.kind == "mean or nan" else count.clamp(min=1))

    def sums(self, dtype: torch.dtype) -> Tensor:
        """[2]: of the amounts and of the counts."""
        total = self.amounts.sum()
        count = torch.full_like(total, len(self.amounts)) if self.counts is None else self.counts.sum()
        return torch.stack([total.to(dtype), count.to(dtype)])

    def first(self, kept: int, of: int) -> Part:
        """Without the units of the last rows of a batch, of which the first `kept` of `of` rows remain."""
        units = len(self.amounts) * kept // of
        return self._replace(amounts=self.amounts[:units], counts=None if self.counts is None else self.counts[:units])


Parts = dict[str, tuple[Part, ...]]


@dataclass(frozen=True, repr=False)
class LossOutput:
    """loss: scalar ([B] with reduction="none"). metrics: detached 0-d tensors under TRL's keys, means over the batch.
    stats: the TokenStats behind it. parts: of each metric, and of "loss", the terms whose values it is the sum of."""

    loss: Tensor
    metrics: dict[str, Tensor]
    stats: TokenStats
    parts: Parts = field(default_factory=dict)

    def __repr__(self) -> str:
        """Show the loss and the metrics, which are read from their device, and the names of the rest."""
        metrics = ", ".join(f"{name}={x.item():.6g}" for name, x in self.metrics.items())
        return f"LossOutput(loss={self.loss}, metrics: {metrics or 'none'}; also .stats, .parts)"
