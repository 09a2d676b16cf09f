"""The machine-code model: what a launch compiles to, without a GPU.

compiled(target) records every kernel that the launchers would launch inside it, compiled for that target with the very
specialisation (alignment, strides, flags) of the arguments. profile() disassembles one of them (nvdisasm comes in
Triton's wheel) and counts, in the hottest loop: instructions and special-function instructions (MUFU) per vocabulary
entry, the widths of global loads and stores, local-memory spills.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _StubDriver:
    """Enough of a driver to compile for a target; there is no device behind it."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def compiled(target: str) -> Iterator[list]:
    """Kernels launched inside are compiled for the target and collected, not run."""
    kernels: list = []
    run = JITFunction.run

    def warm(self, *args, grid, warmup, **kwargs):
        self.device_caches.clear()  # they are keyed by device, not by target
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append(kernel)
        return kernel

    previous = driver._active
    driver.set_active(_StubDriver(TARGETS[target]))
    try:
        with mock.patch.object(JITFunction, "run", warm):
            yield kernels
    finally:
        driver._active = previous


@dataclass
class Profile:
    """Machine code of one kernel; counts of the hottest loop are per vocabulary entry (a pair counts once)."""

    name: str
    instructions: float
    mufu: float
    loads: Counter  # bits per thread -> count, whole kernel
    stores: Counter
    spills: int
    registers: int
    shared: int


def _disassemble(kernel) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(kernel.asm["cubin"])
        return subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout


_LINE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)(.*?);")


def _width(opcode: str) -> int:
    found = re.search(r"\.(128|64|U16|S16|U8|S8|16)\b", opcode)
    return {"128": 128, "64": 64, "U16": 16, "S16": 16, "16": 16, "U8": 8, "S8": 8}[found.group(1)] if found else 32


def loops(sass: str) -> list[list[str]]:
    """Opcodes of every innermost loop (a backward branch with no other one inside)."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"^(\.L_x?_?\d+):", line):
            labels[label.group(1)] = len(code)
        elif found := _LINE.match(line):
            code.append((found.group(1), found.group(2)))
    spans = []
    for i, (opcode, rest) in enumerate(code):
        if opcode.startswith("BRA") and (target := re.search(r"\.L_x?_?\d+", rest)):
            start = labels.get(target.group(0), i + 1)
            if start < i:
                spans.append((start, i + 1))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [_hot(code, labels, *s) for s in inner]


def _hot(code: list[tuple[str, str]], labels: dict[str, int], start: int, end: int) -> list[str]:
    """The loop's opcodes without what a conditional forward branch inside it skips: the rare rescaling."""
    kept, i = [], start
    while i < end:
        kept.append(code[i][0])
        target = re.search(r"\.L_x?_?\d+", code[i][1]) if code[i][0].startswith("BRA") else None
        i = labels[target.group(0)] if target and i < labels.get(target.group(0), -1) < end else i + 1
    return kept


def profile(kernel, entries_per_thread: int) -> Profile:
    """Counts for the loop with the most MUFU; entries_per_thread = block / (32 warps)."""
    sass = _disassemble(kernel)
    opcodes = [m.group(1) for line in sass.splitlines() if (m := _LINE.match(line))]
    found = loops(sass)
    hot = max(found, key=lambda ops: sum(op.startswith("MUFU") for op in ops), default=[])
    return Profile(
        name=kernel.metadata.name,
        instructions=len(hot) / entries_per_thread,
        mufu=sum(op.startswith("MUFU") for op in hot) / entries_per_thread,
        loads=Counter(_width(op) for op in opcodes if op.startswith(("LDG", "LDGSTS"))),
        stores=Counter(_width(op) for op in opcodes if op.startswith("STG")),
        spills=sum(op.startswith(("LDL", "STL")) for op in opcodes),
        registers=_registers(sass, kernel),
        shared=kernel.metadata.shared,
    )


def _registers(sass: str, kernel) -> int:
    found = re.search(r"EIATTR_REGCOUNT.*?(\d+)", sass) or re.search(r"SHI_REGISTERS=(\d+)", sass)
    return int(found.group(1)) if found else -1
