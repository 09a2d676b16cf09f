"""`check` from hidden states: every plan is compared, on every leaf, and a plan that is wrong is caught."""

import re

import pytest
import torch

import fused_losses as fl
from fused_losses.__main__ import main
from fused_losses.cli import check
from fused_losses.engine import fused_backward, plan_chunks, plan_frozen, planner, projection

SMALL = [
    "check",
    "--shape",
    "2,3,41",
    "--hidden",
    "7",
    "--device",
    "cpu",
    "--divergence",
    "reverse_kl",
    "js",
    "--backend",
    "torch",
]
LEAVES = ("dX", "dW", "db", "dA", "dB")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What --backend sets is undone."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "")


pytestmark = pytest.mark.usefixtures("one_thread")


def failed(out):
    """{(plan, part)} of the lines that say NO."""
    lines = [line.split() for line in out.splitlines() if line.endswith(" NO")]
    return {(line[-6], line[-5]) for line in lines}


@pytest.mark.slow
def test_every_plan_and_leaf_on_both_backends(backend, device):
    """The registries on torch, a divergence that takes two sweeps in the interpreter."""
    few = {"divergences": ["js"], "dtypes": [torch.bfloat16]} if backend == "triton" else {}
    skipped = {}
    options = {"hidden": (7, 5), "bias": True, "lora": 2, "softcap": 20.0, "device": device}
    rows = check.run((1, 2, 19) if few else (2, 3, 41), skipped=skipped, **few, **options)
    assert all(row.ok for row in rows), check.table([row for row in rows if not row.ok])
    ran = {(row.plan, row.what, row.part) for row in rows if row.dtype == "bfloat16"}
    both = {f"{side}{leaf}" for side in ("", "ref_") for leaf in LEAVES} | {"value"}
    for plan in ("auto", "vocab_chunks", "keep_logits", *(["on_chip"] if backend == "triton" else [])):
        assert {part for p, what, part in ran if (p, what) == (plan, "js")} == both, plan
        assert {part for p, what, part in ran if (p, what) == (plan, "sigmoid, js")} == {"value", *LEAVES}, plan
        assert (plan, "ref_logps", "ref_dW") in ran and (plan, "entropy", "db") in ran
    assert {part for p, what, part in ran if (p, what) == ("row_blocks", "sigmoid, js")} == {"value", *LEAVES}
    assert {part for p, what, part in ran if p == "frozen_head"} == {"value", "dX"}
    assert {what for p, what, part in ran if p == "frozen_head"} == {what for _, what, _ in ran}
    why = {(plan, reason.partition(" ")[0]) for plan, reason in skipped}
    assert ("row_blocks", "it") in why  # is for losses that are reduced
    assert (("on_chip", "it") in why) == (backend == "torch")
    values = [row for row in rows if row.dtype != "float32" and row.part == "value"]
    assert all(row.allowed < 1e-4 for row in values), "logits are float32 and must be held to that"


@pytest.mark.parametrize("spread", [0.0, 1e-4, 5.0])
def test_any_spread_in_few_bytes(spread):
    names = ["reverse_kl", "forward_kl", "js", "total_variation"]
    how = {"plans": ["vocab_chunks", "frozen_head"], "workspace": 100_000, "skipped": {}}
    rows = check.run((1, 6, 301), [torch.float32], names, hidden=(16, 16), spread=spread, **how)
    assert all(row.ok for row in rows), check.table([row for row in rows if not row.ok])


def test_report(capsys):
    argv = [*SMALL, "--ref-hidden", "5", "--dtype", "bfloat16"]
    assert main([*argv, "--loss", "token_stats", "--plan", "vocab_chunks", "row_blocks"]) == 0
    out, err = capsys.readouterr()
    assert "H = 7 and 5 on cpu" in out and re.search(r"  plan +part", out) and not err
    assert "'row_blocks' not run for logps and 5 more: it is for losses that are reduced" in out
    assert "checks pass, worst: bfloat16" in out.splitlines()[-1] and max(map(len, out.splitlines())) <= 120
    assert main([*argv, "--plan", "all", "--loss", "sigmoid"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("28 of 28 checks pass")  # value, dX and (all plans but frozen) dW
    assert "'on_chip' not run for sigmoid, reverse_kl and 1 more: it is a Triton kernel" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--hidden", "0"], "numbers >= 1"),
        (["--hidden", "8", "--plan", "on_chip", "--backend", "torch"], "'on_chip' not run for logps and 38 more"),
        (["--hidden", "8", "--workspace", "1"], "workspace: expected at least"),
        (["--bias"], "go with --hidden"),
        (["--plan", "vocab_chunks"], "go with --hidden"),
        (["--lora", "2"], "go with --hidden"),
    ],
    ids=" ".join,
)
def test_bad_input(argv, words, capsys):
    assert main(["check", "--shape", "1,3,50", "--device", "cpu", "--dtype", "float32", *argv]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and words in err and not out
    with pytest.raises(SystemExit, match="2"):
        main(["check", "--hidden", "8", "--plan", "nope"])


def scaled(by, pick):
    """A function of plan_chunks.py of which one of the returned tensors, pick(result), is spoilt."""
    return lambda run: lambda *args, **kwargs: _spoil(run(*args, **kwargs), by, pick)


def _spoil(result, by, pick):
    x = pick(result)
    if x is not None and x.numel():
        x.mul_(by)
    return result


BROKEN = {
    "dX": ("backward", lambda found: found.policy.x, {"dX"}, {"auto", "vocab_chunks", "keep_logits"}),
    "dW": ("backward", lambda found: found.policy.weight, {"dW"}, {"auto", "vocab_chunks", "keep_logits"}),
    "reference's dW": ("backward", lambda found: found.ref.weight, {"ref_dW"}, {"auto", "vocab_chunks", "keep_logits"}),
    "dA": ("backward", lambda found: found.policy.a, {"dA"}, {"auto", "vocab_chunks", "keep_logits"}),
    "frozen dX": ("frozen_backward", lambda dx: dx, {"dX"}, {"frozen_head"}),
    "dW of row blocks": ("row_blocks", lambda found: found.gradients.weight, {"dW"}, {"auto", "row_blocks"}),
    "db of row blocks": ("row_blocks", lambda found: found.gradients.bias, {"db"}, {"auto", "row_blocks"}),
    "losses of row blocks": ("row_blocks", lambda found: found.losses, {"value"}, {"auto", "row_blocks"}),
    "values": ("forward", lambda out: out.logps, {"value"}, {"auto", "row_blocks", "vocab_chunks", "keep_logits"}),
}


@pytest.mark.parametrize("by", [1 + 1e-4, float("nan")], ids=["1e-4", "nan"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_plan_is_caught(name, by, monkeypatch, capsys):
    function, pick, parts, kinds = BROKEN[name]
    argv = [*SMALL, "--dtype", "float32", "--bias", "--lora", "2", "--loss", "token_stats", "sigmoid"]
    module = {"frozen_backward": plan_frozen, "row_blocks": fused_backward}.get(function, plan_chunks)
    monkeypatch.setattr(module, function, scaled(by, pick)(getattr(module, function)))
    assert main(argv) == 1
    found = failed(capsys.readouterr().out)
    if name != "values":  # of which gradients are made
        assert {part for _, part in found} == parts
    assert kinds == {kind for kind, _ in found}


def test_gradients_of_low_precision_are_held_to_one_rounding(monkeypatch, capsys):
    monkeypatch.setattr(
        plan_chunks, "backward", scaled(1 + 1e-2, lambda found: found.policy.weight)(plan_chunks.backward)
    )
    assert main([*SMALL, "--dtype", "bfloat16", "--plan", "vocab_chunks"]) == 1
    assert failed(capsys.readouterr().out) == {("vocab_chunks", "dW")}


def test_a_plan_that_refuses_what_it_must_not_is_an_error(monkeypatch, capsys):
    def refuse(*args):
        raise ValueError("hidden: something else is wrong")

    monkeypatch.setattr(plan_chunks, "forward", refuse)
    assert main([*SMALL, "--dtype", "float32"]) == 2
    assert "something else" in capsys.readouterr().err


def own(ref="hidden", **grad):
    """Tensors of one's own: [2, 4] rows, V = 31."""
    new = lambda name, *shape: torch.randn(shape).requires_grad_(grad.get(name, False))  # noqa: E731
    policy = fl.Hidden(new("x", 2, 4, 6), new("w", 31, 6), new("bias", 31), lora=(new("a", 2, 6), new("b", 31, 2), 0.5))
    other = (
        fl.Hidden(new("ref_x", 2, 4, 5), new("ref_w", 31, 5)) if ref == "hidden" else fl.Logits(new("ref", 2, 4, 31))
    )
    return check.Inputs(policy, other, torch.randint(31, (2, 4)), torch.randn(8))


def parts(case, x, **options):
    (case,) = (found for found in check.cases() if found.what == case)
    rows = check.measure(case, x, **options)
    assert all(row.ok for row in rows), check.table(rows)
    return [row.part for row in rows]


def test_measure_takes_sources_of_ones_own():
    every = [*LEAVES, "ref_dX", "ref_dW"]
    assert parts("js", own()) == ["value", *every]
    assert parts("logps", own(), head={"temperature": 0.7}) == ["value", *LEAVES]
    assert parts("js", own(x=True, ref_w=True)) == ["value", "dX", "ref_dW"]
    assert parts("js", own("logits")) == ["value", *LEAVES, "dw"]
    assert parts("sigmoid, js", own(x=True, w=True), plans=["row_blocks"]) == ["value", "dX", "dW"]
    assert parts("logps", own(ref_x=True)) == ["value"]
    assert parts("js", own(x=True), plans=["auto", "frozen_head"]) == ["value", "dX"] * 2
    with pytest.raises(ValueError, match="plan: 'row_blocks' is not possible here"):
        parts("js", own(), plans=["row_blocks"])
    with pytest.raises(ValueError, match=r"labels: expected ids in \[0, 31\)"):
        check.Inputs(own().policy, own().ref, torch.full((2, 4), 31), torch.ones(8))


@pytest.mark.slow
@pytest.mark.parametrize("lora", [0, 2])
def test_allowance_for_products_of_rounded_factors(lora, monkeypatch):
    """On a GPU dz, X A^T and p of a frozen head are rounded before products: here they are on the CPU."""

    def add_product(out, a, b, alpha=1.0, fresh=False):
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=float(not fresh), alpha=alpha, out=out)

    monkeypatch.setattr(projection, "mixed", lambda device: True)
    monkeypatch.setattr(projection, "add_product", add_product)
    options = {"hidden": (32, 32), "lora": lora, "bias": True, "dtypes": [torch.bfloat16, torch.float16]}
    options |= {"divergences": ["reverse_kl", "forward_kl", "js"], "skipped": {}}
    rows = check.run((2, 7, 301), **options)
    assert not all(row.ok for row in rows)
    monkeypatch.setattr(check, "mixed", lambda device: True)
    rows = check.run((2, 7, 301), **options)
    assert all(row.ok for row in rows), check.table([row for row in rows if not row.ok])


def test_kinds_are_the_planners():
    assert check.PLANS == ("auto", *planner.KINDS)
