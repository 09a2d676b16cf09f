"""Adapters of a PEFT model as references: by name, for a while. Duck-typed: peft is not imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

__all__ = ["adapter_owner", "adapter_tensors", "as_adapter", "check_adapter"]


def adapter_owner(model: nn.Module) -> Any:
    """The PeftModel in a model; None where there is none."""
    return next((m for m in model.modules() if callable(getattr(m, "disable_adapter", None))), None)


def check_adapter(argument: str, model: nn.Module, name: str) -> Any:
    """The PeftModel that has an adapter of this name; raises where there is none."""
    owner = adapter_owner(model)
    names = list(getattr(owner, "peft_config", {}))
    if owner is None or name not in names:
        has = f"the model has {', '.join(map(repr, names))}" if names else "the model has no adapters"
        raise ValueError(f"{argument}: expected the name of an adapter, got {name!r}; {has}")
    return owner


@contextmanager
def as_adapter(owner: Any, name: str | None) -> Iterator[None]:
    """A PeftModel on this adapter alone; None: on none. Left as it was, and so is what requires a gradient, which peft changes
    with the adapter. owner: None of a model without adapters."""
    if name is None:
        with nullcontext() if owner is None else owner.disable_adapter():
            yield
        return
    one, several = owner.active_adapter, list(owner.active_adapters)
    learns = [(p, p.requires_grad) for p in owner.parameters()]
    owner.set_adapter(name)
    try:
        yield
    finally:
        owner.set_adapter(one)
        if several != [one]:
            owner.base_model.set_adapter(several)
        for p, flag in learns:
            p.requires_grad_(flag)


def adapter_tensors(owner: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of one adapter, which peft's layers keep under its name; that is left out of theirs."""
    for path, module in owner.named_modules():
        by_name: Any = module
        if not hasattr(module, "keys") or name not in by_name:  # peft has ModuleDict, ParameterDict and a BufferDict
            continue
        found = by_name[name]
        if isinstance(found, Tensor):
            yield path, found
        else:
            tensors = (*found.named_parameters(), *found.named_buffers())
            yield from ((f"{path}.{inner}", x) for inner, x in tensors)
