"""Measure what a model's forward does around its backbone and its head: softcap, scale and padding of the vocabulary.

The measurement runs on a copy of the model's modules, in which stand-ins replace backbone and head. The model itself is
not changed, and other threads may run it at the same time.
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
    """Store what was measured on a model's forward.

    softcap and scale apply to the states that the backbone returns; the head itself receives `before` times these states.
    """

    path: str
    head: nn.Module
    backbone: nn.Module
    softcap: float | None
    scale: float
    valid_vocab: int | None
    before: float

    @property
    def at_head(self) -> dict[str, Any]:
        """Return softcap, scale and valid_vocab for the states that the head receives."""
        softcap = None if self.softcap is None else _short(self.softcap * self.before)
        return {"softcap": softcap, "scale": _short(self.scale / self.before), "valid_vocab": self.valid_vocab}

    @property
    def options(self) -> dict[str, Any]:
        """Return softcap, scale and valid_vocab for the states that the backbone returns."""
        return {"softcap": self.softcap, "scale": self.scale, "valid_vocab": self.valid_vocab}


# For each model: the values that its forward could read when it was measured, and the result.
_known: WeakKeyDictionary[nn.Module, tuple[object, Measured]] = WeakKeyDictionary()


def measured(model: nn.Module, whole: bool = True) -> Measured:
    """Measure softcap, scale and valid_vocab of a model, or return the stored result while the model is unchanged.

    They describe  logits(z) = softcap tanh(z / softcap) * scale  in the columns [:valid_vocab]. The model's own forward
    computes these logits around a backbone and a head that return known numbers. whole has the same meaning as in
    linear_of.
    """
    model = unwrapped(model)
    head = output_head(model)
    if not whole and (measurement := _still_known(model, head)) is not None:
        return measurement
    path = type(model).__name__ + "." + next((k for k, m in model.named_modules() if m is head), "head")
    linear = linear_of(head, f"{path} ({type(head).__name__})", adapter=False, whole=whole)
    measurement = measured_around(model, head, linear, path)
    owned = {id(p) for m in (measurement.backbone, head) for p in m.parameters()}
    if whole and (beside := [k for k, p in model.named_parameters() if id(p) not in owned]):  # a vision tower
        _refuse(
            path,
            head,
            f"{beside[0]} belongs neither to the backbone {type(measurement.backbone).__name__} nor to the head",
        )
    return measurement


def output_head(model: nn.Module) -> nn.Module:
    """Return the output head of a model (get_output_embeddings), or raise TypeError where it has none."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if not isinstance(head, nn.Module):
        kind = type(model).__name__
        raise TypeError(f"{kind}: no output head (get_output_embeddings); pass its linear layer: fl.FusedHead(layer)")
    return head


def measured_around(model: nn.Module, head: nn.Module, linear: nn.Linear, path: str) -> Measured:
    """Measure an unwrapped model around this head, or return the stored result while the model is unchanged.

    A result is stored only where it does not depend on tensors of the model, whose changes are not detected.
    """
    if (known := _still_known(model, head)) is not None:
        return known
    probe = _Probe(model, head, linear, path)
    measurement, learned = probe(lambda x: x)
    changes = probe.that_depend_on(measurement)
    learned = learned or any(x.requires_grad for x in changes)
    if learned and torch.is_grad_enabled():
        names = " and ".join(_name_of(x, model) for x in changes) or "a tensor that requires grad"
        probe.refuse(
            f"{type(model).__name__}.forward makes logits that depend on {names}, whose gradient would be lost"
        )
    if learned or changes or probe.unclear:  # tensors can change in place, undetected
        _known.pop(model, None)
    else:
        _known[model] = _readable(model, measurement), measurement
    return measurement


def _still_known(model: nn.Module, head: nn.Module) -> Measured | None:
    """Return the stored result for this head, or None where there is none or the model has changed."""
    read, known = _known.get(model, (None, None))
    return known if known is not None and known.head is head and read == _readable(model, known) else None


def _refuse(path: str, head: nn.Module, why: str, cause: Exception | None = None) -> NoReturn:
    """Raise NotImplementedError for a model whose forward cannot be described by softcap, scale and valid_vocab."""
    raise NotImplementedError(
        f"{path} ({type(head).__name__}): {why}. fl.Hidden cannot stand for it; if you know better: "
        "fl.FusedHead(model.get_output_embeddings(), softcap=..., scale=...)"
    ) from cause


class _Probe:
    """Run a model's forward around stand-ins for its backbone and its head.

    unclear becomes True where the forward failed with other numbers in the model's tensors.
    """

    def __init__(self, model: nn.Module, head: nn.Module, linear: nn.Linear, path: str) -> None:
        self.model, self.head, self.linear, self.path, self.unclear = model, head, linear, path, False
        self.device = linear.weight.device if linear.weight.device.type not in ("meta", "mps") else torch.device("cpu")

    def refuse(self, why: str, cause: Exception | None = None) -> NoReturn:
        """Raise NotImplementedError with the path and the type of the head."""
        _refuse(self.path, self.head, why, cause)

    @torch.no_grad()
    def __call__(self, swap: Callable[[Tensor], Tensor]) -> tuple[Measured, bool]:
        """Measure the model with swap(x) in place of each of its tensors x.

        Return what was measured, and whether the logits require grad.
        """
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

    def that_depend_on(self, baseline: Measured) -> list[Tensor]:
        """Return a list of one tensor of the model that changes what is measured, or an empty list."""
        for value in (0.0, 1.0):
            reached: dict[int, Tensor] = {}
            if not self._changes(baseline, value, reached, None):
                continue
            names = list(reached)
            while len(names) > 1:
                half = names[: len(names) // 2]
                names = half if self._changes(baseline, value, {}, set(half)) else names[len(half) :]
            return [reached[i] for i in names]
        return []

    def _changes(self, baseline: Measured, value: float, reached: dict[int, Tensor], only: set[int] | None) -> bool:
        """Return whether other numbers in the tensors that forward can reach change what is measured.

        `reached` collects these tensors by id. Only tensors whose ids are in `only` get other numbers; None means all of
        them.
        """

        def replaced(x: Tensor) -> Tensor:
            reached[id(x)] = x
            return x if only is not None and id(x) not in only else self._filled(x, value)

        try:
            return self(replaced)[0] != baseline
        except NotImplementedError as e:
            failed = isinstance(e.__cause__, Exception)
            self.unclear |= failed
            return not failed

    def _filled(self, x: Tensor, value: float) -> Tensor:
        """Return a tensor of the shape and dtype of x, which stores a single number."""
        number = value + 0.37 if x.is_floating_point() else value
        device = self.device if x.device.type == "meta" else x.device
        return torch.tensor(number, device=device).to(x.dtype).expand(x.shape)


def _name_of(x: Tensor, model: nn.Module) -> str:
    """Return the name of a tensor in the model, or its shape where it has no name."""
    attributes = ((f"{k}.{name}".lstrip("."), y) for k, m in model.named_modules() for name, y in vars(m).items())
    named = chain(model.named_parameters(), model.named_buffers(), attributes)
    return next((name for name, y in named if y is x), f"a tensor {list(x.shape)}")


def _short(x: float) -> float:
    """Round to 12 significant digits, which removes the rounding error of a measurement."""
    return float(f"{x:.12g}")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of torch.compile, DDP, FSDP, DeepSpeed and PEFT."""
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
    """Return the modules that may be the backbone, outermost first.

    The first of them that forward calls hides the others.
    """
    candidates = [
        getattr(model, getattr(model, "base_model_prefix", "") or "model", None),
        getattr(model, "model", None),
    ]
    decoder = getattr(model, "get_decoder", None)
    if callable(decoder) and not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        candidates.append(decoder())
    return [
        m for i, m in enumerate(candidates) if isinstance(m, nn.Module) and m is not model and m not in candidates[:i]
    ]


# ---- what forward may read -----------------------------------------------------------------------------------------------

_PLAIN = bool, int, float, complex, str, bytes, type(None)
_LONG, _DEEP, _MANY = 1000, 6, 10_000  # longer, deeper or more than this is data


def _readable(model: nn.Module, known: Measured) -> object:
    """Return the numbers, flags and strings of a model, its config and its modules outside of backbone and head.

    Two results are equal as long as none of these values has changed. Tensors are not compared.
    """
    values: list[Any] = []
    left = [model]
    while left:
        m = left.pop()
        if m is known.head or m is known.backbone:  # whose forward does not run
            values.append((type(m), _plain(vars(m))))
            continue
        left += [x for x in m._modules.values() if x is not None]
        attributes = {
            k: x for k, x in list(vars(m).items()) if k not in ("_parameters", "_modules", "_buffers", "forward")
        }
        attributes["forward"] = replaced_forward(m)
        children = [(k, id(x)) for k, x in m._modules.items()]
        classes = [_plain(vars(c)) for c in type(m).__mro__ if c not in nn.Module.__mro__]
        values.append((type(m), classes, children, _values(attributes, 0, set())))
    return values


def _plain(named: Any) -> list[tuple[str, Any]]:
    """Return the names and values of the attributes that are plain numbers, flags or strings."""
    return [(k, x) for k, x in list(named.items()) if isinstance(x, _PLAIN)]


def _values(x: Any, depth: int, seen: set[int]) -> Any:
    """Return a value that compares equal as long as x holds the same plain values."""
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
