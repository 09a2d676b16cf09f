"""Inspect a head's layers: the linear layer inside it, the adapter around it, and the hooks on either.

A loss reads the weights of these layers and does not call them. Everything else that a layer does besides its product is
either applied or refused here. This module imports neither transformers nor peft; it only reads the attributes of their
objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..core.inputs import FLOATS

# Packages whose hooks gather, move or watch tensors, and do not change logits.
ENGINES = ("accelerate", "deepspeed", "fused_losses", "torch.distributed", "torch.nn.parallel", "torch.utils", "trl")
HOOKS = {  # attributes for one module; for all modules
    "forward pre-hook": ("_forward_pre_hooks", "_global_forward_pre_hooks"),
    "forward hook": ("_forward_hooks", "_global_forward_hooks"),
    "backward pre-hook": ("_backward_pre_hooks", "_global_backward_pre_hooks"),
    "backward hook": ("_backward_hooks", "_global_backward_hooks"),
}

# A patched nn.Linear.forward is defined in another file.
_LINEAR_FILE = nn.Linear.reset_parameters.__code__.co_filename


def linear_of(head: nn.Module, name: str, adapter: bool, whole: bool = True, split: bool = False) -> nn.Linear:
    """Return the dense linear layer inside a head, or raise an error where there is none.

    whole: the weights must be complete and on this rank now. split: the same, but other ranks may hold some of the
    vocabulary's rows.
    """
    layer: Any = head
    if hasattr(layer, "modules_to_save"):  # peft trains a copy
        layer = layer.modules_to_save[layer.active_adapters[0]] if adapter else layer.original_module
    layer = getattr(layer, "base_layer", layer)
    weight, kind = getattr(layer, "weight", None), type(layer).__name__
    sharded = hasattr(weight, "placements")
    packed = hasattr(weight, "__tensor_flatten__") and not sharded  # it claims a float dtype, but stores other tensors
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATS or packed or "4bit" in kind or "8bit" in kind:
        stored_as = type(weight).__name__ if packed else getattr(weight, "dtype", None)
        what = f"a weight of {stored_as}" if isinstance(weight, Tensor) else "no weight"
        raise TypeError(
            f"{name}: {kind} has {what}; expected a dense weight [V, H] of float32, float16, bfloat16 or float64. If it is "
            "quantised, leave the head out (bitsandbytes: llm_int8_skip_modules; GPTQ, AWQ: modules_to_not_convert)"
        )
    if whole and sharded and not split:
        raise TypeError(f"{name}: its weight is a DTensor; make the FusedHead before fully_shard or tensor parallelism")
    forward = getattr(type(layer).forward, "__code__", None)
    if not isinstance(layer, nn.Linear) or forward is None or forward.co_filename != _LINEAR_FILE:
        raise TypeError(f"{name}: expected nn.Linear or LoRA on one, got {kind}, whose forward may do something else")
    if whole and ((type(weight) is not nn.Parameter and not sharded) or "weight" not in layer._parameters):
        raise TypeError(f"{name}: expected a weight that is a plain nn.Parameter, got {type(weight).__name__}")
    rows = weight.shape[:1] if split else (layer.out_features,)
    if whole and not hasattr(weight, "ds_id") and weight.shape != (*rows, layer.in_features):  # ZeRO-3 fills it
        raise ValueError(
            f"{name}: expected weight {[layer.out_features, layer.in_features]}, got {list(weight.shape)}: it is sharded or "
            "tensor-parallel; make the FusedHead before the model is sharded"
        )
    if adapter and hasattr(head, "base_layer") and not (hasattr(head, "lora_A") and type(head).__name__ == "Linear"):
        raise NotImplementedError(f"{name}: of adapters only LoRA on a linear layer is supported; merge this one")
    return layer


def active_adapter(layer: Any, name: str) -> str | None:
    """Return the name of the adapter that is active now, or None.

    Raises NotImplementedError where peft's layer computes more than  weight + scaling b a.
    """
    if layer is None:
        return None
    if hasattr(layer, "modules_to_save"):
        if layer.disable_adapters:
            raise ValueError(f"{name}: is trained in full and disabled now; for the original: adapter=False")
        return layer.active_adapters[0]
    if not hasattr(layer, "base_layer"):  # none of peft's layers
        return None
    if layer.merged:
        raise NotImplementedError(f"{name}: LoRA is merged into the weight: unmerge it, or unload the adapter")
    active = [] if layer.disable_adapters else [a for a in layer.active_adapters if a in layer.lora_A]
    if len(active) > 1:
        raise NotImplementedError(f"{name}: several adapters are active, {active}: set one")
    for a in active:
        if a in getattr(layer, "lora_variant", ()) or getattr(layer, "use_dora", {}).get(a):
            raise NotImplementedError(f"{name}: adapter {a!r} is DoRA or another variant; only plain LoRA is supported")
        if layer.lora_B[a].bias is not None:
            raise NotImplementedError(f"{name}: adapter {a!r} has lora_bias; only plain LoRA is supported")
        if layer.training and getattr(layer.lora_dropout[a], "p", 0) > 0:
            raise NotImplementedError(f"{name}: adapter {a!r} has dropout; set lora_dropout=0, or .eval() on the head")
    return active[0] if active else None


def refuse_what_is_not_called(head: nn.Module, linear: nn.Module, active: str | None, name: str, runs: bool) -> None:
    """Raise NotImplementedError for layers of the head with an own forward, or with hooks that belong to no engine.

    A hook that only reads cannot be distinguished from one that changes the logits or their gradient. runs: the loss runs
    in place of the head's forward, so the forward pre-hooks of the head do change the input of the loss and are allowed.
    """
    for where, layer in _called_by(head, linear, active, name):
        if changed := _forward_of_its_own(layer):
            raise NotImplementedError(
                f"{where}: {changed} is called in place of {type(layer).__name__}.forward, but not by a loss, so the "
                "logits would be others; take it off, or make the logits and pass those"
            )
        for kind, (of_layer, of_all) in HOOKS.items():
            if runs and layer is head and kind == "forward pre-hook":
                continue
            hooks = *getattr(torch_module, of_all).values(), *getattr(layer, of_layer).values()
            for hook in (h for h in hooks if not _is_engines(h)):
                instead = "fl.at_head runs it; or " if layer is head and kind == "forward pre-hook" else ""
                raise NotImplementedError(
                    f"{where}: has the {kind} {_named(hook)}, which a loss does not run, so what it does would be lost; "
                    f"{instead}remove it, or make the logits and pass those"
                )


def replaced_forward(module: nn.Module, name: str = "forward") -> Any:
    """Return the forward that is set on the module instance, ignoring those set by at_head for a while.

    None means that the module uses the forward of its class.
    """
    forward: Any = module.__dict__.get(name)
    while hasattr(forward, "in_place_of"):
        forward = forward.in_place_of
    return forward


def _called_by(head: nn.Module, linear: nn.Module, active: str | None, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name and the module of each layer that the head's forward calls, including the head itself."""
    layer: Any = head
    factors = ("lora_A", "lora_B", "lora_dropout") if active and hasattr(head, "lora_A") else ()
    parts = {id(head), id(linear), *(id(getattr(layer, k)[active]) for k in factors)}
    for path, m in head.named_modules():
        if id(m) in parts:
            yield name + f".{path}" * bool(path), m


def _forward_of_its_own(layer: nn.Module) -> str | None:
    """Return the name of what replaces the class's forward, on the instance or as its __call__, or None."""
    forward = replaced_forward(layer)
    hook = layer.__dict__.get("_hf_hook")  # accelerate's, which loads offloaded weights
    if hook is not None and isinstance(forward, partial) and _is_engines(forward):
        if strange := next((h for h in getattr(hook, "hooks", (hook,)) if not _is_engines(h)), None):
            return _named(strange)
        forward = replaced_forward(layer, "_old_forward")
    while (compiled := _compiled_from(forward)) is not None:
        forward = compiled
    kind = type(layer)
    same = getattr(forward, "__self__", None) is layer and getattr(forward, "__func__", None) is kind.forward
    if forward is not None and not same:
        return _named(forward)
    return None if kind.__call__ is nn.Module.__call__ else _named(kind.__call__)


def _compiled_from(f: Any) -> Any:
    """Return the function that was given to torch.compile, which calls it through functions of its own, or None."""
    inner = getattr(f, "__globals__", {}).get("__name__", "").startswith("torch._dynamo")
    return getattr(f, "_torchdynamo_orig_callable", None) or (getattr(f, "__wrapped__", None) if inner else None)


def _function(f: Any) -> Any:
    """Return the plain function inside partials and bound methods."""
    while isinstance(f, partial):
        f = f.func
    return getattr(f, "__func__", f)


def _is_engines(f: Any) -> bool:
    """Return whether a function was defined in one of the packages ENGINES."""
    return f"{getattr(_function(f), '__module__', None)}.".startswith(tuple(f"{e}." for e in ENGINES))


def _named(f: Any) -> str:
    """Return the module and the qualified name of a function."""
    f = _function(f)
    return f"{f.__module__}.{getattr(f, '__qualname__', type(f).__qualname__)}"
