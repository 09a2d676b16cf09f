"""Pictures of a result file: bars of time, memory and fraction of the limit; lines over rows and vocabulary."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import results
from bench.results import Case, Report, bytes_of, mib, ms, seconds_of
from bench.tables import number, relative, shape_text

# One picture for light and dark pages: its own light grey ground. It glares on neither, and its dark text keeps a contrast
# of 13:1; a transparent picture would need colours that stand out from white and from black, 4:1 at best.
GROUND, INK, RULE = "#e4e7eb", "#1f2328", "#9aa3ad"
OURS, EAGER, OTHER = "#cf4a0a", "#3f4a57", "#7f8c9b"
# Told apart by colour-blind people and by their lines; the warm ones are ours.
COLOURS = ("#0b5fa5", "#1b7f5c", "#7a3fa0", "#0097a7", "#8c6d1f", "#5c6bc0", "#9e3d63")
OUR_COLOURS = (OURS, "#f08c1a", "#8f1d0a", "#d98200", "#b5651d")
STYLES = ("-", "--", "-.", ":")
WIDE = 30  # a range for a logarithmic axis

Value = Callable[[Case, dict[str, Any]], float | None]


def _style() -> dict[str, Any]:
    grounds = {f"{part}.facecolor": GROUND for part in ("figure", "axes", "savefig", "legend")}
    inks = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK)
    return (
        grounds | inks | {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    )


def _name(extra_info: dict[str, Any]) -> str:
    return extra_info["provider"] + ("" if extra_info.get("exact", True) else " (approximate)")


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=130, metadata={"Software": None})  # nothing in it that changes with a version
    import matplotlib.pyplot as plt

    plt.close(figure)
    return path


def _grid(plt: Any, panels: int, heights: Sequence[float], title: str) -> tuple[Any, list[Any]]:
    """Two columns, heights in inches of each row."""
    columns = min(2, panels)
    figure, axes = plt.subplots(
        len(heights),
        columns,
        squeeze=False,
        figsize=(5.6 * columns + 0.4 * (columns == 1), sum(heights) + 0.6),
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    figure.suptitle(title, fontsize=10)
    flat = list(axes.flat)
    for spare in flat[panels:]:
        spare.set_visible(False)
    return figure, flat[:panels]


def _bars(plt: Any, chosen: list[Case], value: Value, label: str, unit: str, where: str) -> Any:
    """A panel of sorted bars for each case, on one kind of axis for all."""
    shapes = {shape_text(case.params) for case in chosen}
    shape = shapes.pop() if len(shapes) == 1 else ""
    data, descending = [], "more is better" in label
    for case in chosen:
        measured = [(value(case, b), b) for b in case.runs]
        data.append(
            sorted(((x, b) for x, b in measured if x is not None), key=lambda pair: pair[0], reverse=descending)
        )
    ranges = [[x for x, _ in measured if x > 0] for measured in data]
    log = any(r and max(r) > WIDE * min(r) for r in ranges)
    columns = min(2, len(chosen))
    rows = [max(len(x) for x in data[i : i + columns]) for i in range(0, len(data), columns)]
    figure, panels = _grid(
        plt,
        len(chosen),
        [0.21 * n + 0.75 for n in rows],
        "\n".join((label, shape or "over each panel: rows x hidden size x vocabulary", where)),
    )
    slots = [n for n in rows for _ in range(columns)]
    for axes, case, measured, slot in zip(panels, chosen, data, slots, strict=False):
        xs = [x for x, _ in measured]
        low = min((x for x in xs if x > 0), default=1.0) / 3
        infos = [b["extra_info"] for _, b in measured]
        bars = axes.barh(
            range(len(xs)),
            [max(x, low if log else 0) for x in xs],
            height=0.72,
            color=[OURS if x["ours"] else EAGER if x["provider"] == "eager" else OTHER for x in infos],
        )
        for bar, x in zip(bars, infos, strict=True):
            bar.set_hatch("" if x.get("exact", True) else "////")
            bar.set_edgecolor(GROUND)
        axes.set_yticks(range(len(xs)), [_name(x) for x in infos], fontsize=8)
        for tick, x in zip(axes.get_yticklabels(), infos, strict=True):
            tick.set_fontweight("bold" if x["ours"] else "normal")
        axes.set_ylim(slot - 0.4, -0.6)  # bars of a row are equally thick, the least on top
        against_eager = unit == "eager = 1" and case.eager is not None
        second = [f" ({number(ms(seconds_of(b)))} ms)" if against_eager else "" for _, b in measured]
        labels = axes.bar_label(bars, [number(x) + s for x, s in zip(xs, second, strict=True)], padding=3, fontsize=8)
        for text in labels:
            text.set_bbox({"facecolor": GROUND, "edgecolor": "none", "pad": 0.5})  # over the line of eager
        high = max([x for x in xs if x > 0], default=1.0)
        if log:
            axes.set_xscale("log")
            axes.set_xlim(low, high * (high / low) ** 0.45)
        else:
            axes.set_xlim(0, 1.4 * high)
        if against_eager:
            axes.axvline(1, color=INK, linewidth=0.8, linestyle=":", zorder=0)
        axes.set_title(case.group, fontsize=9, fontweight="bold", loc="left")
        if not shape:
            axes.set_title(results.shape_of(case.params), fontsize=7, loc="right")
        axes.set_xlabel(unit if unit != "eager = 1" or case.eager else "ms", fontsize=8, labelpad=1)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,g}")
        axes.tick_params(axis="x", labelsize=7)
        axes.tick_params(axis="y", length=0)
    return figure


def _memory(case: Case, b: dict[str, Any]) -> float | None:
    return mib(bytes_of(b))


def series(report: Report, axis: str) -> list[list[Case]]:
    """Cases that differ in one size alone, three or more, by that size. The length may go along with the rows."""
    groups: dict[str, dict[int, Case]] = {}
    free = ("rows", "length") if axis == "rows" else (axis,)
    for case in results.cases(report):
        if case.runs and case.params.get(axis) is not None:
            fixed = {name: x for name, x in case.params.items() if name not in free}
            key = json.dumps([case.group, fixed], sort_keys=True)
            groups.setdefault(key, {}).setdefault(case.params[axis], case)
    return [[sizes[n] for n in sorted(sizes)] for sizes in groups.values() if len(sizes) >= 3]


def _lines(plt: Any, chosen: list[list[Case]], axis: str, value: Value, label: str, unit: str) -> Any:
    """A panel of a line for every provider, both axes logarithmic; names at the ends of lines, or one legend for panels."""
    infos = []  # of those with a line to draw
    for cases in chosen:
        candidates = [b["extra_info"] for case in cases for b in case.runs]
        counts = Counter(map(_name, candidates))
        infos += [x for x in candidates if counts[_name(x)] > 1]
    look: dict[str, dict[str, Any]] = {}
    for x in sorted(infos, key=lambda x: (not x["ours"], x["provider"] != "eager")):
        ours, name = x["ours"], _name(x)
        colours, i = OUR_COLOURS if ours else COLOURS, sum(kind["zorder"] == 2 + ours for kind in look.values())
        style = STYLES[i // (1 if ours else len(colours)) % len(STYLES)]
        kind = {
            "color": colours[i % len(colours)],
            "linestyle": style,
            "linewidth": 2.4 if ours else 1.3,
            "zorder": 2 + ours,
        }
        look.setdefault(name, {"color": EAGER, "linewidth": 1.8, "zorder": 1} if name == "eager" else kind)
    columns = min(2, len(chosen))
    figure, panels = _grid(plt, len(chosen), [2.9] * math.ceil(len(chosen) / columns), label)
    for axes, cases in zip(panels, chosen, strict=True):
        for name, kind in look.items():
            runs = [(case, b) for case in cases for b in case.runs if _name(b["extra_info"]) == name]
            points = [(case.params[axis], value(case, b)) for case, b in runs]
            points = [(x, y) for x, y in points if y]  # nothing has no place on a logarithmic axis
            if len(points) > 1 or len(chosen) > 1:
                axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=4, label=name, **kind)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        sizes = [case.params[axis] for case in cases]
        axes.set_xticks(sizes, [f"{n:,}" for n in sizes], fontsize=8, rotation=0 if len(sizes) < 6 else 45)
        axes.minorticks_off()
        low, high = axes.get_ylim()
        ticks = [x for x in _round_numbers(low, high) if low <= x <= high]
        axes.set_yticks(ticks, [number(x) if x < 1 else f"{x:,g}" for x in ticks], fontsize=8)
        axes.grid(True, color=RULE, linewidth=0.4, alpha=0.7)
        last = cases[-1]
        fixed = shape_text({**last.params, axis: None} | ({"length": None} if axis == "rows" else {}))
        axes.set_title(f"{last.group}: {fixed}", fontsize=9, loc="left")
        axes.set_xlabel(
            {"rows": "rows (tokens)", "length": "tokens of a sequence", "vocab": "vocabulary"}[axis], fontsize=8
        )
        axes.set_ylabel(unit, fontsize=8)
    if len(panels) == 1:
        _name_lines(panels[0])
        return figure
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, 1 + len(panels)), fontsize=8)
    return figure


def _name_lines(axes: Any) -> None:
    """Write the name of each line beside its end, in its colour, so far apart that names do not overlap."""
    lines = sorted(axes.get_lines(), key=lambda line: line.get_ydata()[-1])
    low, high = (math.log(y) for y in axes.get_ylim())
    gap, place = 0.062 * (high - low), -math.inf
    for line in lines:
        place = max(math.log(line.get_ydata()[-1]), place + gap)
        axes.annotate(
            line.get_label(),
            (line.get_xdata()[-1], math.exp(place)),
            xytext=(9, 0),
            textcoords="offset points",
            color=line.get_color(),
            fontsize=8,
            va="center",
            weight="bold" if line.get_linewidth() > 2 else "normal",
            annotation_clip=False,
        )
    left, right = axes.get_xlim()
    axes.set_xlim(left, right * (right / left) ** 0.45)


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2, 5 in every decade, or 1 alone over many decades."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**e for e, m in itertools.product(decades, (1, 2, 5) if len(decades) < 5 else (1,))]


def _weight(case: Case) -> tuple[bool, int, int]:
    return case.eager is not None, len(case.runs), case.size


def plot(report: Report, folder: str | Path) -> list[Path]:
    """PNG files, of whatever the report has the numbers for. Needs matplotlib.

    Bars show one case of each workload: with eager code, with the most providers, the largest. Workloads from logits, and
    every dtype after the first, have files of their own: time.png, time_logits.png, time_bfloat16.png.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    machine = report["machine_info"]
    versions = machine.get("versions", {})
    where = ", ".join(
        str(x) for x in (machine.get("device"), f"torch {versions.get('torch')}", report["datetime"][:10]) if x
    )
    pictures: dict[str, dict[str, Case]] = {}
    everything = [case for case in results.cases(report) if case.runs]
    first = everything[0].params if everything else {}
    for case in everything:
        p = case.params
        suffix = (
            "" if bool(p.get("hidden")) == bool(first.get("hidden")) else "_hidden" if p.get("hidden") else "_logits"
        )
        suffix += "" if p["dtype"] == first["dtype"] else f"_{p['dtype']}"
        largest = pictures.setdefault(suffix, {})
        if case.group not in largest or _weight(case) > _weight(largest[case.group]):
            largest[case.group] = case
    bars: dict[str, tuple[Value, str, str]] = {
        "time": (lambda c, b: relative(c, b) if c.eager else ms(seconds_of(b)), "Time of forward + backward, less is better",
                 "eager = 1"),
        "memory": (_memory, "Peak memory beyond inputs and gradients, less is better", "MiB"),
        "fraction": (lambda c, b: b["extra_info"].get("fraction"), "Share of what the hardware allows, more is better",
                     "least possible time / time"),
    }  # fmt: skip
    with plt.rc_context(_style()):
        for suffix, largest in pictures.items():
            chosen = list(largest.values())
            for name, (value, label, unit) in bars.items():
                drawn = [case for case in chosen if any(value(case, b) is not None for b in case.runs)]
                if drawn:
                    figure = _bars(plt, drawn, value, label, unit, where)
                    written.append(_save(figure, folder / f"{name}{suffix}.png"))
        for name, axes, value, label, unit in (
            (
                "memory_by_length",
                ("rows", "length"),
                _memory,
                "Peak memory beyond inputs and gradients",
                "MiB",
            ),
            (
                "memory_by_vocab",
                ("vocab",),
                _memory,
                "Peak memory beyond inputs and gradients",
                "MiB",
            ),
            ("time_by_length", ("rows", "length"), lambda c, b: ms(seconds_of(b)), "Time of forward + backward", "ms"),
        ):
            axis, groups = next(((a, s) for a in axes if (s := series(report, a))), ("", []))
            if groups:
                figure = _lines(plt, groups, axis, value, f"{label}\n{where}", unit)
                written.append(_save(figure, folder / f"{name}.png"))
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """python -m bench plot FILE.json [FOLDER]: by default beside the file."""
    parser = argparse.ArgumentParser("python -m bench plot", description=main.__doc__)
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("folder", nargs="?", type=Path)
    args = parser.parse_args(argv)
    try:
        for path in plot(results.load(args.file), args.folder or args.file.parent):
            print(path)
    except (OSError, ValueError) as e:
        parser.error(str(e))
    return 0
