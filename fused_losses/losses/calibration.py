"""Calibration of a policy: compare confidence with accuracy, from the statistics that a loss returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.batch import Batch, count_sequences
from ..core.inputs import TokenStats, kind_of
from .shared import sequences_of

__all__ = ["Calibration", "calibration"]


@dataclass(frozen=True)
class Calibration:
    """The sums over the pairs of each bin of confidence, as float64 tensors [bins].

    The results of several batches can be added with +.
    """

    counts: Tensor
    confidence: Tensor  # sum of the confidences
    correct: Tensor  # number of right predictions

    def __add__(self, other: Calibration) -> Calibration:
        return Calibration(self.counts + other.counts, self.confidence + other.confidence, self.correct + other.correct)

    @property
    def error(self) -> Tensor:
        """Return the expected calibration error, a 0-d tensor.

        It is sum_bins |accuracy - confidence| pairs / all pairs, and 0 if there are no pairs.
        """
        return (self.correct - self.confidence).abs().sum() / self.counts.sum().clamp(min=1)


@torch.no_grad()
def calibration(stats: TokenStats, *, cu_seqlens: Tensor | None = None, bins: int = 10) -> Calibration:
    """Measure the policy's calibration on pairs, as the released evaluation of f-DPO does (arXiv 2309.16240).

        confidence    exp of the mean log p(y_t) over the chosen response, in `bins` equal parts of [0, 1]
        correct       that mean is higher than the mean of the rejected response

    No other forward pass is needed, and no reference model is used. Pairs in which a response has no tokens are left out. A
    confidence on the edge between two bins is counted in the upper bin.

    Args:
        stats: LossOutput.stats of a loss of pairs, the B chosen sequences first: [2B, T], or packed.
        cu_seqlens: offsets [2B + 1] of the packed sequences. None: stats are [2B, T].
        bins: the number of bins, >= 1.

    Returns:
        Sums for each bin. Add the results of all batches, then read .error: errors of batches must not be averaged.
    """
    if not isinstance(stats, TokenStats):
        raise TypeError(f"stats: expected TokenStats, as in LossOutput.stats, got {kind_of(stats, TokenStats)}")
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins: expected an int >= 1, got {bins!r}")
    sequences = count_sequences(stats.mask, cu_seqlens, None, 2)
    tokens = sequences_of(stats, Batch(stats.mask, False, -100, stats.mask, cu_seqlens, sequences))
    lengths = tokens.lengths.double()
    chosen, rejected = (tokens.sums(tokens.logps).double() / lengths.clamp(min=1)).tensor_split(2)
    counts = torch.stack((lengths > 0).tensor_split(2)).all(0)
    confidence = chosen.exp()
    bin_index = (confidence * bins).long().clamp(0, bins - 1)
    member = (bin_index[:, None] == torch.arange(bins, device=bin_index.device)) & counts[:, None]
    return Calibration(
        member.double().sum(0),
        torch.where(member, confidence[:, None], 0).sum(0),
        (member & (chosen > rejected)[:, None]).double().sum(0),
    )
