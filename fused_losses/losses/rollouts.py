"""Numbers of sampled responses, from which policy gradients are made: advantages, importance weights of rollouts, masks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.elementwise import cap
from ..core.inputs import FLOATS
from ..core.names import not_one_of
from ..core.sequence_parallel import sequence_shard
from ..core.validation import check_positive
from ..engine.tokens import Tokens

__all__ = ["entropy_quantile_mask", "group_advantages", "optimal_values", "rollout_weights"]


LEVELS = ("token", "sequence", "geometric")
MODES = ("truncate", "mask")


def rollout_weights(
    old_logps: Tensor,
    rollout_logps: Tensor,
    mask: Tensor,
    *,
    level: str,
    mode: str,
    low: float | None = None,
    high: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Compute importance weights that correct the difference between a sampler and the trainer, for `weights` of grpo_loss.

        d_t = old_t - rollout_t     log-probs of the same tokens under the same weights, by the trainer and by the sampler
        r_t = e^d_t                 "token"
        r_t = e^(sum of d over s)   "sequence", the same at all tokens of a sequence
        r_t = e^(mean of d over s)  "geometric"
        w_t = min(max(r_t, low), high)               "truncate"
        w_t = r_t if low <= r_t <= high, else 0      "mask"

    Names elsewhere: token and truncate is TIS; token and mask with both bounds IcePop; sequence and mask MIS; TRL's
    vllm_importance_sampling_mode is "{level}_{mode}". Weights of several levels may be multiplied.

    A rollout log-prob that is not finite (the sampler could not score the token) counts as d_t = 0, as in TRL. The weights have
    no gradient, and are 1 where the mask is False.

    Args:
        old_logps: [S, T], or packed [total]; stats.logps of the trainer at the time of sampling.
        rollout_logps: as old_logps; what the inference engine returned.
        mask: as old_logps, bool; the tokens that count.
        level: "token", "sequence" or "geometric".
        mode: "truncate" or "mask".
        low: the smallest ratio. None: no bound.
        high: the largest ratio. None: no bound, which only "mask" with `low` allows.
        cu_seqlens: [S + 1] offsets of packed sequences.

    Raises:
        ValueError: If shapes differ, or a bound is missing or out of order.
    """
    if level not in LEVELS:
        raise not_one_of("level", level, LEVELS)
    if mode not in MODES:
        raise not_one_of("mode", mode, MODES)
    check_positive(**{name: x for name, x in (("low", low), ("high", high)) if x is not None})
    if high is None and (mode == "truncate" or low is None):
        raise ValueError("high: expected the largest ratio, such as 2.0, got None")
    if low is not None and high is not None and low > high:
        raise ValueError(f"low: expected a number <= high={high!r}, got {low!r}")
    _check_alike(mask, old_logps=old_logps, rollout_logps=rollout_logps)
    if (old_logps.dim() == 1) != (cu_seqlens is not None) or old_logps.dim() > 2:
        raise ValueError(f"old_logps: expected [S, T], or [total] with cu_seqlens, got {list(old_logps.shape)}")
    apart = (old_logps.detach().float() - rollout_logps.detach().float()).reshape(-1)
    apart = apart.masked_fill(~mask.reshape(-1) | ~apart.isfinite(), 0)
    if level != "token":
        count = len(old_logps) if cu_seqlens is None else len(cu_seqlens) - 1
        tokens = Tokens(apart, None, None, None, {}, mask.reshape(-1), cu_seqlens, count)
        apart = tokens.spread(tokens.sums(apart) if level == "sequence" else tokens.means(apart))
    ratio = cap(apart).exp()
    if mode == "truncate":
        ratio = ratio.clamp(low, high)
    else:
        outside = (ratio < (low or 0.0)) | (ratio > (float("inf") if high is None else high))
        ratio = ratio.masked_fill(outside, 0)
    return ratio.view(old_logps.shape).masked_fill(~mask, 1)


def entropy_quantile_mask(entropy: Tensor, mask: Tensor, top: float, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return which tokens have an entropy among the highest of the batch, for `weights` of grpo_loss (arXiv 2506.01939).

        w_t = [H_t >= the (1 - top) quantile of H over all tokens that count]

    The quantile is interpolated, as by torch.quantile; `top` is TRL's top_entropy_quantile.

    Args:
        entropy: stats.entropy, of any shape; its gradient is ignored.
        mask: as entropy, bool; the tokens that count. The result is False elsewhere.
        top: the share of tokens to keep, in (0, 1].
        group: the quantile is over the tokens of all ranks of this group; a collective call.

    Raises:
        ValueError: If top is out of range, or shapes differ.
    """
    if not isinstance(top, int | float) or not 0 < top <= 1:
        raise ValueError(f"top: expected a number in (0, 1], got {top!r}")
    _check_alike(mask, entropy=entropy)
    values = entropy.detach()[mask].float()
    if group is not None:
        (values,) = sequence_shard(values, group, None, shift=False, static_shapes=False).whole([values])
    if not len(values):
        return mask.clone()
    position = (1 - top) * (len(values) - 1)
    ordered, below = values.sort().values, int(position)
    pair = ordered[below : below + 2]
    threshold = torch.lerp(pair[0], pair[-1], position - below)
    return mask & (entropy.detach().float() >= threshold)


def _check_alike(mask: Tensor, **tensors: Tensor) -> None:
    """Raise if the tensors are not float tensors of the shape of the mask, or the mask is none."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or x.dtype not in FLOATS:
            raise TypeError(f"{name}: expected a float tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.shape != mask.shape or x.device != mask.device:
            expected, got = (f"{list(t.shape)} on {t.device}" for t in (mask, x))
            raise ValueError(f"{name}: expected {expected}, as the mask, got {got}")


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
    _check_groups(rewards, group_size)
    scored = ~rewards.isnan()
    r, counts = rewards.masked_fill(~scored, 0).view(-1, group_size), scored.view(-1, group_size)
    centred = _centred(r, counts)
    if scale == "none":
        return centred.view(-1)
    flat = (r, counts) if scale == "group" else (r.view(1, -1), counts.view(1, -1))
    variance = _centred(*flat).square().sum(1, keepdim=True) / (flat[1].sum(1, keepdim=True) - 1).clamp(min=1)
    return (centred / (variance.sqrt() + 1e-4)).view(-1)


def optimal_values(rewards: Tensor, group_size: int, beta: float) -> Tensor:
    """Estimate the optimal value V* [S] of the prompt of each response, from the rewards of several (arXiv 2505.20686).

        V* = beta log mean_i e^(r_i / beta)     over the group, the same for all its responses

    The responses are samples of the reference policy. The advantages of fl.a2po_loss are rewards minus V*.

    Args:
        rewards: [S]; each group_size rewards in a row belong to answers to one prompt. A reward that is NaN (not scored) is
            ignored; a group without a reward has the value NaN.
        group_size: the number of answers to a prompt.
        beta: beta_1 of the paper, > 0 (beta1 of TRL's A2POTrainer).
    """
    check_positive(beta=beta)
    _check_groups(rewards, group_size)
    r = rewards.detach().view(-1, group_size)
    scored = ~r.isnan()
    total = (r / beta).masked_fill(~scored, -torch.inf).logsumexp(1) - scored.sum(1).to(r.dtype).log()
    return (beta * total).repeat_interleave(group_size)


def _check_groups(rewards: Tensor, group_size: int) -> None:
    """Raise if rewards are no float tensor [groups * group_size]."""
    if not isinstance(rewards, Tensor) or rewards.dtype not in FLOATS:
        raise TypeError(f"rewards: expected a float tensor, got {getattr(rewards, 'dtype', type(rewards).__name__)}")
    if rewards.dim() != 1 or type(group_size) is not int or group_size < 1 or len(rewards) % group_size:
        raise ValueError(
            f"rewards: expected [groups * group_size] for group_size={group_size!r}, got {list(rewards.shape)}"
        )


def _centred(r: Tensor, counts: Tensor) -> Tensor:
    """Subtract from each row its mean, over the entries that count."""
    mean = r.sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp(min=1)
    return (r - mean).masked_fill(~counts, 0)
