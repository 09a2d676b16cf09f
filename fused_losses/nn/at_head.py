"""Run a loss inside a model's own forward, at the point where the model would have made its logits.

Engines (DDP, FSDP, accelerate) act around a module's forward: they gather its weights before it and watch its outputs
after it. Therefore the loss runs inside the forward, on the states that the model itself passes to its head. The model
receives all of its inputs, images too, and its auxiliary loss is returned. This module imports neither transformers nor
peft; it only reads the attributes of their objects.
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
    """Store what at_head returns: the result of the function, and the auxiliary loss of the model."""

    out: Any  # what the function returned
    aux_loss: Tensor | None  # a mixture's load-balancing loss, unweighted, where the model computes it


def at_head(model: nn.Module, function: Callable[[Hidden], Any], *, temperature: float = 1.0, **inputs: Any) -> AtHead:
    """Call the model and run function(source) in place of its head, so that logits are never made.

    source is fl.Hidden of the states that the head receives, with the weights of the head.

        with torch.no_grad():
            ref = fl.at_head(reference, lambda q: fl.token_stats(q, labels, shift=True).logps, **inputs).out
        out, aux = fl.at_head(model, lambda p: fl.dpo_loss(p, labels, fl.LogProbs(ref), shift=True), **inputs)
        (out.loss + coefficient * aux).backward()  # aux_loss: of mixtures with output_router_logits=True, else None

    For a loss of two distributions, nest the calls:
    at_head(teacher, lambda q: at_head(student, lambda p: loss(p, labels, q), ...), ...).

    Forward pre-hooks of the head run. Forward hooks and backward hooks of the head expect logits, so they are refused,
    except those of engines (ENGINES in head_layers.py). A function that replaces the head's own forward is refused too.

    Args:
        model: A transformers model with a linear output head, as fl.find_head takes it; also in DDP, FSDP or PEFT, or
            prepared by accelerate. Its softcap, scale and padded vocabulary are measured, and LoRA on the head is used.
            The model is unchanged after the call. Other threads may call the same model at the same time, by at_head too;
            for them its behaviour does not change.
        function: A function of the source. It returns a tensor, LossOutput, TokenStats, or a dict or tuple of tensors, in
            which engines find the tensors.
        temperature: The temperature of the logits, as in fl.Hidden.
        **inputs: The model's own inputs, without labels. use_cache is False unless given.

    Raises:
        ValueError: For labels among the inputs; where forward does not call the head exactly once; where the model is
            already in another at_head of this thread.
        NotImplementedError: For encoder-decoders, weights sharded by ZeRO-3, a model compiled as a whole, DataParallel
            and prompt learning.

    The errors of find_head are raised too.
    """
    if inputs.get("labels") is not None:
        raise ValueError("labels: go to the loss in `function`, not to the model, which would want logits for them")
    _refuse(model)
    inner = unwrapped(model)
    known = _measure(inner)
    # with a cache, the model would also not detect packed sequences
    if "use_cache" in signature(type(inner).forward).parameters:
        inputs.setdefault("use_cache", False)
    call = _Call(inner, known, function, temperature)
    # accelerate's own hook, which loads offloaded weights, still runs around the forward that it wraps
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
    """Replace a head and its model's forward during one call of at_head."""

    def __init__(
        self, inner: nn.Module, known: Measured, function: Callable[[Hidden], Any], temperature: float
    ) -> None:
        self.inner, self.known, self.function, self.temperature = inner, known, function, temperature
        self.entered, self.running, self.returned = False, False, False
        self.results: list[Any] = []
        self.dtype: torch.dtype | None = None

    def head(self, before: Callable[..., Any], hidden: Tensor, *positional: Any, **named: Any) -> Any:
        """Run the function on the head's input and return its result, with placeholder logits, in a dict."""
        if self.running:  # the loss itself calls the model
            return before(hidden, *positional, **named)
        known = self.known
        if positional or named:  # PEFT's adapter_names: an adapter for each row
            raise ValueError(
                f"{known.path}: was given {', '.join(named) or len(positional)} beside hidden states, expected these alone"
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
        """Store the result of the function and return placeholder logits, with which the model continues.

        An engine that shards the head separately has seen the result by then, because this hook runs last.
        """
        if type(answer) is not dict or answer.get("call") is not self:  # of another thread, or of a call in the loss
            return None
        if self.results:
            raise ValueError(f"model: {type(self.inner).__name__}.forward calls its head twice, expected once")
        self.results.append(answer["out"])
        return answer["logits"]

    def forward(self, before: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run the model's own forward and return the stored result and the auxiliary loss in a dict."""
        if self.entered:
            return before(*args, **options)
        self.entered = True
        try:
            answer = before(*args, **options | {"return_dict": True})
        finally:
            self.entered = False
        if not self.results:
            self._refuse_without()
        self.returned = True
        return {"out": self.results.pop(), "aux_loss": getattr(answer, "aux_loss", None)}

    def wanted_logits(self) -> str | None:
        """Return what may have failed because it received a dict in place of logits, or None where nothing may have."""
        kind = type(self.inner).__name__
        if self.returned:
            return f"a hook or wrapper of {kind} failed on a dict of the loss; expected one that passes on what it is given"
        if self.dtype is not None and not self.results:
            return f"{kind}.forward failed after it had called its head's forward; expected it to call the head, with its hooks"
        return None

    def _refuse_without(self) -> NoReturn:
        raise ValueError(f"model: {type(self.inner).__name__}.forward did not call its head")

    def read(self, answer: Any, model: nn.Module) -> AtHead:
        """Return the result where a wrapper has kept the model's own forward and calls it.

        peft's AdaptionPromptModel does this. In this case the loss has run, and the model has returned its output as if
        the head had returned ones.
        """
        kind, inner, got = type(model).__name__, type(self.inner).__name__, type(answer).__name__
        if self.returned:
            raise ValueError(
                f"model: {kind} returned {got} in place of what {inner}.forward had returned; expected that, unchanged: give "
                f"fl.at_head the {inner}"
            )
        if not self.results:
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
        return AtHead(closed(self.results.pop()), getattr(answer, "aux_loss", None))


def _measure(model: nn.Module) -> Measured:
    """Measure the model, or raise NotImplementedError for an encoder-decoder."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise NotImplementedError(
            f"model: {type(model).__name__} is an encoder-decoder, whose labels are not shifted and whose decoder wants inputs "
            "made of them; run its decoder and pass fl.find_head(model).source(hidden)"
        )
    return measured(model, whole=False)


_lock = Lock()  # held while a forward is replaced or restored, not during calls


@contextmanager
def _in_place(module: nn.Module, mine: Callable[..., Any], name: str, known: Measured) -> Iterator[None]:
    """Replace the module's forward by mine(forward, ...) for this thread, inside the context; keep its hooks."""
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
    """Return a forward that calls the replacement of the current thread, or the module's own where there is none."""
    before = getattr(module, name)
    each: dict[int, Callable[..., Any]] = {}
    # where the module is compiled in place, this function is excluded from compilation
    of_thread = torch.compiler.disable(_of_thread) if "torch._dynamo" in sys.modules else _of_thread

    def forward(*args: Any, **options: Any) -> Any:
        mine = of_thread(each)
        return before(*args, **options) if mine is None else mine(before, *args, **options)

    forward.__dict__.update(mine=each, in_place_of=module.__dict__.get(name))
    return forward


def _of_thread(each: dict[int, Any]) -> Any:
    """Return the entry of the current thread, or None."""
    return each.get(get_ident())


def _refuse(model: nn.Module) -> None:
    """Raise NotImplementedError for wrappers under which a forward cannot be replaced."""
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
