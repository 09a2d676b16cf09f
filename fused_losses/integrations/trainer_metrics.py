"""Sum the metrics of batches over steps and ranks, because a mean of the means of batches is not the mean of all."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.outputs import Part

__all__ = ["Rows", "Sums", "weighted"]


class Rows(NamedTuple):
    """Describe the rows of the dataset in the last batch of all ranks.

    Each rank has `each` rows. Of the rows of all ranks, the first `left` are not repeated.
    """

    rank: int
    ranks: int
    each: int
    left: int

    def kept(self, rank: int) -> int:
        """Return the number of rows of this rank that are not repeated."""
        return min(max(self.left - rank * self.each, 0), self.each)


class Sums:
    """Store running sums of the parts of metrics, two numbers for each term, for any number of batches."""

    def __init__(self) -> None:
        self.terms: dict[str, list[Tensor]] = {}
        self.kinds: dict[str, str] = {}

    def clear(self) -> None:
        self.terms.clear()

    def add(self, name: str, parts: list[Part] | tuple[Part, ...]) -> None:
        device = parts[0].amounts.device.type
        new = [x.sums(torch.float64 if device in ("cpu", "cuda") else torch.float32) for x in parts]
        seen = self.terms.setdefault(name, new)
        if seen is not new:
            for total, x in zip(seen, new, strict=True):
                total += x
        self.kinds[name] = parts[0].kind

    def values(self, accelerator: Any, ranks: int) -> dict[str, float]:
        """Return the metrics over all ranks and clear the sums, with one collective and one synchronisation.

        Means over zero units are left out.
        """
        sums = [x for terms in self.terms.values() for x in terms]
        if not sums:
            return {}
        gathered = accelerator.gather(torch.stack(sums)[None])
        # ranks of tensor parallelism have the same numbers
        rows = iter((gathered.sum(0) * ranks / len(gathered)).tolist())
        metrics: dict[str, float] = {}
        for name, terms in self.terms.items():
            pairs = [next(rows) for _ in terms]
            if self.kinds[name] == "sum":
                metrics[name] = sum(x for x, _ in pairs)
            elif all(n for _, n in pairs):
                metrics[name] = sum(x / n for x, n in pairs)
        self.clear()
        return metrics


def weighted(x: Tensor, count: Tensor | int, share: float) -> Part:
    """Return the Part of a number that is a mean over `count` units, of which a share counts."""
    counts = torch.as_tensor(count, device=x.device).to(x.dtype) * share
    return Part((x.detach() * counts).reshape(1), counts.reshape(1))
