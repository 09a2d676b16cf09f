"""What a run is going to do, how long that takes, and how much of its time each part gets.

An estimate is what an earlier run on this machine took, and before there is one, what follows from the limits that were just
measured: a typical step takes STEP of its limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from bench.grids import label
from bench.measure import Limits
from bench.providers import COMPILING_S, Provider
from bench.warm_up import Kept, Task, processes
from bench.workloads import Shape, Workload

STEP = 2.0
CALLS = 4  # of each provider beside the rounds: the check, one to be warm, two under the profiler's eyes
EACH = 0.4  # seconds of each provider for errors and memory
FOUND = 0.1  # of the time of a compilation, to find again what it made
FEWEST = 3  # rounds where time is short

Case = tuple[Workload, Shape, Sequence[Provider]]


def of_case(case: Case) -> str:
    w, shape, _ = case
    return f"{w.name} | {label(shape)} | {shape.length}"


class Schedule(NamedTuple):
    """cases: seconds of each to be measured. compiling: seconds of the first calls that are left to make."""

    cases: list[float]
    first_calls: list[Task]
    known: int
    compiling: float

    @property
    def seconds(self) -> float:
        return sum(self.cases) + self.compiling

    def share(self, number: int, left: float) -> float:
        """Of the seconds that are left, what the case of that number gets."""
        return left * self.cases[number] / sum(self.cases[number:])


def schedule(
    cases: Sequence[Case], tasks: Sequence[Task], kept: Kept, limits: Limits, device: torch.device, least: float
) -> Schedule:
    """Plan a run.

    Args:
        tasks: all first calls.
        least: seconds that each case is measured for, if it is done sooner.
    """
    todo = [task for task in tasks if kept.seconds(task) is None]
    named = {p.name: p for _, _, who in cases for p in who}
    compiling = sum(named[task.provider].compiling_s for task in todo) / processes(device)
    if todo:
        compiling += 0.5 * COMPILING_S  # for the processes to begin
    return Schedule(
        [_seconds(case, kept, limits, device, least) for case in cases], todo, len(tasks) - len(todo), compiling
    )


def _seconds(case: Case, kept: Kept, limits: Limits, device: torch.device, least: float) -> float:
    w, shape, who = case
    able = [p for p in who if not p.why_not(w, device)]
    if (one := kept.cases.get(of_case(case))) is not None:
        return one * len(able)
    step = STEP * limits.of(w, shape)["limit_s"]
    found = sum(FOUND * p.compiling_s for p in able)
    return max(least, 5 * step * len(able)) + len(able) * (CALLS * step + EACH) + found + 4 * step


def announcement(cases: Sequence[Case], plan: Schedule, device: torch.device, machine: str, limit: float | None) -> str:
    """In three lines what is going to be done, and how long it takes."""
    able = [p.name for w, _, who in cases for p in who if not p.why_not(w, device)]
    lines = [f"{len(cases)} workloads and shapes, {len(able)} measurements of {len(set(able))} providers; {machine}"]
    if not plan.first_calls and not plan.known:
        lines.append("first calls: none before the measurements")
    elif plan.first_calls:
        new = (
            f"{len(plan.first_calls)} that may compile, about {plan.compiling:.0f} s, {processes(device)} side by side"
        )
        again = f"; {plan.known} are known from an earlier run" if plan.known else "; a later run needs none of them"
        lines.append(f"first calls: {new}{again}")
    else:
        lines.append(f"first calls: all {plan.known} are known from an earlier run, so this one is faster")
    minutes = f"about {plan.seconds / 60:.1f} minutes in all"
    if limit:
        minutes += f", at most {limit / 60:.1f}" + (": some has to be left out" if plan.seconds > limit else "")
    lines.append(f"measurements: about {sum(plan.cases):.0f} s; {minutes}")
    return "\n".join(lines)
