"""This package connects the losses to other libraries.

The rest of fused_losses imports none of its modules, except trl_functions, whose functions it exports.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Raise, and say how a module is imported: they import transformers, datasets or TRL, so none is loaded beforehand."""
    raise AttributeError(f"{__name__} has not loaded {name!r}; write: from {__name__} import {name}")
