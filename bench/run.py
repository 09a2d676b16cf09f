"""The command that measures: python -m bench. Grids, progress, files."""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import clock, results, tables
from bench.measure import Limits, measure, progress, spread
from bench.providers import Provider, providers
from bench.workloads import WORKLOADS, Shape, Workload

RESULTS = clock.ROOT / "bench" / "results"


class Job(NamedTuple):
    """Workloads by name (with * for any letters) on shapes."""

    workloads: str
    shapes: tuple[Shape, ...]
    providers: str = "*"


def _pairs(*grid: tuple[int, int], hidden: int, vocab: int, dtype: str) -> tuple[Shape, ...]:
    """(T, B): B pairs of T tokens, half of them prompt."""
    return tuple(Shape(2 * b * t, t, hidden, vocab, dtype, prompt=0.5) for t, b in grid)


BF16 = "bfloat16"
COMMON = ((4096, 4096, 128256), (8192, 4096, 128256), (8192, 4096, 151936), (8192, 2304, 256000), (16384, 2048, 131072))
SMALL_H = ((8192, 896, 151936), (8192, 1024, 151936), (8192, 2048, 248320))
# Who compiles nothing that takes half a minute.
PLAIN = "eager*,torch linear*,Liger chunked,Liger T*,TRL*,cut-cross-entropy,*filtered,QuACK*,fused*"
SMALL = Shape(512, 128, 256, 16384)
SWEEP = "eager,Liger chunked,TRL*,fused*"
GRIDS: dict[str, list[Job]] = {
    "tiny": [Job("ce,dpo,logits: dpo", (Shape(64, 16, 32, 512),)), Job("logits: forward_kl", (Shape(64, 16, 0, 512),))],
    "quick": [
        Job("ce,dpo,dpo saved,dpo frozen,tdpo,kto,grpo*,jsd,sft + kl", (SMALL,)),
        Job("logits: logp,logits: logp + entropy,logits: forward_kl,logits: js,logits: tdpo", (SMALL._replace(hidden=0),)),
        Job("logits: *", (SMALL._replace(hidden=0),), "eager,fused*"),
        Job("dpo", (SMALL._replace(prompt=0.5), SMALL._replace(logits="peaked")), PLAIN),
        Job("dpo", (SMALL._replace(rows=256), SMALL._replace(rows=1024), SMALL._replace(rows=2048)), SWEEP),
        Job("dpo", (SMALL._replace(vocab=8192), SMALL._replace(vocab=32768)), SWEEP),
    ],
    "full": [Job("dpo,sft + kl,ce", (Shape(4096, 512, 512, 50304),))],
    "common": [
        Job("ce,dpo,dpo frozen,tdpo,jsd,sft + kl*", tuple(Shape(n, 512, h, v, BF16) for n, h, v in COMMON)),
        Job("logits: *", tuple(Shape(8192, 512, 0, v, BF16) for v in (128256, 151936, 248320))),
        Job("dpo,jsd", (Shape(8192, 512, 4096, 128256, BF16, "peaked"),)),
    ],
    "gpu": [  # what matters first: time may run out
        Job("logits: logp + entropy,logits: *_kl,logits: alpha,logits: js,logits: tdpo", (Shape(8192, 512, 0, 151936, BF16),),
            PLAIN),
        Job("ce,dpo,dpo frozen,tdpo,jsd", (Shape(8192, 512, 4096, 128256, BF16),)),
        Job("logits: logp + entropy,logits: forward_kl", tuple(Shape(8192, 512, 0, v, BF16) for v in (128256, 248320)), PLAIN),
        Job("dpo,sft + kl*", (Shape(8192, 512, 1024, 151936, BF16),), PLAIN),
        Job("dpo", _pairs((2048, 4), hidden=4096, vocab=128256, dtype=BF16), PLAIN),
        Job("logits: *", (Shape(8192, 512, 0, 151936, BF16),), "eager,fused_losses"),
        Job("logits: logp + entropy", (Shape(8192, 512, 0, 151936),), PLAIN),
    ],
    "small-h": [Job("dpo,jsd,sft + kl*", tuple(Shape(n, 512, h, v, BF16) for n, h, v in SMALL_H))],
    "pairs": [
        Job("dpo,dpo saved,kto", _pairs(*((t, b) for t in (512, 1024, 2048, 4096) for b in (2, 4, 8, 16)), hidden=4096,
                                        vocab=128256, dtype=BF16)),
    ],
}  # fmt: skip


def matches(name: str, patterns: str | Sequence[str]) -> bool:
    """Patterns, or one text of them with commas between; the case does not matter."""
    parts = patterns.split(",") if isinstance(patterns, str) else patterns
    return any(fnmatch.fnmatchcase(name.lower(), part.strip().lower()) for part in parts)


def shape_of(text: str, length: int, dtype: str, logits: str, prompt: float) -> Shape:
    """4096x512x50304 is rows, hidden, vocabulary; 4096x50304 rows and vocabulary, from logits."""
    sizes = [int(n) for n in text.split("x")] if re.fullmatch(r"\d+(x\d+){1,2}", text) else []
    if not sizes or sizes[0] % (2 * length):
        raise argparse.ArgumentTypeError(
            f"expected ROWSxHIDDENxVOCAB with rows a multiple of 2 x {length}, got {text!r}"
        )
    rows, *middle, vocab = sizes
    return Shape(rows, length, middle[0] if middle else 0, vocab, dtype, logits, prompt)


def plan(args: argparse.Namespace) -> list[tuple[Workload, Shape, list[Provider]]]:
    """What is to be measured, in order."""
    jobs = GRIDS[args.grid]
    if args.shapes:
        shapes = [shape_of(s, args.length, args.dtype, args.logits, args.prompt) for s in args.shapes]
        jobs = [Job("*", tuple(shapes))]
    planned: dict[tuple[str, Shape], tuple[Workload, Shape, list[Provider]]] = {}
    for job in jobs:
        for w in WORKLOADS:
            wanted = matches(w.name, job.workloads) and (not args.workloads or matches(w.name, args.workloads))
            for shape in job.shapes if wanted else ():
                if bool(shape.hidden) == w.hidden:
                    who = [p for p in providers() if p.name == "eager" or matches(p.name, job.providers)]
                    if args.providers:
                        who = [p for p in who if matches(p.name, args.providers)]
                    planned.setdefault((w.name, shape), (w, shape, who))  # jobs may overlap: the first counts
    return list(planned.values())


def header(device: torch.device, dtypes: set[str], typed: Sequence[str]) -> tuple[dict[str, Any], Limits]:
    copied = clock.copy_gb_s(device)
    limits = Limits(copied, {d: clock.matrix_gflop_s(device, getattr(torch, d)) for d in sorted(dtypes)})
    info = clock.machine_info(device) | {
        "copy_gb_s": copied,
        "matrix_gflop_s": limits.matrix_gflop_s,
        "import_s": import_seconds(),
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


def params_of(shape: Shape) -> dict[str, Any]:
    logits = f"{shape.logits}, {shape.prompt:.0%} prompt" if shape.prompt else shape.logits
    return shape._asdict() | {"hidden": shape.hidden or None, "logits": logits}


def label(shape: Shape) -> str:
    return f"{shape} {shape.dtype} {params_of(shape)['logits']}"


def folder_of(args: argparse.Namespace, device: str) -> tuple[Path, str]:
    """Folder and stem of the files."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    if args.save:
        return RESULTS / slug, args.save
    return Path(args.out or os.environ.get("OUT") or clock.ROOT / "bench" / "out") / slug, args.grid


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


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator() or device
        device = torch.device(device.type, torch.accelerator.current_device_index())
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.what == "list":
        listing(device)
        return 0
    todo = plan(args)
    if not todo:
        print(f"nothing to measure: no workload of the grid {args.grid!r} matches", file=sys.stderr)
        return 2
    start = time.monotonic()
    report, limits = header(device, {s.dtype for _, s, _ in todo}, argv)
    folder, stem = folder_of(args, report["machine_info"]["device"])
    for i, (w, shape, who) in enumerate(todo, 1):
        say = lambda text, i=i, w=w, shape=shape: progress(f"{i}/{len(todo)} {w.name} {shape}: {text}")  # noqa: E731
        if args.limit and time.monotonic() - start > args.limit:
            outcomes = [(p, "no time left") for p in who]
        else:
            outcomes = measure(
                w,
                shape,
                device,
                who,
                limits,
                seconds=args.seconds,
                rounds=args.rounds,
                process=args.process_memory,
                say=say,
            )
        for provider, outcome in outcomes:
            if isinstance(outcome, str):
                place = {"group": w.name, "provider": provider.name, "shape": str(shape), "dtype": shape.dtype}
                report["left_out"].append(place | {"logits": params_of(shape)["logits"], "reason": outcome})
            else:
                report["benchmarks"].append(entry(w, shape, provider, outcome))
        results.save(folder / f"{stem}.json", report)
        if not sys.stderr.isatty():
            print(
                f"[{time.monotonic() - start:5.0f} s] {i}/{len(todo)} {w.name} {label(shape)}",
                file=sys.stderr,
                flush=True,
            )
    progress("")
    report["machine_info"]["copy_gb_s_at_the_end"] = clock.copy_gb_s(device)
    report["seconds"] = time.monotonic() - start
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
