"""The result file of `python -m bench`: kept whole, told in tables and pictures, compared; and README.md is current."""

import csv
import io
import json
import sys
from copy import deepcopy
from pathlib import Path

import pytest
from helpers import python

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench import compare, plots, results, tables  # noqa: E402

PARAMS = {"rows": 1024, "length": 128, "hidden": 256, "vocab": 16384, "dtype": "float32", "logits": "random"}
MIB = 2**20


def made(provider, ms, mib, group="dpo", ours=False, exact=True, **params):
    seconds = [ms / 1e3 * f for f in (1.0, 0.98, 1.03)]
    half = {"median": ms / 2e3, "p20": ms / 2.1e3, "p80": ms / 1.9e3}
    return results.benchmark(
        group,
        provider,
        PARAMS | params,
        seconds,
        ours=ours,
        exact=exact,
        source="hidden",
        remark="",
        p20=0.98e-3 * ms,
        p80=1.03e-3 * ms,
        forward=half,
        backward=None,
        peak_bytes=int(mib * MIB),
        peak_total=int((mib + 100) * MIB),
        process_peak=None,
        error={"value": 1e-7, "gradient": 2e-6},
        eager_error={"value": 1e-7, "gradient": 2e-6},
        first_call_s=12.5,
        first_call_compiled_s=0.25,
        bytes=10**7,
        flops=10**10,
        limit_s=1e-3 * ms / 4,
        fraction=0.25,
    )


def report(*benchmarks, left_out=()):
    versions = {"python": "3.11", "torch": "2.13.0", "trl": None}
    return {
        "machine_info": {"device": "cpu", "processor": "x", "threads": 2, "driver": None, "versions": versions},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-01-02T03:04:05+00:00",
        "version": "1",
        "command": "python -m bench --quick",
        "benchmarks": list(benchmarks),
        "left_out": list(left_out),
    }


def absent(provider, reason, group="dpo"):
    return {
        "group": group,
        "provider": provider,
        "shape": "1024x256x16384",
        "dtype": "float32",
        "logits": "random",
        "reason": reason,
    }


@pytest.fixture
def good():
    """Ours is best in everything; an approximation does not count."""
    return report(
        made("eager", 100, 64),
        made("Liger chunked, compiled", 80, 32),
        made("fused_losses", 60, 8, ours=True),
        made("filtered", 10, 1, exact=False),
        left_out=[absent("TRL kernels", "WRONG: gradient 3e-1")],
    )


def printed(r) -> str:
    out = io.StringIO()
    tables.print_tables(r, out)
    return out.getvalue()


# ---- the file ----------------------------------------------------------------------------------------------------------


def test_round_trip(good, tmp_path):
    path = tmp_path / "new" / "r.json"
    results.save(path, good)
    assert results.load(path) == json.loads(json.dumps(good))
    assert path.read_text("utf-8").endswith("}\n") and [p.name for p in path.parent.iterdir()] == ["r.json"]


def test_what_is_not_finite_is_null(good, tmp_path):
    good["benchmarks"][0]["extra_info"]["error"]["value"] = float("nan")
    results.save(tmp_path / "r.json", good)
    loaded = results.load(tmp_path / "r.json")
    assert loaded["benchmarks"][0]["extra_info"]["error"]["value"] is None
    assert "-/2e-06" in printed(loaded)


def test_a_failed_save_leaves_the_old_file(good, tmp_path):
    path = tmp_path / "r.json"
    results.save(path, good)
    before = path.read_text("utf-8")
    with pytest.raises(TypeError):
        results.save(path, good | {"command": object()})
    assert path.read_text("utf-8") == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"benchmarks": []}', "\xff", "null"])
def test_other_files_are_refused_in_words(text, tmp_path):
    (tmp_path / "r.json").write_text(text, "latin-1")
    with pytest.raises(ValueError, match="expected .* `python -m bench`"):
        results.load(tmp_path / "r.json")


def test_incomplete_benchmarks_are_refused_in_words(good, tmp_path):
    del good["benchmarks"][1]["extra_info"]["peak_bytes"]
    good["benchmarks"][0]["stats"] = None
    for _ in range(2):
        results.save(tmp_path / "r.json", good)
        with pytest.raises(ValueError, match="expected a result file"):
            results.load(tmp_path / "r.json")
        good["benchmarks"].pop(0)
    results.save(tmp_path / "r.json", report() | {"version": "0"})
    with pytest.raises(ValueError, match="version 1"):
        results.load(tmp_path / "r.json")


@pytest.mark.parametrize("seconds", [[2.0], [1.0, 3.0], [1.0, 2.0, 3.0, 4.0, 50.0]])
def test_statistics_are_pytest_benchmarks(seconds):
    found = results.stats_of(seconds)
    theirs = pytest.importorskip("pytest_benchmark.stats").Stats()
    for x in seconds:
        theirs.update(x)
    same = ("min", "max", "mean", "stddev", "median", "rounds", "ops", "total", "stddev_outliers")
    assert {name: found[name] for name in same} == pytest.approx({name: getattr(theirs, name) for name in same})
    assert set(theirs.fields) <= set(found) and found["iterations"] == 1


def test_pytest_benchmark_reads_it(good, tmp_path):
    pytest.importorskip("pytest_benchmark")
    results.save(tmp_path / "r.json", good)
    done = python("-m", "pytest_benchmark", "compare", "r.json", "--csv=out.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dpo[") == 4 and "iled to load" not in done.stdout + done.stderr
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 5


def test_csv(good, tmp_path):
    results.write_csv(tmp_path / "r.csv", good)
    rows = list(csv.DictReader((tmp_path / "r.csv").open(encoding="utf-8", newline="")))
    assert [row["provider"] for row in rows] == [
        "filtered",
        "fused_losses",
        "Liger chunked, compiled",
        "eager",
        "TRL kernels",
    ]
    ours, trl = rows[1], rows[4]
    wanted = {"workload": "dpo", "rows": "1024", "vocab": "16384", "dtype": "float32", "ours": "True", "mib": "8.0",
              "mib_total": "108.0", "fraction": "0.25", "forward_ms": "30.0", "backward_ms": "", "torch": "2.13.0"}  # fmt: skip
    assert {name: ours[name] for name in wanted} == wanted
    assert float(ours["ms"]) == pytest.approx(60) and float(ours["eager_1"]) == pytest.approx(0.6)
    assert float(ours["gradient_error"]) == 2e-6 and ours["left_out"] == ""
    assert float(ours["first_call_s"]) == 12.5 and float(ours["first_call_compiled_s"]) == 0.25
    assert trl["left_out"] == "WRONG: gradient 3e-1" and trl["ms"] == "" and trl["hidden"] == "256"


# ---- tables ------------------------------------------------------------------------------------------------------------


def test_tables_mark_the_winner_and_ours(good):
    text = printed(good)
    lines = {line.strip("> ").split("  ")[0].strip("~ "): line for line in text.splitlines()}
    assert (
        lines["fused_losses"].startswith("> ") and "60.0*" in lines["fused_losses"] and "8.00*" in lines["fused_losses"]
    )
    assert "*" not in lines["eager"] and "*" not in lines["Liger chunked, compiled"]
    assert "10.0 " in lines["filtered"] and " ~" in lines["filtered"] and "*" not in lines["filtered"]
    assert " 0.60 " in lines["fused_losses"] and " 1.00 " in lines["eager"] and " 25%" in lines["eager"]
    assert "left out: TRL kernels: WRONG: gradient 3e-1" in text and "\033" not in text
    assert text.endswith("Where we lose:\n  nowhere\n")
    order = [text.index(f"{name}  ") for name in ("filtered ~", "fused_losses", "Liger chunked, compiled", "eager")]
    assert order == sorted(order)


def test_tables_have_the_first_call_in_columns_of_its_own(good):
    lines = printed(good).splitlines()
    head = next(line for line in lines if "1st call s" in line)
    row = next(line for line in lines if line.startswith("> fused_losses"))
    for name, figure in (("1st call s", "12.5"), ("found s", "0.25")):
        assert row[: head.index(name) + len(name)].endswith(figure)
    assert "first call s" in tables.COLUMNS and "| 12.5 |" in tables.markdown(good, columns=["first call s"])


def test_who_was_left_out_in_a_line(good):
    good["left_out"] += [absent(f"peer {i}", "does not do it") for i in range(40)]
    good["left_out"] += [absent(f"peer, {i}", "no time left", group=f"kl {i}") for i in range(5)]
    good["left_out"] += [absent("QuACK", "not installed"), absent("compiled", "no time left to compile")]
    text = printed(good)
    assert len(text.splitlines()) < 25 and "left out: TRL kernels: WRONG" in text
    [line] = [line for line in text.splitlines() if line.startswith("Left out: ")]
    assert line.startswith("Left out: does not do it 40; no time left 5 (kl 0 / kl 1 / kl 2 and 2 more); ")
    assert "not installed 1 (QuACK)" in line and "no time left to compile 1 (compiled)" in line


def test_tables_are_bold_on_a_terminal(good, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = io.StringIO()
    out.isatty = lambda: True
    tables.print_tables(good, out)
    assert "\033[1m> fused_losses" in out.getvalue()
    plain = [x.replace("\033[1m", "").replace("\033[0m", "").rstrip() for x in out.getvalue().splitlines()]
    assert plain == printed(good).splitlines()


def test_a_case_that_nobody_does_is_told(good):
    good["left_out"].append(absent("fused_losses", "fails: E", group="logits: kl") | {"shape": "8x16"})
    good["left_out"][-1]["logits"] = "random, 50% prompt"
    assert (
        "logits: kl: 8 rows, V=16, float32, random logits, 50% prompt\n  left out: fused_losses: fails: E"
        in printed(good)
    )


def test_losses(good):
    assert tables.losses(good) == []
    ours = good["benchmarks"][2]
    ours["stats"]["median"], ours["extra_info"]["p20"] = 0.1, 0.099
    [line] = tables.losses(good)
    assert "time: fused_losses takes 100 ms, Liger chunked, compiled 80.0: 1.25 times (+20.0 ms)" in line
    ours["extra_info"]["p20"] = 0.08
    assert tables.losses(good)[0].endswith("within the spread of the runs")
    ours["stats"]["median"], ours["extra_info"]["peak_bytes"] = 0.06, 40 * MIB
    [line] = tables.losses(good)
    assert (
        line.startswith("dpo: 1,024 rows, ") and "memory: fused_losses takes 40.0 MiB, Liger" in line and "1.25" in line
    )
    good["benchmarks"].append(made("fused_losses, slices", 500, 4, ours=True))  # the leanest of ours counts for memory
    assert tables.losses(good) == []
    good["benchmarks"] = [b for b in good["benchmarks"] if not b["extra_info"]["ours"]]
    good["left_out"].append(absent("fused_losses", "fails: E"))
    assert tables.losses(good) == [
        "dpo: 1,024 rows, sequences of 128, H=256, V=16,384, float32, random logits: ours did not take part (fails: E)"
    ]


def test_markdown(good):
    good["benchmarks"].append(made("eager", 7, 3, group="sft + kl"))
    text = tables.markdown(good)
    lines = text.splitlines()
    assert lines[0] == "| provider | dpo, ms | dpo, MiB | sft + kl, ms | sft + kl, MiB |"
    assert lines[2] == "| **fused_losses** | **60.0** | **8.00** |  |  |" and lines[3].startswith(
        "| eager | 100 | 64.0 | **7.00** |"
    )
    assert (
        "| filtered (approximate) | 10.0 | 1.00 |" in text
        and "python -m bench --quick" in text
        and "commit 012345678," in text
    )
    assert tables.markdown(good, ["sft*"], ["eager = 1"]).splitlines()[2] == "| eager | **1.00** |"
    for wrong in ({"workloads": ["x"]}, {"columns": ["x"]}):
        with pytest.raises(ValueError, match="expected some of"):
            tables.markdown(good, **wrong)


def test_readme_blocks(good, tmp_path, capsys):
    results.save(tmp_path / "bench" / "r.json", good)
    readme = tmp_path / "README.md"
    begin, end = "<!-- bench:{} bench/r.json -->", "<!-- /bench -->"
    text = f"top\n{begin.format('all')}\nold\n{end}\nmiddle\n"
    text += "".join(f"{begin.format(name)}\n{end}\n" for name in ("dpo/ms,error", "losses")) + "last\n"
    readme.write_text(text, "utf-8")
    updated = tables.update(text, "all", "| new |")
    assert "old" not in updated and "all bench/r.json -->\n\n| new |\n\n<!-- /bench -->\nmiddle" in updated
    assert updated.endswith(text[text.index("middle") :])
    with pytest.raises(ValueError, match="expected a line"):
        tables.update(text, "none", "")
    options = ["--pages", str(readme)]
    assert tables.stale([readme]) and tables.main([*options, "--check"]) == 1 and readme.read_text("utf-8") == text
    assert tables.main(options) == 0 and not tables.stale([readme]) and tables.main([*options, "--check"]) == 0
    found = readme.read_text("utf-8")
    assert "| provider | dpo, ms | dpo, error |" in found and "\nNowhere.\n" in found and found.startswith("top\n")
    readme.write_text(text.replace(end, "", 1), "utf-8")
    with pytest.raises(SystemExit):
        tables.main(options)
    assert "closed by its own" in capsys.readouterr().err
    assert tables.main([str(tmp_path / "bench" / "r.json")]) == 0 and "Where we lose" in capsys.readouterr().out


def test_the_pages_are_current():
    assert tables.stale() == [], "python -m bench tables"
    assert all(path.exists() for path in tables.PAGES)


# ---- comparing ---------------------------------------------------------------------------------------------------------


def test_compare_finds_what_became_worse(good):
    new = deepcopy(good)
    assert compare.compare(good, new)[1] == []
    eager, liger, ours, _ = new["benchmarks"]
    liger["stats"]["median"] *= 1.05
    ours["stats"]["median"] *= 1.5
    ours["extra_info"]["peak_bytes"] *= 2
    ours["extra_info"]["error"]["gradient"] *= 3
    lines, regressions = compare.compare(good, new)
    assert [line.partition(": ")[2].partition(":")[0] for line in regressions] == [
        "slower",
        "more memory",
        "a larger error",
    ]
    assert all(line.startswith("dpo[fused_losses-1024x256x16384-float32-random]: ") for line in regressions)
    assert "60.0 ms before, 90.0 ms now (1.50 times)" in regressions[0] and "16.0 MiB now" in regressions[1]
    assert any("1.50!" in line and "2.00!" in line and "3.00!" in line for line in lines)
    assert len(compare.compare(good, new, metrics=("memory",))[1]) == 1
    assert len(compare.compare(good, new, threshold=0.04)[1]) == 4 and compare.compare(new, good)[1] == []


def test_compare_relative_to_eager(good):
    new = deepcopy(good)
    for b in new["benchmarks"]:
        b["stats"]["median"] *= 2
    assert len(compare.compare(good, new)[1]) == 4 and compare.compare(good, new, relative=True)[1] == []
    new["benchmarks"][2]["stats"]["median"] *= 2
    [line] = compare.compare(good, new, relative=True)[1]
    assert "0.60 of eager before, 1.20 of eager now" in line
    del new["benchmarks"][0]
    assert compare.compare(good, new, relative=True)[1] == []


def test_compare_below_the_floor_nothing_counts(good):
    good["benchmarks"][0]["extra_info"] |= {"peak_bytes": 0, "error": {"value": 0.0, "gradient": 0.0}}
    new = deepcopy(good)
    new["benchmarks"][0]["extra_info"] |= {"peak_bytes": 1024, "error": {"value": 1e-8, "gradient": 1e-8}}
    assert compare.compare(good, new)[1] == []
    new["benchmarks"][0]["extra_info"] |= {"peak_bytes": MIB, "error": {"value": 1e-3, "gradient": 0.0}}
    assert len(compare.compare(good, new)[1]) == 2


def test_compare_names_the_missing_and_other_machines(good):
    new = deepcopy(good)
    gone = [new["benchmarks"].pop(i)["extra_info"]["provider"] for i in (0, 0)]
    new["left_out"] += [absent(gone[0], "WRONG: value 2e-1"), absent(gone[1], "not installed")]
    new["benchmarks"].append(made("eager", 1, 1, group="kto"))
    new["machine_info"]["device"], new["machine_info"]["versions"]["torch"] = "NVIDIA H200", "2.14.0"
    lines, regressions = compare.compare(good, new)
    assert regressions == ["dpo[eager-1024x256x16384-float32-random]: measured before, now left out: WRONG: value 2e-1"]
    assert [line for line in lines if line.startswith("missing now: dpo[Liger") and "(not installed)" in line]
    assert "new: kto[eager-1024x256x16384-float32-random]" in lines
    assert [line.split(":")[0] for line in lines[:2]] == ["warning", "warning"]
    assert "device cpu before, NVIDIA H200 now" in lines[0] and "torch" in lines[1]


def test_compare_refuses_times_of_another_machine(good, tmp_path, capsys):
    old, new = (str(tmp_path / name) for name in ("old.json", "new.json"))
    good["machine_info"] |= {"capability": "AVX2", "cores": 2, "busy": 0}
    results.save(old, good)
    good["machine_info"] |= {"capability": "AVX512", "busy": 1}
    results.save(new, good)
    with pytest.raises(SystemExit) as e:
        compare.main([old, new])
    assert e.value.code == 2
    says = capsys.readouterr().err
    assert "capability AVX2 before, AVX512 now; busy 0 before, 1 now" in says and "--relative" in says
    for allowed in (["--relative"], ["--anyway"], ["--metric", "memory"], ["--metric", "error"]):
        assert compare.main([old, new, *allowed]) == 0
    del good["machine_info"]["capability"], good["machine_info"]["busy"]  # a file from before they were written
    results.save(new, good)
    assert compare.main([old, new]) == 0


def test_compare_exit_codes(good, tmp_path, capsys):
    old, new = (str(tmp_path / name) for name in ("old.json", "new.json"))
    results.save(old, good)
    good["benchmarks"][2]["stats"]["median"] *= 1.3
    results.save(new, good)
    assert compare.main([old, old]) == 0 and compare.main([old, new]) == 1
    assert "1 worse by more than 10%" in capsys.readouterr().out
    assert compare.main([old, new, "--threshold", "50%"]) == compare.main([old, new, "--metric", "memory"]) == 0
    assert compare.main([old, new, "--threshold", "0.2"]) == compare.main([old, new, "--relative"]) == 1
    for wrong in ([old, str(tmp_path / "none")], [old, new, "--threshold", "10"], [old, new, "--threshold", "-1%"]):
        with pytest.raises(SystemExit) as e:
            compare.main(wrong)
        assert e.value.code == 2


# ---- pictures ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(good):
    for i, rows in enumerate((2048, 4096)):
        scale = 2 ** (i + 1)
        good["benchmarks"] += [
            made("eager", 100 * scale, 64 * scale, rows=rows),
            made("fused_losses", 60 * scale, 8, ours=True, rows=rows),
        ]
    return good


def test_plots_that_apply(good, sweep, tmp_path):
    pytest.importorskip("matplotlib")
    written = plots.plot(sweep, tmp_path / "a")
    assert [p.name for p in written] == [
        "time.png",
        "memory.png",
        "fraction.png",
        "memory_by_length.png",
        "time_by_length.png",
    ]
    assert all(p.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for p in written)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(p.name for p in written)


def test_plots_without_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    lonely = made("fused_losses", 5, 0, ours=True, hidden=None, length=None)
    lonely["extra_info"] |= {"fraction": None, "limit_s": None}
    other = made("fused_losses", 5, 0, ours=True, dtype="bfloat16")
    written = plots.plot(report(lonely, other), tmp_path)
    assert {p.name for p in written} == {f"{n}_hidden_bfloat16.png" for n in ("time", "memory", "fraction")} | {
        "time.png",
        "memory.png",
    }
    assert plots.plot(report(), tmp_path) == []


def test_series_follow_one_axis():
    many = [made("eager", 1, 1, rows=64 * n, length=8 * n, vocab=v) for n in (4, 1, 2) for v in (128, 256)]
    found = plots.series(report(*many), "rows")
    assert [[case.params["rows"] for case in cases] for cases in found] == [[64, 128, 256]] * 2
    assert plots.series(report(*many), "vocab") == [] and plots.series(report(*many), "length") == []
    lengths = [made("eager", 1, 1, length=n) for n in (1, 2, 3)]
    assert len(plots.series(report(*lengths), "length")[0]) == 3
