"""Define the operators for logits: arguments, shapes (fake), autograd. The computation is in a backend.

fused_losses::token_stats -> token_stats_backward | token_stats_backward_ (gradient in place of the logits)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import backend_module
from ..core.layout import NO_FACTORS, Grads, Outputs, RowFactors, StatsSpec, effective, stats_dtype
from .operator_args import Layout
from .operators import needs_graph, observed, once, once_differentiable, operator
from .stats_outputs import StatsTensors, empty_outputs, spread_out


class TokenStatsArgs(NamedTuple):
    """The arguments of token_stats."""

    policy: Tensor
    labels: Tensor
    ref: Tensor | None
    spec: StatsSpec
    backend: str
    inplace_backward: bool
    factors: RowFactors = NO_FACTORS


class TokenStatsBackwardArgs(NamedTuple):
    """The arguments of token_stats_backward and token_stats_backward_."""

    grads: Grads
    saved: Tensor
    policy: Tensor
    labels: Tensor
    ref: Tensor | None
    spec: StatsSpec
    backend: str
    grad_policy: bool
    grad_ref: bool
    factors: RowFactors = NO_FACTORS


class LogitsGradients(NamedTuple):
    """The gradients at the logits of both sides; None where not wanted."""

    policy: Tensor | None
    ref: Tensor | None


class _Saved(NamedTuple):
    """What the forward saves for backward."""

    args: TokenStatsArgs
    saved: Tensor


STATS = Layout(StatsTensors)
ARGS = Layout(TokenStatsArgs)
BACKWARD_ARGS = Layout(TokenStatsBackwardArgs)
_SAVED = Layout(_Saved)


def _empty(args: TokenStatsArgs) -> Outputs:
    rows = args.policy.numel() // args.policy.shape[-1]
    return empty_outputs(args.spec, args.policy, rows, args.ref is not None, stats_dtype(args.policy))


def _flat(out: Outputs) -> tuple[Tensor, ...]:
    return tuple(STATS.pack(spread_out(out, None, out.logps.numel())))


def _computed(args: TokenStatsArgs) -> Outputs:
    out = _empty(args)
    if out.logps.numel():
        backend_module(args.backend).forward(args.spec, args.policy, args.labels, args.ref, out, args.factors)
    return out


@operator("token_stats", ARGS, STATS)
def token_stats(*values: Any) -> tuple[Tensor, ...]:
    """Compute the statistics. Divergences are [n, rows], the others [rows]."""
    return _flat(_computed(ARGS.unpack(values)))


@token_stats.register_fake
def _(*values: Any) -> tuple[Tensor, ...]:
    return _flat(_empty(ARGS.unpack(values)))


def _write_gradients(args: TokenStatsBackwardArgs, d_policy: Tensor | None, d_ref: Tensor | None) -> None:
    # empty: that output was not asked for
    grads = Grads(*[None if g is None or g.numel() == 0 else g.contiguous() for g in args.grads])
    grads = effective(grads, args.spec.vocab)
    if args.saved.shape[1]:
        backend = backend_module(args.backend)
        both = args.policy, args.labels, args.ref
        backend.backward(args.spec, *both, args.saved, grads, d_policy, d_ref, args.factors)


def _gradients(args: TokenStatsBackwardArgs) -> LogitsGradients:
    d_policy = torch.empty_like(args.policy) if args.grad_policy else None
    d_ref = torch.empty_like(args.ref) if args.ref is not None and args.grad_ref else None
    _write_gradients(args, d_policy, d_ref)
    return LogitsGradients(d_policy, d_ref)


@operator("token_stats_backward", BACKWARD_ARGS, "Tensor[]")
def token_stats_backward(*values: Any) -> list[Tensor]:
    """Return a list of the gradient of the policy logits and that of the reference logits, each where wanted."""
    return [d for d in _gradients(BACKWARD_ARGS.unpack(values)) if d is not None]


@token_stats_backward.register_fake
def _(*values: Any) -> list[Tensor]:
    args = BACKWARD_ARGS.unpack(values)
    wanted = (args.policy, args.grad_policy), (args.ref, args.grad_ref)
    return [torch.empty_like(x) for x, flag in wanted if x is not None and flag]


@operator("token_stats_backward_", BACKWARD_ARGS, "Tensor", mutated=("policy",))
def token_stats_backward_(*values: Any) -> Tensor:
    """Write the policy gradient over the policy logits, and return that of the reference (empty: none).

    All else is as in token_stats_backward. The result is not a list, because torch.compile does not accept a list from an
    operator that writes to its inputs.
    """
    args = BACKWARD_ARGS.unpack(values)
    d_ref = torch.empty_like(args.ref) if args.ref is not None and args.grad_ref else None
    _write_gradients(args, args.policy, d_ref)
    return args.policy.new_empty(0) if d_ref is None else d_ref


@token_stats_backward_.register_fake
def _(*values: Any) -> Tensor:
    args = BACKWARD_ARGS.unpack(values)
    return torch.empty_like(args.ref) if args.ref is not None and args.grad_ref else args.policy.new_empty(0)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    out = STATS.unpack(output)
    _SAVED.save(ctx, _Saved(ARGS.unpack(inputs), out.saved))
    ctx.mark_non_differentiable(out.hit, out.collision, out.saved)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple:
    args, saved = _SAVED.saved(ctx)
    needs = ARGS.named(ctx.needs_input_grad)
    found = _differentiated(args, saved, STATS.named(grads), needs.policy, needs.ref)
    return tuple(ARGS.gradients(policy=found.policy, ref=found.ref))


token_stats.register_autograd(_backward, setup_context=_setup)
once_differentiable(token_stats_backward, "token_stats")


# ---- the same for calls that nothing observes ------------------------------------------------------------------------


def stats(args: TokenStatsArgs) -> Outputs:
    """Compute the statistics of rows, with their graph."""
    if observed(args.policy, args.labels, args.ref):
        found: StatsTensors = STATS.unpack(token_stats(*ARGS.pack(args)))
        return found.asked(args.spec, args.ref is not None)
    if needs_graph(args.policy, args.ref):
        return Outputs(*_TokenStats.apply(args, args.policy, args.ref))
    return _computed(args)


def gradients(args: TokenStatsBackwardArgs) -> LogitsGradients:
    """Compute the gradients at the logits that are wanted."""
    if torch.is_grad_enabled() or observed(args.policy, args.labels, args.ref, args.saved, *args.grads):
        found = iter(token_stats_backward(*BACKWARD_ARGS.pack(args)))
        return LogitsGradients(next(found) if args.grad_policy else None, next(found) if args.grad_ref else None)
    return _gradients(args)


class _TokenStats(torch.autograd.Function):
    """The operator without torch's dispatcher. It takes its arguments, and those again that may ask for a gradient."""

    @staticmethod
    def forward(ctx, args, policy, ref):  # type: ignore[no-untyped-def]
        out = _computed(args)
        # the same tensors as _setup saves: a checkpoint that is only observed in one of its two forwards compares them
        ctx.save_for_backward(policy, args.labels, ref, *args.factors, out.saved)
        ctx.others = args.spec, args.backend, args.inplace_backward
        ctx.mark_non_differentiable(*[x for x in (out.hit, out.collision, out.saved) if x is not None])
        ctx.set_materialize_grads(False)
        return tuple(out)

    @staticmethod
    @once("token_stats")
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        policy, labels, ref, *factors, saved = ctx.saved_tensors
        _, to_policy, to_ref = ctx.needs_input_grad
        args = TokenStatsArgs(policy, labels, ref, *ctx.others)._replace(factors=RowFactors(*factors))
        found = _differentiated(args, saved, Outputs(*grads), to_policy, to_ref)
        return None, found.policy, found.ref


def _differentiated(
    args: TokenStatsArgs, saved: Tensor, grads: Outputs | StatsTensors, to_policy: bool, to_ref: bool
) -> LogitsGradients:
    """Return the gradients at the logits from those at the statistics."""
    inplace = args.inplace_backward and to_policy
    back = TokenStatsBackwardArgs(
        grads=Grads(grads.logps, grads.ref_logps, grads.lse, grads.entropy, grads.divergence),
        saved=saved,
        policy=args.policy.detach() if inplace else args.policy,
        labels=args.labels,
        ref=args.ref,
        spec=args.spec,
        backend=args.backend,
        grad_policy=to_policy,
        grad_ref=to_ref,
        factors=args.factors,
    )
    if inplace:
        d_ref = token_stats_backward_(*BACKWARD_ARGS.pack(back))
        return LogitsGradients(back.policy, d_ref if to_ref else None)
    return gradients(back)
