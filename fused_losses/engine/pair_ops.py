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
from .operators import needs_graph, observed, once, once_differentiable, operator


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


class LogProbGradients(NamedTuple):
    """The gradients at the log-probs of both sides; None where not wanted."""

    logps: Tensor | None
    ref_logps: Tensor | None


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


def _computed(args: PairLossArgs) -> PairOutputs:
    out = _empty(args)
    if args.spec.sequences:
        ref_logps, cu_seqlens = _contiguous(args.ref_logps), _contiguous(args.cu_seqlens)
        backend = backend_module(args.backend)
        backend.pair_forward(args.spec, args.logps.contiguous(), ref_logps, args.mask.contiguous(), cu_seqlens, out)
    return out


@operator("pair_loss", ARGS, LOSSES)
def pair_loss(*values: Any) -> tuple[Tensor, ...]:
    """Compute losses [B], sequence log-probs of policy and reference [2B], and dloss/dh [2B] for backward."""
    return tuple(_computed(ARGS.unpack(values)))


@pair_loss.register_fake
def _(*values: Any) -> tuple[Tensor, ...]:
    return tuple(LOSSES.pack(_empty(ARGS.unpack(values))))


def _gradients(args: PairLossBackwardArgs) -> LogProbGradients:
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
    return LogProbGradients(d_logps, d_ref)


@operator("pair_loss_backward", BACKWARD_ARGS, "Tensor[]")
def pair_loss_backward(*values: Any) -> list[Tensor]:
    """Return a list of the gradient of the log-probs and that of the reference's, each where wanted."""
    return [d for d in _gradients(BACKWARD_ARGS.unpack(values)) if d is not None]


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
    needs = ARGS.named(ctx.needs_input_grad)
    found = _differentiated(args, coef, LOSSES.named(grads), needs.logps, needs.ref_logps)
    return tuple(ARGS.gradients(logps=found.logps, ref_logps=found.ref_logps))


pair_loss.register_autograd(_backward, setup_context=_setup)
once_differentiable(pair_loss_backward, "preference_loss")


# ---- the same for calls that nothing observes ------------------------------------------------------------------------


def losses(args: PairLossArgs) -> PairOutputs:
    """Compute the losses of pairs, with their graph."""
    if observed(args.logps, args.ref_logps, args.mask, args.cu_seqlens):
        return LOSSES.unpack(pair_loss(*ARGS.pack(args)))
    if needs_graph(args.logps, args.ref_logps):
        return PairOutputs(*_PairLoss.apply(args, args.logps, args.ref_logps))
    return _computed(args)


class _PairLoss(torch.autograd.Function):
    """The operator without torch's dispatcher. It takes its arguments, and those again that may ask for a gradient."""

    @staticmethod
    def forward(ctx, args, logps, ref_logps):  # type: ignore[no-untyped-def]
        out = _computed(args)
        # the same tensors as _setup saves: a checkpoint that is only observed in one of its two forwards compares them
        ctx.save_for_backward(logps, ref_logps, args.mask, args.cu_seqlens, out.coef)
        ctx.others = args.spec, args.backend
        ctx.mark_non_differentiable(out.coef)
        ctx.set_materialize_grads(False)
        return tuple(out)

    @staticmethod
    @once("preference_loss")
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        *tensors, coef = ctx.saved_tensors
        _, to_logps, to_ref_logps = ctx.needs_input_grad
        args = PairLossArgs(*tensors, *ctx.others)
        found = _differentiated(args, coef, PairOutputs(*grads), to_logps, to_ref_logps)
        return None, found.logps, found.ref_logps


def _differentiated(
    args: PairLossArgs, coef: Tensor, grads: PairOutputs, to_logps: bool, to_ref_logps: bool
) -> LogProbGradients:
    """Return the gradients at the log-probs from those at the losses and at the sums of the sequences."""
    back = PairLossBackwardArgs(
        grad_losses=grads.losses,
        grad_logps=grads.seq_logps,
        grad_ref_logps=grads.seq_ref,
        coef=coef,
        call=args,
        to_logps=to_logps,
        to_ref_logps=to_ref_logps,
    )
    if torch.is_grad_enabled() or observed(*grads, args.logps, args.ref_logps, args.mask, args.cu_seqlens, coef):
        found = iter(pair_loss_backward(*BACKWARD_ARGS.pack(back)))
        return LogProbGradients(next(found) if to_logps else None, next(found) if to_ref_logps else None)
    return _gradients(back)
