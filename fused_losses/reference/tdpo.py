"""Reference implementation of token-level DPO."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from ..core.batch import read_batch, read_options
from ..core.divergences import Divergence
from ..core.inputs import Source
from ..core.options import check_tdpo
from ..core.outputs import LossOutput
from .common import Sequence, cut, joined, pair_metrics, reduced

__all__ = ["tdpo_loss"]


def tdpo_loss(
    policy: Source,
    labels: Tensor,
    ref: Source,
    *,
    loss_type: str = "tdpo2",
    alpha: float = 0.5,
    beta: float = 0.1,
    divergence: str | Divergence = "forward_kl",
    **options: Any,
) -> LossOutput:
    """Compute fl.tdpo_loss, one pair after another.

    In the notation of the paper, the margins are u - delta and u - alpha delta_2.
    """
    d = check_tdpo(policy, ref, loss_type, alpha, beta, divergence)
    batch, call = read_batch(labels, "pairs", options), read_options(options)
    stats, sequences = cut(policy, batch, ref, divergences=(d,), entropy=call.entropy)
    pairs = list(zip(sequences[: len(sequences) // 2], sequences[len(sequences) // 2 :], strict=True))

    def seq_kl(y: Sequence) -> Tensor:
        return y.divergence[d.key].sum()

    losses = []
    for chosen, rejected in pairs:
        u = beta * chosen.h - beta * rejected.h
        if loss_type == "tdpo1":
            losses.append(-logsigmoid(u - (beta * seq_kl(rejected) - beta * seq_kl(chosen))))
        else:
            losses.append(-logsigmoid(u - alpha * (beta * seq_kl(rejected) - (beta * seq_kl(chosen)).detach())))

    def reward(y: Sequence) -> Tensor:
        return beta * (y.h + seq_kl(y))

    rewards = [(reward(chosen), reward(rejected)) for chosen, rejected in pairs]
    metrics = pair_metrics(rewards, [(chosen.log_p, rejected.log_p) for chosen, rejected in pairs], stats)
    for i, name in enumerate(("kl/chosen", "kl/rejected")):
        metrics[name] = reduced(joined([seq_kl(pair[i]) for pair in pairs], stats)).detach()
    return LossOutput(reduced(joined(losses, stats), call.reduction, call.num_items), metrics, stats)
