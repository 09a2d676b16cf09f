"""Single responses that are desirable or not: KTO, BCO, APO-zero."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from ..core.inputs import Source, check_labels
from ..core.options import Reduced, TimeAxis, check_bco, check_kto
from ..core.outputs import LossOutput, Part
from ..core.running_delta import RunningDelta, mean_over_ranks
from ..core.validation import check_constant, check_sequences
from ..engine.evaluate import Tokens
from .shared import Entry, Needs, fused, output, sequence_part, takes

__all__ = ["RunningDelta", "bco_loss", "kto_baseline", "kto_loss"]


@takes(Reduced)
def kto_loss(
    policy: Source,
    labels: Tensor,
    ref: Source | None,
    desirable: Tensor,
    *,
    loss: str = "kto",
    baseline: Tensor | float | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    cu_seqlens: Tensor | None = None,
    **batch: Unpack[Reduced],
) -> LossOutput:
    """KTO (2402.01306 eq. 7): responses that are desirable or not, without pairs. The mean over sequences of

        desirable     w_d (1 - sigmoid(beta (h - z0)))        h = sum_t log p(y_t) - log q(y_t)
        undesirable   w_u (1 - sigmoid(beta (z0 - h)))        z0 = baseline >= 0, a constant

    "apo_zero_unpaired" (2408.06266 eq. 7) is the same with z0 = 0.

    Args:
        policy, labels, ref: as in preference_loss, with any number of sequences: [S, T], or packed with cu_seqlens [S + 1].
        desirable: bool [S].
        baseline: z0, from kto_baseline; None is 0.
        desirable_weight, undesirable_weight: w_d, w_u.
        The other options of a batch are those of preference_loss; num_items is the number of sequences of the whole batch.

    metrics: TRL's rewards/chosen, rewards/rejected (means of beta h), rewards/margins, logps/chosen, logps/rejected, NaN where
    the batch has no such sequence (TRL leaves them out); count/chosen, count/rejected to weight them by; kl (z0); entropy if
    asked for.
    """
    labels = check_labels(labels)
    group = batch.get("sequence_group")
    z0 = check_kto(labels, cu_seqlens, desirable, loss, baseline, beta, desirable_weight, undesirable_weight, group)

    def formula(tokens: Tokens) -> Tensor:
        good, x = tokens.extra["desirable"], beta * (tokens.log_ratios() - z0)
        losses = torch.where(good, -x, x).sigmoid()
        return torch.where(good, desirable_weight * losses, undesirable_weight * losses)

    own = {"desirable": desirable}
    found = fused(formula, policy, labels, ref, Needs("sequence", per_sequence=own), cu_seqlens=cu_seqlens, **batch)
    return output(found, _parts(found.tokens, beta, kl=z0))


@takes(TimeAxis, "reduction", "num_items")
@torch.no_grad()
def kto_baseline(
    policy: Source, labels: Tensor, ref: Source | None, *, process_group: object = None, cu_seqlens: Tensor | None = None,
    **batch: Unpack[TimeAxis],
) -> Tensor:  # fmt: skip
    """KTO's z0, an estimate of KL(policy || ref) that kto_loss takes as baseline: max(0, mean_s h_s), a 0-d tensor.

    Sequence s is prompt s with the completion of another prompt (TRL: of prompt s - 1, the first with the last one's), so the
    labels count the tokens of that completion. Nothing is differentiated. The options of a batch are those of kto_loss.

    process_group: average over the sequences of its ranks too (torch.distributed.group.WORLD: over all), before the maximum;
    ranks may hold different numbers of sequences. None: of this process alone.
    """
    labels = check_labels(labels)
    check_sequences(labels, cu_seqlens, batch.get("sequence_group"))
    for option in ("reduction", "num_items", "inplace_backward", "entropy"):
        if option in batch:
            raise TypeError(f"{option}: kto_baseline has no such option")
    found = fused(
        Tokens.log_ratios, policy, labels, ref, Needs("sequence"), reduction="none", cu_seqlens=cu_seqlens, **batch
    )
    return mean_over_ranks(found.loss, process_group)[0].clamp(min=0)


@takes(Reduced)
def bco_loss(
    policy: Source,
    labels: Tensor,
    ref: Source | None,
    desirable: Tensor,
    *,
    delta: RunningDelta | Tensor | float = 0.0,
    weights: Tensor | None = None,
    beta: float = 0.1,
    cu_seqlens: Tensor | None = None,
    **batch: Unpack[Reduced],
) -> LossOutput:
    """BCO (2404.04656), a classifier whose logit is the reward less a shift. The mean over sequences of

        desirable    -log sigmoid(beta h - delta)         h = sum_t log p(y_t) - log q(y_t)
        undesirable  -log sigmoid(-(beta h - delta))      delta a constant

    Args:
        policy, labels, ref, desirable: as in kto_loss.
        delta: a RunningDelta takes in this batch's rewards first and is used then, as TRL trains. For evaluation, or to fix
            it: a number or a 0-d tensor, such as the .mean of a RunningDelta. A RunningDelta needs the rewards of the batch
            before any loss, so the plan "rows" is out; with a constant it is not.
        weights: [S] >= 0, factors of the losses without a gradient: for unlike prompts of the two classes TRL's density
            ratio p / (1 - p) of the undesirable, clamped to [0.5, 10], and 1 for the desirable.
        The other options are those of kto_loss.

    metrics: those of kto_loss with delta in place of kl.
    """
    labels = check_labels(labels)
    running = isinstance(delta, RunningDelta)
    shift = delta if isinstance(delta, RunningDelta) else check_constant("delta", delta)
    own = check_bco(labels, cu_seqlens, desirable, weights, beta, batch.get("sequence_group"))

    def formula(tokens: Tokens) -> Tensor:
        rewards = beta * tokens.log_ratios()
        x = rewards - (shift.update(rewards) if isinstance(shift, RunningDelta) else shift)
        losses = -torch.nn.functional.logsigmoid(torch.where(tokens.extra["desirable"], x, -x))
        return losses if weights is None else losses * tokens.extra["weights"].to(losses.dtype)

    unit = "batch" if running else "sequence"
    found = fused(formula, policy, labels, ref, Needs(unit, per_sequence=own), cu_seqlens=cu_seqlens, **batch)
    return output(found, _parts(found.tokens, beta, delta=shift.mean if isinstance(shift, RunningDelta) else shift))


def _parts(tokens: Tokens, beta: float, **constants: Tensor | float) -> dict[str, Part | tuple[Part, ...]]:
    """constants: numbers of the whole batch, so of each of its sequences."""
    good, logps, rewards = tokens.extra["desirable"], tokens.sums(tokens.logps), beta * tokens.log_ratios()
    found: dict[str, Part | tuple[Part, ...]] = {}
    for name, which in (("chosen", good), ("rejected", ~good)):
        count = which.to(logps.dtype)
        found[f"rewards/{name}"] = Part(rewards.masked_fill(~which, 0), count, "mean or nan")
        found[f"logps/{name}"] = Part(logps.masked_fill(~which, 0), count, "mean or nan")
        found[f"count/{name}"] = Part(count, kind="sum")
    minus = -rewards.masked_fill(good, 0)
    found["rewards/margins"] = (found["rewards/chosen"], Part(minus, (~good).to(logps.dtype), "mean or nan"))  # type: ignore[assignment]
    found |= {name: Part(torch.zeros_like(logps) + x) for name, x in constants.items()}
    if tokens.entropy is not None:
        found["entropy"] = sequence_part(tokens, tokens.entropy)
    return found


ENTRIES = [
    Entry(
        kto_loss, "sequences", "2402.01306, 2408.06266", ref="optional", inputs={"desirable": "bool per sequence"}, variants={
            "kto": {"baseline": 0.2}, "kto, weights": {"desirable_weight": 1.3, "undesirable_weight": 0.7, "beta": 0.4},
            "apo_zero_unpaired": {"loss": "apo_zero_unpaired"},
        },
    ),
    Entry(
        bco_loss, "sequences", "2404.04656", ref="optional", inputs={"desirable": "bool per sequence"}, variants={
            "bco": {}, "delta": {"delta": 0.3, "beta": 0.4},
        },
    ),
]  # fmt: skip
