"""Token-level DPO: sequential divergences over the whole vocabulary in the margin of a pair."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.nn.functional import logsigmoid

from ..core.batch import read_batch, read_options
from ..core.divergences import Divergence
from ..core.inputs import Source
from ..core.options import SequenceOptions, check_tdpo
from ..core.outputs import LossOutput, Part
from ..engine.evaluate import FormulaInputs
from ..engine.tokens import Tokens
from .registry import register
from .shared import fused, output, pair_metrics

__all__ = ["tdpo_loss"]


@register(
    SequenceOptions,
    batch="pairs",
    source="2404.11999",
    distribution=True,
    variants={
        "TDPO1": {"loss_type": "tdpo1"},
        "TDPO2": {"alpha": 0.7, "beta": 0.3},
        "another divergence": {"divergence": "js"},
    },
)
def tdpo_loss(
    policy: Source,
    labels: Tensor,
    ref: Source,
    *,
    loss_type: str = "tdpo2",
    alpha: float = 0.5,
    beta: float = 0.1,
    divergence: str | Divergence = "forward_kl",
    **options: Unpack[SequenceOptions],
) -> LossOutput:
    """Compute TDPO (arXiv 2404.11999): DPO with the divergence of each response from the reference in the margin.

    For p the policy, q the reference, w chosen and l rejected, with divergences token by token over the whole vocabulary:

        h = sum_t log p(y_t) - log q(y_t)        D = sum_t D(p, q) after y_1 .. y_{t-1}, for forward_kl KL(q || p)
        "tdpo1":  -log sigmoid(beta (h_w - h_l) + beta (D_w - D_l))
        "tdpo2":  -log sigmoid(beta (h_w - h_l) + beta alpha (sg(D_w) - D_l))

    sg stops the gradient, only on the chosen side. At alpha = 0 TDPO2 is DPO; at alpha = 1 it has the value of TDPO1, but not
    its gradient.

    Args:
        policy: fl.Hidden or logits; the divergence needs whole distributions.
        labels: pairs [2B, T], or packed with cu_seqlens, as in preference_loss. There is one loss for each pair.
        ref: fl.Hidden or logits, as policy.
        loss_type: "tdpo1" or "tdpo2". The function in the released code has TDPO2 as its default, but its configuration runs
            TDPO1.
        alpha: >= 0, for TDPO2 only.
        beta: > 0.
        divergence: any of fl.divergences.names() in place of the paper's forward_kl = KL(ref || policy). Unlike the
            divergence of f-DPO, it does not change h.
        **options: the options of a batch, as in preference_loss.

    The metrics are those of preference_loss with the rewards of the released code, beta (h + D), and kl/chosen and
    kl/rejected, which are D.
    """
    d = check_tdpo(policy, ref, loss_type, alpha, beta, divergence)
    batch = read_batch(labels, "pairs", options)

    def formula(tokens: Tokens) -> Tensor:
        h_chosen, h_rejected = tokens.log_ratios().tensor_split(2)
        d_chosen, d_rejected = tokens.sums(tokens.divergence[d.key]).tensor_split(2)
        apart = d_chosen - d_rejected if loss_type == "tdpo1" else alpha * (d_chosen.detach() - d_rejected)
        return -logsigmoid(beta * (h_chosen - h_rejected + apart))

    result = fused(formula, policy, batch, ref, FormulaInputs("pair", (d,)), read_options(options))
    tokens = result.tokens
    kl = tokens.sums(tokens.divergence[d.key])
    parts = pair_metrics(tokens, beta * (tokens.log_ratios() + kl), tokens.sums(tokens.logps))
    chosen, rejected = kl.tensor_split(2)
    return output(result, parts | {"kl/chosen": Part(chosen), "kl/rejected": Part(rejected)})
