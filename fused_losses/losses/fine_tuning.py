"""Losses of supervised fine-tuning that weigh tokens by what the model itself thinks of them: EAFT, ASFT.

DFT is a loss_type of cross_entropy_loss.
"""

from __future__ import annotations

import math
from typing import Unpack

from torch import Tensor

from ..core.batch import read_batch, read_options
from ..core.divergences import Divergence, from_key
from ..core.inputs import Source, as_source
from ..core.options import TokenOptions, check_eaft
from ..core.outputs import LossOutput
from ..core.validation import check_weights
from ..engine.evaluate import FormulaInputs
from ..engine.tokens import Tokens
from ..engine.topk import topk
from .distillation import token_means
from .registry import register
from .shared import fused, output

__all__ = ["asft_loss", "eaft_loss"]

GATE = "gate"  # name among the extras


@register(
    TokenOptions,
    batch="tokens",
    source="2601.02151",
    ref="unused",
    distribution=True,
    variants={"eaft": {}, "other k and alpha": {"k": 5, "alpha": 0.5}},
)
def eaft_loss(
    policy: Source, labels: Tensor, *, k: int = 20, alpha: float = 1.0, **options: Unpack[TokenOptions]
) -> LossOutput:
    """Compute EAFT (entropy-adaptive fine-tuning, arXiv 2601.02151): cross entropy of tokens that the model is unsure of.

        -(H / log k)^alpha log p(label)      H = the entropy of the k largest probabilities, normalised, without a gradient

    and the loss is the mean over the tokens that count. fl.topk finds the k largest logits in a pass of its own, without
    logits of all tokens in memory. LLaMA-Factory 0.9.5 divides by 3 in place of log 20 = 2.996.

    Args:
        policy: fl.Hidden or logits [..., V], with at least k tokens.
        labels: token ids [...].
        k: 2 to 128; 20 in the paper and in released code.
        alpha: >= 0. 0 is cross entropy.
        weights: as in cross_entropy_loss.
        **options: the options of a batch, as in preference_loss.

    The metrics are means over the tokens: gate, (H / log k)^alpha; logps; and entropy (of all tokens) if it is requested.
    """
    check_eaft(k, alpha)
    source, batch = as_source("policy", policy), read_batch(labels, "tokens", options)
    log_p = topk(source, k, workspace=options.get("workspace")).values.log_softmax(-1)
    gate = (-(log_p.exp() * log_p).nansum(-1) / math.log(k)).clamp(0, 1) ** alpha
    gate = (gate[..., :-1] if batch.shift else gate).masked_fill(~batch.mask, 0)

    def formula(tokens: Tokens) -> Tensor:
        return -tokens.extra[GATE] * tokens.logps

    inputs = FormulaInputs("token", per_token={GATE: gate})
    result = fused(formula, source, batch, None, inputs, read_options(options), options.get("weights"))
    return output(result, token_means(result, gate=result.tokens.extra[GATE]))


@register(
    TokenOptions,
    batch="tokens",
    source="2509.23753",
    distribution=True,
    variants={"asft": {"kl_weight": 0.1}, "another divergence": {"kl_weight": 0.3, "divergence": "reverse_kl"}},
)
def asft_loss(
    policy: Source,
    labels: Tensor,
    ref: Source,
    *,
    kl_weight: float,
    divergence: str | Divergence = "forward_kl",
    **options: Unpack[TokenOptions],
) -> LossOutput:
    """Compute ASFT (anchored supervised fine-tuning, arXiv 2509.23753): DFT, and a divergence from the model before training.

        -sg(p(label)) log p(label) + kl_weight D(p, q)      sg(x) is x without a gradient

    and the loss is the mean over the tokens that count. D is KL(q || p) over the whole vocabulary, as in the authors' code and
    in LLaMA-Factory 0.9.5 (asft_alpha is kl_weight); NeMo-RL estimates KL(p || q) from the labels' log-probs.

    Args:
        policy: fl.Hidden or logits [..., V].
        labels: token ids [...].
        ref: fl.Hidden or logits [..., V] of the model before training.
        kl_weight: >= 0.
        divergence: D, any of fl.divergences.names().
        weights: as in cross_entropy_loss.
        **options: the options of a batch, as in preference_loss.

    The metrics are means over the tokens: kl (the divergence), logps, and entropy if it is requested.
    """
    check_weights(kl_weight=kl_weight)
    d = from_key(divergence)
    if ref is None:
        raise ValueError("ref: expected fl.Hidden or logits of the model before training, got None")

    def formula(tokens: Tokens) -> Tensor:
        return kl_weight * tokens.divergence[d.key] - tokens.logps.detach().exp() * tokens.logps

    batch = read_batch(labels, "tokens", options)
    inputs = FormulaInputs("token", (d,))
    result = fused(formula, policy, batch, ref, inputs, read_options(options), options.get("weights"))
    return output(result, token_means(result, kl=result.tokens.divergence[d.key]))
