"""Select adapters of a PEFT model by name, for a while, to use them as references.

This module does not import peft; it only reads the attributes of its objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

__all__ = ["adapter_owner", "adapter_tensors", "as_adapter", "check_adapter"]


def adapter_owner(model: nn.Module) -> Any:
    """Return the PeftModel in a model, or None where there is none."""
    return next((m for m in model.modules() if callable(getattr(m, "disable_adapter", None))), None)


def check_adapter(argument: str, model: nn.Module, name: str) -> Any:
    """Return the PeftModel that has an adapter of this name, or raise ValueError where there is none."""
    owner = adapter_owner(model)
    names = list(getattr(owner, "peft_config", {}))
    if owner is None or name not in names:
        has = f"the model has {', '.join(map(repr, names))}" if names else "the model has no adapters"
        raise ValueError(f"{argument}: expected the name of an adapter, got {name!r}; {has}")
    return owner


@contextmanager
def as_adapter(owner: Any, name: str | None) -> Iterator[None]:
    """Set a PeftModel to this adapter alone, inside the context; with None, to no adapter.

    Afterwards the active adapters are restored, and so are the requires_grad flags, which peft changes with the adapter.
    owner is None for a model without adapters.
    """
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
    """Yield path and tensor of each parameter and buffer of one adapter.

    peft's layers store them under the adapter's name, which is left out of the paths.
    """
    for path, module in owner.named_modules():
        by_name: Any = module
        if not hasattr(module, "keys") or name not in by_name:  # peft has ModuleDict, ParameterDict and a BufferDict
            continue
        stored = by_name[name]
        if isinstance(stored, Tensor):
            yield path, stored
        else:
            tensors = (*stored.named_parameters(), *stored.named_buffers())
            yield from ((f"{path}.{inner}", x) for inner, x in tensors)
