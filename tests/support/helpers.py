"""What the tests share: seeds, errors against a float64 truth, gradients of named outputs, and the inputs."""

import contextlib
import functools
import itertools
import math
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch
from lifetime import ends_with
from torch.autograd.profiler import profile

import fused_losses as fl
from fused_losses import divergences
from fused_losses.backends import torch_backend
from fused_losses.core.layout import PairLossSpec, StatsSpec
from fused_losses.engine import fused_backward, hidden_ops, logits_ops, pair_ops

ULP = 2.0**-23
EPS = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float64: 2**-53}


def seed_of(k=0):
    """The k-th seed of a run: k itself, or another one under `pytest --seed N`, which the environment hands to the
    processes that a test starts. transformers' Trainer takes 32 bits."""
    return (int(os.environ.get("FUSED_LOSSES_TEST_SEED", 0)) * 1000003 + k) % 2**32


def seeded(k=0):
    torch.manual_seed(seed_of(k))


def generator_of(k):
    return torch.Generator().manual_seed(seed_of(k))


def quicken_interpreter():
    """Triton's interpreter puts its own functions into triton.language anew for each call of a device function, which takes
    half of its time; with this only where they are not there already."""
    from triton.runtime import interpreter

    patch, languages, active = getattr(interpreter, "_patch_lang", None), (interpreter.tl, interpreter.tl.core), set()
    if patch is None or not hasattr(interpreter, "_LangPatchScope"):  # another version of Triton
        return

    @functools.cache
    def seen_by(fn):
        return {x.__name__ for x in fn.__globals__.values() if any(x is module for module in languages)}

    def patch_once(fn):
        if seen_by(fn) <= active:
            return interpreter._LangPatchScope()
        scope = patch(fn)
        restore = scope.restore
        scope.restore = lambda: (active.clear(), restore())
        active.update(seen_by(fn))
        return scope

    interpreter._patch_lang = patch_once


if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    quicken_interpreter()


def python(*words, check=False, timeout=None, **options):
    """Another Python with these arguments: exit code and what it said, as of subprocess.run. In the root unless told. It ends
    with this process, and so do those that it has started, as torchrun's, which are in sessions of their own."""
    pipe = subprocess.PIPE
    options = {"cwd": Path(__file__).parents[2], "stdout": pipe, "stderr": pipe, "text": True} | options
    command = [sys.executable, *words]
    with subprocess.Popen(command, preexec_fn=ends_with(os.getpid(), signal.SIGTERM), **options) as process:
        try:
            said = process.communicate(timeout=timeout)
        except BaseException:  # interrupted, or too late
            kill_family(process.pid)
            raise
    done = subprocess.CompletedProcess(command, process.returncode, *said)
    if check:
        done.check_returncode()
    return done


def kill_family(pid):
    """A process and all that it has started."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        oldest = psutil.Process(pid)
        for process in [oldest, *oldest.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def relative(x, truth):
    """||x - truth|| / ||truth||; plain error where the truth is zero."""
    x, truth = x.detach().double(), truth.detach().double()
    norm = truth.norm()
    return ((x - truth).norm() / (norm if norm > 0 else 1.0)).item()


def logits(shape, device, dtype=torch.float32, spread=1.0, scale=2.0):
    """Policy and reference logits, leaves that require grad. Rounded to dtype, so the float64 truth sees the same."""
    z = torch.randn(shape, device=device) * scale
    w = z + torch.randn(shape, device=device) * spread
    return z.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()


def labels_for(shape, vocab, device, masked=True):
    y = torch.randint(0, vocab, shape, device=device)
    if masked and y.numel() > 2:
        y.view(-1)[1::3] = -100
    return y


def double(x):
    """The float64 leaf of the same numbers."""
    return x.detach().double().requires_grad_(x.requires_grad)


def gradients(output, leaves, weight):
    """Gradients of sum(weight * output), zeros where a leaf does not matter."""
    found = torch.autograd.grad((output * weight.to(output.dtype)).sum(), leaves, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def outputs(stats):
    """The differentiable outputs of a TokenStats by name."""
    named = {"logps": stats.logps, "ref_logps": stats.ref_logps, "entropy": stats.entropy, "lse": stats.lse}
    return {k: v for k, v in (named | stats.divergence).items() if v is not None}


def gradient_errors(ours, truth, leaves, exact, weight=None, pick=lambda g: g):
    """(what, error) of the gradient of each output, times weight and summed, at each leaf, relative to the true one's norm.
    ours, truth: outputs by name. pick: what of ours the true one stands for.

    In the interpreter, where a backward takes seconds, of all outputs in one: their mean, each divided by its norm. Where
    every error is within a bound, that of the mean is.
    """
    names = list(truth)
    weight = torch.ones_like(truth[names[0]]) if weight is None else weight
    wanted = {n: gradients(truth[n], exact, weight) for n in names}
    if leaves[0].device.type != "cpu" or os.environ.get("FUSED_LOSSES_BACKEND") != "triton":
        for n in names:
            for i, (g, t) in enumerate(zip(gradients(ours[n], leaves, weight), wanted[n], strict=True)):
                assert g.isfinite().all(), f"{n}, leaf {i}"
                yield f"{n}, leaf {i}", relative(pick(g), t)
        return
    sizes = {n: len(names) * (max(t.norm().item() for t in wanted[n]) or 1.0) for n in names}
    found = gradients(sum((ours[n] * weight.to(ours[n].dtype)).sum() / sizes[n] for n in names), leaves, torch.ones(()))
    for i, g in enumerate(found):
        assert g.isfinite().all(), f"leaf {i}"
        yield f"the mean, leaf {i}", (pick(g).double() - sum(wanted[n][i] / sizes[n] for n in names)).norm().item()


ONE_PASS = [name for name in divergences.names() if divergences.get(name).row is not None]


def curvature(name):
    """D / KL where p and q are close, and for the power family how much of the noise of its logarithm reaches D."""
    d = divergences.from_key(name)
    if d.power is None:
        return (2.0 if d.parts else 1.0), 1.0
    s, weight = d.params
    return weight, (1 + s * s) / min(1.0, abs(s * (s - 1)))


def promised(name, apart):
    """What the README promises of the value of a divergence, beside 2e-5 of it, where the models lie so far apart."""
    if name.partition("(")[0] not in ONE_PASS:
        return 0.0  # of outputs that are no divergences, too
    weight, noise = curvature(name)
    return ULP * (4 + apart) * weight * noise


def promised_near(name, value, spread, apart):
    """What the README promises of the error of a divergence whose log-ratios have a spread s, models that lie so far apart.

    In one pass: 2e-5 of the value, and 5e-7 nats and one rounding of the offset. Where s is small: 1e-6 s, and s roundings.
    """
    if name.partition("(")[0] not in ONE_PASS:
        # A term, of order s^2, is a difference of two parts of order s, together at most 4 / s times the value. Each has
        # up to four roundings of ULP / 2, and those of constants have one sign in all terms.
        return (2e-5 + ULP * (8 + apart) / spread) * value
    weight, noise = curvature(name)
    near = ULP * (8 + apart) * spread * weight * noise
    far = 2e-5 * value + promised(name, apart)
    return torch.where(spread <= 0.01, torch.minimum(far, near), far)


def check_collision(mine, truth, tolerance):
    """Of two TokenStats: to so much of the larger of the number and 1, for it is a difference of logarithms; no graph."""
    assert (mine.collision is None) == (truth.collision is None)
    if truth.collision is not None:
        assert not mine.collision.requires_grad and not mine.collision[~mine.mask].any()
        assert (mine.collision <= 0).all() and mine.collision.shape == truth.collision.shape
        error = (mine.collision.double() - truth.collision.double()).abs() / truth.collision.double().abs().clamp(min=1)
        assert error.numel() == 0 or error.max() <= tolerance, f"collision: {error.max():.1e}"


def compare(z, w, y, tolerance, wrap=fl.Logits, wrap_ref=None, **options):
    """Every output and both gradients of fl.token_stats against the float64 twin, as a Judge; tolerance(kind) bounds the
    error."""
    wrap_ref, options = wrap_ref or wrap, {"shift": False, **options}

    def call(library):
        return lambda leaves: library.token_stats(wrap(leaves[0]), y, wrap_ref(leaves[1]), **options)

    judge = Judge(call(fl), call(fl.reference), [z, w], tolerance("value"))
    ours, truth = judge.mine, judge.truth
    assert torch.equal(ours.mask, truth.mask)
    check_collision(ours, truth, tolerance("value"))
    means = [x.detach().mean(-1) for x in judge.exact]
    apart = (means[0] - means[1]).abs().max().item() if z.numel() else 0.0
    for name in outputs(truth):
        judge.value(name, lambda stats, name=name: outputs(stats)[name], promised(name, apart))
    judge.tolerance, weight = tolerance("gradient"), torch.randn_like(ours.logps)

    def errors(leaves, output):
        return dict(gradient_errors(outputs(output), outputs(truth), leaves, judge.exact, weight))

    for what, error in errors([z, w], ours).items():
        judge.check(what, error, lambda leaves, output, what=what: errors(leaves, output)[what])
    return ours, truth


# ---- hidden states -----------------------------------------------------------------------------------------------------


def hidden_leaves(lead, width, vocab, device, rank=0, bias=True, dtype=torch.float32, size=1.0):
    """hidden, weight, bias, lora a and b of one side (None: absent), leaves that require grad; logits of about this size."""

    def new(*shape, by=1.0):
        return (torch.randn(shape, device=device) * by).to(dtype).requires_grad_()

    root = max(1, width) ** -0.5
    factors = [new(rank, width, by=root), new(vocab, rank, by=size * rank**-0.5)] if rank else [None, None]
    return [new(*lead, width), new(vocab, width, by=size * root), new(vocab) if bias else None, *factors]


def hidden_source(leaves, scaling=0.7, **head):
    x, weight, bias, a, b = leaves
    return fl.Hidden(x, weight, bias, lora=None if a is None else (a, b, scaling), **head)


def doubles(leaves):
    return [None if x is None else double(x) for x in leaves]


def asking(leaves):
    """Those that want a gradient."""
    return [x for x in leaves if x is not None and x.requires_grad]


def gradients_of(scalar, leaves):
    """Of the leaves that ask, None where one does not matter."""
    return torch.autograd.grad(scalar, asking(leaves), retain_graph=True, allow_unused=True)


class Judge:
    """Errors of our call against its float64 twin: at most `tolerance`. Where more, numbers that cancel may be the cause,
    so then at most `slack` times what eager code loses in the same dtype, or what 30 roundings of the inputs change."""

    def __init__(self, mine, twin, leaves, tolerance=1e-5, slack=4.0):
        self.leaves, self.exact, self.tolerance, self.slack = leaves, doubles(leaves), tolerance, slack
        self.twin, self.mine, self.truth = twin, mine(leaves), twin(self.exact)
        self.roughs = []  # of the twin: eager, and on inputs of which one rounding is lost

    def check(self, what, error, others):
        if error <= self.tolerance:
            return
        if not self.roughs:
            self.roughs = [(self.leaves, self.twin(self.leaves))]
            for _ in range(4):
                off = [x if x is None else x.detach().double() for x in self.leaves]
                off = [x if x is None else x + x * torch.randn_like(x) * EPS[torch.float32] for x in off]
                off = [
                    x if x is None else x.requires_grad_(y.requires_grad) for x, y in zip(off, self.leaves, strict=True)
                ]
                self.roughs.append((off, self.twin(off)))
        eager, *moved = (others(*rough) for rough in self.roughs)
        words = f"{what}: {error:.1e}, eager {eager:.1e}, moved {max(moved):.1e}"
        assert error <= max(30 * max(moved), self.slack * eager), words  # eager may be NaN

    def value(self, what, pick, allowed=0.0):
        """pick(output) -> a tensor. allowed: of the error of each number, in any case."""
        mine, true = pick(self.mine), pick(self.truth)
        assert mine.shape == true.shape and mine.isfinite().all(), what
        assert mine.requires_grad == true.requires_grad, what
        if (mine.detach().double() - true).abs().gt(allowed).any():
            self.check(what, relative(mine, true), lambda _, output: relative(pick(output), true))

    def gradients(self, what, pick):
        """pick(output) -> a scalar."""
        found, wanted = gradients_of(pick(self.mine), self.leaves), gradients_of(pick(self.truth), self.exact)
        largest = max((t.norm() for t in wanted if t is not None), default=torch.zeros(()))
        for i, (g, t, x) in enumerate(zip(found, wanted, asking(self.leaves), strict=True)):
            where = f"{what}: gradient at leaf {i} {list(x.shape)}"
            t = torch.zeros_like(x) if t is None else t
            g = torch.zeros_like(x) if g is None and not t.any() else g
            assert g.shape == x.shape and g.dtype == x.dtype and g.isfinite().all(), where
            if (
                t.norm() <= 1e-12 * largest
            ):  # nothing depends on it, and what is left are roundings of terms that cancel
                assert g.double().norm() <= max(1e-5, self.tolerance) * largest, where
                continue
            other = lambda leaves, output, i=i, t=t: relative(gradients_of(pick(output), leaves)[i], t)  # noqa: E731
            self.check(where, relative(g, t), other)


def compare_sources(build, leaves, y, tolerance=1e-5, slack=4.0, each=True, how=None, **options):
    """Every output and its gradients of fl.token_stats against the float64 twin; build(leaves) -> policy, ref.

    how: plan, workspace, static_shapes. each: differentiate every output on its own; otherwise one sum, to which all
    contribute alike, and the last on its own.
    """
    options = {"shift": False, **options}

    def call(f, **how):
        return lambda leaves: f.token_stats(build(leaves)[0], y, build(leaves)[1], **options, **how)

    judge = Judge(call(fl, **(how or {})), call(fl.reference), leaves, tolerance, slack)
    ours, truth = judge.mine, judge.truth
    assert outputs(ours).keys() == outputs(truth).keys() and torch.equal(ours.mask, truth.mask)
    assert (ours.correct is None) == (truth.correct is None)
    check_collision(ours, truth, tolerance)
    weights = {}
    for name, value in outputs(truth).items():
        judge.value(name, lambda stats, name=name: outputs(stats)[name])
        assert not outputs(ours)[name][~ours.mask].any(), name
        if value.requires_grad:
            weights[name] = torch.randn(value.shape, device=value.device)

    def total(stats, names):
        return sum((outputs(stats)[n] * weights[n].to(outputs(stats)[n].dtype)).sum() for n in names)

    groups = [[name] for name in weights]
    if not each and len(groups) > 1:
        for (name,) in groups:
            norm = (
                sum(g.square().sum() for g in gradients_of(total(truth, [name]), judge.exact) if g is not None) ** 0.5
            )
            weights[name] /= norm.item() if norm > 1e-6 else 1.0
        groups = [list(weights), groups[-1]]
    for names in groups:
        judge.gradients(", ".join(names), lambda stats, names=names: total(stats, names))
    return ours, truth


def products(fn):
    """(m, n, k) of every matrix product that torch runs during fn()."""
    with profile(record_shapes=True) as run:
        fn()
    found = []
    for event in run.kineto_results.events():
        if event.name() in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"):
            a, b = event.shapes()["add" in event.name() :][:2]
            found.append((math.prod(a[:-1]), b[-1], a[-1]))
    return found


def in_pairs(*options, allowed=lambda *case: True):
    """Cases in which every two values of two of the options meet, in place of all combinations: greedily, always the same."""
    meets = lambda case: {(i, j, case[i], case[j]) for i, j in itertools.combinations(range(len(case)), 2)}  # noqa: E731
    product = [case for case in itertools.product(*options) if allowed(*case)]
    left, found = set().union(*map(meets, product)), []
    while left:
        found.append(max(product, key=lambda case: len(meets(case) & left)))  # the first of the best
        left -= meets(found[-1])
    return found


def _compiled_for(x):
    """Of an argument of a backend's function: what chooses its kernel, without the numbers that this computes with."""
    if isinstance(x, StatsSpec):
        heads = bool(x.softcap), bool(x.ref_softcap)
        return *(d.name for d in x.divergences), x.entropy, x.collision, x.shift, *heads
    if isinstance(x, PairLossSpec):
        return x.divergence.name, x.term.__name__, x.ref_summed
    if isinstance(x, (list, tuple)):
        return tuple(map(_compiled_for, x))
    return x if x is None or isinstance(x, bool) else type(x).__name__


def kernels_of(call):
    """What call() asks of a backend: its functions, each with the divergences, sums, links, terms, outputs and gradients that
    the kernel behind it is compiled for. Calls that ask for the same run the same kernels; all else of them is torch."""
    asked = set()

    class Spy:
        def __getattr__(self, name):
            def run(*args):
                asked.add((name, *map(_compiled_for, args)))
                return getattr(torch_backend, name)(*args)

            return run

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, FUSED_LOSSES_BACKEND="torch"))
        for module in (logits_ops, pair_ops, hidden_ops, fused_backward):
            stack.enter_context(mock.patch.object(module, "backend_module", lambda name: Spy()))
        call()
    return frozenset(asked)


def one_of_each(cases, kernels):
    """Of the cases those that run kernels which no case before them does, kernels(case) being kernels_of its call: what is
    left to Triton's interpreter, which takes seconds for each. All of them on a GPU."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return list(cases)
    found, seen = [], set()
    for case in cases:
        asked = kernels(case)
        if not asked <= seen:
            found.append(case)
        seen |= asked
    return found


def least_workspace(call):
    """The fewest bytes that call(bytes) takes, as its refusal says; 1 where there is nothing to hold."""
    try:
        call(1)
    except ValueError as refusal:
        return int(re.search(r"(?:at least|takes?) (\d+) bytes", str(refusal))[1])
    return 1
