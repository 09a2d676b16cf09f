"""Losses that fit the implied reward of a policy, beta log p/q, to rewards: REBEL for pairs, A*-PO for single responses."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from ..core.batch import read_batch, read_options
from ..core.inputs import Source
from ..core.options import SequenceOptions, check_regression
from ..core.outputs import LossOutput, Part
from ..engine.evaluate import FormulaInputs
from ..engine.tokens import Tokens
from .registry import register
from .shared import fused, output, pair_metrics, sequence_part

__all__ = ["a2po_loss", "rebel_loss"]

TARGET = "target"  # name among the extras


@register(
    SequenceOptions,
    batch="pairs",
    source="2404.16767",
    ref="optional",
    inputs={"rewards": "per sequence"},
    variants={"rebel": {"beta": 0.4}},
)
def rebel_loss(
    policy: Source,
    labels: Tensor,
    ref: Source | None,
    rewards: Tensor,
    *,
    beta: float,
    **options: Unpack[SequenceOptions],
) -> LossOutput:
    """Compute REBEL (arXiv 2404.16767): regress the difference of implied rewards of a pair on that of given rewards.

        (beta (h_1 - h_2) - (r_1 - r_2))^2,    h = sum_t log p(y_t) - log q(y_t)

    The two responses of a pair need not be ordered, and q is the policy that sampled them.

    Args:
        policy: as in preference_loss.
        labels: pairs [2B, T], the B first responses and then the B second ones, or packed, as in preference_loss.
        ref: as in preference_loss: the policy before the update. None: h is the policy's log-prob alone.
        rewards: [2B], of the responses, in the order of the labels; without a gradient.
        beta: 1 / eta of the paper, > 0.
        **options: the options of a batch, as in preference_loss.

    The metrics are those of preference_loss, in which the first response is called chosen.
    """
    batch = read_batch(labels, "pairs", options)
    inputs = FormulaInputs("pair", per_sequence={TARGET: check_regression("rewards", rewards, batch, beta)})

    def formula(tokens: Tokens) -> Tensor:
        first, second = (beta * tokens.log_ratios() - tokens.extra[TARGET]).tensor_split(2)
        return (first - second).square()

    result = fused(formula, policy, batch, ref, inputs, read_options(options))
    t = result.tokens
    return output(result, pair_metrics(t, beta * t.log_ratios(), t.sums(t.logps)))


@register(
    SequenceOptions,
    batch="sequences",
    source="2505.20686",
    ref="optional",
    inputs={"advantages": "per sequence"},
    variants={"a2po": {"beta": 0.4}},
)
def a2po_loss(
    policy: Source,
    labels: Tensor,
    ref: Source | None,
    advantages: Tensor,
    *,
    beta: float,
    **options: Unpack[SequenceOptions],
) -> LossOutput:
    """Compute the second stage of A*-PO (arXiv 2505.20686): regress the implied reward of a response on its advantage.

        (beta h - A)^2,    h = sum_t log p(y_t) - log q(y_t),    A = r - V*

    Args:
        policy: as in kto_loss.
        labels: [S, T], or packed with cu_seqlens, as in kto_loss.
        ref: as in preference_loss: the policy whose responses gave V*. None: h is the policy's log-prob alone.
        advantages: [S], the reward of the response minus fl.optimal_values of its prompt; without a gradient.
        beta: beta_2 of the paper, > 0 (beta2 of TRL's A2POTrainer).
        **options: the options of a batch, as in preference_loss.

    The metrics are rewards, the mean of beta h over sequences; advantages, their mean; and entropy if it is requested.
    """
    batch = read_batch(labels, "sequences", options)
    inputs = FormulaInputs("sequence", per_sequence={TARGET: check_regression("advantages", advantages, batch, beta)})

    def formula(tokens: Tokens) -> Tensor:
        return (beta * tokens.log_ratios() - tokens.extra[TARGET]).square()

    result = fused(formula, policy, batch, ref, inputs, read_options(options))
    t = result.tokens
    parts = {"rewards": Part(beta * t.log_ratios()), "advantages": Part(t.extra[TARGET].to(t.logps.dtype))}
    return output(result, parts if t.entropy is None else parts | {"entropy": sequence_part(t, t.entropy)})
