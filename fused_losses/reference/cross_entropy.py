"""Reference implementation of cross entropy with label smoothing and z-loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..core.batch import read_batch, read_options
from ..core.inputs import LogProbs, Source, as_source
from ..core.names import present
from ..core.outputs import LossOutput
from .distillation import token_output
from .stats import batch_stats, transformed

__all__ = ["cross_entropy_loss"]


def cross_entropy_loss(
    policy: Source,
    labels: Tensor,
    *,
    loss_type: str = "nll",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    **options: Any,
) -> LossOutput:
    """Compute fl.cross_entropy_loss from torch's cross_entropy and lse^2."""
    batch, call, source = read_batch(labels, "tokens", options), read_options(options), as_source("policy", policy)
    stats = batch_stats(policy, batch, entropy=call.entropy)
    numbers: dict[str, Tensor] = {}
    if isinstance(source, LogProbs):
        losses = -stats.logps
    else:
        z, y = transformed(source), batch.labels.long()
        z, y = (z[..., :-1, :], y[..., 1:]) if batch.shift else (z, y)
        flat = cross_entropy(
            z.reshape(-1, z.shape[-1]),
            y.reshape(-1),
            reduction="none",
            label_smoothing=label_smoothing,
            ignore_index=batch.ignore_index,
        )
        losses = flat.view(y.shape) + z_loss * torch.where(stats.mask, z.logsumexp(-1), 0).square()
        correct = present("correct", stats.correct).to(losses.dtype)
        numbers |= {"lse": present("lse", stats.lse), "mean_token_accuracy": correct}
    if loss_type == "dft":
        losses = -stats.logps.exp().detach() * stats.logps
    return token_output(losses, stats, call, options, **numbers)
