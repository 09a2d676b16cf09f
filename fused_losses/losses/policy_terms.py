"""The policy term of a token for each loss type of grpo_loss, and its metrics.

A term is a function (tokens, x, a, options) -> [n]: x is the logarithm of the importance ratio of each token, a its advantage.
core/policy_options.py says what each loss type is divided by. The formulas stand in the docstring of grpo_loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.elementwise import cap
from ..core.policy_options import PolicyConfig
from ..engine.tokens import Tokens

# TRL's bounds of the logarithms of VESPO's ratios: of a token, and of a sequence
VESPO_TOKEN = 20.0
VESPO_LOWEST = math.log(1e-8)


class Clipped(NamedTuple):
    """The tokens (or sequences) whose gradient is bounded: where the ratio is too low, and where it is too high."""

    low: Tensor
    high: Tensor


Each = Callable[[Tokens, Tensor, Tensor, PolicyConfig], Tensor]
Metrics = Callable[[Tokens, Tensor, Tensor, PolicyConfig], dict[str, Tensor]]
Where = Callable[[Tensor, Tensor, Tensor, PolicyConfig], Clipped]


def _clip_ratios(where: Where) -> Metrics:
    """Return the function that computes TRL's clip ratios, which are means of these flags."""

    def metrics(tokens: Tokens, x: Tensor, a: Tensor, o: PolicyConfig) -> dict[str, Tensor]:
        low, high = where(x, a, tokens.logps, o)
        return {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low | high}

    return metrics


def _no_metrics(tokens: Tokens, x: Tensor, a: Tensor, o: PolicyConfig) -> dict[str, Tensor]:
    return {}


def _clipped(tokens: Tokens, x: Tensor, a: Tensor, o: PolicyConfig) -> Tensor:
    return -torch.where(a > 0, x.clamp(max=o.highest), x.clamp(o.lowest, o.largest)).exp() * a


def _clipped_where(x: Tensor, a: Tensor, logps: Tensor, o: PolicyConfig) -> Clipped:
    return Clipped((x < o.lowest) & (a < 0), (x > o.highest) & (a > 0))


def _cispo(tokens: Tokens, x: Tensor, a: Tensor, o: PolicyConfig) -> Tensor:
    return -x.clamp(max=o.highest).exp().detach() * a * tokens.logps


def _cispo_metrics(tokens: Tokens, x: Tensor, a: Tensor, o: PolicyConfig) -> dict[str, Tensor]:
    return {"cispo_clip_ratio": (x > o.highest) & (a > 0)}


def _either(flags: Tensor, first: float, second: float, like: Tensor) -> Tensor:
    """Return the first number where a flag is set and the second elsewhere, in the dtype of `like`."""
    return torch.where(flags, first, torch.full_like(like, second))


def _sapo(tokens: Tokens, x: Tensor, a: Tensor, o: PolicyConfig) -> Tensor:
    tau = _either(a > 0, o.own["sapo_temperature_pos"], o.own["sapo_temperature_neg"], x)
    return -torch.sigmoid(tau * cap(x).expm1()) * (4 / tau) * a


def _vespo_weight(tokens: Tokens, x: Tensor, a: Tensor, o: PolicyConfig) -> Tensor:
    """Return VESPO's weight of each token: a function of the ratio of its sequence, without a gradient."""
    sums = tokens.sums(x.detach().clamp(-VESPO_TOKEN, VESPO_TOKEN)).clamp(VESPO_LOWEST, VESPO_TOKEN)
    w = tokens.spread(sums)
    k = _either(a >= 0, o.own["vespo_k_pos"], o.own["vespo_k_neg"], x)
    rate = _either(a >= 0, o.own["vespo_lambda_pos"], o.own["vespo_lambda_neg"], x)
    return (k * w - rate * w.expm1()).exp()


def _vespo(tokens: Tokens, x: Tensor, a: Tensor, o: PolicyConfig) -> Tensor:
    return -_vespo_weight(tokens, x, a, o) * a * tokens.logps


def _vespo_metrics(tokens: Tokens, x: Tensor, a: Tensor, o: PolicyConfig) -> dict[str, Tensor]:
    return {"vespo/phi_seq_mean": _vespo_weight(tokens, x, a, o)}


def _gmpo(tokens: Tokens, x: Tensor, a: Tensor, o: PolicyConfig) -> Tensor:
    bounded = torch.where(a > 0, x.clamp(max=o.high), x.clamp(min=-o.low))
    return -tokens.spread(cap(tokens.means(bounded)).exp()) * a


def _gmpo_where(x: Tensor, a: Tensor, logps: Tensor, o: PolicyConfig) -> Clipped:
    return Clipped((x < -o.low) & (a < 0), (x > o.high) & (a > 0))


def _moved(x: Tensor, logps: Tensor) -> Tensor:
    """Return the probability of each token minus its old one."""
    return logps.exp() - (logps - x).exp()


def _outside_tv(x: Tensor, a: Tensor, logps: Tensor, o: PolicyConfig) -> Clipped:
    apart = _moved(x, logps)
    return Clipped((apart < -o.low) & (a <= 0), (apart > o.high) & (a > 0))


def _outside_kl(x: Tensor, a: Tensor, logps: Tensor, o: PolicyConfig) -> Clipped:
    """Compare the KL of two coins, which show the token with its old and its new probability, with the bounds.

    1e-8 is what verl adds, too, so that a probability of 1 has a finite KL.
    """
    p, old = logps.exp(), (logps - x).exp()
    kl = -old * x + (1 - old) * ((1 - old + 1e-8) / (1 - p + 1e-8)).log()
    return Clipped((kl > o.low) & (x < 0) & (a <= 0), (kl > o.high) & (x > 0) & (a > 0))


def _outside_both(x: Tensor, a: Tensor, logps: Tensor, o: PolicyConfig) -> Clipped:
    apart = _moved(x, logps)
    return Clipped(apart < -o.low, apart > o.low)


def _dppo(outside: Where) -> Each:
    def each(tokens: Tokens, x: Tensor, a: Tensor, o: PolicyConfig) -> Tensor:
        ratio = x.clamp(max=o.largest).exp().detach()
        return -_kept(outside, tokens, x, a, o) * ratio * a * tokens.logps

    return each


def _intellect(tokens: Tokens, x: Tensor, a: Tensor, o: PolicyConfig) -> Tensor:
    return o.own["intellect_tau"] * cap(x).square() - _kept(_outside_both, tokens, x, a, o) * cap(x).exp() * a


def _kept(outside: Where, tokens: Tokens, x: Tensor, a: Tensor, o: PolicyConfig) -> Tensor:
    """Return 0 for the tokens that lie outside and 1 for all others."""
    low, high = outside(x.detach(), a, tokens.logps.detach(), o)
    return (~(low | high)).to(x.dtype)


class Term(NamedTuple):
    """The policy term of a loss type, and its metrics: numbers or flags of the tokens [n], by name, whose means are logged."""

    each: Each
    metrics: Metrics = _no_metrics
    of_sequences: bool = False  # its ratios are those of sequences, whatever `importance` says


TERMS = {
    **dict.fromkeys(("grpo", "dr_grpo", "bnpo", "dapo", "luspo"), Term(_clipped, _clip_ratios(_clipped_where))),
    "gmpo": Term(_gmpo, _clip_ratios(_gmpo_where)),
    "cispo": Term(_cispo, _cispo_metrics),
    "sapo": Term(_sapo),
    "vespo": Term(_vespo, _vespo_metrics, of_sequences=True),
    "dppo_tv": Term(_dppo(_outside_tv), _clip_ratios(_outside_tv)),
    "dppo_kl": Term(_dppo(_outside_kl), _clip_ratios(_outside_kl)),
    "intellect": Term(_intellect, _clip_ratios(_outside_both)),
}
