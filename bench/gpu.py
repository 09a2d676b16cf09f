"""Everything to be known from a machine with a GPU, in one command of a few minutes: make gpu, or python bench/gpu.py.

    1. the test-suite, on the GPU
    2. the copy bandwidth of this GPU, the ceiling that times are compared with
    3. times of token_stats, forward and backward, each only after its values and gradients have been compared with
       the float64 reference on the very tensors that are timed; and of the eager and the compiled code it replaces
    4. whole losses from hidden states, next to their bare matrix products and to the peers that are installed
       (bench/from_hidden.py, in a file of its own)
    5. with --tune, instead of 3 and 4: other launch configurations, for a person to copy into kernels/configs.py

fraction = compulsory bytes / time / copy bandwidth. Compulsory: each logit read once, each gradient written once, also
for the divergences that read the logits twice. The tensors are far larger than any cache, so no inputs are rotated.
Results go to bench/results/<device>/<date>-<commit>.json, and under $OUT as well if that is set.
Exit code: 0, 1 if a test or a comparison failed, 2 without a GPU. --dry-run goes through all of it on a CPU, tiny.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

# Last, so that no folder of this repository hides an installed package.
sys.path.append(str(Path(__file__).resolve().parent.parent))
if importlib.util.find_spec("torch") is None:
    print("this Python has no torch: make gpu GPU_PYTHON=... takes another", file=sys.stderr)
    sys.exit(2)

import torch
from torch import Tensor

import fused_losses as fl
from bench import timing
from bench.timing import DIRECTIONS, Report
from fused_losses.backend import choose

ROOT = Path(__file__).resolve().parent.parent
VALUE_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-3}  # the most that rounding to bfloat16 can do


class Workload(NamedTuple):
    """What is asked of token_stats."""

    name: str
    divergence: tuple[str, ...] = ()
    entropy: bool = False
    ref: bool = False

    def bytes(self, direction: str, logits: Tensor) -> int:
        """Compulsory: z and w are read; backward reads w for divergences only, and writes dz."""
        passes = 1 + self.ref if direction == "forward" else 2 + bool(self.divergence)
        return passes * logits.nbytes


KLS = ("reverse_kl", "forward_kl")
LOGP_ENTROPY, BOTH_KLS = Workload("logp+entropy", entropy=True), Workload("logp+ref+kls", KLS, ref=True)
ALL_IN_ONE = Workload("logp+ref+kls+entropy", KLS, entropy=True, ref=True)
EVERY = {name: Workload(name, (name,), ref=True) for name in fl.divergences.names()}
TUNED = (LOGP_ENTROPY, ALL_IN_ONE, EVERY["alpha"], EVERY["js"])
MAIN = (Workload("logp"), Workload("logp+ref", ref=True), BOTH_KLS, *TUNED)

Stats = dict[str, Tensor]


class Inputs(NamedTuple):
    z: Tensor  # policy logits [rows, V], which want a gradient
    w: Tensor  # reference logits, which do not
    labels: Tensor

    @classmethod
    def random(cls, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Inputs:
        """A policy near its reference; as many rows as fit, with room for the gradient and one tensor more."""
        rows = timing.rows_that_fit(device, 4 * vocab * dtype.itemsize, rows)
        z, w = (torch.empty(rows, vocab, dtype=dtype, device=device) for _ in range(2))
        w.normal_(0, 0.3).add_(z.normal_(0, 3))
        return cls(z.requires_grad_(), w, torch.randint(0, vocab, (rows,), device=device))


def stats_of(library: Any, workload: Workload, z: Tensor, labels: Tensor, w: Tensor | None) -> Stats:
    """By fused_losses, or by fused_losses.reference."""
    stats = library.token_stats(z, labels, w, divergence=workload.divergence or None, entropy=workload.entropy)
    named = {"logps": stats.logps, "ref_logps": stats.ref_logps, "entropy": stats.entropy} | stats.divergence
    return {name: x for name, x in named.items() if x is not None}


def plain_stats(log_softmax: Callable[[Tensor], Tensor], workload: Workload) -> Callable[..., Stats]:
    """The code that token_stats replaces; in float32, as it must be to be as accurate."""

    def stats(z: Tensor, labels: Tensor, w: Tensor | None) -> Stats:
        log_p = log_softmax(z.float())
        found = {"logps": log_p.gather(-1, labels[:, None]).squeeze(-1)}
        if workload.entropy:
            found["entropy"] = -(log_p.exp() * log_p).sum(-1)
        if w is not None:
            log_q = log_softmax(w.float())
            found["ref_logps"] = log_q.gather(-1, labels[:, None]).squeeze(-1)
            found["reverse_kl"] = (log_p.exp() * (log_p - log_q)).sum(-1)
            found["forward_kl"] = (log_q.exp() * (log_q - log_p)).sum(-1)
        return found

    return stats


@contextlib.contextmanager
def config_in_use(device: torch.device) -> Iterator[dict[str, Any]]:
    """Becomes the entry of kernels/configs.py that a launch inside uses: the last one that it reads."""
    config: dict[str, Any] = {}
    if choose(device) == "torch":
        yield config
        return
    from fused_losses.kernels import configs, launch

    class Watched:
        def __getattr__(self, name: str) -> Any:
            entry = getattr(configs, name)
            if isinstance(entry, configs.Config):
                config.update({"name": name, **entry._asdict()})
            return entry

    with mock.patch.object(launch, "configs", Watched()):
        yield config


def errors(workload: Workload, inputs: Inputs, outputs: Stats, upstream: Stats, dz: Tensor) -> dict[str, float]:
    """|ours - truth| / |truth| on four rows, of the worst value and of the gradient; NaN if there is one in any row."""
    rows = torch.linspace(0, len(inputs.z) - 1, 4, device=dz.device).long()
    z, w = (x.detach()[rows].double() for x in inputs[:2])
    truth = stats_of(fl.reference, workload, z.requires_grad_(), inputs.labels[rows], w if workload.ref else None)
    pulled = [truth[name] for name in upstream]
    gradient = torch.autograd.grad(pulled, z, [g[rows].double() for g in upstream.values()])[0]

    def error(ours: Tensor, true: Tensor) -> float:
        finite = ours.sum(-1, dtype=torch.float32).isfinite().all()
        return ((ours[rows].double() - true).norm() / true.norm()).item() if finite else math.nan

    values = torch.tensor([error(outputs[name].detach(), truth[name].detach()) for name in truth])
    return {"forward": values.max().item(), "backward": error(dz, gradient)}  # max() hands a NaN on


def measure(
    report: Report, workload: Workload, inputs: Inputs, provider: str = "fused_losses",
    call: Callable[..., Stats] | None = None, directions: tuple[str, ...] = DIRECTIONS,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row for each direction: compared with the reference, then timed if values and gradient are right."""
    call = call or partial(stats_of, fl, workload)
    z, labels, w = inputs.z, inputs.labels, inputs.w if workload.ref else None
    device = z.device
    upstream: Stats = {}

    def forward() -> Stats:
        return call(z, labels, w)

    def backward(outputs: Stats) -> Tensor:
        return torch.autograd.grad([outputs[name] for name in upstream], z, list(upstream.values()))[0]

    def first_calls() -> dict[str, dict[str, Any]]:
        torch.full_like(z, math.nan)  # freed at once: what nobody writes of the gradient stays NaN
        memory = timing.PeakMemory(device)
        with config_in_use(device) as config:
            outputs, seconds = timing.seconds_of(forward, device)
        found = {"forward": {"first_call_s": seconds, "config": config or None}}
        upstream.update({name: torch.randn_like(x) for name, x in outputs.items() if name != "ref_logps"})
        with config_in_use(device) as config:
            dz, seconds = timing.seconds_of(partial(backward, outputs), device)
        found["backward"] = {"first_call_s": seconds, "config": config or None}
        peak, error = memory.bytes(), errors(workload, inputs, outputs, upstream, dz)
        return {d: row | {"error": error[d], "peak_bytes": peak} for d, row in found.items()}

    what = {"provider": provider, "workload": workload.name, "rows": z.shape[0], "vocab": z.shape[1]}
    rows = [what | {"dtype": str(z.dtype)[6:], "direction": direction, "failed": None} for direction in directions]
    try:
        timing.release_memory(device)
        first = first_calls()
        allowed = {"forward": VALUE_TOLERANCE, "backward": GRADIENT_TOLERANCE[z.dtype]}
        over = [f"{d} error {first[d]['error']:.1e}" for d in DIRECTIONS if not first[d]["error"] <= allowed[d]]
        for row in rows:
            direction = row["direction"]
            row |= first[direction] | {"failed": ", ".join(over) or None}
            if over:
                continue
            ms = timing.timed(device, *((forward,) if direction == "forward" else (backward, forward)))
            row |= {"ms": ms.median, "ms_p20": ms.p20, "ms_p80": ms.p80, "host_ms": ms.host, "repeats": ms.repeats}
            row["bytes"] = workload.bytes(direction, z)
            row["gb_s"] = row["bytes"] / ms.median / 1e6
            row["fraction"] = row["gb_s"] / report.header["copy_gb_s"]
    except Exception as problem:  # whatever one kernel does wrong, the other measurements go on
        text = " ".join(f"{type(problem).__name__}: {problem}".split())[:500]
        rows = [row if "fraction" in row else row | {"failed": text} for row in rows]
    for row in rows:
        report.add(row)
    timing.release_memory(device)  # raises if the device has become unusable: then nothing more can be measured
    return rows


def baselines(report: Report, inputs: Inputs) -> None:
    device, (rows, vocab) = inputs.z.device, inputs.z.shape
    rows = timing.rows_that_fit(device, 16 * 4 * vocab, rows)  # up to 16 float32 temporaries
    inputs = Inputs(inputs.z.detach()[:rows].requires_grad_(), inputs.w[:rows], inputs.labels[:rows])
    for workload in (LOGP_ENTROPY, BOTH_KLS):
        eager = plain_stats(lambda x: x.log_softmax(-1), workload)
        plain = plain_stats(lambda x: x - x.logsumexp(-1, keepdim=True), workload)
        compiled = torch.compile(plain, dynamic=False, backend="inductor" if device.type == "cuda" else "eager")
        for name, call in (("eager", eager), ("compiled", compiled)):
            if not report.out_of_time(f"{name} {workload.name}"):
                measure(report, workload, inputs, name, call)


def benchmark(report: Report, rows: int, vocabs: tuple[int, int, int], device: torch.device) -> None:
    """The middle vocabulary first and in full: time may run out."""
    small, middle, large = vocabs
    full = tuple(dict.fromkeys((*MAIN, *EVERY.values())))
    bf16, fp32 = torch.bfloat16, torch.float32
    for vocab, dtype, workloads in (middle, bf16, full), (small, bf16, MAIN), (large, bf16, MAIN), (middle, fp32, MAIN):
        inputs = Inputs.random(rows, vocab, dtype, device)
        for workload in workloads:
            if not report.out_of_time(f"{workload.name}, {dtype}, V={vocab}"):
                measure(report, workload, inputs)
        if workloads is full:
            baselines(report, inputs)
        del inputs


def neighbours(config: Any) -> list[Any]:
    """Configurations one step away."""
    steps = [("lanes",), ("unroll",), ("warps",), ("lanes", "warps"), ("unroll", "warps")]
    found = [config._replace(**{f: int(getattr(config, f) * k) for f in step}) for step in steps for k in (0.5, 2)]
    found += [config._replace(lanes=int(config.lanes * k), unroll=int(config.unroll / k)) for k in (0.5, 2)]
    found += [config._replace(stages=config.stages + k) for k in (-1, 1)]
    return [c for c in found if min(c) >= 1 and c.warps <= 32 and c.stages <= 6 and 1 <= c.per_thread <= 128]


def tune(report: Report, inputs: Inputs, only: list[str]) -> None:
    """From every entry in use, goes to the best neighbour while that pays. A time is the sum over the entry's uses."""
    uses: dict[str, list[tuple[Workload, str, float]]] = {}
    for workload in TUNED:
        for row in measure(report, workload, inputs):
            if row.get("config") and not row["failed"]:
                uses.setdefault(row["config"]["name"], []).append((workload, row["direction"], row["ms"]))
    if unknown := set(only) - set(uses):
        report.say(f"no workload uses {', '.join(unknown)}; there are {', '.join(uses) or 'none'}")
    for name in [name for name in uses if not only or name in only]:
        from fused_losses.kernels import configs

        best = start = getattr(configs, name)
        used, tried = uses[name], {start: sum(ms for _, _, ms in uses[name])}
        while fresh := [c for c in dict.fromkeys(neighbours(best)) if c not in tried]:
            for candidate in fresh:
                if report.out_of_time(f"{name} = {candidate}"):
                    break
                tried[candidate] = 0.0
                for workload, direction, _ in used:
                    with mock.patch.object(configs, name, candidate):
                        row = measure(report, workload, inputs, "candidate", directions=(direction,))[0]
                    tried[candidate] += math.inf if row["failed"] else row["ms"]
            leader = min(tried, key=tried.__getitem__)
            if tried[leader] > 0.99 * tried[best]:  # less is noise
                break
            best = leader
        print(f"\n{name}: ms over", ", ".join(f"{workload.name} {direction}" for workload, direction, _ in used))
        for config in sorted(tried, key=tried.__getitem__)[:6]:
            print(f"{tried[config]:9.3f}  {config}{'  now' if config == start else ''}")
        print(f"best: {name} = {best}\n", flush=True)
        report.header.setdefault("tuned", {})[name] = best._asdict()


def run_tests(report: Report, arguments: str, limit: float) -> bool:
    """In a process of its own: a kernel that breaks the device must not take the measurements along."""
    command = ["-m", "pytest", *shlex.split(arguments), "-q", "--maxfail=10", "--durations=5", "-p", "no:cacheprovider"]
    command += ["-o", f"faulthandler_timeout={limit / 2:.0f}"]  # tells where a test hangs
    command += ["--ignore-glob=*/test_against_*"]  # twins against packages that need not be here, on a CPU
    report.say(f"tests: python {shlex.join(command)} (at most {limit:.0f} s)")
    env = {name: value for name, value in os.environ.items() if name != "FUSED_LOSSES_BACKEND"}
    env["PYTHONUNBUFFERED"] = "1"  # what it has said is not lost at the limit
    code = None
    with tempfile.TemporaryFile() as file:
        run = partial(subprocess.run, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=env, timeout=limit)
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = run([sys.executable, *command]).returncode
        file.seek(0)
        text = file.read().decode(errors="replace").replace(str(ROOT), ".")
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)\b", text[-300:])}
    report.header["tests"] = {"command": command, "exit_code": code, **counts, "tail": text[-6000:]}
    if code != 0:
        print("\n".join(text.splitlines()[-40:]))
    verdict = {0: "passed", None: "FAILED: out of time"}.get(code, "FAILED")
    report.say(f"tests {verdict} ({', '.join(f'{n} {word}' for word, n in counts.items())})")
    return code == 0


HIDDEN = {  # arguments of bench/from_hidden.py, and the workspace in MiB that ours may take
    "default": ("--work kl dpo ce --plans auto slices --rows 8192 --length 512 --hidden 4096 --vocab 128256", 256),
    "large": (
        "--work dpo --plans auto --rows 8192 --length 512 --hidden 4096 --vocab 128256 --providers fused eager",
        8192,
    ),
    "small": ("--work kl dpo --plans auto slices whole --rows 1024 --length 256 --hidden 1024 --vocab 151936", 2048),
}
HIDDEN_DRY = {"dry": ("--work dpo --rows 16 --length 4 --hidden 8 --vocab 64 --dtype float32 --repeat 1", 1)}


def run_hidden(report: Report, folders: list[str | Path], dry_run: bool) -> bool:
    """bench/from_hidden.py in processes of their own; each leaves hidden-<name>.json."""
    passed = True
    for name, (arguments, mib) in (HIDDEN_DRY if dry_run else HIDDEN).items():
        if report.out_of_time(f"from hidden states, {name}"):
            break
        command = [
            sys.executable,
            "bench/from_hidden.py",
            *(() if dry_run else ("--dtype", "bfloat16")),
            *arguments.split(),
        ]
        for folder in folders:
            Path(folder).mkdir(parents=True, exist_ok=True)
            command += ["--json", str(Path(folder) / f"hidden-{name}.json")]
        env = {**os.environ, "FUSED_LOSSES_WORKSPACE": str(mib << 20)}
        report.say(f"from hidden states, workspace {mib} MiB: {shlex.join(command[1:])}")
        passed &= subprocess.run(command, cwd=ROOT, env=env).returncode == 0
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="on the CPU, tiny; no tests and no file unless asked for")
    add("--skip-tests", action="store_true")
    add("--tests", metavar="ARGS", help="arguments of pytest (default: tests)")
    add("--tests-seconds", type=float, default=240, metavar="S", help="limit of the tests (%(default)s)")
    add("--seconds", type=float, default=540, metavar="S", help="start no measurement after this (%(default)s)")
    add("--tune", nargs="*", metavar="ENTRY", help="try other configurations, of these or all entries of configs.py")
    add("--results", metavar="DIR", help="folder of the results (default: bench/results)")
    args = parser.parse_args()
    if Path(fl.__file__).resolve().parent.parent != ROOT:
        print(f"fused_losses comes from {fl.__file__}, not from this checkout: uninstall that one", file=sys.stderr)
        return 2
    if args.dry_run:
        os.environ.setdefault("FUSED_LOSSES_BACKEND", "torch")
        torch.set_num_threads(1)
        device, rows, vocabs, copied = torch.device("cpu"), 16, (96, 160, 257), 1 << 20
    elif torch.cuda.is_available():
        for name in ("TRITON_INTERPRET", "FUSED_LOSSES_BACKEND"):  # the compiled kernels are to be measured
            os.environ.pop(name, None)
        device, rows, vocabs, copied = torch.device("cuda"), 8192, (128256, 151936, 248320), 4 << 30
    else:
        print("no GPU that torch can use; --dry-run tries this command without one", file=sys.stderr)
        return 2

    torch.manual_seed(0)
    folders = args.results or ("" if args.dry_run else ROOT / "bench" / "results"), os.environ.get("OUT")
    report = Report(ROOT, device, [f for f in folders if f], args.seconds, dry_run=args.dry_run)
    skip = args.skip_tests or (args.dry_run and not args.tests)
    passed = skip or run_tests(report, args.tests or "tests", args.tests_seconds)
    try:
        report.header["copy_gb_s"] = timing.copy_bandwidth(device, copied)
        report.say(f"copy bandwidth {report.header['copy_gb_s']:.4g} GB/s")
        if args.tune is not None:
            tune(report, Inputs.random(rows, vocabs[1], torch.bfloat16, device), args.tune)
        else:
            benchmark(report, rows, vocabs, device)
            passed &= run_hidden(report, [f for f in folders if f][-1:], args.dry_run)
        report.header["copy_gb_s_at_the_end"] = timing.copy_bandwidth(device, copied)
    finally:
        report.save()
    report.print_table(("fused_losses", "eager", "compiled"))
    failed = sum(bool(row["failed"]) for row in report.rows if row["provider"] == "fused_losses")
    print(f"tests {'passed or not run' if passed else 'FAILED'}; {failed} measurements of fused_losses failed")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
