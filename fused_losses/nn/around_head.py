"""What a model's forward does around its backbone and its head, measured on a copy of the model's modules, with stand-ins for
these two: the model itself is not touched, and other threads may run it meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import chain
from types import FunctionType, MethodType
from typing import Any, NamedTuple, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .head_layers import linear_of, replaced_forward
from .stand_ins import Copies, Output, cell_contents


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

    @property
    def options(self) -> dict[str, Any]:
        """The same for the backbone's states."""
        return {"softcap": self.softcap, "scale": self.scale, "valid_vocab": self.valid_vocab}


# Of each model: what its forward may have read by then, and what was measured.
_known: WeakKeyDictionary[nn.Module, tuple[object, Measured]] = WeakKeyDictionary()


def measured(model: nn.Module, whole: bool = True) -> Measured:
    """softcap, scale, valid_vocab of  logits(z) = softcap tanh(z / softcap) * scale  in the columns [:valid_vocab], from
    the model's own forward around a backbone and a head that answer with numbers of our choice. whole: as in linear_of."""
    model = unwrapped(model)
    head = output_head(model)
    if not whole and (found := _still_known(model, head)) is not None:
        return found
    path = type(model).__name__ + "." + next((k for k, m in model.named_modules() if m is head), "head")
    linear = linear_of(head, f"{path} ({type(head).__name__})", adapter=False, whole=whole)
    found = measured_around(model, head, linear, path)
    owned = {id(p) for m in (found.backbone, head) for p in m.parameters()}
    if whole and (beside := [k for k, p in model.named_parameters() if id(p) not in owned]):  # a vision tower
        _refuse(
            path, head, f"{beside[0]} belongs neither to the backbone {type(found.backbone).__name__} nor to the head"
        )
    return found


def output_head(model: nn.Module) -> nn.Module:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if not isinstance(head, nn.Module):
        kind = type(model).__name__
        raise TypeError(f"{kind}: no output head (get_output_embeddings); pass its linear layer: fl.FusedHead(layer)")
    return head


def measured_around(model: nn.Module, head: nn.Module, linear: nn.Linear, path: str) -> Measured:
    """measured, of a model that is unwrapped and this head of it, once as long as nothing has changed that forward may read."""
    if (known := _still_known(model, head)) is not None:
        return known
    probe = _Probe(model, head, linear, path)
    found, learned = probe(lambda x: x)
    changes = probe.that_depend_on(found)
    learned = learned or any(x.requires_grad for x in changes)
    if learned and torch.is_grad_enabled():
        names = " and ".join(_name_of(x, model) for x in changes) or "a tensor that requires grad"
        probe.refuse(
            f"{type(model).__name__}.forward makes logits that depend on {names}, whose gradient would be lost"
        )
    if learned or changes or probe.unclear:  # tensors change in place, and unseen
        _known.pop(model, None)
    else:
        _known[model] = _readable(model, found), found
    return found


def _still_known(model: nn.Module, head: nn.Module) -> Measured | None:
    read, known = _known.get(model, (None, None))
    return known if known is not None and known.head is head and read == _readable(model, known) else None


def _refuse(path: str, head: nn.Module, why: str, cause: Exception | None = None) -> NoReturn:
    raise NotImplementedError(
        f"{path} ({type(head).__name__}): {why}. fl.Hidden cannot stand for it; if you know better: "
        "fl.FusedHead(model.get_output_embeddings(), softcap=..., scale=...)"
    ) from cause


class _Probe:
    """Calls a model's forward around stand-ins; unclear: with other tensors it failed."""

    def __init__(self, model: nn.Module, head: nn.Module, linear: nn.Linear, path: str) -> None:
        self.model, self.head, self.linear, self.path, self.unclear = model, head, linear, path, False
        self.device = linear.weight.device if linear.weight.device.type not in ("meta", "mps") else torch.device("cpu")

    def refuse(self, why: str, cause: Exception | None = None) -> NoReturn:
        _refuse(self.path, self.head, why, cause)

    @torch.no_grad()
    def __call__(self, swap: Callable[[Tensor], Tensor]) -> tuple[Measured, bool]:
        """What is measured where swap(x) is in the place of every tensor x of the model; whether the logits require grad."""
        kind, device, refuse = type(self.model).__name__, self.device, self.refuse
        v, width, tiny, huge = self.linear.out_features, self.linear.in_features, 2.0**-20, 2.0**20
        # exact in bf16
        hidden = (torch.arange(3 * width, dtype=torch.float64, device=device) % 7 - 3).view(1, 3, width)
        ramp = torch.linspace(-60, 60, v, dtype=torch.float64, device=device)
        z = torch.stack([torch.full_like(ramp, tiny), torch.full_like(ramp, huge), ramp])[None]
        copies = Copies(swap)
        bodies = [copies.stand_in(m, Output((hidden.clone(),))) for m in _bodies(self.model)]
        top = copies.stand_in(self.head, z.clone())
        try:
            ids = torch.zeros(1, 3, dtype=torch.int64, device=device)
            with torch.inference_mode(False), torch.enable_grad():
                logits = copies(self.model).forward(input_ids=ids, return_dict=True).logits
            learned, logits = logits.requires_grad, logits.detach().double()
        except Exception as e:
            refuse(f"{kind}.forward does something between backbone and logits ({type(e).__name__}: {e})", e)
        called = [b.original for b in bodies for _ in b.asked]
        if len(called) != 1 or len(top.asked) != 1:
            refuse(f"{kind}.forward calls {len(called)} known backbones and the head {len(top.asked)} times")

        seen, valid = top.asked[0].double(), logits.shape[-1]
        before = (seen.flatten()[0] / hidden.flatten()[0]).item() if seen.shape == hidden.shape else math.nan
        if not before > 0 or not torch.allclose(seen, before * hidden, rtol=1e-6):
            refuse(f"{kind}.forward has something between the backbone's last_hidden_state and the head")
        if before != 1 and self.linear.bias is not None:
            refuse(f"{kind}.forward multiplies by {before:g} before a head with a bias")
        if logits.shape[:-1] != z.shape[:-1] or valid > v:
            refuse(f"{kind}.forward makes logits {list(logits.shape)} of the head's {list(z.shape)}")
        scale, most, z = (logits[0, 0, 0] / tiny).item(), logits[0, 1, 0].item(), z[..., :valid]
        softcap = None if not scale > 0 or math.isclose(most, scale * huge, rel_tol=1e-6) else most / scale
        ours = (z if softcap is None else softcap * torch.tanh(z / softcap)) * scale
        if not scale > 0 or not torch.allclose(logits, ours, rtol=1e-6, atol=0):
            refuse(
                f"{kind}.forward makes logits that are not softcap * tanh(z / softcap) * scale of what the head returns"
            )
        softcap = None if softcap is None else _short(softcap / before)  # f(before z) is such an f, too
        scale, columns = _short(scale * before), None if valid == v else valid
        return Measured(self.path, self.head, called[0], softcap, scale, columns, before), learned

    def that_depend_on(self, found: Measured) -> list[Tensor]:
        """A tensor of the model with which what is measured changes, if there is one."""
        for value in (0.0, 1.0):
            reached: dict[int, Tensor] = {}
            if not self._changes(found, value, reached, None):
                continue
            names = list(reached)
            while len(names) > 1:
                half = names[: len(names) // 2]
                names = half if self._changes(found, value, {}, set(half)) else names[len(half) :]
            return [reached[i] for i in names]
        return []

    def _changes(self, found: Measured, value: float, reached: dict[int, Tensor], only: set[int] | None) -> bool:
        """Whether other numbers in the tensors that forward can reach (`only` these) change what is measured."""

        def other(x: Tensor) -> Tensor:
            reached[id(x)] = x
            return x if only is not None and id(x) not in only else self._filled(x, value)

        try:
            return self(other)[0] != found
        except NotImplementedError as e:
            failed = isinstance(e.__cause__, Exception)
            self.unclear |= failed
            return not failed

    def _filled(self, x: Tensor, value: float) -> Tensor:
        """One number, and no memory for the rest."""
        number = value + 0.37 if x.is_floating_point() else value
        device = self.device if x.device.type == "meta" else x.device
        return torch.tensor(number, device=device).to(x.dtype).expand(x.shape)


def _name_of(x: Tensor, model: nn.Module) -> str:
    own = ((f"{k}.{name}".lstrip("."), y) for k, m in model.named_modules() for name, y in vars(m).items())
    named = chain(model.named_parameters(), model.named_buffers(), own)
    return next((name for name, y in named if y is x), f"a tensor {list(x.shape)}")


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


# ---- what forward may read -----------------------------------------------------------------------------------------------

_PLAIN = bool, int, float, complex, str, bytes, type(None)
_LONG, _DEEP, _MANY = 1000, 6, 10_000  # what is longer, deeper or more is data


def _readable(model: nn.Module, known: Measured) -> object:
    """Numbers, flags and words of a model, its config and its modules outside of backbone and head: two of these are equal as
    long as no such thing has changed. Tensors are not looked at."""
    found: list[Any] = []
    left = [model]
    while left:
        m = left.pop()
        if m is known.head or m is known.backbone:  # whose forward does not run
            found.append((type(m), _plain(vars(m))))
            continue
        left += [x for x in m._modules.values() if x is not None]
        own = {k: x for k, x in list(vars(m).items()) if k not in ("_parameters", "_modules", "_buffers", "forward")}
        own["forward"] = replaced_forward(m)
        children = [(k, id(x)) for k, x in m._modules.items()]
        classes = [_plain(vars(c)) for c in type(m).__mro__ if c not in nn.Module.__mro__]
        found.append((type(m), classes, children, _values(own, 0, set())))
    return found


def _plain(named: Any) -> list[tuple[str, Any]]:
    return [(k, x) for k, x in list(named.items()) if isinstance(x, _PLAIN)]


def _values(x: Any, depth: int, seen: set[int]) -> Any:
    if isinstance(x, _PLAIN):
        return x
    if isinstance(x, Tensor):
        return Tensor
    if isinstance(x, (nn.Module, type)) or depth == _DEEP or id(x) in seen or len(seen) == _MANY:
        return id(x)
    seen.add(id(x))
    inner: list[Any] = []
    if isinstance(x, dict):
        inner = [*x, *x.values()]
    elif isinstance(x, (list, tuple, set, frozenset)):
        inner = [*x]
    elif isinstance(x, partial):
        inner = [x.func, *x.args, *x.keywords.values()]
    elif isinstance(x, MethodType):
        inner = [x.__func__, x.__self__]
    elif isinstance(x, FunctionType):
        inner = [cell_contents(c) for c in x.__closure__ or ()]
    elif hasattr(x, "__dict__"):
        inner = [*vars(x).values()]
    kind = type(x) if inner else id(x)
    return kind, [_values(y, depth + 1, seen) for y in inner[:_LONG]]
