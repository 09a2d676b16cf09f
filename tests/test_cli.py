"""The command line: what it prints and returns, that `check` catches a wrong kernel, that `memory` tells the truth."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_losses as fl
from fused_losses import check, divergences, env, memory, torch_backend
from fused_losses.__main__ import COMMANDS, main
from fused_losses.losses import LOSSES
from fused_losses.memory_probe import peak_bytes

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["check", "--shape", "1,3,50", "--dtype", "float32", "--device", "cpu"]
FLOATS = list(check.DTYPES.values())


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Whatever a command does to these is undone; empty means not set."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "")
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", ""))
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")


def scaled(monkeypatch, name, index, factor):
    """The torch backend with one of its outputs off by a factor: `index` counts the arguments of forward or backward."""
    run = getattr(torch_backend, name)

    def wrong(*args):
        run(*args)
        if args[index] is not None:
            args[index].mul_(factor)

    monkeypatch.setattr(torch_backend, name, wrong)


# ---- the program -----------------------------------------------------------------------------------------------------


def test_module_runs_and_imports_one_command():
    """A real process: the exit code gets out, and `env` does not pay for the imports of `demo`."""
    code = "import sys; from fused_losses.__main__ import main; code = main(['env'])"
    code += "; print(sorted(m for m in sys.modules if m in ('fused_losses.demo', 'fused_losses.check'))); sys.exit(code)"
    quiet = {**os.environ, "FUSED_LOSSES_BACKEND": "torch"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "why: FUSED_LOSSES_BACKEND=torch" in done.stdout

    bad = [sys.executable, "-m", "fused_losses", "check", "--divergence", "nope"]
    done = subprocess.run(bad, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: divergence: unknown name 'nope'") and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"example: python -m fused_losses {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["check", "--shape", "2,3"], "B,T,V"),
        (["check", "--shape", "2,3,x"], "B,T,V"),
        (["check", "--divergence", "js(beta=2)"], "js beta: expected a number in (0, 1)"),
        (["check", "--divergence", "js(gamma=1)"], "unknown parameter gamma"),
        (["check", "--loss", "nope"], "known: token_stats, sigmoid"),
        (["check", "--loss", "sigmoid", "--divergence", "total_variation"], "cannot be used as an f-DPO link"),
        (["check", "--softcap", "-1", "--device", "cpu"], "softcap: expected a finite number > 0"),
        (["check", "--device", "nope"], "nope"),
        (["check", "--device", "meta", "--backend", "triton"], "cannot run on meta"),
        (["memory", "--batch", "0"], "batch, length, vocab >= 1"),
        (["memory", "--no-ref", "--divergence", "js"], "needs a reference"),
        (["memory", "--divergence", "nope"], "unknown name 'nope'"),
    ],
    ids=" ".join,
)
def test_bad_input_is_an_error_in_words(argv, words, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and words in err and not out


@pytest.mark.parametrize("argv", [[], ["chek"], ["check", "--dtype", "int8"], ["memory", "--batch", "x"]], ids=" ".join)
def test_bad_arguments(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and "usage: " in capsys.readouterr().err


# ---- env -------------------------------------------------------------------------------------------------------------


def test_env_says_what_runs_and_why(capsys, monkeypatch):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for part in ("fused_losses", "python", "torch", "triton", "numpy", "platform", *env.VARIABLES):
        assert f"\n{part} " in "\n" + out, part
    assert torch.__version__ in out and "why: cpu tensors" in out and "Triton does not run" in out
    assert max(map(len, out.splitlines())) <= 120

    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "nope")
    assert main(["env"]) == 1
    assert "nothing runs: FUSED_LOSSES_BACKEND: expected one of triton, torch, got 'nope'" in capsys.readouterr().out


def test_env_reports_a_broken_package(monkeypatch):
    assert env._version("no_such_package_anywhere") == "not installed"
    monkeypatch.setitem(sys.modules, "broken", None)
    assert env._version("broken").startswith(("cannot be imported", "not installed"))


# ---- check -----------------------------------------------------------------------------------------------------------


def test_check_covers_the_registries(capsys):
    rows = check.run((2, 5, 257))
    assert all(row.ok for row in rows), check.table([row for row in rows if not row.ok])
    parts = {(row.what, row.part) for row in rows if row.dtype == "bfloat16"}
    assert parts >= {(name, part) for name in divergences.names() for part in ("value", "dz", "dw")}
    links = {f"{loss}, {link}" for loss in LOSSES for link in divergences.linkable()}
    assert parts >= {(name, part) for name in links for part in ("value", "dz")}
    assert parts >= {("logps", "dz"), ("ref_logps", "dw"), ("entropy", "dz"), ("lse", "dz")}
    assert len(rows) == 3 * len(parts)
    values = [row for row in rows if row.dtype != "float32" and row.part == "value"]
    assert all(row.allowed < 1e-4 for row in values), "values are float32 and must be held to that"


def test_check_prints_a_table(capsys):
    assert main([*SMALL, "--divergence", "reverse_kl", "js(beta=0.3)", "--softcap", "30", "--temperature", "0.7"]) == 0
    out, err = capsys.readouterr()
    assert "js(beta=0.3)" in out and "allowed  1e-5 or" in out and "torch backend" in out
    assert out.splitlines()[-1].startswith("18 of 18 checks pass, worst: float32 ")
    assert max(map(len, out.splitlines())) <= 120 and err == ""
    assert main([*SMALL, "--loss", "sigmoid", "--divergence", "js"]) == 0
    assert "2 of 2 checks pass" in capsys.readouterr().out


@pytest.mark.parametrize("spread", [0.0, 1e-4, 5.0])
def test_check_at_any_spread(spread):
    rows = check.run((1, 6, 301), divergences=["reverse_kl", "forward_kl", "js", "total_variation"], spread=spread)
    assert all(row.ok for row in rows), check.table([row for row in rows if not row.ok])


def test_check_triton(device, capsys):
    pytest.importorskip("triton")
    argv = ["check", "--shape", "1,3,50", "--device", str(device), "--backend", "triton", "--divergence", "forward_kl", "js"]
    assert main([*argv, "--dtype", "float32", "bfloat16"]) == 0
    assert "triton backend: FUSED_LOSSES_BACKEND=triton" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("function", "index", "dtype", "factor", "fails"),
    [
        ("backward", 6, "float32", 1 + 1e-4, "dz"),
        ("backward", 7, "float32", 1 + 1e-4, "dw"),
        ("backward", 6, "bfloat16", 1 + 1e-2, "dz"),
        ("backward", 6, "float16", float("nan"), "dz"),
        ("forward", 8, "bfloat16", 1 + 1e-4, "value"),
        ("pair_forward", 5, "float32", 1 + 1e-4, "value"),
    ],
)
def test_check_catches_a_wrong_kernel(function, index, dtype, factor, fails, monkeypatch, capsys):
    argv = ["check", "--shape", "1,3,50", "--device", "cpu", "--dtype", dtype, "--divergence", "forward_kl"]
    assert main(argv) == 0
    scaled(monkeypatch, function, index, factor)
    assert main(argv) == 1
    lines = capsys.readouterr().out.splitlines()
    wrong = [line.split() for line in lines if line.endswith("NO")]
    assert wrong and {line[-5] for line in wrong} == {fails}
    assert not lines[-1].startswith("11 of 11")


def test_check_catches_a_gradient_in_masked_rows(monkeypatch):
    run = torch_backend.backward

    def wrong(problem, policy, labels, *rest):
        run(problem, policy, labels, *rest)
        if (dz := rest[-2]) is not None:
            dz[labels == -100] = 1e-3

    monkeypatch.setattr(torch_backend, "backward", wrong)
    assert not all(row.ok for row in check.run((1, 3, 50), [torch.float32], losses=["token_stats"]) if row.part == "dz")


def test_check_rejects_labels_out_of_range():
    x = check.make_inputs((1, 3, 50), 1.0, 0, torch.device("cpu"), torch.float32)
    assert (x.labels == -100).any()
    for bad in (50, -1):
        with pytest.raises(ValueError, match=r"labels: expected ids in \[0, 50\) or -100"):
            check.Inputs(x.policy, x.ref, torch.full_like(x.labels, bad), x.weight)


def test_measure_takes_tensors_of_ones_own():
    z = torch.randn(2, 4, 31)
    own = check.Inputs(z, z + 0.1, torch.randint(31, (2, 4)), torch.ones(8))
    (case,) = (case for case in check.cases() if case.what == "logps")
    assert [row.part for row in check.measure(case, own, {"scale": 0.5})] == ["value", "dz"]


# ---- memory ----------------------------------------------------------------------------------------------------------


def step(names, rows, vocab, dtype, device="cpu", both=False, ref=True):
    """A memory.Step and tensors of its sizes."""
    bound = divergences.parse(names)
    z = torch.randn(rows, vocab, device=device).to(dtype).requires_grad_()
    w = torch.randn(rows, vocab, device=device).to(dtype).requires_grad_(both) if ref else None
    labels = torch.randint(vocab, (rows,), device=device)
    return memory.Step(rows, vocab, dtype.itemsize, bound, ref, both), z, w, labels


def gradients(loss, z, w):
    return torch.autograd.grad(loss, [x for x in (z, w) if x is not None and x.requires_grad])


@pytest.mark.parametrize("both", [False, True], ids=["policy", "both"])
@pytest.mark.parametrize(
    "names",
    [[], *([name] for name in divergences.names()), ["reverse_kl", "forward_kl"], ["total_variation", "js", "alpha"]],
    ids="+".join,
)
def test_memory_of_naive_code(names, both):
    for dtype in FLOATS if len(names) != 1 else FLOATS[:2]:
        model, z, w, labels = step(names, 128, 2048, dtype, both=both)
        measured = peak_bytes(lambda: gradients(memory.naive_loss(z, labels, w, model.divergences), z, w))  # noqa: B023
        assert model.naive() == pytest.approx(measured, rel=0.1), dtype


def test_memory_of_naive_code_without_reference():
    model, z, w, labels = step([], 128, 2048, torch.bfloat16, ref=False)
    measured = peak_bytes(lambda: gradients(memory.naive_loss(z, labels, w, ()), z, w))
    assert model.naive() == pytest.approx(measured, rel=0.1)


def ours(model, z, w, labels, inplace=False):
    logits = z * 1 if inplace else z  # in place of something that is not a leaf, as in training
    ours = lambda: fl.token_stats(logits, labels, w, divergence=model.divergences, inplace_backward=inplace)  # noqa: E731

    def loss():
        stats = ours()
        total = stats.logps.sum() + sum(d.sum() for d in stats.divergence.values())
        return gradients(total if w is None else total - stats.ref_logps.sum(), logits, w)

    return peak_bytes(loss)


@pytest.mark.parametrize("both", [False, True], ids=["policy", "both"])
@pytest.mark.parametrize("names", [[], ["forward_kl"], ["alpha", "js"]], ids="+".join)
def test_memory_of_the_torch_backend(names, both, monkeypatch):
    """Gradients and blocks, with blocks small enough for gradients to count, as they do at real sizes."""
    monkeypatch.setattr(torch_backend, "BLOCK_BYTES", 1 << 15)
    model, *tensors = step(names, 256, 2048, torch.float32, both=both)
    assert model.fused("torch") == pytest.approx(ours(model, *tensors), rel=0.1)


@pytest.mark.parametrize("names", [[], ["forward_kl"], ["js"], divergences.names()], ids="+".join)
def test_memory_of_the_torch_backend_in_place(names):
    """Blocks alone. The model is a bound: a little over what is used, never under."""
    model, *tensors = step(names, 256, 8192, torch.bfloat16)
    measured = ours(model, *tensors, inplace=True)
    assert 0.95 * measured <= model.fused("torch", inplace=True) <= 1.3 * measured


def test_memory_of_the_triton_backend(device, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton")
    model, *tensors = step(["forward_kl"], 32, 4096, torch.float32, device)
    ours(model, *tensors)  # what a first launch allocates is not the step's
    assert model.fused("triton") == pytest.approx(ours(model, *tensors), rel=0.1)
    assert model.fused("triton", inplace=True) < 0.02 * model.fused("triton")


def test_memory_report(capsys):
    argv = ["memory", "--batch", "2", "--length", "64", "--vocab", "32000", "--dtype", "bfloat16"]
    assert main([*argv, "--divergence", "forward_kl"]) == 0
    out = capsys.readouterr().out
    assert "[4, 64, 32000] bfloat16, divergence: forward_kl" in out and "naive eager code" in out
    assert max(map(len, out.splitlines())) <= 120

    assert main([*argv, "--json"]) == 0
    sizes = json.loads(capsys.readouterr().out)
    logits = 4 * 64 * 32000 * 2
    assert sizes["policy_logits"] == sizes["reference_logits"] == logits
    assert sizes["naive"] == 6 * logits and logits <= sizes["triton"] < 1.01 * logits
    assert sizes["triton_inplace"] < 0.01 * logits < sizes["torch_inplace"] < sizes["torch"]

    assert main([*argv, "--json", "--no-ref"]) == 0
    assert json.loads(capsys.readouterr().out)["reference_logits"] == 0


def test_memory_knows_every_divergence():
    assert set(memory.NAIVE_DIVERGENCE) == set(divergences.names())
