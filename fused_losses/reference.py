"""Eager twins of the public functions, under the same names: the definition of correct, written to be read.

Plain torch, any float dtype, CPU or GPU, differentiable by autograd as often as one likes. They hold every log-softmax of
vocabulary size, as the code that this package replaces does. Run them in float64 to judge anything else.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .divergences import Divergence, from_key, parse
from .losses import LossOutput, _check_batch, _check_options, _metrics, _reduce, _shift_packed
from .sources import Hidden, Logits, LogProbs, Source, TokenStats, as_source, check_aligned, check_labels, check_pair
from .stats import Asked, given_logps


def _transformed(source: Logits | Hidden) -> Tensor:
    """softcap tanh(z / softcap) * scale / temperature over the valid vocabulary."""
    z = source.logits if isinstance(source, Logits) else _projected(source)
    z = z[..., : source.vocab]
    if source.softcap is not None:
        z = source.softcap * torch.tanh(z / source.softcap)
    return z * source.scale / source.temperature


def _projected(source: Hidden) -> Tensor:
    z = source.hidden @ source.weight.T
    if source.lora is not None:
        z = z + source.lora.scaling * (source.hidden @ source.lora.a.T) @ source.lora.b.T
    return z if source.bias is None else z + source.bias


def _shifted(labels: Tensor, shift: bool) -> Tensor:
    return labels[..., 1:] if shift else labels


def token_stats(
    policy: Source, labels: Tensor, ref: Source | None = None, *, divergence: Asked = None, entropy: bool = False,
    shift: bool = False, ignore_index: int = -100, inplace_backward: bool = False, plan: str = "auto",
    workspace: int | None = None, static_shapes: bool = False,
) -> TokenStats:  # fmt: skip
    """fl.token_stats with whole tensors of logits; the last four arguments say how, and mean nothing here."""
    mask = _shifted(check_labels(labels), shift) != ignore_index
    target = _shifted(labels, shift).long().masked_fill(~mask, 0).unsqueeze(-1)

    def side(name: str, source: Source) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """log-prob of the label, and where there are logits log p [..., V] and z."""
        source = as_source(name, source)
        if isinstance(source, LogProbs):
            return given_logps(name, source, mask), None, None
        check_aligned(name, source, labels)
        z = _transformed(source)
        z = z[..., :-1, :] if shift else z
        log_p = z.log_softmax(-1)
        return log_p.gather(-1, target).squeeze(-1).masked_fill(~mask, 0), log_p, z

    logps, log_p, z = side("policy", policy)
    ref_logps, log_q, _ = (None, None, None) if ref is None else side("ref", ref)
    if log_p is not None and log_q is not None:
        check_pair(as_source("policy", policy), as_source("ref", ref))  # type: ignore[arg-type]
    asked = parse(divergence)
    if asked and (log_p is None or log_q is None):
        raise ValueError(f"divergence: {asked[0].key!r} needs policy and ref as logits")
    values = {d.key: d.define(log_p.exp(), log_q.exp()).masked_fill(~mask, 0) for d in asked}  # type: ignore[union-attr]
    if log_p is None or z is None:
        return TokenStats(logps, ref_logps, values, None, None, mask, None)
    h = torch.special.entr(log_p.exp()).sum(-1).masked_fill(~mask, 0) if entropy else None  # H = -sum p log p
    correct = (z.gather(-1, target).squeeze(-1) >= z.amax(-1)) & mask
    return TokenStats(logps, ref_logps, values, h, z.logsumexp(-1).masked_fill(~mask, 0), mask, correct)


def preference_loss(
    policy: Source, labels: Tensor, ref: Source | None = None, *, loss: str = "sigmoid",
    divergence: str | Divergence = "reverse_kl", beta: float = 0.1, label_smoothing: float = 0.0, reduction: str = "mean",
    num_items: int | Tensor | None = None, cu_seqlens: Tensor | None = None, shift: bool = False,
    ignore_index: int = -100, entropy: bool = False, inplace_backward: bool = False, plan: str = "auto",
    workspace: int | None = None, static_shapes: bool = False,
) -> LossOutput:  # fmt: skip
    """fl.preference_loss, one sequence after another."""
    _check_options(loss, beta, label_smoothing, reduction, num_items)
    link = from_key(divergence)
    link.f_dpo_link()
    assert link.score is not None
    sequences = _check_batch(check_labels(labels), cu_seqlens)
    if shift and cu_seqlens is not None:
        labels, shift = _shift_packed(labels, cu_seqlens, ignore_index), False
    source = None if ref is None else as_source("ref", ref)
    if source is None and link.name != "reverse_kl":
        raise ValueError(f"divergence: {link.key!r} needs a reference, got ref=None")
    summed = isinstance(source, LogProbs) and source.logps.shape == (sequences,) != labels.shape
    stats = token_stats(
        policy, labels, None if summed else ref, entropy=entropy, shift=shift, ignore_index=ignore_index
    )  # fmt: skip

    def sums(x: Tensor) -> Tensor:  # log p(y | x) = sum_t log p(y_t)
        if cu_seqlens is None:
            return x.sum(1)
        offsets = cu_seqlens.tolist()
        return torch.stack([x[a:b].sum() for a, b in zip(offsets, offsets[1:], strict=False)]) if sequences else x[:0]

    log_p = sums(stats.logps)
    log_q = torch.zeros_like(log_p)
    if summed:
        log_q = source.logps  # type: ignore[union-attr]
    elif stats.ref_logps is not None:
        log_q = sums(stats.ref_logps)
    h_w, h_l = (log_p - log_q).tensor_split(2)
    margin = beta * (link.score(h_w) - link.score(h_l))  # f-DPO (2309.16240): s(h) = f'(e^h); DPO: s(h) = h
    eps = label_smoothing
    losses = -(1 - eps) * logsigmoid(margin) - eps * logsigmoid(-margin)  # DPO eq. 7; cDPO where eps > 0
    return LossOutput(_reduce(losses, reduction, num_items), _metrics(log_p, log_q, beta, stats), stats)


def dpo_loss(policy: Source, labels: Tensor, ref: Source | None = None, **options) -> LossOutput:  # type: ignore[no-untyped-def]
    """fl.dpo_loss."""
    return preference_loss(policy, labels, ref, loss="sigmoid", **options)
