"""The LM head as a module whose forward runs the loss, and how to find head and backbone of a transformers model.

Duck-typed: neither transformers nor peft is imported.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from .losses import preference_loss
from .sources import FLOATS, Hidden, Lora, Source

_CLASS = "the dataclass of these fields"


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
    DTensor or tensor-parallel without its process_group, not linear, or under an adapter other than one plain LoRA or
    modules_to_save.
    """

    layer: Any  # the adapter's, asked at each call what counts; no submodule
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
        linear = _linear(head, self.name, adapter, split=process_group is not None)
        self.weight, self.bias, self.lora_a, self.lora_b = linear.weight, linear.bias, None, None
        self.__dict__["layer"] = head if adapter and linear is not head else None
        self.adapter = _active(self.layer, self.name)
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
        active = _active(self.layer, self.name)
        if active and active != self.adapter:
            raise ValueError(f"{self.name}: adapter {active!r} is active, was {self.adapter!r}: make a new FusedHead")
        tensors = self.weight, self.bias, self.lora_a, self.lora_b
        return _hidden(
            hidden, tensors, self.layer.scaling[active] if active and self.lora_a is not None else None, self.options
        )

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

    These are measured, not read from config: the model's forward runs with stand-ins for backbone and head (no weight is
    read, nothing is gathered), and its logits must be  softcap tanh(z / softcap) * scale  of what the head gave it.
    DDP, FSDP, DeepSpeed, torch.compile and PEFT wrappers are looked through. A mixture's auxiliary loss is not included.
    process_group, shard: as in FusedHead, for a head that tensor parallelism has split already.

    Raises as FusedHead does; TypeError where there is no head; NotImplementedError where the model does something else
    between backbone and logits (a projection, a norm, a bias on logits, masked tokens).
    """
    found = measured(model, whole=process_group is None)
    if process_group is not None and found.valid_vocab is not None:
        raise NotImplementedError(
            f"{found.path}: {found.valid_vocab} rows of the head are tokens, the rest is padding; where it is split, say how "
            "many of this rank's are: fl.FusedHead(head, process_group=..., valid_vocab=...)"
        )
    return FusedHead(
        found.head, softcap=found.softcap, scale=found.scale, temperature=temperature, valid_vocab=found.valid_vocab,
        adapter=adapter, name=found.path, process_group=process_group, shard=shard,
    )  # fmt: skip


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
    linear = _linear(head, name, adapter, whole=False)
    if hasattr(linear.weight, "ds_id"):
        raise NotImplementedError(
            f"{name}: its weight is sharded by ZeRO-3, which scatters it again before the backward; use ZeRO-2 or FSDP2, or "
            "make the logits and pass those"
        )
    active = _active(head, name) if adapter and not saved and linear is not head else None
    layer: Any = head
    factors = (layer.lora_A[active].weight, layer.lora_B[active].weight) if active else (None, None)
    return _hidden(hidden, (linear.weight, linear.bias, *factors), layer.scaling[active] if active else None, options)


def _hidden(hidden: Tensor, tensors: tuple[Any, ...], scaling: float | None, options: dict[str, Any]) -> Hidden:
    """Of weight, bias, and LoRA's a and b; constants under torch.no_grad()."""
    weight, bias, a, b = (x if x is None or torch.is_grad_enabled() else x.detach() for x in tensors)
    return Hidden(hidden, weight, bias, lora=None if scaling is None else Lora(a, b, scaling), **options)


def _linear(head: nn.Module, name: str, adapter: bool, whole: bool = True, split: bool = False) -> nn.Linear:
    """The dense linear layer at the bottom of a head; raises where there is none. whole: so are its weights, here and now.
    split: but for the rows of a vocabulary, of which others may hold some."""
    layer: Any = head
    if hasattr(layer, "modules_to_save"):  # peft trains a copy
        layer = layer.modules_to_save[layer.active_adapters[0]] if adapter else layer.original_module
    layer = getattr(layer, "base_layer", layer)
    weight, kind = getattr(layer, "weight", None), type(layer).__name__
    sharded = hasattr(weight, "placements")
    packed = hasattr(weight, "__tensor_flatten__") and not sharded  # a float tensor in name, whose bytes are elsewhere
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATS or packed or "4bit" in kind or "8bit" in kind:
        which = type(weight).__name__ if packed else getattr(weight, "dtype", None)
        what = f"a weight of {which}" if isinstance(weight, Tensor) else "no weight"
        raise TypeError(
            f"{name}: {kind} has {what}; expected a dense weight [V, H] of float32, float16, bfloat16 or float64. If it is "
            "quantised, leave the head out (bitsandbytes: llm_int8_skip_modules; GPTQ, AWQ: modules_to_not_convert)"
        )
    if whole and sharded and not split:
        raise TypeError(f"{name}: its weight is a DTensor; make the FusedHead before fully_shard or tensor parallelism")
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
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


def _active(layer: Any, name: str) -> str | None:
    """The adapter that counts now; raises where peft's layer does more than  weight + scaling b a."""
    if layer is None:
        return None
    if hasattr(layer, "modules_to_save"):
        if layer.disable_adapters:
            raise ValueError(f"{name}: is trained in full and disabled now; for the original: adapter=False")
        return layer.active_adapters[0]
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


class Measured(NamedTuple):
    """softcap and scale are of what the backbone returns; the head is given `before` times that."""

    path: str
    head: nn.Module
    backbone: nn.Module
    softcap: float | None
    scale: float
    valid_vocab: int | None
    before: float

    @property
    def at_head(self) -> dict[str, Any]:
        """The options for the states that the head is given."""
        softcap = None if self.softcap is None else _short(self.softcap * self.before)
        return {"softcap": softcap, "scale": _short(self.scale / self.before), "valid_vocab": self.valid_vocab}


@torch.no_grad()
def measured(model: nn.Module, whole: bool = True) -> Measured:
    """softcap, scale, valid_vocab of  logits(z) = softcap tanh(z / softcap) * scale  in the columns [:valid_vocab], from
    the model's own forward around a backbone and a head that answer with numbers of our choice."""
    model = unwrapped(model)
    kind = type(model).__name__
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if not isinstance(head, nn.Module):
        raise TypeError(f"{kind}: no output head (get_output_embeddings); pass its linear layer: fl.FusedHead(layer)")
    path = kind + "." + next((k for k, m in model.named_modules() if m is head), "head")
    linear = _linear(head, f"{path} ({type(head).__name__})", adapter=False, whole=whole)

    def refuse(why: str, cause: Exception | None = None) -> NoReturn:
        raise NotImplementedError(
            f"{path} ({type(head).__name__}): {why}. fl.Hidden cannot stand for it; if you know better: "
            "fl.FusedHead(model.get_output_embeddings(), softcap=..., scale=...)"
        ) from cause

    v, width, tiny, huge = linear.out_features, linear.in_features, 2.0**-20, 2.0**20
    device = linear.weight.device if linear.weight.device.type not in ("meta", "mps") else torch.device("cpu")
    hidden = (torch.arange(3 * width, dtype=torch.float64, device=device) % 7 - 3).view(1, 3, width)  # exact in bf16
    ramp = torch.linspace(-60, 60, v, dtype=torch.float64, device=device)
    z = torch.stack([torch.full_like(ramp, tiny), torch.full_like(ramp, huge), ramp])[None]
    bodies, top = [_StandIn(m, _Output((hidden.clone(),))) for m in _bodies(model)], _StandIn(head, z.clone())
    try:
        with _replaced(model, [top, *bodies]):
            ids = torch.zeros(1, 3, dtype=torch.int64, device=device)
            logits = model.forward(input_ids=ids, return_dict=True).logits.double()
    except Exception as e:
        refuse(f"{kind}.forward does something between backbone and logits ({type(e).__name__}: {e})", e)
    called = [b.original for b in bodies for _ in b.asked]
    if len(called) != 1 or len(top.asked) != 1:
        refuse(f"{kind}.forward calls {len(called)} known backbones and the head {len(top.asked)} times")
    owned = {id(p) for m in (called[0], head) for p in m.parameters()}
    if whole and (
        beside := [k for k, p in model.named_parameters() if id(p) not in owned]
    ):  # a vision tower beside the decoder
        refuse(f"{beside[0]} belongs neither to the backbone {type(called[0]).__name__} nor to the head")

    seen, valid = top.asked[0].double(), logits.shape[-1]
    before = (seen.flatten()[0] / hidden.flatten()[0]).item() if seen.shape == hidden.shape else math.nan
    if not before > 0 or not torch.allclose(seen, before * hidden, rtol=1e-6):
        refuse(f"{kind}.forward has something between the backbone's last_hidden_state and the head")
    if before != 1 and linear.bias is not None:
        refuse(f"{kind}.forward multiplies by {before:g} before a head with a bias")
    if logits.shape[:-1] != z.shape[:-1] or valid > v:
        refuse(f"{kind}.forward makes logits {list(logits.shape)} of the head's {list(z.shape)}")
    scale, most, z = (logits[0, 0, 0] / tiny).item(), logits[0, 1, 0].item(), z[..., :valid]
    softcap = None if not scale > 0 or math.isclose(most, scale * huge, rel_tol=1e-6) else most / scale
    ours = (z if softcap is None else softcap * torch.tanh(z / softcap)) * scale
    if not scale > 0 or not torch.allclose(logits, ours, rtol=1e-6, atol=0):
        refuse(f"{kind}.forward makes logits that are not softcap * tanh(z / softcap) * scale of what the head returns")
    softcap = None if softcap is None else _short(softcap / before)  # f(before z) is such an f, too
    scale, columns = _short(scale * before), None if valid == v else valid
    return Measured(path, head, called[0], softcap, scale, columns, before)


def _short(x: float) -> float:
    """Without the rounding of a measurement."""
    return float(f"{x:.12g}")


def unwrapped(model: nn.Module) -> nn.Module:
    """Through torch.compile, DDP, FSDP, DeepSpeed and PEFT."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if isinstance(inner, nn.Module):
            model = inner
        elif callable(base := getattr(model, "get_base_model", None)):
            if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
                raise NotImplementedError(
                    f"{type(model).__name__}: prompt learning adds tokens that labels do not have"
                )
            model = base()
        else:
            return model


def _bodies(model: nn.Module) -> list[nn.Module]:
    """What may be the backbone, outermost first: the first that forward calls hides the rest."""
    found = [getattr(model, getattr(model, "base_model_prefix", "") or "model", None), getattr(model, "model", None)]
    decoder = getattr(model, "get_decoder", None)
    if callable(decoder) and not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        found.append(decoder())
    return [m for i, m in enumerate(found) if isinstance(m, nn.Module) and m is not model and m not in found[:i]]


class _StandIn(nn.Module):
    """Gives `answer` in place of a module whose attributes it still shows, and keeps what it was asked."""

    def __init__(self, original: nn.Module, answer: Any) -> None:
        super().__init__()
        self.__dict__.update(original=original, answer=answer, asked=[])

    def forward(self, *args: Any, **options: Any) -> Any:
        self.asked.append(next(iter((*args, *options.values())), None))
        return self.answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)


class _Output(tuple):
    """A model output that has a last hidden state and nothing else."""

    last_hidden_state = property(lambda self: self[0])

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _replaced(model: nn.Module, stand_ins: list[_StandIn]) -> Iterator[None]:
    spots = [(m, k, s) for s in stand_ins for m in model.modules() for k, x in m._modules.items() if x is s.original]
    try:
        for m, k, s in spots:
            m._modules[k] = s
        yield
    finally:
        for m, k, s in spots:
            m._modules[k] = s.original


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
