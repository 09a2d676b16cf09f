"""Put our operators behind Liger-Kernel 0.8's fused heads, so that what calls Liger runs on ours unchanged.

    with liger_kernels.patched():
        trainer.train()

    liger_kernel.ops    LigerFusedLinearCrossEntropyFunction.apply (which LigerForCausalLMLoss and the modules call),
                        LigerFusedLinearScaledCrossEntropyFunction.apply, LigerFusedLinearScaledCrossEntropyTPFunction.apply,
                        LigerFusedLinearJSDFunction.apply

These are the functions that transformers' use_liger_kernel, Axolotl, LLaMA-Factory, ms-swift, verl, VeOmni and prime-rl call.
Arguments and outputs are those of Liger, with the same shapes and gradients. Where Liger needs a GPU, ours run on a CPU too.
These differences exist:

  * A mean over no tokens is 0. Liger's is NaN.
  * Gradients are summed in float32, whatever accum_dtype says. Options that choose Liger's kernels (ce_impl, ce_mode,
    chunk_mem_const, jsd_impl, jsd_mode, m_tiles_per_cluster, tiles_per_reduce) are ignored.
  * These raise an error that explains why: class weights, token scaling beside label smoothing or a z-loss, a second
    differentiation.
  * Predicted token ids are found in a pass of their own: one more product with the head, where they are asked for.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..core.inputs import Hidden
from ..core.names import not_one_of, present
from ..engine.support import logits_at
from ..engine.token_stats import token_stats
from ..engine.topk import topk
from ..losses import cross_entropy_loss, distillation_loss
from .patching import EntryPoints, Patch, check_version

__all__ = ["patch", "patched", "unpatch"]

TESTED = "0.8.5"
REDUCTIONS = ("mean", "sum", "none")


def _entry_points() -> EntryPoints:
    """Return Liger's classes with our `apply`."""
    check_version("liger_kernel", "liger-kernel", TESTED)
    ops = importlib.import_module("liger_kernel.ops")
    return EntryPoints(
        classes=[
            (ops.LigerFusedLinearCrossEntropyFunction, _cross_entropy),
            (ops.LigerFusedLinearScaledCrossEntropyFunction, _scaled_cross_entropy),
            (ops.LigerFusedLinearScaledCrossEntropyTPFunction, _scaled_cross_entropy_tp),
            (ops.LigerFusedLinearJSDFunction, _jsd),
        ]
    )


_PATCH = Patch("liger_kernel", __name__, _entry_points)


def patched() -> AbstractContextManager[None]:
    """Run Liger's fused heads on our operators inside the block, and restore Liger afterwards, also after an error.

    Blocks may be nested. Raises ImportError where liger-kernel is not installed, or has another version than 0.8.x.
    """
    return _PATCH.block()


def patch() -> None:
    """Start what patched() does, for a notebook; each call needs an unpatch()."""
    _PATCH.start()


def unpatch() -> None:
    """End what patched() does."""
    _PATCH.end()


def _cross_entropy(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    *kernels: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the loss, and what else is asked for: z-loss and token accuracy, per token where reduction is "none"; ids.

    The ids are those of the largest logits [tokens], -1 for a token that is ignored.
    """
    if ce_weight is not None:
        raise NotImplementedError(
            "ce_weight: class weights are not computed; outside the block, Liger's own kernel has them"
        )
    if use_token_scaling and (label_smoothing or lse_square_scale):
        raise NotImplementedError("use_token_scaling: is not computed beside label_smoothing or lse_square_scale")
    if reduction not in REDUCTIONS:
        raise not_one_of("reduction", reduction, REDUCTIONS)
    out = cross_entropy_loss(
        Hidden(_input, weight, bias, softcap=softcap),
        target,
        loss_type="dft" if use_token_scaling else "nll",
        label_smoothing=label_smoothing,
        z_loss=lse_square_scale,
        reduction=reduction,
        ignore_index=ignore_index,
    )
    stats = out.stats

    def reduced(x: Tensor, mean: bool) -> Tensor:
        return x if reduction == "none" else x.sum() / stats.mask.sum().clamp(min=1) if mean else x.sum()

    lse, correct = (present(name, x).detach() for name, x in (("lse", stats.lse), ("correct", stats.correct)))
    z_loss = reduced(lse_square_scale * lse.square(), reduction == "mean") if return_z_loss else None
    accuracy = reduced(correct.float(), True) if return_token_accuracy else None
    predicted = _predicted(_input, weight, bias, stats.mask) if return_predicted_tokens else None
    return out.loss, z_loss, accuracy, predicted


def _predicted(_input: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    """Return the ids of the largest logits of the rows that count, -1 for the others."""
    rows = mask.nonzero().squeeze(1)
    ids = topk(Hidden(_input.detach()[rows], weight.detach(), bias), 1).ids.squeeze(-1)
    return torch.full_like(mask, -1, dtype=torch.long).index_copy(0, rows, ids)


def _scaled_cross_entropy(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    ignore_index: int = -100,
    m_tiles_per_cluster: int = 1,
    return_entropy: bool = False,
    selected_token_ids: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Return the negative log-likelihood of each token, its entropy and log-probs [N, K] of selected ids, as asked for."""
    source = Hidden(_input, weight, temperature=temperature)
    return _token_outputs(source, target, ignore_index, return_entropy, selected_token_ids)


def _scaled_cross_entropy_tp(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    tp_group: Any,
    temperature: float = 1.0,
    ignore_index: int = -100,
    tiles_per_reduce: int = 1,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Return the negative log-likelihood of each token and its entropy, if asked for; weight: this rank's rows of the head."""
    source = Hidden(_input, weight, temperature=temperature, process_group=tp_group)
    return _token_outputs(source, target, ignore_index, return_entropy)


def _token_outputs(
    source: Hidden, target: Tensor, ignore_index: int, with_entropy: bool, selected: Tensor | None = None
) -> Tensor | tuple[Tensor, ...]:
    """Return the negative log-likelihood of each token, and its entropy and the log-probs of selected ids if asked for."""
    stats = token_stats(source, target, entropy=with_entropy, ignore_index=ignore_index)
    outputs = [-stats.logps, *([present("entropy", stats.entropy)] if with_entropy else [])]
    if selected is not None:
        ids = selected.expand(len(target), -1).masked_fill(~stats.mask.unsqueeze(-1), -1)
        outputs.append(logits_at(source, ids) - present("lse", stats.lse).unsqueeze(-1))
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    shift_labels: Tensor | None = None,
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    *kernels: Any,
) -> Tensor:
    """Return the mean of the generalised Jensen-Shannon divergence over the tokens that count."""
    count = len(student_input)
    labels = torch.zeros(count, dtype=torch.long, device=student_input.device) if shift_labels is None else shift_labels
    student = Hidden(student_input, student_weight, temperature=temperature)
    teacher = Hidden(teacher_input.detach(), teacher_weight.detach(), temperature=temperature)
    return distillation_loss(student, labels, teacher, beta=jsd_beta, ignore_index=ignore_index).loss
