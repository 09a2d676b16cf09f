"""Everything to be known from a machine with a GPU, in one command of at most ten minutes: make gpu, or python bench/gpu.py.

    1. the test-suite, on the GPU
    2. the grid "gpu": our losses beside every peer that is installed, against this GPU's copy bandwidth and matrix rate
    3. counters of our kernels, where Nsight Compute (ncu) is installed
    4. a summary: the targets, and what is measured

With --training, instead of 2 and 3, whole training steps (bench/training.py; needs transformers and trl).
With --tune, instead of 2 and 3, other launch configurations, for a person to copy into kernels/configs.py (bench/tune.py).
Everything is written under $OUT if that is set, and under bench/results/<device>/ otherwise, the results as they come.
Exit code: 0, 1 if a test or a comparison failed, 2 without a GPU.

--dry-run goes through every step on a CPU, tiny, with our kernels in Triton's interpreter (but for the training steps): what
would stop a step on a GPU in its first minute, and is not about the GPU, stops it there.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Against packages that need not be here, or of processes and files: on a CPU.
ON_A_CPU = (
    "against_", "trl_k", "trl_t", "trainer", "engines", "vocab_parallel", "sequence_group", "ranks", "examples", "docs",
    "preference_data", "ref_logps", "bench", "programs", "packaging",
)  # fmt: skip
LEFT_OUT = [f"--ignore-glob=*/test_{name}*" for name in ON_A_CPU]
COUNTERS = (
    "gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__inst_issued.avg.pct_of_peak_sustained_active,"
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active,sm__warps_active.avg.pct_of_peak_sustained_active,"
    "launch__registers_per_thread,launch__occupancy_limit_registers"
)
COUNTING_S, COUNTING_DRY_S = 45.0, 240.0
QUICKLY = ["--rounds", "2", "--seconds", "0"]
KERNELS = "regex:token_stats|tile_sums|fold_slice|add_terms|close_states"


class Steps:
    """Commands one after another, each in a process of its own: what breaks the device must not take the rest along."""

    def __init__(self, folder: Path, seconds: float):
        self.folder, self.start, self.seconds = folder, time.monotonic(), seconds
        self.lines: list[str] = []
        self.failed = False
        folder.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def run(self, command: Command) -> str:
        """Its output, also in <name>.txt; a line for the summary."""
        name, limit = command.name, min(command.limit, self.left())
        if limit < 5:
            self.note(f"{name}: no time left")
            return ""
        passed = time.monotonic() - self.start
        print(f"[{passed:4.0f} s] {name}, at most {limit:.0f} s: {shlex.join(command.arguments)}", flush=True)
        env = {k: v for k, v in os.environ.items() if k != "OUT"} | {"PYTHONUNBUFFERED": "1"} | command.settings
        path = self.folder / f"{name}.txt"
        with path.open("w") as file:
            words = [*command.before, sys.executable, *command.arguments]
            process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                process.kill()
                code = None
        text = path.read_text(errors="replace").replace(str(ROOT), ".")
        path.write_text(text)
        if command.show or code:
            print("\n".join(text.splitlines()[-40 if code else -200 :]), flush=True)
        verdict = {0: "passed", None: "out of time"}.get(code, f"FAILED, exit code {code}")
        self.failed |= command.fatal and code != 0
        self.note(f"{name}: {verdict}" + (f" ({counts})" if (counts := _counts(text)) else ""))
        return text

    def note(self, line: str) -> None:
        self.lines.append(line)


def _counts(text: str) -> str:
    """pytest's."""
    return ", ".join(re.findall(r"\d+ (?:passed|failed|errors?|skipped)\b", text[-300:]))


class Command(NamedTuple):
    """A step: what follows `python`, its share of the time, and whether its failure counts."""

    name: str
    arguments: list[str]
    limit: float
    before: list[str] = []  # what runs it
    settings: dict[str, str] = {}  # of the environment
    show: bool = True
    fatal: bool = True


def tests(args: argparse.Namespace) -> Command:
    """Of a dry run without --tests, what there would be to run."""
    chosen = shlex.split(args.tests or "tests")
    command = ["-m", "pytest", *chosen, "-q", "--maxfail=10", "--durations=5", *LEFT_OUT, "-p", "no:cacheprovider"]
    command += ["-o", f"faulthandler_timeout={args.tests_seconds / 2:.0f}"]  # where a test hangs
    if args.dry_run and not args.tests:
        command += ["--collect-only", "-qq"]
    return Command("tests", command, args.tests_seconds, show=False)


def bench(args: argparse.Namespace, out: Path, left: float) -> Command:
    command = ["-m", "bench", "--grid", args.grid, "--out", str(out), "--limit", str(max(5, left - 30))]
    command += ["--providers", *args.providers] if args.providers else []
    return Command("bench", command + (["--shrink", *QUICKLY] if args.dry_run else []), left)


def counters(args: argparse.Namespace, out: Path) -> Command:
    """Counters need permissions that a container may lack. A dry run runs what would be counted."""
    shape, ncu = ("4096x151936", ["ncu", "--metrics", COUNTERS, "-k", KERNELS, "-c", "16", "--csv"])
    if args.dry_run:
        shape, ncu = "16x517", []
    command = ["-m", "bench", "--shapes", shape, "--length", "8" if args.dry_run else "512", "--dtype", "bfloat16"]
    command += [
        "--providers",
        "fused_losses",
        "--no-warm-up",
        "--rounds",
        "1",
        "--seconds",
        "0",
        "--out",
        str(out / "ncu"),
    ]
    command += ["--workloads", "logits: logp + entropy", "logits: forward_kl", "logits: alpha", "logits: js"]
    limit = COUNTING_DRY_S if args.dry_run else COUNTING_S
    return Command("ncu", command, limit, ncu, fatal=args.dry_run)


def training(args: argparse.Namespace, out: Path, left: float) -> Command:
    """Of a dry run without our kernels: the interpreter would take minutes for the trainers' batches."""
    tiny = ["--tiny", *QUICKLY] if args.dry_run else []
    settings = {"FUSED_LOSSES_BACKEND": "torch"} if args.dry_run else {}
    return Command("training", ["-m", "bench", "training", "--out", str(out), *tiny], left, settings=settings)


def tune(args: argparse.Namespace, left: float) -> Command:
    dry = ["--dry-run"] if args.dry_run else []
    command = ["-m", "bench", "tune", *(args.tune or []), "--seconds", str(max(0, left - 20)), *dry]
    return Command("tune", command, left)


def carry_out(args: argparse.Namespace, steps: Steps, out: Path) -> None:
    """All that was asked for; of a dry run, all that there is."""
    everything = args.dry_run and args.tune is None and not args.training
    if not args.skip_tests:
        steps.run(tests(args))
    if args.tune is None and not args.training:
        counted = COUNTING_S if shutil.which("ncu") or args.dry_run else 0.0
        after = counted + (0.5 * steps.left() if everything else 0)
        steps.run(bench(args, out, steps.left() - after))
        if counted:
            steps.run(counters(args, out))
        report = steps.folder / f"{args.grid}.json"
        steps.run(Command("targets", ["-m", "bench", "targets", str(report)], 60))
    if args.training or everything:
        steps.run(training(args, out, 0.6 * steps.left() if everything else steps.left()))
    if args.tune is not None or everything:
        steps.run(tune(args, steps.left()))


def prepare(dry_run: bool) -> str | None:
    """Settle the environment of all steps; the name of the device for a folder, or None without one."""
    import torch

    for name in ("TRITON_INTERPRET", "FUSED_LOSSES_BACKEND"):  # the compiled kernels are to be measured
        os.environ.pop(name, None)
    if dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        # Where there is Triton, its interpreter goes through our launches and kernels.
        if importlib.util.find_spec("triton"):
            os.environ.update(TRITON_INTERPRET="1", FUSED_LOSSES_BACKEND="triton")
        return "cpu"
    if not torch.cuda.is_available():
        return None
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="every step on the CPU, tiny; of the tests those that --tests names")
    add("--skip-tests", action="store_true")
    add("--tests", metavar="ARGS", help="arguments of pytest (default: tests)")
    add("--tests-seconds", type=float, default=240, metavar="S", help="limit of the tests (%(default)s)")
    add("--seconds", type=float, default=570, metavar="S", help="limit of everything (%(default)s)")
    add("--grid", default="gpu", help="of python -m bench (%(default)s)")
    add("--providers", nargs="+", help="of python -m bench, such as eager 'fused*' (default: all)")
    add("--training", action="store_true", help="whole training steps, in place of the grid")
    add("--tune", nargs="*", metavar="ENTRY", help="try other configurations, of these or all entries of configs.py")
    args = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        print("this Python has no torch: make gpu GPU_PYTHON=... takes another", file=sys.stderr)
        return 2
    device = prepare(args.dry_run)
    if device is None:
        print("no GPU that torch can use; --dry-run tries this command without one", file=sys.stderr)
        return 2
    out = Path(os.environ.get("OUT") or ROOT / "bench" / ("out" if args.dry_run else "results"))
    steps = Steps(out / device, args.seconds)
    carry_out(args, steps, out)
    print("\nsummary, all of it under", os.path.relpath(steps.folder))
    for line in steps.lines:
        print(" ", line)
    return int(steps.failed)


if __name__ == "__main__":
    sys.exit(main())
