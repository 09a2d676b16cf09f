"""The policy term of a token for each loss type of grpo_loss, and which tokens it clips.

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
Where = Callable[[Tensor, Tensor, Tensor, PolicyConfig], Clipped]


def _clipped(tokens: Tokens, x: Tensor, a: Tensor, o: PolicyConfig) -> Tensor:
    return -torch.where(a > 0, x.clamp(max=o.highest), x.clamp(o.lowest, o.largest)).exp() * a


def _clipped_where(x: Tensor, a: Tensor, logps: Tensor, o: PolicyConfig) -> Clipped:
    return Clipped((x < o.lowest) & (a < 0), (x > o.highest) & (a > 0))


def _cispo(tokens: Tokens, x: Tensor, a: Tensor, o: PolicyConfig) -> Tensor:
    return -x.clamp(max=o.highest).exp().detach() * a * tokens.logps


def _cispo_where(x: Tensor, a: Tensor, logps: Tensor, o: PolicyConfig) -> Clipped:
    return Clipped(torch.zeros_like(a, dtype=torch.bool), (x > o.highest) & (a > 0))


def _either(flags: Tensor, first: float, second: float, like: Tensor) -> Tensor:
    """Return the first number where a flag is set and the second elsewhere, in the dtype of `like`."""
    return torch.where(flags, first, torch.full_like(like, second))


def _sapo(tokens: Tokens, x: Tensor, a: Tensor, o: PolicyConfig) -> Tensor:
    tau = _either(a > 0, o.own["sapo_temperature_pos"], o.own["sapo_temperature_neg"], x)
    return -torch.sigmoid(tau * cap(x).expm1()) * (4 / tau) * a


def vespo_weight(tokens: Tokens, x: Tensor, a: Tensor, o: PolicyConfig) -> Tensor:
    """Return VESPO's weight of each token: a function of the ratio of its sequence, without a gradient."""
    sums = tokens.sums(x.detach().clamp(-VESPO_TOKEN, VESPO_TOKEN)).clamp(VESPO_LOWEST, VESPO_TOKEN)
    w = tokens.spread(sums)
    k = _either(a >= 0, o.own["vespo_k_pos"], o.own["vespo_k_neg"], x)
    rate = _either(a >= 0, o.own["vespo_lambda_pos"], o.own["vespo_lambda_neg"], x)
    return (k * w - rate * w.expm1()).exp()


def _vespo(tokens: Tokens, x: Tensor, a: Tensor, o: PolicyConfig) -> Tensor:
    return -vespo_weight(tokens, x, a, o) * a * tokens.logps


def _gmpo(tokens: Tokens, x: Tensor, a: Tensor, o: PolicyConfig) -> Tensor:
    bounded = torch.where(a > 0, x.clamp(max=o.high), x.clamp(min=-o.low))
    mean = tokens.sums(bounded) / tokens.lengths.clamp(min=1)
    return -tokens.spread(cap(mean).exp()) * a


def _gmpo_where(x: Tensor, a: Tensor, logps: Tensor, o: PolicyConfig) -> Clipped:
    return Clipped((x < -o.low) & (a < 0), (x > o.high) & (a > 0))


def _outside_tv(x: Tensor, a: Tensor, logps: Tensor, o: PolicyConfig) -> Clipped:
    apart = logps.exp() - (logps - x).exp()
    return Clipped((apart < -o.low) & (a <= 0), (apart > o.high) & (a > 0))


def _outside_kl(x: Tensor, a: Tensor, logps: Tensor, o: PolicyConfig) -> Clipped:
    """Compare the KL of two coins, which show the token with its old and its new probability, with the bounds.

    1e-8 is what verl adds, too, so that a probability of 1 has a finite KL.
    """
    p, old = logps.exp(), (logps - x).exp()
    kl = -old * x + (1 - old) * ((1 - old + 1e-8) / (1 - p + 1e-8)).log()
    return Clipped((kl > o.low) & (x < 0) & (a <= 0), (kl > o.high) & (x > 0) & (a > 0))


def _outside_both(x: Tensor, a: Tensor, logps: Tensor, o: PolicyConfig) -> Clipped:
    apart = logps.exp() - (logps - x).exp()
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
    """The policy term of a loss type, and a function (x, a, logps, options) that says where it clips."""

    each: Each
    where: Where | None = None


TERMS = {
    **dict.fromkeys(("grpo", "dr_grpo", "bnpo", "dapo", "luspo"), Term(_clipped, _clipped_where)),
    "gmpo": Term(_gmpo, _gmpo_where),
    "cispo": Term(_cispo, _cispo_where),
    "sapo": Term(_sapo),
    "vespo": Term(_vespo),
    "dppo_tv": Term(_dppo(_outside_tv), _outside_tv),
    "dppo_kl": Term(_dppo(_outside_kl), _outside_kl),
    "intellect": Term(_intellect, _outside_both),
}
