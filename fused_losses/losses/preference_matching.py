"""PM-RLHF: the preference-matching regulariser, rewards and metrics; Bradley-Terry and Plackett-Luce ranking losses.

The two regularisers take a policy and labels, and return LossOutput. The other functions take tensors of rewards or
log-probs, use plain torch, and return a tensor.
"""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..core.batch import read_batch, read_options
from ..core.inputs import FLOATS, Source
from ..core.layout import stats_dtype
from ..core.names import present
from ..core.options import SequenceOptions, check_matching, check_threshold
from ..core.outputs import LossOutput, Part
from ..core.validation import Count, check_positive
from ..engine.evaluate import FormulaInputs
from ..engine.tokens import Tokens
from .registry import register
from .shared import fused, output, reduced, sequence_part

__all__ = [
    "bradley_terry_loss", "conditional_preference_matching_loss", "plackett_luce_loss", "preference_matching_gap",
    "preference_matching_loss", "preference_matching_reward",
]  # fmt: skip


@register(
    SequenceOptions,
    batch="sequences",
    source="2405.16455",
    ref="unused",
    distribution=True,
    variants={"entropy": {}, "sampled": {"loss_type": "sampled", "beta": 0.5}},
)
def preference_matching_loss(
    policy: Source,
    labels: Tensor,
    *,
    loss_type: str = "entropy",
    beta: float = 1.0,
    baseline: Tensor | None = None,
    **options: Unpack[SequenceOptions],
) -> LossOutput:
    """Compute the regulariser R(pi) = -log pi of PM-RLHF (arXiv 2405.16455), as a loss to add to -E[reward].

        beta E_y[ log p(y | x) ],    so that  max_p E_y[ r - beta log p ]  is at  p = softmax(r / beta)

    With beta = 1 this optimum has the preferences of a Bradley-Terry or Plackett-Luce reward model. A KL to a reference has
    its optimum at ref exp(r / beta) instead. The labels are responses sampled from the policy; the mean is over sequences.
    The types are

        "entropy"   -beta sum_t H(p(. | y_<t)): the expectation of each step over the whole vocabulary. Its gradient takes the
                    prefixes as given: it leaves out that a token changes the entropies after it. It is complete for one
                    token.
        "sampled"   beta log p(y), with the gradient of its expectation: beta (log p(y) - baseline) grad log p(y), where the
                    bracket is a constant. It is unbiased for whole sequences, and noisy; log p(y) itself as a loss would have
                    an expected gradient of 0.

    Args:
        policy: fl.Hidden or logits; for "sampled" also fl.LogProbs.
        labels: token ids [S, T], or packed.
        loss_type: "entropy" or "sampled".
        beta: > 0.
        baseline: [S], only for "sampled": it is subtracted from log p(y), such as the mean log-prob of other responses to the
            prompt.
        **options: the options of a batch, as in preference_loss; num_items is the number of sequences of the whole batch.

    The metrics are logps, the mean of log p(y), and entropy, the mean per token (for "sampled" if it is requested).
    """
    batch, call = read_batch(labels, "sequences", options), read_options(options)
    extra = check_matching(batch, loss_type, beta, baseline)

    def exact(tokens: Tokens) -> Tensor:
        return -beta * tokens.sums(present("entropy", tokens.entropy))

    def sampled(tokens: Tokens) -> Tensor:
        return beta * _score_function(tokens, tokens.logps)

    formula, call = (exact, call._replace(entropy=True)) if loss_type == "entropy" else (sampled, call)
    result = fused(formula, policy, batch, None, FormulaInputs("sequence", per_sequence=extra), call)
    return output(result, _parts(result.tokens))


@register(
    SequenceOptions,
    batch="sequences",
    source="2405.16455",
    variants={"": {"threshold": 0.03, "beta": 0.5}},
    inputs={"baseline": "per sequence"},
)
def conditional_preference_matching_loss(
    policy: Source,
    labels: Tensor,
    ref: Source,
    *,
    threshold: float = 0.01,
    beta: float = 1.0,
    baseline: Tensor | None = None,
    **options: Unpack[SequenceOptions],
) -> LossOutput:
    """Compute the conditional preference matching loss (arXiv 2405.16455).

    It matches preferences among the tokens that the reference finds likely, and is a KL to the reference elsewhere. It is
    preference_matching_loss(loss_type="sampled"), with log p(y) replaced by the sum over tokens of

        log p(y_t)                      where q(y_t) > threshold
        log p(y_t) - log q(y_t)         elsewhere

    As in the released code, the condition is per token and reads only the sampled token. The released code has it only in
    rewards (preference_matching_reward). Its alpha_ctl is our threshold, with values from 0.01 to 0.5.

    Args:
        policy: as in preference_matching_loss(loss_type="sampled").
        labels: as in preference_matching_loss.
        ref: a reference with a log-prob for each token: fl.Hidden, logits or fl.LogProbs.
        threshold: in (0, 1]; 1 gives the KL of ordinary RLHF.
        beta: as in preference_matching_loss.
        baseline: as in preference_matching_loss.
        **options: the options of a batch, as in preference_matching_loss.

    The metrics are logps; support, the share of tokens above the threshold; and entropy if it is requested.
    """
    batch = read_batch(labels, "sequences", options)
    extra = check_matching(batch, "sampled", beta, baseline)
    low = check_threshold(threshold)
    if ref is None:
        raise ValueError("ref: expected a reference, got None; without one it is preference_matching_loss")

    def formula(tokens: Tokens) -> Tensor:
        if tokens.ref_logps is None or tokens.ref_summed:
            raise ValueError("ref: expected fl.LogProbs of each token, got one per sequence")
        return beta * _score_function(tokens, _penalty(tokens.logps, tokens.ref_logps, low))

    result = fused(formula, policy, batch, ref, FormulaInputs("sequence", per_sequence=extra), read_options(options))
    tokens = result.tokens
    inside = (present("ref", tokens.ref_logps) > low).to(tokens.logps.dtype)
    return output(result, _parts(tokens) | {"support": sequence_part(tokens, inside)})


def _penalty(logps: Tensor, ref_logps: Tensor, low: float) -> Tensor:
    return torch.where(ref_logps > low, logps, logps - ref_logps)


def _score_function(tokens: Tokens, penalty: Tensor) -> Tensor:
    """Return the sums [S] of the penalty.

    The expectation of their gradient over responses is the gradient of their expectation.
    """
    value, logps = tokens.sums(penalty).detach(), tokens.sums(tokens.logps)
    weight = value - tokens.extra["baseline"] if "baseline" in tokens.extra else value
    return value + weight * (logps - logps.detach())


def _parts(tokens: Tokens) -> dict[str, Part]:
    parts = {"logps": Part(tokens.sums(tokens.logps))}
    if tokens.entropy is not None:
        parts["entropy"] = sequence_part(tokens, tokens.entropy)
    return parts


@torch.no_grad()
def preference_matching_reward(
    logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    beta: float = 1.0,
    threshold: float | None = None,
    scores: Tensor | None = None,
    clip: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute rewards per token of preference matching, for PPO and its relatives, without a gradient.

    They are those of the paper (arXiv 2405.16455) and its released code:

        -beta log p(y_t)                      where q(y_t) > threshold, or everywhere without a threshold
        -beta (log p(y_t) - log q(y_t))       elsewhere

    At the last token that counts, the score of the response, clamped to [-clip, clip], is added. fl.token_stats returns
    logps, ref_logps and mask.

    Args:
        logps: [..., T], log p of the sampled tokens, of the policy that sampled them.
        ref_logps: [..., T], log q of these tokens. Required with a threshold, and only then.
        beta: > 0; kl_ctl in the released code, 0.1 to 1.
        threshold: in (0, 1]; alpha_ctl in the released code, 0.01 to 0.5. 1 gives the usual KL rewards, for which the
            released code takes alpha_ctl <= 0. None: -beta log p(y_t) everywhere.
        scores: [...], of the reward model. A row in which no token counts gets no score. None: no scores.
        clip: the largest absolute value of a score, 5 in the released code. None: scores are not clamped.
        mask: bool [..., T], the tokens that count; the rewards of other tokens are 0. None: all tokens count.
    """
    check_positive(beta=beta)
    _check_rewards("logps", logps, 1)
    if (threshold is None) != (ref_logps is None):
        raise ValueError("threshold: goes with ref_logps, and ref_logps with it")
    mask = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask
    for name, x in (("ref_logps", ref_logps), ("mask", mask)):
        if x is not None and x.shape != logps.shape:
            raise ValueError(f"{name}: expected {list(logps.shape)} as logps, got {list(x.shape)}")
    rewards = logps if ref_logps is None else _penalty(logps, ref_logps, check_threshold(threshold))  # type: ignore[arg-type]
    rewards = (-beta * rewards).masked_fill(~mask, 0)
    if clip is not None:
        check_positive(clip=clip)
        if scores is None:
            raise ValueError("clip: is of scores, which are None")
    if scores is None:
        return rewards
    if scores.shape != logps.shape[:-1]:
        raise ValueError(
            f"scores: expected {list(logps.shape[:-1])} for logps {list(logps.shape)}, got {list(scores.shape)}"
        )
    scores = scores if clip is None else scores.clamp(-clip, clip)
    counts = mask.long()
    last = mask & (counts.cumsum(-1) == counts.sum(-1, keepdim=True))
    return torch.where(last, rewards + scores.to(rewards.dtype)[..., None], rewards)


@torch.no_grad()
def preference_matching_gap(logps: Tensor, rewards: Tensor, *, beta: float = 1.0) -> Tensor:
    """Measure how far a policy is from matching the preferences of a reward.

    It is the mean over the pairs i < j of responses to a prompt, a 0-d tensor, of

        ((r_i - r_j) - beta (log p(y_i) - log p(y_j)))^2,    0 for p = softmax(r / beta)

    evaluation_pm in the released code is this with K = 2.

    Args:
        logps: [..., K], log-probs, summed over tokens, of K >= 2 responses sampled from the policy.
        rewards: [..., K], the rewards of these responses.
        beta: > 0.
    """
    check_positive(beta=beta)
    _check_rewards("logps", logps, 1)
    if rewards.shape != logps.shape or logps.shape[-1] < 2:
        raise ValueError(
            f"rewards: expected [..., K] with K >= 2 as logps, got {list(rewards.shape)} and {list(logps.shape)}"
        )
    rewards, logps = (x.to(torch.promote_types(stats_dtype(rewards), stats_dtype(logps))) for x in (rewards, logps))
    off = rewards - beta * logps
    squares = (off - off.mean(-1, keepdim=True)).square().sum()  # sum_{i < j} (x_i - x_j)^2 is K times this
    return 2 * squares / max((off.shape[-1] - 1) * off.shape[:-1].numel(), 1)


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | float = 0.0,
    reduction: str = "mean",
    num_items: Count | None = None,
) -> Tensor:
    """Compute the loss of reward models, -log sigmoid(chosen - rejected - margin).

    It is the model P(chosen > rejected) = sigmoid(chosen - rejected). The result is a tensor, float32 or wider.

    Args:
        chosen: rewards [...].
        rejected: rewards [...], of the same shape.
        margin: a number or [...], as in the reward models of Llama 2 (arXiv 2307.09288).
        reduction: as in preference_loss.
        num_items: as in preference_loss.
    """
    _check_rewards("chosen", chosen, 0)
    _check_rewards("rejected", rejected, 0)
    if chosen.shape != rejected.shape:
        raise ValueError(f"rejected: expected {list(chosen.shape)} as chosen, got {list(rejected.shape)}")
    if isinstance(margin, Tensor) and margin.shape not in ((), chosen.shape):
        raise ValueError(f"margin: expected a number or {list(chosen.shape)} as chosen, got {list(margin.shape)}")
    return reduced(softplus(rejected.to(stats_dtype(rejected)) - chosen + margin), reduction, num_items)


def plackett_luce_loss(
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: Count | None = None,
) -> Tensor:
    """Compute -log of the probability of a ranking under Plackett-Luce.

    The best response is drawn by softmax(rewards), then the next best from the rest, and so on:

        -sum_i ( r_i - logsumexp_{j >= i} r_j )

    For K = 2 it is bradley_terry_loss. With rewards beta h of K responses it is DPO for rankings (arXiv 2305.18290, appendix
    A.3). The result is a tensor, float32 or wider.

    Args:
        rewards: [..., K], best first.
        mask: bool [..., K], False for places that are not used, where rankings differ in length. None: all places are used.
        reduction: as in preference_loss, over rankings.
        num_items: as in preference_loss, the number of rankings.
    """
    _check_rewards("rewards", rewards, 1)
    if mask is not None and (mask.shape != rewards.shape or mask.dtype != torch.bool):
        raise ValueError(f"mask: expected bool {list(rewards.shape)} as rewards, got {mask.dtype} {list(mask.shape)}")
    k = rewards.shape[-1]
    r = rewards.to(stats_dtype(rewards))
    remaining = torch.ones(k, k, dtype=torch.bool, device=r.device).triu(1)  # [i, j]: j ranks below i
    if mask is not None:
        r = r.masked_fill(~mask, 0)
        remaining = remaining & mask[..., None, :] & mask[..., :, None]
    # Each place is in its own sum, even a place that is not used: its term is then 0, and so is its gradient.
    remaining = remaining | torch.eye(k, dtype=torch.bool, device=r.device)
    sums = r[..., None, :].masked_fill(~remaining, -math.inf).logsumexp(-1)
    return reduced((sums - r).sum(-1), reduction, num_items)


def _check_rewards(name: str, x: Tensor, dims: int) -> None:
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a float tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() < dims:
        raise ValueError(f"{name}: expected [..., K] or [..., T], got a 0-d tensor")
