"""Replace the entry points of TRL 1.16's own kernels by our operators, so that its trainers run on them unchanged.

    with trl_kernels.patched():
        trainer.train()

    trl.kernels    ChunkedLogProbFunction.apply, ChunkedDivergenceFunction.apply, selective_log_softmax_and_entropy
    trl.trainer    utils.selective_log_softmax, utils.selective_log_softmax_and_entropy, utils.entropy_from_logits

Arguments and outputs are those of TRL, with the same shapes, dtypes and gradients. These differences exist:

  * is_top1 is True also where an earlier token has exactly the same logit. TRL's is False there.
  * A target out of range raises on a CPU and gives NaN on a GPU. TRL's kernels return some number.
  * chunk_size is ignored: tiles fit FUSED_LOSSES_WORKSPACE, 256 MiB by default.
  * These raise an error that explains why: weights that ZeRO-3 shards (TRL gathers them once more in backward), a scale
  that
    is not positive, beta outside [0, 1], a second differentiation.

Names that code outside TRL imported before the block still refer to TRL's objects, except the two classes.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..core.inputs import Hidden
from ..core.layout import stats_dtype
from ..core.names import present
from ..engine.planner import workspace_bytes
from ..engine.projection import HiddenSide
from ..engine.sides import HiddenOperand, LowRank
from ..engine.token_stats import token_stats
from . import trl_functions
from .patching import EntryPoints, Patch, check_version

__all__ = ["patch", "patched", "unpatch"]

TESTED = "1.16.0"
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
ROWS, COLUMNS = 4096, 4096  # the size of a tile, for mean logits


def _entry_points() -> EntryPoints:
    """Return TRL's classes with our `apply`, and TRL's functions with ours."""
    check_version("trl", "trl", TESTED)
    utils, kernels = (importlib.import_module(f"trl.{name}") for name in ("trainer.utils", "kernels"))
    divergence = importlib.import_module("trl.kernels.chunked_divergence")
    classes: list[tuple[Any, Callable]] = [
        (kernels.ChunkedLogProbFunction, _chunked_log_probs),
        (divergence.ChunkedDivergenceFunction, _chunked_divergence),
    ]
    functions: list[tuple[Any, Callable]] = [
        (utils.selective_log_softmax, _selective_log_softmax),
        (utils.selective_log_softmax_and_entropy, _selective_log_softmax_and_entropy),
        (utils.entropy_from_logits, _entropy_from_logits),
    ]
    if hasattr(kernels, "selective_log_softmax_and_entropy"):  # where TRL finds Triton
        functions.append((kernels.selective_log_softmax_and_entropy, _kernel_log_softmax_and_entropy))
    return EntryPoints(classes, functions)


_PATCH = Patch("trl", __name__, _entry_points)


def patched() -> AbstractContextManager[None]:
    """Run TRL on our operators inside the block, and restore TRL afterwards, also after an error.

    Blocks may be nested. Raises ImportError where TRL is not installed, or has another version than 1.16.x.
    """
    return _PATCH.block()


def patch() -> None:
    """Start what patched() does, for a notebook; each call needs an unpatch()."""
    _PATCH.start()


def unpatch() -> None:
    """End what patched() does."""
    _PATCH.end()


# ---- from hidden states --------------------------------------------------------------------------------------------------


def _chunked_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = OUTPUTS,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return log-probs, entropy, log sum p^2, mean logit and is_top1, each [N], of hidden [N, H].

    The first two have gradients.
    """
    source = _hidden(hidden, weight, bias, temperature, final_logit_softcapping, logit_scale)
    asked = {name: name in outputs for name in OUTPUTS}
    stats = token_stats(
        source,
        targets,
        entropy=asked["entropy"],
        collision=asked["log_sum_sq_probs"],
        ignore_index=trl_functions.SKIPPED,
        static_shapes=True,
    )
    entropy, collision = (None if x is None else x.float() for x in (stats.entropy, stats.collision))
    mean = mean_logits(source).float() if asked["mean_logits"] else None
    return stats.logps.float(), entropy, collision, mean, stats.correct if asked["is_top1"] else None


def _chunked_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    beta: float,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_final_logit_softcapping: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the divergence [N], with a gradient for the student, and the student's entropy [N], without a gradient."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected a number in [0, 1], got {beta!r}")
    name = "forward_kl" if beta == 0 else "reverse_kl" if beta == 1 else f"js(beta={float(beta)!r})"
    student = _hidden(
        student_hidden, student_weight, student_bias, temperature, student_final_logit_softcapping, student_logit_scale
    )
    wider = teacher_weight.shape[0] > student_weight.shape[0]  # TRL reads as many tokens as the student has
    teacher = _hidden(
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        temperature,
        teacher_final_logit_softcapping,
        teacher_logit_scale,
        valid_vocab=student_weight.shape[0] if wider else None,
        learns=False,
    )
    labels = torch.zeros(len(student_hidden), dtype=torch.long, device=student_hidden.device)
    stats = token_stats(student, labels, teacher, divergence=name, entropy=True, static_shapes=True)
    (divergence,), entropy = stats.divergence.values(), present("entropy", stats.entropy)
    return divergence.float(), entropy.detach().float()


def _hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    scale: float,
    valid_vocab: int | None = None,
    learns: bool = True,
) -> Hidden:
    """Return fl.Hidden of TRL's arguments.

    TRL's logits are  softcap tanh(scale z / softcap) / temperature: it scales before the cap, fl.Hidden after it.
    """
    for name, x in (("weight", weight), ("bias", bias)):
        if hasattr(x, "ds_id"):
            raise NotImplementedError(
                f"{name}: is sharded by ZeRO-3, where the backward would find it scattered again. Train outside "
                "trl_kernels.patched(), or with ZeRO-2 or FSDP2"
            )
    if softcap is not None and scale:
        softcap = softcap / scale
    if not learns:
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return Hidden(hidden, weight, bias, softcap=softcap, scale=scale, temperature=temperature, valid_vocab=valid_vocab)


@torch.no_grad()
def mean_logits(source: Hidden, rows: Tensor | None = None) -> Tensor:
    """Return the mean [N] of each row's logits over the vocabulary.

    rows: the indices of the rows of the states [..., H] to use; None uses all. Without a softcap the mean is the logit of
    the mean of the weight's rows. Whatever is as large as states or weight is cast one piece at a time.
    """
    with torch.autocast(source.hidden.device.type, enabled=False):
        return _mean_logits(source, rows)


def _mean_logits(source: Hidden, rows: Tensor | None) -> Tensor:
    """Compute mean_logits, outside of autocast."""
    states, v, wide = source.hidden.flatten(0, -2), source.vocab, stats_dtype(source.hidden)
    n = len(states) if rows is None else len(rows)
    pieces = states.split(ROWS) if rows is None else (states[piece] for piece in rows.split(ROWS))
    weight, bias = source.weight[:v], None if source.bias is None else source.bias[:v]
    a, b, scaling = source.lora or (None, None, 1.0)
    b = None if b is None else b[:v]
    per_row = states.new_zeros(n, dtype=wide)
    if source.softcap is None:
        mean = torch.stack([piece.sum(0, dtype=wide) for piece in weight.split(COLUMNS)]).sum(0) / v
        if a is not None and b is not None:
            mean = mean + scaling * b.mean(0, dtype=wide) @ a.to(wide)
        for piece, out in zip(pieces, per_row.split(ROWS), strict=True):
            torch.mv(piece.to(wide), mean, out=out)
        return (per_row + (0.0 if bias is None else bias.mean(dtype=wide))) * source.multiplier
    height = min(max(n, 1), ROWS)
    width = min(v, COLUMNS, max(1, workspace_bytes(None) // (height * per_row.element_size())))
    room = per_row.new_empty(height * width)
    low_rank = None if a is None or b is None else LowRank(a, b, scaling)
    for piece, out in zip(pieces, per_row.split(ROWS), strict=True):
        side = HiddenSide(HiddenOperand(piece, weight, bias, low_rank), None)
        for c in range(0, v, width):
            columns = min(width, v - c)
            tile = room[: len(piece) * columns].view(len(piece), columns)
            side.tile(slice(0, len(piece)), slice(c, c + columns), tile)
            out += tile.div_(source.softcap).tanh_().sum(1)
    return per_row * (source.softcap * source.multiplier / v)


# ---- from logits ---------------------------------------------------------------------------------------------------------


def _selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    return _as_trl(trl_functions.selective_log_softmax(logits, index, temperature, row_mask), logits, index, row_mask)


def _selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    outputs = trl_functions.selective_log_softmax_and_entropy(
        logits, index, entropy_requires_grad, temperature, row_mask
    )
    logps, entropy = (_as_trl(x, logits, index, row_mask) for x in outputs)
    return logps, entropy


def _entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    return _as_trl(trl_functions.entropy_from_logits(logits, chunk_size), logits)


def _kernel_log_softmax_and_entropy(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what TRL's kernel inside its function of that name returns: always float32."""
    logps, entropy = trl_functions.selective_log_softmax_and_entropy(logits, index, True, temperature, row_mask)
    return logps.float(), entropy.float()


def _as_trl(stats: Tensor, logits: Tensor, *others: Tensor | None) -> Tensor:
    """Cast to float32 where TRL would run its kernel, and to the dtype of the logits where it would run eager code."""
    utils = sys.modules["trl.trainer.utils"]
    fused = utils.is_triton_available() and utils._supports_trl_loss_kernel(logits, *others)
    return stats.to(torch.float32 if fused else logits.dtype)
