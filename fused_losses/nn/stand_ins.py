"""Copy a model's modules, with stand-ins for some of them, to run a model's forward without the model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn


class StandIn(nn.Module):
    """Return `answer` in place of a module, still show that module's attributes, and store the inputs of each call."""

    def __init__(self, original: nn.Module, answer: Any, copies: Copies) -> None:
        super().__init__()
        self.__dict__.update(original=original, answer=answer, copies=copies, asked=[], training=original.training)

    def forward(self, *args: Any, **options: Any) -> Any:
        """Store the first input and return the answer."""
        self.asked.append(next(iter((*args, *options.values())), None))
        return self.answer

    def __getattr__(self, name: str) -> Any:
        attributes = self.__dict__
        if "shown" not in attributes:
            attributes["shown"] = attributes["copies"].of(attributes["original"])
        return getattr(attributes["shown"], name)


class Output(tuple):
    """Represent a model output that has a last hidden state and nothing else."""

    last_hidden_state = property(lambda self: self[0])

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class Copies:
    """Make copies of modules that hold the same values, except stand-ins, and swap(x) in place of each tensor x.

    What is bound to a module (a forward on the instance, a hook, a closure) is bound to its copy.
    """

    def __init__(self, swap: Callable[[Tensor], Tensor]) -> None:
        self.swap = swap
        self.made: dict[int, Any] = {}

    def stand_in(self, original: nn.Module, answer: Any) -> StandIn:
        """Return the stand-in for this module, which is made at the first call."""
        return self.made.setdefault(id(original), StandIn(original, answer, self))

    def of(self, module: nn.Module, at: int | None = None) -> nn.Module:
        """Return a copy of a module; at: the id under which the copy is stored before its attributes are copied."""
        new = object.__new__(type(module))
        if at is not None:
            self.made[at] = new
        new.__dict__.update({k: self(x) for k, x in list(module.__dict__.items())})  # other threads may add to it
        return new

    def __call__(self, x: Any) -> Any:
        """Return x, or the copy that replaces it."""
        if id(x) in self.made:
            return self.made[id(x)]
        if isinstance(x, nn.Module):
            return self.of(x, id(x))
        if isinstance(x, Tensor):
            return self.swap(x)
        if type(x) in (dict, OrderedDict):
            return type(x)((k, self(y)) for k, y in list(x.items()))
        if type(x) in (list, tuple):
            return type(x)(self(y) for y in x)
        if isinstance(x, MethodType | partial | FunctionType) or _holds(x):
            self.made[id(x)] = x  # for a function that refers to itself
            self.made[id(x)] = self._function(x)
            return self.made[id(x)]
        return x

    def _function(self, f: Any) -> Any:
        if (compiled := getattr(f, "_torchdynamo_orig_callable", None)) is not None:
            return self(compiled)
        if isinstance(f, partial):
            return partial(self(f.func), *self(f.args), **self(f.keywords))
        if isinstance(f, MethodType):
            owner = self(f.__self__)
            if isinstance(owner, StandIn):
                return getattr(owner, f.__name__)
            return MethodType(self(f.__func__), owner)
        if not isinstance(f, FunctionType):
            return self._callable(f)
        cells = [self._cell(c) for c in f.__closure__ or ()]
        if all(new is old for new, old in zip(cells, f.__closure__ or (), strict=True)):
            return f
        new = FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, tuple(cells))
        new.__kwdefaults__ = f.__kwdefaults__
        return new

    def _callable(self, f: Any) -> Any:
        held = {k: self(x) for k, x in vars(f).items()}
        if all(x is held[k] for k, x in vars(f).items()):
            return f
        new = object.__new__(type(f))
        new.__dict__.update(held)
        return new

    def _cell(self, cell: CellType) -> CellType:
        old = cell_contents(cell)
        new = self(old)
        return cell if new is old else CellType(new)


def _holds(x: Any) -> bool:
    """Return whether x is an object that is called in place of what it holds.

    accelerate uses such an object for mixed precision.
    """
    new: Any = getattr(type(x), "__new__")  # noqa: B009
    return callable(x) and not isinstance(x, type) and hasattr(x, "__dict__") and new is object.__new__


def cell_contents(cell: CellType) -> Any:
    """Return the contents of a closure's cell, or None for an empty cell."""
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None
