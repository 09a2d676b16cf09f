"""Preference losses: small functions on top of token_stats.

LOSSES is the registry and the place for the next loss. An entry takes a Batch and the label smoothing and returns losses
[B] with the sequence log-probs [2B]: one line that names a term of pair_terms.py where the loss is a function of the margin,
plain torch on the sequence log-probs where it is not. `preference_loss` does everything around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import hidden_ops, ops
from .backend import choose
from .divergences import Divergence, from_key
from .hidden import How, Request, request
from .layout import shifted_labels
from .sources import Hidden, Logits, LogProbs, Source, TokenStats, as_source, check_labels
from .stats import check_sources, given_logps, labels_mask, pack_stats, token_stats


@dataclass(frozen=True)
class LossOutput:
    """loss: scalar ([B] with reduction="none"). metrics: detached 0-d tensors under TRL's keys, means over the batch.
    stats: the TokenStats behind it."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(repr=False)
    stats: TokenStats = field(repr=False)


@dataclass(frozen=True)
class Batch:
    """What a loss sees of a batch: call pair_term for a margin-shaped loss."""

    logps: Tensor | None  # per token, flat
    ref_logps: Tensor | None  # per token, flat, or per sequence
    mask: Tensor | None  # per token, flat
    cu_seqlens: Tensor | None
    sequences: int
    ref_summed: bool
    divergence: Divergence
    beta: float

    def pair_term(self, name: str, *params: float) -> tuple[Tensor, Tensor, Tensor]:
        """losses [B], sequence log-probs of policy and reference [2B]."""
        assert self.logps is not None and self.mask is not None
        dtype = self.logps.dtype if self.logps.dtype == torch.float64 else None
        losses, policy, ref, _ = ops.pair_loss(
            self.logps, self.ref_logps, self.mask, self.cu_seqlens, name, list(params), self.divergence.key, self.beta,
            self.sequences, self.ref_summed, choose(self.logps.device, dtype),
        )  # fmt: skip
        return losses, policy, ref


@dataclass(frozen=True)
class HiddenBatch(Batch):
    """A batch whose tokens are yet to be projected: pair_term does it in blocks of pairs, with the gradient inside."""

    call: Request = field(kw_only=True)
    found: list[Tensor] = field(kw_only=True, default_factory=list)  # the outputs of hidden_stats, after pair_term

    def pair_term(self, name: str, *params: float) -> tuple[Tensor, Tensor, Tensor]:
        losses, policy, ref, _, *found = hidden_ops.hidden_pair_loss(
            *self.call.tensors, self.ref_logps, self.cu_seqlens, name, list(params), self.divergence.key, self.beta,
            self.sequences, self.ref_summed, *self.call.options, self.call.wanted,
        )  # fmt: skip
        self.found.extend(found[:6])
        return losses, policy, ref


def _sigmoid(batch: Batch, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    return batch.pair_term("sigmoid", label_smoothing)


LOSSES: dict[str, Callable[[Batch, float], tuple[Tensor, Tensor, Tensor]]] = {"sigmoid": _sigmoid}


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
    _check_options(loss, beta, label_smoothing, reduction, num_items)
    link = from_key(divergence)
    link.f_dpo_link()
    source = None if ref is None else as_source("ref", ref)
    if source is None and link.name != "reverse_kl":
        raise ValueError(f"divergence: {link.key!r} needs a reference, got ref=None")
    sequences = _check_batch(labels, cu_seqlens)
    summed = isinstance(source, LogProbs) and source.logps.shape == (sequences,) != labels.shape
    if shift and cu_seqlens is not None:
        labels, shift = _shift_packed(labels, cu_seqlens, ignore_index), False

    how = How(plan, workspace, static_shapes)
    options: dict[str, Any] = {"shift": shift, "ignore_index": ignore_index, "entropy": entropy}
    given = source.logps if isinstance(source, LogProbs) else None
    rest = (cu_seqlens, sequences, summed, link, float(beta))
    call = (
        _gradient_inside(policy, labels, source, cu_seqlens, reduction, how, options) if not inplace_backward else None
    )
    if call is None:
        stats = token_stats(
            policy, labels, None if summed else ref, inplace_backward=inplace_backward, **how._asdict(), **options
        )
        ref_logps = given if summed else stats.ref_logps
        batch = Batch(stats.logps.reshape(-1), _flat(ref_logps, labels), stats.mask.reshape(-1), *rest)
        losses, seq_logps, seq_ref = LOSSES[loss](batch, float(label_smoothing))
    else:
        if given is not None and not summed:
            given = given_logps("ref", LogProbs(given), labels_mask(labels, shift, ignore_index))
            given = torch.nn.functional.pad(given, (0, 1)) if shift else given  # the last position predicts nothing
        inner = HiddenBatch(None, _flat(given, labels), None, *rest, call=call)
        losses, seq_logps, seq_ref = LOSSES[loss](inner, float(label_smoothing))
        stats = pack_stats(inner.found, call.asks, labels, None if summed else source, (), **options)
    return LossOutput(_reduce(losses, reduction, num_items), _metrics(seq_logps, seq_ref, beta, stats), stats)


def _flat(ref_logps: Tensor | None, labels: Tensor) -> Tensor | None:
    if ref_logps is not None and ref_logps.device != labels.device:
        raise ValueError(f"ref: expected fl.LogProbs on {labels.device} as the labels are, got {ref_logps.device}")
    return None if ref_logps is None else ref_logps.reshape(-1)


def _gradient_inside(
    policy: Source, labels: Tensor, ref: Logits | Hidden | LogProbs | None, cu_seqlens: Tensor | None, reduction: str,
    how: How, options: dict[str, Any],
) -> Request | None:  # fmt: skip
    """The call as the row-blocks plan takes it, where that is the plan."""
    if not isinstance(policy, Hidden) or how.plan not in ("auto", "rows"):
        return None
    if reduction == "none" and how.plan == "auto":  # the gradients of the losses may differ
        return None
    check_sources(policy, labels, ref, ())
    y = shifted_labels(labels, options["shift"], options["ignore_index"])
    if cu_seqlens is None:
        longest = 2 * labels.shape[1]
    elif cu_seqlens.is_cpu and cu_seqlens.numel() > 1 and not torch.compiler.is_compiling():
        lengths = cu_seqlens.diff()
        longest = int((lengths[: len(lengths) // 2] + lengths[len(lengths) // 2 :]).max())
    elif how.plan == "rows":
        longest = labels.numel()
    else:  # the offsets are not read on the host
        return None
    other = None if isinstance(ref, LogProbs) else ref
    call = request(policy, y, other, (), options["entropy"], options["ignore_index"], how, max(1, longest))
    return call if call.plan.kind == "rows" else None


def dpo_loss(policy: Source, labels: Tensor, ref: Source | None = None, **options) -> LossOutput:  # type: ignore[no-untyped-def]
    """preference_loss(loss="sigmoid"): DPO, cDPO (label_smoothing) and f-DPO (divergence). Options as there."""
    if "loss" in options:
        raise TypeError("dpo_loss: `loss` is fixed to 'sigmoid'; use preference_loss to choose another")
    return preference_loss(policy, labels, ref, loss="sigmoid", **options)


def _check_options(
    loss: str, beta: float, label_smoothing: float, reduction: str, num_items: int | Tensor | None
) -> None:
    if loss not in LOSSES:
        raise ValueError(f"loss: unknown name {loss!r}; known: {', '.join(LOSSES)}")
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta: expected a finite number > 0, got {beta!r}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: expected a number in [0, 0.5), got {label_smoothing!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items: only goes with reduction='mean', got reduction={reduction!r}")
    if isinstance(num_items, int | float) and num_items <= 0:
        raise ValueError(f"num_items: expected a number > 0, got {num_items!r}")


def _check_batch(labels: Tensor, cu_seqlens: Tensor | None) -> int:
    """The number of sequences."""
    if cu_seqlens is None:
        if labels.dim() != 2 or labels.shape[0] % 2:
            raise ValueError(
                f"labels: expected [2B, T], chosen rows then rejected rows (or cu_seqlens for packed), got {list(labels.shape)}"
            )
        return labels.shape[0]
    if labels.dim() != 1:
        raise ValueError(f"labels: expected packed labels [total] with cu_seqlens, got {list(labels.shape)}")
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"cu_seqlens: expected an int32 or int64 tensor, got {getattr(cu_seqlens, 'dtype', type(cu_seqlens))}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() % 2 == 0:
        raise ValueError(f"cu_seqlens: expected [2B + 1] offsets, got {list(cu_seqlens.shape)}")
    if cu_seqlens.device != labels.device:
        raise ValueError(f"cu_seqlens: expected on {labels.device} as the labels are, got {cu_seqlens.device}")
    if cu_seqlens.is_cpu and not torch.compiler.is_compiling():
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != labels.numel() or (cu_seqlens.diff() < 0).any():
            raise ValueError(
                f"cu_seqlens: expected offsets rising from 0 to {labels.numel()}, got {cu_seqlens.tolist()}"
            )
    return cu_seqlens.numel() - 1


def _shift_packed(labels: Tensor, cu_seqlens: Tensor, ignore_index: int) -> Tensor:
    """The next token's label inside each sequence; none at its end."""
    if labels.numel() == 0:
        return labels
    # An empty sequence marks its predecessor's end once more; one at the very start, the last token, which ends a sequence.
    ends = (cu_seqlens[1:].long() - 1) % labels.numel()
    return labels.roll(-1).index_fill_(0, ends, ignore_index)


def _reduce(losses: Tensor, reduction: str, num_items: int | Tensor | None) -> Tensor:
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (max(losses.numel(), 1) if num_items is None else num_items)


def _metrics(seq_logps: Tensor, seq_ref: Tensor, beta: float, stats: TokenStats) -> dict[str, Tensor]:
    seq_logps, seq_ref = seq_logps.detach(), seq_ref.detach()
    pairs = seq_logps.numel() // 2
    count = max(pairs, 1)
    reward = beta * (seq_logps - seq_ref)
    chosen, rejected = reward[:pairs], reward[pairs:]
    metrics = {
        "rewards/chosen": chosen.sum() / count,
        "rewards/rejected": rejected.sum() / count,
        "rewards/margins": (chosen - rejected).sum() / count,
        "rewards/accuracies": (chosen > rejected).to(reward.dtype).sum() / count,
        "logps/chosen": seq_logps[:pairs].sum() / count,
        "logps/rejected": seq_logps[pairs:].sum() / count,
    }
    if stats.entropy is not None:
        metrics["entropy"] = stats.entropy.detach().sum() / stats.mask.sum().clamp(min=1)
    return metrics
