"""An output_processor for Megatron-core's GPTModel: losses from hidden states and this rank's rows of the head.

    from fused_losses.integrations import megatron

    losses = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask,
                   output_processor=megatron.output_processor())

GPTModel.forward calls `output_processor` in place of its head, and returns what it returns. Without a loss, that is what
Megatron's own cross entropy gives, a number for each token [B, S], and no logits exist. With one, it is what the loss returns:

    def dpo(policy, batch):
        return fl.dpo_loss(policy, batch.labels, fl.LogProbs(batch.context), shift=False).loss

    model(..., output_processor=megatron.output_processor(dpo), output_processor_context=ref_logps)

The vocabulary may be split (tensor parallel), and sequences too (sequence parallel). Embeddings may be shared, and logits
scaled (muP). Megatron adds a head's .grad to its main_grad, as for every parameter. These differences exist:

  * Losses of multi-token prediction are computed by Megatron before the hook, from logits.
  * Tokens whose loss_mask is 0 have the label -100, and the loss 0.
  * Inference raises an error. So does a loss mask of other numbers than 0 and 1.

This module imports nothing from Megatron. Tested with 0.19.2, where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.inputs import Hidden
from ..engine.token_stats import token_stats

__all__ = ["MicroBatch", "output_processor", "token_losses"]

IGNORED = -100


class MicroBatch(NamedTuple):
    """What a loss is given beside the policy.

    Attributes:
        labels: [B, S], the next tokens already, so that losses take shift=False; -100 where loss_mask is 0. Packed [total].
        cu_seqlens: The offsets of packed sequences, or None.
        context: The output_processor_context of the forward.
    """

    labels: Tensor
    cu_seqlens: Tensor | None
    context: Any


def token_losses(policy: Hidden, batch: MicroBatch) -> Tensor:
    """Return the negative log-likelihood of each token [B, S], as GPTModel does; 0 where loss_mask is 0."""
    losses = -token_stats(policy, batch.labels, shift=False).logps
    return losses if batch.cu_seqlens is None else losses.unsqueeze(0)


def output_processor(loss: Callable[[Hidden, MicroBatch], Any] = token_losses) -> Callable[..., Any]:
    """Return an output_processor for GPTModel.forward that calls loss(policy, batch).

    Args:
        loss: A function of the policy, a fl.Hidden with states [B, S, H] (packed: [total, H]), and a MicroBatch.

    Raises:
        ValueError: If the forward has no labels, or is one of inference.
    """

    def process(  # noqa: PLR0913 (Megatron's own keywords)
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        labels: Tensor | None,
        loss_mask: Tensor | None,
        packed_seq_params: Any = None,
        inference_context: Any = None,
        context: Any = None,
        scale_logits: Callable[[Tensor], Tensor] | None = None,
        **_: Any,
    ) -> Any:
        if inference_context is not None:
            raise ValueError(
                "inference_context: an output_processor for losses expected None; leave it out of inference"
            )
        if labels is None:
            raise ValueError("labels: expected token ids [B, S], got None")
        group = output_layer.tp_group
        group = None if group is None or dist.get_world_size(group) == 1 else group
        if group is not None and output_layer.sequence_parallel:
            hidden_states = _GatherSequence.apply(hidden_states, group)
        packed = packed_seq_params is not None
        policy = Hidden(
            hidden_states.squeeze(1) if packed else hidden_states.transpose(0, 1),
            output_layer.weight if output_weight is None else output_weight,
            None if output_layer.bias is None else output_layer.bias,
            scale=1.0 if scale_logits is None else float(scale_logits(torch.ones(()))),
            process_group=group,
        )
        labels = labels if loss_mask is None else _masked(labels, loss_mask)
        cu_seqlens = packed_seq_params.cu_seqlens_q if packed else None
        return loss(policy, MicroBatch(labels.squeeze(0) if packed else labels, cu_seqlens, context))

    return process


def _masked(labels: Tensor, loss_mask: Tensor) -> Tensor:
    """Return the labels with -100 where the mask is 0."""
    if loss_mask.is_cpu and not ((loss_mask == 0) | (loss_mask == 1)).all():
        raise ValueError("loss_mask: expected 0 and 1; multiply the returned losses by other weights")
    return labels.masked_fill(loss_mask.view(labels.shape) == 0, IGNORED)


class _GatherSequence(torch.autograd.Function):
    """The states [S, B, H] of all ranks from those of this rank [S / ranks, B, H].

    Every rank then has the whole gradient, since the loss sums it over the ranks of the head, and keeps its own part.
    """

    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def]
        ctx.group, ctx.length = group, len(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        first = dist.get_rank(ctx.group) * ctx.length
        return g[first : first + ctx.length], None
