"""The loss types of grpo_loss: what each divides by, which options it reads, and the checks of these options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .divergences import Divergence, from_key
from .elementwise import LARGEST
from .names import not_one_of, unknown
from .options import SequenceOptions
from .validation import check_positive, check_weights

CLIPPING = ("importance", "epsilon", "epsilon_high", "delta")
EPSILON = 0.2  # where a loss type reads epsilon and it is not given, as in TRL


@dataclass(frozen=True)
class PolicyLoss:
    """What a loss type divides its tokens by, and which options it reads beside those that every type reads."""

    # "sequence": tokens of the sequence; "batch": tokens of the batch; "length": max_completion_length; "one"
    divisor: str
    reads: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # options without a default; they are read
    own: Mapping[str, float] = field(default_factory=dict)  # options > 0 of this type alone, with TRL's defaults


POLICY_LOSSES = {
    "grpo": PolicyLoss("sequence", CLIPPING),
    "dr_grpo": PolicyLoss("length", CLIPPING, needs=("max_completion_length",)),
    "bnpo": PolicyLoss("batch", CLIPPING),
    "dapo": PolicyLoss("batch", CLIPPING),
    "luspo": PolicyLoss("one", CLIPPING),
    "gmpo": PolicyLoss("sequence", ("epsilon", "epsilon_high")),
    "cispo": PolicyLoss("batch", ("importance",), needs=("epsilon_high",)),
    "sapo": PolicyLoss("sequence", ("importance",), own={"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}),
    "vespo": PolicyLoss(
        "batch", own={"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}
    ),
    "dppo_tv": PolicyLoss("batch", ("epsilon_high", "delta"), needs=("epsilon",)),
    "dppo_kl": PolicyLoss("batch", ("epsilon_high", "delta"), needs=("epsilon",)),
    "intellect": PolicyLoss("batch", needs=("epsilon", "intellect_tau")),
}
BY_TOKENS = tuple(name for name, rule in POLICY_LOSSES.items() if rule.divisor == "batch")
ESTIMATORS = ("k1", "k2", "k3")


class PolicyOptions(SequenceOptions, total=False):
    """The options of grpo_loss that belong to one loss type, beside those of a batch."""

    max_completion_length: int
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float
    intellect_tau: float


OWN = tuple(name for name in PolicyOptions.__annotations__ if name not in SequenceOptions.__annotations__)


@dataclass(frozen=True)
class PolicyConfig:
    """The options of grpo_loss, checked."""

    loss_type: str
    divisor: str
    sequence: bool  # importance ratios are those of sequences, not of tokens
    low: float  # epsilon
    high: float  # epsilon_high
    delta: float | None
    beta: float
    kl: str  # one of ESTIMATORS, or the key of a divergence
    divergences: tuple[Divergence, ...]
    corrected: bool  # the KL term has the importance ratio as a factor
    entropy_coef: float
    off_policy: float | None  # off_policy_mask_threshold
    own: Mapping[str, float]  # the options of this loss type alone

    @property
    def length(self) -> float:
        """Return what the sum of a sequence is divided by, apart from the number of tokens."""
        return self.own["max_completion_length"] if self.divisor == "length" else 1.0

    # Bounds of the logarithm of a ratio: highest where the advantage is positive, lowest and largest where it is not
    @property
    def lowest(self) -> float:
        return math.log1p(-self.low) if self.low < 1 else -math.inf

    @property
    def highest(self) -> float:
        return min(LARGEST, math.log(self.high) if self.loss_type == "cispo" else math.log1p(self.high))

    @property
    def largest(self) -> float:
        return LARGEST if self.delta is None else min(LARGEST, math.log(self.delta))


def policy_config(
    loss_type: str,
    importance: str,
    epsilon: float | None,
    epsilon_high: float | None,
    delta: float | None,
    beta: float,
    kl: str | Divergence,
    use_bias_correction_kl: bool,
    entropy_coef: float,
    off_policy_mask_threshold: float | None,
    options: Mapping[str, Any],
) -> PolicyConfig:
    """Check the options of grpo_loss and return them; `options` holds those of one loss type among others."""
    rule = _rule(loss_type)
    if importance not in ("token", "sequence"):
        raise not_one_of("importance", importance, ("token", "sequence"))
    given: dict[str, Any] = {
        "importance": None if importance == "token" else importance,
        "epsilon": epsilon,
        "epsilon_high": epsilon_high,
        "delta": delta,
        **{name: options.get(name) for name in OWN},
    }
    _check_read(loss_type, rule, given)
    bounds = {"epsilon": epsilon, "epsilon_high": epsilon_high, "beta": beta, "entropy_coef": entropy_coef}
    check_weights(**{name: x for name, x in bounds.items() if x is not None})
    if off_policy_mask_threshold is not None:
        check_weights(off_policy_mask_threshold=off_policy_mask_threshold)
    if loss_type == "cispo" and epsilon_high is not None:
        check_positive(epsilon_high=epsilon_high)
    low = EPSILON if epsilon is None else epsilon
    high = low if epsilon_high is None else epsilon_high
    if delta is not None:
        check_positive(delta=delta)
        if "epsilon" in rule.reads and delta <= 1 + high:
            raise ValueError(f"delta: expected a number > 1 + epsilon_high = {1 + high:g}, got {delta!r}")
    own = {**rule.own, **{name: given[name] for name in OWN if given[name] is not None}}
    check_positive(**own)
    name, divergences = _estimator(kl)
    return PolicyConfig(
        loss_type=loss_type,
        divisor=rule.divisor,
        sequence=importance == "sequence",
        low=low,
        high=high,
        delta=delta,
        beta=beta,
        kl=name,
        divergences=divergences,
        corrected=bool(use_bias_correction_kl),
        entropy_coef=float(entropy_coef),
        off_policy=off_policy_mask_threshold,
        own=own,
    )


def _rule(loss_type: str) -> PolicyLoss:
    """Return the entry of a loss type."""
    if isinstance(loss_type, str) and loss_type.lower() == "gspo":
        types = ", ".join(name for name, rule in POLICY_LOSSES.items() if "importance" in rule.reads)
        raise ValueError(f"loss_type: GSPO is importance='sequence' beside any of {types}; got {loss_type!r}")
    if loss_type not in POLICY_LOSSES:
        raise unknown("loss_type", loss_type, POLICY_LOSSES)
    return POLICY_LOSSES[loss_type]


def _check_read(loss_type: str, rule: PolicyLoss, given: Mapping[str, Any]) -> None:
    """Raise for an option that the loss type does not read but got, or needs but did not get."""
    for name, x in given.items():
        if x is None and name in rule.needs:
            raise ValueError(f"{name}: needed for loss_type={loss_type!r}, got None")
        if x is not None and name not in (*rule.reads, *rule.needs, *rule.own):
            others = [n for n, r in POLICY_LOSSES.items() if name in (*r.reads, *r.needs, *r.own)]
            raise ValueError(f"{name}: loss_type={loss_type!r} does not read it, but {', '.join(others)}; got {x!r}")


def _estimator(kl: str | Divergence) -> tuple[str, tuple[Divergence, ...]]:
    if isinstance(kl, str) and kl in ESTIMATORS:
        return kl, ()
    try:
        d = from_key(kl)
    except (TypeError, ValueError) as error:
        raise type(error)(f"kl: expected 'k1', 'k2', 'k3' or the name of a divergence; {error}") from None
    return d.key, (d,)
