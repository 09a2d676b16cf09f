"""UPO: a preference loss with advantage-weighted log-likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor

from ...core.batch import read_batch, read_options
from ...core.elementwise import LARGEST
from ...core.inputs import Source
from ...core.layout import stats_dtype
from ...core.options import UPOOptions, check_advantages
from ...core.outputs import LossOutput, Part
from ...core.validation import Count, check_positive
from ..preference import preference_loss
from ..registry import register
from ..shared import reduced, sequences_of, with_parts

__all__ = ["expectile_loss", "upo_loss"]


@register(
    UPOOptions,
    batch="pairs",
    source="2405.17956",
    variants={"": {}, "tau": {"tau": 0.5, "weight": 0.2, "clip": 1.5, "beta": 0.3}},
    ref="optional",
    inputs={"advantages": "per sequence"},
)
def upo_loss(
    policy: Source,
    labels: Tensor,
    ref: Source | None,
    advantages: Tensor | tuple[Tensor, Tensor],
    *,
    loss_type: str | Sequence[str] | Callable[..., LossOutput] = "sigmoid",
    tau: float = 1.0,
    weight: float = 1.0,
    clip: float | None = None,
    **options: Unpack[UPOOptions],
) -> LossOutput:
    """Compute unified preference optimisation (arXiv 2405.17956): a preference loss plus a weighted log-likelihood.

    The second term lets the policy learn from rewards in addition to preferences:

        base - weight w log p(y | x)        w = min(exp(A / tau), clip), a constant        A = R(x, y) - V(x)

    The text of the paper says: an auxiliary reward is added to a preference loss (its own is KTO) as a weighted maximum
    likelihood, with no sampling, clipping or bootstrapping. There is no public code, so the following is our interpretation:
    the advantage-weighted form of w, per sequence, with log p(y | x) summed over tokens; and values learned by
    expectile_loss. You must choose tau, weight and clip; we do not know the paper's values. (ERNIE 4.5's UPO is something
    else.)

    Args:
        policy: as in the base loss.
        labels: as in the base loss.
        ref: as in the base loss.
        advantages: [S], one for each sequence, chosen first; or (rewards, values), both [S]. They get no gradient: add
            expectile_loss to train the values.
        loss_type: the base loss: a loss_type of preference_loss, or several; or a loss function of pairs or of sequences, such
            as fl.kto_loss or fl.tdpo_loss. Bind options that only your function has: functools.partial(f, name=value).
        tau: the temperature of the weights w, > 0.
        weight: the factor of the second term, > 0.
        clip: the largest w, > 0. None: w is finite in this case too, at most e^80.
        **options: the options of the base loss (desirable=... for fl.kto_loss), and those of a batch, as in preference_loss.
            reduction is over the units of the base, and num_items is their number in the whole batch. A pair gets the mean of
            its two weighted likelihoods, so that they are averaged over sequences with any base.

    The metrics are those of the base; advantages and weights, means over sequences; and nll, the mean of -log p(y | x).
    """
    batch, call = read_batch(labels, "sequences", options), read_options(options)
    check_positive(tau=tau, weight=weight, **({} if clip is None else {"clip": clip}))
    a = check_advantages(advantages, batch)
    base = loss_type if callable(loss_type) else partial(preference_loss, loss_type=loss_type)
    each_unit: dict[str, Any] = {**options, "reduction": "none"}
    each_unit.pop("num_items", None)
    out = base(policy, labels, ref=ref, **each_unit)
    tokens = sequences_of(out.stats, batch)
    nll = -tokens.sums(tokens.logps)
    w = (a / tau).clamp(max=LARGEST if clip is None else math.log(clip)).exp().to(nll.dtype)
    losses = out.loss + weight * _per_unit(w * nll, out.loss)
    parts: dict[str, Part | tuple[Part, ...]] = {**out.parts, "loss": Part(losses.detach())}
    for name, x in (("advantages", a), ("weights", w), ("nll", nll)):
        each = x.detach().view(len(x) // max(len(losses), 1), len(losses)).t()  # per unit: one, or chosen and rejected
        parts[name] = Part(each, torch.ones_like(each))
    made = with_parts(reduced(losses, call.reduction, call.num_items), out.stats, parts)
    return replace(made, metrics=out.metrics | made.metrics)  # a user's own base may have metrics without parts


def _per_unit(x: Tensor, losses: Tensor) -> Tensor:
    """Convert numbers [S] of sequences to the units of the base's losses: the mean of a pair, or x itself."""
    if losses.shape == x.shape:
        return x
    if losses.shape != (len(x) // 2,):
        raise ValueError(
            f"loss_type: expected losses of sequences [{len(x)}] or pairs [{len(x) // 2}] for reduction='none', got "
            f"{list(losses.shape)}"
        )
    chosen, rejected = x.tensor_split(2)
    return (chosen + rejected) / 2


def expectile_loss(
    rewards: Tensor,
    values: Tensor,
    q: float = 0.7,
    *,
    reduction: str = "mean",
    num_items: Count | None = None,
) -> Tensor:
    """Compute the regression of values to the q-expectile of rewards, as implicit Q-learning does.

    See arXiv 2110.06169 eq. 5, where q = 0.7:

        |q - 1(R < V)| (R - V)^2,    at q = 1/2 half the squared error

    This is our interpretation of how UPO gets its values: see upo_loss. The result is a tensor, float32 or wider.

    Args:
        rewards: [...]. They get no gradient.
        values: [...], of the same shape.
        q: in (0, 1).
        reduction: as in preference_loss.
        num_items: as in preference_loss.
    """
    if not isinstance(q, int | float) or not 0 < q < 1:
        raise ValueError(f"q: expected a number in (0, 1), got {q!r}")
    if values.shape != rewards.shape:
        raise ValueError(f"values: expected {list(rewards.shape)} as rewards, got {list(values.shape)}")
    off = rewards.detach().to(stats_dtype(rewards)) - values
    return reduced((q - (off < 0).to(off.dtype)).abs() * off.square(), reduction, num_items)
