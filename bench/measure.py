"""One workload on one shape by many providers: who is right, then how long they take and how much memory.

The gate comes first: a provider's loss and gradients are compared with fused_losses.reference in float64, on the first
sequences of the problem. Who is wrong, fails or cannot run is left out with the reason, and is not timed.
Rounds are interleaved, one call of each provider in turn, so that ratios hold on a machine that others use as well.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fused_losses as fl
from bench.busy import busy
from bench.clock import Clock, synchronize
from bench.providers import Provider
from bench.workloads import Problem, Shape, Workload, compulsory
from fused_losses.cli.memory_probe import peak_bytes

# Relative, for a provider that is exact: rounding of the inputs' products is all that may differ.
TOLERANCE = {"float32": 2e-3, "bfloat16": 1e-1, "float16": 2e-2}
GATE_BYTES = 1 << 28  # of float64 logits of one model


@dataclass
class Limits:
    """What the machine can do, measured in the same run."""

    copy_gb_s: float
    matrix_gflop_s: dict[str, float] = field(default_factory=dict)

    def of(self, w: Workload, shape: Shape) -> dict[str, Any]:
        """Compulsory bytes and flops, and the longer of their times."""
        forward, backward, flops = compulsory(w, shape)
        slow = max((forward + backward) / self.copy_gb_s, flops / self.matrix_gflop_s[shape.dtype]) / 1e9
        return {"bytes": forward + backward, "bytes_forward": forward, "flops": flops, "limit_s": slow}


def gate_sequences(shape: Shape) -> int:
    """As many sequences as float64 has room for."""
    return min(shape.rows // shape.length, max(2, int(GATE_BYTES / (8 * shape.vocab * shape.length)) // 2 * 2))


def truth_of(w: Workload, p: Problem) -> list[Tensor]:
    """The loss and its gradients in float64."""
    p = p.double()
    loss = w.ours(fl.reference, p, {})
    return [loss.detach(), *torch.autograd.grad(loss, p.leaves)]


def errors(values: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, float]:
    """Relative, of the loss and of the worst gradient."""
    each = [((x.double() - t).norm() / t.norm().clamp(min=1e-300)).item() for x, t in zip(values, truth, strict=True)]
    return {
        "value": each[0],
        "gradient": max(each[1:], key=lambda e: e if e == e else float("inf")),
    }  # NaN is the worst


def gate(w: Workload, run: Run, p: Problem, truth: Sequence[Tensor]) -> dict[str, float]:
    """Its errors; raises ValueError if it is wrong."""
    loss = run.step(p)
    relative_errors = errors([loss.detach(), *(x.grad for x in p.leaves)], truth)
    tolerance = TOLERANCE[str(p.policy_tensors[0].dtype)[6:]] * (1 if run.provider.exact else 10)
    if any(not e <= tolerance for e in relative_errors.values()):  # NaN is wrong too
        raise ValueError(
            "WRONG: relative error " + ", ".join(f"{e:.1e} of the {n}" for n, e in relative_errors.items())
        )
    return relative_errors


class Run:
    """A provider at a workload."""

    def __init__(self, provider: Provider, w: Workload):
        self.provider, self.loss = provider, provider.loss(w)
        self.forward: list[float] = []
        self.backward: list[float] = []
        self.result: dict[str, Any] = {}

    def step(self, p: Problem, clock: Clock | None = None) -> Tensor:
        for x in p.leaves:
            x.grad = None
        if clock:
            clock.mark()
        loss = self.loss(p)
        if clock:
            clock.mark()
        loss.backward()
        if clock:
            clock.mark()
        return loss


def measure(
    w: Workload,
    shape: Shape,
    device: torch.device,
    chosen: Sequence[Provider],
    limits: Limits,
    *,
    seconds: float = 5.0,
    rounds: int = 5,
    most: float = math.inf,
    process: bool = False,
    first_calls: Mapping[str, float] | None = None,
    not_now: Mapping[str, str] | None = None,
    others: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[Provider, dict[str, Any] | str]]:
    """A result or a reason for each provider, in the order of `chosen`.

    Args:
        rounds: the fewest; more for so many `seconds`.
        most: seconds after which no further round begins, however few there were.
        process: also by how much the process grows.
        first_calls: seconds of the first calls that another process has made, by provider: what they compiled is found here.
        not_now: reasons not to run a provider, by name.
        others: processors that other processes keep busy while this is timed.
    """
    first_calls, not_now = first_calls or {}, not_now or {}
    torch.compiler.reset()  # or it gives up on functions that it has compiled for eight workloads
    p = Problem.random(shape, device, w.frozen)
    few = gate_sequences(shape)
    small = p if few == len(p.labels) else p.part(few)
    reasons: dict[str, str] = {}
    runs: list[Run] = []
    say("float64")
    truth = truth_of(w, small)
    for provider in chosen:
        if why := provider.why_not(w, device) or not_now.get(provider.name, ""):
            reasons[provider.name] = why
            continue
        say(f"checks {provider.name}")
        provider.prepare()
        try:
            run = Run(provider, w)
            start = time.perf_counter()
            run.result["error"] = gate(w, run, small, truth)
            synchronize(device)
            here, elsewhere = time.perf_counter() - start, first_calls.get(provider.name)
            run.result["first_call_s"] = here if elsewhere is None else elsewhere
            run.result["first_call_compiled_s"] = None if elsewhere is None else here
            run.step(p)  # warm
            runs.append(run)
        except Exception as e:  # whatever a peer may raise belongs in the table
            reasons[provider.name] = reason(e)
    del truth, small
    with busy(others):
        _time(runs, p, device, seconds, rounds, most, say)
    gradients = sum(x.nbytes for x in p.leaves)
    inputs = sum(x.nbytes for x in (*p.policy_tensors, *(p.ref_tensors if w.ref else ())))
    eager = next((r.result["error"] for r in runs if r.provider.name == "eager"), None)
    limit = limits.of(w, shape)
    for provider in chosen:
        run_of = next((r for r in runs if r.provider is provider), None)
        if run_of is None:
            yield provider, reasons[provider.name]
            continue
        say(f"memory of {provider.name}")
        peak = memory(run_of, p)
        both = [f + b for f, b in zip(run_of.forward, run_of.backward, strict=True)]
        yield (
            provider,
            run_of.result
            | {
                "seconds": both,
                "forward": spread(run_of.forward),
                "backward": spread(run_of.backward),
                "peak_bytes": peak - gradients,
                "peak_total": peak + inputs,
                "process_peak": process_peak(lambda run=run_of: run.step(p))
                if process and device.type == "cpu"
                else None,
                "eager_error": eager,
                "fraction": limit["limit_s"] / statistics.median(both),
            }
            | limit,
        )


def _time(
    runs: Sequence[Run], p: Problem, device: torch.device, seconds: float, rounds: int, most: float, say: Callable
) -> None:
    clocks = [Clock(device) for _ in runs]
    start, done = time.perf_counter(), 0

    def again() -> bool:
        passed = time.perf_counter() - start
        return done == 0 or (passed < most and (done < rounds or (passed < seconds and done < 100)))

    with quiet_collector():
        while runs and again():
            for run, clock in zip(runs, clocks, strict=True):
                say(f"round {done + 1}, {run.provider.name}")
                clock.flush()
                run.step(p, clock)
            done += 1
    for run, clock in zip(runs, clocks, strict=True):
        times = clock.seconds()  # of three marks a round: two spans
        run.forward, run.backward = times[0::2], times[1::2]


def memory(run: Run, p: Problem) -> int:
    """Most bytes allocated at once beyond the inputs, gradients included."""
    for x in p.leaves:
        x.grad = None
    return peak_bytes(lambda: run.step(p))


def process_peak(step: Callable[[], object]) -> int | None:
    """By how much the process's resident memory grows at most (Linux): what allocators keep and BLAS packs is in it."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak is from now on
        before = _status("VmRSS")
        step()
        return _status("VmHWM") - before
    return None


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))


def spread(times: Sequence[float]) -> dict[str, float]:
    fifths = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else list(times) * 4
    return {"median": statistics.median(times), "p20": fifths[0], "p80": fifths[3]}


def reason(e: Exception) -> str:
    if isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e):
        return "out of memory"
    text = " ".join(str(e).split())
    return text[:150] if text.startswith("WRONG") else f"fails: {type(e).__name__}: {text}"[:200]


@contextmanager
def quiet_collector() -> Iterator[None]:
    """Python's garbage collector runs before, not in the middle; what peers import is not looked through again and again."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text[:110]:<110}\r", end="", file=sys.stderr, flush=True)
