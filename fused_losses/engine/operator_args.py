"""Describe the arguments of an operator as a NamedTuple, and convert them to the flat list that torch takes, and back.

Groups of arguments are NamedTuples inside it; a group that may be None must start with a tensor. `Layout(kind)` generates the
schema, and packs and unpacks. The argument of a field is named after the path to it: policy.weight is `policy_weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import chain, count, repeat
from types import NoneType
from typing import Any, Generic, NamedTuple, TypeVar, get_args, get_type_hints

from torch import Tensor

from ..core.divergences import Divergence, from_key
from ..core.layout import SymInt
from ..core.margin_losses import TERMS

T = TypeVar("T")


def _keys(divergences: tuple[Divergence, ...]) -> str:
    return ";".join([d.key for d in divergences])


@lru_cache(256)
def _from_keys(keys: str) -> tuple[Divergence, ...]:
    return tuple(from_key(key) for key in keys.split(";") if key)


def _key(divergence: Divergence) -> str:
    return divergence.key


@lru_cache(256)
def _from_key(key: str) -> Divergence:
    return from_key(key)


def _term_name(term: Callable) -> str:
    return next(name for name, function in TERMS.items() if function is term)


def _term(name: str) -> Callable:
    return TERMS[name]


class Form(NamedTuple):
    """How the value of a field is passed: its type in a schema, and the conversions to that type and back, if any."""

    type: str
    pack: Callable[[Any], Any] | None = None
    unpack: Callable[[Any], Any] | None = None


FORMS: dict[Any, Form] = {
    Tensor: Form("Tensor"),
    bool: Form("bool"),
    int: Form("int"),
    SymInt: Form("SymInt"),
    float: Form("float"),
    str: Form("str"),
    tuple[float, ...]: Form("float[]", list, tuple),
    tuple[Divergence, ...]: Form("str", _keys, _from_keys),
    Divergence: Form("str", _key, _from_key),
    Callable: Form("str", _term_name, _term),
}
OBJECT = Form("")  # of an autograd.Function: no operator takes it
REST = tuple[Tensor, ...]  # the last field may be all further tensors, for an autograd.Function


class Slot(NamedTuple):
    """A field that is one argument."""

    name: str
    form: Form
    optional: bool

    @property
    def tensor(self) -> bool:
        return self.form.type == "Tensor"


class Layout(Generic[T]):
    """The order of the fields of a NamedTuple, and of the groups in it, in a flat list."""

    def __init__(self, kind: type[T], optional: bool = False):
        self.kind = kind
        self.fields: list[tuple[str, Layout | Slot]] = []
        self.variadic = ""
        for name, hint in get_type_hints(kind, include_extras=True).items():
            choices = [x for x in get_args(hint) if x is not NoneType]
            can_be_none = NoneType in get_args(hint)
            hint = choices[0] if can_be_none and len(choices) == 1 else hint
            if hint == REST:
                self.variadic = name
            elif hasattr(hint, "_fields"):
                self.fields.append((name, Layout(hint, optional or can_be_none)))
            else:
                self.fields.append((name, Slot(name, FORMS.get(hint, OBJECT), can_be_none)))
        self.optional = optional
        self.slots = self._slots("")
        scope: dict[str, Any] = {}
        values = self._flattening("args") + (f", *args.{self.variadic}" if self.variadic else "")
        self._flatten = eval(f"lambda args: [{values}]")
        parameters = [f"v{i}" for i in range(len(self.slots))] + ["*rest"] * bool(self.variadic)
        made = self._naming(count(), scope)
        self._name = eval(f"lambda {', '.join(parameters)}: {made}", scope)
        self._packers = [slot.form.pack for slot in self.slots]
        self._unpackers = [slot.form.unpack for slot in self.slots]

    def _slots(self, path: str) -> list[Slot]:
        """Return the slots in their order, named after the path to them."""
        slots: list[Slot] = []
        for name, field in self.fields:
            if isinstance(field, Layout):
                slots += field._slots(f"{path}{name}_")
            else:
                slots.append(field._replace(name=path + name, optional=field.optional or self.optional))
        return slots

    def schema(self, *mutated: str) -> str:
        """Return the arguments as the schema of an operator that writes to those that are named."""

        def one(slot: Slot) -> str:
            if not slot.form.type:
                raise TypeError(f"{slot.name}: no argument of an operator is of its type")
            written = "(a!)" if slot.name in mutated else ""
            return f"{slot.form.type}{written}{'?' * slot.optional} {slot.name}"

        return ", ".join(one(slot) for slot in self.slots)

    # ---- for operators: values are converted ----

    def pack(self, args: T) -> list[Any]:
        """Return the arguments of an operator."""
        pairs = zip(self._packers, self.flat(args), strict=True)
        return [x if convert is None or x is None else convert(x) for convert, x in pairs]

    def unpack(self, values: Iterable[Any]) -> T:
        """Return the arguments of an operator under their names."""
        pairs = zip(self._unpackers, values, strict=True)
        return self.named([x if convert is None or x is None else convert(x) for convert, x in pairs])

    # ---- as they are: for autograd.Function, and for flags and gradients of each argument ----

    def flat(self, args: T) -> list[Any]:
        """Return the values in their order; for a group that is None, None for each of its fields.

        Defaults of the fields would do too, but torch.compile makes an input of a float that it reads from an object.
        """
        return self._flatten(args)

    def named(self, values: Iterable[Any]) -> Any:
        """Return the values under the names of the arguments: those of flat(), or one for each, such as needs_input_grad."""
        return self._name(*values)

    # Both are compiled once from the expressions below, as a NamedTuple compiles its own constructor: they run several times
    # in each call, and loops over fields would take more time than a launch.

    def _flattening(self, value: str) -> str:
        """Return an expression, with commas, for the values of the fields of `value`."""
        listed = ", ".join(
            field._flattening(f"{value}.{name}") if isinstance(field, Layout) else f"{value}.{name}"
            for name, field in self.fields
        )
        return f"*(({'None, ' * len(self.slots)}) if {value} is None else ({listed},))" if self.optional else listed

    def _naming(self, numbers: Iterator[int], scope: dict[str, Any]) -> str:
        """Return an expression for the NamedTuple of the next arguments v0, v1, ..."""
        kind = f"kind_{len(scope)}"
        scope[kind] = self.kind
        items, first = [], ""
        for name, field in self.fields:
            item = field._naming(numbers, scope) if isinstance(field, Layout) else f"v{next(numbers)}"
            first = first or item
            items.append(f"{name}={item}")
        if self.variadic:
            items.append(f"{self.variadic}=rest")
        made = f"{kind}({', '.join(items)})"
        return f"(None if {first} is None else {made})" if self.optional else made

    def gradients(self, **by_name: Any) -> list[Any]:
        """Return for each argument its gradient, which may be given by name, or None.

        The gradients of a group are a NamedTuple or a dict with some of its names.
        """
        gradients: list[Any] = []
        for name, field in self.fields:
            x = by_name.get(name)
            if not isinstance(field, Layout):
                gradients.append(x)
            elif x is None:
                gradients += [None] * len(field.slots)
            else:
                gradients += field.gradients(**(x if isinstance(x, dict) else x._asdict()))
        if self.variadic:
            gradients += by_name[self.variadic]
        return gradients

    def save(self, ctx: Any, args: T) -> None:
        """Save the values in the context of an autograd function, tensors with save_for_backward."""
        kinds = chain((slot.tensor for slot in self.slots), repeat(True))
        tensors: list[Tensor | None] = []
        others: list[Any] = []
        for x, tensor in zip(self.flat(args), kinds, strict=False):
            (tensors if tensor else others).append(x)
        ctx.save_for_backward(*tensors)
        ctx.others = others

    def saved(self, ctx: Any) -> T:
        """Return the values that save() has saved."""
        tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
        values = [next(tensors if slot.tensor else others) for slot in self.slots]
        return self.named([*values, *tensors])
