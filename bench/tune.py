"""Other launch configurations, for a person to copy into kernels/configs.py: python -m bench tune [ENTRY ...].

From every entry in use it goes to the best neighbour while that pays: half or twice the lanes, steps and warps, one stage more
or less. A time is the sum of the medians over the workloads that use the entry; a configuration whose values or gradients
fail the gate of measure.py does not count. Results are printed as they come, the best last.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench.clock import Clock
from bench.measure import Run, gate, truth_of
from bench.providers import ours
from bench.workloads import BY_NAME, Problem, Shape
from fused_losses.kernels import configs, launch

WORKLOADS = ("logits: logp + entropy", "logits: forward_kl", "logits: alpha", "logits: js", "logits: tdpo")
SHAPE, DRY = Shape(8192, 512, 0, 151936, "bfloat16"), Shape(8, 4, 0, 517)
ROUNDS = 15
DIRECTIONS = ("forward", "backward")


class Use(NamedTuple):
    """An entry of configs.py at work."""

    workload: str
    direction: int  # 0 forward, 1 backward


@contextmanager
def watched() -> Iterator[list[str]]:
    """The names of the entries that launches inside read, in order."""
    names: list[str] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            entry = getattr(configs, name)
            if isinstance(entry, configs.Config) and names[-1:] != [name]:
                names.append(name)
            return entry

    with mock.patch.object(launch, "configs", Watched()):
        yield names


def uses_of(p: Problem) -> dict[str, list[Use]]:
    uses: dict[str, list[Use]] = {}
    for name in WORKLOADS:
        run = Run(ours("fused_losses"), BY_NAME[name])
        with watched() as forward:
            loss = run.loss(p)
        with watched() as backward:
            loss.backward()
        for direction, names in enumerate((forward, backward)):
            for entry in dict.fromkeys(names):
                uses.setdefault(entry, []).append(Use(name, direction))
    return uses


def neighbours(config: configs.Config) -> list[configs.Config]:
    """Configurations one step away."""
    steps = [("lanes",), ("unroll",), ("warps",), ("lanes", "warps"), ("unroll", "warps")]
    candidates = [config._replace(**{f: int(getattr(config, f) * k) for f in step}) for step in steps for k in (0.5, 2)]
    candidates += [config._replace(lanes=int(config.lanes * k), unroll=int(config.unroll / k)) for k in (0.5, 2)]
    candidates += [config._replace(stages=config.stages + k) for k in (-1, 1)]
    return [c for c in candidates if min(c) >= 1 and c.warps <= 32 and c.stages <= 6 and 1 <= c.per_thread <= 128]


def seconds_of(use: Use, p: Problem, small: Problem, rounds: int) -> float:
    """Median, infinite where the configuration does not compile or is wrong."""
    w = BY_NAME[use.workload]
    run, clock = Run(ours("fused_losses"), w), Clock(p.labels.device)
    try:
        gate(w, run, small, truth_of(w, small))
        for _ in range(rounds):
            clock.flush()
            run.step(p, clock)
    except Exception as e:  # out of registers or shared memory, or wrong: the next one, please
        print(f"  {type(e).__name__}: {' '.join(str(e).split())[:120]}", flush=True)
        return math.inf
    return statistics.median(clock.seconds()[use.direction :: 2])


def climb(
    entry: str, uses: Sequence[Use], p: Problem, small: Problem, rounds: int, until: float
) -> dict[configs.Config, float]:
    """Seconds of every configuration tried."""

    def total(config: configs.Config) -> float:
        with mock.patch.object(configs, entry, config):
            return sum(seconds_of(use, p, small, rounds) for use in uses)

    best = getattr(configs, entry)
    tried = {best: total(best)}
    while fresh := [c for c in dict.fromkeys(neighbours(best)) if c not in tried]:
        for config in fresh:
            if time.monotonic() > until:
                return tried
            tried[config] = total(config)
            print(f"{entry:<18} {1e3 * tried[config]:9.3f} ms  {config}", flush=True)
        leader = min(tried, key=tried.__getitem__)
        if tried[leader] > 0.99 * tried[best]:  # less is noise
            break
        best = leader
    return tried


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench tune", description=__doc__)
    parser.add_argument("entries", nargs="*", help="of kernels/configs.py (default: all that are in use)")
    parser.add_argument("--seconds", type=float, default=500, help="try nothing more after this (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="in Triton's interpreter, tiny, one step")
    args = parser.parse_args(argv)
    if not (args.dry_run or torch.cuda.is_available()):
        print("no GPU that torch can use; --dry-run tries this command without one", file=sys.stderr)
        return 2
    until = time.monotonic() + args.seconds
    shape, rounds = (DRY, 1) if args.dry_run else (SHAPE, ROUNDS)
    p = Problem.random(shape, torch.device("cpu" if args.dry_run else "cuda"))
    small = p.part(2)
    uses = uses_of(p)
    if unknown := set(args.entries) - set(uses):
        parser.error(f"no workload uses {', '.join(sorted(unknown))}; there are {', '.join(uses)}")
    for entry in args.entries or uses:
        now = getattr(configs, entry)
        tried = climb(entry, uses[entry], p, small, rounds, time.monotonic() if args.dry_run else until)
        print(f"\n{entry}: ms over", ", ".join(f"{u.workload} {DIRECTIONS[u.direction]}" for u in uses[entry]))
        for config in sorted(tried, key=tried.__getitem__)[:6]:
            print(f"{1e3 * tried[config]:9.3f}  {config}{'  now' if config == now else ''}")
        print(flush=True)
    return 0
