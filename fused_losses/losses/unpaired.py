"""Losses of single responses that are desirable or not: KTO, BCO, APO-zero."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from ..core.batch import read_batch, read_options
from ..core.inputs import Source
from ..core.options import BaselineOptions, SequenceOptions, check_bco, check_kto
from ..core.outputs import LossOutput, Part
from ..core.running_delta import RunningDelta, mean_over_ranks
from ..core.validation import check_constant
from ..engine.evaluate import FormulaInputs
from ..engine.tokens import Tokens
from .registry import register, takes
from .shared import fused, output, sequence_part

__all__ = ["RunningDelta", "bco_loss", "kto_baseline", "kto_loss"]


@register(
    SequenceOptions,
    batch="sequences",
    source="2402.01306, 2408.06266",
    ref="optional",
    inputs={"desirable": "bool per sequence"},
    variants={
        "kto": {"baseline": 0.2},
        "kto, weights": {"desirable_weight": 1.3, "undesirable_weight": 0.7, "beta": 0.4},
        "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
    },
)
def kto_loss(
    policy: Source,
    labels: Tensor,
    ref: Source | None,
    desirable: Tensor,
    *,
    loss_type: str = "kto",
    baseline: Tensor | float | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    **options: Unpack[SequenceOptions],
) -> LossOutput:
    """Compute KTO (arXiv 2402.01306 eq. 7), a loss of responses that are desirable or not, without pairs.

    It is the mean over sequences of

        desirable     w_d (1 - sigmoid(beta (h - z0)))        h = sum_t log p(y_t) - log q(y_t)
        undesirable   w_u (1 - sigmoid(beta (z0 - h)))        z0 = baseline >= 0, a constant

    "apo_zero_unpaired" (2408.06266 eq. 7) is the same with z0 = 0.

    Args:
        policy: as in preference_loss.
        labels: [S, T] with any number S of sequences, or packed with cu_seqlens [S + 1].
        ref: as in preference_loss.
        desirable: bool [S].
        loss_type: "kto" or "apo_zero_unpaired".
        baseline: z0, from kto_baseline. None: 0.
        beta: > 0.
        desirable_weight: w_d, > 0.
        undesirable_weight: w_u, > 0.
        **options: the options of a batch, as in preference_loss; num_items is the number of sequences of the whole batch.

    The metrics are TRL's rewards/chosen and rewards/rejected (means of beta h), rewards/margins, logps/chosen and
    logps/rejected, which are NaN where the batch has no such sequence (TRL leaves them out); count/chosen and count/rejected,
    the weights for averaging them over batches; kl (z0); and entropy if it is requested.
    """
    batch = read_batch(labels, "sequences", options)
    z0 = check_kto(batch, desirable, loss_type, baseline, beta, desirable_weight, undesirable_weight)

    def formula(tokens: Tokens) -> Tensor:
        good, x = tokens.extra["desirable"], beta * (tokens.log_ratios() - z0)
        losses = torch.where(good, -x, x).sigmoid()
        return torch.where(good, desirable_weight * losses, undesirable_weight * losses)

    inputs = FormulaInputs("sequence", per_sequence={"desirable": desirable})
    result = fused(formula, policy, batch, ref, inputs, read_options(options))
    return output(result, _parts(result.tokens, beta, kl=z0))


@takes(BaselineOptions)
@torch.no_grad()
def kto_baseline(
    policy: Source,
    labels: Tensor,
    ref: Source | None,
    *,
    process_group: object = None,
    **options: Unpack[BaselineOptions],
) -> Tensor:
    """Compute the baseline z0 of kto_loss, max(0, mean_s h_s): an estimate of KL(policy || ref).

    The result is a 0-d tensor without a gradient.

    Args:
        policy: as in kto_loss.
        labels: as in kto_loss. Sequence s is prompt s with the completion of another prompt (TRL: of prompt s - 1, and the
            first prompt with the last completion), so the labels mark the tokens of that completion.
        ref: as in kto_loss.
        process_group: also average over the sequences of all ranks of this group, before the maximum
            (torch.distributed.group.WORLD: over all ranks). Ranks may have different numbers of sequences. None: average over
            this process alone.
        **options: the options of a batch, as in kto_loss, without reduction, num_items, inplace_backward and entropy.
    """
    batch, call = read_batch(labels, "sequences", options), read_options(options)._replace(reduction="none")
    result = fused(Tokens.log_ratios, policy, batch, ref, FormulaInputs("sequence"), call)
    return mean_over_ranks(result.loss, process_group)[0].clamp(min=0)


@register(
    SequenceOptions,
    batch="sequences",
    source="2404.04656",
    ref="optional",
    inputs={"desirable": "bool per sequence"},
    variants={
        "bco": {},
        "delta": {"delta": 0.3, "beta": 0.4},
    },
)
def bco_loss(
    policy: Source,
    labels: Tensor,
    ref: Source | None,
    desirable: Tensor,
    *,
    delta: RunningDelta | Tensor | float = 0.0,
    weights: Tensor | None = None,
    beta: float = 0.1,
    **options: Unpack[SequenceOptions],
) -> LossOutput:
    """Compute BCO (arXiv 2404.04656), the loss of a classifier whose logit is the reward minus a shift.

    It is the mean over sequences of

        desirable    -log sigmoid(beta h - delta)         h = sum_t log p(y_t) - log q(y_t)
        undesirable  -log sigmoid(-(beta h - delta))      delta a constant

    Args:
        policy: as in kto_loss.
        labels: as in kto_loss.
        ref: as in kto_loss.
        desirable: bool [S], as in kto_loss.
        delta: a RunningDelta is first updated with the rewards of this batch and then used, as TRL does in training. It needs
            the rewards of the batch before any loss, so the plan "row_blocks" is not available. For evaluation, or to fix
            delta, pass a number or a 0-d tensor, such as the .mean of a RunningDelta; the plan "row_blocks" is then available.
        weights: factors [S] >= 0 of the losses, without a gradient. If the prompts of the two classes differ, TRL uses its
            density ratio p / (1 - p), clamped to [0.5, 10], for the undesirable and 1 for the desirable. None: 1.
        beta: > 0.
        **options: the options of a batch, as in kto_loss.

    The metrics are those of kto_loss with delta in place of kl.
    """
    batch = read_batch(labels, "sequences", options)
    running = isinstance(delta, RunningDelta)
    shift = delta if isinstance(delta, RunningDelta) else check_constant("delta", delta)
    per_sequence = check_bco(batch, desirable, weights, beta)

    def formula(tokens: Tokens) -> Tensor:
        rewards = beta * tokens.log_ratios()
        x = rewards - (shift.update(rewards) if isinstance(shift, RunningDelta) else shift)
        losses = -torch.nn.functional.logsigmoid(torch.where(tokens.extra["desirable"], x, -x))
        return losses if weights is None else losses * tokens.extra["weights"].to(losses.dtype)

    unit = "batch" if running else "sequence"
    result = fused(formula, policy, batch, ref, FormulaInputs(unit, per_sequence=per_sequence), read_options(options))
    return output(result, _parts(result.tokens, beta, delta=shift.mean if isinstance(shift, RunningDelta) else shift))


def _parts(tokens: Tokens, beta: float, **constants: Tensor | float) -> dict[str, Part | tuple[Part, ...]]:
    """Return the parts of the metrics; each of `constants`, a number of the whole batch, is given to every sequence."""
    good, logps, rewards = tokens.extra["desirable"], tokens.sums(tokens.logps), beta * tokens.log_ratios()
    parts: dict[str, Part | tuple[Part, ...]] = {}
    for name, members in (("chosen", good), ("rejected", ~good)):
        count = members.to(logps.dtype)
        parts[f"rewards/{name}"] = Part(rewards.masked_fill(~members, 0), count, "mean or nan")
        parts[f"logps/{name}"] = Part(logps.masked_fill(~members, 0), count, "mean or nan")
        parts[f"count/{name}"] = Part(count, kind="sum")
    minus = -rewards.masked_fill(good, 0)
    parts["rewards/margins"] = (parts["rewards/chosen"], Part(minus, (~good).to(logps.dtype), "mean or nan"))  # type: ignore[assignment]
    parts |= {name: Part(torch.zeros_like(logps) + x) for name, x in constants.items()}
    if tokens.entropy is not None:
        parts["entropy"] = sequence_part(tokens, tokens.entropy)
    return parts
