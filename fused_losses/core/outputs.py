"""The classes that losses return, and that of topk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .inputs import TokenStats


class TopK(NamedTuple):
    """The largest logits of each position, and the tokens that have them.

    Attributes:
        values: [..., k], largest first: logits, or log-probs if they were asked for. float32, or float64 for float64. They
            have no gradient.
        ids: [..., k], int64: the tokens.
    """

    values: Tensor
    ids: Tensor


class Part(NamedTuple):
    """The amounts and counts of each unit from which a metric is computed.

    A unit is a pair, a sequence, or a row of tokens. Metrics of several batches (micro-batches, ranks, an evaluation) cannot be
    averaged, because batches hold different numbers of pairs and tokens. Amounts and counts can be summed, and units that
    would count twice can be left out.
    """

    amounts: Tensor  # [units, ...], no graph, 0 where nothing counts
    # [units, ...]: the sum of the amounts is divided by the sum of these; None: 1 for each unit
    counts: Tensor | None = None
    kind: str = "mean"  # "mean": 0 if the counts are 0; "mean or nan": NaN then; "sum": no division

    @property
    def is_mean_of_units(self) -> bool:
        """Return whether the value is the mean of the amounts [units]."""
        return self.counts is None and self.kind == "mean" and self.amounts.dim() == 1

    def value(self) -> Tensor:
        total = self.amounts.sum()
        if self.kind == "sum":
            return total
        if self.counts is None:
            return total / max(len(self.amounts), 1)
        count = self.counts.sum()
        return total / (count if self.kind == "mean or nan" else count.clamp(min=1))

    def sums(self, dtype: torch.dtype) -> Tensor:
        """Return a tensor [2]: the sum of the amounts and the sum of the counts."""
        total = self.amounts.sum()
        count = torch.full_like(total, len(self.amounts)) if self.counts is None else self.counts.sum()
        return torch.stack([total.to(dtype), count.to(dtype)])

    def first(self, kept: int, of: int) -> Part:
        """Return the part with only the units of the first `kept` of the `of` rows of a batch."""
        units = len(self.amounts) * kept // of
        return self._replace(amounts=self.amounts[:units], counts=None if self.counts is None else self.counts[:units])


Parts = dict[str, tuple[Part, ...]]


def values(parts: Parts) -> dict[str, Tensor]:
    """Return for each name the sum of the values of its parts."""
    means = {name: terms[0].amounts for name, terms in parts.items() if len(terms) == 1 and terms[0].is_mean_of_units}
    found = _means(means) if len(means) > 1 else {}
    return {name: found[name] if name in found else _total(terms) for name, terms in parts.items()}


def _means(units: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the means of several tensors [units] by name, in few operations; none if the tensors are not alike."""
    first = next(iter(units.values()))
    if not all(x.shape == first.shape and x.dtype == first.dtype for x in units.values()):
        return {}
    means = torch.stack([*units.values()]).sum(1) / max(len(first), 1)
    return dict(zip(units, means.unbind(), strict=True))


def _total(terms: tuple[Part, ...]) -> Tensor:
    return terms[0].value() if len(terms) == 1 else torch.stack([x.value() for x in terms]).sum(0)


@dataclass(frozen=True, repr=False)
class LossOutput:
    """The result of a loss.

    Attributes:
        loss: The loss, a scalar ([B] with reduction="none").
        metrics: Detached 0-d tensors under TRL's keys, means over the batch.
        stats: The TokenStats from which the loss was computed.
        parts: For each metric, and for "loss", the parts whose values add up to it.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    stats: TokenStats
    parts: Parts = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return a text with the loss, the metrics (read from their device) and the names of the other attributes."""
        metrics = ", ".join(f"{name}={x.item():.6g}" for name, x in self.metrics.items())
        return f"LossOutput(loss={self.loss}, metrics: {metrics or 'none'}; also .stats, .parts)"

    def __getattr__(self, name: str) -> Any:
        """Raise, and say where to find what a user of the loss alone expects."""
        hint = f"; it is a function of .loss: out.loss.{name}" if hasattr(Tensor, name) else ""
        raise AttributeError(f"LossOutput has no attribute {name!r}{hint}")
