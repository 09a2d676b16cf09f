"""What a formula calls: found in its bytecode, so that it is said in words before Triton's compiler says it in its own."""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType

from ..core import elementwise

ALLOWED = "call only the functions of core/elementwise.py, + - * / and comparisons, on the formula's own arguments"


def outside_of_elementwise(formula: Callable) -> Iterator[str]:
    """Yield, for each thing in a formula that Triton cannot compile, what it is and what to do.

    Functions of the same file that the formula calls are read too.
    """
    yield from _read(formula, set())


def _read(formula: Callable, known: set[str]) -> Iterator[str]:
    if not isinstance(formula, FunctionType):
        yield f"is a {type(formula).__name__}; write it as a plain function (def) at the top of the file"
        return
    if formula.__name__ == "<lambda>":
        yield "is a lambda, of which Triton finds no source; write it as a plain function (def) at the top of the file"
        return
    code = formula.__code__
    if code.co_freevars:
        names = ", ".join(code.co_freevars)
        yield f"uses {names} of the function around it; pass numbers in `params`, and write the formula at the top of the file"
        return
    for step in dis.get_instructions(code):
        if step.argval in known:
            continue
        if step.opname in ("LOAD_METHOD", "LOAD_ATTR") and not _of_a_module(formula, step.argval):
            known.add(step.argval)
            yield f"uses .{step.argval}, which Triton's numbers do not have; {ALLOWED}"
        elif step.opname == "LOAD_GLOBAL":
            known.add(step.argval)
            yield from _global(formula, step.argval, known)


def _of_a_module(formula: FunctionType, attribute: str) -> bool:
    """Say whether the attribute belongs to a module that the formula names: the module is then what is said."""
    modules = (formula.__globals__.get(name) for name in formula.__code__.co_names)
    return any(isinstance(x, ModuleType) and hasattr(x, attribute) for x in modules)


def _global(formula: FunctionType, name: str, known: set[str]) -> Iterator[str]:
    if name in elementwise.__all__:
        return
    value = formula.__globals__.get(name)
    if isinstance(value, ModuleType):
        used = [x for x in formula.__code__.co_names if x != name and hasattr(value, x)]
        what = f"{name}.{used[0]}" if used else name
        yield f"uses {what}, which Triton does not have; {ALLOWED}"
    elif isinstance(value, FunctionType):
        yield from (f"calls {name}, which {problem}" for problem in _read(value, known))
    elif not isinstance(value, int | float):
        yield f"uses {name}, which Triton does not have; {ALLOWED}"
