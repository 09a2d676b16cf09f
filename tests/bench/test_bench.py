"""The benchmark measures what it says: workloads, the gate, limits, the command."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import python

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench import measure, results, run, targets, workloads  # noqa: E402
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
    code, text = command(
        "--grid",
        "tiny",
        "--providers",
        "eager",
        "fused_losses",
        "QuACK*",
        "--rounds",
        "2",
        "--seconds",
        "0",
        "--out",
        str(tmp_path),
    )
    assert code == 0, text
    (path,) = tmp_path.rglob("tiny.json")
    report = json.loads(path.read_text())
    assert {b["extra_info"]["provider"] for b in report["benchmarks"]} == {"eager", "fused_losses"}
    assert {o["provider"] for o in report["left_out"]} == {"QuACK chunked"}
    for b in report["benchmarks"]:
        e = b["extra_info"]
        assert b["stats"]["rounds"] == 2 and 0 < e["forward"]["median"] < b["stats"]["max"] and e["fraction"] > 0
    info = report["machine_info"]
    assert info["copy_gb_s"] > 0 and info["matrix_gflop_s"]["float32"] > 0 and info["versions"]["torch"]
    assert (
        "Where we lose" in text and (path.parent / "tiny.csv").exists() and list((path.parent / "tiny").glob("*.png"))
    )
    code, text = command("compare", str(path), str(path))
    assert code == 0, text
    assert command("--workloads", "no-such-work")[0] == 2


@pytest.mark.slow
def test_listing():
    code, text = command("list")
    assert code == 0
    for name in (*workloads.BY_NAME, *(p.name for p in providers()), *run.GRIDS):
        assert name in text


@pytest.mark.parametrize("grid", run.GRIDS)
def test_grids_name_workloads_that_exist(grid):
    args = run.parser().parse_args(["--grid", grid])
    found = run.plan(args)
    for job in run.GRIDS[grid]:
        for pattern in job.workloads.split(","):
            assert any(run.matches(w.name, pattern) for w in workloads.WORKLOADS), pattern
        for s in job.shapes:
            assert s.rows % (2 * s.length) == 0
            assert any(shape == s for _, shape, _ in found), s
    assert all(who[0].name == "eager" for _, _, who in found)


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
