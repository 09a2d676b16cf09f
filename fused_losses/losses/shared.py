"""Functions that the losses share: results, reductions, and checks of options and batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid

from ..core.batch import Batch, CallOptions
from ..core.inputs import Source, TokenStats
from ..core.options import token_numbers
from ..core.outputs import LossOutput, Part, Parts, values
from ..core.validation import Count, check_reduction, divided
from ..engine.evaluate import FormulaInputs, evaluate
from ..engine.tokens import Formula, Tokens


class Fused(NamedTuple):
    loss: Tensor  # reduced as asked
    stats: TokenStats
    tokens: Tokens  # without a graph, for metrics
    losses: Tensor | None  # of the units, without a graph; None if reduction is "none"
    unit: str
    weights: Tensor | None = (
        None  # of the units, of tokens 0 where the mask is False; the losses are multiplied by them
    )


WEIGHTS = "weights"  # name among the extras


def fused(
    formula: Formula,
    policy: Source,
    batch: Batch,
    ref: Source | None,
    inputs: FormulaInputs,
    options: CallOptions,
    weights: Tensor | None = None,
) -> Fused:
    """Evaluate a formula and reduce its losses.

    The mean is over units, or over the tokens that count if the units are tokens: with weights, that of units which each
    count as many times as its weight. The weights of tokens are read here, those of pairs are among inputs.per_sequence.
    """
    if (of_tokens := read_weights(weights, batch)) is not None:
        inputs = inputs._replace(per_token={**inputs.per_token, WEIGHTS: of_tokens})

    def weighted(tokens: Tokens) -> Tensor:
        each, weights = formula(tokens), _weights_of(tokens, inputs.unit)
        return each if weights is None else each * weights

    losses, stats, tokens = evaluate(weighted, policy, batch, ref, inputs, options)
    each = None if options.reduction == "none" else losses.detach()
    weights = _weights_of(tokens, inputs.unit)
    if options.reduction == "mean" and options.num_items is not None:
        losses = divided(losses.sum(), options.num_items)
    elif options.reduction == "mean" and weights is not None:
        losses = divided(losses.sum(), weights.sum())
    elif options.reduction == "mean":
        count = tokens.mask.sum().clamp(min=1) if inputs.unit == "token" else max(losses.numel(), 1)
        losses = losses.sum() / count
    losses = losses.sum() if options.reduction == "sum" else losses
    return Fused(losses, stats, tokens, each, inputs.unit, weights)


def read_weights(weights: Tensor | None, batch: Batch) -> Tensor | None:
    """Return the option `weights` of a loss of tokens, 0 where the mask is False; None: it was not given."""
    return None if weights is None else token_numbers(WEIGHTS, weights, batch, flags=True).masked_fill(~batch.mask, 0)


def _weights_of(tokens: Tokens, unit: str) -> Tensor | None:
    """Return the weights of the units; None: there are none, or the formula itself reads what has this name."""
    if WEIGHTS not in tokens.extra or unit not in ("token", "pair"):
        return None
    weights = tokens.extra[WEIGHTS].to(tokens.logps.dtype)
    return weights if unit == "token" else weights.tensor_split(2)[0]


def output(result: Fused, parts: Mapping[str, Part | tuple[Part, ...]]) -> LossOutput:
    """Return the result of a loss, whose metrics are the sums of the values of their parts.

    `parts` contains "loss" if the mean of the loss is not over the units, or not over tokens where these are the units.
    """
    if "loss" not in parts and result.losses is not None:
        of_tokens = result.unit == "token"
        loss = token_part(result, result.losses, result.weights) if of_tokens else Part(result.losses, result.weights)
        parts = {"loss": loss, **parts}
    return with_parts(result.loss, result.stats, parts)


def loss_and_nll(result: Fused, nll: Part, weight: float, times: Count, by: Count) -> dict[str, tuple[Part, ...]]:
    """Return the parts of losses that contain, for each unit, its share times / by of a negative log-likelihood.

    The mean of the negative log-likelihood is over tokens.
    """
    if result.losses is None or not weight:
        return {}
    remainder = Part(result.losses - weight * divided(nll.amounts * times, by))
    return {"loss": (remainder, Part(weight * nll.amounts, nll.counts))}


def smoothed(margin: Tensor, eps: float) -> Tensor:
    """Compute -(1 - eps) log sigmoid(margin) - eps log sigmoid(-margin).

    It is plain torch, which autograd differentiates. core/margin_losses.py has the same loss for kernels, with its derivative.
    """
    losses = -(1 - eps) * logsigmoid(margin)
    return losses - eps * logsigmoid(-margin) if eps else losses  # without the test, 0 * inf would be NaN


def with_parts(loss: Tensor, stats: TokenStats, parts: Mapping[str, Part | tuple[Part, ...]]) -> LossOutput:
    terms_by_name: Parts = {name: (x,) if isinstance(x, Part) else x for name, x in parts.items()}
    metrics = values({name: terms for name, terms in terms_by_name.items() if name != "loss"})
    return LossOutput(loss, metrics, stats, terms_by_name)


def token_part(result: Fused, x: Tensor, counts: Tensor | None = None) -> Part:
    """Return the Part of a number of each token, 0 where the mask is False.

    The units are rows of tokens, or packed sequences. counts: what each token counts for; None: 1 where the mask is True.
    """
    tokens, mask = result.tokens, result.tokens.mask
    if tokens.cu_seqlens is not None:
        lengths = tokens.lengths if counts is None else tokens.sums(counts)
        return Part(tokens.sums(x.reshape(-1)), lengths)
    rows = result.stats.mask.shape[0] if result.stats.mask.dim() else 1
    counts = mask if counts is None else counts
    x, mask, counts = (y.reshape(rows, y.numel() // max(rows, 1)) for y in (x, mask, counts))
    # A tensor of its own: torch.compile returns wrong shapes of a graph's outputs that are views of views of one tensor.
    return Part(x.masked_fill(~mask, 0), counts)


def sequence_part(tokens: Tokens, x: Tensor, each: int = 1) -> Part:
    """Return the Part of a number of each token, where the units are sequences, or `each` sequences together."""
    count, mask = tokens.sequences, tokens.mask
    counts = tokens.lengths if tokens.cu_seqlens is not None else mask.view(count, len(mask) // max(count, 1))
    amounts = tokens.sums(x)
    if each > 1:
        amounts, counts = (y.view(each, count // each, *y.shape[1:]).transpose(0, 1) for y in (amounts, counts))
    return Part(amounts, counts)


def pair_metrics(tokens: Tokens, rewards: Tensor, logps: Tensor, each: int = 2) -> dict[str, Part]:
    """Return TRL's metrics, from a reward and a log-prob of each sequence: of 2B, or of 3B where units have `each` = 3.

    They are means over the pairs, and the entropy of all sequences if it is requested.
    """
    chosen, rejected = rewards.tensor_split(each)[:2]
    parts = {
        "rewards/chosen": Part(chosen),
        "rewards/rejected": Part(rejected),
        "rewards/margins": Part(chosen - rejected),
        "rewards/accuracies": Part((chosen > rejected).to(rewards.dtype)),
        "logps/chosen": Part(logps.tensor_split(each)[0]),
        "logps/rejected": Part(logps.tensor_split(each)[1]),
    }
    if tokens.entropy is not None:
        parts["entropy"] = sequence_part(tokens, tokens.entropy, each)
    return parts


def reduced(losses: Tensor, reduction: str = "mean", num_items: Count | None = None) -> Tensor:
    """Reduce losses of units that fused() did not compute, in the same way as fused()."""
    num_items = check_reduction(reduction, num_items)
    if reduction == "none":
        return losses
    count = 1 if reduction == "sum" else max(losses.numel(), 1) if num_items is None else num_items
    return divided(losses.sum(), count)


def sequences_of(stats: TokenStats, batch: Batch) -> Tokens:
    """Return the log-probs of stats [S, T], or packed, with their graph, as Tokens: for sums over sequences."""
    logps, mask = stats.logps.reshape(-1), stats.mask.reshape(-1)
    return Tokens(logps, None, None, None, {}, mask, batch.cu_seqlens, batch.sequences).whole(batch.shard, ())
