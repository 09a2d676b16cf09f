"""The compiled backend: its numbers against the float64 twin and the torch backend, what it compiles, and when it does not.

Every function that is compiled takes seconds, so that these tests share a few kinds of calls.
"""

import json
import logging
import os
import threading

import pytest
import torch
from helpers import generator_of, python, seeded

import fused_losses as fl
from fused_losses import backends, divergences
from fused_losses.backends import compiled
from fused_losses.backends.compiled_elementwise import bind
from fused_losses.cli.memory_probe import peak_bytes

pytestmark = [
    pytest.mark.skipif(compiled.COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("one_thread"),
]

SOME = ("forward_kl", "js")
CASES = {  # the same code computes all of them
    "some rows ignored": {"shape": (37, 1003)},
    "nearly equal": {"shape": (5, 4, 777), "apart": 1e-3},
    "a constant apart": {"shape": (2, 9, 515), "apart": 0.3, "offset": 0.7},
    "one step": {"shape": (40, 16)},
}


@pytest.fixture(autouse=True)
def compiles():
    """After a failed compilation the torch backend would pass the tests that follow."""
    yield
    assert not compiled._failures


@pytest.fixture
def on_compiled(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "compiled")


def inputs(shape, apart=1.0, offset=0.0, dtype=torch.float32, ignored=0.2, k=0):
    generator = generator_of(k)
    z = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    w = z + apart * torch.randn(shape, generator=generator, dtype=torch.float64) + offset
    y = torch.randint(shape[-1], shape[:-1], generator=generator)
    y[torch.rand(shape[:-1], generator=generator) < ignored] = -100
    return z.to(dtype), w.to(dtype), y


def results(source, monkeypatch, z, w, y, names=SOME, wrap=lambda x: x, **options):
    """Return all statistics, and the gradients of both sides of a random sum of them."""
    if source == "twin":
        z, w = z.double(), w.double()
    else:
        monkeypatch.setenv("FUSED_LOSSES_BACKEND", source)
    function = fl.reference.token_stats if source == "twin" else fl.token_stats
    z, w = z.detach().requires_grad_(), w.detach().requires_grad_()
    out = function(wrap(z), y, wrap(w), divergence=names, entropy=True, collision=True, shift=False, **options)
    named = {"logps": out.logps, "ref_logps": out.ref_logps, "entropy": out.entropy, **out.divergence}
    generator = generator_of(9)
    total = sum((x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum() for x in named.values())
    gradients = torch.autograd.grad(total, [z, w])
    named |= {"collision": out.collision, "policy": gradients[0], "ref": gradients[1]}
    return {name: x.detach().double() for name, x in named.items()}


def check(monkeypatch, z, w, y, rounding, **options):
    """The compiled backend is as close to the twin as the torch backend, up to a few roundings of a sum of terms."""
    mine, other, exact = (results(b, monkeypatch, z, w, y, **options) for b in ("compiled", "torch", "twin"))
    for name, x in exact.items():
        finite = x.isfinite()
        assert torch.equal(mine[name].isfinite(), other[name].isfinite()), name
        error, theirs = ((b[name] - x)[finite].norm().item() for b in (mine, other))
        size = x[finite].norm().item()
        # without vectors, a sum has one term added after the other, in place of many short sums
        rounding = rounding if compiled.vector_width() else 10 * rounding
        assert error <= 3 * theirs + rounding * size, f"{name}: {error:.1e} of {size:.1e}, torch {theirs:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_against_the_twin(case, monkeypatch):
    """Near p = q the noise of sums decides: 1e-4 of the divergence is what the documents promise there."""
    z, w, y = inputs(**CASES[case])
    check(monkeypatch, z, w, y, 1e-4 if case == "nearly equal" else 1e-6)


def test_suppressed_tokens(monkeypatch):
    """Tokens that one side or both suppress; also as labels."""
    z, w, y = inputs((64, 1003))
    z[:, 5:9] = w[:, 7:12] = -torch.inf
    y[:4] = torch.tensor([6, 8, 10, 3])
    mine, other = (results(b, monkeypatch, z, w, y) for b in ("compiled", "torch"))
    for name, x in other.items():
        torch.testing.assert_close(mine[name], x, rtol=1e-5, atol=1e-6, equal_nan=True, msg=name)


@pytest.mark.slow
def test_parameters_are_those_of_the_call(monkeypatch):
    """Not those of code that was compiled for other values; torch's cache on disk knows all of them in the second round."""
    z, w, y = inputs((24, 515))
    for _ in range(2):
        for name in ("skew_forward_kl", "skew_forward_kl(lam=0.3)"):
            check(monkeypatch, z, w, y, 1e-6, names=(name,))
        monkeypatch.setattr(compiled, "_programs", {})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype, monkeypatch):
    z, w, y = inputs((24, 515), dtype=dtype)
    one = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 1e-14}[dtype]
    check(monkeypatch, z, w, y, one, names=("forward_kl",))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", divergences.names())
def test_formulas_of_every_divergence(name, double):
    """What bind() makes of a formula computes the same, near p = q and far from it, and where both sides are suppressed."""
    divergence = divergences.get(name)
    dtype = torch.float64 if double else torch.float32
    log_p = (-12 * torch.rand(4000, generator=generator_of(1), dtype=torch.float64)).to(dtype)
    t = (
        torch.randn(4000, generator=generator_of(2), dtype=torch.float64) * 10.0 ** torch.arange(-4, 1).repeat(800)
    ).to(dtype)
    log_q = log_p - t
    t[:2] = torch.tensor([1e37, -1e37])
    log_p[:2] = log_q[:2] = -1e37
    columns = log_p.exp(), log_q.exp(), t, log_p, log_q
    for formula in (divergence.term, divergence.grad_p, divergence.grad_q):
        if formula is not None:
            exact = formula(*columns, *divergence.params)
            mine = bind(formula, double)(*columns, *divergence.params)
            torch.testing.assert_close(mine, exact, rtol=1e-13 if double else 3e-5, atol=1e-16 if double else 1e-9)


@pytest.mark.slow
def test_kinds_of_divergences(monkeypatch):
    """One by a power, and one by terms, together."""
    z, w, y = inputs((24, 515))
    check(monkeypatch, z, w, y, 2e-6, names=("alpha", "alpha_beta"))


@pytest.mark.slow
def test_head_options_and_layouts(monkeypatch):
    """Another softcap or temperature is no other code; each tensor has strides of its own."""
    z, w, y = inputs((6, 9, 300))
    for temperature in (0.7, 0.9):
        options = {"softcap": 20.0, "scale": 0.5, "temperature": temperature}
        check(monkeypatch, z[:, :8], w[:, :8].contiguous(), y[:, :8], 1e-6, wrap=lambda x, o=options: fl.Logits(x, **o))


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiles_once_for_all_shapes(monkeypatch):
    """A forward and a backward: for other numbers of rows, of rows that count and of tokens, and where these are equal."""

    def call(shape, ignored):
        results("compiled", monkeypatch, *inputs(shape, ignored=ignored))

    call((20, 20), 0.0)
    before = graphs()
    for shape, ignored in [((37, 100), 0.3), ((50, 50), 0.0), ((4, 5, 60), 0.2), ((9, 30), 0.7), ((6, 1000), 0.1)]:
        call(shape, ignored)
    assert before and graphs() == before


@pytest.mark.slow
def test_no_temporary_of_vocabulary_size(on_compiled):
    """Beyond the gradient that is asked for: numbers of rows."""
    z, w, y = inputs((64, 16384))
    z.requires_grad_()

    def step():
        out = fl.token_stats(z, y, w, divergence=SOME, entropy=True, collision=True, shift=False)
        total = out.logps.sum() + sum(x.sum() for x in out.divergence.values()) + out.entropy.sum()
        return torch.autograd.grad(total, [z])

    step()
    assert peak_bytes(step) <= z.nbytes + 64 * 1024


@pytest.mark.slow
def test_no_temporary_where_a_gradient_takes_the_place_of_logits(on_compiled):
    """From hidden states a tile holds the logits, then their gradient, and nothing else has its size."""
    generator = seeded()
    x, head = (torch.randn(n, 8, generator=generator).requires_grad_() for n in (64, 16384))
    labels = torch.randint(16384, (64,), generator=generator)

    def step():
        loss = fl.cross_entropy_loss(fl.Hidden(x, head), labels, shift=False, plan="row_blocks").loss
        return torch.autograd.grad(loss, [x, head])

    step()
    tile = len(x) * len(head) * 4
    assert peak_bytes(step) <= 1.5 * tile + 2 * head.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["vocab_chunks", "keep_logits"])
def test_gradients_to_both_sides_in_place(plan, monkeypatch):
    """Neither side's gradient is computed from what the other has overwritten."""
    generator = seeded()
    leaves = [torch.randn(n, 32, generator=generator) for n in (24, 2000, 24, 2000)]
    labels = torch.randint(2000, (24,), generator=generator)
    found = []
    for backend in ("compiled", "torch"):
        monkeypatch.setenv("FUSED_LOSSES_BACKEND", backend)
        own = [x.clone().requires_grad_() for x in leaves]
        how = {"plan": plan, "workspace": 1 << 17 if plan == "vocab_chunks" else None}
        out = fl.token_stats(
            fl.Hidden(*own[:2]), labels, fl.Hidden(*own[2:]), divergence="reverse_kl", shift=False, **how
        )
        found.append(torch.autograd.grad(out.divergence["reverse_kl"].sum() - out.logps.sum(), own))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def test_equal_from_run_to_run(monkeypatch):
    z, w, y = inputs(**CASES["some rows ignored"])
    first, second = (results("compiled", monkeypatch, z, w, y) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["vocab_chunks", "keep_logits", "row_blocks", "frozen_head"])
def test_plans(plan, monkeypatch):
    """From hidden states: tiles of a vocabulary in parts, gradients in place of logits, a loss that is known."""
    generator = seeded()
    x, head, ref_x, ref_head = (torch.randn(n, 32, generator=generator) for n in (24, 2000, 24, 2000))
    labels = torch.randint(2000, (24,), generator=generator)
    found = []
    for backend in ("compiled", "torch"):
        monkeypatch.setenv("FUSED_LOSSES_BACKEND", backend)
        leaves = [x.clone().requires_grad_(), head.clone().requires_grad_(plan != "frozen_head")]
        policy, ref = fl.Hidden(*leaves), fl.Hidden(ref_x, ref_head)
        how = {"plan": plan, "workspace": 1 << 17 if plan == "vocab_chunks" else None}
        if plan == "row_blocks":
            total = fl.distillation_loss(policy, labels, ref, divergence="js", shift=False, **how).loss
        else:
            out = fl.token_stats(policy, labels, ref, divergence=["forward_kl"], shift=False, **how)
            total = out.divergence["forward_kl"].sum() - out.logps.sum()  # of one sign: nothing cancels
        found.append([total, *torch.autograd.grad(total, [t for t in leaves if t.requires_grad])])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_under_torch_compile(monkeypatch):
    z, w, y = inputs((16, 4, 300))

    def step(z):
        return fl.distillation_loss(z, y, w, divergence="js", shift=False).loss

    found = []
    for backend, run in (("torch", step), ("compiled", torch.compile(step, fullgraph=True))):
        monkeypatch.setenv("FUSED_LOSSES_BACKEND", backend)
        leaf = z.clone().requires_grad_()
        loss = run(leaf)
        found.append([loss.detach(), *torch.autograd.grad(loss, [leaf])])
    for other, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


STEP = """
import sys
import torch
import fused_losses as fl

torch.manual_seed(0)
z, w = torch.randn(9, 131, dtype=torch.float64, requires_grad=True), torch.randn(9, 131, dtype=torch.float64)
y = torch.randint(131, (9,))
library = fl.reference if sys.argv[1] == "twin" else fl
out = library.token_stats(z, y, w, divergence="forward_kl", shift=False)
(out.divergence["forward_kl"] - out.logps).sum().backward()
print([x.sum().item() for x in (out.divergence["forward_kl"], out.logps, z.grad.square())])
"""


@pytest.mark.slow
def test_processors_that_share_a_disk(tmp_path):
    """Each finds its own code there, and not what another compiled for vectors of another width."""
    shared = {"FUSED_LOSSES_BACKEND": "compiled", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    exact = json.loads(python("-c", STEP, "twin", check=True).stdout)
    for capability in ({}, {"ATEN_CPU_CAPABILITY": "avx2"}):
        environment = {name: x for name, x in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
        made = python("-c", STEP, "ours", env=environment | shared | capability)
        assert made.returncode == 0 and "failed" not in made.stderr, (capability, made.stderr[-2000:])
        assert json.loads(made.stdout) == pytest.approx(exact, rel=1e-10), capability


@pytest.mark.slow
def test_threads(monkeypatch):
    """Calls at the same time, of which the first compiles."""
    z, w, y = inputs((30, 400))
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "compiled")
    found = {}

    def call(k):
        out = fl.token_stats(z, y, w, divergence="jeffreys", shift=False)
        found[k] = out.divergence["jeffreys"]

    threads = [threading.Thread(target=call, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(x, found[0]) for x in found.values())


def test_a_formula_of_no_module():
    """As a notebook or exec() makes it."""
    names = {"difference": divergences.difference}
    exec("def formula(p, q, t):\n    return difference(p, q, t)", names)
    del names["__builtins__"]
    p, q = torch.tensor([0.3, 0.2]), torch.tensor([0.1, 0.2])
    torch.testing.assert_close(bind(names["formula"], False)(p, q, (p / q).log()), p - q)


def test_small_calls_are_left_to_torch(monkeypatch):
    monkeypatch.delenv("FUSED_LOSSES_BACKEND", raising=False)
    monkeypatch.setattr(compiled, "_run", lambda *args, **options: pytest.fail("a small call was compiled"))
    z, w, y = inputs((8, 100))
    fl.token_stats(z, y, w, divergence="js", shift=False)
    assert backends.explain(torch.device("cpu"))[0] == "compiled"


def test_a_failure_is_said_once(monkeypatch, caplog):
    """torch goes on, with the same numbers."""
    z, w, y = inputs((8, 100))
    exact = results("torch", monkeypatch, z, w, y)
    monkeypatch.setattr(compiled, "_failures", [])
    monkeypatch.setattr(compiled, "_programs", {})

    def broken(*args, **options):
        def fail(*args):
            raise RuntimeError("no such compiler\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    with caplog.at_level(logging.INFO, logger="fused_losses"):
        found = [results("compiled", monkeypatch, z, w, y) for _ in range(2)]
    assert all(torch.equal(x[name], exact[name]) for x in found for name in exact)
    assert [r.getMessage() for r in caplog.records if "failed" in r.getMessage()] == [
        "fused_losses: a compilation failed, torch goes on: RuntimeError: no such compiler"
    ]


def test_without_a_compiler(monkeypatch):
    """The torch backend runs; asking for the compiled one is an error that names what is missing."""
    monkeypatch.setattr(compiled, "COMPILER", None)
    monkeypatch.delenv("FUSED_LOSSES_BACKEND", raising=False)
    assert backends.explain(torch.device("cpu"))[0] == "torch"
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "compiled")
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler was found"):
        backends.choose(torch.device("cpu"))


def test_other_devices(on_compiled):
    with pytest.raises(RuntimeError, match="cpu tensors"):
        backends.choose(torch.device("meta"))


@pytest.mark.slow
@pytest.mark.parametrize("disable", ["TORCHDYNAMO_DISABLE", None])
def test_where_torch_does_not_compile(disable, tmp_path):
    """Whole tiles would take a dozen temporaries of their size: the torch backend computes them in blocks."""
    script = tmp_path / "call.py"
    stance = "" if disable else "torch.compiler.set_stance('force_eager')\n"
    script.write_text(
        f"import torch\n{stance}import fused_losses as fl\nfrom fused_losses.cli.memory_probe import peak_bytes\n"
        "z, w = torch.randn(64, 16384), torch.randn(64, 16384)\ny = torch.zeros(64, dtype=torch.long)\n"
        "step = lambda: fl.token_stats(z, y, w, divergence='js', shift=False)\n"
        "step()\nprint('peak', peak_bytes(step) / z.nbytes)\n"
    )
    env = os.environ | {"FUSED_LOSSES_BACKEND": "compiled"} | ({disable: "1"} if disable else {})
    done = python(str(script), env=env, check=True)
    assert float(done.stdout.split("peak")[1]) < 4.5  # 15 blocks of 1 MiB
