"""Clocks of a device, what it can do at most, and what it is."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import time
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("triton", "numpy", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")


class Clock:
    """Marks in the course of a device's work, `group` to a call, and the seconds between those of one call."""

    def __init__(self, device: torch.device, group: int = 3):
        self.device, self.group, self.marks = device, group, []  # type: ignore[var-annotated]

    def mark(self) -> None:
        if self.device.type == "cpu":
            self.marks.append(time.perf_counter())
        else:
            event = torch.Event(self.device, enable_timing=True)
            event.record()
            self.marks.append(event)

    def flush(self) -> None:
        """Before a call: whatever its inputs left in the GPU's cache makes room."""
        if self.device.type != "cpu":
            _cache_filler(self.device).zero_()

    def seconds(self) -> list[float]:
        synchronize(self.device)
        at = self.marks
        pairs = [(at[i], at[i + 1]) for i in range(len(at) - 1) if (i + 1) % self.group]
        return [b - a if self.device.type == "cpu" else a.elapsed_time(b) / 1e3 for a, b in pairs]


@cache
def _cache_filler(device: torch.device) -> Tensor:
    return torch.empty(256 << 20, dtype=torch.uint8, device=device)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _median_seconds(device: torch.device, run: Any, rounds: int) -> float:
    run()
    clock = Clock(device, group=2)
    for _ in range(rounds):
        clock.mark()
        run()
        clock.mark()
    return median(clock.seconds())


def copy_gb_s(device: torch.device, rounds: int = 5) -> float:
    """GB/s of a large copy within the device's memory: bytes read plus bytes written."""
    size = (256 << 20) if device.type == "cpu" else 4 << 30
    source = torch.randint(-(2**31), 2**31 - 1, (size // 4,), device=device, dtype=torch.int32)  # constants move faster
    target = torch.empty_like(source)
    return 2 * size / _median_seconds(device, lambda: target.copy_(source), rounds) / 1e9


def matrix_gflop_s(device: torch.device, dtype: torch.dtype, rounds: int = 5) -> float:
    """GFLOP/s of a large square matrix product."""
    n = 1536 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _median_seconds(device, lambda: torch.mm(a, b, out=out), rounds) / 1e9


def told(*command: str) -> str:
    """The first line that a command prints, or "unknown"."""
    with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.split("\n")[0].strip() or "unknown"
    return "unknown"


def versions() -> dict[str, str]:
    by_name = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            by_name[name] = importlib.metadata.version(name)
    return by_name


def processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def capability() -> str:
    """The vector instructions that torch's own loops and Inductor's use."""
    return torch.backends.cpu.get_cpu_capability()


def machine_info(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "device": gpu.name if gpu else device.type,
        "processor": processor(),
        "capability": capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "driver": told("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "memory_bytes": gpu.total_memory if gpu else None,
        "multiprocessors": gpu.multi_processor_count if gpu else None,
        "versions": versions(),
    }


def commit_info() -> dict[str, Any]:
    described = told("git", "--no-optional-locks", "describe", "--always", "--dirty", "--exclude=*")
    return {"id": described.removesuffix("-dirty"), "dirty": described.endswith("-dirty")}
