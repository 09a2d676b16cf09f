"""The benchmark measures what it says: workloads, the gate, limits, the command."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import python

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench import (  # noqa: E402
    busy,
    clock,
    grids,
    measure,
    results,
    run,
    schedule,
    tables,
    targets,
    targets_here,
    warm_up,
    workloads,
)
from bench.providers import Provider, naive, ours, providers  # noqa: E402

CPU = torch.device("cpu")
HIDDEN, LOGITS = workloads.Shape(24, 6, 8, 37, prompt=0.34), workloads.Shape(24, 6, 0, 37, logits="peaked")
LIMITS = measure.Limits(10.0, {"float32": 100.0})
pytestmark = pytest.mark.usefixtures("one_thread")


def shape(w):
    return HIDDEN if w.hidden else LOGITS


def outcomes(w, shape, who, **options):
    """By provider."""
    return {p.name: o for p, o in measure.measure(w, shape, CPU, who, LIMITS, seconds=0, rounds=2, **options)}


@pytest.mark.parametrize("w", workloads.WORKLOADS, ids=lambda w: w.name)
def test_eager_code_and_the_twins_agree_in_float64(w):
    """Two writings of every workload, by different people's formulas: one of them would have to be wrong."""
    p = workloads.Problem.random(shape(w), CPU, w.frozen).double()
    loss = w.formula(naive(p, w.needs), p)
    found = [loss.detach(), *torch.autograd.grad(loss, p.leaves)]
    assert max(measure.errors(found, measure.truth_of(w, p)).values()) < 1e-9
    assert len(p.leaves) == (1 if w.frozen or not w.hidden else 2)


@pytest.mark.parametrize("w", workloads.WORKLOADS, ids=lambda w: w.name)
def test_every_provider_passes_the_gate_or_says_why(w):
    everyone = w.name in (
        "ce",
        "dpo",
        "jsd",
        "grpo k3",
        "kto",
        "logits: logp + entropy",
    )  # importing them takes its time
    who = [p for p in providers() if p.ours or p.name == "eager" or (everyone and "compile" not in p.name)]
    found = outcomes(w, shape(w), who)
    assert list(found) == [p.name for p in who]
    for name, outcome in found.items():
        if isinstance(outcome, str):
            assert outcome in ("does not do it", "not installed", "needs cuda"), (name, outcome)
        else:
            assert len(outcome["seconds"]) == 2 and outcome["peak_total"] > outcome["peak_bytes"] > 0
            assert 0 < outcome["limit_s"] and outcome["error"]["value"] < 2e-3
    assert sum(not isinstance(o, str) for o in found.values()) >= 2, "ours and eager at least"


def test_no_round_begins_after_its_time():
    """One is made in any case; its figures are those of the only round."""
    w, eager = workloads.BY_NAME["ce"], providers()[0]
    [(_, found)] = measure.measure(w, HIDDEN, CPU, [eager], LIMITS, seconds=0, rounds=50, most=0.0)
    assert (
        len(found["seconds"]) == 1 and found["forward"]["p20"] == found["forward"]["p80"] == found["forward"]["median"]
    )


def test_who_must_not_run_now_is_left_out_with_the_reason():
    w, eager = workloads.BY_NAME["ce"], providers()[0]
    [(_, found)] = measure.measure(w, HIDDEN, CPU, [eager], LIMITS, not_now={"eager": "no time left to compile"})
    assert found == "no time left to compile"


def _broken(what):
    """The eager provider with a mistake."""

    def numbers(p, names):
        found = naive(p, names)
        if what == "value":
            found["logps"] = found["logps"] * 1.01
        elif what == "gradient":  # right in value, wrong in slope
            found["logps"] = found["logps"].detach() + 0.5 * (found["logps"] - found["logps"].detach())
        elif what == "nan":
            found["logps"] = found["logps"] * float("nan")
        else:
            raise RuntimeError("no such kernel\nfor this device")
        return found

    return Provider(f"broken {what}", numbers=numbers, offers=frozenset({"logps", "ref_logps"}))


@pytest.mark.parametrize("what", ["value", "gradient", "nan", "exception"])
@pytest.mark.parametrize("name", ["ce", "dpo"])
def test_the_gate_refuses_who_is_wrong(what, name):
    w, eager = workloads.BY_NAME[name], providers()[0]
    right, wrong = outcomes(w, HIDDEN, [eager, _broken(what)]).values()
    assert "seconds" in right
    assert isinstance(wrong, str)
    assert (
        wrong == "fails: RuntimeError: no such kernel for this device"
        if what == "exception"
        else wrong.startswith("WRONG")
    )


def test_a_missing_package_is_a_reason():
    w = workloads.BY_NAME["ce"]
    assert ours("x")._replace(package="no-such-package").why_not(w, CPU) == "not installed"
    assert ours("x")._replace(device="cuda").why_not(w, CPU) == "needs cuda"
    assert ours("x", plan="slices").why_not(workloads.BY_NAME["logits: dpo"], CPU) == "does not do it"


def test_compulsory_bytes_and_flops():
    half = workloads.Shape(8, 4, 16, 100, "bfloat16", prompt=0.5)
    x, head, n = 4 * 16 * 2, 100 * 16 * 2, 4
    assert half.counted == n
    product = 2 * n * 16 * 100
    assert workloads.compulsory(workloads.BY_NAME["dpo"], half) == (2 * (x + head), 2 * x + head, 4 * product)
    assert workloads.compulsory(workloads.BY_NAME["dpo frozen"], half) == (2 * (x + head), 2 * x, 3 * product)
    assert workloads.compulsory(workloads.BY_NAME["dpo saved"], half) == (x + head, 2 * x + head, 3 * product)
    logits = half._replace(hidden=0)
    row = 100 * 2
    assert workloads.compulsory(workloads.BY_NAME["logits: logp"], logits) == (n * row, (n + 8) * row, 0)
    assert workloads.compulsory(workloads.BY_NAME["logits: dpo"], logits) == (2 * n * row, (n + 8) * row, 0)
    assert workloads.compulsory(workloads.BY_NAME["logits: tdpo"], logits) == (2 * n * row, (2 * n + 8) * row, 0)


def test_memory_is_that_of_the_step():
    """A provider that allocates 2 MiB more is seen to."""
    w, megabyte = workloads.BY_NAME["ce"], torch.zeros(1 << 19)

    def greedy(p, names):
        found = naive(p, names)
        return found | {"logps": found["logps"] + (megabyte * found["logps"].sum()).mean() * 0}

    eager = providers()[0]
    more = eager._replace(name="greedy", numbers=greedy)
    found = outcomes(w, HIDDEN, [eager, more], process=True)
    assert found["greedy"]["peak_bytes"] - found["eager"]["peak_bytes"] >= 1 << 20
    grown = found["eager"]["process_peak"]
    assert grown is None or grown >= 0


def test_random_problems():
    peaked = workloads.Problem.random(workloads.Shape(512, 64, 64, 1000, logits="peaked"), CPU)
    plain = workloads.Problem.random(workloads.Shape(512, 64, 64, 1000), CPU)
    mean = [p.mean(naive(p, ["logps"])["logps"]).item() for p in (peaked, plain)]
    assert mean[0] > -2 and mean[1] < -6  # of trained models, and of chance, log 1000 and the spread of 2
    part = plain.part(4)
    assert part.labels.tolist() == plain.labels[[0, 1, 4, 5]].tolist()
    assert not plain.ref_tensors[0].requires_grad


def command(*args):
    done = python("-m", "bench", *args)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_the_command(tmp_path):
    options = "--grid tiny --providers eager fused_losses QuACK* --rounds 2 --seconds 0 --no-warm-up --out"
    code, text = command(*options.split(), str(tmp_path))
    assert code == 0, text
    (path,) = tmp_path.rglob("tiny.json")
    report = json.loads(path.read_text())
    assert {b["extra_info"]["provider"] for b in report["benchmarks"]} == {"eager", "fused_losses"}
    assert {o["provider"] for o in report["left_out"]} == {"QuACK chunked"}
    for b in report["benchmarks"]:
        e = b["extra_info"]
        assert b["stats"]["rounds"] == 2 and 0 < e["forward"]["median"] < b["stats"]["max"] and e["fraction"] > 0
    info = report["machine_info"]
    assert (info["capability"], info["cores"], info["busy"]) == (
        torch.backends.cpu.get_cpu_capability(),
        os.cpu_count(),
        0,
    )
    assert info["copy_gb_s"] > 0 and info["matrix_gflop_s"]["float32"] > 0 and info["versions"]["torch"]
    assert (
        "Where we lose" in text and (path.parent / "tiny.csv").exists() and list((path.parent / "tiny").glob("*.png"))
    )
    code, text = command("compare", str(path), str(path))
    assert code == 0, text
    assert command("--workloads", "no-such-work")[0] == 2


@pytest.mark.slow
def test_a_second_run_finds_everything_compiled(tmp_path, monkeypatch):
    """What may compile is called before anything is timed; the seconds of that call stay those of the first run."""
    for name, folder in warm_up.CACHES.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    options = (
        "--grid tiny --workloads logits:*kl --providers eager torch.compile fused_losses --rounds 2 --seconds 0 --out"
    )
    found = []
    for i in range(2):
        code, text = command(*options.split(), str(tmp_path / str(i)))
        assert code == 0, text
        report = results.load(next((tmp_path / str(i)).rglob("tiny.json")))
        found.append({b["extra_info"]["provider"]: b["extra_info"] for b in report["benchmarks"]})
        assert ("2 that may compile" in text) == (i == 0) and (
            "known from an earlier run, so this one is faster" in text
        ) == i
        assert "3 measurements of 3 providers; cpu, " in text and "minutes in all" in text
    for name in ("torch.compile", "fused_losses"):
        assert found[0][name]["first_call_s"] == found[1][name]["first_call_s"] > 0
        assert found[1][name]["first_call_compiled_s"] > 0
    assert found[1]["torch.compile"]["first_call_compiled_s"] < found[1]["torch.compile"]["first_call_s"]
    assert found[0]["eager"]["first_call_compiled_s"] is None  # it compiles nothing: its first call is the one here


@pytest.mark.slow
def test_a_time_limit_is_kept_and_said(tmp_path, monkeypatch):
    """Without time there are results for nobody; it is one line that says so."""
    for name, folder in warm_up.CACHES.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    options = "--grid quick --providers eager torch.compile --limit 1 --out"
    code, text = command(*options.split(), str(tmp_path))
    assert code == 0, text
    assert "some has to be left out" in text and "no time left" in text and len(text.splitlines()) < 80


@pytest.mark.slow
def test_listing():
    code, text = command("list")
    assert code == 0
    for name in (*workloads.BY_NAME, *(p.name for p in providers()), *grids.GRIDS):
        assert name in text


SHAPE = workloads.Shape(64, 16, 32, 512)


@pytest.fixture
def kept(tmp_path):
    return warm_up.Kept(tmp_path)


def test_what_is_kept_of_first_calls(kept, tmp_path, monkeypatch):
    """Until what a call depends on changes; where nothing was compiled then, the seconds of the compilation stay."""
    task = warm_up.Task("ce", SHAPE, "fused_losses")
    assert kept.seconds(task) is None
    kept.keep(task, warm_up.Outcome(9.0, True))
    kept.save()
    again = warm_up.Kept(tmp_path)
    assert again.seconds(task) == 9.0 and again.seconds(task._replace(workload="dpo")) is None
    monkeypatch.setattr(warm_up, "_identity", lambda provider: "another version")
    assert again.seconds(task) is None
    again.keep(task, warm_up.Outcome(0.5, False))
    assert again.seconds(task) == 9.0
    again.keep(task, warm_up.Outcome(4.0, True))
    assert again.seconds(task) == 4.0
    again.keep(task, warm_up.Outcome(None, False))
    assert again.seconds(task) is None
    kept.path.write_text("no JSON")
    assert warm_up.Kept(tmp_path).first_calls == {}


def test_the_identity_of_a_provider(monkeypatch):
    """Sources of ours count for ours alone, versions and threads for everybody."""
    identity = warm_up._identity.__wrapped__
    before = {name: identity(name) for name in ("fused_losses", "torch.compile")}
    assert before["fused_losses"] != before["torch.compile"]
    monkeypatch.setattr(warm_up.clock, "versions", lambda: {"torch": "0"})
    assert all(identity(name) != old for name, old in before.items())


def test_caches_of_somebody_else_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(warm_up, "FOLDER", tmp_path / "compiled")
    for name in warm_up.CACHES:
        monkeypatch.delenv(name, raising=False)
    assert warm_up.use_caches(fresh=False) == tmp_path / "compiled"
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "compiled" / "triton")
    (tmp_path / "compiled").mkdir()
    assert warm_up.use_caches(fresh=True) and not (tmp_path / "compiled").exists()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert warm_up.use_caches(fresh=False) == tmp_path and os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
    with pytest.raises(ValueError, match="expected no TORCHINDUCTOR_CACHE_DIR in the environment"):
        warm_up.use_caches(fresh=True)


def test_a_first_call_that_fails_is_no_figure():
    good = warm_up.first_call(warm_up.Task("ce", SHAPE, "fused_losses"), CPU)
    assert good.seconds > 0
    bad = warm_up.first_call(warm_up.Task("ce", SHAPE, "QuACK chunked"), CPU)
    assert bad == warm_up.Outcome(None, False)


def test_what_may_compile_comes_first_and_the_slowest_before_all():
    cases = [(workloads.BY_NAME[name], SHAPE, providers()) for name in ("ce", "dpo")]
    tasks = warm_up.tasks_of(cases, CPU)
    named = {p.name: p for p in providers()}
    seconds = [named[task.provider].compiling_s for task in tasks]
    assert seconds == sorted(seconds, reverse=True) and tasks[0].slow and not tasks[-1].slow
    assert not {"eager", "Liger Triton", "QuACK chunked"} & {task.provider for task in tasks}


def test_a_schedule_goes_by_what_earlier_runs_took(kept):
    cases = [(workloads.BY_NAME[name], SHAPE, providers()[:3]) for name in ("ce", "dpo")]
    tasks = warm_up.tasks_of(cases, CPU)
    first = schedule.schedule(cases, tasks, kept, LIMITS, CPU, 2.0)
    assert first.first_calls == tasks and first.compiling > 0 and min(first.cases) >= 2.0
    for task in tasks:
        kept.keep(task, warm_up.Outcome(9.0, True))
    kept.cases[schedule.of_case(cases[1])] = 7.0
    second = schedule.schedule(cases, tasks, kept, LIMITS, CPU, 2.0)
    assert second.first_calls == [] and second.compiling == 0 and second.cases == [first.cases[0], 21.0]
    assert second.share(0, 100.0) + second.share(1, 100.0 - second.share(0, 100.0)) == pytest.approx(100.0)
    lines = schedule.announcement(cases, second, CPU, "a machine", 10.0).splitlines()
    assert lines[0] == "2 workloads and shapes, 6 measurements of 3 providers; a machine"
    assert lines[1] == "first calls: all 2 are known from an earlier run, so this one is faster"
    assert lines[2].endswith("at most 0.2: some has to be left out")


def test_a_core_is_kept_busy_meanwhile():
    """By another process, which is gone afterwards."""
    psutil = pytest.importorskip("psutil")
    me = psutil.Process()
    before = {child.pid for child in me.children()}
    with busy.busy(1):
        [other] = [child for child in me.children() if child.pid not in before]
        used, until = other.cpu_times().user, time.monotonic() + 60
        while other.cpu_times().user < used + 0.05 and time.monotonic() < until:
            time.sleep(0.05)
        assert other.cpu_times().user >= used + 0.05
    assert not psutil.pid_exists(other.pid)


def test_token_stats_by_chunks_against_naive_code_is_in_the_grids():
    for grid in ("quick", "wide", "full", "cpu", "gpu"):
        found = grids.plan(run.parser().parse_args(["--grid", grid]))
        [names] = [{p.name for p in who} for w, _, who in found if w.name == "token_stats"]
        assert {"eager", "fused_losses"} <= names
    w = workloads.BY_NAME["token_stats"]
    found = outcomes(w, HIDDEN, [p for p in providers() if p.name in ("eager", "fused_losses")])
    assert all(outcome["peak_bytes"] > 0 for outcome in found.values())


def test_shrunk_grids_keep_what_is_measured():
    whole, small = (grids.plan(run.parser().parse_args(["--grid", "gpu", *more])) for more in ([], ["--shrink"]))
    assert {w.name for w, _, _ in small} == {w.name for w, _, _ in whole}
    assert {s.dtype for _, s, _ in small} == {s.dtype for _, s, _ in whole} and max(s.rows for _, s, _ in small) == 8
    assert all(s.rows % (2 * s.length) == 0 for _, s, _ in small) and grids.shrunk(HIDDEN).hidden == HIDDEN.hidden


@pytest.mark.parametrize("grid", grids.GRIDS)
def test_grids_name_workloads_that_exist(grid):
    args = run.parser().parse_args(["--grid", grid])
    found = grids.plan(args)
    for job in grids.GRIDS[grid]:
        for pattern in job.workloads.split(","):
            assert any(grids.matches(w.name, pattern) for w in workloads.WORKLOADS), pattern
        for s in job.shapes:
            assert s.rows % (2 * s.length) == 0
            assert any(shape == s for _, shape, _ in found), s
    assert all(who[0].name == "eager" for _, _, who in found)


def test_targets_that_need_no_gpu(tmp_path, monkeypatch):
    """Each row says what, by which command, the target and what was measured: a figure where there is a file."""
    monkeypatch.setattr(targets_here, "CPU", tmp_path)
    lines = targets_here.table().splitlines()
    assert lines[0] == "| what | command | target | measured |" and len(lines) == 2 + len(targets_here.ROWS)
    assert sum("not measured" in line for line in lines) >= 4
    assert all("| not measured |" in line for line in lines[2:5])
    assert all(len(line.split(" | ")) == 4 for line in lines[2:])

    def report(name, *benchmarks):
        of_all = {"machine_info": {}, "commit_info": {}, "datetime": "", "version": results.VERSION, "left_out": []}
        results.save(tmp_path / f"{name}.json", of_all | {"benchmarks": list(benchmarks)})

    def made(group, shape, provider, seconds, peak):
        about = {"ours": provider == "fused_losses", "peak_bytes": peak, "p20": seconds, "p80": seconds}
        return results.benchmark(group, provider, grids.params_of(shape), [seconds], **about)

    small = grids.SMALL._replace(hidden=0)
    rows = [made("logits: token_stats", small, p, s, 1) for p, s in (("torch.compile", 1.0), ("fused_losses", 0.5))]
    naive = [made("token_stats", grids.FULL, p, s, m) for p, s, m in (("eager", 1.0, 32), ("fused_losses", 0.9, 2))]
    report("cpu", *rows, *naive)
    report("quick", *rows, *[made("ce", grids.SMALL, p, s, 1) for p, s in (("eager", 1.0), ("fused_losses", 1.5))])
    lines = targets_here.table().splitlines()
    assert lines[2].endswith("| <= 0.75 x | 0.50 x |") and lines[4].endswith("| 0.90 x, 1/16.0 |")
    assert "quick: of 2 slower in 1, up to 1.50 x, more memory in 0; full: not measured" in lines[5]
    assert clock.ROOT / "docs" / "explanation" / "performance.md" in tables.PAGES


def test_targets_without_a_gpu():
    lines = targets.table([]).splitlines()
    assert len(lines) == 2 + len(targets.TARGETS)
    assert all("| not measured |" in line for line in lines[2:]) and "prediction" in lines[0]
    assert sum("at best" in line for line in lines) >= 5 and "wait for memory alone" in lines[2]


@pytest.mark.slow
def test_training_steps(tmp_path, capsys):
    """Every trainer gives the step's loss and gradients in float64, or it is not timed."""
    pytest.importorskip("trl")
    from bench import training

    assert training.main(["--tiny", "--rounds", "2", "--seconds", "0", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/training.json")
    report = results.load(path)
    assert not report["left_out"]
    assert {(b["group"], b["extra_info"]["provider"]) for b in report["benchmarks"]} == {
        (s.workload, s.provider) for s in training.STEPS
    }
    assert "step: gkd" in capsys.readouterr().out


def test_a_wrong_training_step_is_refused(monkeypatch):
    pytest.importorskip("trl")
    from bench import training
    from bench.workloads import Shape

    wrong = lambda logits, batch, ref: 1.01 * training.sft(logits, batch, ref)  # noqa: E731
    step = training.Step("step: sft", "eager", False, training.partial(training.plain_trainer, wrong, None))
    setting = training.Setting(Shape(64, 16, 32, 512), torch.device("cpu"))
    found = dict(training.measure("step: sft", setting, [step], seconds=0, rounds=1, say=print))
    assert found[step].startswith("WRONG: relative error 1.0e-02 of the value")
