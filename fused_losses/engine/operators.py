"""Register operators, and raise errors for derivatives that they do not have.

A second differentiation raises, and so do derivatives that torch would silently omit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd.forward_ad import unpack_dual
from torch.library import custom_op

from .operator_args import Layout


def operator(name: str, arguments: Layout, returns: Layout | str, mutated: tuple[str, ...] = ()) -> Callable:
    """Return custom_op (torch.library) in the first namespace of the package's name, name_2, ... without this name.

    The name is not free where this package was loaded before in the process: from another folder, in another version, after
    sys.modules lost it, or where a module is reloaded. custom_op would destroy that operator, which graphs and callers use.

    arguments: the layout of its arguments; mutated: the names of those that it writes to. returns: the layout of the tensors
    that it returns, or their type.
    """
    package = __name__.partition(".")[0]  # fused_losses, unless a copy was loaded under another name
    namespaces = chain([package], (f"{package}_{i}" for i in count(2)))
    free = next(space for space in namespaces if not hasattr(getattr(torch.ops, space), name))
    outputs = returns if isinstance(returns, str) else f"({', '.join(slot.form.type for slot in returns.slots)})"
    schema = f"({arguments.schema(*mutated)}) -> {outputs}"
    return custom_op(f"{free}::{name}", mutates_args=mutated, schema=schema)


_PLAIN = (Tensor, torch.nn.Parameter)


def observed(*tensors: Tensor | None) -> bool:
    """Return whether something has to see the operator of a call: a compiler, a tracer, a mode, a class of tensors.

    Where nothing does, a call goes past torch's dispatcher, which takes more time on the host than the launch of a kernel.
    Counters, selective checkpoints and fake tensors are modes, or classes of tensors. Batched gradients (is_grads_batched) are
    neither, and reach a backward alone.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or any(x is not None and (type(x) not in _PLAIN or is_legacy_batchedtensor(x)) for x in tensors)
    )


def needs_graph(*tensors: Tensor | None) -> bool:
    """Return whether the result of a call depends on a tensor that asks for a gradient."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


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
                gradients = backward(ctx, *grads)
            gradients = gradients if isinstance(gradients, tuple) else (gradients,)
            return tuple(x if x is None else _Refuse.apply(name, x, *others) for x in gradients)

        return checked

    return decorate
