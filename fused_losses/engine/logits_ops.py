"""Define the operators that torch sees: schema, shapes (fake), autograd. No other layer handles dispatch.

    fused_losses::token_stats            -> token_stats_backward | token_stats_backward_ (gradient in place of the logits)
    fused_losses::pair_loss              -> pair_loss_backward

Operators take divergences and losses by name. A second differentiation raises, and so do derivatives that torch would
silently omit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.library import custom_op

from ..backends import backend_module
from ..core import divergences as registry
from ..core.layout import (
    Grads,
    Outputs,
    PairGrads,
    PairOutputs,
    PairProblem,
    Problem,
    effective,
    saved_rows,
    stats_dtype,
)
from ..core.margin_losses import TERMS


def operator(name: str, schema: str, mutates_args: tuple[str, ...] = ()) -> Callable:
    """Return custom_op (torch.library) in the first namespace of fused_losses, fused_losses_2, ... without this name.

    The name is not free where this package was loaded before in the process: from another folder, in another version, after
    sys.modules lost it, or where a module is reloaded. custom_op would destroy that operator, which graphs and callers use.
    """
    namespaces = chain(["fused_losses"], (f"fused_losses_{i}" for i in count(2)))
    free = next(space for space in namespaces if not hasattr(getattr(torch.ops, space), name))
    return custom_op(f"{free}::{name}", mutates_args=mutates_args, schema=schema)


def check_plain(name: str, *tensors: Tensor | None) -> None:
    """Raise under torch.func, and for tensors with forward-mode derivatives.

    Through the operators, forward-mode derivatives would be zero.
    """
    what = "those of torch.func (grad, vjp, jvp, vmap, ...)" if torch._C._are_functorch_transforms_active() else ""
    if any(x is not None and unpack_dual(x).tangent is not None for x in tensors):
        what = what or "forward-mode derivatives"
    if what:
        raise RuntimeError(
            f"fused_losses.{name}: expected plain tensors, got {what}: use backward() or torch.autograd.grad, or "
            "fused_losses.reference, which goes with all of them"
        )


# These arguments describe the problem in every operator below, in the order of layout.Problem.
_PROBLEM = (
    "str divergences, bool entropy, bool collision, bool shift, int ignore_index, int vocab, "
    "float softcap, float multiplier, float ref_softcap, float ref_multiplier, str backend"
)


def _problem(divergences: str, *rest) -> tuple[Problem, str]:  # type: ignore[no-untyped-def]
    bound = tuple(registry.from_key(key) for key in divergences.split(";") if key)
    return Problem(bound, *rest[:-1]), rest[-1]


def _allocate(policy: Tensor, ref: Tensor | None, problem: Problem) -> list[Tensor]:
    rows = policy.numel() // policy.shape[-1]
    n = len(problem.divergences)

    def new(*shape: int) -> Tensor:
        return policy.new_empty(shape, dtype=stats_dtype(policy))

    return [
        new(rows),
        new(rows if ref is not None else 0),
        new(rows),
        new(rows if problem.entropy else 0),
        new(n, rows),
        policy.new_empty(rows, dtype=torch.bool),
        new(rows if problem.collision else 0),
        new(saved_rows(n), rows),
    ]


@operator(
    "token_stats",
    f"(Tensor policy, Tensor labels, Tensor? ref, {_PROBLEM}, bool inplace_backward) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
def token_stats(policy, labels, ref, *rest):  # type: ignore[no-untyped-def]
    """Compute logps, ref_logps, lse, entropy, divergences, argmax hit, collision, and what backward needs.

    Divergences are [n, rows], the other statistics [rows].
    """
    problem, backend = _problem(*rest[:-1])
    out = _allocate(policy, ref, problem)
    if out[0].numel():
        logps, ref_logps, lse, entropy, div, hit, collision, saved = out
        wanted = Outputs(
            logps, ref_logps if ref is not None else None, lse, entropy if problem.entropy else None,
            div if len(div) else None, hit, collision if problem.collision else None, saved,
        )  # fmt: skip
        backend_module(backend).forward(problem, policy, labels, ref, wanted)
    return tuple(out)


@token_stats.register_fake
def _(policy, labels, ref, *rest):  # type: ignore[no-untyped-def]
    return tuple(_allocate(policy, ref, _problem(*rest[:-1])[0]))


_GRADS = "Tensor? g_logps, Tensor? g_ref_logps, Tensor? g_lse, Tensor? g_entropy, Tensor? g_div, Tensor saved"


def _run_backward(grads, saved, policy, labels, ref, problem, backend, dz, dw):  # type: ignore[no-untyped-def]
    grads = Grads(*(None if g is None or g.numel() == 0 else g.contiguous() for g in grads))  # empty: no output here
    grads = effective(grads, problem.vocab)
    if saved.shape[1]:
        backend_module(backend).backward(problem, policy, labels, ref, saved, grads, dz, dw)


@operator(
    "token_stats_backward",
    f"({_GRADS}, Tensor policy, Tensor labels, Tensor? ref, {_PROBLEM}, bool to_policy, bool to_ref) -> Tensor[]",
)  # fmt: skip
def token_stats_backward(*args):  # type: ignore[no-untyped-def]
    """Return a list of the gradient of the policy logits and that of the reference logits, each where wanted."""
    grads, (saved, policy, labels, ref), rest = args[:5], args[5:9], args[9:]
    (problem, backend), (to_policy, to_ref) = _problem(*rest[:-2]), rest[-2:]
    dz = torch.empty_like(policy) if to_policy else None
    dw = torch.empty_like(ref) if to_ref else None
    _run_backward(grads, saved, policy, labels, ref, problem, backend, dz, dw)
    return [d for d in (dz, dw) if d is not None]


@token_stats_backward.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    policy, ref, (to_policy, to_ref) = args[6], args[8], args[-2:]
    return [torch.empty_like(x) for x, wanted in ((policy, to_policy), (ref, to_ref)) if wanted]


@operator(
    "token_stats_backward_",
    f"({_GRADS}, Tensor(a!) policy, Tensor labels, Tensor? ref, {_PROBLEM}, bool to_policy, bool to_ref) -> Tensor",
    mutates_args=("policy",),
)  # fmt: skip
def token_stats_backward_(*args):  # type: ignore[no-untyped-def]
    """Write the policy gradient over the policy logits, and return that of the reference (empty: none).

    All else is as in token_stats_backward. The result is not a list, because torch.compile does not accept a list from an
    operator that writes to its inputs.
    """
    grads, (saved, policy, labels, ref), rest = args[:5], args[5:9], args[9:]
    (problem, backend), (_, to_ref) = _problem(*rest[:-2]), rest[-2:]
    dw = torch.empty_like(ref) if to_ref else None
    _run_backward(grads, saved, policy, labels, ref, problem, backend, policy, dw)
    return policy.new_empty(0) if dw is None else dw


@token_stats_backward_.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    return torch.empty_like(args[8]) if args[-1] else args[6].new_empty(0)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    policy, labels, ref, *ctx.problem, ctx.inplace = inputs
    ctx.save_for_backward(policy, labels, ref, output[-1])
    ctx.mark_non_differentiable(*output[-3:])
    ctx.set_materialize_grads(False)


def _backward(ctx, *grads):  # type: ignore[no-untyped-def]
    policy, labels, ref, saved = ctx.saved_tensors
    to_policy, to_ref = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    inplace = ctx.inplace and to_policy
    policy = policy.detach() if inplace else policy
    given = *grads[:5], saved, policy, labels, ref, *ctx.problem, to_policy, to_ref
    found = [policy, token_stats_backward_(*given)] if inplace else list(token_stats_backward(*given))
    dz = found.pop(0) if to_policy else None
    return dz, None, found.pop() if to_ref else None, *[None] * (len(ctx.problem) + 1)


token_stats.register_autograd(_backward, setup_context=_setup)


def _again(name: str) -> RuntimeError:
    return RuntimeError(f"fused_losses.{name} can be differentiated once; use fused_losses.reference for more")


def once_differentiable(op, name: str) -> None:  # type: ignore[no-untyped-def]
    """Make a second derivative raise a clear error, instead of torch's message about a missing formula."""

    def refuse(ctx, *grads):  # type: ignore[no-untyped-def]
        raise _again(name)

    op.register_autograd(refuse)


class _Refuse(torch.autograd.Function):
    """Return a gradient that depends on other tensors. To differentiate it with respect to them raises."""

    @staticmethod
    def forward(ctx, name, gradient, *others):  # type: ignore[no-untyped-def]
        ctx.name = name
        return gradient

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        raise _again(ctx.name)


def once(name: str) -> Callable[[Callable], Callable]:
    """Return a decorator for the backward of an autograd.Function that makes a second derivative raise.

    The Function must save its inputs. (torch's own once_differentiable adds nothing to the graph: a second derivative with
    respect to given tensors is None, which torch.autograd.functional treats as zero.)
    """

    def decorate(backward: Callable) -> Callable:
        @wraps(backward)
        def checked(ctx: Any, *grads: Tensor | None) -> Any:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            others = [x for x in (*ctx.saved_tensors, *grads) if x is not None and x.requires_grad]
            with torch.no_grad():
                found = backward(ctx, *grads)
            found = found if isinstance(found, tuple) else (found,)
            return tuple(x if x is None else _Refuse.apply(name, x, *others) for x in found)

        return checked

    return decorate


once_differentiable(token_stats_backward, "token_stats")

# ---- pairs ---------------------------------------------------------------------------------------------------------

_PAIR = "str term, float[] term_params, str divergence, float beta, SymInt sequences, bool ref_summed, str backend"


def pair_problem(term, term_params, divergence, beta, sequences, ref_summed, backend):  # type: ignore[no-untyped-def]
    link = registry.from_key(divergence)
    return PairProblem(link, TERMS[term], tuple(term_params), beta, sequences, ref_summed), backend


def _allocate_pairs(logps: Tensor, sequences: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = (sequences // 2, sequences, sequences, sequences)
    new = [logps.new_empty(n, dtype=stats_dtype(logps)) for n in sizes]
    return new[0], new[1], new[2], new[3]


def _contiguous(*tensors: Any) -> list[Any]:
    """Return contiguous tensors, None as None. They hold per-token numbers, which are small compared with the logits."""
    return [None if x is None else x.contiguous() for x in tensors]


@operator(
    "pair_loss",
    f"(Tensor logps, Tensor? ref_logps, Tensor mask, Tensor? cu_seqlens, {_PAIR}) -> (Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
def pair_loss(logps, ref_logps, mask, cu_seqlens, *rest):  # type: ignore[no-untyped-def]
    """Compute losses [B], sequence log-probs of policy and reference [2B], and dloss/dh [2B] for backward."""
    problem, backend = pair_problem(*rest)
    out = _allocate_pairs(logps, problem.sequences)
    if problem.sequences:
        logps, ref_logps, mask, cu_seqlens = _contiguous(logps, ref_logps, mask, cu_seqlens)
        backend_module(backend).pair_forward(problem, logps, ref_logps, mask, cu_seqlens, PairOutputs(*out))
    return out


@pair_loss.register_fake
def _(logps, ref_logps, mask, cu_seqlens, *rest):  # type: ignore[no-untyped-def]
    return _allocate_pairs(logps, rest[4])


@operator(
    "pair_loss_backward",
    "(Tensor? g_losses, Tensor? g_logps, Tensor? g_ref, Tensor coef, Tensor logps, Tensor? ref_logps, Tensor mask, "
    f"Tensor? cu_seqlens, {_PAIR}, bool to_policy, bool to_ref) -> Tensor[]",
)  # fmt: skip
def pair_loss_backward(*args):  # type: ignore[no-untyped-def]
    grads, (coef, logps, ref_logps, mask, cu_seqlens), rest = args[:3], args[3:8], args[8:]
    (problem, backend), (to_policy, to_ref) = pair_problem(*rest[:-2]), rest[-2:]
    # zeros where tokens may lie outside every packed sequence
    make = torch.empty if cu_seqlens is None else torch.zeros
    d_logps = make(logps.shape, dtype=logps.dtype, device=logps.device) if to_policy else None
    d_ref = make(ref_logps.shape, dtype=ref_logps.dtype, device=logps.device) if to_ref else None
    if problem.sequences:
        grads, (mask, cu_seqlens) = PairGrads(*_contiguous(*grads)), _contiguous(mask, cu_seqlens)
        backend_module(backend).pair_backward(problem, grads, coef, mask, cu_seqlens, d_logps, d_ref)
    return [d for d in (d_logps, d_ref) if d is not None]


@pair_loss_backward.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    return [x.new_empty(x.shape) for x, wanted in ((args[4], args[-2]), (args[5], args[-1])) if wanted]


def _pair_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    logps, ref_logps, mask, cu_seqlens, *ctx.problem = inputs
    ctx.save_for_backward(output[-1], logps, ref_logps, mask, cu_seqlens)
    ctx.mark_non_differentiable(output[-1])
    ctx.set_materialize_grads(False)


def _pair_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    found = list(pair_loss_backward(*grads[:3], *ctx.saved_tensors, *ctx.problem, *wanted))
    d_logps = found.pop(0) if wanted[0] else None
    return d_logps, found.pop() if wanted[1] else None, None, None, *[None] * len(ctx.problem)


pair_loss.register_autograd(_pair_backward, setup_context=_pair_setup)
once_differentiable(pair_loss_backward, "preference_loss")
