"""What providers compile, compiled before anything is timed, by processes side by side; python -m bench begins with it.

To compile takes some of them a hundred times as long as to be measured, and one after another that would be most of a
benchmark. So every provider that may compile is called once for each workload and shape, forward and backward, by one of a
few processes that share the compile caches: $TORCHINDUCTOR_CACHE_DIR and $TRITON_CACHE_DIR, or else .bench_cache/.
The seconds of this first call are a result of their own. They are kept beside the caches, with a hash of all that they
depend on, so that the next run calls only what is new to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple

import torch

import fused_losses as fl
from bench import clock
from bench.lifetime import end_with_parent
from bench.measure import Run, gate_sequences
from bench.providers import COMPILING_S, Provider, providers
from bench.workloads import BY_NAME, Problem, Shape, Workload

FOLDER = clock.ROOT / ".bench_cache"
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
MOST_ON_A_CPU, MOST_ON_A_GPU = 8, 4  # processes: each may hold a problem and what eager code makes of it
WAIT = 0.2  # seconds between two looks at the processes
COMPILES = 1.0  # a first call that takes so many seconds longer than the second has compiled something


class Task(NamedTuple):
    workload: str
    shape: Shape
    provider: str

    @property
    def slow(self) -> bool:
        """Whether to compile takes so long that it cannot be done among the measurements."""
        return next(p.compiling_s for p in providers() if p.name == self.provider) >= COMPILING_S

    @property
    def key(self) -> str:
        return " | ".join((self.provider, self.workload, *(str(x) for x in self.shape)))


class Outcome(NamedTuple):
    """seconds: None where the call failed; the reason is found again, and reported, where it is measured."""

    seconds: float | None
    compiled: bool


# ---- what is kept ------------------------------------------------------------------------------------------------------


def use_caches(fresh: bool) -> Path:
    """Choose the compile caches of this process and of those that it starts; return the folder of what is kept here.

    Args:
        fresh: empty .bench_cache/. Folders that the environment names are somebody's own: ValueError.
    """
    ours = {name: str(FOLDER / part) for name, part in CACHES.items()}
    chosen = [name for name, path in ours.items() if os.environ.get(name, path) != path]
    if fresh and chosen:
        raise ValueError(
            f"--fresh: expected no {' and no '.join(chosen)} in the environment: empty these folders yourself"
        )
    if fresh:
        shutil.rmtree(FOLDER, ignore_errors=True)
    os.environ.update({name: path for name, path in ours.items() if name not in chosen})
    return Path(os.environ[chosen[0]]) if chosen else FOLDER


class Kept:
    """Seconds that earlier runs took: of first calls, and of whole cases."""

    def __init__(self, folder: Path):
        self.path = folder / "seconds.json"
        self.first_calls: dict[str, dict[str, Any]] = {}
        self.cases: dict[str, float] = {}
        with contextlib.suppress(OSError, ValueError, KeyError):
            content = json.loads(self.path.read_text("utf-8"))
            self.first_calls, self.cases = content["first_calls"], content["cases"]

    def seconds(self, task: Task) -> float | None:
        """What its first call took, if nothing has changed since."""
        entry = self.first_calls.get(task.key, {})
        return entry.get("seconds") if entry.get("of") == _identity(task.provider) else None

    def keep(self, task: Task, outcome: Outcome) -> None:
        """Where all code was found compiled, the seconds of the call that had compiled it stay."""
        seconds, before = outcome.seconds, self.first_calls.get(task.key, {}).get("seconds")
        if seconds is not None and before is not None and not outcome.compiled:
            seconds = before
        self.first_calls[task.key] = {"seconds": seconds, "of": _identity(task.provider)}

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps({"first_calls": self.first_calls, "cases": self.cases}, indent=1), "utf-8")
        unfinished.replace(self.path)


@cache
def _identity(provider: str) -> str:
    """A hash of what a provider's first call depends on: versions, the machine, and the files that make the call."""
    ours = next(p.ours for p in providers() if p.name == provider)
    package = Path(fl.__file__).parent
    files = sorted(package.rglob("*.py")) + sorted((package / "kernels").glob("*.py")) if ours else []
    files += [Path(__file__).with_name(name) for name in ("providers.py", "workloads.py")]
    machine = (clock.versions(), platform.machine(), clock.processor(), clock.capability(), torch.get_num_threads())
    hashed = hashlib.sha256(repr(machine).encode())
    for path in files:
        hashed.update(path.read_bytes())
    return hashed.hexdigest()[:16]


# ---- a process ---------------------------------------------------------------------------------------------------------


def _work(tasks: Any, outcomes: Any, threads: int, device: str) -> None:
    """Call what is in `tasks`, until None comes."""
    end_with_parent()
    warnings.filterwarnings("ignore")
    nothing = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):  # compilers and peers print
        os.dup2(nothing, output)
    torch.set_num_threads(threads)  # Inductor compiles for a number of threads
    for number, task in iter(tasks.get, None):
        outcomes.put((number, first_call(task, torch.device(device))))
        if device != "cpu":
            torch.accelerator.empty_cache()  # the other processes need it


def first_call(task: Task, device: torch.device) -> Outcome:
    """Call a provider, forward and backward, as measure() will."""
    torch.compiler.reset()
    w = BY_NAME[task.workload]
    provider = next(p for p in providers() if p.name == task.provider)
    provider.prepare()
    missed = _missed()
    try:
        run = Run(provider, w)
        small = task.shape._replace(rows=gate_sequences(task.shape) * task.shape.length)
        p = Problem.random(small, device, w.frozen)
        seconds = [_seconds(run, p, device) for _ in range(2)]
    except Exception:  # whatever a peer may raise
        return Outcome(None, False)
    if small != task.shape and seconds[0] > seconds[1] + COMPILES:
        with contextlib.suppress(Exception):  # it may compile once more for another number of rows, if there is memory
            del p
            _seconds(run, Problem.random(task.shape, device, w.frozen), device)
    return Outcome(seconds[0], device.type != "cpu" or _missed() > missed)


def _seconds(run: Run, p: Problem, device: torch.device) -> float:
    start = time.perf_counter()
    run.step(p)
    clock.synchronize(device)
    return time.perf_counter() - start


def _missed() -> int:
    """How often Inductor has found nothing in its cache, in this process."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["fxgraph_cache_miss"]


# ---- all of them -------------------------------------------------------------------------------------------------------


def tasks_of(cases: Sequence[tuple[Workload, Shape, Sequence[Provider]]], device: torch.device) -> list[Task]:
    """All calls that may compile, the longest first."""
    able = [
        (p.compiling_s, Task(w.name, shape, p.name))
        for w, shape, who in cases
        for p in who
        if p.compiling_s and not p.why_not(w, device)
    ]
    return [task for _, task in sorted(able, key=lambda x: -x[0])]


def processes(device: torch.device) -> int:
    """How many run side by side."""
    able = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_ON_A_CPU if device.type == "cpu" else MOST_ON_A_GPU, able)


def warm_up(
    tasks: Sequence[Task],
    kept: Kept,
    device: torch.device,
    seconds: float,
    say: Callable[[int, Task, Outcome], None] = lambda done, task, outcome: None,
) -> list[Task]:
    """Call all of them and keep their seconds; return those for which there was no time.

    Args:
        seconds: nothing goes on for longer.
        say: called after each, with the number of those that are done.
    """
    until = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    arguments = (inbox, outbox, torch.get_num_threads(), str(device))
    workers = [context.Process(target=_work, args=arguments) for _ in range(min(processes(device), len(tasks)))]
    for item in [*enumerate(tasks), *[None] * len(workers)]:
        inbox.put(item)
    left = dict(enumerate(tasks))
    for worker in workers:
        worker.start()
    try:
        while left and time.monotonic() < until:
            alive = any(worker.is_alive() for worker in workers)
            try:
                number, outcome = outbox.get(timeout=WAIT)
            except Empty:
                if not alive:  # something has ended them, and what they would have said
                    break
                continue
            task = left.pop(number)
            kept.keep(task, outcome)
            say(len(tasks) - len(left), task, outcome)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
        inbox.cancel_join_thread()  # nobody reads the rest
        kept.save()
    return list(left.values())
