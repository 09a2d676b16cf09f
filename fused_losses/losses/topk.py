"""Distillation from the K best tokens of a teacher."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from ..core.batch import Batch, read_batch, read_options
from ..core.divergences import Divergence, from_key
from ..core.elementwise import FAR
from ..core.inputs import Logits, LogProbs, Source, as_source
from ..core.options import TokenOptions, check_teacher, check_topk
from ..core.outputs import LossOutput
from ..core.validation import check_weights, divided
from ..engine.logits_at import stats_at
from ..engine.token_stats import token_stats
from ..engine.tokens import Tokens
from ..engine.topk import topk
from .distillation import token_means
from .registry import register
from .shared import Fused, output, read_weights

__all__ = ["TopKOverlap", "topk_distillation_loss", "topk_overlap"]

NOTHING = -FAR  # log-prob of an entry that does not exist: finite, so that differences are finite


@register(
    TokenOptions,
    batch="tokens",
    source="TRL",
    ref="unused",
    distribution=True,
    inputs={"topk_logps": "top-k log-probs per token", "topk_ids": "top-k ids per token"},
    variants={
        "bucket": {},
        "reverse": {"divergence": "reverse_kl"},
        "renormalised": {"tail": "renormalise"},
        "js, with labels": {"divergence": "js(beta=0.3)", "hard": 0.5},
        "ignore": {"tail": "ignore"},
        "ignore, reverse": {"tail": "ignore", "divergence": "reverse_kl"},
        "ignore, js": {"tail": "ignore", "divergence": "js"},
        "renormalised, skew": {"tail": "renormalise", "divergence": "skew_reverse_kl"},
    },
)
def topk_distillation_loss(
    student: Source,
    labels: Tensor,
    topk_logps: Tensor,
    topk_ids: Tensor,
    *,
    tail: str = "bucket",
    divergence: str | Divergence = "forward_kl",
    soft: float = 1.0,
    hard: float = 0.0,
    **options: Unpack[TokenOptions],
) -> LossOutput:
    """Compute a distillation loss where only the teacher's log-probs of K tokens are known.

    For p the student and q the teacher, it is the mean over the tokens that count (label != ignore_index) of

        soft D(p', q') - hard log p(label)

    p' and q' are distributions over the K tokens; `tail` says how the other tokens are treated:

        "bucket"       They are one more token, of probability 1 - sum_k p_k and 1 - sum_k q_k (TRL's add_tail). A bucket of
                       less than a few roundings of 1 (5e-7 in float32) is set to that.
        "renormalise"  They do not exist: p_k / sum_j p_j and q_k / sum_j q_j.
        "ignore"       They are left out of the sum over tokens, and p_k and q_k are unchanged. D is then no divergence and
                       may be negative. Only for forward_kl, sum_k q_k log q_k / p_k, reverse_kl and js.

    The student's log-probs at the ids need no tensor of vocabulary size: from hidden states, x . W_id is computed a few rows
    at a time.

    Args:
        student: fl.Hidden or logits [..., V].
        labels: token ids [...]. They mark the tokens that count, and are the targets of the hard part.
        topk_logps: natural logarithms [..., K] ([..., T - 1, K] with shift) at the student's temperature, without a gradient.
            Where a token has fewer than K, fill with -inf and any id.
        topk_ids: ids [..., K], as topk_logps. The ids of a token differ from one another. They may be the student's own best
            (as in TRL's SDPO), with the teacher's log-probs of these.
        tail: "bucket", "renormalise" or "ignore".
        divergence: D, any of fl.divergences.names(), as in distillation_loss.
        soft: the weight of the divergence.
        hard: the weight of the negative log-likelihood of the labels.
        weights: one for each output token, numbers or bools >= 0, without a gradient ([..., T - 1] with shift). The losses are
            multiplied by them, and the mean is divided by their sum instead of the number of tokens; num_items divides by any
            other number. Metrics are not weighted. None: 1.
        **options: the options of a batch, as in preference_loss; the mean is over the tokens that count.

    The metrics are means over the tokens: kl (the divergence), topk_mass (sum_k p_k), teacher_mass (sum_k q_k), logps, and
    entropy if it is requested. topk_overlap compares the ids with the student's own.
    """
    source, d = as_source("student", student), from_key(divergence)
    check_topk(tail, d)
    check_weights(soft=soft, hard=hard)
    batch, call = read_batch(labels, "tokens", options), read_options(options)
    if isinstance(source, LogProbs):
        raise ValueError("student: expected fl.Hidden or logits, got fl.LogProbs")
    mask = batch.mask
    check_teacher(topk_logps, topk_ids, mask)
    keep = mask.unsqueeze(-1) & (topk_logps != -math.inf)
    stats, z, lse = stats_at(source, batch, topk_ids, keep, call)
    logq = topk_logps.detach().to(z.dtype).masked_fill(~keep, NOTHING)
    mass = z.masked_fill(~keep, NOTHING).logsumexp(-1) - lse  # log sum_k p_k
    kl = _divergence(d, tail, z.masked_fill(~keep, NOTHING), logq, mass, lse, mask)
    losses = soft * kl - hard * stats.logps
    weights = read_weights(options.get("weights"), batch)
    counts = mask if weights is None else weights.to(losses.dtype)
    losses = losses if weights is None else losses * counts
    masses = {"topk_mass": mass.exp(), "teacher_mass": logq.exp().sum(-1)}
    numbers = {"kl": kl, "logps": stats.logps} | {name: x.masked_fill(~mask, 0) for name, x in masses.items()}
    numbers |= {} if stats.entropy is None else {"entropy": stats.entropy}
    total, mask, counts, *others = batch.shard.whole([losses, mask, counts, *numbers.values()])
    if call.reduction == "mean":
        losses = divided(total.sum(), counts.sum() if call.num_items is None else call.num_items)
    elif call.reduction == "sum":
        losses = total.sum()
    each = None if call.reduction == "none" else total.detach()
    whole = dict(zip(numbers, (x.detach().reshape(-1) for x in others), strict=True))
    weights = None if weights is None else counts.reshape(-1)
    result = Fused(losses, replace(stats, divergence={d.key: kl}), _tokens(whole, mask, batch), each, "token", weights)
    return output(result, token_means(result, **whole))


class TopKOverlap(NamedTuple):
    """What topk_overlap returns: numbers of each output token, 0 where the mask is False, without a gradient.

    Attributes:
        overlap: How many of the teacher's ids are among the student's own K best.
        student_mass: sum_k p_k over the teacher's ids.
        teacher_mass: sum_k q_k.
        advantage: The mean of q_k (log q_k - log p_k) over the common ids, 0 where there is none.
    """

    overlap: Tensor
    student_mass: Tensor
    teacher_mass: Tensor
    advantage: Tensor


@torch.no_grad()
def topk_overlap(
    student: Source, labels: Tensor, topk_logps: Tensor, topk_ids: Tensor, **options: Unpack[TokenOptions]
) -> TopKOverlap:
    """Compare the K best tokens of a student with those of a teacher: metrics of top-k distillation, for each token.

    They are those of verl's compute_forward_kl_topk, where `advantage` has the other sign. fl.topk finds the student's own K
    best without logits of all tokens in memory. p is the student, normalised over the whole vocabulary, and q the teacher.

    Args:
        student: fl.Hidden or logits [..., V], as in topk_distillation_loss.
        labels: as in topk_distillation_loss; they mark the tokens that count.
        topk_logps: as in topk_distillation_loss.
        topk_ids: as in topk_distillation_loss.
        **options: the options of a batch, as in topk_distillation_loss; those about the loss are not read.
    """
    source, batch, call = as_source("student", student), read_batch(labels, "tokens", options), read_options(options)
    if isinstance(source, LogProbs):
        raise ValueError("student: expected fl.Hidden or logits, got fl.LogProbs")
    check_teacher(topk_logps, topk_ids, batch.mask)
    keep = batch.mask.unsqueeze(-1) & (topk_logps != -math.inf)
    stats, z, lse = stats_at(source, batch, topk_ids, keep, call)
    own = topk(source, topk_ids.shape[-1], workspace=call.workspace).ids
    own = own[..., :-1, :] if batch.shift else own
    common = keep & (topk_ids.unsqueeze(-1) == own.unsqueeze(-2)).any(-1)
    logp, logq = (x.masked_fill(~keep, 0) for x in (z - lse.unsqueeze(-1), topk_logps.to(z.dtype)))
    gain = (logq.exp() * (logq - logp)).masked_fill(~common, 0).sum(-1)
    count = common.sum(-1)
    p, q = (x.exp().masked_fill(~keep, 0).sum(-1) for x in (logp, logq))
    return TopKOverlap(count, p, q, gain / count.clamp(min=1))


def _tokens(numbers: dict[str, Tensor], mask: Tensor, batch: Batch) -> Tokens:
    """Return the tokens of all ranks, whose log-probs and entropy are taken out of the numbers."""
    logps, entropy = numbers.pop("logps"), numbers.pop("entropy", None)
    return Tokens(logps, None, None, entropy, {}, mask.reshape(-1), batch.cu_seqlens, 0)


def _divergence(d: Divergence, tail: str, z: Tensor, logq: Tensor, mass: Tensor, lse: Tensor, mask: Tensor) -> Tensor:
    """Return the divergence [...] of each token, and 0 where the mask is False.

    A distribution over K tokens is treated as one over a small vocabulary, whose logits are z.
    """
    if tail == "ignore":
        return _partial(d, z - lse.unsqueeze(-1), logq).masked_fill(~mask, 0)
    if tail == "bucket":
        z = torch.cat([z, (lse + _log_rest(mass)).unsqueeze(-1)], dim=-1)
        logq = torch.cat([logq, _log_rest(logq.logsumexp(-1)).unsqueeze(-1)], dim=-1)
    none = ~mask | (logq.amax(-1) == NOTHING)
    labels = torch.zeros_like(mask, dtype=torch.long).masked_fill(none, -100)
    return token_stats(Logits(z), labels, Logits(logq), divergence=d, shift=False).divergence[d.key]


def _log_rest(mass: Tensor) -> Tensor:
    """Compute log(1 - e^mass)."""
    return torch.log(-torch.expm1(mass.clamp(max=-4 * torch.finfo(mass.dtype).eps)))


def _partial(d: Divergence, logp: Tensor, logq: Tensor) -> Tensor:
    """Compute the sums over the K tokens of p log(p / m) or q log(q / m)."""
    p, q = logp.exp(), logq.exp()
    if d.name == "forward_kl":
        return (q * (logq - logp)).sum(-1)
    if d.name == "reverse_kl":
        return (p * (logp - logq)).sum(-1)
    (beta,) = d.params
    logm = torch.logaddexp(logq + math.log(beta), logp + math.log1p(-beta))
    return (beta * q * (logq - logm) + (1 - beta) * p * (logp - logm)).sum(-1)
