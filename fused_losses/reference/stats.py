"""Reference implementation of token_stats, with whole tensors of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.batch import Batch, token_batch
from ..core.divergences import Asked, Divergence, parse
from ..core.inputs import (
    Hidden,
    Logits,
    LogProbs,
    Source,
    TokenStats,
    as_source,
    check_aligned,
    check_pair,
)
from ..core.support import Support, padded
from ..core.validation import given_logps

__all__ = ["token_stats"]


def transformed(source: Logits | Hidden) -> Tensor:
    """Compute softcap tanh(z / softcap) * scale / temperature over the valid vocabulary."""
    z = source.logits if isinstance(source, Logits) else projected(source)
    z = z[..., : source.vocab]
    if source.softcap is not None:
        z = source.softcap * torch.tanh(z / source.softcap)
    temperature = source.temperature
    return z * source.scale / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)


def projected(source: Hidden) -> Tensor:
    z = source.hidden @ source.weight.T
    if source.lora is not None:
        z = z + source.lora.scaling * (source.hidden @ source.lora.a.T) @ source.lora.b.T
    return z if source.bias is None else z + source.bias


def entropy_of(log_p: Tensor) -> Tensor:
    """Compute the entropy H = -sum p log p."""
    p = log_p.exp()
    return -(p * log_p.where(p > 0, 0)).sum(-1)


def token_stats(
    policy: Source,
    labels: Tensor,
    ref: Source | None = None,
    *,
    divergence: Asked = None,
    entropy: bool = False,
    collision: bool = False,
    support: Support | None = None,
    shift: bool | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    plan: str = "auto",
    workspace: int | None = None,
    static_shapes: bool = False,
) -> TokenStats:
    """Compute fl.token_stats with whole tensors of logits.

    The last four arguments say how to compute, and are ignored here.
    """
    batch = token_batch(labels, shift, ignore_index)
    policy = policy if support is None else on_support(policy, batch, support)
    return batch_stats(policy, batch, ref, parse(divergence), entropy=entropy, collision=collision)


def on_support(policy: Source, batch: Batch, support: Support) -> Logits:
    """Return the logits of the policy, -inf for the ids that are not in the support."""
    source = as_source("policy", policy)
    if isinstance(source, LogProbs):
        raise ValueError("policy: fl.LogProbs has no logits; expected fl.Hidden or logits")
    z, (ids, keep) = transformed(source), padded(support, batch)
    kept = torch.zeros_like(z[..., :-1, :] if batch.shift else z).scatter_add_(-1, ids, keep.to(z.dtype)) > 0
    kept = torch.nn.functional.pad(kept, (0, 0, 0, 1), value=True) if batch.shift else kept
    nothing = ~kept.any(-1, keepdim=True)  # at tokens that do not count
    return Logits(z.masked_fill(~(kept | nothing), -torch.inf))


def batch_stats(
    policy: Source,
    batch: Batch,
    ref: Source | None = None,
    asked: tuple[Divergence, ...] = (),
    *,
    entropy: bool = False,
    collision: bool = False,
) -> TokenStats:
    """Compute token_stats of a batch."""
    mask = batch.mask
    target = (batch.labels[..., 1:] if batch.shift else batch.labels).long().masked_fill(~mask, 0).unsqueeze(-1)

    def side(name: str, source: Source) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the log-prob of the label and, if there are logits, log p [..., V] and z."""
        source = as_source(name, source)
        if isinstance(source, LogProbs):
            return given_logps(name, source, mask), None, None
        check_aligned(name, source, batch.labels)
        z = transformed(source)
        z = z[..., :-1, :] if batch.shift else z
        log_p = z.log_softmax(-1)
        return log_p.gather(-1, target).squeeze(-1).masked_fill(~mask, 0), log_p, z

    logps, log_p, z = side("policy", policy)
    ref_logps, log_q, _ = (None, None, None) if ref is None else side("ref", ref)
    if asked and (log_p is None or log_q is None):
        raise ValueError(f"divergence: {asked[0].key!r} needs policy and ref as logits")
    if asked:
        check_pair(as_source("policy", policy), as_source("ref", ref))  # type: ignore[arg-type]
    if collision and log_p is None:
        raise ValueError("collision: needs policy as logits")
    values = {d.key: d.define(log_p, log_q).masked_fill(~mask, 0) for d in asked}  # type: ignore[arg-type]
    if log_p is None or z is None:
        return TokenStats(logps, ref_logps, values, None, None, mask, None)
    h = entropy_of(log_p).masked_fill(~mask, 0) if entropy else None
    squares = (2 * log_p.detach()).logsumexp(-1).masked_fill(~mask, 0) if collision else None  # log sum p^2
    correct = (z.gather(-1, target).squeeze(-1) >= z.amax(-1)) & mask
    return TokenStats(logps, ref_logps, values, h, z.logsumexp(-1).masked_fill(~mask, 0), mask, correct, squares)
