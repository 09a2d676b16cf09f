"""Choose the backend for a device and a dtype, and explain the choice.

Importing this package imports only torch. Triton is imported with the first call that runs on the Triton backend.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

from ..core.inputs import PACKAGE
from ..core.layout import stats_dtype
from ..core.names import not_one_of
from . import compiled, torch_backend
from .interface import Backend

BACKENDS = ("triton", "torch", "compiled")
TRITON_DEVICES = ("cuda", "xpu")  # ROCm devices are called cuda by torch
INSTALLED = importlib.util.find_spec("triton") is not None  # without importing it


def choose(device: torch.device, dtype: torch.dtype | None = None) -> str:
    """Return the name of the backend for tensors on a device.

    Raise an error if FUSED_LOSSES_BACKEND asks for a backend that cannot run.
    """
    return explain(device, dtype)[0]


def explain(device: torch.device, dtype: torch.dtype | None = None) -> tuple[str, str]:
    """Return the name of the backend and the reason why it was chosen, as text."""
    asked = os.environ.get("FUSED_LOSSES_BACKEND", "")
    if asked and asked not in BACKENDS:
        raise not_one_of("FUSED_LOSSES_BACKEND", asked, BACKENDS)
    if asked:
        why_not = _why_not(asked, device)
        if why_not:
            raise RuntimeError(f"FUSED_LOSSES_BACKEND={asked}, but {why_not}")
        name, reason = asked, f"FUSED_LOSSES_BACKEND={asked}"
    elif device.type in TRITON_DEVICES:
        if not INSTALLED:
            raise RuntimeError(
                f"{device.type} tensors need the package triton; install it, or set FUSED_LOSSES_BACKEND=torch to run "
                "without"
            )
        name, reason = "triton", f"{device.type} tensors"
    elif why_not := _why_not("compiled", device):
        name, reason = "torch", f"{device.type} tensors; {why_not}"
    else:
        name, reason = "compiled", f"{device.type} tensors, with the C++ compiler {compiled.COMPILER}"
    if name == "triton" and dtype == torch.float64:
        raise ValueError("float64 logits: the Triton backend accumulates in float32; set FUSED_LOSSES_BACKEND=torch")
    return name, reason


def _why_not(name: str, device: torch.device) -> str:
    """Return why a backend cannot run on a device, or an empty string."""
    if name == "triton":
        interpreted = os.environ.get("TRITON_INTERPRET", "0") in ("1", "true")
        if not INSTALLED:
            return "the package triton is not installed"
        if device.type not in TRITON_DEVICES and not (device.type == "cpu" and interpreted):
            return f"Triton cannot run on {device.type} tensors"
    if name == "compiled":
        if device.type != "cpu":
            return f"it computes on cpu tensors, and these are {device.type} tensors"
        if compiled.COMPILER is None:
            return "no C++ compiler was found (g++, or the one that CXX names) to compile loops with"
    return ""


@cache
def backend_module(name: str) -> Backend:
    """Return the module of a backend; the first call for Triton imports its module."""
    if name == "torch":
        return torch_backend
    if name == "compiled":
        return compiled
    from ..kernels import launch

    if launch.row_layout.__globals__ is not stats_dtype.__globals__:
        raise RuntimeError(
            f"{PACKAGE}: another copy of the package has taken this one's place in sys.modules, and kernels, which come "
            "with the first call, can no longer be loaded: call the copy that `import` gives now"
        )
    return launch
