"""Functions that the reference implementations share: token_stats split into sequences, and the reductions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.batch import Batch
from ..core.divergences import Divergence
from ..core.inputs import LogProbs, Source, TokenStats, as_source
from ..core.validation import Count, read_count
from .stats import batch_stats


@dataclass(frozen=True)
class Sequence:
    """The numbers of the tokens of one sequence that count."""

    logps: Tensor
    ref_logps: Tensor | None
    ref_sum: Tensor | None  # log q(y | x), where it is known
    lse: Tensor | None
    entropy: Tensor | None
    divergence: dict[str, Tensor]
    extra: dict[str, Tensor]  # the caller's per-token numbers, and the sequence's own

    @property
    def log_p(self) -> Tensor:
        """Return log p(y | x) = sum_t log p(y_t)."""
        return self.logps.sum()

    @property
    def h(self) -> Tensor:
        """Return log p(y | x) - log q(y | x), or log p(y | x) if there is no reference."""
        return self.log_p if self.ref_sum is None else self.log_p - self.ref_sum

    def __len__(self) -> int:
        return len(self.logps)


def cut(
    policy: Source,
    batch: Batch,
    ref: Source | None = None,
    *,
    divergences: tuple[Divergence, ...] = (),
    entropy: bool = False,
    per_token: dict[str, Tensor] | None = None,
    per_sequence: dict[str, Tensor] | None = None,
) -> tuple[TokenStats, list[Sequence]]:
    """Return the statistics of a batch, [S, T] or packed, and its sequences."""
    cu_seqlens, count, labels = batch.cu_seqlens, batch.sequences, batch.labels
    source = None if ref is None else as_source("ref", ref)
    summed = source.logps if isinstance(source, LogProbs) and source.logps.shape == (count,) != labels.shape else None
    stats = batch_stats(policy, batch, None if summed is not None else ref, divergences, entropy=entropy)

    def sequence(s: int) -> Sequence:
        where = s if cu_seqlens is None else slice(int(cu_seqlens[s]), int(cu_seqlens[s + 1]))
        counts = stats.mask[where]

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[where][counts]

        ref_logps = pick(stats.ref_logps)
        extra = {n: x[where][counts] for n, x in (per_token or {}).items()}
        extra |= {n: x[s] for n, x in (per_sequence or {}).items()}
        known = summed[s] if summed is not None else None if ref_logps is None else ref_logps.sum()
        divergences = {n: x[where][counts] for n, x in stats.divergence.items()}
        logps = stats.logps[where][counts]
        return Sequence(logps, ref_logps, known, pick(stats.lse), pick(stats.entropy), divergences, extra)

    return stats, [sequence(s) for s in range(count)]


def joined(losses: list[Tensor], stats: TokenStats) -> Tensor:
    return torch.stack(losses) if losses else stats.logps.reshape(-1)[:0]


def part(x: Tensor, count: Count) -> Tensor:
    """Return x / count, or 0 if count is 0, the count of an empty window."""
    count = float(read_count("num_items", count))  # type: ignore[arg-type]
    return x / count if count else x * 0


def reduced(losses: Tensor, reduction: str = "mean", num_items: Count | None = None) -> Tensor:
    if reduction == "none":
        return losses
    count = 1 if reduction == "sum" else max(losses.numel(), 1) if num_items is None else num_items
    return part(losses.sum(), count)


def pair_metrics(
    rewards: list[tuple[Tensor, Tensor]], logps: list[tuple[Tensor, Tensor]], stats: TokenStats
) -> dict[str, Tensor]:
    """Return TRL's metrics, from the rewards and log-probs (chosen, rejected) of each pair."""

    def mean(numbers: list[Tensor]) -> Tensor:
        return (torch.stack(numbers).mean() if numbers else stats.logps.new_zeros(())).detach()

    metrics = {
        "rewards/chosen": mean([chosen for chosen, _ in rewards]),
        "rewards/rejected": mean([rejected for _, rejected in rewards]),
        "rewards/margins": mean([chosen - rejected for chosen, rejected in rewards]),
        "rewards/accuracies": mean([(chosen > rejected).to(stats.logps.dtype) for chosen, rejected in rewards]),
        "logps/chosen": mean([chosen for chosen, _ in logps]),
        "logps/rejected": mean([rejected for _, rejected in logps]),
    }
    if stats.entropy is not None:
        metrics["entropy"] = stats.entropy.detach().sum() / stats.mask.sum().clamp(min=1)
    return metrics
