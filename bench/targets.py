"""What we want to reach on an H200, what was measured there, and until then what the models predict.

    python -m bench targets [FILE.json]     the table; FILE: results to look at (default: the newest of a GPU, and cpu/full,
                                            with the table of what needs no GPU, targets_here.py)

A prediction is an upper bound: what static.py reads in the machine code, or bytes over bandwidth and flops over rate. It takes
4.3 TB/s and 700 TFLOP/s (bf16, of a large product) for an H200; nothing in it was timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import results, static, tables
from bench.workloads import BY_NAME, Shape

Benchmark = dict[str, Any]
RESULTS = Path(__file__).resolve().parent / "results"
COPY, RATE = 4.3e12, 700e12
TWO_MODELS = Shape(8192, 512, 4096, 128256, "bfloat16")
OURS, SLICES = "fused_losses", "fused_losses, slices"


def _of(report: results.Report, workload: str, provider: str = OURS, shape: Shape | None = None) -> list[Benchmark]:
    """Benchmarks of a provider; on that shape, or from logits in bfloat16."""
    runs = [b for b in report["benchmarks"] if b["group"] == workload and b["extra_info"]["provider"] == provider]
    if shape:
        sizes = ("rows", "length", "hidden", "vocab", "dtype")
        return [b for b in runs if all(b["params"][n] == getattr(shape, n) for n in sizes)]
    return [b for b in runs if b["params"]["dtype"] == "bfloat16"]


def _bandwidth(report: results.Report) -> str:
    """The least fraction of the copy bandwidth, in each direction, of all work from logits that one sweep does."""
    copy, fractions = report["machine_info"]["copy_gb_s"] * 1e9, []
    for name in BY_NAME:
        for b in _of(report, name) if name.startswith("logits: ") else ():
            e = b["extra_info"]
            moved = {"forward": e["bytes_forward"], "backward": e["bytes"] - e["bytes_forward"]}
            fractions += [(n / e[way]["median"] / copy, f"{name[8:]} {way}") for way, n in moved.items()]
    if not fractions:
        return ""
    (worst, what), median = min(fractions), sorted(f for f, _ in fractions)[len(fractions) // 2]
    reached = sum(f >= 0.9 for f, _ in fractions)
    return f"median {median:.2f}, least {worst:.2f} ({what}); {reached} of {len(fractions)} reach it"


def _predicted_bandwidth() -> str:
    kernels = json.loads(static.BASELINE.read_text())["kernels"]
    fractions = {
        k: row["fraction"] for k, row in kernels.items() if k.startswith("token_stats|") and row.get("fraction")
    }
    slow = sorted((f, k.split("|")[1:3]) for k, f in fractions.items() if f < 0.9)
    worst = f"; least {slow[0][0]:.2f} ({' '.join(slow[0][1])})" if slow else ""
    return f"{len(fractions) - len(slow)} of {len(fractions)} kernels wait for memory alone{worst}"


def _entropy(report: results.Report) -> str:
    runs = [
        b
        for b in _of(report, "logits: logp + entropy")
        if (b["params"]["rows"], b["params"]["vocab"]) == (8192, 151936)
    ]
    return f"{1e3 * runs[0]['extra_info']['forward']['median']:.3f} ms" if runs else ""


def _products(name: str, provider: str, products: int) -> Callable[[results.Report], str]:
    """Time over that of so many bare products at the rate measured in the same run, and memory."""

    def told(report: results.Report) -> str:
        runs = _of(report, name, provider, TWO_MODELS)
        if not runs:
            return ""
        b = runs[0]
        bare = products * _product_flops() / (report["machine_info"]["matrix_gflop_s"]["bfloat16"] * 1e9)
        return f"{b['stats']['median'] / bare:.2f} of {products}, {b['extra_info']['peak_bytes'] / 2**20:,.0f} MiB"

    return told


def _product_flops() -> float:
    return 2 * TWO_MODELS.rows * TWO_MODELS.hidden * TWO_MODELS.vocab


def _predicted_products(products: int, sweeps: float) -> Callable[[], str]:
    """sweeps: over the float32 logits of one model, written or read, beside the products."""

    def told() -> str:
        bare = products * _product_flops() / RATE
        logits = sweeps * TWO_MODELS.rows * TWO_MODELS.vocab * 4 / COPY
        return f"at best {1 + logits / bare:.2f} of {products}"

    return told


def _peers(report: results.Report) -> str:
    lines = [line for line in tables.losses(report) if line != "nowhere"]
    return f"{len(lines)} cases where a peer is better" if lines else "everywhere"


def _errors(report: results.Report) -> str:
    ours = [
        b["extra_info"] for b in report["benchmarks"] if b["extra_info"]["ours"] and b["extra_info"].get("eager_error")
    ]
    worse = [e for e in ours for n in ("value", "gradient") if e["error"][n] > max(2e-6, 1.05 * e["eager_error"][n])]
    return f"{len(worse)} of {2 * len(ours)} above eager's" if ours else ""


def _cpu(report: results.Report) -> str:
    """Of the work in bench/results/cpu/full.json that needs both log-probs and the divergence."""
    case = next((c for c in results.cases(report) if c.group == "sft + kl"), None)
    by_provider = {b["extra_info"]["provider"]: b for b in case.runs} if case else {}
    if not by_provider or OURS not in by_provider or "eager" not in by_provider:
        return ""
    others = [b for b in by_provider.values() if not b["extra_info"]["ours"] and b["extra_info"]["exact"]]
    mib = [by_provider[name]["extra_info"]["peak_bytes"] / 2**20 for name in ("eager", OURS)]
    fastest = min(others, key=lambda b: b["stats"]["median"])
    ratio = by_provider[OURS]["stats"]["median"] / fastest["stats"]["median"]
    return f"1/{mib[0] / mib[1]:.0f}, {mib[1]:.0f} MiB, {ratio:.2f} of the time of {fastest['extra_info']['provider']}"


def _import(report: results.Report) -> str:
    firsts = [b["extra_info"]["first_call_s"] for b in report["benchmarks"] if b["extra_info"]["ours"]]
    return f"{report['machine_info']['import_s']:.2f} s; first calls up to {max(firsts):.1f} s" if firsts else ""


class Target(NamedTuple):
    what: str
    wanted: str
    measured: Callable[[results.Report], str]
    predicted: Callable[[], str] = lambda: "-"
    gpu: bool | None = True  # None: wherever it was measured


TARGETS = [
    Target("logits kernels, bf16, fraction of the copy bandwidth", ">= 0.90 forward and backward", _bandwidth,
           _predicted_bandwidth),
    Target("log-prob + entropy forward, 8192 x 151936 bf16", "<= 0.65 ms", _entropy,
           lambda: f"at best {1e3 * 8192 * 151936 * 2 / COPY:.2f} ms"),
    Target("8192 x 4096 x 128256 bf16, two models, over its bare products: DPO, slices", "<= 1.10 of 5, <= 512 MiB",
           _products("dpo", SLICES, 5), _predicted_products(5, 7.5)),
    Target("the same, log-probs and forward KL, slices", "<= 1.10 of 6, <= 512 MiB",
           _products("tdpo", SLICES, 6), _predicted_products(6, 9.5)),
    Target("the same, DPO, fastest plan", "<= 1.15 of 4", _products("dpo", OURS, 4), _predicted_products(4, 6.5)),
    Target("the same, DPO, frozen head", "<= 1.10 of 3", _products("dpo frozen", OURS, 3), _predicted_products(3, 6)),
    Target("against every peer, same work, same run", "faster, no more memory", _peers),
    Target("CPU, 4096 x 512 x 50304 fp32, log-probs and forward KL: memory of eager's, time of the fastest peer's",
           "<= 1/15, <= 320 MiB, no slower", _cpu, gpu=False),
    Target("error against float64", "never above eager's", _errors, gpu=None),
    Target("import beyond torch; first call", "< 0.1 s; seconds", _import, gpu=None),
]  # fmt: skip


def table(reports: Sequence[results.Report]) -> str:
    """Markdown. A GPU's targets are looked for in its reports, the CPU's in those of a CPU."""
    lines = [
        "| target, on an H200 where nothing else is said | wanted | measured | prediction of the models |",
        "|---|---|---|---|",
    ]
    for t in TARGETS:
        texts = [t.measured(r) for r in reports if t.gpu in (None, r["machine_info"]["device"] != "cpu")]
        measured = "; ".join(text for text in texts if text) or "not measured"
        lines.append(f"| {t.what} | {t.wanted} | {measured} | {t.predicted()} |")
    return "\n".join(lines)


def saved() -> list[results.Report]:
    """The results of a GPU that were saved last, and the CPU's at full size, where there are any."""
    reports = [results.load(p) for p in RESULTS.glob("*/*.json") if p.parent.name != "cpu"]
    gpu = sorted(reports, key=lambda r: r["datetime"])[-1:]
    return gpu + [results.load(p) for p in RESULTS.glob("cpu/full.json")]


def main(argv: Sequence[str]) -> int:
    from bench import targets_here

    parser = argparse.ArgumentParser("python -m bench targets", description=__doc__)
    parser.add_argument("file", nargs="?", metavar="FILE.json")
    args = parser.parse_args(argv)
    print(table([results.load(args.file)] if args.file else saved()))
    if not args.file:
        print("\n" + targets_here.table())
    return 0
