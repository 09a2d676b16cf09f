"""The formulas of preference_loss. LOSSES is the registry; add new losses there.

An entry takes Pairs and returns losses [B]. If the loss is a function of the margin, it is one line that names a term of
core/margin_losses.py, otherwise plain torch on the sums of the sequences.
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
from ..core.names import present
from ..core.options import (
    EXO_EPSILON,
    PairLossConfig,
)
from ..core.validation import Count, divided
from ..engine.operators import check_plain, once
from ..engine.tokens import Tokens
from .shared import smoothed


def _once(f: Callable[[Pairs], Tensor]) -> Any:
    """Return a property that is computed when it is first read.

    functools.cached_property takes a lock, which torch.compile cannot trace.
    """

    def read(self: Pairs) -> Tensor:
        if f.__name__ not in self.known:
            self.known[f.__name__] = f(self)
        return self.known[f.__name__]

    return property(read)


class Pairs:
    """The tokens of some pairs, and their sums.

    Each sum is computed once, however many losses read it. In tensors [2B], the B chosen sequences come first, then the B
    rejected.
    """

    def __init__(self, tokens: Tokens, o: PairLossConfig, chosen: Count, batch: Count) -> None:
        self.all, self.o = tokens, o
        self.tokens = tokens if o.ld_alpha is None else apply_ld_alpha(tokens, o.ld_alpha)
        self.chosen, self.batch = chosen, batch  # of the whole batch: chosen tokens that count, and pairs
        self.known: dict[str, Tensor] = {}

    @_once
    def h(self) -> Tensor:
        """Return log p(y) - log q(y), [2B]."""
        return self.tokens.log_ratios()

    @_once
    def scores(self) -> Tensor:
        """Return the f-DPO scores s(h) - s(0), [2B]: a policy that is equal to its reference has the score 0."""
        link = self.o.link
        if link.name == "reverse_kl":
            return self.h
        zero, _ = link.f_dpo_link()(self.h.new_zeros(()), *link.params)
        return _curve(self.h, link.f_dpo_link(), link.params) - zero

    @property
    def beta(self) -> float | Tensor:
        """Return beta, or that of each pair [B], or of the batch []."""
        beta = self.betas
        return beta.tensor_split(2)[0] if isinstance(beta, Tensor) and beta.dim() else beta

    @property
    def betas(self) -> float | Tensor:
        """Return beta, or that of each sequence [2B], or of the batch []."""
        return betas(self.tokens, self.o) if self.o.dynamic is None else self.batch_beta

    @_once
    def batch_beta(self) -> Tensor:
        """Return the beta that follows the margins of the batch."""
        chosen, rejected = self.scores.detach().tensor_split(2)
        return present("beta", self.o.dynamic).update(chosen - rejected)

    @_once
    def rewards(self) -> Tensor:
        """Return beta s, [2B]."""
        return self.betas * self.scores

    def epsilon(self) -> float | Tensor:
        """Return label_smoothing, or that of each pair [B]."""
        eps = of_sequences(self.tokens, "label_smoothing")
        return self.o.epsilon() if eps is None else eps.tensor_split(2)[0]

    def offset(self, margin: Tensor) -> Tensor:
        """Subtract the margins that were asked for."""
        asked = of_sequences(self.tokens, "margins")
        return margin if asked is None else margin - asked.tensor_split(2)[0]

    @_once
    def margin(self) -> Tensor:
        chosen, rejected = self.scores.tensor_split(2)
        return self.offset(self.beta * (chosen - rejected))

    @_once
    def average_margin(self) -> Tensor:
        """Return s_w / |y_w| - s_l / |y_l|."""
        chosen, rejected = (self.scores / self.all.lengths.clamp(min=1)).tensor_split(2)
        return chosen - rejected

    def term(self, name: str, *params: float | Tensor) -> Tensor:
        """Compute a function of the margin.

        It is one kernel, unless other losses read the same sums, or pairs have numbers of their own.
        """
        o, numbers = self.o, [x for x in params if not isinstance(x, Tensor)]
        if len(o.names - {"sft"}) == 1 and not (o.per_pair - {"weights"} or o.dynamic):
            return self.tokens.pair_term(name, o.link, o.beta, *numbers)
        return _curve(self.margin, TERMS[name], params)


class _Curve(torch.autograd.Function):
    """The function f(x), where f returns y and dy/dx: not all functions in links and terms support autograd."""

    @staticmethod
    def forward(ctx, x, f, params):  # type: ignore[no-untyped-def]
        y, slope = f(x, *params)
        ctx.save_for_backward(x, slope)
        return y

    @staticmethod
    @once("preference_loss")
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        _, slope = ctx.saved_tensors
        return g * slope, None, None


def of_sequences(tokens: Tokens, name: str) -> Tensor | None:
    """Return an option with a number for each pair, [2B]; None: it is one number, or was not given."""
    return tokens.extra[name].to(tokens.logps.dtype) if name in tokens.extra else None


def betas(tokens: Tokens, o: PairLossConfig) -> float | Tensor:
    """Return beta, or that of each of the 2B sequences, or the last one of a DynamicBeta."""
    each = of_sequences(tokens, "beta")
    return o.dynamic.beta if o.dynamic else o.beta if each is None else each


def _curve(x: Tensor, f: Callable, params: tuple[float | Tensor, ...]) -> Tensor:
    check_plain("preference_loss", x)
    return _Curve.apply(x, f, params)


def apply_ld_alpha(tokens: Tokens, alpha: float) -> Tokens:
    """Multiply the log-probs of the tokens beyond the length of the shorter response by alpha.

    This is LD-DPO (2409.06411). The length is that of the pair's shorter response.
    """
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
    """Compute the weights [B] of WPO (2406.11827 eq. 2), without a graph.

    A weight is the product over the pair of exp(mean_t(log p(y_t) - log sum_v p_v^2)).
    """
    x = (tokens.logps - present("collision", tokens.collision)).detach()
    chosen, rejected = tokens.means(x).tensor_split(2)
    return (chosen + rejected).exp()


def _exo_pair(p: Pairs) -> Tensor:
    eps = p.o.epsilon(EXO_EPSILON)
    return p.term("exo_pair", math.log1p(-eps), math.log(eps))


def _ipo(p: Pairs) -> Tensor:
    return (p.average_margin - 0.5 / p.beta).square()


def _sigmoid_norm(p: Pairs) -> Tensor:
    return -logsigmoid(p.offset(p.beta * p.average_margin))


def _nca_pair(p: Pairs) -> Tensor:
    chosen, rejected = p.rewards.tensor_split(2)
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _bco_pair(p: Pairs) -> Tensor:
    chosen, rejected = p.rewards.tensor_split(2)
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def _sppo_hard(p: Pairs) -> Tensor:
    chosen, rejected = p.scores.tensor_split(2)
    return (chosen - 0.5 / p.beta).square() + (rejected + 0.5 / p.beta).square()


def _aot(p: Pairs) -> Tensor:
    def ordered(x: Tensor) -> Tensor:
        chosen, rejected = x.tensor_split(2)
        return (chosen - rejected).sort().values

    t = p.tokens
    delta = ordered(t.sums(t.logps))
    if t.ref_logps is not None:
        delta = delta - ordered(t.ref_logps.to(t.logps.dtype) if t.ref_summed else t.sums(t.ref_logps))
    return smoothed(p.o.beta * delta, p.o.epsilon())


def _aot_unpaired(p: Pairs) -> Tensor:
    chosen, rejected = p.h.tensor_split(2)
    return smoothed(p.o.beta * (chosen.sort().values - rejected.sort().values), p.o.epsilon())


def _apo_zero(p: Pairs) -> Tensor:
    chosen, rejected = (p.betas * p.h).tensor_split(2)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def _apo_down(p: Pairs) -> Tensor:
    return torch.sigmoid(p.beta * p.h.tensor_split(2)[0]) + torch.sigmoid(-p.margin)


def _sft(p: Pairs) -> Tensor:
    """Return the share of each pair of the mean over the chosen tokens of the batch.

    With WPO the mean itself is returned for each pair, because TRL weights the mean.
    """
    shares = divided(-p.all.sums(p.all.logps).tensor_split(2)[0] * p.batch, p.chosen)
    return (shares.sum() / max(1, len(shares))).expand_as(shares) if p.o.weighting else shares


LOSSES: dict[str, Callable[[Pairs], Tensor]] = {
    "sigmoid": lambda p: p.term("sigmoid", p.epsilon()),
    "cdpo": lambda p: p.term("sigmoid", p.epsilon()),
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


def weighted_sum(p: Pairs) -> Tensor:
    """Return sum_i loss_weights[i] loss_i [B]."""
    weighted = [(LOSSES[name](p), weight) for name, weight in p.o.losses]
    losses = [x if weight == 1 else weight * x for x, weight in weighted]
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum(0)
