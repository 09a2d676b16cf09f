"""The LM head as a module whose forward runs the loss, and how to find head and backbone of a transformers model.

Duck-typed: neither transformers nor peft is imported.
"""

from __future__ import annotations

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


class FusedHead(nn.Module):
    """A head's own parameters, by reference, and a forward that runs a loss on them.

        head(hidden, labels, ref, loss=f, **options)  =  f(head.source(hidden), labels, ref, **options)

    f runs inside forward, so the hooks with which DDP, FSDP and ZeRO-3 gather the weight fire before it and in backward.
    For that the head must be part of the module that the engine wraps, and be made before it is wrapped.

    Args:
        head: an nn.Linear [H -> V], or peft's LoRA on one. Its Parameters become this module's, tied ones stay tied.
        softcap, scale, temperature, valid_vocab: as in fl.Hidden. `find_head` reads them off a model.
        adapter: False leaves the adapter out, for the reference of a PEFT model. Otherwise LoRA counts whenever it does
            in the model: not under model.disable_adapter().
        name: what errors call the head.

    Raises TypeError, ValueError or NotImplementedError, naming the head and its type, for a head that is quantised,
    DTensor, tensor-parallel, not linear, or under an adapter other than one plain LoRA.
    """

    def __init__(
        self, head: nn.Module, *, softcap: float | None = None, scale: float = 1.0, temperature: float = 1.0,
        valid_vocab: int | None = None, adapter: bool = True, name: str = "head",
    ) -> None:  # fmt: skip
        super().__init__()
        self.options = dict(softcap=softcap, scale=scale, temperature=temperature, valid_vocab=valid_vocab)
        self.name = f"{name} ({type(head).__name__})"
        linear = _linear(head, self.name, adapter)
        self.weight, self.bias = linear.weight, linear.bias
        self.adapter, self.lora_a, self.lora_b = None, None, None
        self.__dict__["layer"] = head if adapter and linear is not head else None  # asked, not owned: no submodule
        if self.layer is not None and (active := _active(self.layer, self.name)):
            self.adapter = active
            self.lora_a, self.lora_b = self.layer.lora_A[active].weight, self.layer.lora_B[active].weight

    @classmethod
    def from_model(cls, model: nn.Module, *, temperature: float = 1.0, adapter: bool = True) -> FusedHead:
        """fl.find_head."""
        return find_head(model, temperature=temperature, adapter=adapter)

    def source(self, hidden: Tensor) -> Hidden:
        """fl.Hidden of these states and the weights as they are now; constants under torch.no_grad()."""
        if self.weight.numel() == 0 or self.weight.dim() != 2:
            raise ValueError(
                f"{self.name}: its weight has shape {list(self.weight.shape)}, a sharding engine holds the rest: call the "
                "FusedHead as a module inside the engine's forward, or gather first (deepspeed.zero.GatheredParameters, "
                "FSDP.summon_full_params)"
            )
        lora = None
        if self.layer is not None and (active := _active(self.layer, self.name)):
            if active != self.adapter:
                raise ValueError(
                    f"{self.name}: adapter {active!r} is active, was {self.adapter!r}: make a new FusedHead"
                )
            lora = (self.lora_a, self.lora_b)
        parts = [self.weight, self.bias, *(lora or ())]
        weight, bias, *factors = parts if torch.is_grad_enabled() else [x if x is None else x.detach() for x in parts]
        low_rank = Lora(*factors, self.layer.scaling[self.adapter]) if factors else None
        return Hidden(hidden, weight, bias, lora=low_rank, **self.options)

    def forward(
        self, hidden: Tensor, labels: Tensor, ref: Source | tuple[nn.Module, Tensor] | None = None, *,
        loss: str | Callable[..., Any] = "sigmoid", **options: Any,
    ) -> Any:  # fmt: skip
        """What the loss returns.

        hidden: [..., H]. labels, options: the loss's.
        ref: a source, or (reference FusedHead, its hidden states): the loss then runs inside the forward of both.
        loss: a name in LOSSES, or a function (policy source, labels, ref source, **options): fl.token_stats, a loss.
        """
        function = partial(preference_loss, loss=loss) if isinstance(loss, str) else loss
        policy = self.source(hidden)
        if isinstance(ref, tuple):
            ref_head, ref_hidden = ref
            inner = lambda source, labels, _, **options: function(policy, labels, source, **options)  # noqa: E731
            return _opened(ref_head(ref_hidden, labels, loss=inner, **options))
        return _opened(function(policy, labels, ref, **options))

    def __call__(self, *args: Any, **options: Any) -> Any:
        return _closed(
            super().__call__(*args, **options)
        )  # engines hook the tensors they find, in dicts, not in dataclasses

    def extra_repr(self) -> str:
        return ", ".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])


def find_head(model: nn.Module, *, temperature: float = 1.0, adapter: bool = True) -> FusedHead:
    """The output head of a transformers model as a FusedHead, with softcap, scale and valid_vocab.

    These are measured, not read from config: the model's forward runs with stand-ins for backbone and head (no weight is
    touched, nothing is gathered), and its logits must be  softcap tanh(z / softcap) * scale  of what the head gave it.
    DDP, FSDP, DeepSpeed, torch.compile and PEFT wrappers are looked through. A mixture's auxiliary loss is not included.

    Raises as FusedHead does; TypeError where there is no head; NotImplementedError where the model does something else
    between backbone and logits (a projection, a norm, a bias on logits, masked tokens).
    """
    found = _find(model)
    return FusedHead(
        found.head, softcap=found.softcap, scale=found.scale, temperature=temperature, valid_vocab=found.valid_vocab,
        adapter=adapter, name=found.name,
    )  # fmt: skip


def backbone(model: nn.Module) -> nn.Module:
    """The submodule whose last_hidden_state the head reads, measured as in find_head; for a model that sees images it
    is the whole of it, vision tower included:

        find_head(model).source(backbone(model)(**inputs).last_hidden_state)  is  model(**inputs).logits
    """
    return _find(model).backbone


def _linear(head: nn.Module, name: str, adapter: bool) -> nn.Linear:
    """The dense linear layer at the bottom of a head; raises where there is none."""
    layer = head
    if hasattr(layer, "modules_to_save"):
        raise NotImplementedError(
            f"{name}: is in peft's modules_to_save; pass fl.FusedHead(head.modules_to_save[adapter]) as the policy's head and "
            "fl.FusedHead(head.original_module) as the reference's"
        )
    if isinstance(getattr(layer, "base_layer", None), nn.Module):
        if adapter and not (hasattr(layer, "lora_A") and type(layer).__name__ == "Linear"):
            raise NotImplementedError(f"{name}: of adapters only LoRA on a linear layer is supported; merge this one")
        layer = layer.base_layer
    weight = getattr(layer, "weight", None)
    kind = type(layer).__name__
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATS or "4bit" in kind or "8bit" in kind:
        what = f"weight of {weight.dtype}" if isinstance(weight, Tensor) else "no weight"
        raise TypeError(
            f"{name}: {kind} has {what}, a quantised head? The weight must be float32, float16, bfloat16 or float64 [V, H]: "
            "leave the head out of quantisation (bitsandbytes: llm_int8_skip_modules, GPTQ and AWQ: modules_to_not_convert)"
        )
    if hasattr(weight, "placements"):
        raise TypeError(f"{name}: its weight is a DTensor; make the FusedHead before fully_shard or tensor parallelism")
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        raise TypeError(f"{name}: expected nn.Linear or LoRA on one, got {kind}, whose forward may do something else")
    if type(weight) is not nn.Parameter or "weight" not in layer._parameters:
        raise TypeError(f"{name}: its weight is a {type(weight).__name__}, expected a plain nn.Parameter of its own")
    if not hasattr(weight, "ds_id") and weight.shape != (layer.out_features, layer.in_features):
        raise ValueError(
            f"{name}: expected weight {[layer.out_features, layer.in_features]}, got {list(weight.shape)}: it is sharded or "
            "tensor-parallel; make the FusedHead before the model is sharded"
        )
    return layer


def _active(layer: Any, name: str) -> str | None:
    """The LoRA adapter that counts now; raises where peft's layer does more than  weight + scaling b a."""
    active = [] if layer.disable_adapters else [a for a in layer.active_adapters if a in layer.lora_A]
    if layer.merged:
        raise NotImplementedError(f"{name}: LoRA is merged into the weight: unmerge it, or unload the adapter")
    if len(active) > 1:
        raise NotImplementedError(f"{name}: several adapters are active, {active}: set one")
    for a in active:
        if a in getattr(layer, "lora_variant", ()) or getattr(layer, "use_dora", {}).get(a):
            raise NotImplementedError(f"{name}: adapter {a!r} is DoRA or another variant; only plain LoRA is supported")
        if layer.lora_B[a].bias is not None:
            raise NotImplementedError(f"{name}: adapter {a!r} has lora_bias; only plain LoRA is supported")
        if layer.training and getattr(layer.lora_dropout[a], "p", 0) > 0:
            raise NotImplementedError(
                f"{name}: adapter {a!r} has dropout; set lora_dropout=0, or call .eval() on the head"
            )
    return active[0] if active else None


class _Found(NamedTuple):
    name: str
    head: nn.Module
    backbone: nn.Module
    softcap: float | None
    scale: float
    valid_vocab: int | None


def _find(model: nn.Module) -> _Found:
    model = _unwrapped(model)
    kind = type(model).__name__
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        raise TypeError(
            f"{kind}: has no output head (get_output_embeddings); pass its linear layer: fl.FusedHead(layer)"
        )
    body = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if not isinstance(body, nn.Module):
        raise NotImplementedError(f"{kind}: has no backbone in one module; pass fl.FusedHead(layer) the head yourself")
    path = next((k for k, m in model.named_modules() if m is head), "head")
    linear = _linear(head, f"{kind}.{path} ({type(head).__name__})", adapter=False)
    return _Found(f"{kind}.{path}", head, body, *_measured(model, f"{kind}.{path}", body, head, linear))


def _unwrapped(model: nn.Module) -> nn.Module:
    """Through torch.compile, DDP, FSDP, DeepSpeed and PEFT."""
    for _ in range(8):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if isinstance(inner, nn.Module):
            model = inner
        elif callable(get := getattr(model, "get_base_model", None)):
            if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
                raise NotImplementedError(
                    f"{type(model).__name__}: prompt learning adds tokens that labels do not have"
                )
            model = get()
    return model


class _StandIn(nn.Module):
    """Gives `answer` in place of a module whose attributes it still shows, and keeps what it was asked."""

    def __init__(self, original: nn.Module, answer: Any) -> None:
        super().__init__()
        self.__dict__.update(original=original, answer=answer, asked=[])

    def forward(self, *args: Any, **_: Any) -> Any:
        self.asked.append(args[0] if args else None)
        return self.answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


class _Output(tuple):
    """A model output of a last hidden state alone."""

    last_hidden_state = property(lambda self: self[0])

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@contextmanager
def _replaced(model: nn.Module, pairs: list[tuple[nn.Module, nn.Module]]) -> Iterator[None]:
    spots = [(m, k, new) for old, new in pairs for m in model.modules() for k, x in m._modules.items() if x is old]
    before = [(m, k, m._modules[k]) for m, k, _ in spots]
    try:
        for m, k, x in spots:
            m._modules[k] = x
        yield
    finally:
        for m, k, old in before:
            m._modules[k] = old


@torch.no_grad()
def _measured(
    model: nn.Module, name: str, body: nn.Module, head: nn.Module, linear: nn.Linear
) -> tuple[float | None, float, int | None]:
    """softcap, scale and valid_vocab of  logits(z) = softcap tanh(z / softcap) * scale,  from the model's own forward."""

    def refuse(why: str, cause: Exception | None = None) -> NoReturn:
        raise NotImplementedError(
            f"{name}: {why}, which fl.Hidden does not do. If you know better: fl.FusedHead(head, softcap=..., scale=...)"
        ) from cause

    v, width, tiny, huge = linear.out_features, linear.in_features, 2.0**-20, 2.0**20
    hidden = (torch.arange(3 * width, dtype=torch.float64) % 7 - 3).view(1, 3, width)  # exact in any dtype
    ramp = torch.linspace(-60, 60, v, dtype=torch.float64)
    z = torch.stack([torch.full_like(ramp, tiny), torch.full_like(ramp, huge), ramp])[None]
    there, here = _StandIn(body, _Output((hidden.clone(),))), _StandIn(head, z.clone())
    try:
        with _replaced(model, [(body, there), (head, here)]):
            logits = model.forward(input_ids=torch.zeros(1, 3, dtype=torch.int64), return_dict=True).logits.double()
    except Exception as e:
        refuse(f"{type(model).__name__}.forward cannot be measured ({type(e).__name__}: {e})", e)
    if len(there.asked) != 1 or len(here.asked) != 1:
        refuse(
            f"{type(model).__name__}.forward calls its backbone {len(there.asked)} and its head {len(here.asked)} times"
        )
    seen = here.asked[0].double()
    before = (seen.flatten()[0] / hidden.flatten()[0]).item() if seen.shape == hidden.shape else math.nan
    if not torch.allclose(seen, before * hidden, rtol=1e-6) or not before > 0:
        refuse("the head does not read the backbone's last_hidden_state, there is something in between")
    if before != 1 and linear.bias is not None:
        refuse(f"hidden states are multiplied by {before:g} before a head with a bias")
    valid = logits.shape[-1]
    if logits.shape[:-1] != z.shape[:-1] or valid > v:
        refuse(f"logits have shape {list(logits.shape)} for a head of [1, 3, {v}]")
    scale, top = (logits[0, 0, 0] / tiny).item(), logits[0, 1, 0].item()
    softcap = None if math.isclose(top, scale * huge, rel_tol=1e-6) or not scale > 0 else top / scale
    z = z[..., :valid]
    ours = (z if softcap is None else softcap * torch.tanh(z / softcap)) * scale
    if not scale > 0 or not torch.allclose(logits, ours, rtol=1e-6, atol=0):
        refuse("logits are not softcap * tanh(z / softcap) * scale of what the head returns")
    return softcap and softcap / before, scale * before, None if valid == v else valid


def _opened(x: Any) -> Any:
    """Dataclasses as dicts that keep their class."""
    return {_opened: type(x), **{f.name: _opened(getattr(x, f.name)) for f in fields(x)}} if is_dataclass(x) else x


def _closed(x: Any) -> Any:
    """The inverse of _opened."""
    if not isinstance(x, dict) or _opened not in x:
        return x
    return x[_opened](**{k: _closed(value) for k, value in x.items() if k is not _opened})
