"""at_head: a loss inside a model's own forward, where the model would have made its logits.

Engines (DDP, FSDP, accelerate) act around a module's forward: they gather its weights before, watch its outputs after. So the
loss runs in there, with what the model itself feeds to its head: every input that it takes reaches it, images too, and its
auxiliary loss comes back. Duck-typed: neither transformers nor peft is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from .head import Measured, closed, head_source, measured, opened, unwrapped
from .sources import Hidden

__all__ = ["AtHead", "at_head"]

_known: WeakKeyDictionary[nn.Module, tuple[list[Any], Measured]] = WeakKeyDictionary()
_busy: dict[nn.Module, object] = {}  # heads that a loss runs in place of


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
        the call.
    function: returns a tensor, LossOutput, TokenStats, or a dict or tuple of tensors; engines find them there.
    temperature: as in fl.Hidden.
    inputs: the model's own, without labels. use_cache is False unless given.

    Raises as find_head does; ValueError for labels among inputs, where forward does not call the head once, or where the model
    is in another at_head already, of this thread or another; NotImplementedError for encoder-decoders, ZeRO-3's sharded
    weights, a model compiled as a whole, DataParallel and prompt learning.
    """
    if inputs.get("labels") is not None:
        raise ValueError("labels: go to the loss in `function`, not to the model, which would want logits for them")
    _refuse(model)
    inner = unwrapped(model)
    found: list[Any] = []
    known = _measure(inner)
    if (
        "use_cache" in signature(type(inner).forward).parameters
    ):  # with a cache, packed sequences would go unnoticed, too
        inputs.setdefault("use_cache", False)

    def head(hidden: Tensor, *more: Any, **named: Any) -> dict[str, Any]:
        if more or named:  # PEFT's adapter_names: an adapter for each row
            raise ValueError(
                f"{known.path}: was given {', '.join(named) or len(more)} beside hidden states, expected these alone"
            )
        source = head_source(known.head, known.path, hidden, temperature=temperature, **known.at_head)
        return {"out": opened(function(source)), "logits": hidden.new_zeros(*hidden.shape[:-1], 1)}

    def after_all_hooks(module: nn.Module, _: Any, answer: dict[str, Any]) -> Tensor:
        """An engine that shards the head by itself has seen the output; the model goes on with what it takes for logits."""
        if found:
            raise ValueError(f"model: {type(inner).__name__}.forward calls its head twice, expected once")
        found.append(answer["out"])
        return answer["logits"]

    before = inner.forward

    def forward(*args: Any, **options: Any) -> dict[str, Any]:
        answer = before(*args, **options | {"return_dict": True})
        if not found:
            raise ValueError(f"model: {type(inner).__name__}.forward did not call its head")
        return {"out": found.pop(), "aux_loss": getattr(answer, "aux_loss", None)}

    # accelerate's own hook, which fetches weights from where they wait, stays around what it was put around
    name = "_old_forward" if hasattr(known.head, "_hf_hook") else "forward"
    with _alone(known), _replaced(known.head, head, name), _replaced(inner, forward):
        hook = known.head.register_forward_hook(after_all_hooks)
        try:
            answer = model(**inputs)
        finally:
            hook.remove()
    return AtHead(closed(answer["out"]), answer["aux_loss"])


def _measure(model: nn.Module) -> Measured:
    """Once for each head that a model has had, and again where a number has changed that its forward may read."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"model: {type(model).__name__} is an encoder-decoder, whose labels are not shifted and whose decoder wants inputs "
            "made of them; run its decoder and pass fl.find_head(model).source(hidden)"
        )
    parts = [model, config, *(x for x in getattr(config, "__dict__", {}).values() if hasattr(x, "to_dict"))]
    numbers = [(k, x) for p in parts for k, x in getattr(p, "__dict__", {}).items() if type(x) in (int, float)]
    seen, known = _known.get(model, (None, None))
    if known is None or seen != numbers or known.head is not model.get_output_embeddings():  # type: ignore[operator]
        known = measured(model, whole=False)
        _known[model] = numbers, known
    return known


@contextmanager
def _alone(known: Measured) -> Iterator[None]:
    """One at a time: the head's forward is replaced for all who call it."""
    mine = object()
    if _busy.setdefault(known.head, mine) is not mine:
        raise ValueError(
            f"model: {known.path} is in another at_head already, of a loss that calls the same model or of another thread; "
            "what the loss needs of it is to be computed before: q = fl.at_head(model, lambda q: q, **inputs).out"
        )
    try:
        yield
    finally:
        del _busy[known.head]


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any], name: str = "forward") -> Iterator[None]:
    """The module's forward, for a while; hooks around it stay."""
    before = module.__dict__.get(name)
    module.__dict__[name] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before


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
