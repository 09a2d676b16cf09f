"""Reference implementation of the losses of a draft model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.batch import read_batch, read_options
from ..core.divergences import parse
from ..core.inputs import Hidden, Logits, Source, as_source
from ..core.options import LEAST_ACCEPTANCE, check_speculative
from ..core.outputs import LossOutput
from .distillation import token_output
from .stats import batch_stats, transformed

__all__ = ["speculative_loss"]


def speculative_loss(
    policy: Source, labels: Tensor, ref: Source, *, loss_type: str, eta: float = 3.0, **options: Any
) -> LossOutput:
    """Compute fl.speculative_loss from the smaller of both probabilities of each token."""
    check_speculative(loss_type, eta)
    batch, call = read_batch(labels, "tokens", options), read_options(options)
    names = parse(["total_variation", "forward_kl"] if loss_type == "lk_hybrid" else "total_variation")
    stats = batch_stats(policy, batch, ref, names, entropy=call.entropy)

    def probabilities(name: str, source: Source) -> Tensor:
        source = as_source(name, source)
        if not isinstance(source, Logits | Hidden):
            raise ValueError(f"{name}: expected fl.Hidden or logits")
        z = transformed(source)
        return (z[..., :-1, :] if batch.shift else z).softmax(-1)

    alpha = torch.minimum(probabilities("policy", policy), probabilities("ref", ref)).sum(-1)
    losses = 1 - alpha
    if loss_type == "neg_log_acceptance":
        losses = -alpha.clamp(min=LEAST_ACCEPTANCE).log()
    if loss_type == "lk_hybrid":
        weight = torch.exp(-eta * alpha.detach())
        losses = weight * stats.divergence["forward_kl"] + (1 - weight) * losses
    losses, alpha = (x.masked_fill(~stats.mask, 0) for x in (losses, alpha))
    kl = {"kl": stats.divergence["forward_kl"]} if loss_type == "lk_hybrid" else {}
    return token_output(losses, stats, call, options, acceptance=alpha, **kl)
