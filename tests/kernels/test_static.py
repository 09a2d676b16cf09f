"""python -m bench static: the machine code of every kernel against the committed baseline, and faults planted in it."""

import copy
import itertools
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last: it holds kernels/

from bench import static  # noqa: E402
from fused_losses import divergences  # noqa: E402

ROW = {
    "kernel": "token_stats", "workload": "both KLs", "direction": "forward", "target": "sm_90", "instructions": 20.0,
    "mufu": 2.0, "loads": {"128": 4}, "stores": {}, "spills": 0, "registers": 100, "shared": 1024, "bytes": 4,
    "limit": 31.1, "mufu_limit": 3.9, "requested": None,
}  # fmt: skip


@pytest.fixture
def check(tmp_path, capsys):
    """Exit code and output of --check for rows against a baseline."""

    def run(rows, baseline):
        (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
        (tmp_path / "baseline.json").write_text(json.dumps(baseline))
        files = ["--rows", str(tmp_path / "rows.json"), "--baseline", str(tmp_path / "baseline.json")]
        return static.main(["--check", *files, "--targets", "sm_90"]), capsys.readouterr().out

    return run


def test_nothing_is_worse_than_the_baseline(static_report):
    assert static_report.code == 0, static_report.says


def test_every_kernel_of_every_workload_is_there(static_report):
    found = {tuple(row[k] for k in ("target", "kernel", "workload", "direction")) for row in static_report.rows}
    compiled = set(static.parts(list(static.mc.TARGETS), short=True))
    for target, name in itertools.product(static.mc.TARGETS, static.cases()):
        divergence = divergences.get(name) if name in divergences.names() else None
        wanted = []
        if (target, name) in compiled:
            wanted.append(("token_stats", "forward"))
            if divergence:
                wanted.append(("token_stats", "backward, both"))
        if target == "sm_90":
            assert wanted
        if target == "sm_90" and name in static.KINDS:
            wanted += [("fold_slice", "fresh"), ("fold_slice", "onto"), ("merge_states", ""), ("close_states", "")]
            wanted.append(("tile_sums", "states"))
            if divergence and divergence.term is not None:
                wanted += [("add_terms", ""), ("tile_sums", "terms")]
        for kernel, direction in wanted:
            assert (target, kernel, name, direction) in found


def test_the_search_for_the_largest_is_there(static_report):
    """On every target, for one and for many, from the first columns and from later ones."""
    found = {(r["target"], r["workload"], r["direction"]) for r in static_report.rows if r["kernel"] == "top_entries"}
    assert len(found) == len(static.mc.TARGETS) * 12


def part_of(name):
    kernel, workload, _, target = name.split("|")
    return target, static.compiled_by(kernel, workload)


def test_what_is_left_out_of_the_short_report():
    """Nothing of token_stats for one target; of the others no kind of kernel, and no formula of all three."""
    every, short = (set(static.parts(list(static.mc.TARGETS), short=short)) for short in (False, True))
    left_out = every - short
    assert {part for target, part in left_out if target == static.H200} == {*static.OTHERS}
    assert not any(part in (*static.KINDS, "pairs", "strided") for _, part in left_out)
    others = len(static.mc.TARGETS) - 1
    assert all(sum(part == name for _, part in left_out) < others for name in static.cases())
    kinds = [static.cases()[name] for name in static.KINDS]
    assert {bool(names) for names, _, _ in kinds} == {True, False}
    bound = [divergences.get(name) for names, _, _ in kinds for name in names]
    assert any(d.term for d in bound) and any(d.power is not None for d in bound)

    old = json.loads(static.BASELINE.read_text())
    rows = {name: row for name, row in old["kernels"].items() if part_of(name) in short}
    assert len(rows) < len(old["kernels"]) and static.compare(old, old | {"kernels": rows}, list(short)) == ([], [])
    lost = rows.popitem()[0]
    assert static.compare(old, old | {"kernels": rows}, list(short))[0] == [f"{lost}: no longer there"]


def test_figures_are_those_of_a_loop(static_report):
    for row in static_report.rows:
        assert row["registers"] > 0 and row["shared"] >= 0
        counted = row["target"] != "gfx942" and not row["workload"].endswith("strided")
        assert not row.get("whole") or row["whole"] > row["instructions"]
        if counted and row["kernel"] in (*static.STREAMS, "tile_sums", "pair"):
            assert row["instructions"] > 1
            assert row["kernel"] == "pair" or 0.5 < row["mufu"] < row["instructions"]
            assert row["kernel"] != "tile_sums" or row["product_instructions"] > 0
        if counted and row["kernel"] == "top_entries":  # one load of 16 bytes is one of 4 or 8 logits
            assert 5 < row["instructions"] < 12 and row["mufu"] == 0 and set(row["loads"]) == {"128"}


def test_planted_faults(static_report, check):
    rows = [row for row in static_report.rows if row["target"] == "sm_90"]
    now = static.baseline(rows)
    assert check(rows, now)[0] == 0
    name = "token_stats|both KLs|forward|sm_90"

    fewer = copy.deepcopy(now)
    fewer["kernels"][name]["instructions"] /= 1.06
    code, says = check(rows, fewer)
    assert code == 1 and says.count("worse:") == 1 and f"worse: {name}" in says and "--update" in says
    fewer["kernels"][name]["instructions"] *= 1.03  # within 5 %
    assert check(rows, fewer)[0] == 0

    more = copy.deepcopy(now)
    more["kernels"][name]["instructions"] *= 1.1
    code, says = check(rows, more)
    assert code == 0 and f"better: {name}" in says

    gone = copy.deepcopy(now)
    gone["kernels"]["token_stats|of old|forward|sm_90"] = gone["kernels"][name]
    gone["kernels"]["token_stats|of old|forward|sm_80"] = gone["kernels"][name]  # a target that was not asked for
    code, says = check(rows, gone)
    assert code == 1 and says.count("worse:") == 1 and "of old|forward|sm_90: no longer there" in says
    del now["kernels"][name]
    code, says = check(rows, now)
    assert code == 1 and f"{name}: not in the baseline" in says


def test_planted_spill_and_another_triton(check):
    then = static.baseline([ROW])
    spilled = [ROW | {"spills": 4}]
    code, says = check(spilled, then)
    assert code == 1 and "both KLs|forward|sm_90: 4 accesses to spilled registers, 0 before" in says
    other = then | {"triton": "0.1"}
    code, says = check([ROW | {"instructions": 21.5}], other)
    assert code == 0 and "only spills are compared" in says
    code, says = check(spilled, other)
    assert code == 1 and "4 accesses" in says


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None), ({"spills": 1}, "1 accesses to spilled registers"), ({"loads": {"128": 2, "16": 8}}, "loads of 16 bits"),
        ({"instructions": 22.5}, "22.5 instructions an entry, limit 22.0"), ({"mufu": 4.0}, "4.00 MUFU an entry, limit 3.90"),
        ({"instructions": 40.0, "target": "sm_80"}, None),  # the limit is an H200's
    ],
)  # fmt: skip
def test_limits(change, words):
    found = static.flags([ROW | change])
    assert found == [] if words is None else len(found) == 1 and words in found[0]


def test_what_binds():
    """21 instructions for 4 bytes: memory; 62: the issue slots, at half of the bandwidth; 8 MUFU: those."""
    predicted = static.predict(ROW)
    assert predicted["binds"] == "bytes" and predicted["fraction"] == 1.0
    assert predicted["ps"]["bytes"] == pytest.approx(4 / 4.3)
    assert static.predict(ROW | {"requested": 2.0})["fraction"] == 0.5
    slow = static.predict(ROW | {"instructions": 62.2})
    assert slow["binds"] == "issue" and slow["fraction"] == pytest.approx(0.5, rel=0.01)
    assert static.predict(ROW | {"mufu": 8.0})["binds"] == "MUFU"
    assert static.predict(ROW | {"target": "sm_80"})["fraction"] is None


def test_update_keeps_other_targets(tmp_path):
    rows, path = tmp_path / "rows.json", tmp_path / "static.json"
    for target in ("sm_80", "sm_90"):
        rows.write_text(json.dumps({"rows": [ROW | {"target": target}]}))
        assert static.main(["--update", "--rows", str(rows), "--baseline", str(path), "--targets", target]) == 0
    assert [name.rpartition("|")[2] for name in json.loads(path.read_text())["kernels"]] == ["sm_80", "sm_90"]


def test_a_baseline_belongs_to_a_version_of_triton(tmp_path, monkeypatch):
    """What everything is tested with has the file without a version; others have their own, or compare with that one."""
    pinned = tmp_path / "static.json"
    monkeypatch.setattr(static, "BASELINE", pinned)
    assert static.baseline_path("1.0", to_write=True) == pinned
    pinned.write_text(json.dumps({"triton": "1.0", "kernels": {}}))
    assert static.baseline_path("1.0", to_write=False) == pinned
    assert static.baseline_path("2.0", to_write=False) == pinned
    other = static.baseline_path("2.0", to_write=True)
    assert other == tmp_path / "static-2.0.json"
    other.write_text(json.dumps({"triton": "2.0", "kernels": {}}))
    assert static.baseline_path("2.0", to_write=False) == other and static.baselines() == [pinned, other]


def test_table(capsys):
    rows = [
        ROW | {"fraction": 1.0, "binds": "bytes"},
        ROW | {"fraction": 1.0, "binds": "bytes", "workload": "jeffreys"},
    ]
    rows.append(ROW | {"fraction": 0.4, "binds": "issue", "workload": "js", "loads": {"16": 2}})
    static.print_table(rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("js; loads 2x16") and lines[2].endswith("both KLs | jeffreys")  # the worst first
