"""Adapters for packages that are no dependency of the tests: on the package where it is there, on a stand-in in every run."""

import importlib
import sys
from contextlib import contextmanager
from types import ModuleType

import pytest


def module(name, **members):
    """A module of that name with these members."""
    made = ModuleType(name)
    vars(made).update(members)
    return made


@contextmanager
def adapter(name, *modules):
    """fused_losses.integrations.NAME, imported anew beside these modules and the packages around them, and forgotten
    afterwards."""
    ours, before = f"fused_losses.integrations.{name}", dict(sys.modules)
    around = vars(importlib.import_module("fused_losses.integrations"))
    attribute = around.get(name)
    tops = {x.__name__.split(".")[0] for x in modules}
    try:
        for key in [key for key in sys.modules if key.split(".")[0] in tops or key == ours]:
            del sys.modules[key]
        for x in modules:
            parts = x.__name__.split(".")
            for i in range(1, len(parts)):
                parent = sys.modules.setdefault(".".join(parts[:i]), module(".".join(parts[:i]), __path__=[]))
                if i > 1:
                    setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], parent)
            sys.modules[x.__name__] = x
            if len(parts) > 1:
                setattr(sys.modules[x.__name__.rpartition(".")[0]], parts[-1], x)
        yield importlib.import_module(ours)
    finally:
        for key in [key for key in sys.modules if key.split(".")[0] in tops or key == ours]:
            del sys.modules[key]
        around.pop(name, None)
        if attribute is not None:
            around[name] = attribute
        sys.modules.update({key: x for key, x in before.items() if key.split(".")[0] in tops or key == ours})


def real(name):
    """A module of a package, or a skip that says that it cannot be imported."""
    return pytest.importorskip(name, reason=f"{name} cannot be imported", exc_type=ImportError)
