"""Losses that train a draft model for speculative decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Unpack

from torch import Tensor

from ..core.batch import read_batch, read_options
from ..core.divergences import get
from ..core.inputs import LogProbs, Source
from ..core.options import LEAST_ACCEPTANCE, TokenOptions, check_speculative
from ..core.outputs import LossOutput
from ..engine.evaluate import FormulaInputs
from ..engine.tokens import Tokens
from .distillation import token_means
from .registry import register
from .shared import fused, output

__all__ = ["speculative_loss"]

TV, KL = "total_variation", "forward_kl"


class Objective(NamedTuple):
    """The divergences that a loss type asks for, and the loss of each token from these and eta."""

    divergences: tuple[str, ...]
    loss: Callable[[Mapping[str, Tensor], float], Tensor]


def _neg_log_acceptance(d: Mapping[str, Tensor], eta: float) -> Tensor:
    return -(1 - d[TV]).clamp(min=LEAST_ACCEPTANCE).log()


def _lk_hybrid(d: Mapping[str, Tensor], eta: float) -> Tensor:
    weight = (-eta * (1 - d[TV].detach())).exp()
    return weight * d[KL] + (1 - weight) * d[TV]


OBJECTIVES = {
    "tv": Objective((TV,), lambda d, eta: d[TV]),
    "neg_log_acceptance": Objective((TV,), _neg_log_acceptance),
    "lk_hybrid": Objective((TV, KL), _lk_hybrid),
}


@register(
    TokenOptions,
    batch="tokens",
    source="2602.23881",
    distribution=True,
    variants={
        "tv": {"loss_type": "tv"},
        "neg_log_acceptance": {"loss_type": "neg_log_acceptance"},
        "lk_hybrid": {"loss_type": "lk_hybrid"},
    },
)
def speculative_loss(
    policy: Source,
    labels: Tensor,
    ref: Source,
    *,
    loss_type: str,
    eta: float = 3.0,
    **options: Unpack[TokenOptions],
) -> LossOutput:
    """Compute a loss of a draft model p against the target model q, whose tokens it proposes in speculative decoding.

    A proposed token is accepted with probability alpha = sum_v min(p_v, q_v) = 1 - TV(p, q). The loss of a token is

        tv                   TV(p, q) = 1 - alpha
        neg_log_acceptance   -log alpha, where alpha is at least 1e-5
        lk_hybrid            w KL(q || p) + (1 - w) TV(p, q),  w = sg(exp(-eta alpha))      (2602.23881)

    and the loss is the mean over the tokens that count. The names are those of the package speculators.

    Args:
        policy: the draft model, fl.Hidden or logits [..., V].
        labels: token ids [...], which only mark the tokens that count (label != ignore_index).
        ref: the target model, fl.Hidden or logits [..., V]; its hidden size may differ. Where the draft's vocabulary is a part
            of the target's, pass the rows of the target's head that belong to it: fl.Hidden(states, weight[ids]). q is then
            normalised over these.
        loss_type: "tv", "neg_log_acceptance" or "lk_hybrid".
        eta: how fast lk_hybrid goes over from the KL to TV; only for lk_hybrid.
        weights: one for each output token, numbers or bools >= 0, without a gradient ([..., T - 1] with shift), for example a
            decay with the position in a block. The losses are multiplied by them, and the mean is divided by their sum;
            num_items divides by any other number. Metrics are not weighted. None: 1.
        **options: the options of a batch, as in preference_loss.

    The metrics are means over the tokens: acceptance (alpha), logps, kl for lk_hybrid, and entropy if it is requested.
    """
    check_speculative(loss_type, eta)
    objective = OBJECTIVES[loss_type]
    if ref is None or isinstance(ref, LogProbs):
        got = "None" if ref is None else "fl.LogProbs"
        raise ValueError(f"ref: expected fl.Hidden or logits of the target model, got {got}")

    def formula(tokens: Tokens) -> Tensor:
        return objective.loss(tokens.divergence, eta)

    batch = read_batch(labels, "tokens", options)
    inputs = FormulaInputs("token", tuple(get(name) for name in objective.divergences))
    result = fused(formula, policy, batch, ref, inputs, read_options(options), options.get("weights"))
    divergences = result.tokens.divergence
    numbers = {"acceptance": 1 - divergences[TV]} | ({"kl": divergences[KL]} if KL in divergences else {})
    return output(result, token_means(result, **numbers))
