"""Define the operators for losses of pairs that are functions of the margin: arguments, shapes (fake), autograd.

fused_losses::pair_loss -> pair_loss_backward
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import backend_module
from ..core.layout import PairGrads, PairLossSpec, PairOutputs, stats_dtype
from .operator_args import Layout
from .operators import once_differentiable, operator


class PairLossArgs(NamedTuple):
    """The arguments of pair_loss."""

    logps: Tensor
    ref_logps: Tensor | None
    mask: Tensor
    cu_seqlens: Tensor | None
    spec: PairLossSpec
    backend: str


class PairLossBackwardArgs(NamedTuple):
    """The arguments of pair_loss_backward."""

    grad_losses: Tensor | None
    grad_logps: Tensor | None
    grad_ref_logps: Tensor | None
    coef: Tensor
    call: PairLossArgs
    to_logps: bool  # which gradients are wanted
    to_ref_logps: bool


class _Saved(NamedTuple):
    """What the forward saves for backward."""

    args: PairLossArgs
    coef: Tensor


ARGS = Layout(PairLossArgs)
LOSSES = Layout(PairOutputs)
BACKWARD_ARGS = Layout(PairLossBackwardArgs)
_SAVED = Layout(_Saved)


def _empty(args: PairLossArgs) -> PairOutputs:
    def new(count: int) -> Tensor:
        return args.logps.new_empty(count, dtype=stats_dtype(args.logps))

    n = args.spec.sequences
    return PairOutputs(new(n // 2), new(n), new(n), new(n))


def _contiguous(x: Tensor | None) -> Tensor | None:
    """Return a contiguous tensor. These hold per-token numbers, which are small compared with the logits."""
    return None if x is None else x.contiguous()


@operator("pair_loss", ARGS, LOSSES)
def pair_loss(*values: Any) -> tuple[Tensor, ...]:
    """Compute losses [B], sequence log-probs of policy and reference [2B], and dloss/dh [2B] for backward."""
    args = ARGS.unpack(values)
    out = _empty(args)
    if args.spec.sequences:
        ref_logps, cu_seqlens = _contiguous(args.ref_logps), _contiguous(args.cu_seqlens)
        backend = backend_module(args.backend)
        backend.pair_forward(args.spec, args.logps.contiguous(), ref_logps, args.mask.contiguous(), cu_seqlens, out)
    return tuple(LOSSES.pack(out))


@pair_loss.register_fake
def _(*values: Any) -> tuple[Tensor, ...]:
    return tuple(LOSSES.pack(_empty(ARGS.unpack(values))))


@operator("pair_loss_backward", BACKWARD_ARGS, "Tensor[]")
def pair_loss_backward(*values: Any) -> list[Tensor]:
    """Return a list of the gradient of the log-probs and that of the reference's, each where wanted."""
    args = BACKWARD_ARGS.unpack(values)
    call = args.call
    # zeros where tokens may lie outside every packed sequence
    make = torch.empty if call.cu_seqlens is None else torch.zeros

    def new(x: Tensor | None, wanted: bool) -> Tensor | None:
        return make(x.shape, dtype=x.dtype, device=x.device) if x is not None and wanted else None

    d_logps, d_ref = new(call.logps, args.to_logps), new(call.ref_logps, args.to_ref_logps)
    if call.spec.sequences:
        grads = PairGrads(*[_contiguous(g) for g in (args.grad_losses, args.grad_logps, args.grad_ref_logps)])
        mask, cu_seqlens = call.mask.contiguous(), _contiguous(call.cu_seqlens)
        backend = backend_module(call.backend)
        backend.pair_backward(call.spec, grads, args.coef, mask, cu_seqlens, d_logps, d_ref)
    return [d for d in (d_logps, d_ref) if d is not None]


@pair_loss_backward.register_fake
def _(*values: Any) -> list[Tensor]:
    args = BACKWARD_ARGS.unpack(values)
    wanted = (args.call.logps, args.to_logps), (args.call.ref_logps, args.to_ref_logps)
    return [x.new_empty(x.shape) for x, flag in wanted if x is not None and flag]


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    out = LOSSES.unpack(output)
    _SAVED.save(ctx, _Saved(ARGS.unpack(inputs), out.coef))
    ctx.mark_non_differentiable(out.coef)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple:
    args, coef = _SAVED.saved(ctx)
    grad_outputs, needs = LOSSES.named(grads), ARGS.named(ctx.needs_input_grad)
    back = PairLossBackwardArgs(
        grad_losses=grad_outputs.losses,
        grad_logps=grad_outputs.seq_logps,
        grad_ref_logps=grad_outputs.seq_ref,
        coef=coef,
        call=args,
        to_logps=needs.logps,
        to_ref_logps=needs.ref_logps,
    )
    gradients = iter(pair_loss_backward(*BACKWARD_ARGS.pack(back)))
    d_logps = next(gradients) if needs.logps else None
    return tuple(ARGS.gradients(logps=d_logps, ref_logps=next(gradients) if needs.ref_logps else None))


pair_loss.register_autograd(_backward, setup_context=_setup)
once_differentiable(pair_loss_backward, "preference_loss")
