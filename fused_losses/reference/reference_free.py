"""Reference implementation of the losses of pairs without a reference model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from ..core.batch import EACH, read_batch, read_options
from ..core.elementwise import cap
from ..core.inputs import Source
from ..core.options import SURE, check_cpo, check_nll_labels, check_simpo, check_tpo
from ..core.outputs import LossOutput
from ..core.validation import check_positive, read_count
from .common import Sequence, cut, joined, pair_metrics, part, reduced

__all__ = ["cpo_loss", "orpo_loss", "simpo_loss", "tpo_loss"]

Pair = tuple[Sequence, Sequence]


def _mean(y: Sequence) -> Tensor:
    return y.log_p / max(len(y), 1)


def _contrast(x: Tensor, loss_type: str, beta: float, label_smoothing: float, gamma: float = 0.0) -> Tensor:
    """Compute the term of cpo_loss and tpo_loss from the difference x of log-probs."""
    if loss_type == "hinge":
        return relu(1 - beta * x)
    if loss_type == "ipo":
        return (x - 1 / (2 * beta)) ** 2
    margin = beta * x - gamma
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def simpo_loss(
    policy: Source,
    labels: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    cpo_alpha: float = 0.0,
    **options: Any,
) -> LossOutput:
    """Compute fl.simpo_loss."""
    check_simpo(beta, gamma, alpha, label_smoothing, cpo_alpha)

    def reward(y: Sequence) -> Tensor:
        return beta * (_mean(y) if alpha == 0 else torch.expm1(cap(-alpha * _mean(y))) / -alpha)

    def loss(chosen: Sequence, rejected: Sequence) -> Tensor:
        margin = reward(chosen) - reward(rejected) - gamma
        return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)

    return _reference_free(policy, labels, loss, reward, _mean, cpo_alpha, options)[0]


def cpo_loss(
    policy: Source,
    labels: Tensor,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    cpo_alpha: float = 1.0,
    label_smoothing: float = 0.0,
    **options: Any,
) -> LossOutput:
    """Compute fl.cpo_loss."""
    check_cpo(loss_type, beta, cpo_alpha, label_smoothing)

    def logps(y: Sequence) -> Tensor:
        return _mean(y) if loss_type == "ipo" else y.log_p

    def each(chosen: Sequence, rejected: Sequence) -> Tensor:
        return _contrast(logps(chosen) - logps(rejected), loss_type, beta, label_smoothing)

    return _reference_free(policy, labels, each, lambda y: beta * logps(y), logps, cpo_alpha, options)[0]


def tpo_loss(
    policy: Source,
    labels: Tensor,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.01,
    tpo_alpha: float = 1.0,
    gamma: float | None = None,
    label_smoothing: float = 0.0,
    **options: Any,
) -> LossOutput:
    """Compute fl.tpo_loss."""
    check_tpo(loss_type, beta, tpo_alpha, gamma, label_smoothing)

    def logps(y: Sequence) -> Tensor:
        return _mean(y) if loss_type in ("ipo", "tpo-l") else y.log_p

    def each(chosen: Sequence, rejected: Sequence) -> Tensor:
        return _contrast(logps(chosen) - logps(rejected), loss_type, beta, label_smoothing, gamma or 0.0)

    return _reference_free(policy, labels, each, lambda y: beta * logps(y), logps, tpo_alpha, options, kind="triples")[
        0
    ]


def orpo_loss(
    policy: Source, labels: Tensor, *, beta: float = 0.1, nll_labels: Tensor | None = None, **options: Any
) -> LossOutput:
    """Compute fl.orpo_loss."""
    check_positive(beta=beta)

    def log_odds(chosen: Sequence, rejected: Sequence) -> Tensor:
        def each(y: Sequence) -> Tensor:
            log_m = _mean(y).clamp(max=SURE)
            return log_m - torch.log(-torch.expm1(log_m))

        return each(chosen) - each(rejected)

    def loss(chosen: Sequence, rejected: Sequence) -> Tensor:
        return -beta * logsigmoid(log_odds(chosen, rejected))

    out, pairs = _reference_free(policy, labels, loss, lambda y: beta * _mean(y), _mean, 1.0, options, nll_labels)
    odds = joined([log_odds(chosen, rejected) for chosen, rejected in pairs], out.stats).detach()
    out.metrics.update(log_odds_chosen=reduced(odds), log_odds_ratio=reduced(logsigmoid(odds)))
    return out


def _reference_free(
    policy: Source,
    labels: Tensor,
    loss: Callable[[Sequence, Sequence], Tensor],
    reward: Callable[[Sequence], Tensor],
    logps: Callable[[Sequence], Tensor],
    weight: float,
    options: dict[str, Any],
    nll_labels: Tensor | None = None,
    kind: str = "pairs",
) -> tuple[LossOutput, list[Pair]]:
    """Compute loss(chosen, rejected) + weight NLL; return the loss of the batch, and the pairs."""
    batch, call = read_batch(labels, kind, options), read_options(options)
    num_items, num_nll_tokens = call.num_items, read_count("num_nll_tokens", options.get("num_nll_tokens"))
    count = batch.sequences // EACH[kind]
    stats, sequences = cut(policy, batch, entropy=call.entropy)
    pairs = list(zip(sequences[:count], sequences[count : 2 * count], strict=True))
    texts = sequences[:count] if kind == "pairs" else sequences[2 * count :]
    if nll_labels is not None:
        extra_labels = batch.aligned(check_nll_labels(nll_labels, batch.labels))
        both = extra_labels.where(batch.labels == batch.ignore_index, batch.labels)
        texts = cut(policy, batch.with_labels(both))[1][:count]
    tokens = max(sum(len(y) for y in texts), 1)
    by = tokens if num_nll_tokens is None else num_nll_tokens
    times = float(count if num_items is None or num_nll_tokens is None else num_items)
    losses = [
        loss(chosen, rejected) - weight * part(times * y.log_p, by)
        for (chosen, rejected), y in zip(pairs, texts, strict=True)
    ]
    metrics = pair_metrics(
        [(reward(chosen), reward(rejected)) for chosen, rejected in pairs],
        [(logps(chosen), logps(rejected)) for chosen, rejected in pairs],
        stats,
    )
    metrics["nll_loss"] = -reduced(joined([y.log_p for y in texts], stats), "sum").detach() / tokens
    return LossOutput(reduced(joined(losses, stats), call.reduction, num_items), metrics, stats), pairs
