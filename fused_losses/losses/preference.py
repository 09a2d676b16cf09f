"""Preference losses of (chosen, rejected) pairs.

LOSSES is the registry and the place for the next loss. An entry takes the Tokens of some pairs and the Options and returns
losses [B]: one line that names a term of pair_terms.py where the loss is a function of the margin, plain torch on the
sequences' sums where it is not. `preference_loss` does everything around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..divergences import Divergence, from_key
from ..objective import Tokens
from ..sources import Source, check_labels
from .common import Entry, LossOutput, check_pairs, check_positive, fused

__all__ = ["LOSSES", "dpo_loss", "preference_loss"]


@dataclass(frozen=True)
class Options:
    """What an entry of LOSSES may read besides the tokens."""

    link: Divergence  # of f-DPO
    beta: float
    label_smoothing: float


def _sigmoid(tokens: Tokens, o: Options) -> Tensor:
    return tokens.pair_term("sigmoid", o.link, o.beta, o.label_smoothing)


LOSSES: dict[str, Callable[[Tokens, Options], Tensor]] = {"sigmoid": _sigmoid}


def preference_loss(
    policy: Source,
    labels: Tensor,
    ref: Source | None = None,
    *,
    loss: str = "sigmoid",
    divergence: str | Divergence = "reverse_kl",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    entropy: bool = False,
    inplace_backward: bool = False,
    plan: str = "auto",
    workspace: int | None = None,
    static_shapes: bool = False,
) -> LossOutput:
    """A preference loss of (chosen, rejected) pairs, and its gradient, without a vocabulary-size temporary.

        h = sum_t log p(y_t) - log q(y_t)        margin = beta (s(h_chosen) - s(h_rejected))
        "sigmoid":  -(1 - eps) log sigmoid(margin) - eps log sigmoid(-margin)

    s is the f-DPO link of `divergence` (2309.16240): s(h) = h for reverse_kl, which is DPO (2305.18290); eps is
    label_smoothing, cDPO where it is not 0.

    Args:
        policy, labels, ref, shift, ignore_index, inplace_backward, workspace, static_shapes: as in token_stats, with
            hidden states [2B, T, H] or logits [2B, T, V] and labels [2B, T], the B chosen rows first and the B rejected
            rows second; or packed, [total, H] or [total, V] and labels [total] with cu_seqlens. ref may also be fl.LogProbs
            per token or per sequence [2B], or None: h is then the policy's log-prob alone.
        loss: a name in fused_losses.losses.LOSSES.
        beta: > 0. label_smoothing: in [0, 0.5).
        reduction: "mean" over pairs, "sum", or "none" ([B]).
        num_items: with "mean", divide the sum by this instead of B: the pairs of the whole batch, when gradients accumulate.
        cu_seqlens: [2B + 1] int offsets of the packed sequences, chosen first. They are not read on the host on a GPU.
        entropy: also report the policy's mean entropy per token.
        plan: for hidden states: as in token_stats, and "rows": blocks of pairs with the gradient computed in the forward
            (which reads cu_seqlens on the host, so "auto" takes it for packed sequences on a CPU only).

    metrics: rewards/chosen, rewards/rejected (beta h, as TRL logs them for every divergence), rewards/margins,
    rewards/accuracies, logps/chosen, logps/rejected, and entropy if asked for.
    """
    labels = check_labels(labels)
    o = options(loss, divergence, beta, label_smoothing, ref is not None)
    check_pairs(labels, cu_seqlens)
    found = fused(
        lambda tokens: LOSSES[loss](tokens, o), policy, labels, ref, unit="pair", reduction=reduction, num_items=num_items,
        cu_seqlens=cu_seqlens, shift=shift, ignore_index=ignore_index, entropy=entropy, inplace_backward=inplace_backward,
        plan=plan, workspace=workspace, static_shapes=static_shapes,
    )  # fmt: skip
    return LossOutput(found.loss, metrics(found.tokens, beta), found.stats)


def dpo_loss(policy: Source, labels: Tensor, ref: Source | None = None, **options) -> LossOutput:  # type: ignore[no-untyped-def]
    """preference_loss(loss="sigmoid"): DPO, cDPO (label_smoothing) and f-DPO (divergence). Options as there."""
    if "loss" in options:
        raise TypeError("dpo_loss: `loss` is fixed to 'sigmoid'; use preference_loss to choose another")
    return preference_loss(policy, labels, ref, loss="sigmoid", **options)


def options(loss: str, divergence: str | Divergence, beta: float, label_smoothing: float, ref: bool) -> Options:
    if loss not in LOSSES:
        raise ValueError(f"loss: unknown name {loss!r}; known: {', '.join(LOSSES)}")
    check_positive(beta=beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: expected a number in [0, 0.5), got {label_smoothing!r}")
    link = from_key(divergence)
    link.f_dpo_link()
    if not ref and link.name != "reverse_kl":
        raise ValueError(f"divergence: {link.key!r} needs a reference, got ref=None")
    return Options(link, float(beta), float(label_smoothing))


def metrics(tokens: Tokens, beta: float) -> dict[str, Tensor]:
    """As TRL logs them: means over the pairs."""
    logps, ratios = tokens.sums(tokens.logps), beta * tokens.log_ratios()
    count = max(tokens.sequences // 2, 1)
    chosen, rejected = ratios.tensor_split(2)
    found = {
        "rewards/chosen": chosen.sum() / count,
        "rewards/rejected": rejected.sum() / count,
        "rewards/margins": (chosen - rejected).sum() / count,
        "rewards/accuracies": (chosen > rejected).to(ratios.dtype).sum() / count,
        "logps/chosen": logps.tensor_split(2)[0].sum() / count,
        "logps/rejected": logps.tensor_split(2)[1].sum() / count,
    }
    if tokens.entropy is not None:
        found["entropy"] = tokens.entropy.sum() / tokens.mask.sum().clamp(min=1)
    return found


ENTRIES = [
    Entry(preference_loss, "pairs", "2305.18290, 2309.16240", {name: {"loss": name} for name in LOSSES}, ref="optional")
]
