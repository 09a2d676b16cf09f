"""The command line: what it prints and returns, that `check` catches a wrong kernel, that `memory` tells the truth."""

import inspect
import json
import os
from pathlib import Path

import pytest
import torch
from helpers import python

import fused_losses as fl
from fused_losses import divergences
from fused_losses.__main__ import COMMANDS, main
from fused_losses.backends import torch_backend
from fused_losses.cli import check, env, memory
from fused_losses.cli.memory_probe import peak_bytes
from fused_losses.core.batch import token_batch
from fused_losses.engine import planner
from fused_losses.engine.prepare import ExecutionOptions, prepare_call
from fused_losses.losses import LOSSES

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["check", "--shape", "1,3,50", "--dtype", "float32", "--device", "cpu", "--backend", "torch"]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What --backend sets is undone."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", os.environ.get("FUSED_LOSSES_BACKEND", ""))
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_module_runs_and_imports_one_command():
    """A real process: the exit code gets out, and `env` does not pay for the imports of `demo`."""
    env = {**os.environ, "FUSED_LOSSES_BACKEND": "torch"}
    code = "import sys; from fused_losses.__main__ import main; code = main(['env'])"
    code += "; print({'fused_losses.cli.demo', 'fused_losses.cli.check'} & {*sys.modules}); sys.exit(code)"
    done = python("-c", code, env=env)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "set()", done.stderr
    assert "why: FUSED_LOSSES_BACKEND=torch" in done.stdout

    done = python("-m", "fused_losses", "check", "--divergence", "nope", env=env)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: divergence: unknown name 'nope'") and "Traceback" not in done.stderr


def test_help_and_usage(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        assert f"example: python -m fused_losses {command}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["chek"])
    assert "usage: " in capsys.readouterr().err


@pytest.mark.parametrize("nested", [False, True], ids=["text", "text and images"])
def test_memory_of_a_model_of_transformers(nested, tmp_path, capsys):
    """By its config.json, or the folder; with a picture by sequence length."""
    sizes = {"vocab_size": 32000, "hidden_size": 512}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "text_config": sizes} if nested else sizes))
    numbers = ["--vocab", "32000", "--hidden", "512", "--length", "256", "--json"]
    assert main(["memory", *numbers]) == 0
    expected = capsys.readouterr().out
    for where in (tmp_path, tmp_path / "config.json"):
        assert (
            main(["memory", "--config", str(where), "--length", "256", "--json", "--plot", str(tmp_path / "x.png")])
            == 0
        )
        assert capsys.readouterr().out == expected
    assert (tmp_path / "x.png").stat().st_size > 10_000
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x"}))
    assert main(["memory", "--config", str(tmp_path)]) == 2
    assert "got keys model_type" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["check", "--shape", "2,3,x"], "B,T,V"),
        (["check", "--divergence", "js(beta=2)"], "js beta: expected a number in (0, 1)"),
        (["check", "--loss", "nope"], "known: token_stats, sigmoid"),
        (["check", "--loss", "sigmoid", "--divergence", "total_variation"], "cannot be used as an f-DPO link"),
        (["check", "--softcap", "-1", "--device", "cpu"], "softcap: expected a finite number > 0"),
        (["check", "--device", "meta", "--backend", "triton"], "cannot run on meta"),
        (["memory", "--batch", "0"], "batch, length, vocab >= 1"),
        (["memory", "--no-ref", "--divergence", "js"], "needs a reference"),
        (["memory", "--frozen"], "need --hidden"),
        (["memory", "--hidden", "0"], "hidden, ref-hidden: expected numbers >= 1, got 0, 0"),
        (["memory", "--hidden", "8", "--workspace", "1"], "workspace: expected at least"),
        (["memory", "--plot", "x.png"], "--plot: need --hidden H"),
        (
            ["memory", "--config", "nowhere"],
            "config: expected a transformers config.json with vocab_size and hidden_size",
        ),
        (["memory", "--config", "setup.py"], "as in --config model/config.json, got setup.py"),
        (["memory", "--config", "nowhere", "--vocab", "8"], "config: expected it in place of --vocab and --hidden"),
    ],
    ids=" ".join,
)
def test_bad_input_is_an_error_in_words(argv, words, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and words in err and not out


def test_env_says_what_runs_and_why(capsys, monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "")  # as if not set
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for part in ("fused_losses", "python", "torch", "triton", "numpy", "platform", *env.VARIABLES):
        assert f"\n{part} " in "\n" + out, part
    assert torch.__version__ in out and "why: cpu tensors" in out
    assert "Triton does not run" in out or "loops that torch.compile makes" in out
    assert max(map(len, out.splitlines())) <= 120

    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "nope")
    assert main(["env"]) == 1
    assert (
        "nothing runs: FUSED_LOSSES_BACKEND: expected one of triton, torch, compiled, got 'nope'"
        in capsys.readouterr().out
    )


def test_env_and_check_as_json(capsys, monkeypatch):
    """What they print, for a script; the exit code is the same."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"].startswith(torch.__version__) and found["backends"]["cpu"]["backend"] == "torch"
    assert found["environment"]["FUSED_LOSSES_BACKEND"] == "torch" and "cpu" in found["devices"]
    assert main([*SMALL, "--divergence", "reverse_kl", "--dtype", "float32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and all(row["ok"] and row["ours"] <= row["allowed"] for row in found["rows"])
    assert {row["part"] for row in found["rows"]} >= {"value", "dz"} and found["verified"][0]["findings"] == []
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "nope")
    assert main(["env", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["backends"]["cpu"]["backend"] is None


def test_check_covers_the_registries():
    rows = check.run((2, 5, 257))
    assert all(row.ok for row in rows), check.table([row for row in rows if not row.ok])
    parts = {(row.what, row.part) for row in rows if row.dtype == "bfloat16"}
    assert parts >= {(name, part) for name in divergences.names() for part in ("value", "dz", "dw")}
    links = {f"sigmoid, {link}" for link in divergences.linkable()} | {f"{loss}, reverse_kl" for loss in LOSSES}
    assert parts >= {(name, part) for name in links for part in ("value", "dz")}
    assert parts >= {("logps", "dz"), ("ref_logps", "dw"), ("entropy", "dz"), ("lse", "dz")}
    assert len(rows) == 3 * len(parts)
    values = [row for row in rows if row.dtype != "float32" and row.part == "value"]
    assert all(row.allowed < 1e-4 for row in values), "values are float32 and must be held to that"


def test_check_prints_a_table(capsys):
    assert main([*SMALL, "--divergence", "reverse_kl", "js(beta=0.3)", "--softcap", "30", "--temperature", "0.7"]) == 0
    out, err = capsys.readouterr()
    assert "js(beta=0.3)" in out and "allowed  1e-5 or" in out and "torch backend" in out
    assert out.splitlines()[-1].startswith("48 of 48 checks pass, worst: float32 ")
    assert max(map(len, out.splitlines())) <= 120 and err == ""
    assert main([*SMALL, "--loss", "sigmoid", "--divergence", "js"]) == 0
    assert "2 of 2 checks pass" in capsys.readouterr().out


@pytest.mark.parametrize("spread", [0.0, 1e-4, 5.0])
def test_check_at_any_spread(spread):
    rows = check.run((1, 6, 301), divergences=["reverse_kl", "forward_kl", "js", "total_variation"], spread=spread)
    assert all(row.ok for row in rows), check.table([row for row in rows if not row.ok])


@pytest.mark.slow
def test_check_triton(device, capsys):
    pytest.importorskip("triton")
    argv = (
        f"check --shape 1,3,50 --device {device} --backend triton --divergence forward_kl js --dtype float32 bfloat16"
    )
    assert main(argv.split()) == 0
    assert "triton backend: FUSED_LOSSES_BACKEND=triton" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("function", "output", "spoil", "dtype", "fails"),
    [
        ("backward", "d_policy", 1 + 1e-4, "float32", "dz"),
        ("backward", "d_ref", 1 + 1e-4, "float32", "dw"),
        ("backward", "d_policy", 1 + 1e-2, "bfloat16", "dz"),
        ("backward", "d_policy", float("nan"), "float16", "dz"),
        ("backward", "d_policy", "leak", "float32", "dz"),
        ("forward", "divergence", 1 + 1e-4, "bfloat16", "value"),
        ("pair_forward", "losses", 1 + 1e-4, "float32", "value"),
    ],
)
def test_check_catches_a_wrong_kernel(function, output, spoil, dtype, fails, monkeypatch, capsys):
    """One output of one function of the torch backend is spoilt."""
    run = getattr(torch_backend, function)

    def wrong(*args):
        run(*args)
        given = inspect.signature(run).bind(*args).arguments
        x = given[output] if output in given else getattr(given["out"], output)
        if spoil == "leak" and x is not None:
            x[given["labels"] == -100] = 1e-3  # a gradient where there is no token
        elif x is not None:
            x.mul_(spoil)

    argv = ["check", "--shape", "1,3,50", "--device", "cpu", "--dtype", dtype, "--divergence", "forward_kl"]
    argv += ["--backend", "torch"]
    assert main(argv) == 0
    monkeypatch.setattr(torch_backend, function, wrong)
    assert main(argv) == 1
    failed = [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith("NO")]
    assert failed and {line[-5] for line in failed} == {fails}


def test_measure_takes_tensors_of_ones_own():
    z, labels = torch.randn(2, 4, 31), torch.randint(31, (2, 4))
    (case,) = (case for case in check.cases() if case.what == "logps")
    own = check.Inputs(z, z + 0.1, labels, torch.ones(8))
    assert [row.part for row in check.measure(case, own, {"scale": 0.5}) if row.ok] == ["value", "dz"]
    for bad in (31, -1):
        with pytest.raises(ValueError, match=r"labels: expected ids in \[0, 31\) or -100"):
            check.Inputs(z, z, torch.full_like(labels, bad), torch.ones(8))


def step(names, rows, vocab, dtype, device="cpu", both=False, ref=True):
    """A memory.Step and tensors of its sizes."""
    bound = divergences.parse(names)
    z = torch.randn(rows, vocab, device=device).to(dtype).requires_grad_()
    w = torch.randn(rows, vocab, device=device).to(dtype).requires_grad_(both) if ref else None
    labels = torch.randint(vocab, (rows,), device=device)
    return memory.Step(rows, vocab, dtype.itemsize, bound, ref, both), z, w, labels


def gradients(loss, z, w):
    return torch.autograd.grad(loss, [x for x in (z, w) if x is not None and x.requires_grad])


ALONE = [[name] for name in divergences.names()]


@pytest.mark.slow
@pytest.mark.parametrize("both", [False, True], ids=["policy", "both"])
@pytest.mark.parametrize(
    "names", [None, [], *ALONE, ["reverse_kl", "forward_kl"], ["total_variation", "js", "alpha"]], ids=str
)
def test_memory_of_naive_code(names, both):
    ref = names is not None
    for dtype in check.DTYPES.values():
        model, z, w, labels = step(names, 300, 1100, dtype, both=both and ref, ref=ref)
        measured = peak_bytes(lambda: gradients(memory.naive_loss(z, labels, w, model.divergences), z, w))  # noqa: B023
        assert model.naive() == pytest.approx(measured, rel=0.1), dtype


def ours(model, z, w, labels, inplace=False):
    """Peak bytes of the same step in this library."""
    logits = z * 1 if inplace else z  # in place of something that is not a leaf, as in training

    def loss():
        stats = fl.token_stats(logits, labels, w, divergence=model.divergences, inplace_backward=inplace, shift=False)
        return (stats.logps - stats.ref_logps).sum() + sum(d.sum() for d in stats.divergence.values())

    return peak_bytes(lambda: gradients(loss(), logits, w))


@pytest.mark.slow
@pytest.mark.parametrize("both", [False, True], ids=["policy", "both"])
@pytest.mark.parametrize("names", [[], ["forward_kl"], ["alpha", "js"]], ids=str)
def test_memory_of_the_torch_backend(names, both, monkeypatch):
    """Gradients and blocks, with blocks small enough for gradients to count, as they do at real sizes; then blocks alone,
    of which the model is a bound: a little over what is used, never under."""
    with monkeypatch.context() as patch:
        for module in (torch_backend, planner):
            patch.setattr(module, "BLOCK_BYTES", 1 << 15)
        model, *tensors = step(names, 256, 2048, torch.float32, both=both)
        assert model.fused("torch") == pytest.approx(ours(model, *tensors), rel=0.1)
    model, *tensors = step(names, 256, 8192, torch.bfloat16)
    measured = ours(model, *tensors, inplace=True)
    assert 0.95 * measured <= model.fused("torch", inplace=True) <= 1.3 * measured


@pytest.mark.slow
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
    assert main([*argv, "--json"]) == 0
    sizes = json.loads(capsys.readouterr().out)
    logits = 4 * 64 * 32000 * 2
    assert sizes["policy_logits"] == sizes["reference_logits"] == logits
    assert sizes["naive"] == pytest.approx(6 * logits, rel=0.01) and logits <= sizes["triton"] < 1.01 * logits
    assert sizes["triton_inplace"] < 0.01 * logits < sizes["torch_inplace"] < sizes["torch"]


def head_step(dtype, hidden=(128, 96), rows=256, vocab=2048, unit=0, names=(), ref=True, both=False, frozen=False):
    """A memory.HeadStep, its leaves, and a function of a budget that runs it in this library."""
    bound = divergences.parse(names)
    x, head, ref_x, ref_head = (
        torch.randn(shape).to(dtype) for h in hidden for shape in ((8, rows // 8, h), (vocab, h))
    )
    asks = (True, not frozen, both, both)
    leaves = [t.requires_grad_() for t, asked in zip((x, head, ref_x, ref_head), asks, strict=True) if asked]
    y = torch.randint(vocab, (8, rows // 8))
    policy, other = fl.Hidden(x, head), fl.Hidden(ref_x, ref_head) if ref else None
    step = memory.HeadStep(rows, vocab, dtype.itemsize, bound, ref, both, *hidden, frozen, unit)

    def plan(workspace):
        batch = token_batch(y, shift=False, ignore_index=-100)
        return prepare_call(policy, batch, other, bound, False, False, ExecutionOptions(workspace=workspace), unit).plan

    def ours(workspace):
        if unit == 1:
            loss = fl.distillation_loss(
                policy, y, other, divergence=bound[0], hard=1.0, shift=True, workspace=workspace
            ).loss
            return torch.autograd.grad(loss, leaves)
        if unit:
            return torch.autograd.grad(fl.dpo_loss(policy, y, other, shift=True, workspace=workspace).loss, leaves)
        stats = fl.token_stats(policy, y, other, divergence=bound, shift=True, workspace=workspace)
        loss = stats.logps.sum() + sum(d.sum() for d in stats.divergence.values())
        return torch.autograd.grad(loss - (stats.ref_logps.sum() if ref else 0), leaves)

    def naive():
        loss = memory.naive_loss(x @ head.T, y, ref_x @ ref_head.T if ref else None, bound)
        return torch.autograd.grad(loss, leaves)

    return step, plan, ours, naive


FULL, HALF = torch.float32, torch.bfloat16
HEADS = [
    ("vocab_chunks", FULL, {}, 1 << 20),
    ("vocab_chunks", HALF, {}, 1 << 20),
    ("vocab_chunks", FULL, {"names": ["js"]}, 1 << 20),
    ("vocab_chunks", HALF, {"both": True}, 1 << 20),
    ("vocab_chunks", FULL, {"ref": False}, 1 << 20),
    ("frozen_head", FULL, {"frozen": True}, 4 << 20),
    ("keep_logits", HALF, {}, 64 << 20),
    ("row_blocks", FULL, {"unit": 64}, 64 << 20),
    ("row_blocks", HALF, {"unit": 64}, 64 << 20),
    ("row_blocks", FULL, {"unit": 1, "names": ["forward_kl"]}, 8 << 20),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype", "options", "workspace"), HEADS, ids=str)
def test_memory_from_hidden_states(kind, dtype, options, workspace, monkeypatch):
    """The plan that the call takes, and its memory: a little over what is used, never under. Small blocks, as above."""
    for module in (torch_backend, planner):
        monkeypatch.setattr(module, "BLOCK_BYTES", 1 << 13)
    step, plan, ours, naive = head_step(dtype, **options)
    predicted = planner.make_plan(step.plan_inputs("cpu"), workspace=workspace)
    assert predicted == plan(workspace) and predicted.kind == kind
    measured = peak_bytes(lambda: ours(workspace))
    assert measured <= sum(step.ours("cpu", predicted).values()) <= 1.4 * measured
    assert step.naive() == pytest.approx(peak_bytes(naive), rel=0.1)


def test_memory_report_from_hidden_states(capsys):
    """A million rows over a vocabulary of 256,000 fit a GPU whose logits would not, and are answered without them."""
    argv = ["memory", "--batch", "500", "--length", "1000", "--vocab", "256000", "--hidden", "4096"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    for words in (
        "plan 'vocab_chunks'",
        "naive: logits",
        "TiB",
        "products of N rows",
        "which either code has to return",
    ):
        assert words in out, words
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["kind"] == "vocab_chunks" and found["plan"]["gemms"] == 5
    assert found["ours"] == sum(found["parts"].values()) < 64 << 30 < found["naive"]
    assert found["naive"] == pytest.approx(16 * 1e6 * 256000, rel=0.01)
    assert found["parts"]["tiles of logits"] <= 256 << 20 and found["parts"]["gradient of head"] == 256000 * 4096 * 2

    assert main([*argv, "--json", "--loss", "pairs", "--workspace", "16G", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["kind"] == "row_blocks"
    for text, count in (("4096", 4096), ("3k", 3072), ("256M", 256 << 20), ("2G", 2 << 30)):
        assert memory.byte_count(text) == count


def test_check_verifies_what_is_named(capsys, monkeypatch):
    """In words, before the table; a loss of the family has no table."""
    assert main([*SMALL, "--divergence", "js", "--loss", "token_stats", "orpo_loss"]) == 0
    out = capsys.readouterr().out
    assert "\ndivergence js: nothing is wrong\n" in out and "\nloss orpo_loss: nothing is wrong\n" in out
    assert out.splitlines()[-1].startswith("11 of 11 checks pass")
    monkeypatch.setattr(fl.reference, "orpo_loss", fl.reference.simpo_loss)
    assert main(["check", "--device", "cpu", "--loss", "orpo_loss"]) == 1
    assert "finding" in capsys.readouterr().out


def test_without_a_command_it_prints_help(capsys):
    assert main([]) == 0
    assert "memory" in (out := capsys.readouterr().out) and "check" in out


@pytest.mark.parametrize(
    ("text", "count"),
    [("1048576", 1 << 20), ("1024k", 1 << 20), ("16MB", 1 << 24), ("16MiB", 1 << 24), ("2G", 2 << 30)],
)
def test_numbers_of_bytes(text, count, capsys):
    assert memory.byte_count(text) == count
    with pytest.raises(SystemExit):
        main(["memory", "--hidden", "64", "--workspace", f"{text}x"])
    assert f"expected a number of bytes such as 1048576, 1024K, 256M or 2G, got '{text}x'" in capsys.readouterr().err


def test_a_loss_by_the_name_of_its_function(capsys):
    assert main(["check", "--device", "cpu", "--loss", "dpo_loss"]) == 2
    assert "did you mean 'sigmoid'" in capsys.readouterr().err
