"""python -m bench static: what every kernel asks of a GPU, found without one.

Two models: machine_code.py compiles each kernel for a target and reads its machine code, traffic.py counts in Triton's
interpreter the bytes that it asks for. From both follows what binds it on an H200, and the fraction of the copy
bandwidth (of the matrix units' peak, for kernels with products) that it can reach at best: a prediction, not a measurement.

    python -m bench static [--targets sm_80 sm_90 sm_100] [--json FILE]    the table, and what exceeds its limit
    python -m bench static --check      compare with the baseline: exit 1 on spills, on 5 % more instructions an entry
    python -m bench static --update     write the baseline: after every change of a kernel that is meant

A baseline belongs to a version of Triton: bench/static.json to the one that constraints.txt names, bench/static-VERSION.json to
another. For a version that has none, spills alone are compared, with static.json.

Counts are per vocabulary entry (logit, pair of logits or tile element; a token for `pair`) in the loops over them, both
sweeps of the two-pass divergences together. "whole" counts besides what a row costs beside these loops: for chunks of a
vocabulary at the widths that the planner picks, and for rows that are not aligned. Logits are bf16 (fp32 in slices, as the
plans hold them), V = 128256.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

from bench import machine_code as mc
from bench.lifetime import end_with_parent

if TYPE_CHECKING:
    from fused_losses.kernels.configs import Config

TARGETS = ("sm_80", "sm_90", "sm_100")
BASELINE = Path(__file__).with_suffix(".json")
KEPT = ("instructions", "whole", "mufu", "spills", "registers", "shared", "fraction")  # in the baseline
TOLERANCE = 1.05

# An H200, whose code is that of sm_90: multiprocessors, Hz, measured bytes/s of a copy; lanes a clock and multiprocessor.
H200, PROCESSORS, CLOCK, COPY = "sm_90", 132, 1.98e9, 4.3e12
ISSUE, MUFU, MATRIX = 128, 16, 2048  # multiplications of bf16
HIDDEN = 4096  # that of the products in the predictions

# Kernels of token_stats that are meant to wait for memory on an H200: instructions a vocabulary entry. It has time for
# 15.6 while a lone bf16 logit arrives, 31.1 for a pair or a lone logit backward, 46.7 for a pair backward (MUFU: an eighth).
MEMORY_BOUND: dict[tuple[str, str], float] = {
    ("logps", "forward"): 12, ("logps + entropy", "forward"): 12, ("logps + collision", "forward"): 12,
    ("logps + entropy + collision", "forward"): 12, ("logps + ref", "forward"): 22,
    ("both KLs", "forward"): 22, ("forward_kl", "forward"): 22, ("reverse_kl", "forward"): 22, ("jeffreys", "forward"): 22,
    ("both KLs + entropy", "forward"): 31.1, ("both KLs + entropy + collision", "forward"): 31.1,
    ("alpha", "forward"): 31.1, ("pearson_chi2", "forward"): 31.1,
    ("neyman_chi2", "forward"): 31.1, ("squared_hellinger", "forward"): 31.1,
    ("logps", "backward"): 31.1, ("logps + entropy", "backward"): 31.1, ("both KLs + entropy", "backward"): 46.7,
    ("reverse_kl", "backward"): 46.7, ("forward_kl", "backward"): 46.7, ("alpha", "backward"): 46.7,
}  # fmt: skip
# Instructions an entry of fold_slice at every chunk that the plan vocab_chunks picks, with what a row costs beside its entries.
CHUNK_BOUND = {
    "logps": 16, "logps + entropy": 16, "logps + collision": 16, "logps + entropy + collision": 16,
    "logps + ref": 32, "both KLs": 32, "reverse_kl": 32, "forward_kl": 32, "jeffreys": 32, "js": 32,
}  # fmt: skip
UNALIGNED_BOUND = 1.15  # instructions of rows that are not aligned over those that are
ROWS = tuple(1024 << i for i in range(7))
VOCABS = (32000, 50257, 128256, 151936, 262144)
STREAMS = ("token_stats", "fold_slice", "add_terms")  # their rows are aligned: 128-bit loads

# Spills that are known: kernel, end of the workload's name, most accesses to local memory, why.
KNOWN_SPILLS = [
    ("token_stats", "both KLs + entropy, strided", 86, "a 64-bit address for every entry of either side"),
    ("token_stats", "total_variation", 6, "sm_100: the longer steps of a term alone save a tenth of the instructions"),
    ("tile_sums", "", 8, "powers: the tile is the largest that does without"),
]  # fmt: skip

Row = dict[str, Any]


# ---- the launches ----------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    kernel: str
    direction: str
    run: Callable[[], None]
    entries: int = 0  # of a thread in a step of its loop; 0: there is no loop over entries
    read: float = 0  # bytes of an entry that cannot be avoided
    total: float = 0  # the same of the whole launch: for tiles, what their tiling cannot avoid
    depth: int = 0  # of a step of the products
    sides: int = 0  # that have products
    whole: Config | None = None  # count what a row costs beside its loop too, in a kernel of this configuration
    chunks: tuple[tuple[int, int], ...] = ()  # with it: sizes of vocabularies, and columns of their chunks


def _problem(case: tuple, vocab: int, softcap: float = 0.0):
    from fused_losses import divergences
    from fused_losses.core.layout import StatsSpec

    names, sums, _ = case
    return StatsSpec(
        divergences=divergences.parse(names),
        entropy="entropy" in sums,
        collision="collision" in sums,
        shift=False,
        ignore_index=-100,
        vocab=vocab,
        softcap=softcap,
        multiplier=1.0,
        ref_softcap=softcap,
        ref_multiplier=1.0,
    )


def _fields(problem, rows: int):
    """state, and saved numbers of as many rows."""
    import torch

    from fused_losses.core import moments
    from fused_losses.core.layout import saved_rows
    from fused_losses.engine import plan_chunks

    state = torch.zeros(moments.fields(plan_chunks.powers(problem)), rows)
    return state, torch.zeros(saved_rows(len(problem.divergences)), rows)


def slices(case: tuple, rows: int = 16, vocab: int = 8192) -> Iterator[Launch]:
    """The kernels of the plan vocab_chunks, which takes the vocabulary in slices (kernels/vocab_chunks.py)."""
    import torch

    from fused_losses.core.layout import Outputs
    from fused_losses.kernels import configs, launch

    problem, ref = _problem(case, vocab), case[2]
    z = torch.zeros(rows, vocab)
    w = torch.zeros_like(z) if ref else None
    labels = torch.zeros(rows, dtype=torch.int64)
    state, saved = _fields(problem, rows)
    n, read = len(problem.divergences), 8 if ref else 4
    config = launch.fold_config(problem, z.dtype)
    for direction, first in (("fresh", 0), ("onto", vocab)):
        part = problem._replace(first=first)
        run = lambda part=part, fresh=not first: launch.fold(part, z, labels, w, state, fresh)  # noqa: E731
        yield Launch(
            "fold_slice", direction, run, config.per_thread, read, read * z.numel(), whole=config, chunks=chunks(ref)
        )
    if any(d.term is not None for d in problem.divergences):
        sums = torch.zeros(2 * n, rows)
        run = lambda: launch.terms(problem, z, labels, w, saved, sums)  # noqa: E731
        yield Launch("add_terms", "", run, configs.CHUNK_TWO_PASS.per_thread, read, read * z.numel())
    yield Launch("merge_states", "", lambda: launch.merge_states(problem, state, state.clone()))
    new = lambda wanted=True: torch.zeros(rows) if wanted else None  # noqa: E731
    outputs = Outputs(
        logps=new(),
        ref_logps=new(ref),
        lse=new(),
        entropy=new(problem.entropy),
        divergence=torch.zeros(n, rows) if n else None,
        hit=torch.zeros(rows, dtype=torch.bool),
        collision=new(problem.collision),
        saved=saved,
    )
    yield Launch("close_states", "", lambda: launch.close(problem, state, labels, outputs))


def tiles(case: tuple, rows: int = 16, vocab: int = 16, width: int = 64, softcap: float = 0.0) -> Iterator[Launch]:
    """The kernel of the plan on_chip (kernels/fused_linear.py), its first sweep and its second."""
    import torch

    from fused_losses.core.layout import HiddenRows
    from fused_losses.kernels import launch

    problem, ref = _problem(case, vocab, softcap), case[2]
    x, weight = (torch.zeros(n, width, dtype=torch.bfloat16) for n in (rows, vocab))
    policy = HiddenRows(x, weight, None, None)
    reference = policy if ref else None
    labels = torch.zeros(rows, dtype=torch.int64)
    state, saved = _fields(problem, rows)
    sums = torch.zeros(2 * len(problem.divergences), rows)
    runs = {"states": lambda: launch.tile_states(problem, policy, labels, reference, state, 1)}
    if any(d.term is not None for d in problem.divergences):
        runs["terms"] = lambda: launch.tile_terms(problem, policy, labels, reference, saved, sums, 1)
    for direction, run in runs.items():
        config = launch.tile_config(problem, torch.bfloat16, ref, direction == "terms")
        asked = -(-rows // config.rows) * vocab + -(-vocab // config.columns) * rows
        per_thread = config.rows * config.columns // (32 * config.warps)
        yield Launch("tile_sums", direction, run, per_thread, 0, asked * 2 * width * (1 + ref), config.depth, 1 + ref)


def tops(rows: int = 16, vocab: int = 8192) -> Iterator[tuple[str, Launch]]:
    """The kernel of fl.topk (kernels/topk.py), by workload: from logits, and from one tile after another."""
    import torch

    from fused_losses.kernels import configs, launch

    problem = _problem(((), (), False), vocab)
    for k, dtype in itertools.product((1, 64, 128), (torch.bfloat16, torch.float32)):
        z = torch.zeros(rows, vocab, dtype=dtype)
        values, ids = torch.zeros(rows, k), torch.zeros(rows, k, dtype=torch.int64)
        for direction, first in (("fresh", 0), ("onto", vocab)):
            part = problem._replace(first=first)
            run = lambda s=part, z=z, v=values, i=ids: launch.top(s, z, v, i, not s.first)  # noqa: E731
            yield (
                f"top {k}, {str(dtype).removeprefix('torch.')}",
                Launch("top_entries", direction, run, configs.TOP.per_thread, z.itemsize),
            )


def cases() -> dict[str, tuple]:
    from fused_losses import divergences

    return mc.launches(list(divergences.names()))


# ---- compiled --------------------------------------------------------------------------------------------------------


def _row(kernel, target: str, workload: str, of: Launch) -> Row:
    row: Row = {"target": target, "kernel": of.kernel, "workload": workload, "direction": of.direction}
    row |= {"spills": mc.spills(kernel), "registers": mc.registers(kernel), "shared": kernel.metadata.shared}
    row |= {"instructions": None, "whole": None, "mufu": None, "loads": {}, "stores": {}, "bytes": of.read or None}
    if of.read:
        row |= {"limit": of.read * mc.INSTRUCTIONS_PER_BYTE, "mufu_limit": of.read * mc.MUFU_PER_BYTE}
    if not of.entries or "cubin" not in kernel.asm:
        return row
    sass, products = mc._disassemble(kernel), []
    if of.kernel == "tile_sums":
        ops, products = mc.nest(sass)
        row["sides"], row["product_instructions"] = of.sides, sum(map(len, products)) / of.entries / of.depth
    elif of.kernel == "top_entries":
        ops = mc.around(sass)
    else:
        innermost = mc.loops(sass)
        found = [loop for loop in innermost if any(op.startswith("MUFU") for op in loop)]
        # each sweep is two loops: whole steps without a mask, then what is left, in a forward in short steps
        sweeps, rest = (found[::2], found[1::2]) if len(found) % 2 == 0 else (found, [])
        ops = [op for loop in sweeps or [max(innermost, key=len)] for op in loop]
        if of.whole:
            short = len(rest[0]) if rest else 0
            row["whole"] = whole_cost(of.whole, of.chunks, len(sweeps[0]), short, mc.beside(sass))
    row["instructions"] = len(ops) / of.entries
    row["mufu"] = sum(op.startswith("MUFU") for op in ops) / of.entries
    moves = [op for loop in (ops, *products) for op in loop]
    row["loads"] = dict(Counter(mc._width(op) for op in moves if op.startswith(("LDG.", "LDGSTS"))))
    row["stores"] = dict(Counter(mc._width(op) for op in moves if op.startswith("STG")))
    return row


def whole_cost(config: Config, chunks: tuple[tuple[int, int], ...], step: int, short: int, beside: int) -> float:
    """Instructions an entry of whole rows, at the worst of the chunks.

    step, short: those of a thread in a whole step and in a short one; beside: those of a row beside its steps.
    """

    def row(width: int) -> int:
        head = 15 if width % 16 else 0  # columns before the first whole step, at most, where rows are not aligned
        steps = (width - head) // config.step
        return steps * step + -(-(width - steps * config.step) // config.lanes) * short + beside

    worst = 0.0
    for vocab, columns in chunks:
        last = vocab % columns
        worst = max(worst, (vocab // columns * row(columns) + bool(last) * row(last)) / vocab)
    return worst * 32 * config.warps


def chunks(ref: bool) -> tuple[tuple[int, int], ...]:
    """Vocabularies, and the columns of their chunks that the planner picks for a GPU."""
    from fused_losses.engine import planner

    found = set()
    for rows, vocab, itemsize, grad in itertools.product(ROWS, VOCABS, (2, 4), (False, True)):
        call = planner.PlanInputs(
            rows,
            vocab,
            HIDDEN,
            HIDDEN * ref,
            itemsize,
            4,
            ref,
            device="cuda",
            backend="triton",
            pair=ref,
            grad_hidden=grad,
            grad_head=grad,
            grad_weight=grad,
            weight=vocab * HIDDEN,
        )
        found.add((vocab, planner.make_plan(call, "vocab_chunks").tile.columns))
    return tuple(found)


def _stats_rows(target: str, workload: str, case: tuple) -> list[Row]:
    """token_stats. Elsewhere than on sm_90 the backward that there is, is the one that has most in its registers."""
    rows = []
    names, _, ref = case
    for to_ref in (False, True)[: 1 + bool(names)]:
        if not to_ref and names and target != H200:
            continue
        (forward, config), (backward, back) = mc.compile_workload(*case, target, to_ref=to_ref)
        read = 4 if ref else 2
        if not rows:
            rows.append(
                _row(forward, target, workload, Launch("token_stats", "forward", _none, config.per_thread, read))
            )
        moved = (4 if names else 2) + (4 if to_ref else 2)
        direction = "backward, both" if to_ref else "backward"
        rows.append(_row(backward, target, workload, Launch("token_stats", direction, _none, back.per_thread, moved)))
    return rows


def _none() -> None:
    pass


def compile_part(target: str, part: str) -> list[Row]:
    """Rows of a workload of token_stats, or of all workloads of the other kernels; called in a process of its own."""
    from fused_losses.kernels import configs

    all_cases = cases()
    if part in all_cases:
        return _stats_rows(target, part, all_cases[part])
    rows = []
    if part == "strided":
        for workload in mc.STRIDED:
            both = mc.compile_workload(*all_cases[workload], target, strided=True)
            for direction, (kernel, _) in zip(("forward", "backward"), both, strict=True):
                rows.append(_row(kernel, target, workload + ", strided", Launch("token_stats", direction, _none)))
    elif part == UNALIGNED:
        for workload, vocab in itertools.product(mc.UNALIGNED, ALIGNED_AND_NOT):
            divergences, sums, ref = all_cases[workload]
            both = mc.compile_workload(divergences, sums, ref, target, vocab, to_ref=ref)
            read, moved = (4, 8) if ref else (2, 4)
            for direction, (kernel, config), count in zip(("forward", "backward"), both, (read, moved), strict=True):
                of = Launch(
                    "token_stats", direction, _none, config.per_thread, count, whole=config, chunks=((vocab, vocab),)
                )
                rows.append(_row(kernel, target, f"{workload}, V = {vocab}", of))
    elif part == "top":
        for workload, of in tops():
            with mc.compiled(target) as kernels:
                of.run()
            rows.append(_row(kernels.pop(), target, workload, of))
    elif part == "pairs":
        for workload, direction, kernel in mc.compile_pairs(target):
            of = Launch("pair", direction, _none, configs.PAIRS.per_thread, 9)  # two floats and a mask
            rows.append(_row(kernel, target, workload, of))
    else:
        launches_of = PARTS[part.removesuffix(OTHER)]
        wanted = [workload for workload in all_cases if (workload in KINDS) != (part in OTHERS)]
        todo = [(workload, launches_of(all_cases[workload])) for workload in wanted]
        if part == "tiles":
            todo.append((SOFTCAP, tiles(all_cases["both KLs"], softcap=30.0)))
        for workload, launches in todo:
            with mc.compiled(target) as kernels:
                for of in launches:
                    of.run()
                    rows.append(_row(kernels.pop(), target, workload, of))
                    assert not kernels, "one launch, one kernel"
    return rows


PARTS: dict[str, Callable[[tuple], Iterator[Launch]]] = {"tiles": tiles, "slices": slices}
KERNELS = {
    "tiles": ("tile_sums",),
    "slices": ("fold_slice", "add_terms", "merge_states", "close_states"),
    "pairs": ("pair",),
    "top": ("top_entries",),
}


# Of token_stats: one sweep of a side and of both with all their sums, a power, two sweeps, and what takes most registers.
KINDS = ("logps + entropy + collision", "both KLs + entropy + collision", "alpha", "js", "alpha_beta")
SOFTCAP = "both KLs, softcap"  # of tiles
OTHER = ", other formulas"
UNALIGNED = "unaligned"
ALIGNED_AND_NOT = (50256, 50257)  # the same rows with one entry more, which begin anywhere in a line of memory
OTHERS = tuple(part + OTHER for part in PARTS)


def parts(targets: list[str], short: bool) -> Iterator[tuple[str, str]]:
    """(target, part) to compile, the longest first. short: for one target everything, but that of slices and tiles only the
    kinds: the rest are the formulas of token_stats again. For each other one the pairs, topk, every kind of token_stats, and of
    the rest every third; tiles of every target are compiled by tests/kernels/test_fused_linear.py."""
    others = [target for target in mc.TARGETS if target != H200]
    turn = {part: others[i % len(others)] for i, part in enumerate(cases())}
    for part in (*PARTS, *OTHERS, "pairs", "top", *cases(), "strided", UNALIGNED):
        for target in targets:
            if part == "strided":
                wanted = target in ("sm_100", "gfx942")
            elif part == UNALIGNED:
                wanted = target == H200 or not short
            elif part in OTHERS:
                wanted = not short
            else:
                wanted = not short or target == H200 or part in ("pairs", "top", *KINDS) or turn.get(part) == target
            if wanted:
                yield target, part


def compiled_by(kernel: str, workload: str) -> str:
    """The part that a row belongs to."""
    if kernel == "token_stats":
        if ", V = " in workload:
            return UNALIGNED
        return "strided" if workload.endswith(", strided") else workload
    part = next(part for part, kernels in KERNELS.items() if kernel in kernels)
    return part if part in ("pairs", "top") or workload in (*KINDS, SOFTCAP) else part + OTHER


# ---- interpreted -----------------------------------------------------------------------------------------------------


def requested(part: str) -> list[tuple[str, str, str, float]]:
    """(kernel, workload, direction, requested / compulsory bytes), in a process that interprets."""
    from bench import traffic

    rows = []
    for workload, case in cases().items():
        names, sums, ref = case
        if part == "token_stats":
            options = {"entropy": "entropy" in sums, "collision": "collision" in sums, "ref": ref, "vocab": 20011}
            forward, backward = traffic.measure(list(names) or None, **options)
            rows += [(part, workload, "forward", forward), (part, workload, "backward", backward)]
            if names:
                both = traffic.measure(list(names), **options, to_ref=True)[1]
                rows.append((part, workload, "backward, both", both))
            continue
        sizes = {"rows": 2} if part == "slices" else {"rows": 192, "vocab": 200, "width": 512}
        for of in PARTS[part](case, **sizes):
            if of.total:
                with traffic.count() as seen:
                    of.run()
                rows.append((of.kernel, workload, of.direction, seen.total / of.total))
    return rows


# ---- all of it -------------------------------------------------------------------------------------------------------


def collect(todo: list[tuple[str, str]], with_bytes: bool = True, progress=sys.stderr) -> list[Row]:
    """Every row, in processes: the compiler and the interpreter exclude each other, and both are slow."""
    rows: list[Row] = []
    ratios: dict[tuple, float] = {}
    jobs = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    calls: list[tuple] = [(False, compile_part, *of) for of in todo]
    if with_bytes:
        calls += [(True, requested, part) for part in ("token_stats", *PARTS)]
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FUSED_LOSSES_BACKEND")}
    clean["OMP_NUM_THREADS"] = "1"
    for interpret in (False, True):
        mine = [call[1:] for call in calls if call[0] == interpret]
        if not mine:
            continue
        overrides = {"TRITON_INTERPRET": "1", "FUSED_LOSSES_BACKEND": "triton"} if interpret else {}
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(jobs, context, end_with_parent)
        with mock.patch.dict(os.environ, clean | overrides, clear=True), pool as executor:
            futures = {executor.submit(*call): call for call in mine}
            for done, future in enumerate(as_completed(futures), 1):
                if future.exception():
                    executor.shutdown(wait=False, cancel_futures=True)
                what = f"{'bytes of ' if interpret else ''}{' '.join(futures[future][1:])}"
                print(f"\r{done}/{len(mine)} {what:<44}", end="", file=progress, flush=True)
                if interpret:
                    for kernel, workload, direction, ratio in future.result():
                        ratios[kernel, workload, direction] = ratio
                else:
                    rows += future.result()
    print(file=progress)
    for row in rows:
        row["requested"] = ratios.get((row["kernel"], row["workload"], row["direction"]))
        row |= predict(row)
    return sorted(rows, key=key)


def predict(row: Row) -> Row:
    """On an H200: ps that an entry takes of each resource, which of them binds, and what fraction of its peak is left for
    the bytes that cannot be avoided (for kernels with products: for those)."""
    if row["target"] != H200 or row["instructions"] is None:
        return {"ps": {}, "binds": None, "fraction": None}
    lanes = PROCESSORS * CLOCK / 1e12
    ps = {"issue": (row.get("whole") or row["instructions"]) / (ISSUE * lanes), "MUFU": row["mufu"] / (MUFU * lanes)}
    if row["kernel"] == "tile_sums":  # one program a multiprocessor: what follows a tile's products waits for them
        matrix, beside = HIDDEN * row["sides"] / (MATRIX * lanes), max(ps.values())
        products = max(matrix, HIDDEN * row["product_instructions"] / (ISSUE * lanes))
        binds = "matrix" if products == matrix > beside else "issue"
        return {"ps": ps | {"matrix": matrix}, "binds": binds, "fraction": matrix / (products + beside)}
    useful = row["bytes"] / COPY * 1e12
    ps["bytes"] = useful * (row["requested"] or 1.0)
    binds = max(ps, key=lambda name: ps[name])
    return {"ps": ps, "binds": binds, "fraction": useful / ps[binds]}


def key(row: Row) -> str:
    return "|".join((row["kernel"], row["workload"], row["direction"], row["target"]))


# ---- what to say about it --------------------------------------------------------------------------------------------


def known_spills(row: Row) -> tuple[int, str]:
    """How many there may be, and why."""
    for kernel, workload_end, count, reason in KNOWN_SPILLS:
        if row["kernel"] == kernel and row["workload"].endswith(workload_end):
            return count, reason
    return 0, ""


def flags(rows: list[Row]) -> list[str]:
    """What exceeds its limit, in words."""
    exceeded = []
    wholes = {key(row): row.get("whole") for row in rows}
    for row in rows:
        allowed = known_spills(row)[0]
        if row["spills"] > allowed:
            exceeded.append(f"{key(row)}: {row['spills']} accesses to spilled registers, {allowed} are known")
        for what in ("loads", "stores"):
            narrow = {int(bits) for bits in row[what]} - {128}
            if narrow and row["kernel"] in STREAMS:
                exceeded.append(
                    f"{key(row)}: {what} of {', '.join(map(str, sorted(narrow)))} bits where rows are aligned"
                )
        aligned = wholes.get(key(row).replace(*map(str, reversed(ALIGNED_AND_NOT))))
        if aligned and row["whole"] > UNALIGNED_BOUND * aligned:
            exceeded.append(
                f"{key(row)}: {row['whole']:.1f} instructions an entry, {aligned:.1f} where rows are aligned"
            )
        most = CHUNK_BOUND.get(row["workload"])
        if row["kernel"] == "fold_slice" and row["target"] == H200 and most and row["whole"] > most:
            exceeded.append(f"{key(row)}: {row['whole']:.1f} instructions an entry of a chunk, limit {most}")
        limit = MEMORY_BOUND.get((row["workload"], row["direction"]))
        if limit is None or row["kernel"] != "token_stats" or row["target"] != H200:
            continue
        if row["instructions"] > limit:
            exceeded.append(f"{key(row)}: {row['instructions']:.1f} instructions an entry, limit {limit:.1f}")
        if row["mufu"] > row["mufu_limit"]:
            exceeded.append(f"{key(row)}: {row['mufu']:.2f} MUFU an entry, limit {row['mufu_limit']:.2f}")
    return exceeded


def baselines() -> list[Path]:
    """All that there are, by version."""
    paths = [BASELINE, *BASELINE.parent.glob(f"{BASELINE.stem}-*.json")]
    return sorted(paths, key=lambda path: json.loads(path.read_text())["triton"])


def baseline_path(triton: str, to_write: bool) -> Path:
    """Where the baseline of a version of Triton is, or is to be written; to compare with, the one that is nearest."""
    if not BASELINE.exists() or json.loads(BASELINE.read_text())["triton"] == triton:
        return BASELINE
    own = BASELINE.with_name(f"{BASELINE.stem}-{triton}.json")
    return own if to_write or own.exists() else BASELINE


def baseline(rows: list[Row]) -> dict:
    kernels = {key(row): {name: row.get(name) for name in KEPT} for row in rows}
    for kept in kernels.values():
        if kept["fraction"] is not None:
            kept["fraction"] = round(kept["fraction"], 3)
    return {"triton": version("triton"), "kernels": kernels}


def compare(old: dict, new: dict, todo: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """(regressions, remarks) of what baseline() returned now against what it returned then; todo: what was compiled."""
    worse, remarks = [], []
    same = old["triton"] == new["triton"]
    if not same:
        remarks.append(f"the baseline is of triton {old['triton']}, this is {new['triton']}: only spills are compared")
    targets, left_out, before = {target for target, _ in todo}, {*parts(list(mc.TARGETS), False)} - {*todo}, {}
    for name, row in old["kernels"].items():
        kernel, workload, _, target = name.split("|")
        if target in targets and (target, compiled_by(kernel, workload)) not in left_out:
            before[name] = row
    worse += [f"{name}: no longer there" for name in before if name not in new["kernels"]]
    for name, now in new["kernels"].items():
        then = before.get(name)
        if then is None:
            worse.append(f"{name}: not in the baseline")
            continue
        if now["spills"] > then["spills"]:
            worse.append(f"{name}: {now['spills']} accesses to spilled registers, {then['spills']} before")
        for what, words in (
            ("instructions", "instructions an entry"),
            ("whole", "instructions an entry of whole rows"),
        ):
            if not same or then.get(what) is None or now.get(what) is None:
                continue
            text = f"{name}: {now[what]:.2f} {words}, {then[what]:.2f} before"
            if now[what] > TOLERANCE * then[what]:
                worse.append(text)
            elif then[what] > TOLERANCE * now[what]:
                remarks.append(text)
    return worse, remarks


def save(path: Path, content: dict, lines: str) -> None:
    """JSON with one line for every element of content[lines]."""
    items = content[lines]
    texts = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in items.items()] if isinstance(items, dict) else None
    texts = texts or [f"  {json.dumps(item)}" for item in items]
    around = "{}" if isinstance(items, dict) else "[]"
    head = "".join(f"{json.dumps(k)}: {json.dumps(v)},\n" for k, v in content.items() if k != lines)
    body = ",\n".join(texts)
    path.write_text(f"{{{head}{json.dumps(lines)}: {around[0]}\n{body}\n{around[1]}}}\n")


def print_table(rows: list[Row], file=None) -> None:
    """By kernel, the worst fraction first; workloads with the same figures share a line."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        figures = json.dumps({k: v for k, v in row.items() if k != "workload"}, sort_keys=True)
        groups.setdefault((row["kernel"], figures), []).append(row)
    line = "{:<12} {:<6} {:<14} {:>6} {:>6} {:>6} {:>5} {:>5} {:>6} {:>4} {:>6} {:>6}  {:<6} {:>5}  {}"
    head = (
        "kernel",
        "target",
        "direction",
        "instr.",
        "whole",
        "limit",
        "MUFU",
        "limit",
        "spills",
        "reg.",
        "shared",
        "bytes",
    )
    print(line.format(*head, "binds", "frac.", "workloads; loads and stores other than of 128 bits"), file=file)
    number = lambda x, digits=1: "" if x is None else f"{x:.{digits}f}"  # noqa: E731

    def order(group: list[Row]) -> tuple:
        first = group[0]
        load = (first["instructions"] or 0) / first.get("limit", 1e9)
        return first["kernel"], first["target"], 2.0 if first["fraction"] is None else first["fraction"], -load

    for group in sorted(groups.values(), key=order):
        r = group[0]
        what = " | ".join(row["workload"] for row in group)
        narrow = " ".join(
            f"{name} {n}x{bits}" for name in ("loads", "stores") for bits, n in r[name].items() if int(bits) != 128
        )
        print(
            line.format(
                r["kernel"],
                r["target"],
                r["direction"],
                number(r["instructions"]),
                number(r.get("whole")),
                number(r.get("limit")),
                number(r["mufu"], 2),
                number(r.get("mufu_limit"), 2),
                r["spills"],
                r["registers"],
                r["shared"],
                number(r["requested"], 3),
                r["binds"] or "",
                number(r["fraction"], 2),
                what + (narrow and f"; {narrow}"),
            ).rstrip(),
            file=file,
        )
    print(
        "\nA prediction for an H200, of sm_90's code: binds, and frac., of the copy bandwidth (tile_sums: of the matrix units'"
        f"\npeak at {HIDDEN} hidden dimensions), at best. bytes: requested / compulsory, of the rows' logits (tile_sums: of"
        "\nits tiling). limit: what an H200 has time for while the compulsory bytes arrive. whole: the instructions with what"
        "\na row costs beside its loops, of fold_slice at the worst of the chunks that the planner picks.",
        file=file,
    )
    for text in sorted({f"{row['kernel']}: {known_spills(row)[1]}" for row in rows if row["spills"]}):
        print(f"known spills of {text}", file=file)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench static", description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=mc.TARGETS, help="all, to check and to update")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="of an earlier --json: compile nothing")
    parser.add_argument("--check", action="store_true", help="compare with the baseline; count no bytes")
    parser.add_argument("--update", action="store_true", help="write the baseline")
    parser.add_argument("--short", action="store_true", help="most for sm_90, some for the others: as the tests do")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="default: that of this version of Triton")
    args = parser.parse_args(argv)
    args.baseline = args.baseline or baseline_path(version("triton"), args.update)
    quiet = args.check or args.update
    args.targets = args.targets or list(mc.TARGETS if quiet else TARGETS)
    todo = list(parts(args.targets, args.short))
    if args.rows:
        rows = [row for row in json.loads(args.rows.read_text())["rows"] if row["target"] in args.targets]
    else:
        rows = collect(todo, with_bytes=not args.check)
    if args.json:
        save(args.json, {"triton": version("triton"), "rows": rows}, "rows")
    if not quiet:
        print_table(rows)
    over = flags(rows)
    print(*(f"over its limit: {text}" for text in over), sep="\n", end="\n" if over else "")
    new = baseline(rows)
    if args.update and args.short:
        parser.error("--update writes all rows of a target: not with --short")
    if args.update:
        old = json.loads(args.baseline.read_text())["kernels"] if args.baseline.exists() else {}
        others = {k: v for k, v in old.items() if k.rpartition("|")[2] not in args.targets}
        save(args.baseline, new | {"kernels": dict(sorted((others | new["kernels"]).items()))}, "kernels")
    if not args.check:
        return 0
    worse, remarks = compare(json.loads(args.baseline.read_text()), new, todo)
    print(*(f"better: {text}" if "before" in text else text for text in remarks), sep="\n", end="\n" if remarks else "")
    print(*(f"worse: {text}" for text in worse), sep="\n", end="\n" if worse else "")
    if worse:
        print("If that is meant: python -m bench static --update")
    return int(bool(worse or over))


if __name__ == "__main__":
    sys.exit(main())
