"""Single responses that are desirable or not: KTO, BCO, APO-zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.inputs import FLOATS, Source, check_labels, kind_of, ordinary
from ..engine.evaluate import Tokens
from .shared import (
    Entry,
    LossOutput,
    Needs,
    Part,
    check_per_sequence,
    check_positive,
    check_sequences,
    fused,
    output,
    sequence_part,
)

__all__ = ["RunningDelta", "bco_loss", "kto_baseline", "kto_loss"]

LOSSES = ("kto", "apo_zero_unpaired")


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
    **batch: Any,
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


def check_kto(
    labels: Tensor, cu_seqlens: Tensor | None, desirable: Tensor, loss: str, baseline: Tensor | float | None, beta: float,
    desirable_weight: float, undesirable_weight: float, sequence_group: object = None,
) -> Tensor | float:  # fmt: skip
    """z0."""
    check_kto_options(loss, beta, desirable_weight, undesirable_weight)
    sequences = check_sequences(labels, cu_seqlens, sequence_group)
    check_per_sequence("desirable", desirable, sequences, labels.device, (torch.bool,))
    if baseline is not None and loss != "kto":
        raise ValueError(f"baseline: is for loss='kto', got loss={loss!r}")
    return check_constant("baseline", 0.0 if baseline is None else baseline)


def check_kto_options(loss: str, beta: float, desirable_weight: float, undesirable_weight: float) -> None:
    """Those that no batch is needed for."""
    if loss not in LOSSES:
        raise ValueError(f"loss: unknown name {loss!r}; known: {', '.join(LOSSES)}")
    check_positive(beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)


def check_constant(name: str, x: Tensor | float) -> Tensor | float:
    """A number or a 0-d tensor, without its graph."""
    if isinstance(x, Tensor):
        if x.dim() != 0 or x.dtype not in FLOATS:
            raise ValueError(f"{name}: expected a number or a 0-d float tensor, got {x.dtype} {list(x.shape)}")
        return x.detach()
    if not isinstance(x, int | float) or x != x or abs(x) == float("inf"):
        got = repr(x) if isinstance(x, int | float) else kind_of(x, RunningDelta)
        raise ValueError(f"{name}: expected a finite number or a 0-d tensor, got {got}")
    return x


@torch.no_grad()
def kto_baseline(
    policy: Source, labels: Tensor, ref: Source | None, *, process_group: object = None, cu_seqlens: Tensor | None = None,
    **batch: Any,
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
    return _mean(found.loss, process_group)[0].clamp(min=0)


def _mean(x: Tensor, process_group: object) -> tuple[Tensor, Tensor]:
    """The mean, 0 of nothing, and the number it is of, over all ranks."""
    total = torch.stack([x.sum(), torch.full_like(x.sum(), x.numel())])
    if process_group is not None:
        torch.distributed.all_reduce(total, group=process_group)
    return total[0] / total[1].clamp(min=1), total[1]


class RunningDelta:
    """BCO's reward shift: the running mean of all rewards so far.

    momentum: None for the plain mean over every reward seen, as TRL's BCOTrainer has it; m for m old + (1 - m) new, the first
    batch's mean taken whole. process_group: rewards of its ranks count too, and the state is the same on all.

    .mean and .count are 0-d tensors that live where the rewards do and are updated in place; the host never reads them.
    """

    def __init__(self, momentum: float | None = None, process_group: object = None) -> None:
        if momentum is not None and not 0 <= momentum < 1:
            raise ValueError(f"momentum: expected a number in [0, 1) or None, got {momentum!r}")
        self.momentum, self.process_group = momentum, process_group
        # whatever the defaults are, which update() could not take to where the rewards are
        self.mean, self.count = (torch.zeros((), dtype=torch.float32, device="cpu") for _ in range(2))

    @torch.no_grad()
    def update(self, rewards: Tensor) -> Tensor:
        """Takes in rewards [S]; returns the mean, a copy."""
        self.mean, self.count = (ordinary(x.to(rewards)) for x in (self.mean, self.count))  # updates are in place
        new, n = _mean(rewards, self.process_group)
        if self.momentum is None:
            share = n / (self.count + n).clamp(min=1)
        else:
            share = (1 - self.momentum * (self.count > 0).to(n)) * (n > 0)
        self.mean.lerp_(new, share)
        self.count.add_(n)
        return self.mean.clone()

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean.clone(), "count": self.count.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.mean, self.count = state["mean"].clone(), state["count"].clone()


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
    **batch: Any,
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


def check_bco(
    labels: Tensor, cu_seqlens: Tensor | None, desirable: Tensor, weights: Tensor | None, beta: float,
    sequence_group: object = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The numbers of the sequences."""
    check_positive(beta=beta)
    sequences = check_sequences(labels, cu_seqlens, sequence_group)
    check_per_sequence("desirable", desirable, sequences, labels.device, (torch.bool,))
    if weights is None:
        return {"desirable": desirable}
    check_per_sequence("weights", weights, sequences, labels.device, FLOATS)
    return {"desirable": desirable, "weights": weights.detach()}


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
