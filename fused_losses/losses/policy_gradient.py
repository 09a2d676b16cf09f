"""The GRPO family: policy-gradient losses of sampled responses with advantages. Their terms are in policy_terms.py."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from ..core.batch import Batch, read_batch, read_options
from ..core.divergences import Divergence
from ..core.elementwise import cap
from ..core.inputs import LogProbs, Source
from ..core.names import present
from ..core.options import token_numbers
from ..core.outputs import LossOutput, Part
from ..core.policy_options import BY_TOKENS, PolicyConfig, PolicyOptions, policy_config
from ..core.support import Support
from ..core.validation import Count, divided
from ..engine.evaluate import FormulaInputs
from ..engine.support import on_support
from ..engine.tokens import Tokens
from .policy_terms import TERMS
from .registry import register
from .shared import Fused, fused, output, sequence_part

__all__ = ["grpo_loss"]


@register(
    PolicyOptions,
    batch="sequences",
    source="2402.03300, 2503.20783, 2503.14476, 2506.13585, 2507.18071, 2511.20347, 2602.05261, 2602.10693, 2507.20673, "
    "2602.04879",
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
        "sapo": {"loss_type": "sapo", "beta": 0.1},
        "luspo": {"loss_type": "luspo", "importance": "sequence"},
        "vespo": {"loss_type": "vespo"},
        "gmpo": {"loss_type": "gmpo", "epsilon": 0.4},
        "dppo_tv": {"loss_type": "dppo_tv", "epsilon": 0.05, "delta": 5.0},
        "dppo_kl": {"loss_type": "dppo_kl", "epsilon": 0.05},
        "intellect": {"loss_type": "intellect", "epsilon": 0.1, "intellect_tau": 0.5},
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
    epsilon: float | None = None,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    kl: str | Divergence = "k3",
    use_bias_correction_kl: bool = False,
    weights: Tensor | None = None,
    entropy_coef: float = 0.0,
    off_policy_mask_threshold: float | None = None,
    rollout_logps: Tensor | None = None,
    support: Support | None = None,
    **options: Unpack[PolicyOptions],
) -> LossOutput:
    """Compute the loss of GRPO (arXiv 2402.03300) or of one of its relatives, under the names of TRL's GRPOTrainer.

    For token t of sequence s, with advantage A, weight w and p = p(y_t):

        x_t = log p - old_t     with importance="sequence" (GSPO, 2507.18071): the mean of x over the sequence, at all tokens
        l_t = w_t m_t f(x_t, A) + beta KL_t - entropy_coef H_t

        f                            loss_type
        -min(e^x A, clip(e^x) A)     grpo, dr_grpo (2503.20783), bnpo, dapo (2503.14476), luspo (2602.05261);
                                     clip(r) is within [1 - epsilon, 1 + epsilon_high]
        -sg(min(e^x, epsilon_high)) A log p       cispo (2506.13585)
        -4 / tau sigmoid(tau (e^x - 1)) A         sapo (2511.20347); tau = sapo_temperature_pos, or _neg where A <= 0
        -sg(phi) A log p                          vespo (2602.10693); phi = W^k e^(lambda (1 - W)), W = e^(sum of x over s)
        -e^(mean of clip(x) over s) A             gmpo (2507.20673); x is at most epsilon_high, where A <= 0 at least -epsilon
        -[kept] sg(min(e^x, delta)) A log p       dppo_tv, dppo_kl (2602.04879)
        -[kept] e^x A + intellect_tau x^2         intellect (prime-rl's "IPO", which is not that of preferences)

    sg(x) is x without a gradient; [kept] is 0 for tokens that moved too far, else 1. With p' = e^old: dppo_tv drops a token
    where A > 0 and p - p' > epsilon_high, or A <= 0 and p' - p > epsilon; dppo_kl where the KL of the two coins p' and p is
    larger than that, in the same directions; intellect where |p - p'| > epsilon. The loss is

        grpo, sapo, gmpo       mean_s of sum_t l_t / len_s
        luspo                  mean_s of sum_t l_t
        dr_grpo                mean_s of sum_t l_t / max_completion_length
        all others             sum of all l_t / the number of tokens

    Args:
        policy: fl.Hidden, logits or fl.LogProbs of the completions, [S, T] rows or packed with cu_seqlens.
        labels: token ids [S, T] of the completions, or packed.
        advantages: [S], or one for each output token ([S, T - 1] with shift, as old_logps).
        old_logps: log-probs of the tokens when they were sampled. None: on-policy, e^x is 1 and its gradient is that of log
            p. To correct the difference between a sampler and the trainer, pass the trainer's here and `weights` from
            fl.rollout_weights; for vespo, dppo_* and intellect pass the sampler's own, as their papers do.
        ref: log-probs per token (fl.LogProbs), hidden states or logits of the reference. Required if beta > 0.
        loss_type: one of the names above.
        importance: "token" or "sequence", the level of the ratios e^x.
        epsilon: the lower clipping range. None: 0.2; needed for dppo_tv, dppo_kl and intellect.
        epsilon_high: the upper clipping range. None: epsilon. It is required for cispo, where it is the largest ratio itself
            (without 1 +; 5.0 in 2510.13786).
        delta: an upper bound of e^x in the first of the two terms of the minimum (2505.07291); it matters where A < 0. It is
            the dual clip (1912.09729; verl's clip_ratio_c). For dppo_*, of e^x. None: no bound.
        beta: the weight of KL_t.
        kl: the estimate of KL(policy || reference) of a token. With d = log q(y) - log p(y): "k1" -d, "k2" d^2 / 2, "k3"
            e^d - 1 - d (TRL's). Their slopes in log p(y) are 1, -d and 1 - e^d: as losses, the gradient of k1 is zero on
            average, and the gradient of k2 is that of the KL on policy. Or the name of any divergence, such as "reverse_kl":
            the sum over the vocabulary, in the same pass; ref must then be a distribution.
        use_bias_correction_kl: multiply KL_t by e^x, unclipped, as TRL does by default, because the tokens were sampled from
            the old policy (2512.02556).
        weights: w, [S] or one for each output token, numbers or bools, without a gradient; they multiply the policy term
            alone. fl.rollout_weights and fl.entropy_quantile_mask make them. None: 1.
        entropy_coef: the weight of the entropy bonus. H_t is divided as the rest of l_t (as in verl); TRL divides it by
            tokens for every loss_type. policy must then be a distribution.
        off_policy_mask_threshold: m is 0 at a token with A < 0 in a sequence whose mean of rollout - log p is larger
            (2512.02556), else 1. A token whose rollout log-prob is not finite counts as 0 there.
        rollout_logps: the sampler's own log-probs, for off_policy_mask_threshold. None: old_logps.
        support: an fl.Support: the ids that the sampler kept at each token (top-k, top-p, min-p), over which p and H are
            normalised (2512.02556, "keep sampling mask"); old_logps must then be so, too. It takes no ref and no plan.
        max_completion_length: the divisor of dr_grpo.
        sapo_temperature_pos: sapo's tau where A > 0; 1.0 unless given.
        sapo_temperature_neg: sapo's tau where A <= 0; 1.05 unless given.
        vespo_k_pos: vespo's k where A >= 0; 2.0 unless given.
        vespo_lambda_pos: vespo's lambda where A >= 0; 3.0 unless given.
        vespo_k_neg: vespo's k where A < 0; 3.0 unless given.
        vespo_lambda_neg: vespo's lambda where A < 0; 2.0 unless given.
        intellect_tau: needed for intellect.
        reduction: "mean", "sum", or "none": [S], the terms whose mean over s is the loss; where the loss is divided by the
            number of tokens, sum_t l_t.
        num_items: divide by this number instead of the number of sequences, or of tokens where the loss is divided by their
            number: that of the whole batch, when gradients accumulate (as TRL does for dapo, cispo and vespo; bnpo with
            num_items is dapo).
        **options: the other options of a batch, as in preference_loss.

    The metrics are kl if there is a ref; clip_ratio/low_mean, clip_ratio/high_mean and clip_ratio/region_mean (of dropped
    tokens for dppo_* and intellect), or for cispo cispo_clip_ratio, for vespo vespo/phi_seq_mean; and entropy if it is
    requested. They are means over tokens; clip ratios of sequences are means over sequences, as in TRL.
    """
    batch, call = read_batch(labels, "sequences", options), read_options(options)
    o = policy_config(
        loss_type,
        importance,
        epsilon,
        epsilon_high,
        delta,
        beta,
        kl,
        use_bias_correction_kl,
        entropy_coef,
        off_policy_mask_threshold,
        options,
    )
    policy, batch = on_support(policy, ref, batch, support, call)
    per_sequence, per_token = _inputs(batch, advantages, old_logps, weights, rollout_logps, ref, o)

    def formula(tokens: Tokens) -> Tensor:
        x, a = _ratios(tokens, o)
        each = _weighted(tokens, TERMS[o.loss_type].each(tokens, x, a, o), a, o)
        each = each + o.beta * (cap(x).exp() if o.corrected else 1) * _kl(tokens, o) if o.beta else each
        each = each - o.entropy_coef * present("entropy", tokens.entropy) if o.entropy_coef else each
        return tokens.means(each) if o.divisor == "sequence" else tokens.sums(each) / o.length

    call = call._replace(entropy=call.entropy or o.entropy_coef > 0)
    mean_of_tokens = o.divisor == "batch" and call.reduction == "mean"
    summed = call._replace(reduction="sum", num_items=None) if mean_of_tokens else call
    inputs = FormulaInputs("sequence", () if ref is None else o.divergences, per_token, per_sequence)
    result = fused(formula, policy, batch, ref, inputs, summed)
    parts = _parts(result.tokens, o, ref is not None)
    return _mean_of_tokens(result, parts, call.num_items) if mean_of_tokens else output(result, parts)


def _mean_of_tokens(result: Fused, parts: dict[str, Part], num_items: Count | None) -> LossOutput:
    """Return the result for a loss that is the sum of the losses divided by the number of tokens."""
    tokens = result.tokens
    if result.losses is not None:
        parts["loss"] = Part(result.losses, tokens.lengths)
    count = tokens.mask.sum().clamp(min=1) if num_items is None else num_items
    return output(result._replace(loss=divided(result.loss, count)), parts)


def _inputs(
    batch: Batch,
    advantages: Tensor,
    old_logps: Tensor | None,
    weights: Tensor | None,
    rollout_logps: Tensor | None,
    ref: Source | None,
    o: PolicyConfig,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the numbers of the sequences and the numbers of the tokens."""
    shape = tuple(batch.mask.shape)
    if ref is None and o.beta:
        raise ValueError(f"ref: needed for beta={o.beta!r}, got None")
    if isinstance(ref, LogProbs) and ref.logps.shape != shape:
        raise ValueError(
            f"ref: expected fl.LogProbs {list(shape)}, one for each output token, got {list(ref.logps.shape)}"
        )
    if rollout_logps is not None and o.off_policy is None:
        raise ValueError(
            "rollout_logps: is for off_policy_mask_threshold, which is None; for weights, use fl.rollout_weights"
        )
    whole = (batch.sequences,)
    per_sequence: dict[str, Tensor] = {}
    per_token: dict[str, Tensor] = {}
    for name, x in (("advantages", advantages), ("weights", weights)):
        if x is not None or name == "advantages":
            numbers = token_numbers(name, x, batch, whole, flags=name == "weights")
            per_sequence |= {name: numbers} if numbers.shape == whole else {}
            per_token |= {f"token_{name}": numbers} if numbers.shape != whole else {}
    for name, x in (("old_logps", old_logps), ("rollout_logps", rollout_logps)):
        per_token |= {} if x is None else {f"token_{name}": token_numbers(name, x, batch)}
    return per_sequence, per_token


def _given(tokens: Tokens, name: str) -> Tensor | None:
    """Return a tensor of the caller per token [n], 0 where the mask is False, or None if it was not given."""
    dtype = tokens.logps.dtype
    if name in tokens.extra:
        return tokens.spread(tokens.extra[name].to(dtype))
    each = tokens.extra.get(f"token_{name}")
    return None if each is None else each.to(dtype).masked_fill(~tokens.mask, 0)


def _ratios(tokens: Tokens, o: PolicyConfig) -> tuple[Tensor, Tensor]:
    """Return the logarithm of the importance ratio and the advantage of each token, [n]."""
    old = _given(tokens, "old_logps")
    x = (tokens.logps - (tokens.logps.detach() if old is None else old)).masked_fill(~tokens.mask, 0)
    if o.sequence:
        x = tokens.spread(tokens.means(x))
    return x, present("advantages", _given(tokens, "advantages"))


def _weighted(tokens: Tokens, each: Tensor, a: Tensor, o: PolicyConfig) -> Tensor:
    """Return the policy term of each token after its weights and the off-policy mask."""
    weights = _given(tokens, "weights")
    each = each if weights is None else each * weights
    if o.off_policy is None:
        return each
    rollout = _given(tokens, "rollout_logps")
    rollout = _given(tokens, "old_logps") if rollout is None else rollout
    apart = torch.zeros_like(tokens.logps) if rollout is None else rollout - tokens.logps.detach()
    apart = torch.where(apart.isfinite(), apart, 0)
    mean = tokens.spread(tokens.means(apart))
    return each.masked_fill((a < 0) & (mean > o.off_policy), 0)


def _kl(tokens: Tokens, o: PolicyConfig) -> Tensor:
    """Return the KL term of each token, [n]."""
    if o.divergences:
        return tokens.divergence[o.kl]
    d = present("ref", tokens.ref_logps).to(tokens.logps.dtype) - tokens.logps
    if o.kl == "k1":
        return -d
    d = cap(d) if o.kl == "k3" else d
    return d.expm1() - d if o.kl == "k3" else d.square() / 2


def _parts(tokens: Tokens, o: PolicyConfig, ref: bool) -> dict[str, Part]:
    """Return the parts of the metrics; where ratios and advantages are both per sequence, what follows from them is too."""
    term, (x, a) = TERMS[o.loss_type], _ratios(tokens, o)
    parts = {"kl": sequence_part(tokens, _kl(tokens, o))} if ref else {}
    by_sequence = (o.sequence or term.of_sequences) and "advantages" in tokens.extra

    def share(each: Tensor) -> Part:
        each = each.to(x.dtype)
        if not by_sequence:
            return sequence_part(tokens, each)
        # all tokens of a sequence are alike, and one without tokens counts as 0
        return Part(tokens.means(each))

    parts |= {name: share(each) for name, each in term.metrics(tokens, x, a, o).items()}
    if tokens.entropy is not None:
        parts["entropy"] = sequence_part(tokens, tokens.entropy)
    return parts
