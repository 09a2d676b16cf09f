"""Define the LM head as a module whose forward runs the loss, and find head and backbone of a transformers model.

This module imports neither transformers nor peft; it only reads the attributes of their objects.
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
from ..losses import LOSSES, preference_loss
from .around_head import Measured, measured, measured_around, output_head, unwrapped
from .head_layers import active_adapter, linear_of, refuse_what_is_not_called

_CLASS = "the dataclass of these fields"


def _nobody() -> None:
    """Return None, as a weak reference to a deleted object does."""


class NotGiven:
    """Mark an argument that was left out, where None has a meaning."""

    def __repr__(self) -> str:
        return "not given"


class FusedHead(nn.Module):
    """Hold the parameters of a head, by reference, and run a loss on them in forward.

        head(hidden, labels, ref, loss=f, **options)  =  f(head.source(hidden), labels, ref, **options)

    f runs inside forward, so the hooks with which DDP, FSDP and ZeRO-3 gather the weight run before it and in backward.
    For this the FusedHead must be part of the module that the engine wraps, and must be made before that module is
    wrapped.

    Args:
        head: An nn.Linear [H -> V], or peft's LoRA on one. Its Parameters become those of this module; tied ones stay
            tied.
        softcap: As in fl.Hidden. `find_head` measures it on a model.
        scale: As in fl.Hidden. `find_head` measures it on a model.
        temperature: As in fl.Hidden.
        valid_vocab: As in fl.Hidden. `find_head` measures it on a model.
        adapter: False ignores the adapter, for the reference of a PEFT model. True uses LoRA whenever the model uses it,
            so not under model.disable_adapter().
        name: The name of the head in error messages.
        process_group: As in fl.Hidden. With it, `head` holds this rank's rows of a tensor-parallel head, or a DTensor
            that does.
        shard: As in fl.Hidden, only with process_group.

    Raises TypeError, ValueError or NotImplementedError, which name the head and its type, for a head that is quantised,
    that is a DTensor or tensor-parallel without its process_group, that is not linear, that has a forward of its own or
    hooks that belong to no engine, or that is under an adapter other than one plain LoRA or modules_to_save.
    """

    path: str
    layer: Any  # the adapter's layer, or None; read at each call; not a submodule
    layers: tuple[
        Callable[[], Any], Callable[[], Any]
    ]  # weak references: to the original head, and to its linear layer
    around: Callable[[], nn.Module | None]  # a weak reference to find_head's model
    measured: dict[str, Any]  # what was measured on that model
    lora_a: Tensor | None
    lora_b: Tensor | None

    def __init__(  # noqa: PLR0913 (those of fl.Hidden, and where the head is)
        self,
        head: nn.Module,
        *,
        softcap: float | None = None,
        scale: float = 1.0,
        temperature: float = 1.0,
        valid_vocab: int | None = None,
        adapter: bool = True,
        name: str = "head",
        process_group: object = None,
        shard: tuple[int, int] | None = None,
    ) -> None:
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
        """Return fl.find_head(model, **options)."""
        return find_head(model, **options)

    def source(self, hidden: Tensor) -> Hidden:
        """Return fl.Hidden of these states and the current weights, which are constants under torch.no_grad()."""
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
        """Check the hooks of the head, if it still exists, and measure its model again, if that still exists."""
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
        measurement = measured_around(model, now, linear(), self.path)
        if measurement.options != self.measured:
            _refuse_padding(measurement, self.options.get("process_group"))
            self.options.update(measurement.options)
            self.measured = measurement.options

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the weak references to head and model, so that a copy does not check them."""
        state = self.__dict__ | {"layers": (_nobody, _nobody), "around": _nobody}
        state.pop("_compiled_call_impl", None)
        return state

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        ref: Source | tuple[nn.Module, Tensor] | None | NotGiven = NotGiven(),  # noqa: B008
        *,
        loss: str | Callable[..., Any],
        **options: Any,
    ) -> Any:
        """Return what the loss returns, if called as head(...).

        Args:
            hidden: The states [..., H].
            labels: The labels of the loss.
            ref: A source, or (reference FusedHead, its hidden states); with the latter the loss runs inside the forward
                of both. Leave it out where the loss takes no reference; None where it takes one, to go without.
            loss: A loss_type of preference_loss, any loss of fused_losses, token_stats, or your own function (policy source,
                labels, ref source, **options).
            **options: The options of the loss.
        """
        if isinstance(loss, str) and loss not in LOSSES:
            raise ValueError(
                f"loss: {loss!r} is no loss_type of preference_loss; pass a function, such as loss=fl.dpo_loss"
            )
        function = partial(preference_loss, loss_type=loss) if isinstance(loss, str) else loss
        policy = self.source(hidden)
        if isinstance(ref, tuple):
            ref_head, ref_hidden = ref
            inner = lambda source, labels, _, **options: _call(function, policy, labels, source, options)  # noqa: E731
            return opened(ref_head(ref_hidden, labels, None, loss=inner, **options))
        return opened(_call(function, policy, labels, ref, options))

    def __call__(self, *args: Any, **options: Any) -> Any:
        return closed(super().__call__(*args, **options))  # engines find tensors in dicts, not in dataclasses

    def extra_repr(self) -> str:
        return ", ".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])


def _call(
    loss: Callable[..., Any], policy: Hidden, labels: Tensor, ref: Source | None | NotGiven, options: dict[str, Any]
) -> Any:
    """Call a loss with its reference, if it takes one.

    The reference is passed as `ref` if the loss has a parameter of that name, else as its third argument.
    """
    parameters = inspect.signature(loss).parameters
    places = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if isinstance(ref, NotGiven):
        return loss(policy, labels, **options)
    if "ref" in parameters:
        return loss(policy, labels, ref=ref, **options)
    if len(places) > 2 and places[2] not in options:
        return loss(policy, labels, ref, **options)
    if ref is not None:
        raise TypeError(f"ref: {getattr(loss, '__name__', loss)} takes no reference, got {type(ref).__name__}")
    return loss(policy, labels, **options)


def find_head(
    model: nn.Module,
    *,
    temperature: float = 1.0,
    adapter: bool = True,
    process_group: object = None,
    shard: tuple[int, int] | None = None,
) -> FusedHead:
    """Return the output head of a transformers model as a FusedHead, with its softcap, scale and valid_vocab.

    These three are measured, not read from config. The forward of a copy of the model runs with stand-ins for backbone
    and head (no weight is read, nothing is gathered), and its logits must be  softcap tanh(z / softcap) * scale  of the
    output z of the head. They are measured again where a number, a flag or the mode of the model has changed. Where they
    depend on a tensor, they are measured at every call, and that tensor may not require grad.

    The model may be wrapped by DDP, FSDP, DeepSpeed, torch.compile and PEFT. A mixture's auxiliary loss is not included.

    Args:
        model: The transformers model.
        temperature: As in FusedHead.
        adapter: As in FusedHead.
        process_group: As in FusedHead, for a head that tensor parallelism has split already.
        shard: As in FusedHead, only with process_group.

    Raises:
        TypeError: Where there is no head.
        NotImplementedError: Where the model does something else between backbone and logits (a projection, a norm, a bias
            on logits, masked tokens, a learned scale).

    The errors of FusedHead are raised too.
    """
    measurement = measured(model, whole=process_group is None)
    _refuse_padding(measurement, process_group)
    head = FusedHead(
        measurement.head,
        **measurement.options,
        temperature=temperature,
        adapter=adapter,
        name=measurement.path,
        process_group=process_group,
        shard=shard,
    )
    head.__dict__.update(around=weak(unwrapped(model)), measured=measurement.options)
    return head


def _refuse_padding(measurement: Measured, process_group: object) -> None:
    """Raise NotImplementedError for a head that is split over ranks and has rows of padding."""
    if process_group is not None and measurement.valid_vocab is not None:
        raise NotImplementedError(
            f"{measurement.path}: {measurement.valid_vocab} rows of the head are tokens, the rest is padding; where it is "
            "split, say how many of this rank's are: fl.FusedHead(head, process_group=..., valid_vocab=...)"
        )


def backbone(model: nn.Module) -> nn.Module:
    """Return the submodule whose last_hidden_state the head reads.

    It is measured as in find_head. For a model that takes images it is the submodule that contains the vision tower.

        find_head(model).source(backbone(model)(**inputs).last_hidden_state)  has the logits  model(**inputs).logits

    Raises the errors of find_head, except those about the layout of the head's weights.
    """
    return measured(model, whole=False).backbone


def head_source(head: nn.Module, name: str, hidden: Tensor, **options: Any) -> Hidden:
    """Return fl.Hidden of a head's current parameters, in the middle of a forward.

    At that moment an engine has gathered the parameters, and an adapter is on or off.
    """
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
    """Return fl.Hidden of weight, bias, and LoRA's a and b, which are constants under torch.no_grad()."""
    weight, bias, a, b = (x if x is None or torch.is_grad_enabled() else x.detach() for x in tensors)
    return Hidden(hidden, weight, bias, lora=None if scaling is None else Lora(a, b, scaling), **options)


def opened(x: Any) -> Any:
    """Return a dataclass as a dict that also stores its class; return anything else unchanged.

    The class is wrapped in a partial, because FSDP treats the class of a dataclass like an instance of it.
    """
    if not is_dataclass(x):
        return x
    kind: Any = type(x)
    return {_CLASS: partial(kind), **{f.name: opened(getattr(x, f.name)) for f in fields(x)}}


def closed(x: Any) -> Any:
    """Return the inverse of opened."""
    if not isinstance(x, dict) or _CLASS not in x:
        return x
    return x[_CLASS](**{k: closed(value) for k, value in x.items() if k != _CLASS})
