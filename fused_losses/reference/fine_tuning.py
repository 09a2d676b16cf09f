"""Reference implementation of EAFT and ASFT."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core.batch import read_batch, read_options
from ..core.divergences import Divergence, parse
from ..core.inputs import LogProbs, Source, as_source
from ..core.options import check_eaft
from ..core.outputs import LossOutput
from .distillation import token_output
from .stats import batch_stats, entropy_of, transformed

__all__ = ["asft_loss", "eaft_loss"]


def eaft_loss(policy: Source, labels: Tensor, *, k: int = 20, alpha: float = 1.0, **options: Any) -> LossOutput:
    """Compute fl.eaft_loss from the sorted logits of each token."""
    check_eaft(k, alpha)
    batch, call, source = read_batch(labels, "tokens", options), read_options(options), as_source("policy", policy)
    if isinstance(source, LogProbs):
        raise ValueError("policy: fl.LogProbs has no logits; expected fl.Hidden or logits")
    stats = batch_stats(policy, batch, entropy=call.entropy)
    largest = transformed(source).sort(-1, descending=True).values[..., :k].detach().log_softmax(-1)
    gate = (entropy_of(largest) / math.log(k)).clamp(0, 1) ** alpha
    gate = torch.where(stats.mask, gate[..., :-1] if batch.shift else gate, 0.0)
    return token_output(-gate * stats.logps, stats, call, options, gate=gate)


def asft_loss(
    policy: Source,
    labels: Tensor,
    ref: Source,
    *,
    kl_weight: float,
    divergence: str | Divergence = "forward_kl",
    **options: Any,
) -> LossOutput:
    """Compute fl.asft_loss."""
    batch, call = read_batch(labels, "tokens", options), read_options(options)
    stats = batch_stats(policy, batch, ref, parse(divergence), entropy=call.entropy)
    (d,) = stats.divergence.values()
    losses = -stats.logps.exp().detach() * stats.logps + kl_weight * d
    return token_output(losses, stats, call, options, kl=d)
