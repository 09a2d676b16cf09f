"""The LM head as a module whose forward runs the loss, and how to find head and backbone of a transformers model.

Duck-typed: neither transformers nor peft is imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any
from weakref import ref as weak

import torch
from torch import Tensor, nn

from ..core.inputs import Hidden, Lora, Source
from ..losses import preference_loss
from .around_head import Measured, measured, measured_around, output_head, unwrapped
from .head_layers import active_adapter, linear_of, refuse_what_is_not_called

_CLASS = "the dataclass of these fields"


def _nobody() -> None:
    """A reference to what is not there."""


class FusedHead(nn.Module):
    """A head's own parameters, by reference, and a forward that runs a loss on them.

        head(hidden, labels, ref, loss=f, **options)  =  f(head.source(hidden), labels, ref, **options)

    f runs inside forward, so the hooks with which DDP, FSDP and ZeRO-3 gather the weight fire before it and in backward.
    For that the head must be part of the module that the engine wraps, and be made before it is wrapped.

    Args:
        head: an nn.Linear [H -> V], or peft's LoRA on one. Its Parameters become this module's, tied ones stay tied.
        softcap, scale, temperature, valid_vocab: as in fl.Hidden. `find_head` measures them on a model.
        adapter: False leaves the adapter out, for the reference of a PEFT model. Otherwise LoRA counts whenever it does
            in the model: not under model.disable_adapter().
        process_group, shard: as in fl.Hidden: `head` holds this rank's rows of a tensor-parallel head, or a DTensor that does.
        name: what errors call the head.

    Raises TypeError, ValueError or NotImplementedError, naming the head and its type, for a head that is quantised, a
    DTensor or tensor-parallel without its process_group, not linear, with a forward of its own or hooks that are no
    engine's, or under an adapter other than one plain LoRA or modules_to_save.
    """

    path: str
    layer: Any  # the adapter's, asked at each call what counts; no submodule
    layers: tuple[
        Callable[[], Any], Callable[[], Any]
    ]  # weak references: the head that it was made of, its linear layer
    around: Callable[[], nn.Module | None]  # another, to find_head's model
    measured: dict[str, Any]  # on that
    lora_a: Tensor | None
    lora_b: Tensor | None

    def __init__(
        self, head: nn.Module, *, softcap: float | None = None, scale: float = 1.0, temperature: float = 1.0,
        valid_vocab: int | None = None, adapter: bool = True, name: str = "head", process_group: object = None,
        shard: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.options: dict[str, Any] = {"softcap": softcap, "scale": scale, "temperature": temperature}
        self.options["valid_vocab"] = valid_vocab
        if process_group is not None:
            self.options |= {"process_group": process_group, "shard": shard}
        elif shard is not None:
            raise ValueError(f"shard: is of a head split over a process_group, got {shard!r} without one")
        self.name = f"{name} ({type(head).__name__})"
        linear = linear_of(head, self.name, adapter, split=process_group is not None)
        self.weight, self.bias, self.lora_a, self.lora_b = linear.weight, linear.bias, None, None
        layer = head if adapter and linear is not head else None
        self.__dict__.update(layer=layer, layers=(weak(head), weak(linear)), around=_nobody, measured={}, path=name)
        self.adapter = active_adapter(self.layer, self.name)
        refuse_what_is_not_called(head, linear, self.adapter, self.name, runs=False)
        if self.adapter and hasattr(self.layer, "lora_A"):
            self.lora_a, self.lora_b = self.layer.lora_A[self.adapter].weight, self.layer.lora_B[self.adapter].weight

    @classmethod
    def from_model(cls, model: nn.Module, **options: Any) -> FusedHead:
        """fl.find_head."""
        return find_head(model, **options)

    def source(self, hidden: Tensor) -> Hidden:
        """fl.Hidden of these states and the weights as they are now; constants under torch.no_grad()."""
        sharded = hasattr(self.weight, "placements") and "process_group" not in self.options
        if self.weight.numel() == 0 or self.weight.dim() != 2 or sharded:
            raise ValueError(
                f"{self.name}: its weight is a {type(self.weight).__name__} {list(self.weight.shape)} of a sharding engine: "
                "call the FusedHead as a module inside the engine's forward, or gather first "
                "(deepspeed.zero.GatheredParameters, FSDP.summon_full_params)"
            )
        active = active_adapter(self.layer, self.name)
        if active and active != self.adapter:
            raise ValueError(f"{self.name}: adapter {active!r} is active, was {self.adapter!r}: make a new FusedHead")
        if not torch.compiler.is_compiling():
            self._look_again(active)
        tensors = self.weight, self.bias, self.lora_a, self.lora_b
        scaling = self.layer.scaling[active] if active and self.lora_a is not None else None
        return _hidden(hidden, tensors, scaling, self.options)

    def _look_again(self, active: str | None) -> None:
        """Where the head is still there, at its hooks; where its model is, at softcap, scale and valid_vocab."""
        head, linear = self.layers
        if head() is not None and linear() is not None:
            refuse_what_is_not_called(head(), linear(), active, self.name, runs=False)
        model = self.around()
        if model is None:
            return
        now = output_head(model)
        if unwrapped(now) is not head():
            kind = type(unwrapped(now)).__name__
            raise ValueError(f"{self.name}: its model has another head now, {kind}; make a new FusedHead")
        found = measured_around(model, now, linear(), self.path)
        if found.options != self.measured:
            _refuse_padding(found, self.options.get("process_group"))
            self.options.update(found.options)
            self.measured = found.options

    def __getstate__(self) -> dict[str, Any]:
        """A copy is of numbers: neither head nor model is copied with it, nor looked at."""
        state = self.__dict__ | {"layers": (_nobody, _nobody), "around": _nobody}
        state.pop("_compiled_call_impl", None)
        return state

    def forward(
        self, hidden: Tensor, labels: Tensor, ref: Source | tuple[nn.Module, Tensor] | None = None, *,
        loss: str | Callable[..., Any] = "sigmoid", **options: Any,
    ) -> Any:  # fmt: skip
        """What the loss returns, once called as head(...).

        hidden: [..., H]. labels, options: the loss's.
        ref: a source, or (reference FusedHead, its hidden states): the loss then runs inside the forward of both.
        loss: a type of preference_loss, any loss of fused_losses, token_stats, or a function (policy source, labels, ref
            source, **options) of your own. Its own option `loss` goes through functools.partial(fl.grpo_loss, loss="dapo").
        """
        function = partial(preference_loss, loss=loss) if isinstance(loss, str) else loss
        policy = self.source(hidden)
        if isinstance(ref, tuple):
            ref_head, ref_hidden = ref
            inner = lambda source, labels, _, **options: _call(function, policy, labels, source, options)  # noqa: E731
            return opened(ref_head(ref_hidden, labels, loss=inner, **options))
        return opened(_call(function, policy, labels, ref, options))

    def __call__(self, *args: Any, **options: Any) -> Any:
        return closed(super().__call__(*args, **options))  # engines find tensors in dicts, not in dataclasses

    def extra_repr(self) -> str:
        return ", ".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])


def _call(loss: Callable[..., Any], policy: Hidden, labels: Tensor, ref: Source | None, options: dict[str, Any]) -> Any:
    """A loss with its reference: by the name `ref` where it has that, else third; a loss without one gets none."""
    parameters = inspect.signature(loss).parameters
    places = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if "ref" in parameters:
        return loss(policy, labels, ref=ref, **options)
    if len(places) > 2 and places[2] not in options:
        return loss(policy, labels, ref, **options)
    if ref is not None:
        raise TypeError(f"ref: {getattr(loss, '__name__', loss)} takes no reference, got {type(ref).__name__}")
    return loss(policy, labels, **options)


def find_head(
    model: nn.Module, *, temperature: float = 1.0, adapter: bool = True, process_group: object = None,
    shard: tuple[int, int] | None = None,
) -> FusedHead:  # fmt: skip
    """The output head of a transformers model as a FusedHead, with its softcap, scale and valid_vocab.

    These are measured, not read from config: the forward of a copy of the model runs with stand-ins for backbone and head (no
    weight is read, nothing is gathered), and its logits must be  softcap tanh(z / softcap) * scale  of what the head gave it.
    They are measured again where a number, a flag or the mode of the model has changed; where they hang on a tensor, at every
    call, and that tensor may not require grad.
    DDP, FSDP, DeepSpeed, torch.compile and PEFT wrappers are looked through. A mixture's auxiliary loss is not included.
    process_group, shard: as in FusedHead, for a head that tensor parallelism has split already.

    Raises as FusedHead does; TypeError where there is no head; NotImplementedError where the model does something else
    between backbone and logits (a projection, a norm, a bias on logits, masked tokens, a learned scale).
    """
    found = measured(model, whole=process_group is None)
    _refuse_padding(found, process_group)
    head = FusedHead(
        found.head, **found.options, temperature=temperature, adapter=adapter, name=found.path, process_group=process_group,
        shard=shard,
    )  # fmt: skip
    head.__dict__.update(around=weak(unwrapped(model)), measured=found.options)
    return head


def _refuse_padding(found: Measured, process_group: object) -> None:
    if process_group is not None and found.valid_vocab is not None:
        raise NotImplementedError(
            f"{found.path}: {found.valid_vocab} rows of the head are tokens, the rest is padding; where it is split, say how "
            "many of this rank's are: fl.FusedHead(head, process_group=..., valid_vocab=...)"
        )


def backbone(model: nn.Module) -> nn.Module:
    """The submodule whose last_hidden_state the head reads, measured as in find_head; of a model that sees images, the
    one that has the vision tower. Raises as find_head does, but of how the head's weights lie it knows nothing.

        find_head(model).source(backbone(model)(**inputs).last_hidden_state)  has the logits  model(**inputs).logits
    """
    return measured(model, whole=False).backbone


def head_source(head: nn.Module, name: str, hidden: Tensor, **options: Any) -> Hidden:
    """fl.Hidden of a head's parameters as they are at this moment, in the middle of a forward: an engine has gathered them, an
    adapter is on or off."""
    saved = hasattr(head, "modules_to_save")
    adapter = not (saved and getattr(head, "disable_adapters", False))
    linear = linear_of(head, name, adapter, whole=False)
    if hasattr(linear.weight, "ds_id"):
        raise NotImplementedError(
            f"{name}: its weight is sharded by ZeRO-3, which scatters it again before the backward; use ZeRO-2 or FSDP2, or "
            "make the logits and pass those"
        )
    active = active_adapter(head, name) if adapter and not saved and linear is not head else None
    refuse_what_is_not_called(head, linear, active, name, runs=True)
    layer: Any = head
    factors = (layer.lora_A[active].weight, layer.lora_B[active].weight) if active else (None, None)
    return _hidden(hidden, (linear.weight, linear.bias, *factors), layer.scaling[active] if active else None, options)


def _hidden(hidden: Tensor, tensors: tuple[Any, ...], scaling: float | None, options: dict[str, Any]) -> Hidden:
    """Of weight, bias, and LoRA's a and b; constants under torch.no_grad()."""
    weight, bias, a, b = (x if x is None or torch.is_grad_enabled() else x.detach() for x in tensors)
    return Hidden(hidden, weight, bias, lora=None if scaling is None else Lora(a, b, scaling), **options)


def opened(x: Any) -> Any:
    """Dataclasses as dicts that keep their class, wrapped, for FSDP takes a class of dataclasses for one of them."""
    if not is_dataclass(x):
        return x
    kind: Any = type(x)
    return {_CLASS: partial(kind), **{f.name: opened(getattr(x, f.name)) for f in fields(x)}}


def closed(x: Any) -> Any:
    """The inverse of _opened."""
    if not isinstance(x, dict) or _CLASS not in x:
        return x
    return x[_CLASS](**{k: closed(value) for k, value in x.items() if k != _CLASS})
