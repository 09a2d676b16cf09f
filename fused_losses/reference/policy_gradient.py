"""Reference implementation of the GRPO family."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.batch import read_batch, read_options
from ..core.divergences import Divergence
from ..core.elementwise import LARGEST
from ..core.inputs import Source
from ..core.names import present
from ..core.outputs import LossOutput
from ..core.policy_options import PolicyConfig, policy_config
from ..core.support import Support
from ..core.validation import Count
from .common import Sequence, cut, joined, part
from .stats import on_support

__all__ = ["grpo_loss"]


class Term(NamedTuple):
    """The policy term of each token of a sequence, and its tokens that are clipped because of a low and of a high ratio."""

    losses: Tensor
    low: Tensor | None = None
    high: Tensor | None = None


def _clipped(s: Sequence, ratio: Tensor, a: Tensor, o: PolicyConfig) -> Term:
    first = ratio if o.delta is None else ratio.clamp(max=o.delta)
    losses = -torch.minimum(first * a, ratio.clamp(1 - o.low, 1 + o.high) * a)
    return Term(losses, (ratio < 1 - o.low) & (a < 0), (ratio > 1 + o.high) & (a > 0))


def _cispo(s: Sequence, ratio: Tensor, a: Tensor, o: PolicyConfig) -> Term:
    high = (ratio > o.high) & (a > 0)
    return Term(-ratio.clamp(max=o.high).detach() * a * s.logps, torch.zeros_like(high), high)


def _sapo(s: Sequence, ratio: Tensor, a: Tensor, o: PolicyConfig) -> Term:
    tau = torch.where(a > 0, o.own["sapo_temperature_pos"], o.own["sapo_temperature_neg"] + 0 * ratio.detach())
    return Term(-4 / tau * torch.sigmoid(tau * (ratio - 1)) * a)


def _vespo_weight(x: Tensor, a: Tensor, o: PolicyConfig) -> Tensor:
    w = x.detach().clamp(-20, 20).sum().clamp(math.log(1e-8), 20).exp()
    k = torch.where(a >= 0, o.own["vespo_k_pos"], o.own["vespo_k_neg"] + 0 * a)
    rate = torch.where(a >= 0, o.own["vespo_lambda_pos"], o.own["vespo_lambda_neg"] + 0 * a)
    return (w**k * torch.exp(rate * (1 - w))).expand(len(x))


def _vespo(s: Sequence, ratio: Tensor, a: Tensor, o: PolicyConfig) -> Term:
    return Term(-_vespo_weight(_log_ratio(s), a, o) * a * s.logps)


def _gmpo(s: Sequence, ratio: Tensor, a: Tensor, o: PolicyConfig) -> Term:
    x = _log_ratio(s)
    bounded = torch.where(a > 0, x.clamp(max=o.high), x.clamp(min=-o.low))
    losses = -torch.exp((bounded.sum() / max(len(s), 1)).clamp(max=LARGEST)) * a
    return Term(losses, (x < -o.low) & (a < 0), (x > o.high) & (a > 0))


def _dropping(s: Sequence, ratio: Tensor, a: Tensor, o: PolicyConfig) -> Term:
    """Compute dppo_tv, dppo_kl and intellect, which drop tokens whose probability has moved too far."""
    x = _log_ratio(s).detach()
    p, old = s.logps.detach().exp(), (s.logps.detach() - x).exp()
    if o.loss_type == "dppo_kl":
        coins = -old * x + (1 - old) * torch.log((1 - old + 1e-8) / (1 - p + 1e-8))
        low, high = (coins > o.low) & (p < old) & (a <= 0), (coins > o.high) & (p > old) & (a > 0)
    elif o.loss_type == "dppo_tv":
        low, high = (p - old < -o.low) & (a <= 0), (p - old > o.high) & (a > 0)
    else:
        low, high = p - old < -o.low, p - old > o.low
    kept = (~(low | high)).to(x.dtype)
    if o.loss_type == "intellect":
        return Term(o.own["intellect_tau"] * _log_ratio(s).clamp(max=LARGEST) ** 2 - kept * ratio * a, low, high)
    bounded = ratio.detach() if o.delta is None else ratio.detach().clamp(max=o.delta)
    return Term(-kept * bounded * a * s.logps, low, high)


TERMS: dict[str, Callable[[Sequence, Tensor, Tensor, PolicyConfig], Term]] = {
    **dict.fromkeys(("grpo", "dr_grpo", "bnpo", "dapo", "luspo"), _clipped),
    **dict.fromkeys(("dppo_tv", "dppo_kl", "intellect"), _dropping),
    "cispo": _cispo,
    "sapo": _sapo,
    "vespo": _vespo,
    "gmpo": _gmpo,
}


def _log_ratio(s: Sequence) -> Tensor:
    """Return the logarithm of the importance ratio of each token."""
    return s.logps - s.extra.get("old", s.logps.detach())


def grpo_loss(
    policy: Source,
    labels: Tensor,
    advantages: Tensor,
    *,
    old_logps: Tensor | None = None,
    ref: Source | None = None,
    loss_type: str = "grpo",
    importance: str = "token",
    epsilon: float | None = None,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    kl: str | Divergence = "k3",
    use_bias_correction_kl: bool = False,
    weights: Tensor | None = None,
    entropy_coef: float = 0.0,
    off_policy_mask_threshold: float | None = None,
    rollout_logps: Tensor | None = None,
    support: Support | None = None,
    **options: Any,
) -> LossOutput:
    """Compute fl.grpo_loss, one sequence after another."""
    o = policy_config(
        loss_type,
        importance,
        epsilon,
        epsilon_high,
        delta,
        beta,
        kl,
        use_bias_correction_kl,
        entropy_coef,
        off_policy_mask_threshold,
        options,
    )
    batch, call = read_batch(labels, "sequences", options), read_options(options)
    policy = policy if support is None else on_support(policy, batch, support)
    given = {"A": advantages, "old": old_logps, "weights": weights, "rollout": rollout_logps}
    numbers = {name: x for name, x in given.items() if x is not None}
    whole = {name for name, x in numbers.items() if x.shape == (batch.sequences,) and name in ("A", "weights")}
    stats, sequences = cut(
        policy,
        batch,
        ref,
        divergences=() if ref is None else o.divergences,
        entropy=call.entropy or entropy_coef > 0,
        per_token={name: x for name, x in numbers.items() if name not in whole},
        per_sequence={name: numbers[name] for name in whole},
    )
    terms, losses = [], []
    for s in sequences:
        term, total = _sequence_loss(s, o)
        terms.append(term)
        losses.append(total)
    total = joined(losses, stats)
    if call.reduction != "none":
        count: Count = stats.mask.sum() if o.divisor == "batch" else batch.sequences
        count = 1 if call.reduction == "sum" else max(int(count), 1) if call.num_items is None else call.num_items
        total = part(total.sum(), count)
    return LossOutput(total, _metrics(terms, sequences, o, stats.logps, ref is not None, "A" in whole), stats)


def _ratio_of(s: Sequence, o: PolicyConfig) -> Tensor:
    """Return the importance ratio of each token."""
    x = _log_ratio(s)
    x = (x.sum() / max(len(s), 1)).expand(len(s)) if o.sequence else x
    return torch.exp(x.clamp(max=LARGEST))


def _advantage(s: Sequence) -> Tensor:
    return s.extra["A"].detach().to(s.logps.dtype).expand(len(s))


def _sequence_loss(s: Sequence, o: PolicyConfig) -> tuple[Term, Tensor]:
    """Return the policy terms of the tokens of a sequence, and its loss."""
    ratio, a = _ratio_of(s, o), _advantage(s)
    term = TERMS[o.loss_type](s, ratio, a, o)
    tokens = term.losses
    if "weights" in s.extra:
        tokens = tokens * s.extra["weights"].to(s.logps.dtype)
    if o.off_policy is not None:
        sampled = s.extra.get("rollout", s.extra.get("old", s.logps.detach()))
        apart = sampled - s.logps.detach()
        mean = torch.where(apart.isfinite(), apart, 0.0).sum() / max(len(s), 1)
        tokens = torch.where((a < 0) & (mean > o.off_policy), torch.zeros_like(tokens), tokens)
    if o.beta != 0:
        tokens = tokens + o.beta * (ratio if o.corrected else 1) * _kl_of(s, o)
    if o.entropy_coef:
        tokens = tokens - o.entropy_coef * present("entropy", s.entropy)
    divisor = {"sequence": max(len(s), 1), "length": o.own.get("max_completion_length")}.get(o.divisor, 1)
    return term, tokens.sum() / present("max_completion_length", divisor)


def _kl_of(s: Sequence, o: PolicyConfig) -> Tensor:
    if o.divergences:
        return next(iter(s.divergence.values()))
    d = present("ref", s.ref_logps) - s.logps
    if o.kl == "k3":
        d = d.clamp(max=LARGEST)
        return torch.expm1(d) - d
    return -d if o.kl == "k1" else d**2 / 2


def _metrics(
    terms: list[Term], sequences: list[Sequence], o: PolicyConfig, like: Tensor, ref: bool, whole: bool
) -> dict[str, Tensor]:
    """Return the metrics; whole: the advantages are those of sequences."""
    metrics = {"kl": mean([_kl_of(s, o) for s in sequences], like)} if ref else {}

    def share(flags: list[Tensor]) -> Tensor:
        if o.sequence and whole:  # all tokens of a sequence are alike
            return mean([x.any().reshape(1).to(like.dtype) for x in flags], like)
        return mean([x.to(like.dtype) for x in flags], like)

    lows, highs = [t.low for t in terms if t.low is not None], [t.high for t in terms if t.high is not None]
    if o.loss_type == "cispo":
        metrics["cispo_clip_ratio"] = share(highs)
    elif o.loss_type not in ("sapo", "vespo"):
        low, high = share(lows), share(highs)
        metrics |= {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}
    if o.loss_type == "vespo":
        phi = [_vespo_weight(_log_ratio(s), _advantage(s), o) for s in sequences]
        first = [x[:1] if len(x) else like.new_zeros(1) for x in phi]
        metrics["vespo/phi_seq_mean"] = mean(first if whole else phi, like)
    if all(s.entropy is not None for s in sequences) and sequences:
        metrics["entropy"] = mean([present("entropy", s.entropy) for s in sequences], like)
    return metrics


def mean(parts: list[Tensor], like: Tensor) -> Tensor:
    numbers = torch.cat(parts) if parts else like.new_zeros(0)
    return numbers.detach().sum() / max(len(numbers), 1)
