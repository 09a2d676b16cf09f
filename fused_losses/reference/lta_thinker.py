"""Reference implementation of LTA-Thinker: semantic alignment and reasoning focus of latent thoughts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..core.batch import read_batch, read_options
from ..core.inputs import Source
from ..core.options import check_lta_weights
from ..core.outputs import LossOutput
from ..core.validation import Count, read_count
from .common import cut, joined, part, reduced

__all__ = ["lta_thinker_loss", "reasoning_focus_loss", "semantic_alignment_loss"]


def semantic_alignment_loss(
    question: Tensor,
    thoughts: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: Count | None = None,
) -> Tensor:
    """Compute fl.semantic_alignment_loss, mean_j sum_d P_d (log P_d - log Q_jd), one example after another."""
    losses = []
    for b in range(len(question)):
        log_p = question[b].log_softmax(-1)
        log_q = [z.log_softmax(-1) for j, z in enumerate(thoughts[b]) if mask is None or mask[b, j]]
        kls = [(log_p.exp() * (log_p - x)).sum() for x in log_q]
        losses.append(torch.stack(kls).mean() if kls else question[b, :0].sum())
    return reduced(torch.stack(losses) if losses else question.sum(1), reduction, num_items)


def reasoning_focus_loss(
    question: Tensor,
    steps: Tensor,
    answers: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 0.1,
    reduction: str = "mean",
    num_items: Count | None = None,
) -> Tensor:
    """Compute fl.reasoning_focus_loss, one example after another.

    It is InfoNCE with the step closest to the answer as the positive.
    """
    losses = []
    for b in range(len(question)):
        there = [c for s, c in enumerate(steps[b]) if mask is None or mask[b, s]]
        if not there:
            losses.append(question[b, :0].sum())
            continue
        to_answer = torch.stack([cosine_similarity(c, answers[b], dim=0) for c in there])
        scores = torch.stack([cosine_similarity(c, question[b], dim=0) for c in there]) / temperature
        losses.append(scores.logsumexp(0) - scores[to_answer.argmax()] + 0 * to_answer.amax().detach())
    return reduced(torch.stack(losses) if losses else question.sum(1), reduction, num_items)


def lta_thinker_loss(
    policy: Source,
    labels: Tensor,
    question: Tensor,
    thoughts: Tensor,
    steps: Tensor,
    answers: Tensor,
    *,
    weights: tuple[float, float, float] = (0.33, 0.33, 0.33),
    temperature: float = 0.1,
    thought_mask: Tensor | None = None,
    step_mask: Tensor | None = None,
    num_nll_tokens: Count | None = None,
    **options: Any,
) -> LossOutput:
    """Compute fl.lta_thinker_loss, one sequence after another."""
    check_lta_weights(weights)
    batch, call = read_batch(labels, "sequences", options), read_options(options)
    num_items, num_nll_tokens = call.num_items, read_count("num_nll_tokens", num_nll_tokens)
    stats, sequences = cut(policy, batch, entropy=call.entropy)
    total = max(sum(len(s) for s in sequences), 1)
    nll = joined([-s.log_p for s in sequences], stats)
    focus = reasoning_focus_loss(question, steps, answers, mask=step_mask, temperature=temperature, reduction="none")
    alignment = semantic_alignment_loss(question, thoughts, mask=thought_mask, reduction="none")
    batch_size = len(sequences) if num_nll_tokens is None or num_items is None else num_items
    of_nll = part(nll * float(batch_size), total if num_nll_tokens is None else num_nll_tokens)
    losses = weights[0] * of_nll + weights[1] * focus + weights[2] * alignment
    parts = {"reasoning_focus": focus, "semantic_alignment": alignment}
    metrics = {name: x.detach().sum() / max(len(sequences), 1) for name, x in parts.items()}
    metrics["sft"] = nll.detach().sum() / total
    if stats.entropy is not None:
        metrics["entropy"] = stats.entropy.detach().sum() / total
    return LossOutput(reduced(losses, call.reduction, num_items), metrics, stats)
