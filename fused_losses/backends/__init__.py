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
from . import torch_backend
from .interface import Backend

BACKENDS = ("triton", "torch")
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
    interpreted = os.environ.get("TRITON_INTERPRET", "0") in ("1", "true")
    able = device.type in TRITON_DEVICES or (device.type == "cpu" and interpreted)
    if asked == "torch":
        return "torch", "FUSED_LOSSES_BACKEND=torch"
    if asked == "triton":
        if not INSTALLED:
            raise RuntimeError("FUSED_LOSSES_BACKEND=triton, but the package triton is not installed")
        if not able:
            raise RuntimeError(f"FUSED_LOSSES_BACKEND=triton, but Triton cannot run on {device.type} tensors")
    elif device.type not in TRITON_DEVICES:
        return "torch", f"{device.type} tensors (the interpreter runs only with FUSED_LOSSES_BACKEND=triton)"
    elif not INSTALLED:
        raise RuntimeError(
            f"{device.type} tensors need the package triton; install it, or set FUSED_LOSSES_BACKEND=torch to run without"
        )
    if dtype == torch.float64:
        raise ValueError("float64 logits: the Triton backend accumulates in float32; set FUSED_LOSSES_BACKEND=torch")
    return "triton", "FUSED_LOSSES_BACKEND=triton" if asked else f"{device.type} tensors"


@cache
def backend_module(name: str) -> Backend:
    """Return the module of a backend; the first call for Triton imports its module."""
    if name == "torch":
        return torch_backend
    from ..kernels import launch

    if launch.row_layout.__globals__ is not stats_dtype.__globals__:
        raise RuntimeError(
            f"{PACKAGE}: another copy of the package has taken this one's place in sys.modules, and kernels, which come "
            "with the first call, can no longer be loaded: call the copy that `import` gives now"
        )
    return launch
