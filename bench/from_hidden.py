"""Time and memory of whole losses from hidden states and head weights: ours and other people's, forward and backward.

    python bench/from_hidden.py [--work kl dpo ...] [--rows 4096] [--hidden 512] [--vocab 50304] [--dtype float32]
                                [--plans auto ...] [--providers eager trl ...] [--json FILE] [--plot FILE.png]

Others take part where they are installed; bench/peers.py says what each does. Values and gradients of all are compared with
float64 first: who is wrong or fails is not timed, and the exit status is 1. The policy's hidden states and head ask for
gradients, the reference does not; all labels count. Times are medians of interleaved runs, so that their ratios hold on a
noisy machine; memory is the peak beyond the inputs, with the gradients and without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peers import WORKS, Problem, Provider, eager, providers
from torch import Tensor

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2}  # relative


def say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:<100}\r", end="", file=sys.stderr, flush=True)


class Run:
    """One provider at one work."""

    def __init__(self, provider: Provider, work: str, p: Problem):
        self.provider, self.work, self.p = provider, work, p
        self.remark = provider.why_not(work, p.hidden.device)
        self.wrong, self.out = False, bool(self.remark)
        self.error, self.bytes = 0.0, 0
        self.seconds: list[float] = []

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def step(self) -> dict[str, Tensor]:
        """Values, dX and dW."""
        self.p.clear_gradients()
        values = self.provider.values(self.work, self.p)
        values["loss"].backward()
        if self.p.hidden.device.type != "cpu":
            torch.accelerator.synchronize()
        assert self.p.hidden.grad is not None and self.p.weight.grad is not None
        return {n: v.detach() for n, v in values.items()} | {"dX": self.p.hidden.grad, "dW": self.p.weight.grad}

    def check(self, truth: dict[str, Tensor], tolerance: float) -> None:
        """Runs it for the first time, and rules it out if it fails or is wrong."""
        try:
            outcome = self.step()
        except Exception as e:  # whatever a peer may raise belongs in the table
            memory = isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e)
            self.out, self.wrong = True, not memory
            self.remark = "out of memory" if memory else f"fails: {type(e).__name__}: {e}".split("\n")[0][:150]
            return
        errors = {n: ((x.double() - truth[n]).norm() / truth[n].norm()).item() for n, x in outcome.items()}
        self.error = max(errors.values())
        self.remark = self.provider.remarks.get(self.work, "")
        if any(not e <= tolerance for e in errors.values()):  # NaN is wrong too
            self.out = self.wrong = True
            self.remark = "WRONG, relative error " + ", ".join(f"{n} {e:.1e}" for n, e in errors.items())


def truth_of(work: str, p: Problem) -> dict[str, Tensor]:
    """Values, dX and dW of the eager code in float64, one pair at a time: every loss here is a mean over pairs."""
    hidden, ref_hidden, ref_weight = (x.detach().double() for x in (p.hidden, p.ref_hidden, p.ref_weight))
    weight = p.weight.detach().double().requires_grad_()
    truth = {"dX": torch.empty_like(hidden)}
    pairs = len(hidden) // 2
    for i in range(pairs):
        pair = [i, pairs + i]
        x = hidden[pair].requires_grad_()
        values = eager(work, Problem(x, weight, p.labels[pair], ref_hidden[pair], ref_weight))
        (values["loss"] / pairs).backward()
        assert x.grad is not None
        truth["dX"][pair] = x.grad
        for name, value in values.items():
            truth[name] = truth.get(name, torch.zeros_like(value)) + value.detach() / pairs
    assert weight.grad is not None
    return truth | {"dW": weight.grad}


def product_seconds(p: Problem) -> float:
    """One bare matrix product of all rows and columns, a few rows at a time so that it needs no memory to speak of."""
    x = p.hidden.detach().flatten(0, -2)
    out = x.new_empty(min(len(x), 1024), len(p.weight))
    start = time.perf_counter()
    for part in x.split(len(out)):
        torch.mm(part, p.weight.detach().T, out=out[: len(part)])
    if x.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def measure(work: str, chosen: list[Provider], p: Problem, repeat: int, bare: list[float]) -> list[Run]:
    """bare: receives seconds of product_seconds, measured in between."""
    from fused_losses.memory_probe import peak_bytes

    product_seconds(p)
    runs = [Run(provider, work, p) for provider in chosen]
    say(f"{work}: float64")
    truth = truth_of(work, p)
    for run in runs:
        say(f"{work}: checking {run.provider.name}")
        if not run.out:
            run.check(truth, TOLERANCE[p.hidden.dtype])
        if run.wrong:
            print(f"{work}: {run.provider.name}: {run.remark}")
    del truth
    good = [run for run in runs if not run.out]
    for turn in range(repeat):
        for run in good:
            say(f"{work}: run {turn + 1}/{repeat} {run.provider.name}")
            start = time.perf_counter()
            run.step()
            run.seconds.append(time.perf_counter() - start)
        bare.append(product_seconds(p))
    for run in good:
        say(f"{work}: memory {run.provider.name}")
        p.clear_gradients()
        run.bytes = peak_bytes(run.step)
    p.clear_gradients()
    say("")
    return runs


def print_table(work: str, runs: list[Run], gradients: int, shape: str) -> None:
    print(f"\n{work}: {WORKS[work]}; forward + backward, {shape}")
    print(f"{'':<32} {'ms':>10} {'eager = 1':>10} {'MiB, gradients in':>18} {'MiB beyond them':>16} {'error':>8}")
    eager_ms = next((1e3 * r.median for r in runs if r.provider.values is eager and not r.out), None)
    for run in runs:
        if run.out:
            print(f"{run.provider.name:<32} {run.remark}")
            continue
        ms = 1e3 * run.median
        print(
            f"{run.provider.name:<32} {ms:10.1f} {f'{ms / eager_ms:.2f}' if eager_ms else '-':>10} {run.bytes / 2**20:18.1f} "
            f"{(run.bytes - gradients) / 2**20:16.1f} {run.error:8.0e}  {run.remark}".rstrip()
        )


def as_json(run: Run, gradients: int, params: dict[str, Any]) -> dict[str, Any]:
    """As pytest-benchmark writes it, times in seconds."""
    entry = {"group": run.work, "name": run.provider.name, "params": params}
    if run.out:
        return entry | {"stats": None, "extra_info": {"remark": run.remark}}
    s = run.seconds
    stats = {"median": run.median, "min": min(s), "max": max(s), "rounds": len(s)}
    memory = {"peak_bytes": run.bytes, "peak_bytes_beyond_gradients": run.bytes - gradients}
    return entry | {"stats": stats, "extra_info": {"error": run.error, "remark": run.remark, **memory}}


def plot(path: str, results: dict[str, list[Run]], gradients: int, shape: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = sum(len(runs) + 2 for runs in results.values())
    heights = [len(runs) + 1 for runs in results.values()]
    figure, grid = plt.subplots(
        len(results), 2, squeeze=False, figsize=(12, 0.27 * lines + 1), sharey="row",
        gridspec_kw={"height_ratios": heights}, layout="constrained",
    )  # fmt: skip
    for row, (work, runs) in zip(grid, results.items(), strict=True):
        names = [run.provider.name for run in runs]
        colours = ["tab:orange" if name.startswith("fused_losses") else "tab:gray" for name in names]
        times = [0.0 if run.out else 1e3 * run.median for run in runs]
        memory = [0.0 if run.out else (run.bytes - gradients) / 2**20 for run in runs]
        for axes, numbers, unit in zip(row, (times, memory), ("ms", "MiB beyond inputs and gradients"), strict=True):
            bars = axes.barh(names, numbers, color=colours)
            text = [run.remark[:40] if run.out else f"{n:,.0f}" for run, n in zip(runs, numbers, strict=True)]
            axes.bar_label(bars, text, padding=3, fontsize=8)
            axes.set_title(f"{work}, {unit}", fontsize=9, loc="left")
            axes.set_xlim(0, 1.15 * max(numbers, default=1) or 1)
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].invert_yaxis()
    figure.suptitle(shape, fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--rows", type=int, default=4096, help="tokens, of all sequences")
    parser.add_argument("--length", type=int, help="tokens of a sequence, 512 or less; rows is a multiple of twice it")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--plans", nargs="+", default=["auto"], help="plans of fused_losses")
    parser.add_argument("--providers", nargs="+", help="only those whose name contains one of these, whatever the case")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE.png")
    args = parser.parse_args()
    length = args.length or min(512, max(1, args.rows // 2))
    if args.rows < 1 or args.rows % (2 * length):
        parser.error(f"--rows: expected a multiple of twice the length {length}, got {args.rows}")
    chosen = [
        provider
        for provider in providers(args.plans)
        if not args.providers or any(part.lower() in provider.name.lower() for part in args.providers)
    ]
    if not chosen:
        parser.error(f"--providers: expected part of one of {[p.name for p in providers(args.plans)]}")
    sys.path.append(str(Path(__file__).resolve().parent.parent))

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    p = Problem.random(args.rows // length, length, args.hidden, args.vocab, getattr(torch, args.dtype), device)
    gradients = p.hidden.nbytes + p.weight.nbytes
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    shape = (
        f"{args.rows} tokens in sequences of {length}, H={args.hidden}, V={args.vocab}, {args.dtype}, {where}, "
        f"torch {torch.__version__}"
    )
    results: dict[str, list[Run]] = {}
    products: dict[str, float] = {}
    for work in args.work:
        bare: list[float] = []
        results[work] = measure(work, chosen, p, args.repeat, bare)
        print_table(work, results[work], gradients, shape)
        products[work] = statistics.median(bare)
        print(f"{'one bare matrix product':<32} {1e3 * products[work]:10.1f}")
    runs = [run for of_work in results.values() for run in of_work]
    if args.json:
        params = {name: getattr(args, name) for name in ("rows", "hidden", "vocab", "dtype")} | {"length": length}
        report = {
            "machine_info": {
                "device": where,
                "torch": torch.__version__,
                "seconds of one bare matrix product": products,
            },
            "datetime": datetime.now(UTC).isoformat(timespec="seconds"),
            "benchmarks": [as_json(run, gradients, params) for run in runs],
        }
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        plot(args.plot, results, gradients, shape)
    return int(any(run.wrong for run in runs))


if __name__ == "__main__":
    sys.exit(main())
