"""Provide functions of TRL under TRL's names, arguments and defaults (1.16), so that only the import changes.

These differences exist. Results are float32 for low-precision logits, as TRL's own GPU kernel returns them (its eager
code returns the logits' dtype, rounded). A token out of range is an error on a CPU and NaN on a GPU. A second
differentiation is an error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.batch import CallOptions, token_batch
from ..core.inputs import Logits
from ..core.names import not_one_of, present, shape_of
from ..core.validation import divided, read_count
from ..engine.logits_at import stats_at
from ..engine.token_stats import token_stats
from ..losses.distillation import distillation_loss

__all__ = ["entropy_from_logits", "generalized_jsd_loss", "selective_log_softmax", "selective_log_softmax_and_entropy"]

SKIPPED = -(1 << 31)  # the label of a row that is skipped: no index of the caller's means that by chance
REDUCTIONS = ("batchmean", "sum", "mean")


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Return log softmax(logits / temperature) at index (trl.trainer.utils).

    It makes one pass over the logits, and one for their gradient. The result has the shape of index.

    Args:
        logits: The logits [..., V].
        index: The tokens [...], or [..., K] for K tokens of each row.
        temperature: The number by which logits are divided.
        row_mask: A mask in the shape of index. Where it is 0, the result and the gradient are 0. None keeps all.
    """
    return _selected(logits, index, temperature, row_mask, entropy=False)[0]


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return selective_log_softmax, and the entropy [...] of each row, in the same pass (trl.trainer.utils).

    Args:
        logits: The logits [..., V].
        index: The tokens [...], or [..., K] for K tokens of each row.
        entropy_requires_grad: False detaches the entropy.
        temperature: The number by which logits are divided.
        row_mask: As in selective_log_softmax, but only for an index [...] with one token per row.
    """
    if row_mask is not None and isinstance(index, Tensor) and index.dim() == logits.dim():
        raise ValueError(f"row_mask: goes with one index per row here, got index {list(index.shape)}")
    logps, entropy = _selected(logits, index, temperature, row_mask, entropy=True)
    entropy = present("entropy", entropy)
    return logps, entropy if entropy_requires_grad else entropy.detach()


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Return the entropy - sum_v p_v log p_v of each row of the logits (trl.trainer.utils).

    Args:
        logits: The logits [..., V].
        chunk_size: Ignored, because no row is copied.
    """
    _check_logits("logits", logits)
    stats = token_stats(logits, _none(logits), entropy=True, shift=False, ignore_index=SKIPPED)
    return present("entropy", stats.entropy)


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | float | Tensor | None = None,
) -> Tensor:
    """Return GKD's divergence of two logits [B, T, V], both divided by temperature (2306.13649 eq. 1).

        m = beta teacher + (1 - beta) student,    beta KL(teacher || m) + (1 - beta) KL(student || m),    summed over
        tokens

    It is KL(teacher || student) at beta = 0, and KL(student || teacher) at beta = 1. In TRL it belongs
    to trl.experimental.gkd.GKDTrainer. TRL's reduction "none" returns a tensor [..., V], which this function
    avoids; for one number per token see fl.distillation_loss(reduction="none").

    Args:
        student_logits: The student's logits [B, T, V].
        teacher_logits: The teacher's logits [B, T, V].
        labels: Tokens of label -100 are ignored. None counts all tokens.
        beta: The weight of the teacher in m.
        temperature: The number by which both logits are divided.
        reduction: What the sum is divided by. "batchmean": the number of tokens that count with labels, and B without
            labels. "mean": the number of tokens that count, times V. "sum": nothing.
        num_items_in_batch: If given, the sum is divided by this number, whatever the reduction.
    """
    for name, x in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        _check_logits(name, x)
    num_items_in_batch = read_count("num_items_in_batch", num_items_in_batch)
    if reduction not in REDUCTIONS and num_items_in_batch is None:
        raise not_one_of("reduction", reduction, REDUCTIONS)
    y = _none(student_logits) if labels is None else torch.where(labels == -100, SKIPPED, 0)
    student, teacher = (Logits(x, temperature=temperature) for x in (student_logits, teacher_logits))
    total = distillation_loss(student, y, teacher, beta=beta, reduction="sum", shift=False, ignore_index=SKIPPED).loss
    if num_items_in_batch is not None:
        return divided(total, num_items_in_batch)
    if reduction == "sum":
        return total
    count = y.numel() if labels is None else (y != SKIPPED).sum()
    if reduction == "mean":
        count = count * student_logits.shape[-1]
    elif labels is None:
        count = student_logits.shape[0]
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def _selected(
    logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the log-probs at index, and the entropy of each row if asked, else None."""
    _check_logits("logits", logits)
    if (
        not isinstance(index, Tensor)
        or index.shape[: logits.dim() - 1] != logits.shape[:-1]
        or index.dim() > logits.dim()
    ):
        wanted = f"{list(logits.shape[:-1])} or {shape_of(*logits.shape[:-1], 'K')}"
        raise ValueError(f"index: expected {wanted}, got {list(getattr(index, 'shape', []))}")
    if row_mask is not None and row_mask.shape != index.shape:
        raise ValueError(f"row_mask: expected {list(index.shape)} as index is, got {list(row_mask.shape)}")
    source, keep = Logits(logits, temperature=temperature), None if row_mask is None else row_mask != 0
    if index.dim() == logits.dim() - 1:
        labels = index.long() if keep is None else index.long().masked_fill(~keep, SKIPPED)
        stats = token_stats(source, labels, entropy=entropy, shift=False, ignore_index=SKIPPED)
        return stats.logps, stats.entropy
    keep = torch.ones_like(index, dtype=torch.bool) if keep is None else keep
    labels = _none(logits).masked_fill(~keep.any(-1), SKIPPED)
    batch = token_batch(labels, shift=False, ignore_index=SKIPPED)
    stats, z, lse = stats_at(source, batch, index, keep, CallOptions(entropy=entropy))
    return (z - lse.unsqueeze(-1)).masked_fill(~keep, 0), stats.entropy


def _none(logits: Tensor) -> Tensor:
    """Return a label 0 for each row, for calls in which labels have no effect."""
    return torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)


def _check_logits(name: str, logits: object) -> None:
    """Raise TypeError where the logits are no tensor."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(logits).__name__}")
