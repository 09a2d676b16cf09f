"""The formulas behind preference_loss. LOSSES is the registry and the place for the next one.

An entry takes Pairs and returns losses [B]: one line that names a term of core/margin_losses.py where the loss is a function
of the margin, plain torch on the sequences' sums where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from ..core.margin_losses import TERMS
from ..core.options import (
    EXO_EPSILON,
    PairLossConfig,
)
from ..core.validation import Count, divided
from ..engine.evaluate import Tokens
from ..engine.logits_ops import check_plain, once


def _once(f: Callable[[Pairs], Tensor]) -> Any:
    """A property that is computed when first read. functools' takes a lock, which torch.compile does not see through."""

    def read(self: Pairs) -> Tensor:
        if f.__name__ not in self.known:
            self.known[f.__name__] = f(self)
        return self.known[f.__name__]

    return property(read)


class Pairs:
    """Tokens of some pairs, and their sums: each is taken once, however many losses read it. [2B] are the B chosen
    sequences, then the B rejected."""

    def __init__(self, tokens: Tokens, o: PairLossConfig, chosen: Count | None, batch: Count) -> None:
        self.all, self.o = tokens, o
        self.tokens = tokens if o.ld_alpha is None else desensitised(tokens, o.ld_alpha)
        self.chosen, self.batch = chosen, batch  # tokens of all chosen sequences that count, pairs: of the whole batch
        self.known: dict[str, Tensor] = {}

    @_once
    def h(self) -> Tensor:
        """[2B], log p(y) - log q(y)."""
        return self.tokens.log_ratios()

    @_once
    def scores(self) -> Tensor:
        """[2B], f-DPO's s(h), less the constant that makes a policy equal to its reference score 0."""
        link = self.o.link
        if link.name == "reverse_kl":
            return self.h
        zero, _ = link.f_dpo_link()(self.h.new_zeros(()), *link.params)
        return _curve(self.h, link.f_dpo_link(), link.params) - zero

    @_once
    def margin(self) -> Tensor:
        chosen, rejected = self.scores.tensor_split(2)
        return self.o.beta * (chosen - rejected)

    @_once
    def average_margin(self) -> Tensor:
        """s_w / |y_w| - s_l / |y_l|."""
        chosen, rejected = (self.scores / self.all.lengths.clamp(min=1)).tensor_split(2)
        return chosen - rejected

    def term(self, name: str, *params: float) -> Tensor:
        """A formula of the margin: in one kernel, unless others read the same sums."""
        o = self.o
        if len(o.names - {"sft"}) == 1:
            return self.tokens.pair_term(name, o.link, o.beta, *params)
        return _curve(self.margin, TERMS[name], params)

    def smoothed(self, margin: Tensor) -> Tensor:
        """-(1 - eps) log sigmoid(margin) - eps log sigmoid(-margin)."""
        eps = self.o.epsilon()
        losses = -(1 - eps) * logsigmoid(margin)
        return losses - eps * logsigmoid(-margin) if eps else losses  # not 0 * inf


class _Curve(torch.autograd.Function):
    """f(x) where f gives y and dy/dx: links and terms, whose words do not all carry a graph."""

    @staticmethod
    def forward(ctx, x, f, params):  # type: ignore[no-untyped-def]
        y, slope = f(x, *params)
        ctx.save_for_backward(x, slope)
        return y

    @staticmethod
    @once("preference_loss")
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return g * ctx.saved_tensors[1], None, None


def _curve(x: Tensor, f: Callable, params: tuple[float, ...]) -> Tensor:
    check_plain("preference_loss", x)
    return _Curve.apply(x, f, params)


def desensitised(tokens: Tokens, alpha: float) -> Tokens:
    """LD-DPO (2409.06411): tokens beyond the length of the pair's shorter response count alpha."""
    if tokens.ref_summed:
        raise ValueError("ld_alpha: needs the reference's log-probs per token, got fl.LogProbs with one per sequence")
    if tokens.cu_seqlens is None:
        rank = tokens.mask.view(tokens.sequences, len(tokens.mask) // max(1, tokens.sequences)).cumsum(1).reshape(-1)
    else:
        rank = tokens.mask.cumsum(0)
        rank = rank - tokens.spread(pad(rank, (1, 0))[tokens.cu_seqlens[:-1].long()])
    chosen, rejected = tokens.lengths.tensor_split(2)
    excess = rank > tokens.spread(torch.minimum(chosen, rejected).repeat(2))

    def weighed(x: Tensor) -> Tensor:
        return torch.where(excess, alpha * x, x)

    ref = tokens.ref_logps
    return replace(tokens, logps=weighed(tokens.logps), ref_logps=None if ref is None else weighed(ref))


def wpo_weights(tokens: Tokens) -> Tensor:
    """WPO (2406.11827 eq. 2), [B]: product over the pair of exp(mean_t(log p(y_t) - log sum_v p_v^2)), without a graph."""
    assert tokens.collision is not None
    x = (tokens.logps - tokens.collision).detach()
    chosen, rejected = (tokens.sums(x) / tokens.lengths.clamp(min=1)).tensor_split(2)
    return (chosen + rejected).exp()


def _exo_pair(p: Pairs) -> Tensor:
    eps = p.o.epsilon(EXO_EPSILON)
    return p.term("exo_pair", math.log1p(-eps), math.log(eps))


def _ipo(p: Pairs) -> Tensor:
    return (p.average_margin - 0.5 / p.o.beta).square()


def _sigmoid_norm(p: Pairs) -> Tensor:
    return -logsigmoid(p.o.beta * p.average_margin)


def _nca_pair(p: Pairs) -> Tensor:
    chosen, rejected = (p.o.beta * p.scores).tensor_split(2)
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _bco_pair(p: Pairs) -> Tensor:
    chosen, rejected = (p.o.beta * p.scores).tensor_split(2)
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def _sppo_hard(p: Pairs) -> Tensor:
    chosen, rejected = p.scores.tensor_split(2)
    return (chosen - 0.5 / p.o.beta).square() + (rejected + 0.5 / p.o.beta).square()


def _aot(p: Pairs) -> Tensor:
    def ordered(x: Tensor) -> Tensor:
        chosen, rejected = x.tensor_split(2)
        return (chosen - rejected).sort().values

    t = p.tokens
    delta = ordered(t.sums(t.logps))
    if t.ref_logps is not None:
        delta = delta - ordered(t.ref_logps.to(t.logps.dtype) if t.ref_summed else t.sums(t.ref_logps))
    return p.smoothed(p.o.beta * delta)


def _aot_unpaired(p: Pairs) -> Tensor:
    chosen, rejected = p.h.tensor_split(2)
    return p.smoothed(p.o.beta * (chosen.sort().values - rejected.sort().values))


def _apo_zero(p: Pairs) -> Tensor:
    chosen, rejected = (p.o.beta * p.h).tensor_split(2)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def _apo_down(p: Pairs) -> Tensor:
    return torch.sigmoid(p.o.beta * p.h.tensor_split(2)[0]) + torch.sigmoid(-p.margin)


def _sft(p: Pairs) -> Tensor:
    """A pair's share of the mean over the chosen tokens of the batch. TRL weighs the mean itself, in WPO."""
    assert p.chosen is not None
    shares = divided(-p.all.sums(p.all.logps).tensor_split(2)[0] * p.batch, p.chosen)
    return (shares.sum() / max(1, len(shares))).expand_as(shares) if p.o.weighting else shares


LOSSES: dict[str, Callable[[Pairs], Tensor]] = {
    "sigmoid": lambda p: p.term("sigmoid", p.o.epsilon()),
    "cdpo": lambda p: p.term("sigmoid", p.o.epsilon()),
    "robust": lambda p: p.term("robust", p.o.epsilon()),
    "hinge": lambda p: p.term("hinge"),
    "exo_pair": _exo_pair,
    "discopop": lambda p: p.term("discopop", p.o.tau),
    "ipo": _ipo,
    "sigmoid_norm": _sigmoid_norm,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "sft": _sft,
}
