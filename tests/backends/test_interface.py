"""All backends have the functions of the interface, with its arguments; each function of the interface is described."""

import inspect

import pytest

from fused_losses.backends import BACKENDS, backend_module
from fused_losses.backends.interface import Backend

FUNCTIONS = {name: f for name, f in vars(Backend).items() if inspect.isfunction(f) and not name.startswith("_")}


def test_the_interface_is_described():
    assert len(FUNCTIONS) >= 14
    assert all(f.__doc__ for f in FUNCTIONS.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments(backend, name):
    """As in the interface, by name and in order, with the same defaults; others have defaults."""
    if backend == "triton":
        pytest.importorskip("triton")
    _, *expected = inspect.signature(FUNCTIONS[name]).parameters.values()
    found = list(inspect.signature(getattr(backend_module(backend), name)).parameters.values())
    same = found[: len(expected)]
    assert [(p.name, p.default) for p in same] == [(p.name, p.default) for p in expected]
    assert all(p.default is not inspect.Parameter.empty for p in found[len(expected) :])


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])  # its launcher has none of tensors
def test_annotations(backend):
    for name, function in FUNCTIONS.items():
        _, *expected = inspect.signature(function).parameters.values()
        found = inspect.signature(getattr(backend_module(backend), name)).parameters.values()
        assert [p.annotation for p in found] == [p.annotation for p in expected], name
