"""at_head: a loss inside a model's own forward, where the model would have made its logits.

Engines (DDP, FSDP, accelerate) act around a module's forward: they gather its weights before, watch its outputs after. So the
loss runs in there, with what the model itself feeds to its head: every input that it takes reaches it, images too, and its
auxiliary loss comes back. Duck-typed: neither transformers nor peft is imported.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from threading import Lock, get_ident
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ..core.inputs import Hidden
from .around_head import Measured, measured, unwrapped
from .fused_head import closed, head_source, opened

__all__ = ["AtHead", "at_head"]


class AtHead(NamedTuple):
    out: Any  # what the function returned
    aux_loss: Tensor | None  # a mixture's load-balancing loss, unweighted, where the model computes it


def at_head(model: nn.Module, function: Callable[[Hidden], Any], *, temperature: float = 1.0, **inputs: Any) -> AtHead:
    """Calls model(**inputs), and in it function(source) in place of its head, with source = fl.Hidden of the states that the
    head was given and of its weights: logits are never made.

        with torch.no_grad():
            ref = fl.at_head(reference, lambda q: fl.token_stats(q, labels, shift=True).logps, **inputs).out
        out, aux = fl.at_head(model, lambda p: fl.dpo_loss(p, labels, fl.LogProbs(ref), shift=True), **inputs)
        (out.loss + coefficient * aux).backward()  # aux_loss: of mixtures with output_router_logits=True, else None

    A loss of two distributions nests: at_head(teacher, lambda q: at_head(student, lambda p: loss(p, labels, q), ...), ...).

    model: a transformers model with a linear output head, as fl.find_head takes it: softcap, scale and padded vocabulary are
        measured, LoRA on the head is used; in DDP, FSDP or PEFT, or prepared by accelerate. Nothing of it is changed after
        the call. Other threads may call the same model meanwhile, by at_head too: for them it is as ever.
    function: returns a tensor, LossOutput, TokenStats, or a dict or tuple of tensors; engines find them there.
    temperature: as in fl.Hidden.
    inputs: the model's own, without labels. use_cache is False unless given.

    Forward pre-hooks of the head run. Forward hooks and backward hooks of it are for logits, so they are refused, but for those
    of engines (ENGINES in head_layers.py); so is a forward that was put in the place of its own.

    Raises as find_head does; ValueError for labels among inputs, where forward does not call the head once, or where the model
    is in another at_head of this thread already; NotImplementedError for encoder-decoders, ZeRO-3's sharded weights, a model
    compiled as a whole, DataParallel and prompt learning.
    """
    if inputs.get("labels") is not None:
        raise ValueError("labels: go to the loss in `function`, not to the model, which would want logits for them")
    _refuse(model)
    inner = unwrapped(model)
    known = _measure(inner)
    # with a cache, packed sequences would go unnoticed, too
    if "use_cache" in signature(type(inner).forward).parameters:
        inputs.setdefault("use_cache", False)
    call = _Call(inner, known, function, temperature)
    # accelerate's own hook, which fetches weights from where they wait, stays around what it was put around
    name = "_old_forward" if "_hf_hook" in known.head.__dict__ else "forward"
    with _in_place(known.head, call.head, name, known), _in_place(inner, call.forward, "forward", known):
        hook = known.head.register_forward_hook(call.after_all_hooks)
        try:
            answer = model(**inputs)
        except Exception as e:
            if why := call.wanted_logits():
                raise ValueError(f"model: {why} ({type(e).__name__}: {e})") from e
            raise
        finally:
            hook.remove()
    if type(answer) is dict and answer.keys() == {"out", "aux_loss"}:
        return AtHead(closed(answer["out"]), answer["aux_loss"])
    return call.read(answer, model)


class _Call:
    """What runs in place of a head and of its model's forward, in one call of at_head."""

    def __init__(
        self, inner: nn.Module, known: Measured, function: Callable[[Hidden], Any], temperature: float
    ) -> None:
        self.inner, self.known, self.function, self.temperature = inner, known, function, temperature
        self.entered, self.running, self.returned = False, False, False
        self.found: list[Any] = []
        self.dtype: torch.dtype | None = None

    def head(self, before: Callable[..., Any], hidden: Tensor, *more: Any, **named: Any) -> Any:
        if self.running:  # the loss calls the model, too
            return before(hidden, *more, **named)
        known = self.known
        if more or named:  # PEFT's adapter_names: an adapter for each row
            raise ValueError(
                f"{known.path}: was given {', '.join(named) or len(more)} beside hidden states, expected these alone"
            )
        source = head_source(known.head, known.path, hidden, temperature=self.temperature, **known.at_head)
        self.running = True
        try:
            out = opened(self.function(source))
            self.dtype = hidden.dtype
            return {"call": self, "out": out, "logits": hidden.new_ones(*hidden.shape[:-1], 1)}
        finally:
            self.running = False

    def after_all_hooks(self, module: nn.Module, _: Any, answer: Any) -> Tensor | None:
        """An engine that shards the head by itself has seen the output; the model goes on with what it takes for logits."""
        if type(answer) is not dict or answer.get("call") is not self:  # of another thread, or of a call in the loss
            return None
        if self.found:
            raise ValueError(f"model: {type(self.inner).__name__}.forward calls its head twice, expected once")
        self.found.append(answer["out"])
        return answer["logits"]

    def forward(self, before: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if self.entered:
            return before(*args, **options)
        self.entered = True
        try:
            answer = before(*args, **options | {"return_dict": True})
        finally:
            self.entered = False
        if not self.found:
            self._refuse_without()
        self.returned = True
        return {"out": self.found.pop(), "aux_loss": getattr(answer, "aux_loss", None)}

    def wanted_logits(self) -> str | None:
        """Who has failed because it was given a dict of the loss, if that may be."""
        kind = type(self.inner).__name__
        if self.returned:
            return f"a hook or wrapper of {kind} failed on a dict of the loss; expected one that passes on what it is given"
        if self.dtype is not None and not self.found:
            return f"{kind}.forward failed after it had called its head's forward; expected it to call the head, with its hooks"
        return None

    def _refuse_without(self) -> NoReturn:
        raise ValueError(f"model: {type(self.inner).__name__}.forward did not call its head")

    def read(self, answer: Any, model: nn.Module) -> AtHead:
        """Of a wrapper that has kept the model's own forward and calls that, as peft's AdaptionPromptModel does: the loss has
        run, and the model's output came back as if the head had given ones."""
        kind, inner, got = type(model).__name__, type(self.inner).__name__, type(answer).__name__
        if self.returned:
            raise ValueError(
                f"model: {kind} returned {got} in place of what {inner}.forward had returned; expected that, unchanged: give "
                f"fl.at_head the {inner}"
            )
        if not self.found:
            self._refuse_without()
        logits = getattr(answer, "logits", None)
        if not isinstance(logits, Tensor) or self.dtype is None:
            raise ValueError(
                f"model: {kind} calls a forward of {inner} that it has kept, and returned {got}, in which an auxiliary loss "
                "would not be found; expected a model output with logits, as with return_dict=True"
            )
        softcap, scale = self.known.at_head["softcap"], self.known.at_head["scale"]
        one = scale * (1.0 if softcap is None else softcap * math.tanh(1 / softcap))
        if not ((logits.double() / one - 1).abs() <= 1e-6 + 8 * torch.finfo(self.dtype).eps).all():
            raise ValueError(
                f"model: {kind} changes the logits that {inner}.forward returns; give fl.at_head the {inner}"
            )
        return AtHead(closed(self.found.pop()), getattr(answer, "aux_loss", None))


def _measure(model: nn.Module) -> Measured:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise NotImplementedError(
            f"model: {type(model).__name__} is an encoder-decoder, whose labels are not shifted and whose decoder wants inputs "
            "made of them; run its decoder and pass fl.find_head(model).source(hidden)"
        )
    return measured(model, whole=False)


_lock = Lock()  # around what is put in and taken out, not around calls


@contextmanager
def _in_place(module: nn.Module, mine: Callable[..., Any], name: str, known: Measured) -> Iterator[None]:
    """mine(the module's forward, ...) as its forward, for this thread and a while; hooks around it stay."""
    thread = get_ident()
    with _lock:
        stands: Any = module.__dict__.get(name)
        if not hasattr(stands, "in_place_of"):
            stands = module.__dict__[name] = _by_thread(module, name)
        if thread in stands.mine:
            raise ValueError(
                f"model: {known.path} is in another at_head already, of a loss that calls the same model; what the loss needs "
                "of it is to be computed before: q = fl.at_head(model, lambda q: q, **inputs).out"
            )
        stands.mine[thread] = mine
    try:
        yield
    finally:
        with _lock:
            del stands.mine[thread]
            last = not stands.mine and module.__dict__.get(name) is stands
            if last and stands.in_place_of is None:
                del module.__dict__[name]
            elif last:
                module.__dict__[name] = stands.in_place_of


def _by_thread(module: nn.Module, name: str) -> Any:
    """A forward that each thread may have another of; the module's own for all others."""
    before = getattr(module, name)
    each: dict[int, Callable[..., Any]] = {}
    # a module that is compiled in place is compiled but for this
    of_thread = torch.compiler.disable(_of_thread) if "torch._dynamo" in sys.modules else _of_thread

    def forward(*args: Any, **options: Any) -> Any:
        mine = of_thread(each)
        return before(*args, **options) if mine is None else mine(before, *args, **options)

    forward.__dict__.update(mine=each, in_place_of=module.__dict__.get(name))
    return forward


def _of_thread(each: dict[int, Any]) -> Any:
    return each.get(get_ident())


def _refuse(model: nn.Module) -> None:
    """Wrappers under which a forward cannot be replaced."""
    wrapper: Any = model
    while isinstance(wrapper, nn.Module):
        kind = type(wrapper).__name__
        if hasattr(wrapper, "_orig_mod"):
            raise NotImplementedError(
                f"model: {kind} is compiled as a whole; compile its backbone alone, model.model.compile(), and the loss stays "
                "outside"
            )
        if kind == "DataParallel":
            raise NotImplementedError("model: DataParallel copies the module; use DistributedDataParallel")
        wrapper = getattr(wrapper, "module", None)
