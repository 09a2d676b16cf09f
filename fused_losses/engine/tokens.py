"""The numbers of the tokens of some sequences, from which a formula computes losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ..core.divergences import Divergence
from ..core.layout import PairLossSpec, sequence_sums, spread_sequences
from ..core.margin_losses import TERMS
from ..core.sequence_parallel import SequenceShard
from . import pair_ops
from .operators import check_plain

REF = "ref_logps"  # name among the extras, where the reference is given as log-probs
NUMBERS = ("logps", REF, "lse", "entropy", "collision")  # per token, apart from divergences and extras


@dataclass(frozen=True)
class Tokens:
    """The numbers that a formula gets for some sequences with n tokens, one sequence after another.

    They are 0 where mask is False. For pairs, the chosen sequences come first and the rejected second.

    logps, ref_logps, lse, entropy, collision, correct [n] and divergence {name: [n]}: as in TokenStats. ref_logps is [S] where
    only sums over sequences are known (ref_summed). extra: the caller's per_token [n] and per_sequence [S] tensors, by name.
    """

    logps: Tensor
    ref_logps: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None
    divergence: dict[str, Tensor]
    mask: Tensor
    cu_seqlens: Tensor | None  # None: sequences of equal length
    sequences: int
    ref_summed: bool = False
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    collision: Tensor | None = None
    correct: Tensor | None = None

    def sums(self, x: Tensor) -> Tensor:
        """Return the sums [S] of x [n] over the tokens of each sequence that count."""
        return sequence_sums(x, self.mask, self.sequences, self.cu_seqlens)

    def means(self, x: Tensor) -> Tensor:
        """Return the means [S] of x [n] over the tokens of each sequence that count; 0 where there is none."""
        return self.sums(x) / self.lengths.clamp(min=1)

    def spread(self, x: Tensor) -> Tensor:
        """Return x [S] repeated [n]: each token gets the number of its sequence."""
        return spread_sequences(x, len(self.mask), self.cu_seqlens)

    @property
    def lengths(self) -> Tensor:
        """Return the number of tokens that count in each sequence [S]."""
        return self.sums(self.mask.to(self.logps.dtype))

    def log_ratios(self) -> Tensor:
        """Return sum_t (log p - log q) for each sequence [S], or sum_t log p without a reference.

        Where the reference is known per token, the difference is computed per token, because it is small there.
        """
        if self.ref_logps is None:
            return self.sums(self.logps)
        ref = self.ref_logps.to(self.logps.dtype)
        return self.sums(self.logps) - ref if self.ref_summed else self.sums(self.logps - ref)

    def detached(self) -> Tokens:
        """Return the same numbers without a graph."""

        def bare(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach()

        numbers = {n: bare(getattr(self, n)) for n in NUMBERS}
        divergence = {n: x.detach() for n, x in self.divergence.items()}
        return replace(self, divergence=divergence, extra={n: x.detach() for n, x in self.extra.items()}, **numbers)  # type: ignore[arg-type]

    def whole(self, shard: SequenceShard, tokenwise: Sequence[str]) -> Tokens:
        """Return the tokens of all ranks' parts of the time axis.

        tokenwise: the names of the extras that have one number per token.
        """
        if shard.group is None:
            return self
        local = {n: getattr(self, n) for n in (*NUMBERS, "mask", "correct") if n != REF or not self.ref_summed}
        local = {n: x for n, x in local.items() if x is not None}
        extra = {n: self.extra[n] for n in tokenwise}
        gathered = iter(shard.whole([*local.values(), *self.divergence.values(), *extra.values()]))
        numbers: dict[str, Any] = dict(zip(local, gathered, strict=False))
        divergence = dict(zip(self.divergence, gathered, strict=False))
        return replace(
            self, divergence=divergence, extra={**self.extra, **dict(zip(extra, gathered, strict=True))}, **numbers
        )

    def pair_term(self, name: str, link: Divergence, beta: float, *params: float) -> Tensor:
        """Compute a loss of core/margin_losses.py [B], which is a function of the margin, in one kernel."""
        check_plain("preference_loss", self.logps, self.ref_logps)
        dtype = self.logps.dtype if self.logps.dtype == torch.float64 else None
        args = pair_ops.PairLossArgs(
            logps=self.logps,
            ref_logps=self.ref_logps,
            mask=self.mask,
            cu_seqlens=self.cu_seqlens,
            spec=PairLossSpec(link, TERMS[name], params, beta, self.sequences, self.ref_summed),
            backend=choose(self.logps.device, dtype),
        )
        return pair_ops.losses(args).losses


Formula = Callable[[Tokens], Tensor]
