"""Reference implementation of the preference losses of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..core.batch import read_batch, read_options
from ..core.divergences import Divergence
from ..core.dynamic_beta import DynamicBeta
from ..core.elementwise import cap
from ..core.inputs import LogProbs, Source, as_source
from ..core.names import present
from ..core.options import PairLossConfig, pair_loss_config, pair_numbers
from ..core.outputs import LossOutput
from ..core.validation import Count, read_count
from .common import Sequence, cut, joined, pair_metrics, part, reduced
from .stats import transformed

__all__ = ["dpo_loss", "ipo_loss", "preference_loss"]

Pair = tuple[Sequence, Sequence]  # chosen, rejected


def _score(y: Sequence, o: PairLossConfig) -> Tensor:
    """Return the f-DPO score s(h) - s(0).

    s(h) = f'(e^h) in f-DPO (2309.16240), and h in DPO. Subtracting s(0) makes the score 0 at h = 0 for every divergence.
    """
    score = present("divergence", o.link.score)
    return score(y.h) - score(torch.zeros_like(y.h))


def _margin(chosen: Sequence, rejected: Sequence, o: PairLossConfig) -> Tensor:
    return _beta(chosen, o) * (_score(chosen, o) - _score(rejected, o)) - chosen.extra.get("margins", 0.0)


def _beta(y: Sequence, o: PairLossConfig) -> Any:
    """Return beta, or that of the sequence's pair."""
    return y.extra.get("beta", o.beta)


def _epsilon(y: Sequence, o: PairLossConfig) -> Any:
    return y.extra.get("label_smoothing", o.smoothing or 0.0)


def _average_margin(chosen: Sequence, rejected: Sequence, o: PairLossConfig) -> Tensor:
    return _score(chosen, o) / max(1, len(chosen)) - _score(rejected, o) / max(1, len(rejected))


def _smoothed(margin: Tensor, eps: float) -> Tensor:
    flipped = eps * logsigmoid(-margin) if eps else 0.0  # without the test, 0 * inf would be NaN
    return -(1 - eps) * logsigmoid(margin) - flipped


def _sigmoid(chosen: Sequence, rejected: Sequence, o: PairLossConfig) -> Tensor:
    """Compute the loss of DPO (eq. 7), or of cDPO if eps > 0."""
    return _smoothed(_margin(chosen, rejected, o), _epsilon(chosen, o))


def _robust(chosen: Sequence, rejected: Sequence, o: PairLossConfig) -> Tensor:
    eps, m = o.smoothing or 0.0, _margin(chosen, rejected, o)
    return (-(1 - eps) * logsigmoid(m) + (eps * logsigmoid(-m) if eps else 0.0)) / (1 - 2 * eps)


def _hinge(chosen: Sequence, rejected: Sequence, o: PairLossConfig) -> Tensor:
    return torch.relu(1 - _margin(chosen, rejected, o))


def _exo_pair(chosen: Sequence, rejected: Sequence, o: PairLossConfig) -> Tensor:
    eps, m = 1e-3 if o.smoothing is None else o.smoothing, _margin(chosen, rejected, o)
    to_chosen = torch.sigmoid(m) * (logsigmoid(m) - math.log(1 - eps))
    return to_chosen + torch.sigmoid(-m) * (logsigmoid(-m) - math.log(eps))


def _discopop(chosen: Sequence, rejected: Sequence, o: PairLossConfig) -> Tensor:
    m = _margin(chosen, rejected, o)
    complement = torch.sigmoid(-m / o.tau)  # 1 - c
    return -complement * logsigmoid(m) + cap(logsigmoid(m / o.tau) - m).exp()


def _ipo(chosen: Sequence, rejected: Sequence, o: PairLossConfig) -> Tensor:
    return (_average_margin(chosen, rejected, o) - 1 / (2 * _beta(chosen, o))) ** 2


def _sigmoid_norm(chosen: Sequence, rejected: Sequence, o: PairLossConfig) -> Tensor:
    return -logsigmoid(_beta(chosen, o) * _average_margin(chosen, rejected, o) - chosen.extra.get("margins", 0.0))


def _nca_pair(chosen: Sequence, rejected: Sequence, o: PairLossConfig) -> Tensor:
    good, bad = _beta(chosen, o) * _score(chosen, o), _beta(rejected, o) * _score(rejected, o)
    return -logsigmoid(good) - logsigmoid(-good) / 2 - logsigmoid(-bad) / 2


def _bco_pair(chosen: Sequence, rejected: Sequence, o: PairLossConfig) -> Tensor:
    return -logsigmoid(_beta(chosen, o) * _score(chosen, o)) - logsigmoid(-_beta(rejected, o) * _score(rejected, o))


def _sppo_hard(chosen: Sequence, rejected: Sequence, o: PairLossConfig) -> Tensor:
    return (_score(chosen, o) - 1 / (2 * _beta(chosen, o))) ** 2 + (
        _score(rejected, o) + 1 / (2 * _beta(chosen, o))
    ) ** 2


def _apo_zero(chosen: Sequence, rejected: Sequence, o: PairLossConfig) -> Tensor:
    return torch.sigmoid(-_beta(chosen, o) * chosen.h) + torch.sigmoid(_beta(rejected, o) * rejected.h)


def _apo_down(chosen: Sequence, rejected: Sequence, o: PairLossConfig) -> Tensor:
    return torch.sigmoid(_beta(chosen, o) * chosen.h) + torch.sigmoid(-_margin(chosen, rejected, o))


def _in_order(numbers: list[Tensor]) -> list[Tensor]:
    return sorted(numbers, key=lambda x: x.item())


def _aot(pairs: list[Pair], o: PairLossConfig) -> list[Tensor]:
    policy = _in_order([chosen.log_p - rejected.log_p for chosen, rejected in pairs])
    ref = _in_order([(chosen.log_p - chosen.h) - (rejected.log_p - rejected.h) for chosen, rejected in pairs])
    return [_smoothed(o.beta * (p - q), o.smoothing or 0.0) for p, q in zip(policy, ref, strict=True)]


def _aot_unpaired(pairs: list[Pair], o: PairLossConfig) -> list[Tensor]:
    chosen_h = _in_order([chosen.h for chosen, _ in pairs])
    rejected_h = _in_order([rejected.h for _, rejected in pairs])
    margins = [o.beta * (chosen - rejected) for chosen, rejected in zip(chosen_h, rejected_h, strict=True)]
    return [_smoothed(margin, o.smoothing or 0.0) for margin in margins]


def _sft(pairs: list[Pair], weights: list[Tensor] | None, batch: Any, tokens: Any) -> list[Tensor]:
    """Return the shares of the mean over tokens; `weights` multiply that mean."""
    shares = [part(-chosen.log_p * float(batch), tokens) for chosen, _ in pairs]
    return shares if weights is None else [torch.stack(shares).mean() * weight for weight in weights]


LOSSES: dict[str, Callable[[Sequence, Sequence, PairLossConfig], Tensor]] = {
    "sigmoid": _sigmoid, "cdpo": _sigmoid, "robust": _robust, "hinge": _hinge, "exo_pair": _exo_pair, "discopop": _discopop,
    "ipo": _ipo, "sigmoid_norm": _sigmoid_norm, "nca_pair": _nca_pair, "bco_pair": _bco_pair, "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero, "apo_down": _apo_down,
}  # fmt: skip
SORTED = {"aot": _aot, "aot_unpaired": _aot_unpaired}


def preference_loss(
    policy: Source,
    labels: Tensor,
    ref: Source | None,
    *,
    loss_type: str | Several[str] = "sigmoid",
    loss_weights: Several[float] | None = None,
    divergence: str | Divergence = "reverse_kl",
    beta: float | Tensor | DynamicBeta = 0.1,
    margins: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float | Tensor | None = None,
    discopop_tau: float = 0.05,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    num_nll_tokens: Count | None = None,
    **options: Any,
) -> LossOutput:
    """Compute fl.preference_loss, one pair after another."""
    batch, call = read_batch(labels, "pairs", options), read_options(options)
    numbers = pair_numbers(batch, beta=beta, margins=margins, weights=weights, label_smoothing=label_smoothing)
    o = pair_loss_config(
        ref is not None,
        loss_type,
        loss_weights,
        divergence,
        beta,
        label_smoothing,
        discopop_tau,
        ld_alpha,
        use_weighting,
        known=(*LOSSES, *SORTED, "sft"),
        per_pair=numbers,
    )
    num_items, num_nll_tokens = call.num_items, read_count("num_nll_tokens", num_nll_tokens)
    squares = {"squares": _log_sum_of_squares(policy, batch.shift)} if use_weighting else None
    stats, sequences = cut(policy, batch, ref, entropy=call.entropy, per_token=squares, per_sequence=numbers)
    whole = list(zip(sequences[: len(sequences) // 2], sequences[len(sequences) // 2 :], strict=True))
    pairs = whole
    if o.ld_alpha is not None:
        pairs = [_apply_ld_alpha(chosen, rejected, o.ld_alpha) for chosen, rejected in whole]
    wpo = [(_wpo(chosen) + _wpo(rejected)).exp() for chosen, rejected in whole] if use_weighting else None

    if o.dynamic is not None:
        ahead = [(_score(chosen, o) - _score(rejected, o)).detach() for chosen, rejected in pairs]
        o = replace(o, beta=float(o.dynamic.update(joined(ahead, stats))))

    def losses_of(name: str) -> list[Tensor]:
        if name == "sft":
            chosen_tokens = max(1, sum(len(chosen) for chosen, _ in whole))
            times = len(whole) if num_nll_tokens is None or num_items is None else num_items
            return _sft(whole, wpo, times, chosen_tokens if num_nll_tokens is None else num_nll_tokens)
        if name in SORTED:
            return SORTED[name](pairs, o)
        pair_losses = [LOSSES[name](chosen, rejected, o) for chosen, rejected in pairs]
        return pair_losses if wpo is None else [x * weight for x, weight in zip(pair_losses, wpo, strict=True)]

    losses = torch.stack([joined(losses_of(name), stats) * weight for name, weight in o.losses]).sum(0)
    if weights is not None:
        losses = losses * weights.detach().to(losses.dtype)
        num_items = weights.sum().item() if num_items is None and call.reduction == "mean" else num_items
    rewards = [(_beta(chosen, o) * chosen.h, _beta(rejected, o) * rejected.h) for chosen, rejected in pairs]
    logps = [(chosen.log_p, rejected.log_p) for chosen, rejected in pairs]
    metrics = pair_metrics(rewards, logps, stats)
    if o.dynamic is not None:
        metrics["beta"] = stats.logps.new_tensor(o.beta)
    return LossOutput(reduced(losses, call.reduction, num_items), metrics, stats)


def _apply_ld_alpha(chosen: Sequence, rejected: Sequence, alpha: float) -> Pair:
    """Multiply log-probs beyond the length of the shorter response by alpha, on both sides.

    This is LD-DPO (2409.06411).
    """
    shared = min(len(chosen), len(rejected))

    def short(y: Sequence) -> Sequence:
        def weighed(x: Tensor) -> Tensor:
            return torch.cat([x[:shared], alpha * x[shared:]])

        ref = None if y.ref_logps is None else weighed(y.ref_logps)
        return replace(y, logps=weighed(y.logps), ref_logps=ref, ref_sum=None if ref is None else ref.sum())

    return short(chosen), short(rejected)


def _wpo(y: Sequence) -> Tensor:
    """Return the logarithm of eq. 2 of WPO (2406.11827), for one response."""
    return ((y.logps - y.extra["squares"]).sum() / max(1, len(y))).detach()


def _log_sum_of_squares(policy: Source, shift: bool) -> Tensor:
    """Compute log sum_v p_v^2 per token."""
    source = as_source("policy", policy)
    if isinstance(source, LogProbs):
        raise ValueError("use_weighting: needs the policy's logits or hidden states, got fl.LogProbs")
    log_squares = (2 * transformed(source).log_softmax(-1)).logsumexp(-1)
    return log_squares[..., :-1] if shift else log_squares


def dpo_loss(policy: Source, labels: Tensor, ref: Source | None, **options: Any) -> LossOutput:
    """Compute fl.dpo_loss."""
    return preference_loss(policy, labels, ref, loss_type="sigmoid", **options)


def ipo_loss(policy: Source, labels: Tensor, ref: Source | None, **options: Any) -> LossOutput:
    """Compute fl.ipo_loss."""
    return preference_loss(policy, labels, ref, loss_type="ipo", **options)
