"""Tables of a result file: for a terminal, and for the pages PAGES, where each stands between two markers.

    python -m bench tables                  writes every table of the pages anew, from the files that their markers name
    python -m bench tables --check          exit code 1 if that would change anything
    python -m bench tables FILE.json ...    prints the tables of these files

`<!-- bench:NAME FILE -->` begins a table, on a line of its own, and `<!-- /bench -->` ends it. FILE is relative to the page.
NAME is `all`, `losses` (where we lose), `targets` (targets.py), `targets-here` (targets_here.py), or workloads joined by `;`;
each may be a pattern of what a case is called, as in `dpo-*-bfloat16-random`. Columns may follow: `ce;dpo/ms,MiB,error`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from bench import results
from bench.results import Case, Report, best, bytes_of, mib, ms, seconds_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "explanation" / "performance.md")
NO_TIME = "no time left"
EXPECTED = ("does not do it", "not installed", "needs", f"{NO_TIME} to compile", NO_TIME)  # what reasons begin with
LEGEND = "> ours   * the least, of exact providers   ~ an approximation"
_BLOCK = re.compile(r"^(<!-- bench:([^\n]+) (\S+) -->\n)(.*?)^<!-- /bench -->", re.M | re.S)


def number(x: float | None) -> str:
    """Three digits, as many as a measurement deserves."""
    if x is None:
        return "-"
    if 0 < abs(x) < 0.1:
        return f"{x:.2g}"
    return f"{x:,.{0 if abs(x) >= 100 else 1 if abs(x) >= 10 else 2}f}"


def _error(x: float | None) -> str:
    return "-" if x is None else f"{x:.0e}"


def hardware(report: Report) -> str:
    """Where, and what else was done there."""
    m = report["machine_info"]
    names = [
        m.get("device"),
        None if m.get("device") == m.get("processor") else m.get("processor"),
        m.get("capability"),
    ]
    names += [f"{m[name]} {name}" if m.get(name) else None for name in ("cores", "threads")]
    names += [f"{m['busy']} of them kept busy by others" if m.get("busy") else None]
    return ", ".join(name for name in names if name)


def machine(report: Report) -> str:
    """Where, with what, when."""
    m, commit = report["machine_info"], report["commit_info"]
    names = [hardware(report)]
    names += [f"{name} {version}" for name, version in m.get("versions", {}).items() if version and name != "python"]
    names += [
        f"commit {str(commit.get('id'))[:9]}{' with changes' if commit.get('dirty') else ''}",
        report["datetime"][:10],
    ]
    return ", ".join(name for name in names if name)


def shape_text(params: dict[str, Any]) -> str:
    """Sizes that are None go unmentioned."""
    sizes = {"rows": "{:,} rows", "length": "sequences of {:,}", "hidden": "H={:,}", "vocab": "V={:,}"}
    parts = [text.format(params[name]) for name, text in sizes.items() if params.get(name)]
    kind, _, prompt = params["logits"].partition(", ")  # random, 50% prompt
    return ", ".join([*parts, params["dtype"], f"{kind} logits", *([prompt] if prompt else [])])


def title(case: Case) -> str:
    return f"{case.group}: {shape_text(case.params)}"


def relative(case: Case, b: dict[str, Any]) -> float | None:
    """Time, eager = 1."""
    return seconds_of(b) / seconds_of(case.eager) if case.eager else None


def _cells(case: Case, b: dict[str, Any]) -> list[str]:
    x = b["extra_info"]
    exact = x.get("exact", True)
    fastest, leanest = best(case.runs, "time"), best(case.runs, "memory")
    error = x.get("error") or {}
    return [
        ("> " if x["ours"] else "  ") + x["provider"] + ("" if exact else " ~"),
        number(ms(seconds_of(b))) + ("*" if exact and fastest and seconds_of(b) == seconds_of(fastest) else " "),
        f"{number(ms(x.get('p20')))}-{number(ms(x.get('p80')))}",
        *(number(ms((x.get(half) or {}).get("median"))) for half in ("forward", "backward")),
        number(relative(case, b)),
        number(mib(bytes_of(b))) + ("*" if exact and leanest and bytes_of(b) == bytes_of(leanest) else " "),
        number(mib(x.get("peak_total"))),
        f"{_error(error.get('value'))}/{_error(error.get('gradient'))}",
        number(x.get("first_call_s")),
        number(x.get("first_call_compiled_s")),
        f"{100 * x['fraction']:.0f}%" if x.get("fraction") is not None else "-",
        number(ms(x.get("limit_s"))),
        x.get("remark") or "",
    ]


HEAD = ["  provider", "ms ", "p20-p80", "forward", "backward", "eager=1", "MiB beyond ", "MiB in all", "error v/g",
        "1st call s", "found s", "of limit", "limit ms", ""]  # fmt: skip


def _lines(case: Case, bold: bool) -> list[str]:
    table = [HEAD] + [_cells(case, b) for b in case.runs]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEAD))]
    lines = []
    for row in table:
        cells = (
            [row[0].ljust(widths[0])] + [x.rjust(w) for x, w in zip(row[1:-1], widths[1:-1], strict=True)] + [row[-1]]
        )
        if bold:
            cells = [f"\033[1m{x}\033[0m" if row is HEAD or x[0] == ">" or x[-1:] == "*" else x for x in cells if x]
        lines.append("  ".join(cells).rstrip())
    return lines


def print_tables(report: Report, file: TextIO | None = None) -> None:
    """All of it, and where we lose at the end."""
    out = file or sys.stdout
    bold = out.isatty() and not os.environ.get("NO_COLOR")
    print(f"{report['command']}\n{machine(report)}".strip(), file=out)
    print("Times are medians of forward + backward; MiB beyond: the peak beyond inputs and gradients.", file=out)
    print("1st call: with all that it compiles; found: in a process that finds it compiled.", file=out)
    print(LEGEND, file=out)
    for case in results.cases(report):
        told = [absent for absent in case.left_out if _expected(absent["reason"]) is None]
        if case.runs or told:
            print(f"\n{title(case)}", file=out)
        for line in _lines(case, bold) if case.runs else []:
            print(line, file=out)
        for absent in told:
            print(f"  left out: {absent['provider']}: {absent['reason']}", file=out)
    if summary := left_out(report):
        print(f"\n{summary}", file=out)
    print("\nWhere we lose:", file=out)
    for line in losses(report) or ["nowhere"]:
        print(f"  {line}", file=out)


def _expected(reason: str) -> str | None:
    """The kind of a reason that says nothing about a provider at this case alone."""
    return next((kind for kind in EXPECTED if reason.startswith(kind)), None)


def left_out(report: Report) -> str:
    """In a line, who was not measured for a reason of a common kind: how often, and which workloads had no time."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for absent in report["left_out"]:
        if kind := _expected(absent["reason"]):
            kinds.setdefault(absent["reason"] if kind == "needs" else kind, []).append(absent)
    parts = []
    for kind, absents in sorted(kinds.items(), key=lambda item: -len(item[1])):
        of = "group" if kind == NO_TIME else "provider"
        names = list(dict.fromkeys(absent[of] for absent in absents))
        shown = " / ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        parts.append(f"{kind} {len(absents)}" + (f" ({shown})" if kind != "does not do it" else ""))
    return f"Left out: {'; '.join(parts)}." if parts else ""


def losses(report: Report) -> list[str]:
    """Sentences: where the best of ours is slower, or takes more memory, than the best other exact provider, or is absent."""
    sentences = []
    for case in results.cases(report):
        for what in ("time", "memory"):
            us, them = (best(case.runs, what, ours) for ours in (True, False))
            if us is None and them is not None and what == "time":
                sentences.append(f"{title(case)}: ours did not take part{_reason(case)}")
            if us is not None and them is not None:
                sentences += [f"{title(case)}: {behind}" for behind in [_behind(what, us, them)] if behind]
    return sentences


def _reason(case: Case) -> str:
    reasons = {out["reason"] for out in case.left_out if out["provider"].startswith(("ours", "fused_losses"))}
    return f" ({'; '.join(sorted(reasons))})" if reasons else ""


def _behind(what: str, us: dict[str, Any], them: dict[str, Any]) -> str:
    ours, theirs = us["extra_info"], them["extra_info"]
    mine, peer = (ms(seconds_of(b)) if what == "time" else mib(bytes_of(b)) for b in (us, them))
    if mine <= peer:
        return ""
    times = f"{mine / peer:.2f} times" if peer else "any at all"
    unit = "ms" if what == "time" else "MiB"
    how = f"takes {number(mine)} {unit}, {theirs['provider']} {number(peer)}: {times} (+{number(mine - peer)} {unit})"
    low, high = ours.get("p20"), theirs.get("p80")
    close = what == "time" and low is not None and high is not None and low <= high
    return f"{what}: {ours['provider']} {how}" + (", within the spread of the runs" if close else "")


COLUMNS: dict[str, Callable[[Case, dict[str, Any]], float | None]] = {
    "ms": lambda case, b: ms(seconds_of(b)),
    "eager = 1": relative,
    "MiB": lambda case, b: mib(bytes_of(b)),
    "MiB in all": lambda case, b: mib(b["extra_info"].get("peak_total")),
    "error": lambda case, b: (b["extra_info"].get("error") or {}).get("value"),
    "gradient error": lambda case, b: (b["extra_info"].get("error") or {}).get("gradient"),
    "of limit": lambda case, b: b["extra_info"].get("fraction"),
    "first call s": lambda case, b: b["extra_info"].get("first_call_s"),
}


def markdown(report: Report, workloads: Iterable[str] | None = None, columns: Sequence[str] = ("ms", "MiB")) -> str:
    """Provider x workload, ours first, the least of each column bold; below it what was measured, and where.

    Args:
        workloads: of those only; patterns of Case.label are taken as well.
        columns: of COLUMNS.
    """
    for name in columns:
        if name not in COLUMNS:
            raise ValueError(f"columns: expected some of {', '.join(COLUMNS)}, got {name!r}")
    chosen = [case for case in results.cases(report) if case.matches(workloads) and case.runs]
    if not chosen:
        raise ValueError(f"workloads: expected some of {[c.label for c in results.cases(report)]}, got {workloads}")
    infos = [b["extra_info"] for case in chosen for b in case.runs]
    infos.sort(key=lambda x: (not x["ours"], x["provider"] != "eager", not x.get("exact", True)))
    ours = {x["provider"]: x["ours"] for x in infos}
    exact = {x["provider"] for x in infos if x.get("exact", True)}
    where = {case.label.removeprefix(case.group) for case in chosen}
    head = [f"{c.group if len(where) == 1 else c.label.replace('-', ' ')}, {name}" for c in chosen for name in columns]
    table = [["provider", *head], ["---"] + ["---:"] * len(head)]
    for provider, mine in ours.items():
        cells = [_cell(case, provider, name) for case in chosen for name in columns]
        table.append(
            [f"**{provider}**" if mine else provider + ("" if provider in exact else " (approximate)"), *cells]
        )
    lines = ["| " + " | ".join(row) + " |" for row in table]
    shape = f"{shape_text(chosen[0].params)}; " if len(where) == 1 else ""
    note = "bold: the least of exact providers, and ours; MiB: beyond inputs and gradients"
    return "\n".join(
        [*lines, "", f"`{report['command']}`: {shape}{machine(report)}. Medians of forward + backward; {note}."]
    )


def _cell(case: Case, provider: str, name: str) -> str:
    runs = [b for b in case.runs if b["extra_info"]["provider"] == provider]
    if not runs:
        out = [out["reason"] for out in case.left_out if out["provider"] == provider]
        return out[0].partition(":")[0].lower() if out else ""
    value = COLUMNS[name](case, runs[0])
    text = _error(value) if "error" in name else number(value)
    exact = [COLUMNS[name](case, b) for b in case.runs if b["extra_info"].get("exact", True)]
    least = min((x for x in exact if x is not None), default=None)
    bold = name != "of limit" and value == least and runs[0]["extra_info"].get("exact", True)
    return f"**{text}**" if bold and value is not None else text


def update(text: str, name: str, table: str) -> str:
    """The README with this table in the blocks of that name; ValueError if there is none."""
    if name not in [block[2] for block in _BLOCK.finditer(text)]:
        raise ValueError(
            f"{name}: expected a line <!-- bench:{name} FILE --> and a later line <!-- /bench -->, got none"
        )
    return _BLOCK.sub(lambda m: f"{m[1]}\n{table.strip()}\n\n<!-- /bench -->" if m[2] == name else m[0], text)


def _short(lines: list[str]) -> str:
    """As a list that says the commonest shape once, without what lies within the spread of the runs."""
    shape = re.compile(r": (\d[\d,]* rows, .*? logits): ")
    kept = [line for line in lines if "within the spread" not in line]
    said = [match[1] for line in kept if (match := shape.search(line))]
    common = max(said, key=said.count, default="")
    note = f"\nWhere no shape is named: {common}." if common else ""
    return "\n".join(f"- {line.replace(f': {common}: ', ': ')}" for line in kept) + (f"\n{note}" if kept else "")


def table_of(name: str, report: Report) -> str:
    """What belongs into the block of that name."""
    workloads, _, columns = name.partition("/")
    if workloads == "targets":
        from bench import targets  # which reads tables of its own here

        return targets.table(targets.saved())
    if workloads == "targets-here":
        from bench import targets_here

        return targets_here.table()
    if workloads == "losses":
        return _short(losses(report)) or "Nowhere."
    chosen = None if workloads == "all" else workloads.split(";")
    return markdown(report, chosen, columns.split(",") if columns else ("ms", "MiB"))


def regenerated(path: Path) -> str:
    """The text with every block anew."""
    text = path.read_text("utf-8")
    blocks = _BLOCK.findall(text)
    if any(len(re.findall(f"^<!-- {mark}", text, re.M)) != len(blocks) for mark in ("bench:", "/bench")):
        raise ValueError(f"{path}: expected every <!-- bench:NAME FILE --> to be closed by its own <!-- /bench -->")
    return _BLOCK.sub(lambda m: update(m[0], m[2], table_of(m[2], results.load(path.parent / m[3]))), text)


def stale(pages: Iterable[Path] = PAGES) -> list[Path]:
    """Those whose tables are not what the files say."""
    return [path for path in pages if regenerated(path) != path.read_text("utf-8")]


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench tables", description=__doc__, formatter_class=raw)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.json")
    parser.add_argument(
        "--pages", type=Path, nargs="+", default=PAGES, help="default: README.md and docs/explanation/performance.md"
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    try:
        for path in args.files:
            print_tables(results.load(path))
        if args.files:
            return 0
        if args.check:
            old = stale(args.pages)
            for path in old:
                print(f"{path}: not current: python -m bench tables", file=sys.stderr)
            return int(bool(old))
        for path in args.pages:
            path.write_text(regenerated(path), "utf-8")
    except (OSError, ValueError) as e:
        parser.error(str(e))
    return 0
