"""calibration: whether likely responses are the preferred ones, from the statistics that a loss returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.inputs import TokenStats, kind_of
from ..core.validation import check_pairs
from .shared import sequences_of

__all__ = ["Calibration", "calibration"]


@dataclass(frozen=True)
class Calibration:
    """Sums over the pairs of each bin of confidence, float64 [bins]; those of several batches add with +."""

    counts: Tensor
    confidence: Tensor  # sum of the confidences
    correct: Tensor  # number of right predictions

    def __add__(self, other: Calibration) -> Calibration:
        return Calibration(self.counts + other.counts, self.confidence + other.confidence, self.correct + other.correct)

    @property
    def error(self) -> Tensor:
        """The expected calibration error, sum_bins |accuracy - confidence| pairs / all pairs: 0-d, 0 of nothing."""
        return (self.correct - self.confidence).abs().sum() / self.counts.sum().clamp(min=1)


@torch.no_grad()
def calibration(stats: TokenStats, *, cu_seqlens: Tensor | None = None, bins: int = 10) -> Calibration:
    """The policy's calibration on pairs as f-DPO's released evaluation measures it (2309.16240), without another pass:

        confidence    exp of the mean log p(y_t) over the chosen response, in `bins` equal parts of [0, 1]
        right         where that mean is higher than the rejected response's

    No reference enters. Pairs with a response of no tokens are left out. (On an edge a pair is of the upper bin.)

    stats: LossOutput.stats of a loss of pairs, the B chosen sequences first: [2B, T], or packed with its cu_seqlens. Add the
    results of the batches, then read .error: errors themselves do not average.
    """
    if not isinstance(stats, TokenStats):
        raise TypeError(f"stats: expected TokenStats, as in LossOutput.stats, got {kind_of(stats, TokenStats)}")
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins: expected an int >= 1, got {bins!r}")
    check_pairs(stats.mask, cu_seqlens)
    tokens = sequences_of(stats, cu_seqlens)
    lengths = tokens.lengths.double()
    chosen, rejected = (tokens.sums(tokens.logps).double() / lengths.clamp(min=1)).tensor_split(2)
    counts = torch.stack((lengths > 0).tensor_split(2)).all(0)
    confidence = chosen.exp()
    which = (confidence * bins).long().clamp(0, bins - 1)
    member = (which[:, None] == torch.arange(bins, device=which.device)) & counts[:, None]
    return Calibration(
        member.double().sum(0),
        torch.where(member, confidence[:, None], 0).sum(0),
        (member & (chosen > rejected)[:, None]).double().sum(0),
    )
