"""Cross entropy with label smoothing and z-loss."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor

from ..core.batch import read_batch, read_options
from ..core.divergences import get
from ..core.inputs import Logits, LogProbs, Source, as_source
from ..core.options import TokenOptions, check_cross_entropy
from ..core.outputs import LossOutput
from ..engine.evaluate import FormulaInputs
from ..engine.tokens import Tokens
from ..engine.vocab_parallel import shard_of
from .distillation import token_means
from .registry import register
from .shared import fused, output

__all__ = ["cross_entropy_loss"]


@register(
    TokenOptions,
    batch="tokens",
    source="1512.00567, 2204.02311, 2508.05629",
    ref="unused",
    distribution=True,
    variants={
        "label smoothing": {"label_smoothing": 0.1},
        "z-loss": {"z_loss": 1e-2},
        "plain": {},
        "both": {"label_smoothing": 0.3, "z_loss": 1e-3},
        "dft": {"loss_type": "dft"},
    },
)
def cross_entropy_loss(
    policy: Source,
    labels: Tensor,
    *,
    loss_type: str = "nll",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    **options: Unpack[TokenOptions],
) -> LossOutput:
    """Compute the cross entropy of the labels, as torch.nn.functional.cross_entropy does, with an optional z-loss, or DFT.

    The loss of a token, over the V valid tokens of the head, is

        -(1 - eps) log p(label) - eps / V sum_v log p_v + z_loss lse^2,    lse = log sum_v exp z_v

    or for "dft" (dynamic fine-tuning, 2508.05629), where sg(x) is x without a gradient,

        -sg(p(label)) log p(label)

    and the loss is the mean over the tokens that count (label != ignore_index). There are no class weights. If no token
    counts, the loss is 0, where torch returns NaN.

    Args:
        policy: fl.Hidden or logits [..., V]; fl.LogProbs only if label_smoothing and z_loss are 0.
        labels: token ids [...].
        loss_type: "nll" or "dft", as in TRL's SFTTrainer. dft takes neither label_smoothing nor z_loss.
        label_smoothing: eps (arXiv 1512.00567), in [0, 1]. -sum_v log p_v equals V (KL(uniform || p) + log V).
        z_loss: >= 0. It keeps lse near 0 (PaLM, 2204.02311, uses 1e-4). z are the logits after the options of the head.
        weights: one for each output token, numbers or bools >= 0, without a gradient ([..., T - 1] with shift). The losses are
            multiplied by them, and the mean is divided by their sum instead of the number of tokens; num_items divides by any
            other number. Metrics are not weighted. None: 1.
        **options: the options of a batch, as in preference_loss.

    The metrics are means over the tokens: logps, lse, mean_token_accuracy (the share of labels that have the highest logit,
    under TRL's key), and entropy if it is requested.
    """
    source, batch = as_source("policy", policy), read_batch(labels, "tokens", options)
    check_cross_entropy(loss_type, label_smoothing, z_loss)
    eps = float(label_smoothing)
    ref, inputs, vocab = None, FormulaInputs("token", lse=True), 0
    if isinstance(source, LogProbs):
        if eps or z_loss:
            raise ValueError("policy: label_smoothing and z_loss need fl.Hidden or logits, got fl.LogProbs")
    elif eps:
        x = source.logits if isinstance(source, Logits) else source.hidden
        zero = torch.zeros((), dtype=x.dtype, device=x.device)  # the uniform distribution: one element, strides of 0
        uniform = zero.expand(*batch.labels.shape, source.vocab)
        ref = Logits(uniform, process_group=source.process_group, shard=source.shard)
        inputs, vocab = FormulaInputs("token", (get("forward_kl"),), lse=True), shard_of(source).total or source.vocab

    def formula(tokens: Tokens) -> Tensor:
        losses = (eps - 1) * tokens.logps
        if loss_type == "dft":
            return losses * tokens.logps.detach().exp()
        if eps:
            losses = losses + eps * (tokens.divergence["forward_kl"] + math.log(vocab)) * tokens.mask
        return losses if not z_loss or tokens.lse is None else losses + z_loss * tokens.lse.square()

    result = fused(formula, source, batch, ref, inputs, read_options(options), options.get("weights"))
    tokens = result.tokens
    logit_numbers = (
        {}
        if tokens.lse is None or tokens.correct is None
        else {"lse": tokens.lse, "mean_token_accuracy": tokens.correct.to(tokens.logps.dtype)}
    )
    return output(result, token_means(result, **logit_numbers))
