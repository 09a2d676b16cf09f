"""The GRPO family: policy-gradient losses of sampled responses with advantages."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from ..core.batch import Batch, read_batch, read_options
from ..core.divergences import Divergence
from ..core.elementwise import cap
from ..core.inputs import FLOATS, LogProbs, Source
from ..core.names import not_one_of, present
from ..core.options import BY_TOKENS, GRPOConfig, SequenceOptions, grpo_config
from ..core.outputs import LossOutput, Part
from ..core.validation import Count, divided, shift_hint
from ..engine.evaluate import FormulaInputs
from ..engine.tokens import Tokens
from .registry import register
from .shared import Fused, fused, output, sequence_part

__all__ = ["group_advantages", "grpo_loss"]


@register(
    SequenceOptions,
    batch="sequences",
    source="2402.03300, 2503.20783, 2503.14476, 2506.13585, 2507.18071",
    inputs={"advantages": "per sequence", "old_logps": "per token"},
    tokens_for={"loss_type": BY_TOKENS},
    variants={
        "grpo": {"beta": 0.3},
        "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 9, "beta": 0.3, "kl": "k1"},
        "bnpo": {"loss_type": "bnpo", "epsilon_high": 0.28, "delta": 4.0},
        "dapo": {"loss_type": "dapo", "beta": 0.3, "kl": "k2"},
        "cispo": {"loss_type": "cispo", "epsilon_high": 2.0, "beta": 0.1},
        "GSPO": {"importance": "sequence", "beta": 0.3},
        "corrected KL": {"beta": 0.3, "use_bias_correction_kl": True},
        "corrected KL, sequence": {"beta": 0.3, "use_bias_correction_kl": True, "importance": "sequence"},
        "cispo, sequence": {"loss_type": "cispo", "epsilon_high": 2.0, "importance": "sequence"},
    },
)
def grpo_loss(
    policy: Source,
    labels: Tensor,
    advantages: Tensor,
    *,
    old_logps: Tensor | None = None,
    ref: Source | None = None,
    loss_type: str = "grpo",
    importance: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    kl: str | Divergence = "k3",
    use_bias_correction_kl: bool = False,
    max_completion_length: int | None = None,
    **options: Unpack[SequenceOptions],
) -> LossOutput:
    """Compute the loss of GRPO (arXiv 2402.03300) or of one of its relatives, under the names of TRL's GRPOTrainer.

    For token t of sequence s, with advantage A:

        x_t = log p(y_t) - old_t     "token"; "sequence" (GSPO, 2507.18071): the mean of x over the sequence, at all its
        tokens l_t = -min(e^x A, clip(e^x, 1 - epsilon, 1 + epsilon_high) A) + beta KL_t
        "cispo" (2506.13585):  l_t = -sg(min(e^x, epsilon_high)) A log p(y_t) + beta KL_t

    sg(x) is x without a gradient. The loss is

        grpo                 mean_s of sum_t l_t / len_s
        dr_grpo              mean_s of sum_t l_t / max_completion_length  (2503.20783)
        bnpo, dapo, cispo    sum of all l_t / the number of tokens  (dapo: 2503.14476)

    Args:
        policy: fl.Hidden, logits or fl.LogProbs of the completions, [S, T] rows or packed with cu_seqlens.
        labels: token ids [S, T] of the completions, or packed.
        advantages: [S], or one for each output token ([S, T - 1] with shift, as old_logps). To weight the policy term of each
            token (by a sampler's importance ratio, or a mask of tokens by entropy), multiply advantages per token by weights
            >= 0.
        old_logps: log-probs of the tokens when they were sampled. None: on-policy, e^x is 1 and its gradient is that of log
            p.
        ref: log-probs per token (fl.LogProbs), hidden states or logits of the reference. Required if beta > 0.
        loss_type: "grpo", "dr_grpo", "bnpo", "dapo" or "cispo".
        importance: "token" or "sequence", the level of the ratios e^x.
        epsilon: the lower clipping range.
        epsilon_high: the upper clipping range. None: epsilon. It is required for cispo, where it is the largest ratio itself
            (without 1 +; 5.0 in 2510.13786).
        delta: an upper bound of e^x in the first of the two terms of the minimum (2505.07291); it matters where A < 0. None:
            no bound.
        beta: the weight of KL_t.
        kl: the estimate of KL(policy || reference) of a token. With d = log q(y) - log p(y): "k1" -d, "k2" d^2 / 2, "k3"
            e^d - 1 - d (TRL's). Their slopes in log p(y) are 1, -d and 1 - e^d: as losses, the gradient of k1 is zero on
            average, and the gradient of k2 is that of the KL on policy. Or the name of any divergence, such as "reverse_kl":
            the sum over the vocabulary, in the same pass; ref must then be a distribution.
        use_bias_correction_kl: multiply KL_t by e^x, unclipped, as TRL does by default, because the tokens were sampled from
            the old policy (2512.02556).
        max_completion_length: the divisor of dr_grpo.
        reduction: "mean", "sum", or "none": [S], the terms whose mean over s is the loss; for bnpo, dapo and cispo
            sum_t l_t.
        num_items: divide by this number instead of the number of sequences, or of tokens for bnpo, dapo and cispo: that of
            the whole batch, when gradients accumulate (as TRL does for dapo and cispo; bnpo with num_items is dapo).
        **options: the other options of a batch, as in preference_loss.

    The metrics are kl if there is a ref; clip_ratio/low_mean, clip_ratio/high_mean and clip_ratio/region_mean, or for cispo
    cispo_clip_ratio; and entropy if it is requested. They are means over tokens; clip ratios of sequences are means over
    sequences, as in TRL.
    """
    batch, call = read_batch(labels, "sequences", options), read_options(options)
    o = grpo_config(
        loss_type, importance, epsilon, epsilon_high, delta, beta, kl, max_completion_length, use_bias_correction_kl
    )
    per_sequence, per_token = inputs(batch, advantages, old_logps, ref, o)

    def formula(tokens: Tokens) -> Tensor:
        x, a = _ratios(tokens, o)
        if o.loss_type == "cispo":
            weight = -x.clamp(max=o.highest).exp().detach() * a
        else:
            weight = -torch.where(a > 0, x.clamp(max=o.highest), x.clamp(o.lowest, o.largest)).exp() * a
        losses = tokens.spread(weight) if _by_sequence(tokens, o) else weight
        losses = losses * tokens.logps if o.loss_type == "cispo" else losses
        total = tokens.sums(losses + o.beta * _weighted_kl(tokens, x, o) if o.beta else losses)
        return total if o.loss_type in BY_TOKENS else total / (o.length or tokens.lengths.clamp(min=1))

    divergences = () if ref is None else o.divergences
    mean_of_tokens = o.loss_type in BY_TOKENS and call.reduction == "mean"
    summed = call._replace(reduction="sum", num_items=None) if mean_of_tokens else call
    result = fused(formula, policy, batch, ref, FormulaInputs("sequence", divergences, per_token, per_sequence), summed)
    parts = _parts(result.tokens, o, ref is not None)
    return _mean_of_tokens(result, parts, call.num_items) if mean_of_tokens else output(result, parts)


def _weighted_kl(tokens: Tokens, x: Tensor, o: GRPOConfig) -> Tensor:
    """Return the KL term of each token, multiplied by its ratio e^x where use_bias_correction_kl asks for it."""
    if not o.corrected:
        return _kl(tokens, o)
    ratio = cap(x).exp()
    return (tokens.spread(ratio) if _by_sequence(tokens, o) else ratio) * _kl(tokens, o)


def _mean_of_tokens(result: Fused, parts: dict[str, Part], num_items: Count | None) -> LossOutput:
    """Return the result for a loss that is the sum of the losses divided by the number of tokens."""
    tokens = result.tokens
    if result.losses is not None:
        parts["loss"] = Part(result.losses, tokens.lengths)
    count = tokens.mask.sum().clamp(min=1) if num_items is None else num_items
    return output(result._replace(loss=divided(result.loss, count)), parts)


def inputs(
    batch: Batch, advantages: Tensor, old_logps: Tensor | None, ref: Source | None, o: GRPOConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the numbers of the sequences and the numbers of the tokens."""
    sequences, shape, device = batch.sequences, tuple(batch.mask.shape), batch.labels.device
    if ref is None and o.beta:
        raise ValueError(f"ref: needed for beta={o.beta!r}, got None")
    if isinstance(ref, LogProbs) and ref.logps.shape != shape:
        raise ValueError(
            f"ref: expected fl.LogProbs {list(shape)}, one for each output token, got {list(ref.logps.shape)}"
        )
    per_sequence, per_token = {}, {}
    for name, x, shapes in (("advantages", advantages, ((sequences,), shape)), ("old_logps", old_logps, (shape,))):
        if x is None and name == "old_logps":
            continue
        if not isinstance(x, Tensor) or x.dtype not in FLOATS:
            raise TypeError(f"{name}: expected a float tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if tuple(x.shape) not in shapes or x.device != device:
            wanted = " or ".join(str(list(s)) for s in shapes)
            hint = shift_hint(x, shape)
            raise ValueError(f"{name}: expected {wanted} on {device}, got {list(x.shape)} on {x.device}{hint}")
        if name == "advantages" and x.shape == (sequences,):
            per_sequence[name] = x.detach()
        else:
            per_token[name if name == "old_logps" else "token_advantages"] = x.detach()
    return per_sequence, per_token


def _by_sequence(tokens: Tokens, o: GRPOConfig) -> bool:
    """Return whether ratios and advantages are both per sequence."""
    return o.sequence and "advantages" in tokens.extra


def _ratios(tokens: Tokens, o: GRPOConfig) -> tuple[Tensor, Tensor]:
    """Return the logarithms of the importance ratios and the advantages: [S] if _by_sequence, else [n]."""
    old, dtype = tokens.extra.get("old_logps"), tokens.logps.dtype
    x = tokens.logps - (tokens.logps.detach() if old is None else old.to(dtype))
    x = x.masked_fill(~tokens.mask, 0)  # old_logps may have any value there
    if o.sequence:
        x = tokens.sums(x) / tokens.lengths.clamp(min=1)
    if "advantages" in tokens.extra:
        a = tokens.extra["advantages"].to(dtype)
        return (x, a) if o.sequence else (x, tokens.spread(a))
    a = tokens.extra["token_advantages"].to(dtype).masked_fill(~tokens.mask, 0)
    return (tokens.spread(x), a) if o.sequence else (x, a)


def _kl(tokens: Tokens, o: GRPOConfig) -> Tensor:
    """Return the KL term of each token, [n]."""
    if o.divergences:
        return tokens.divergence[o.kl]
    d = present("ref", tokens.ref_logps).to(tokens.logps.dtype) - tokens.logps
    if o.kl == "k1":
        return -d
    d = cap(d) if o.kl == "k3" else d
    return d.expm1() - d if o.kl == "k3" else d.square() / 2


def _parts(tokens: Tokens, o: GRPOConfig, ref: bool) -> dict[str, Part]:
    x, a = _ratios(tokens, o)

    def share(flags: Tensor) -> Part:
        flags = flags.to(x.dtype)
        return Part(flags) if _by_sequence(tokens, o) else sequence_part(tokens, flags)

    parts = {"kl": sequence_part(tokens, _kl(tokens, o))} if ref else {}
    if o.loss_type == "cispo":
        parts["cispo_clip_ratio"] = share((x > o.highest) & (a > 0))
    else:
        low, high = (x < o.lowest) & (a < 0), (x > o.highest) & (a > 0)
        parts |= {f"clip_ratio/{n}_mean": share(y) for n, y in (("low", low), ("high", high), ("region", low | high))}
    if tokens.entropy is not None:
        parts["entropy"] = sequence_part(tokens, tokens.entropy)
    return parts


def group_advantages(rewards: Tensor, group_size: int, scale: str = "group") -> Tensor:
    """Compute the advantages [S] of GRPO from rewards [S].

        A = (r - mean) / (std + 1e-4)        mean of the group; std (n - 1) of the group, or of the whole batch

    as TRL does. A reward that is NaN (not scored) is ignored and gets the advantage 0. A reward that is alone in its group
    also gets 0.

    Args:
        rewards: [S]; each group_size rewards in a row belong to answers to one prompt.
        group_size: the number of answers to a prompt.
        scale: where std is taken: "group", "batch" (2508.08221), or "none" to divide by nothing (Dr. GRPO, 2503.20783).
    """
    if scale not in ("group", "batch", "none"):
        raise not_one_of("scale", scale, ("group", "batch", "none"))
    if not isinstance(rewards, Tensor) or rewards.dtype not in FLOATS:
        raise TypeError(f"rewards: expected a float tensor, got {getattr(rewards, 'dtype', type(rewards).__name__)}")
    if rewards.dim() != 1 or type(group_size) is not int or group_size < 1 or len(rewards) % group_size:
        raise ValueError(
            f"rewards: expected [groups * group_size] for group_size={group_size!r}, got {list(rewards.shape)}"
        )
    scored = ~rewards.isnan()
    r, counts = rewards.masked_fill(~scored, 0).view(-1, group_size), scored.view(-1, group_size)
    centred = _centred(r, counts)
    if scale == "none":
        return centred.view(-1)
    flat = (r, counts) if scale == "group" else (r.view(1, -1), counts.view(1, -1))
    variance = _centred(*flat).square().sum(1, keepdim=True) / (flat[1].sum(1, keepdim=True) - 1).clamp(min=1)
    return (centred / (variance.sqrt() + 1e-4)).view(-1)


def _centred(r: Tensor, counts: Tensor) -> Tensor:
    """Subtract from each row its mean, over the entries that count."""
    mean = r.sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp(min=1)
    return (r - mean).masked_fill(~counts, 0)
