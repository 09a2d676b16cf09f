"""The result file of `python -m bench`: made, saved, loaded, cut into cases, written as CSV.

It is JSON in pytest-benchmark's schema, so `pytest-benchmark compare FILE` reads it: statistics in seconds of forward and
backward, everything else about a benchmark in its "extra_info". "left_out" lists who did not take part, and why.
"""

from __future__ import annotations

import csv
import fnmatch
import io
import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Report = dict[str, Any]
VERSION = "1"
MIB = 2**20
_NEEDED = ("machine_info", "commit_info", "benchmarks", "datetime", "version")
_NEEDED_OF_EACH = {
    "": ("fullname", "group", "params", "stats", "extra_info"),
    "params": ("rows", "vocab", "dtype", "logits"),
    "stats": ("median", "rounds"),
    "extra_info": ("provider", "ours", "peak_bytes"),
}


def stats_of(seconds: Sequence[float]) -> dict[str, Any]:
    """pytest-benchmark's statistics of the rounds, each of one iteration."""
    s = sorted(seconds)
    mean, total = statistics.fmean(s), math.fsum(s)
    q1, median, q3 = statistics.quantiles(s, n=4, method="inclusive") if len(s) > 1 else s * 3
    spread = statistics.stdev(s) if len(s) > 1 else 0.0
    low, high = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)
    near = [x for x in s if low <= x <= high]
    far = sum(abs(x - mean) > spread for x in s)
    return {
        "min": s[0],
        "max": s[-1],
        "mean": mean,
        "stddev": spread,
        "median": median,
        "q1": q1,
        "q3": q3,
        "iqr": q3 - q1,
        "rounds": len(s),
        "iterations": 1,
        "ops": len(s) / total,
        "total": total,
        "ld15iqr": near[0],
        "hd15iqr": near[-1],
        "stddev_outliers": far,
        "iqr_outliers": len(s) - len(near),
        "outliers": f"{far};{len(s) - len(near)}",
    }


def shape_of(params: dict[str, Any]) -> str:
    """rows x hidden x vocabulary; without the hidden size where the work starts from logits."""
    return "x".join(str(params[name]) for name in ("rows", "hidden", "vocab") if params.get(name) is not None)


def benchmark(
    group: str, provider: str, params: dict[str, Any], seconds: Sequence[float], **extra: Any
) -> dict[str, Any]:
    """One entry of "benchmarks": seconds of every round, and what goes into its extra_info."""
    where = "-".join((shape_of(params), params["dtype"], params["logits"]))
    return {
        "group": group,
        "name": f"{group}[{provider}]",
        "fullname": f"{group}[{provider}-{where}]",
        "param": provider,
        "params": params,
        "stats": stats_of(seconds),
        "options": {},
        "extra_info": {"provider": provider} | extra,
    }


def load(path: str | Path) -> Report:
    """ValueError, in words, for a file that is not a result file; OSError where there is none."""
    try:
        report = json.loads(Path(path).read_text("utf-8"))
        missing = [key for key in _NEEDED if key not in report] or [
            f"{key} of {b.get('fullname')}"
            for b in report["benchmarks"]
            for part, keys in _NEEDED_OF_EACH.items()
            for key in keys
            if key not in (b[part] if part else b)
        ]
    except ValueError:  # neither UTF-8 nor JSON is
        raise ValueError(f"{path}: expected the JSON that `python -m bench` writes, got something else") from None
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{path}: expected a result file of `python -m bench`, got other JSON") from None
    if missing:
        what = ", ".join(missing[:5])
        raise ValueError(f"{path}: expected a result file of `python -m bench`, got one without {what}")
    if report["version"] != VERSION:
        raise ValueError(f"{path}: expected version {VERSION} of the result file, got {report['version']}")
    return {"left_out": [], "command": ""} | report


def save(path: str | Path, report: Report) -> None:
    """Whole or not at all."""
    _replace(path, json.dumps(_finite(report), indent=1, allow_nan=False) + "\n")


def _finite(x: Any) -> Any:
    """JSON has neither NaN nor infinity."""
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _replace(path: str | Path, text: str) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, "utf-8", newline="\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


class Case(NamedTuple):
    """What may be compared: a workload at one shape, dtype and kind of logits; who did it, and who did not."""

    group: str
    params: dict[str, Any]
    runs: list[dict[str, Any]]
    left_out: list[dict[str, Any]]

    @property
    def label(self) -> str:
        """dpo-1024x256x16384-float32-random"""
        return "-".join((self.group, shape_of(self.params), self.params["dtype"], self.params["logits"]))

    @property
    def size(self) -> int:
        """Logits."""
        return self.params["rows"] * self.params["vocab"]

    @property
    def eager(self) -> dict[str, Any] | None:
        return next((b for b in self.runs if b["extra_info"]["provider"] == "eager"), None)

    def matches(self, patterns: Iterable[str] | None) -> bool:
        """Whether one of them names its workload, or its label; * stands for anything."""
        return patterns is None or any(fnmatch.fnmatchcase(x, p) for p in patterns for x in (self.group, self.label))


def cases(report: Report) -> list[Case]:
    """In the order of the file, runs sorted by time."""
    by_key: dict[str, Case] = {}
    for b in report["benchmarks"]:
        key = json.dumps([b["group"], b["params"]], sort_keys=True)
        by_key.setdefault(key, Case(b["group"], b["params"], [], [])).runs.append(b)
    by_label: dict[str, list[Case]] = {}
    for case in by_key.values():
        case.runs.sort(key=lambda b: b["stats"]["median"])
        by_label.setdefault(case.label, []).append(case)
    for out in report["left_out"]:
        label = "-".join((out["group"], out["shape"], out["dtype"], out["logits"]))
        if label not in by_label:  # nobody could do it
            sizes = [int(n) for n in out["shape"].split("x")]
            hidden = sizes[1] if len(sizes) == 3 else None
            params = {"rows": sizes[0], "length": None, "hidden": hidden, "vocab": sizes[-1]}
            by_label[label] = [Case(out["group"], params | {n: out[n] for n in ("dtype", "logits")}, [], [])]
        for case in by_label[label]:
            case.left_out.append(out)
    return [case for of_label in by_label.values() for case in of_label]


def best(runs: Iterable[dict[str, Any]], what: str, ours: bool | None = None) -> dict[str, Any] | None:
    """The exact provider with the least "time" or "memory": ours, someone else's, or anyone's."""
    exact = [b for b in runs if b["extra_info"].get("exact", True) and ours in (None, b["extra_info"]["ours"])]
    return min(exact, key=seconds_of if what == "time" else bytes_of, default=None)


def seconds_of(b: dict[str, Any]) -> float:
    return b["stats"]["median"]


def bytes_of(b: dict[str, Any]) -> int:
    """The peak beyond inputs and gradients."""
    return b["extra_info"]["peak_bytes"]


def ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def mib(count: int | None) -> float | None:
    return None if count is None else count / MIB


def write_csv(path: str | Path, report: Report) -> None:
    """A flat row for every benchmark, and for everyone left out with the reason."""
    rows = [_row(case, b) for case in cases(report) for b in case.runs]
    rows += [
        {"workload": c.group, "provider": out["provider"], **c.params, "left_out": out["reason"]}
        for c in cases(report)
        for out in c.left_out
    ]
    machine = report["machine_info"]
    of_all = {name: machine.get(name) for name in ("device", "processor", "capability", "cores", "threads", "busy")}
    of_all |= {"torch": machine.get("versions", {}).get("torch"), "commit": report["commit_info"].get("id")}
    of_all |= {"datetime": report["datetime"]}
    columns = list(dict.fromkeys([name for row in rows for name in row] + list(of_all)))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | of_all for row in rows)
    _replace(path, text.getvalue())


def _row(case: Case, b: dict[str, Any]) -> dict[str, Any]:
    x = b["extra_info"]
    halves = {half: x.get(half) or {} for half in ("forward", "backward")}
    errors = {who: x.get(who) or {} for who in ("error", "eager_error")}
    return {
        "workload": case.group,
        "provider": x["provider"],
        **case.params,
        **{name: x.get(name) for name in ("ours", "exact", "source", "remark")},
        "ms": ms(seconds_of(b)),
        "p20_ms": ms(x.get("p20")),
        "p80_ms": ms(x.get("p80")),
        "rounds": b["stats"]["rounds"],
        "eager_1": seconds_of(b) / seconds_of(case.eager) if case.eager else None,
        **{
            f"{half}_{n}ms": ms(s.get(k))
            for half, s in halves.items()
            for n, k in (("", "median"), ("p20_", "p20"), ("p80_", "p80"))
        },
        "mib": mib(bytes_of(b)),
        "mib_total": mib(x.get("peak_total")),
        "process_mib": mib(x.get("process_peak")),
        **{f"{part}_{who}": e.get(part) for who, e in errors.items() for part in ("value", "gradient")},
        **{name: x.get(name) for name in ("first_call_s", "first_call_compiled_s", "bytes", "flops")},
        "limit_ms": ms(x.get("limit_s")),
        "fraction": x.get("fraction"),
        "left_out": None,
    }
