"""The operators as torch sees them: opcheck, torch.compile, checkpointing, memory, and a bare import."""

import pytest
import torch
from helpers import labels_for, logits, python
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fused_losses as fl
from fused_losses import divergences
from fused_losses.cli.memory_probe import peak_bytes
from fused_losses.core.layout import Grads, PairLossSpec, StatsSpec
from fused_losses.core.margin_losses import TERMS
from fused_losses.engine import logits_ops, pair_ops

OPS = torch.ops.fused_losses


def stats_arguments(device, divergence, entropy, collision, shift, backend, requires_grad, with_ref=True, softcap=0.0):
    z, w = logits((2, 4, 33), device)
    z.requires_grad_(requires_grad)
    y = labels_for((2, 4), 33, device)
    ref = w.requires_grad_(requires_grad) if with_ref else None
    asked = divergences.parse([key for key in divergence.split(";") if key])
    spec = StatsSpec(asked, entropy, collision, shift, -100, 33, softcap, 1.0, 0.0, 0.5)
    return logits_ops.TokenStatsArgs(z, y, ref, spec, backend, False)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize(
    ("divergence", "entropy", "collision", "shift", "with_ref"),
    [
        ("", False, False, False, False), ("", False, True, False, False), ("", True, True, True, True),
        ("forward_kl;js(beta=0.3)", True, False, False, True), ("alpha", False, True, True, True),
    ],
)  # fmt: skip
def test_opcheck_token_stats(backend, device, divergence, entropy, collision, shift, with_ref, requires_grad):
    args = stats_arguments(device, divergence, entropy, collision, shift, backend, requires_grad, with_ref)
    opcheck(OPS.token_stats.default, tuple(logits_ops.ARGS.pack(args)))


def test_opcheck_backward_ops(backend, device):
    call = stats_arguments(device, "forward_kl;alpha", True, True, False, backend, False)
    saved = logits_ops.STATS.unpack(OPS.token_stats(*logits_ops.ARGS.pack(call))).saved
    g = torch.ones(8, device=device)
    for g_div, to_ref in ((torch.ones(2, 8, device=device), True), (None, False)):
        grads = Grads(logps=g, lse=g, divergence=g_div)
        rest = call.policy, call.labels, call.ref, call.spec, backend, True, to_ref
        args = tuple(logits_ops.BACKWARD_ARGS.pack(logits_ops.TokenStatsBackwardArgs(grads, saved, *rest)))
        opcheck(OPS.token_stats_backward.default, args, test_utils=("test_schema", "test_faketensor"))
        opcheck(OPS.token_stats_backward_.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck_pair_loss(backend, device, packed):
    logps = torch.randn(12, device=device).requires_grad_()
    ref = torch.randn(12, device=device).requires_grad_()
    mask = torch.arange(12, device=device) % 3 > 0
    cu = torch.tensor([0, 3, 5, 9, 12], device=device) if packed else None
    spec = PairLossSpec(divergences.get("js"), TERMS["sigmoid"], (0.1,), 0.3, 4, False)
    call = pair_ops.PairLossArgs(logps, ref, mask, cu, spec, backend)
    args = tuple(pair_ops.ARGS.pack(call))
    opcheck(OPS.pair_loss.default, args)
    coef = pair_ops.LOSSES.unpack(OPS.pair_loss(*args)).coef.detach()
    call = call._replace(logps=logps.detach(), ref_logps=ref.detach())
    grad = torch.ones(2, device=device)
    back = pair_ops.PairLossBackwardArgs(grad, None, None, coef, call, to_logps=True, to_ref_logps=True)
    args = tuple(pair_ops.BACKWARD_ARGS.pack(back))
    opcheck(OPS.pair_loss_backward.default, args, test_utils=("test_schema", "test_faketensor"))


def step(z, y, w):
    """What a training loop does: a loss, a divergence as a penalty, an entropy bonus."""
    out = fl.dpo_loss(z, y, fl.Logits(w, temperature=1.5), divergence="js", shift=True)
    stats = fl.token_stats(z, y, w, divergence=["forward_kl", "alpha(a=0.3)"], entropy=True, collision=True, shift=True)
    bonus = (stats.entropy * stats.collision.exp()).mean()
    return out.loss + sum(d.mean() for d in stats.divergence.values()) - bonus, out.metrics["rewards/margins"]


# The backend is an argument of operators that the compiler does not look into: one length will do in the interpreter.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "dynamic", "lengths"),
    [("torch", False, (5, 7)), ("torch", True, (5, 7)), ("triton", False, (5,))],
    indirect=["backend"],
)
def test_compile_without_graph_breaks(backend, device, dynamic, lengths):
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in lengths:
        z, w = logits((4, length, 45), device)
        y = labels_for((4, length), 45, device)
        eager, margin = step(z, y, w)
        loss, metric = compiled(z, y, w)
        torch.testing.assert_close(loss, eager)
        torch.testing.assert_close(metric, margin)
        torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(eager, z))
    if dynamic:
        torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(backend, device, reentrant):
    z, w = logits((4, 6, 45), device)
    y = labels_for((4, 6), 45, device)
    call = lambda z: fl.dpo_loss(z * 1.0, y, w.detach(), shift=False).loss  # noqa: E731
    expected = torch.autograd.grad(call(z), z)[0]
    checkpoint(call, z, use_reentrant=reentrant).backward()
    torch.testing.assert_close(z.grad, expected)


class Operators(TorchDispatchMode):
    """Notes the operators of the package that are called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("fused_losses"):
            self.seen.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


SOURCES = {
    "logits": ("token_stats", lambda z, w, x, y: (z, w)),
    "hidden": ("hidden_stats", lambda z, w, x, y: (fl.Hidden(x, y), fl.Hidden(x.detach() * 2, y.detach()))),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("grad", [True, False])
def test_a_mode_sees_operators_and_the_same_numbers(backend, device, source, grad):
    """Without it a call goes past the dispatcher."""
    operator, sides = SOURCES[source]
    z, w = logits((4, 6, 45), device)
    x, head = torch.randn(4, 6, 8, device=device), torch.randn(45, 8, device=device)
    leaves = [t.requires_grad_(grad) for t in ((z, w) if source == "logits" else (x, head))]
    y = labels_for((4, 6), 45, device)

    def call():
        policy, ref = sides(z, w, x, head)
        how = {} if source == "logits" else {"plan": "vocab_chunks"}
        out = fl.dpo_loss(policy, y, ref, shift=True, **how)
        gradients = torch.autograd.grad(out.loss, leaves) if grad else ()
        return [out.loss, *out.metrics.values(), *gradients]

    with Operators() as operators:
        observed = call()
    assert operators.seen == [operator, "pair_loss"] + ["pair_loss_backward", f"{operator}_backward"] * grad
    for mine, other in zip(call(), observed, strict=True):
        assert torch.equal(mine, other) and mine.requires_grad == other.requires_grad


def test_autocast(backend, device):
    z, w = logits((4, 6, 45), device)
    y = labels_for((4, 6), 45, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = fl.dpo_loss(z, y, w, shift=False).loss
    assert inside.dtype == torch.float32 and torch.equal(inside, fl.dpo_loss(z, y, w, shift=False).loss)


def test_second_derivative_is_refused_in_words(backend, device):
    z, w = logits((4, 6, 45), device)
    y = labels_for((4, 6), 45, device)
    (g,) = torch.autograd.grad(fl.dpo_loss(z, y, w, shift=False).loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once; use fused_losses.reference"):
        torch.autograd.grad(g.sum(), z)
    (g,) = torch.autograd.grad(fl.token_stats(z, y, shift=False).logps.sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(g.sum(), z)


@pytest.mark.slow
def test_nothing_of_vocabulary_size_but_the_gradient(device, monkeypatch, one_thread):
    """At most a twentieth of the twin's memory beyond inputs and gradient. `python -m bench` has the time."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton" if device.type != "cpu" else "torch")
    z, w = logits((512, 50304), device)
    w = w.detach()
    y = labels_for((512,), 50304, device, masked=False)

    def run(f):
        z.grad = None
        stats = f.token_stats(z, y, w, divergence="forward_kl", shift=False)
        (stats.logps.sum() + stats.divergence["forward_kl"].sum()).backward()

    z.grad = None
    gradient = z.numel() * 4
    extra = {f: peak_bytes(lambda f=f: run(f)) - gradient for f in (fl, fl.reference)}
    assert extra[fl] <= extra[fl.reference] / 20, {k.__name__: v / 2**20 for k, v in extra.items()}


@pytest.mark.slow
def test_inplace_allocates_no_gradient(device, monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton" if device.type != "cpu" else "torch")
    z, w = logits((1024, 50304), device)
    y = labels_for((1024,), 50304, device)
    held = z * 1
    stats = fl.token_stats(held, y, w.detach(), divergence="js", inplace_backward=True, shift=False)
    loss = (stats.logps + stats.divergence["js"]).sum()
    assert peak_bytes(lambda: torch.autograd.grad(loss, held)) < held.numel() * 4 / 1.5


@pytest.mark.slow
def test_import_needs_torch_alone():
    code = (
        "import sys; before = set(sys.modules); import torch, numpy; import fused_losses\n"
        "bad = {'triton', 'transformers', 'datasets', 'matplotlib', 'kernels'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    python("-c", code, cwd=None, stdout=None, stderr=None, check=True)


def test_registry_reaches_the_operators():
    """Ops take divergences by name: every key must read back as itself."""
    for name in divergences.names():
        spec = StatsSpec((divergences.get(name),), False, False, False, -100, 5)
        args = logits_ops.TokenStatsArgs(torch.ones(1), torch.ones(1), None, spec, "torch", False)
        assert name in logits_ops.ARGS.pack(args)
        assert logits_ops.ARGS.unpack(logits_ops.ARGS.pack(args)).spec == spec
