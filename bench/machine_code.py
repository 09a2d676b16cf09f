"""The machine-code model: what a launch compiles to, without a GPU.

compiled(target) records every kernel that the launchers would launch inside it, compiled for that target with the very
specialisation (alignment, strides, flags) of the arguments; loops() and nest() find the loops of its machine code
(nvdisasm comes in Triton's wheel), spills() and registers() what it holds. static.py makes a report of them.

An H200 (132 SMs at 1.98 GHz, 4.3 TB/s measured copy bandwidth, 128 issue and 16 special-function lanes a clock and SM)
moves a byte in the time of 7.8 instructions or 0.97 MUFU of one lane.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction, compute_cache_key

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
def _compiling_for(target: str) -> Iterator[None]:
    previous = driver._active
    driver.set_active(_StubDriver(TARGETS[target]))
    try:
        yield
    finally:
        driver._active = previous


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

    with _compiling_for(target), mock.patch.object(JITFunction, "run", warm):
        yield kernels


@contextlib.contextmanager
def keys(target: str) -> Iterator[list[tuple[str, str]]]:
    """Of kernels launched inside, name and the key under which Triton keeps what it compiled; nothing is compiled or run."""
    launched: list[tuple[str, str]] = []

    def note(self, *args, grid, warmup, **kwargs):
        _, key_cache, _, _, binder = self.device_caches[0]
        _, specialization, options = binder(*args, **kwargs)
        launched.append((self.__name__, compute_cache_key(key_cache, specialization, options)))

    with _compiling_for(target), mock.patch.object(JITFunction, "run", note):
        yield launched


class _Nothing:
    """What stands for a compiled kernel: launching it notes its name."""

    function, packed_metadata = 0, ()

    def __init__(self, note: Callable[[], None]):
        self.note = note

    def launch_metadata(self, *args):
        return None

    def run(self, *args):
        self.note()


@contextlib.contextmanager
def launching(target: str) -> Iterator[list[str]]:
    """Kernels launched inside go through Triton's launch path and do nothing; their names are collected."""
    launched: list[str] = []

    def stand_in(self, key, signature, device, *args, **kwargs):
        kernel = _Nothing(lambda: launched.append(self.__name__))
        self.device_caches[device][0][key] = kernel
        return kernel

    with _compiling_for(target), mock.patch.object(JITFunction, "_do_compile", stand_in):
        yield launched


def _tool(cubin: bytes, name: str, *options: str) -> str:
    """What a tool of Triton's wheel says about a binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        return subprocess.run([tool, *options, path], capture_output=True, text=True, check=True).stdout


def _disassemble(kernel) -> str:
    return _tool(kernel.asm["cubin"], "nvdisasm", "-c", "-ndf")


def registers(kernel) -> int:
    """Registers of a thread."""
    if "amdgcn" in kernel.asm:
        return int(re.search(r"\.vgpr_count:\s*(\d+)", kernel.asm["amdgcn"])[1])
    return _usage(kernel, "REG")


def _usage(kernel, resource: str) -> int:
    return int(re.search(rf"{resource}:(\d+)", _tool(kernel.asm["cubin"], "cuobjdump", "-res-usage"))[1])


_LINE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)(.*?);")


def _width(opcode: str) -> int:
    match = re.search(r"\.(128|64|U16|S16|U8|S8|16)\b", opcode)
    return {"128": 128, "64": 64, "U16": 16, "S16": 16, "16": 16, "U8": 8, "S8": 8}[match.group(1)] if match else 32


def _parse(sass: str) -> tuple[list[tuple[str, str]], dict[str, int], list[tuple[int, int]]]:
    """(opcode, operands) of every instruction, what each label points at, and from where to where each loop goes."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"^(\.L_x?_?\d+):", line):
            labels[label.group(1)] = len(code)
        elif instruction := _LINE.match(line):
            code.append((instruction.group(1), instruction.group(2)))
    spans = []
    for i, (opcode, operands) in enumerate(code):
        if opcode.startswith("BRA") and (target := re.search(r"\.L_x?_?\d+", operands)):
            start = labels.get(target.group(0), i + 1)
            if start < i:
                spans.append((start, i + 1))
    return code, labels, spans


def loops(sass: str) -> list[list[str]]:
    """Opcodes of every innermost loop (a backward branch with no other one inside)."""
    code, labels, spans = _parse(sass)
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [_hot(code, labels, *s) for s in inner]


def around(sass: str) -> list[str]:
    """Opcodes of the loop around the first innermost one, without that one, which few steps enter."""
    code, _, spans = _parse(sass)
    start, end = next(s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans))
    first, last = min((s for s in spans if s[0] <= start and end < s[1]), key=lambda s: s[1] - s[0])
    return [op for i, (op, _) in enumerate(code) if first <= i < last and not start <= i < end]


def beside(sass: str) -> int:
    """Instructions that a row needs beside the steps of its loops, at most: every other one, and once what loops skip."""
    return len(_parse(sass)[0]) - sum(map(len, loops(sass)))


def _hot(code: list[tuple[str, str]], labels: dict[str, int], start: int, end: int) -> list[str]:
    """The loop's opcodes without what a conditional forward branch inside it skips: the rare rescaling."""
    kept, i = [], start
    while i < end:
        kept.append(code[i][0])
        target = re.search(r"\.L_x?_?\d+", code[i][1]) if code[i][0].startswith("BRA") else None
        i = labels[target.group(0)] if target and i < labels.get(target.group(0), -1) < end else i + 1
    return kept


def nest(sass: str) -> tuple[list[str], list[list[str]]]:
    """Of a loop around matrix products: the opcodes of a step beside them, and those of every loop of products."""
    code, labels, spans = _parse(sass)

    def has(span: tuple[int, int], name: str) -> bool:
        return any(name in op for op, _ in code[slice(*span)])

    start, end = min(s for s in spans if has(s, "MMA") and has(s, "MUFU"))  # later ones begin where a wait was left
    inner = [s for s in spans if start < s[0] and s[1] < end and has(s, "MMA") and not has(s, "MUFU")]
    step_code = [item for i, item in enumerate(code) if not any(a <= i < b for a, b in inner)]
    moved = lambda i: i - sum(min(max(i - a, 0), b - a) for a, b in inner)  # noqa: E731
    return (
        _hot(step_code, {k: moved(i) for k, i in labels.items()}, moved(start), moved(end)),
        [_hot(code, labels, *s) for s in inner],
    )


def spills(kernel) -> int:
    """Accesses to local memory, or on AMD registers that live there."""
    if "amdgcn" in kernel.asm:
        return int(re.search(r"\.vgpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"])[1])
    if not _usage(kernel, "STACK") and not _usage(kernel, "LOCAL"):
        return 0
    lines = map(_LINE.match, _disassemble(kernel).splitlines())
    return sum(m.group(1).startswith(("LDL", "STL")) for m in lines if m)


# ---- the launches whose code is worth knowing ------------------------------------------------------------------------

STRIDED = ("logps", "both KLs + entropy", "js")
UNALIGNED = ("logps", "both KLs")
INSTRUCTIONS_PER_BYTE, MUFU_PER_BYTE = 7.78, 0.97  # H200, see above


def launches(names: list[str]) -> dict[str, tuple[tuple[str, ...], str, bool]]:
    """workload: (divergences, further sums, reference)."""
    cases: dict = {
        "logps": ((), "", False),
        "logps + entropy": ((), "entropy", False),
        "logps + collision": ((), "collision", False),
        "logps + entropy + collision": ((), "entropy collision", False),
        "logps + ref": ((), "", True),
        "both KLs": (("reverse_kl", "forward_kl"), "", True),
        "both KLs + entropy": (("reverse_kl", "forward_kl"), "entropy", True),
        "both KLs + entropy + collision": (("reverse_kl", "forward_kl"), "entropy collision", True),
    }
    return cases | {name: ((name,), "", True) for name in names}


def compile_workload(
    divergences, sums: str, ref, target: str, vocab: int = 128256, dtype: str = "bfloat16", to_ref=False, strided=False
):
    """(forward kernel, its configuration), (backward kernel, its own) of token_stats on 2-D logits, stored vocabulary first
    where strided."""
    import torch

    from fused_losses import divergences as registry
    from fused_losses.core.layout import Grads, StatsSpec
    from fused_losses.engine.stats_outputs import empty_outputs
    from fused_losses.kernels import configs, launch

    entropy, collision = "entropy" in sums, "collision" in sums
    spec = StatsSpec(registry.parse(divergences), entropy, collision, False, -100, vocab, 0.0, 1.0, 0.0, 1.0)
    z = torch.empty(2, vocab, dtype=getattr(torch, dtype))
    z = z.t().contiguous().t() if strided else z
    w = torch.empty_like(z) if ref else None
    y = torch.zeros(2, dtype=torch.int64)
    g, n = torch.zeros(2), len(spec.divergences)
    grads = Grads(
        logps=g,
        ref_logps=g if to_ref else None,
        entropy=g if entropy else None,
        divergence=torch.zeros(n, 2) if n else None,
    )
    out = empty_outputs(spec, z, 2, w is not None, torch.float32)
    with compiled(target) as kernels:
        launch.forward(spec, z, y, w, out)
        launch.backward(spec, z, y, w, out.saved, grads, torch.empty_like(z), torch.empty_like(z) if to_ref else None)
    config = launch.forward_config(spec, z.dtype)
    return (kernels[0], config), (kernels[1], configs.BACKWARD)


def compile_pairs(target: str) -> list[tuple]:
    """(name, direction, kernel) of the pair kernels of every term of the margin and every f-DPO link."""
    import torch

    from fused_losses import divergences as registry
    from fused_losses.core.layout import PairGrads, PairLossSpec, PairOutputs
    from fused_losses.core.margin_losses import TERMS
    from fused_losses.kernels import launch

    tokens, mask, ref = torch.zeros(64), torch.ones(64, dtype=torch.bool), torch.zeros(64)
    cu = torch.zeros(5, dtype=torch.int64)
    term_links = [(TERMS["sigmoid"], registry.get(name)) for name in registry.linkable()]
    term_links += [(term, registry.get("reverse_kl")) for name, term in TERMS.items() if name != "sigmoid"]
    named_kernels = []
    for number, (term, link) in enumerate(term_links):
        numbers = (0.1,) * (len(inspect.signature(term).parameters) - 1)
        spec = PairLossSpec(link, term, numbers, 0.1, 4, False)
        packed = cu if number % 2 else None
        coef, grads = torch.zeros(4), PairGrads(losses=torch.zeros(2))
        out = PairOutputs(torch.zeros(2), *(torch.zeros(4) for _ in range(3)))
        with compiled(target) as kernels:
            launch.pair_forward(spec, tokens, ref, mask, packed, out)
            launch.pair_backward(spec, grads, coef, mask, packed, tokens, ref)
        name = f"{term.__name__}, {link.key}"
        named_kernels += [(name, *of) for of in zip(("forward", "backward"), kernels, strict=True)]
    return named_kernels
