"""Two result files against each other: what became slower, larger or less exact.

    python -m bench compare OLD.json NEW.json [--threshold 10%] [--metric time|memory|error|all] [--relative]

Benchmarks are matched by name, workload, shape and dtype. Exit code: 0, 1 on any regression, 2 if a file cannot be read. A
benchmark that was measured and now is wrong or fails is a regression; one that is merely missing is named. Times of other
machines are not compared, unless --relative to each file's own eager code or --anyway; on a noisy one compare memory and error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from bench import results
from bench.results import Report
from bench.tables import number

METRICS = ("time", "memory", "error")
# Of machine_info: what makes a machine another one. A result file may be older than some of these.
MACHINE = ("device", "processor", "capability", "cores", "threads", "busy", "memory_bytes")
# Below these nothing counts: an allocator's blocks in bytes, and float32's rounding.
FLOOR = {"time": 0.0, "memory": 64 * 2**10, "error": 2.0**-23}
_WORSE = {"time": "slower", "memory": "more memory", "error": "a larger error"}


def _value(metric: str, b: dict[str, Any], eager: float | None) -> float | None:
    """None where there is nothing to compare."""
    if metric == "memory":
        return results.bytes_of(b)
    if metric == "error":
        error = b["extra_info"].get("error") or {}
        return max((x for x in error.values() if x is not None), default=None)
    return results.seconds_of(b) / eager if eager else None


def _show(metric: str, x: float, relative: bool) -> str:
    if metric == "memory":
        return f"{number(results.mib(int(x)))} MiB"
    if metric == "error":
        return f"{x:.1e}"
    return f"{number(x)} of eager" if relative else f"{number(1e3 * x)} ms"


def _values(report: Report, metrics: Sequence[str], relative: bool) -> dict[tuple, dict[str, float | None]]:
    """By full name and length, which the full name does not tell."""
    values = {}
    for case in results.cases(report):
        eager = results.seconds_of(case.eager) if case.eager else None
        unit = eager if relative else 1.0
        for b in case.runs:
            values[b["fullname"], case.params.get("length")] = {m: _value(m, b, unit) for m in metrics}
    return values


def _left_out(report: Report) -> dict[str, str]:
    """Reasons by full name."""
    return {
        f"{out['group']}[{out['provider']}-{out['shape']}-{out['dtype']}-{out['logits']}]": out["reason"]
        for out in report["left_out"]
    }


def other_machine(old: Report, new: Report) -> list[str]:
    """In what the machines differ, as far as both files say it."""
    before, now = old["machine_info"], new["machine_info"]
    return [
        f"{name} {before[name]} before, {now[name]} now"
        for name in MACHINE
        if None not in (before.get(name), now.get(name)) and before[name] != now[name]
    ]


def _warnings(old: Report, new: Report) -> list[str]:
    infos = [report["machine_info"] for report in (old, new)]
    before, now = ({"driver": info.get("driver")} | info.get("versions", {}) for info in infos)
    versions = [
        f"{name} {before.get(name)} before, {now.get(name)} now"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    return [f"warning: {text}: times do not compare" for text in other_machine(old, new) + versions]


def compare(
    old: Report, new: Report, threshold: float = 0.10, metrics: Sequence[str] = METRICS, relative: bool = False
) -> tuple[list[str], list[str]]:
    """Lines to print (warnings, ratios new / old, who is missing), and the regressions in words.

    Args:
        threshold: 0.10 lets everything grow by a tenth.
        relative: times as multiples of the eager code in the same file, at the same workload, shape and dtype.
    """
    before, after = (_values(report, metrics, relative) for report in (old, new))
    both = [key for key in before if key in after]
    width = max((len(name) for name, _ in both), default=0) + 1
    lines, regressions = _warnings(old, new), []
    lines.append(f"{'new / old':<{width}}" + "".join(f"{m:>10}" for m in metrics))
    for key in both:
        line = f"{key[0]:<{width}}"
        for metric in metrics:
            a, b = before[key][metric], after[key][metric]
            if a is None or b is None:
                line += f"{'-':>9} "
                continue
            least = FLOOR[metric] or min(x for x in (a, b, 1e-9) if x > 0)
            ratio = max(b, least) / max(a, least)
            worse = ratio > 1 + threshold
            line += f"{ratio:9.2f}{'!' if worse else ' '}"
            if worse:
                was, now = (_show(metric, x, relative) for x in (a, b))
                regressions.append(f"{key[0]}: {_WORSE[metric]}: {was} before, {now} now ({ratio:.2f} times)")
        lines.append(line.rstrip())
    absent = _left_out(new)
    for name, _ in (key for key in before if key not in after):
        reason = absent.get(name, "")
        lines.append(f"missing now: {name}" + (f" ({reason})" if reason else ""))
        if reason.startswith(("WRONG", "fails")):
            regressions.append(f"{name}: measured before, now left out: {reason}")
    lines += [f"new: {name}" for name, _ in after if (name, _) not in before]
    return lines, regressions


def fraction(text: str) -> float:
    """10% or 0.1."""
    try:
        x = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        x = -1.0
    if not 0 <= x or not (text.endswith("%") or x < 1):
        raise argparse.ArgumentTypeError(f"expected a share such as 10% or 0.1, got {text}")
    return x


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench compare", description=__doc__, formatter_class=raw)
    parser.add_argument("old", metavar="OLD.json")
    parser.add_argument("new", metavar="NEW.json")
    parser.add_argument("--threshold", type=fraction, default=0.10, metavar="10%%")
    parser.add_argument("--metric", default="all", choices=(*METRICS, "all"))
    parser.add_argument("--relative", action="store_true", help="times as multiples of each file's own eager code")
    parser.add_argument("--anyway", action="store_true", help="times of another machine too")
    args = parser.parse_args(argv)
    try:
        old, new = results.load(args.old), results.load(args.new)
    except (OSError, ValueError) as e:
        parser.error(str(e))
    metrics = METRICS if args.metric == "all" else (args.metric,)
    others = other_machine(old, new)
    if others and "time" in metrics and not (args.relative or args.anyway):
        parser.error(
            f"expected files of one machine, got {'; '.join(others)}: their times do not compare. "
            "--relative compares multiples of eager code, --metric memory or error the rest, --anyway the times all the same"
        )
    lines, regressions = compare(old, new, args.threshold, metrics, args.relative)
    print("\n".join(lines))
    print(f"\n{len(regressions)} worse by more than {args.threshold:.0%}")
    print("\n".join(f"  {line}" for line in regressions), end="\n" if regressions else "")
    return int(bool(regressions))


if __name__ == "__main__":
    sys.exit(main())
