"""The command that measures: python -m bench. First calls, then one case after another; progress, files."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench import clock, results, tables
from bench.grids import GRIDS, label, params_of, plan
from bench.measure import Limits, measure, progress, spread
from bench.providers import Provider, providers
from bench.schedule import FEWEST, Schedule, announcement, of_case, schedule
from bench.warm_up import Kept, Outcome, Task, tasks_of, use_caches, warm_up
from bench.workloads import WORKLOADS, Shape, Workload

RESULTS = clock.ROOT / "bench" / "results"
AT_LEAST = 0.4  # of a limit of time, for first calls: a slow machine is slow in both parts


def header(
    device: torch.device, dtypes: set[str], typed: Sequence[str], busy: int = 0
) -> tuple[dict[str, Any], Limits]:
    copied = clock.copy_gb_s(device)
    limits = Limits(copied, {d: clock.matrix_gflop_s(device, getattr(torch, d)) for d in sorted(dtypes)})
    info = clock.machine_info(device) | {
        "copy_gb_s": copied,
        "matrix_gflop_s": limits.matrix_gflop_s,
        "import_s": import_seconds(),
        "busy": busy,
    }
    report = {
        "machine_info": info,
        "commit_info": clock.commit_info(),
        "benchmarks": [],
        "left_out": [],
        "datetime": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": "1",
        "command": " ".join(["python -m bench", *without_paths(typed)]),
    }
    return report, limits


def without_paths(typed: Sequence[str]) -> list[str]:
    """A command as it may be published, quoted for a shell."""
    paths = {"--out", "--json", "--csv", "--plot"}
    kept = [
        word for before, word in zip(["", *typed], typed, strict=False) if word not in paths and before not in paths
    ]
    return [shlex.quote(word) for word in kept]


def import_seconds() -> float:
    """Of fused_losses beyond torch, in a process of its own."""
    code = "import torch, time; t = time.perf_counter(); import fused_losses; print(time.perf_counter() - t)"
    env = os.environ | {"PYTHONPATH": str(clock.ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd="/")
    return float(done.stdout) if done.returncode == 0 else float("nan")


def entry(w: Workload, shape: Shape, provider: Provider, measured: dict[str, Any]) -> dict[str, Any]:
    """As results.py keeps it."""
    times = measured.pop("seconds")
    about = {"ours": provider.ours, "exact": provider.exact, "source": "hidden" if w.hidden else "logits"}
    both = spread(times)
    about |= {"remark": provider.remarks.get(w.name, ""), "p20": both["p20"], "p80": both["p80"]}
    return results.benchmark(w.name, provider.name, params_of(shape), times, **about, **measured)


def folder_of(args: argparse.Namespace, device: str) -> tuple[Path, str]:
    """Folder and stem of the files."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    if args.save:
        return RESULTS / slug, args.save
    stem = args.grid + ("-busy" if getattr(args, "busy", 0) else "")
    return Path(args.out or os.environ.get("OUT") or clock.ROOT / "bench" / "out") / slug, stem


def listing(device: torch.device) -> None:
    print("workloads")
    for w in WORKLOADS:
        print(f"  {w.name:<28} {w.text}")
    print("providers, and of how many workloads; who cannot run here")
    for p in providers():
        why = [p.why_not(w, device) for w in WORKLOADS]
        able = why.count("")
        print(f"  {p.name:<36} {able or next(t for t in sorted(why, key=len) if t != 'does not do it')}")
    print("grids")
    for name, jobs in GRIDS.items():
        print(f"  {name:<10} " + "; ".join(f"{j.workloads} at {', '.join(map(label, j.shapes))}" for j in jobs))


def parser() -> argparse.ArgumentParser:
    argument_parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    add = argument_parser.add_argument
    add("what", nargs="?", choices=("run", "list"), default="run")
    add("--grid", choices=GRIDS, default="quick", help="default: %(default)s")
    add("--quick", dest="grid", action="store_const", const="quick")
    add("--workloads", nargs="+", help="only those of the grid that match, such as dpo 'logits: *'")
    add("--providers", nargs="+", help="only those that match, such as eager 'fused_losses*'")
    add("--shapes", nargs="+", metavar="ROWSxHIDDENxVOCAB", help="in place of the grid's; ROWSxVOCAB: from logits")
    add("--length", type=int, default=128, help="tokens of a sequence, for --shapes (%(default)s)")
    add("--prompt", type=float, default=0.0, help="share of tokens without a label, for --shapes")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="for --shapes")
    add("--logits", default="random", choices=("random", "peaked"), help="for --shapes")
    add("--rounds", type=int, default=5, help="the fewest of each measurement (%(default)s)")
    add("--seconds", type=float, default=2.0, help="more rounds of a workload for so long (%(default)s)")
    add("--limit", type=float, metavar="S", help="start no measurement after so many seconds")
    add("--threads", type=int, help="of torch on the CPU (default: as it chooses)")
    add(
        "--busy",
        nargs="?",
        type=int,
        const=1,
        default=0,
        metavar="N",
        help="other processes keep N cores busy meanwhile",
    )
    add("--shrink", action="store_true", help="every shape of the grid tiny, to see that all of it runs")
    add("--fresh", action="store_true", help="forget what earlier runs have compiled: first calls of a bare machine")
    add("--no-warm-up", dest="warm_up", action="store_false", help="compile while measuring, one after another")
    add("--process-memory", action="store_true", help="CPU: also by how much the process grows")
    add_outputs(argument_parser)
    return argument_parser


def add_outputs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--save", metavar="NAME", help="into bench/results/<device>/NAME.*, to be committed")
    add("--json", type=Path, metavar="FILE", help="the results there as well")
    add("--csv", type=Path, metavar="FILE", help="and as a table")
    add("--plot", type=Path, metavar="DIR", help="and the pictures")
    add("--out", metavar="DIR", help="or into DIR/<device>/<grid>.* (default: $OUT, else bench/out)")


def written(report: results.Report, args: argparse.Namespace, folder: Path, stem: str) -> list[Path]:
    """All files, written."""
    data, sheets = [folder / f"{stem}.json", args.json], [folder / f"{stem}.csv", args.csv]
    files = [p for p in (*data, *sheets) if p]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        (results.save if path in data else results.write_csv)(path, report)
    try:
        plot = importlib.import_module("bench.plots").plot
    except ImportError as e:
        print(f"no pictures: {e}")
        return files
    return files + [path for where in (folder / stem, args.plot) if where for path in plot(report, where)]


def device_of() -> torch.device:
    """The accelerator that is in use here, or the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


class Watch:
    """Seconds since the start, on every line that goes to stderr where that is no terminal."""

    def __init__(self, limit: float | None) -> None:
        self.start, self.limit = time.monotonic(), limit or math.inf

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    @property
    def left(self) -> float:
        return self.limit - self.seconds

    def line(self, text: str) -> None:
        """A line of a log; a terminal has progress() instead."""
        if not sys.stderr.isatty():
            print(f"[{self.seconds:5.0f} s] {text}", file=sys.stderr, flush=True)


def compile_first(plan: Schedule, kept: Kept, device: torch.device, watch: Watch) -> set[Task]:
    """Make the first calls; those for which there was no time."""
    total = len(plan.first_calls)

    def say(done: int, task: Task, outcome: Outcome) -> None:
        took = "failed" if outcome.seconds is None else f"{outcome.seconds:.1f} s"
        text = f"first call {done}/{total}: {task.provider} at {task.workload} {task.shape}: {took}"
        progress(text)
        if outcome.compiled or outcome.seconds is None or done == total:
            watch.line(text)

    progress(f"first calls: {total}")
    most = max(watch.left - sum(plan.cases), AT_LEAST * watch.limit)
    left = warm_up(plan.first_calls, kept, device, min(most, watch.left), say) if total else []
    progress("")
    return set(left)


def main(argv: Sequence[str]) -> int:
    argument_parser = parser()
    args = argument_parser.parse_args(argv)
    device = device_of()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.what == "list":
        listing(device)
        return 0
    todo = plan(args)
    if not todo:
        print(f"nothing to measure: no workload of the grid {args.grid!r} matches", file=sys.stderr)
        return 2
    watch = Watch(args.limit)
    try:
        kept = Kept(use_caches(args.fresh))
    except ValueError as e:
        argument_parser.error(str(e))
    report, limits = header(device, {s.dtype for _, s, _ in todo}, argv, args.busy)
    folder, stem = folder_of(args, report["machine_info"]["device"])
    tasks = tasks_of(todo, device) if args.warm_up else []
    whole = schedule(todo, tasks, kept, limits, device, args.seconds)
    print(announcement(todo, whole, device, tables.hardware(report), args.limit), file=sys.stderr, flush=True)
    late = {task for task in compile_first(whole, kept, device, watch) if task.slow}
    report["first_calls_s"] = watch.seconds
    for i, (w, shape, who) in enumerate(todo):
        text = f"{i + 1}/{len(todo)} {w.name} {shape}"
        say = lambda what, text=text: progress(f"{text}: {what}")  # noqa: E731
        tasks_here = {p.name: Task(w.name, shape, p.name) for p in who}
        too_late = {p.name: f"{tables.NO_TIME} to compile" for p in who if tasks_here[p.name] in late}
        seconds = {name: s for name, task in tasks_here.items() if (s := kept.seconds(task)) is not None}
        begun, share = watch.seconds, whole.share(i, watch.left)
        if watch.left < 0:
            outcomes: Iterable[tuple[Provider, dict[str, Any] | str]] = [(p, tables.NO_TIME) for p in who]
        else:
            outcomes = measure(
                w,
                shape,
                device,
                who,
                limits,
                seconds=min(args.seconds, share),
                rounds=args.rounds if share >= whole.cases[i] else min(args.rounds, FEWEST),
                most=share,
                process=args.process_memory,
                first_calls=seconds if args.warm_up else {},
                not_now=too_late,
                others=args.busy,
                say=say,
            )
        measured = 0
        for provider, outcome in outcomes:
            if isinstance(outcome, str):
                place = {"group": w.name, "provider": provider.name, "shape": str(shape), "dtype": shape.dtype}
                report["left_out"].append(place | {"logits": params_of(shape)["logits"], "reason": outcome})
            else:
                report["benchmarks"].append(entry(w, shape, provider, outcome))
                measured += 1
        results.save(folder / f"{stem}.json", report)
        if measured:
            kept.cases[of_case(todo[i])] = (watch.seconds - begun) / measured
        watch.line(f"{i + 1}/{len(todo)} {w.name} {label(shape)}")
    progress("")
    kept.save()
    report["machine_info"]["copy_gb_s_at_the_end"] = clock.copy_gb_s(device)
    report["seconds"] = watch.seconds
    tables.print_tables(report)
    for path in written(report, args, folder, stem):
        print(os.path.relpath(path))
    wrong = [
        o
        for o in report["left_out"]
        if o["provider"].startswith("fused_losses") and o["reason"].startswith(("WRONG", "fails"))
    ]
    for o in wrong:
        print(f"{o['group']}: {o['provider']}: {o['reason']}", file=sys.stderr)
    return int(bool(wrong))
