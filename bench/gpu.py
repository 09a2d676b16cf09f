"""Everything to be known from a machine with a GPU, in one command of at most ten minutes: make gpu, or python bench/gpu.py.

    1. the test-suite, on the GPU
    2. the grid "gpu": our losses beside every peer that is installed, against this GPU's copy bandwidth and matrix rate
    3. counters of our kernels, where Nsight Compute (ncu) is installed
    4. a summary: the targets, and what is measured

With --training, instead of 2 and 3, whole training steps (bench/training.py; needs transformers and trl).
With --tune, instead of 2 and 3, other launch configurations, for a person to copy into kernels/configs.py (bench/tune.py).
Everything is written under $OUT if that is set, and under bench/results/<device>/ otherwise, the results as they come.
Exit code: 0, 1 if a test or a comparison failed, 2 without a GPU. --dry-run goes through all of it on a CPU, tiny.
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

    def run(self, name: str, command: list[str], limit: float, show: bool = True, fatal: bool = True) -> str:
        """Its output, also in <name>.txt; a line for the summary."""
        limit = min(limit, self.left())
        if limit < 5:
            self.note(f"{name}: no time left")
            return ""
        print(
            f"[{time.monotonic() - self.start:4.0f} s] {name}, at most {limit:.0f} s: {shlex.join(command[1:])}",
            flush=True,
        )
        env = {k: v for k, v in os.environ.items() if k != "OUT"} | {"PYTHONUNBUFFERED": "1"}
        path = self.folder / f"{name}.txt"
        with path.open("w") as file:
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                process.kill()
                code = None
        text = path.read_text(errors="replace").replace(str(ROOT), ".")
        path.write_text(text)
        if show or code:
            print("\n".join(text.splitlines()[-40 if code else -200 :]), flush=True)
        verdict = {0: "passed", None: "out of time"}.get(code, f"FAILED, exit code {code}")
        self.failed |= fatal and code != 0
        self.note(f"{name}: {verdict}" + (f" ({counts})" if (counts := _counts(text)) else ""))
        return text

    def note(self, line: str) -> None:
        self.lines.append(line)


def _counts(text: str) -> str:
    """pytest's."""
    return ", ".join(re.findall(r"\d+ (?:passed|failed|errors?|skipped)\b", text[-300:]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="on the CPU, tiny; no tests unless asked for")
    add("--skip-tests", action="store_true")
    add("--tests", metavar="ARGS", help="arguments of pytest (default: tests)")
    add("--tests-seconds", type=float, default=240, metavar="S", help="limit of the tests (%(default)s)")
    add("--seconds", type=float, default=570, metavar="S", help="limit of everything (%(default)s)")
    add("--grid", default="gpu", help="of python -m bench (%(default)s)")
    add("--training", action="store_true", help="whole training steps, in place of the grid")
    add("--tune", nargs="*", metavar="ENTRY", help="try other configurations, of these or all entries of configs.py")
    args = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        print("this Python has no torch: make gpu GPU_PYTHON=... takes another", file=sys.stderr)
        return 2
    import torch

    if args.dry_run:
        os.environ.setdefault("FUSED_LOSSES_BACKEND", "torch")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif torch.cuda.is_available():
        for name in ("TRITON_INTERPRET", "FUSED_LOSSES_BACKEND"):  # the compiled kernels are to be measured
            os.environ.pop(name, None)
    else:
        print("no GPU that torch can use; --dry-run tries this command without one", file=sys.stderr)
        return 2

    grid = "tiny" if args.dry_run else args.grid
    out = Path(os.environ.get("OUT") or ROOT / "bench" / ("out" if args.dry_run else "results"))
    slug = "cpu" if args.dry_run else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    steps = Steps(out / slug, args.seconds)
    python = sys.executable
    if not (args.skip_tests or (args.dry_run and not args.tests)):
        tests = ["-m", "pytest", *shlex.split(args.tests or "tests"), "-q", "--maxfail=10", "--durations=5", *LEFT_OUT]
        quiet = [
            "-p",
            "no:cacheprovider",
            "-o",
            f"faulthandler_timeout={args.tests_seconds / 2:.0f}",
        ]  # where a test hangs
        steps.run("tests", [python, *tests, *quiet], args.tests_seconds, show=False)
    if args.tune is not None:
        tune = [python, "-m", "bench", "tune", *args.tune, "--seconds", str(max(0, steps.left() - 20))]
        steps.run("tune", [*tune, *(["--dry-run"] if args.dry_run else [])], steps.left())
    elif args.training:
        training = [python, "-m", "bench", "training", "--out", str(out)]
        steps.run("training", [*training, *(["--tiny", "--rounds", "2"] if args.dry_run else [])], steps.left())
    else:
        counters = 45.0 if shutil.which("ncu") else 0.0
        run = [
            python,
            "-m",
            "bench",
            "--grid",
            grid,
            "--out",
            str(out),
            "--limit",
            str(max(5, steps.left() - counters - 30)),
        ]
        steps.run(
            "bench", [*run, *(["--rounds", "2", "--seconds", "0"] if args.dry_run else [])], steps.left() - counters
        )
        if counters:
            small = [
                python,
                "-m",
                "bench",
                "--shapes",
                "4096x151936",
                "--length",
                "512",
                "--dtype",
                "bfloat16",
                "--rounds",
                "1",
            ]
            small += ["--seconds", "0", "--providers", "fused_losses", "--out", str(out / "ncu"), "--workloads"]
            small += ["logits: logp + entropy", "logits: forward_kl", "logits: alpha", "logits: js"]
            ncu = ["ncu", "--metrics", COUNTERS, "-k", KERNELS, "-c", "16", "--csv"]
            steps.run(
                "ncu", [*ncu, *small], counters, fatal=False
            )  # counters need permissions that a container may lack
        targets = [python, "-m", "bench", "targets", str(steps.folder / f"{grid}.json")]
        steps.run("targets", targets, 30)
    print("\nsummary, all of it under", os.path.relpath(steps.folder))
    for line in steps.lines:
        print(" ", line)
    return int(steps.failed)


if __name__ == "__main__":
    sys.exit(main())
