"""fl.verify_divergence: say in words what is wrong with an entry of the registry of divergences.

The formulas are checked one by one: what they call, what they return where a probability is 0, and in float64 against autograd
of the definition. Where they are right, the library runs the divergence on each backend that can run here, against the
reference implementation.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.divergences import Divergence, from_key, names, registered
from ..core.elementwise import FLOOR
from ..core.inputs import Logits
from ..engine.token_stats import token_stats
from ..reference.stats import token_stats as reference_stats
from .check import Case, Inputs, Row, error, make_inputs, measure
from .findings import Report, backends_here, running_on
from .formula_source import outside_of_elementwise

VOCAB, ROWS = 37, 3  # 37: the kernels' blocks are wider, so that they have columns of padding
CANCELLED = 1e-3  # error of a value near p = q that `row` computes from float32 sums, which cancel there
FAR = (5, 10, 15, 20, 30, 50, 100)  # factors of logits with which probabilities underflow, in float32 or in float64
HIGHEST = 1e30  # a gradient may be NaN where the value overflows float32
ELEMENTWISE = ("grad_p", "grad_q", "term")  # formulas of one token
COMPILED = (*ELEMENTWISE, "row", "link")  # formulas that Triton compiles
ARGUMENTS = {"row": "reverse, forward, power", "link": "h", "scaling": "x, y"}  # the others take p, q, t, lp, lq
QUOTIENT = "do not divide by p, q or p + q: write a ratio as a function of t (p / (p + q) is sigmoid(t)), times p or q"


def verify_divergence(
    divergence: str | Divergence, *, device: torch.device | str | None = None, backends: Sequence[str] | None = None
) -> Report:
    """Check a divergence, and report in words what is wrong with its entry.

    Args:
        divergence: a name such as "js" or "js(beta=0.3)", or a Divergence, which need not be in the registry.
        device: where to run. None: the accelerator, or the CPU if there is none.
        backends: the backends to run. None: all that can run on the device. On a CPU, Triton runs in its interpreter, if
            TRITON_INTERPRET=1 was set before Python started.

    Returns:
        A report: print it. Its `findings` are sentences; there are none if nothing is wrong.
    """
    d = from_key(divergence) if isinstance(divergence, str) else divergence
    where = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    able, left_out = backends_here(where)
    report = Report(f"divergence {d.key or d.grad_p.__name__.strip('_').removesuffix('_grad_p')}")
    report.left_out += [] if backends else left_out
    formulas = {name: getattr(d, name) for name in COMPILED if getattr(d, name) is not None}
    for text in _wrong_fields(d):
        report.add(text)
    if report.findings:
        return report
    compiled = [name for name, formula in formulas.items() if not _refused(name, formula, report)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")  # of exponentials that overflow
        for backend in backends or able:
            _check_edges(d, backend, where, report, compiled)
        _check_mathematics(d, report)
        if report.ok:
            with registered(d) as entry:
                for backend in backends or able:
                    with running_on(backend):
                        _check_library(entry, backend, where, report)
        else:
            report.left_out.append("the library itself, because the formulas are wrong")
    return report


def _wrong_fields(d: Divergence) -> Iterator[str]:
    """Yield what is wrong and can be seen without a call."""
    if (d.row is None) == (d.term is None):
        yield f"row, term: expected one of them, got {'neither' if d.row is None else 'both'}"
    if d.power is not None and d.row is None:
        yield "power: is for `row`; a divergence with `term` has none"
    if d.link is None and not d.no_link:
        yield "no_link: say why f-DPO cannot use it, or give `link` and `score`"
    if d.link is not None and d.score is None:
        yield "score: expected the textbook formula of `link`, which the reference implementation uses"
    if (d.f is None) != (d.f_prime is None):
        yield "f, f_prime: expected both or neither"
    if others := [part for part in d.parts if part not in names()]:
        yield f"parts: expected names of the registry, got {', '.join(others)}"
    for name in (*COMPILED, "scaling"):
        formula, expected = getattr(d, name), ARGUMENTS.get(name, "p, q, t, lp, lq")
        if formula is not None:
            got, count = len(inspect.signature(formula).parameters), expected.count(",") + 1 + len(d.params)
            if got != count:
                parameters = f" and {len(d.params)} parameters" if d.params else ""
                yield f"{name}: expected the arguments {expected}{parameters}, got {got} arguments"


def _refused(name: str, formula: Callable, report: Report) -> bool:
    problems = list(outside_of_elementwise(formula))
    for problem in problems:
        report.add(f"{name}: {problem}")
    return bool(problems)


# ---- where a probability is 0 --------------------------------------------------------------------------------------


class Edge(NamedTuple):
    what: str
    lp: float
    lq: float
    t: float
    zero: bool = False  # the formula must be 0 there


def _edges() -> Iterator[Edge]:
    sizes, nowhere = (1.0, 80.0, 1e4, 1e20, 1e30), "p = q = 0 (tokens that are suppressed on both sides, and padding)"
    for t in (0.0, *sizes, *(-size for size in sizes)):
        yield Edge(nowhere, FLOOR, FLOOR, t, zero=True)
    for log in (-1e5, -1e20, -1e30):
        yield Edge(nowhere, FLOOR, log, FLOOR - log, zero=True)
        yield Edge(nowhere, log, FLOOR, log - FLOOR, zero=True)
    for log in (-0.1, -1.0, -30.0, -80.0):
        yield Edge("p = 0, q > 0 (a token that the policy suppresses)", FLOOR, log, FLOOR)
        yield Edge("p > 0, q = 0 (a token that the reference suppresses)", log, FLOOR, -FLOOR)
        yield Edge("p = q > 0", log, log, 0.0)
    logs = (-1e-3, -3.0, -60.0, -100.0, -1e3, -1e5, -1e20)
    for lp, lq in product(logs, logs):
        yield Edge("log p and log q between -1e20 and 0", lp, lq, lp - lq)


def _check_edges(d: Divergence, backend: str, device: torch.device, report: Report, compiled: list[str]) -> None:
    edges = list(_edges())
    logs = torch.tensor([(edge.lp, edge.lq, edge.t) for edge in edges], device=device).T
    columns = torch.stack([logs[0].exp(), logs[1].exp(), logs[2], logs[0], logs[1]])
    for name in ELEMENTWISE:
        formula = getattr(d, name)
        if formula is None or (backend == "triton" and name not in compiled):
            continue
        try:
            y = _computed(formula, columns, d.params, backend)
        except Exception as problem:  # whatever a compiler raises
            report.add(f"{name}: fails with {_first_line(problem)}", backend)
            continue
        for kind, wrong in {"NaN": y.isnan(), "infinite": y.isinf(), "not 0": (y != 0)}.items():
            at = [
                edge for edge, bad in zip(edges, wrong.tolist(), strict=True) if bad and (edge.zero or kind != "not 0")
            ]
            if at:
                report.add(f"{name}: {kind} at {at[0].what}, t = {at[0].t:g}; {_advice(kind)}", backend)
                break
    report.ran.append(f"formulas on {backend}")


def _advice(kind: str) -> str:
    if kind == "infinite":
        return "compute exponentials with finite_exp, or cap their argument; bounded(t) is t where it is not the size of an inf"
    return QUOTIENT if kind == "NaN" else "multiply by p or q, so that these columns add nothing"


def _first_line(problem: Exception) -> str:
    text = next((line.strip() for line in str(problem).splitlines()[::-1] if line.strip()), "")
    return f"{type(problem).__name__}: {text}"


def _computed(formula: Callable, columns: Tensor, params: tuple[float, ...], backend: str) -> Tensor:
    if backend != "triton":
        return torch.as_tensor(formula(*columns, *params)).expand_as(columns[0])
    from .formula_kernel import computed  # not above: it imports Triton

    return computed(formula, columns, params)


# ---- in float64 ----------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    what: str
    z: Tensor
    w: Tensor
    tolerance: float  # of values, whose terms cancel near p = q; gradients are of first order
    suppressed: bool = False


def _samples() -> list[Sample]:
    g = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(ROWS, VOCAB, generator=g, dtype=torch.float64)
    noise = torch.randn(ROWS, VOCAB, generator=g, dtype=torch.float64)
    z, w, close = z.float().double(), (z + noise).float().double(), (z + 1e-3 * noise).float().double()

    def without(x: Tensor, first: int) -> Tensor:
        x = x.clone()
        x[:, first::5] = -math.inf
        return x

    return [
        Sample("random rows", z, w, 1e-9),
        Sample("rows with p near q", z, close, 1e-5),
        Sample("rows with p = q = 0 at some tokens", without(z, 1), without(w, 1), 1e-9, True),
        Sample("rows with p = 0 at some tokens", without(z, 1), w, 1e-9, True),
        Sample("rows with q = 0 at some tokens", z, without(w, 1), 1e-9, True),
        Sample("rows with other tokens suppressed on each side", without(z, 1), without(w, 2), 1e-9, True),
    ]


class Truth(NamedTuple):
    """The definition on some rows where it is finite, and its gradients at the logits."""

    value: Tensor
    dz: Tensor
    dw: Tensor


def _truth(d: Divergence, sample: Sample) -> Truth:
    z, w = (x.clone().requires_grad_() for x in (sample.z, sample.w))
    value = d.define(z.log_softmax(-1), w.log_softmax(-1))
    finite = value.isfinite()
    total = value[finite].sum()
    grads = torch.autograd.grad(total, (z, w)) if total.requires_grad else (torch.zeros_like(z), torch.zeros_like(w))
    return Truth(value.detach(), *(g.where(finite[:, None], 0) for g in grads))


def _wrong(ours: Tensor, truth: Tensor, tolerance: float, of: str) -> str:
    """Return what is wrong with a number, or an empty string."""
    if ours.isnan().any():
        return "is NaN"
    if (off := error(ours, truth)) <= tolerance:
        return ""
    factor = ((ours * truth).sum() / truth.square().sum()).item() if truth.any() else math.nan
    if error(ours, factor * truth) <= 1e-4 * abs(factor):
        if abs(factor + 1) <= 1e-3:
            return f"has the wrong sign: it is -1 times {of}"
        return f"is {factor:.4g} times {of}: a factor is missing or is one too many"
    return f"differs from {of} by {off:.1e} of its norm"


def _check_mathematics(d: Divergence, report: Report) -> None:
    report.ran.append("formulas in float64")
    for sample in _samples():
        truth = _truth(d, sample)
        if truth.value.isnan().any():
            report.add_first("define", f"NaN on {sample.what}; replace log p by 0 where p is 0, as _kl does")
            continue
        if (truth.value < -1e-12).any():
            report.add_first("define", f"negative on {sample.what}: {truth.value.min():.3g}")
        if truth.dz.isnan().any() or truth.dw.isnan().any():
            report.add_first(
                "define",
                f"its gradient by autograd is NaN on {sample.what}; mask before exp, log or logaddexp, as _mix does",
            )
            continue
        _check_formulas(d, sample, truth, report)
    _check_far_rows(d, report)
    _check_equal_rows(d, report)
    _check_f(d, report)
    if d.scaling is not None:
        _check_scaling(d, d.scaling, report)
    if d.link is not None and d.score is not None:
        _check_link(d, d.link, d.score, report)


def _columns(z: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Return p, q, t, log p, log q as the backends compute them: logits of -inf are raised to FLOOR."""
    z, w = z.clamp(min=FLOOR), w.clamp(min=FLOOR)
    lp, lq = z.log_softmax(-1), w.log_softmax(-1)
    return lp.exp(), lq.exp(), lp - lq, lp, lq


def _check_formulas(d: Divergence, sample: Sample, truth: Truth, report: Report) -> None:
    """Compare grad_p, grad_q, and row or term with the definition, on the rows where it is finite."""
    rows = truth.value.isfinite()
    if not rows.any():
        return
    columns = tuple(x[rows] for x in _columns(sample.z, sample.w))
    p, q, t, lp, lq = columns
    value, dz, dw = truth.value[rows], truth.dz[rows], truth.dw[rows]
    h, k = d.grad_p(*columns, *d.params), d.grad_q(*columns, *d.params)
    on, before = f"on {sample.what}", len(report.where)
    projected = {"grad_p": (h - p * h.sum(-1, keepdim=True), dz), "grad_q": (k - q * k.sum(-1, keepdim=True), dw)}
    for name, (ours, exact) in projected.items():
        symbol = "dD/dlog p" if name == "grad_p" else "dD/dlog q"
        if text := _wrong(ours, exact, 1e-8, f"{symbol} by autograd of the definition"):
            report.add_first(name, f"{text}, {on}")
    if d.term is not None:
        c = d.term(*columns, *d.params)
        if text := _wrong(c.sum(-1), value, sample.tolerance, "the definition"):
            report.add_first("term", f"its sum {text}, {on}")
        if (c < -1e-12).any():
            report.add_first(
                "term", f"negative at a token, {c.min():.1e}, {on}; near p = q the sum would be rounding noise"
            )
    if d.row is not None:
        _check_row(d, d.row, columns, value, h, sample, report)
    if len(report.where) > before:
        return
    total = (h + k).sum(-1)
    if error(total, d.degree * value) > 10 * sample.tolerance:
        fits = ((total * value).sum() / value.square().sum()).item()
        report.add_first(
            "degree",
            f"sum_v (grad_p + grad_q) is {fits:.4g} D {on}, but degree is {d.degree:g}. If D(x p, x q) = x^{fits:.4g} "
            "D(p, q), correct degree; otherwise grad_p or grad_q lacks a multiple of p or q, which softmax hides",
        )


def _check_row(
    d: Divergence, row: Callable, columns: tuple[Tensor, ...], value: Tensor, h: Tensor, sample: Sample, report: Report
) -> None:
    p, q, t, lp, lq = columns
    reverse, forward = (p * t.where(p > 0, 0)).sum(-1), -(q * t.where(q > 0, 0)).sum(-1)
    power = torch.zeros_like(value) if d.power is None else (lq + d.power * t).logsumexp(-1)
    on = f"on {sample.what}"
    try:
        row_values, slopes = (torch.as_tensor(x).expand_as(value) for x in row(reverse, forward, power, *d.params))
    except (TypeError, ValueError) as problem:
        report.add_first("row", f"expected two numbers, D and sum_v grad_p: {problem}")
        return
    if text := _wrong(row_values, value, sample.tolerance, "the definition"):
        report.add_first("row", f"its first number {text}, {on}")
    if error(slopes, h.sum(-1)) > 10 * sample.tolerance and (slopes - h.sum(-1)).abs().max() > 1e-12:
        report.add_first(
            "row", f"its second number is not sum_v grad_p {on}: {slopes[0]:.6g}, expected {h.sum(-1)[0]:.6g}"
        )


def _check_far_rows(d: Divergence, report: Report) -> None:
    """Check the definition alone where probabilities underflow: the reference implementation runs it in float32 too."""
    near = _samples()[0]
    for dtype, factor in product((torch.float32, torch.float64), FAR):
        z, w = (near.z * factor).to(dtype), (near.w.flip(-1) * factor).to(dtype)
        truth = _truth(d, near._replace(z=z, w=w))
        slopes = torch.cat([truth.dz, truth.dw], -1)[truth.value < HIGHEST]
        for what, x in {"it": truth.value, "its gradient by autograd": slopes}.items():
            if x.isnan().any():
                text = (
                    f"{what} is NaN where probabilities underflow (logits up to {z.abs().max():.0f}, {_short(dtype)})"
                )
                report.add_first("define", f"{text}; write ratios of p and q as functions of lp - lq")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_equal_rows(d: Divergence, report: Report) -> None:
    z = _samples()[0].z
    value = d.define(z.log_softmax(-1), z.log_softmax(-1))
    if value.isnan().any() or value.abs().max() > 1e-12:
        report.add_first("define", f"expected 0 at p = q, got {value.abs().max():.3g}")


def _check_f(d: Divergence, report: Report) -> None:
    """Compare f with the definition, and f_prime with f."""
    if d.f is None or d.f_prime is None:
        return
    sample = _samples()[0]
    lp, lq = sample.z.log_softmax(-1), sample.w.log_softmax(-1)
    if text := _wrong((lq.exp() * d.f((lp - lq).exp())).sum(-1), d.define(lp, lq), 1e-9, "the definition"):
        report.add_first("f", f"sum_v q f(p / q) {text}")
    u = torch.linspace(0.05, 4, 80, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(d.f(u).sum(), u)
    if text := _wrong(d.f_prime(u).detach(), slope, 1e-9, "the derivative of f"):
        report.add_first("f_prime", f"{text}")
    if (slope.diff() < -1e-12).any():
        report.add_first("f", "expected a convex function, but its derivative decreases")


def _check_scaling(d: Divergence, scaling: Callable, report: Report) -> None:
    sample = _samples()[0]
    p, q, t, lp, lq = _columns(sample.z, sample.w)
    h = d.grad_p(p, q, t, lp, lq, *d.params)
    for x, y in ((-0.3, -1.1), (0.0, -2.0), (-2.0, 0.0)):
        by_p, by_q = torch.full((ROWS, 1), x, dtype=torch.float64), torch.full((ROWS, 1), y, dtype=torch.float64)
        a, b = scaling(by_p, by_q, *d.params)
        moved = d.grad_p(p * by_p.exp(), q * by_q.exp(), t + x - y, lp + x, lq + y, *d.params)
        if text := _wrong(a * h + b * p, moved, 1e-9, "grad_p(e^x p, e^y q)"):
            report.add_first("scaling", f"a grad_p(p, q) + b p {text}, at x = {x:g}, y = {y:g}")
            return


def _check_link(d: Divergence, link: Callable, score_of: Callable, report: Report) -> None:
    h = torch.linspace(-3, 3, 61, dtype=torch.float64, requires_grad=True)
    s, slope = link(h.detach(), *d.params)
    score = score_of(h)
    (expected,) = torch.autograd.grad(score.sum(), h)
    if text := _wrong(slope, expected, 1e-8, "the derivative of `score`"):
        report.add_first("link", f"its second number {text}")
    if text := _wrong(s - s[0], (score - score[0]).detach(), 1e-8, "`score`, each minus its first value,"):
        report.add_first("link", f"its first number {text}")
    if d.f_prime is not None:
        (curve,) = torch.autograd.grad(d.f_prime(h.exp()).sum(), h)
        if error(expected * (curve[30] / expected[30]), curve) > 1e-8:
            report.add_first("score", "expected f'(e^h), up to a constant and a factor; its slope is not proportional")
    far = torch.tensor([-1e4, -200.0, -80.0, 80.0, 200.0, 1e4])
    if not all(x.isfinite().all() for x in link(far, *d.params)):
        report.add_first(
            "link", "not finite in float32 at |h| up to 1e4; cap the argument of exponentials, as _forward_link does"
        )


# ---- the library ---------------------------------------------------------------------------------------------------


def _check_library(d: Divergence, backend: str, device: torch.device, report: Report) -> None:
    """Run token_stats from logits, and on the torch backend from hidden states in the plans that it has there."""
    case = Case("the divergence", "zw", lambda stats: stats.divergence.popitem()[1], {"divergence": d})
    rows: list[Row] = []
    labels = torch.arange(ROWS, device=device)
    weight = torch.linspace(0.5, 1.5, ROWS, device=device)
    samples = _samples()
    for sample in samples[:2]:
        policy, ref = (Logits(x.to(device, torch.float32)) for x in (sample.z, sample.w))
        rows += measure(case, Inputs(policy, ref, labels, weight))
    if backend == "torch":
        inputs = make_inputs((1, 2, VOCAB), 1.0, 0, device, torch.float32, hidden=(5, 4), bias=True)
        rows += measure(case, inputs, plans=("vocab_chunks", "keep_logits", "frozen_head"), skipped={})
    for row in rows:
        if not row.ok and not (row.part == "value" and row.ours <= CANCELLED):
            plan = f", plan {row.plan!r}" if row.plan else ""
            report.add(
                f"token_stats: {row.part}{plan} has an error of {row.ours:.1e}, and {row.allowed:.1e} is allowed",
                backend,
            )
    _check_suppressed(d, [sample for sample in samples if sample.suppressed], backend, device, report)
    report.ran.append(f"token_stats on {backend}")


def _check_suppressed(d: Divergence, samples: list[Sample], backend: str, device: torch.device, report: Report) -> None:
    """Compare rows with suppressed tokens, and equal rows, with the reference implementation."""
    equal = samples[0].z
    leaves = [torch.cat([*(getattr(s, side) for s in samples), equal]).to(device, torch.float32) for side in "zw"]
    labels = torch.zeros(len(leaves[0]), dtype=torch.long, device=device)

    def outcome(f: Callable, dtype: torch.dtype) -> tuple[Tensor, ...]:
        z, w = (x.to(dtype).requires_grad_() for x in leaves)
        (value,) = f(z, labels, w, divergence=d).divergence.values()
        grads = torch.autograd.grad(value[value.isfinite()].sum(), (z, w))
        return value.detach(), *grads

    value, dz, dw = outcome(token_stats, torch.float32)
    true, *exact = outcome(reference_stats, torch.float64)
    finite = true.isfinite()
    for i, what in enumerate([*(s.what for s in samples), "rows with p = q"]):
        at = slice(ROWS * i, ROWS * (i + 1))
        if not torch.equal(value[at].isfinite(), finite[at]) or not torch.allclose(
            value[at][finite[at]].double(), true[at][finite[at]], rtol=1e-4, atol=1e-6
        ):
            report.add(f"token_stats: value {value[at].tolist()}, expected {true[at].tolist()}, on {what}", backend)
        if (value[at] < -1e-6).any():
            report.add(f"token_stats: negative value on {what}: {value[at].min():.3g}", backend)
        for side, g, e in (("dz", dz, exact[0]), ("dw", dw, exact[1])):
            rows, truth = g[at][finite[at]], e[at][finite[at]]
            if not g[at].isfinite().all():
                report.add(f"token_stats: {side} is not finite on {what}", backend)
            elif len(rows) and (rows - truth).norm() > 1e-4 * truth.norm() + 1e-6:
                report.add(f"token_stats: {side} differs from autograd of the definition on {what}", backend)
            elif (rows.sum(-1).abs() > 1e-5 * rows.abs().sum(-1) + 1e-6).any():
                report.add(f"token_stats: {side} does not sum to 0 over the vocabulary, on {what}", backend)
