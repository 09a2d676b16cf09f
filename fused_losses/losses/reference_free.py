"""Losses of pairs without a reference model: SimPO, CPO, ORPO; and of triples: TPO.

Each is a term of the pair's log-probs (means or sums over tokens) plus a share of the negative log-likelihood of the chosen
responses, or of the gold ones of triples. The mean of the latter is over the tokens of the batch: the share of a pair is
B / tokens times its own sum, so that the mean over pairs is the mean over tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..core.batch import EACH, read_batch, read_options
from ..core.elementwise import cap
from ..core.inputs import Source
from ..core.options import SURE, SequenceOptions, check_cpo, check_nll_labels, check_simpo, check_tpo
from ..core.outputs import LossOutput, Part
from ..core.validation import Count, check_positive, divided, read_count
from ..engine.evaluate import FormulaInputs
from ..engine.tokens import Tokens
from .registry import register
from .shared import Fused, fused, loss_and_nll, output, pair_metrics, smoothed

__all__ = ["cpo_loss", "orpo_loss", "simpo_loss", "tpo_loss"]


@register(
    SequenceOptions,
    batch="pairs",
    source="2405.14734, 2501.03884",
    ref="unused",
    variants={
        "SimPO": {},
        "CPO-SimPO": {"cpo_alpha": 0.5, "gamma": 1.5, "label_smoothing": 0.1},
        "AlphaPO": {"alpha": 0.25},
        "AlphaPO, alpha < 0": {"alpha": -0.5},
    },
)
def simpo_loss(
    policy: Source,
    labels: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    cpo_alpha: float = 0.0,
    num_nll_tokens: Count | None = None,
    **options: Unpack[SequenceOptions],
) -> LossOutput:
    """Compute SimPO (arXiv 2405.14734 eq. 6), a loss of pairs without a reference model.

    The reward of a response is the mean log-prob of its tokens:

        margin = beta (r_w - r_l) - gamma,    r = 1/|y| sum_t log p(y_t)
        -(1 - eps) log sigmoid(margin) - eps log sigmoid(-margin) + cpo_alpha NLL(chosen)

    The defaults of TRL differ: beta is 0.1, far below the 2 to 10 of the paper, and cpo_alpha is 1, which is CPO-SimPO; SimPO
    has 0.

    Args:
        policy: fl.Hidden, logits or fl.LogProbs.
        labels: pairs [2B, T], or packed with cu_seqlens, as in preference_loss. There is one loss for each pair.
        beta: > 0.
        gamma: the target margin of the rewards, after they are multiplied by beta, as in the paper and in TRL
            (`simpo_gamma`). SimPO's own code takes gamma / beta (`gamma_beta_ratio`).
        alpha: if it is not 0, AlphaPO (2501.03884): r = (1 - m^-alpha) / alpha, where m is the geometric mean of the tokens'
            probabilities. In the limit 0 it is SimPO.
        label_smoothing: eps, in [0, 0.5).
        cpo_alpha: as in cpo_loss.
        num_nll_tokens: as in cpo_loss.
        **options: the options of a batch, as in preference_loss.

    The metrics are those of preference_loss, with rewards beta r and, as logps, the means that the loss uses, as TRL logs
    them; and nll_loss.
    """
    check_simpo(beta, gamma, alpha, label_smoothing, cpo_alpha)

    def reward(x: Tensor) -> Tensor:
        return x if alpha == 0 else torch.expm1(cap(-alpha * x)) / -alpha

    def term(chosen: Tensor, rejected: Tensor) -> Tensor:
        return smoothed(beta * (reward(chosen) - reward(rejected)) - gamma, label_smoothing)

    result, x, nll = _pairs(term, policy, labels, True, cpo_alpha, num_nll_tokens, options)
    return output(result, pair_metrics(result.tokens, beta * reward(x), x) | nll)


@register(
    SequenceOptions,
    batch="pairs",
    source="2401.08417",
    ref="unused",
    variants={
        "CPO": {},
        "smoothed": {"label_smoothing": 0.1, "beta": 0.3, "num_nll_tokens": 29},
        "hinge": {"loss_type": "hinge", "beta": 0.3},
        "IPO": {"loss_type": "ipo", "cpo_alpha": 0.5},
        "no NLL": {"cpo_alpha": 0.0},
    },
)
def cpo_loss(
    policy: Source,
    labels: Tensor,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    cpo_alpha: float = 1.0,
    label_smoothing: float = 0.0,
    num_nll_tokens: Count | None = None,
    **options: Unpack[SequenceOptions],
) -> LossOutput:
    """Compute CPO (arXiv 2401.08417): DPO with a uniform reference, plus the negative log-likelihood of the chosen.

    As in TRL, with x = log p(y_w) - log p(y_l):

        "sigmoid":  -(1 - eps) log sigmoid(beta x) - eps log sigmoid(-beta x)
        "hinge":    max(0, 1 - beta x)
        "ipo":      (x - 1 / (2 beta))^2, with means over tokens in x where the others have sums
        + cpo_alpha NLL,    NLL = -sum over the chosen tokens of the batch of log p(y_t) / their number

    TRL's fourth type, "simpo", is simpo_loss. With reduction="none" the mean of the results is the loss: each pair gets a
    share of NLL according to its log-probs.

    Args:
        policy: as in simpo_loss.
        labels: as in simpo_loss. They mark the tokens that count, for both parts of the loss.
        loss_type: "sigmoid", "hinge" or "ipo".
        beta: > 0.
        cpo_alpha: >= 0.
        label_smoothing: eps, in [0, 0.5), only for "sigmoid".
        num_nll_tokens: the number of chosen tokens of the whole batch, when gradients accumulate. Use it together with
            num_items, the number of pairs of the whole batch. With num_items alone, the NLL of a micro-batch is the mean over
            its own tokens, weighted by its pairs.
        **options: the options of a batch, as in preference_loss.

    The metrics are those of simpo_loss, with rewards beta log p(y), or beta times the mean for "ipo".
    """
    check_cpo(loss_type, beta, cpo_alpha, label_smoothing)
    term = _contrast(loss_type, beta, label_smoothing)
    result, x, nll = _pairs(term, policy, labels, loss_type == "ipo", cpo_alpha, num_nll_tokens, options)
    return output(result, pair_metrics(result.tokens, beta * x, x) | nll)


@register(
    SequenceOptions,
    batch="pairs",
    source="2403.07691",
    ref="unused",
    variants={
        "ORPO": {},
        "accumulated": {"beta": 0.5, "num_nll_tokens": 29},
    },
)
def orpo_loss(
    policy: Source,
    labels: Tensor,
    *,
    beta: float = 0.1,
    nll_labels: Tensor | None = None,
    num_nll_tokens: Count | None = None,
    **options: Unpack[SequenceOptions],
) -> LossOutput:
    """Compute ORPO (arXiv 2403.07691 eq. 6): the NLL of the chosen responses, and their odds against the rejected.

        NLL - beta log sigmoid(log odds(y_w) - log odds(y_l)),    odds = m / (1 - m),    log m = 1/|y| sum_t log p(y_t)

    NLL is the negative log-likelihood as in cpo_loss. A mean log-prob above -1e-12 is replaced by -1e-12: the odds of a
    certain or empty response are finite and get no gradient.

    Args:
        policy: as in cpo_loss.
        labels: as in cpo_loss.
        beta: the lambda of the paper, > 0.
        nll_labels: as labels, but they also mark the tokens that count only for NLL. TRL's NLL is over prompt and completion
            of the chosen; to get it, pass input_ids with ignore_index at the padding. NLL is over the chosen tokens that
            either labels or nll_labels mark, and stats contain all of these. None: the completion only.
        num_nll_tokens: as in cpo_loss.
        **options: the options of a batch, as in preference_loss.

    The metrics are those of simpo_loss, with rewards beta log m; log_odds_chosen, the mean difference of log odds; and
    log_odds_ratio, the mean log sigmoid of that difference (TRL's names).
    """
    check_positive(beta=beta)

    def log_odds(chosen: Tensor, rejected: Tensor) -> Tensor:
        chosen, rejected = chosen.clamp(max=SURE), rejected.clamp(max=SURE)
        return chosen - rejected - (torch.log(-torch.expm1(chosen)) - torch.log(-torch.expm1(rejected)))

    def term(chosen: Tensor, rejected: Tensor) -> Tensor:
        return -beta * logsigmoid(log_odds(chosen, rejected))

    result, x, nll = _pairs(term, policy, labels, True, 1.0, num_nll_tokens, options, nll_labels)
    odds = log_odds(*x.tensor_split(2))
    odds_parts = {"log_odds_chosen": Part(odds), "log_odds_ratio": Part(logsigmoid(odds))}
    return output(result, pair_metrics(_scored(result.tokens), beta * x, x) | odds_parts | nll)


@register(
    SequenceOptions,
    "gamma",
    batch="triples",
    source="2405.16681",
    ref="unused",
    variants={
        "TPO": {},
        "TPO-L": {"loss_type": "tpo-l", "beta": 2.0, "gamma": 0.7, "label_smoothing": 0.1},
        "hinge": {"loss_type": "hinge", "beta": 0.3, "num_nll_tokens": 29},
        "IPO": {"loss_type": "ipo", "beta": 0.3, "tpo_alpha": 0.5},
    },
)
def tpo_loss(
    policy: Source,
    labels: Tensor,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.01,
    tpo_alpha: float = 1.0,
    gamma: float | None = None,
    label_smoothing: float = 0.0,
    num_nll_tokens: Count | None = None,
    **options: Unpack[SequenceOptions],
) -> LossOutput:
    """Compute TPO (arXiv 2405.16681): a loss of chosen and rejected without a reference model, and the NLL of gold responses.

    As in TRL, with x = log p(y_w) - log p(y_l):

        "sigmoid":  -(1 - eps) log sigmoid(beta x) - eps log sigmoid(-beta x)
        "hinge":    max(0, 1 - beta x)
        "ipo":      (x - 1 / (2 beta))^2, with means over tokens in x, as in "tpo-l"
        "tpo-l":    -(1 - eps) log sigmoid(beta x - gamma) - eps log sigmoid(gamma - beta x)
        + tpo_alpha NLL,    NLL = -sum over the gold tokens of the batch of log p(y_t) / their number

    What TRL calls the reference is the gold response, not a model.

    Args:
        policy: as in simpo_loss.
        labels: triples [3B, T]: B chosen, then B rejected, then B gold responses, as TRL's collator has them; or packed with
            cu_seqlens in this order. There is one loss for each triple.
        loss_type: "sigmoid", "hinge", "ipo" or "tpo-l".
        beta: > 0.
        tpo_alpha: >= 0. With 0 the gold responses do not count; cpo_loss with cpo_alpha=0 is the same without them.
        gamma: the target margin of the rewards, only for "tpo-l", which needs it (TRL's tpo_l_gamma, 0.5 there).
        label_smoothing: eps, in [0, 0.5), only for "sigmoid" and "tpo-l".
        num_nll_tokens: as in cpo_loss, of the gold tokens.
        **options: the options of a batch, as in preference_loss.

    The metrics are those of cpo_loss, where nll_loss is that of the gold responses and entropy is over all three.
    """
    check_tpo(loss_type, beta, tpo_alpha, gamma, label_smoothing)
    term = _contrast(loss_type, beta, label_smoothing, gamma or 0.0)
    mean = loss_type in ("ipo", "tpo-l")
    result, x, nll = _pairs(term, policy, labels, mean, tpo_alpha, num_nll_tokens, options, kind="triples")
    return output(result, pair_metrics(result.tokens, beta * x, x, each=3) | nll)


def _contrast(
    loss_type: str, beta: float, label_smoothing: float, gamma: float = 0.0
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the term of cpo_loss and tpo_loss: a function of the log-probs of chosen and rejected."""

    def term(chosen: Tensor, rejected: Tensor) -> Tensor:
        difference = chosen - rejected
        if loss_type == "hinge":
            return torch.relu(1 - beta * difference)
        if loss_type == "ipo":
            return (difference - 0.5 / beta).square()
        return smoothed(beta * difference - gamma, label_smoothing)

    return term


def _scored(tokens: Tokens) -> Tokens:
    """Return the tokens without those that count only for the NLL."""
    only = tokens.extra.get("scored")
    return tokens if only is None else replace(tokens, mask=tokens.mask & only)


def _pairs(
    term: Callable[[Tensor, Tensor], Tensor],
    policy: Source,
    labels: Tensor,
    mean: bool,
    weight: float,
    num_nll_tokens: Count | None,
    options: SequenceOptions,
    nll_labels: Tensor | None = None,
    kind: str = "pairs",
) -> tuple[Fused, Tensor, dict[str, Any]]:
    """Compute term(chosen, rejected) + weight NLL.

    Return the evaluated loss, the log-probs of all sequences as the term used them (means over tokens if `mean`, else sums),
    and the parts of the NLL and of the loss.
    """
    batch, call = read_batch(labels, kind, options), read_options(options)
    num_nll_tokens = read_count("num_nll_tokens", num_nll_tokens)
    each, unit = EACH[kind], kind.removesuffix("s")
    read, extra = batch.texts(each), {}
    if nll_labels is not None:
        extra = {"scored": batch.mask}
        extra_labels = batch.aligned(check_nll_labels(nll_labels, batch.labels)).where(read, batch.ignore_index)
        batch = batch.with_labels(batch.labels.where(batch.labels != batch.ignore_index, extra_labels))
    # The reduction divides by pairs, or by num_items: `times` cancels this, so that the mean over tokens remains.
    by = batch.count(read) if num_nll_tokens is None else num_nll_tokens
    times = batch.sequences // each if call.num_items is None or num_nll_tokens is None else call.num_items

    def logps(tokens: Tokens) -> Tensor:
        tokens = _scored(tokens)
        return tokens.means(tokens.logps) if mean else tokens.sums(tokens.logps)

    def of_texts(x: Tensor) -> Tensor:
        return x.tensor_split(each)[0 if each == 2 else -1]

    def formula(tokens: Tokens) -> Tensor:
        losses = term(*logps(tokens).tensor_split(each)[:2])
        nll = -of_texts(tokens.sums(tokens.logps))
        return losses + weight * divided(nll * times, by) if weight else losses

    result = fused(formula, policy, batch, None, FormulaInputs(unit, per_token=extra), call)
    sums, lengths = result.tokens.sums(result.tokens.logps), result.tokens.lengths
    nll = Part(-of_texts(sums), of_texts(lengths))
    return result, logps(result.tokens), {"nll_loss": nll, **loss_and_nll(result, nll, weight, times, by)}
