"""What we want to reach where no GPU is needed, by which command it is measured, and what was measured.

Times and memory come from the results of a CPU in bench/results/cpu/, counts of the machine code from the baselines of
static.py. Whatever has no file yet is not measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from bench import results, static
from bench.grids import FULL, SMALL
from bench.results import Case, best, bytes_of, seconds_of
from bench.workloads import Shape

CPU = Path(__file__).resolve().parent / "results" / "cpu"
OURS = "fused_losses"
RIVAL = "torch.compile"
NOT_MEASURED = "not measured"
HOST, HOST_CALL = CPU.parent / "host.json", "dpo_loss from logits, forward + backward"  # of host.py, which needs Triton
COMPILATIONS = CPU.parent / "compilations.json"  # {training loop: [[batch, kernel] of each compilation]}
ONE_SIDE = ("logps", "logps + entropy", "logps + collision", "logps + entropy + collision")
ALIGNED, UNALIGNED = "V = 50256", "V = 50257"
MIXTURES = ("js", "skew_forward_kl", "skew_reverse_kl", "alpha_beta")


class Row(NamedTuple):
    """measured: the figure, or nothing where there is none."""

    what: str
    command: str
    target: str
    measured: Callable[[], str] = lambda: ""


def _report(name: str) -> results.Report | None:
    path = CPU / f"{name}.json"
    return results.load(path) if path.exists() else None


def _case(report: str, workload: str, shape: Shape) -> Case | None:
    found = _report(report)
    sizes = {"rows": shape.rows, "hidden": shape.hidden or None, "vocab": shape.vocab, "dtype": shape.dtype}
    for case in results.cases(found) if found else ():
        if case.group == workload and all(case.params[name] == size for name, size in sizes.items()):
            return case
    return None


def _both(case: Case | None, peer: str) -> tuple[dict, dict] | None:
    """Ours and a peer's."""
    by_name = {b["extra_info"]["provider"]: b for b in case.runs} if case else {}
    return (by_name[OURS], by_name[peer]) if {OURS, peer} <= set(by_name) else None


def _against_compiled(report: str) -> Callable[[], str]:
    def told() -> str:
        pair = _both(_case(report, "logits: token_stats", SMALL._replace(hidden=0)), RIVAL)
        return f"{seconds_of(pair[0]) / seconds_of(pair[1]):.2f} x" if pair else ""

    return told


def _against_naive() -> str:
    pair = _both(_case("cpu", "token_stats", FULL), "eager")
    if pair is None:
        return ""
    ours, naive = pair
    return f"{seconds_of(ours) / seconds_of(naive):.2f} x, 1/{bytes_of(naive) / bytes_of(ours):.1f}"


def _behind() -> str:
    """In how many cases someone else's best is better than ours, beyond the spread."""
    parts = []
    for name in ("quick", "full"):
        report = _report(name)
        if report is None:
            parts.append(f"{name}: {NOT_MEASURED}")
            continue
        cases = [case for case in results.cases(report) if case.runs]
        ratios = list(_slower(cases))
        worst = f", up to {max(ratios):.2f} x" if ratios else ""
        larger = sum(_larger(case) for case in cases)
        parts.append(f"{name}: of {len(cases)} slower in {len(ratios)}{worst}, more memory in {larger}")
    return "; ".join(parts)


def _slower(cases: list[Case]) -> Iterator[float]:
    for case in cases:
        ours, theirs = (best(case.runs, "time", mine) for mine in (True, False))
        if ours is None or theirs is None:
            continue
        apart = ours["extra_info"]["p20"] > theirs["extra_info"]["p80"]
        if apart:
            yield seconds_of(ours) / seconds_of(theirs)


def _larger(case: Case) -> bool:
    ours, theirs = (best(case.runs, "memory", mine) for mine in (True, False))
    return ours is not None and theirs is not None and bytes_of(ours) > bytes_of(theirs)


# ---- counts ------------------------------------------------------------------------------------------------------------


def _compilations() -> str:
    """At most in any loop, and the last batch, from 0, in which something is compiled."""
    if not COMPILATIONS.exists():
        return ""
    loops = json.loads(COMPILATIONS.read_text("utf-8")).values()
    last = max(batch for compilations in loops for batch, _ in compilations)
    when = "all in the first step" if last == 0 else f"the last in step {last + 1}"
    return f"{max(map(len, loops))}, {when}"


def _kernels() -> dict[str, dict]:
    """Of sm_90, by the rest of the name."""
    kernels = json.loads(static.BASELINE.read_text())["kernels"]
    return {name.removesuffix(f"|{static.H200}"): row for name, row in kernels.items() if name.endswith(static.H200)}


def _chunks() -> str:
    """The worst of one side, and of two without powers or an entropy beside a divergence."""
    whole = {name.split("|")[1]: row.get("whole") for name, row in _kernels().items() if name.startswith("fold_slice|")}

    def worst(wanted: Callable[[str], bool]) -> float | None:
        return max((x for name, x in whole.items() if x and name in static.CHUNK_BOUND and wanted(name)), default=None)

    both = worst(lambda name: name in ONE_SIDE), worst(lambda name: name not in ONE_SIDE)
    return " and ".join(f"{x:.1f}" for x in both if x)


def _unaligned() -> str:
    rows = _kernels()
    ratios = [
        row["whole"] / rows[name.replace(UNALIGNED, ALIGNED)]["whole"]
        for name, row in rows.items()
        if UNALIGNED in name
    ]
    return f"{max(ratios):.2f} x at worst" if ratios else ""


def _mixtures() -> str:
    kernels = _kernels()
    counts = {name: kernels.get(f"token_stats|{name}|forward", {}).get("instructions") for name in MIXTURES}
    return ", ".join(f"{name} {count:.0f}" for name, count in counts.items() if count)


def _spills() -> str:
    parts = []
    for path in static.baselines():
        content = json.loads(path.read_text())
        tiles = {k: row["spills"] for k, row in content["kernels"].items() if k.startswith("tile_sums|")}
        worst = max((n for k, n in tiles.items() if k.endswith(f"|{static.H200}")), default=0)
        parts.append(f"{content['triton']}: {worst}")
    return ", ".join(parts)


def _host() -> str:
    """The call's time in plain launches, and that of eager code."""
    if not HOST.exists():
        return ""
    calls = json.loads(HOST.read_text("utf-8"))["calls"]
    return ", eager code ".join(f"{calls[name]['plain_launches']:.1f}" for name in (HOST_CALL, f"eager {HOST_CALL}"))


ROWS = [
    Row("CPU, from logits, 512 x 16384 fp32, log-probs and forward KL, forward + backward: time over torch.compile's",
        "python -m bench --grid cpu --save cpu", "<= 0.75 x", _against_compiled("cpu")),
    Row("the same while another process keeps a core busy",
        "python -m bench --grid cpu --workloads 'logits: *' --busy --save cpu-busy", "<= 1.00 x",
        _against_compiled("cpu-busy")),
    Row("CPU, token_stats by chunks from hidden states, 4096 x 512 x 50304 fp32, both models, forward KL: time and memory "
        "over naive eager code's", "python -m bench --grid cpu --save cpu", "<= 1.00 x, <= 1/15", _against_naive),
    Row("CPU, every case of a grid: time over the best exact peer's", "python -m bench --grid quick --save quick; "
        "python -m bench --grid full --save full", "none slower beyond the spread, nor a tile more memory", _behind),
    Row("kernels compiled in a training loop whose batches change their shape",
        "python tests/support/compilations.py > bench/results/compilations.json", "<= 6, all in the first step",
        _compilations),
    Row("instructions a logit at the widths that the planner picks, one side and two", "python -m bench static --update",
        "<= 16 and <= 32", _chunks),
    Row("rows that are not aligned (V = 50257), bf16: instructions over an aligned row's",
        "python -m bench static --update", "<= 1.15 x", _unaligned),
    Row("mixtures, forward, both sweeps: instructions a pair", "python -m bench static --update", "<= 62", _mixtures),
    Row("host time of dpo_loss from logits, forward + backward, in plain launches", "python -m bench host --save", "<= 15",
        _host),
    Row("tile kernel on sm_90, by version of Triton: accesses to spilled registers", "python -m bench static --update",
        "0", _spills),
    Row("the tests, in one process, of what they took before", "", "<= 45 %, without slow ones <= 10 %"),
]  # fmt: skip


def table() -> str:
    """Markdown."""
    lines = ["| what | command | target | measured |", "|---|---|---|---|"]
    for row in ROWS:
        command = f"`{row.command}`" if row.command else "-"
        lines.append(f"| {row.what} | {command} | {row.target} | {row.measured() or NOT_MEASURED} |")
    return "\n".join(lines)
