"""The command python -m fused_losses check: it measures errors of values and gradients on your shapes.

It compares eager torch and this library with float64. `run` measures and returns the rows of the table; `measure` takes your
own tensors. For the divergences and losses that are named, verify_divergence and verify_loss say what is wrong with them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

import fused_losses as fl

from ..backends import BACKENDS, choose, explain
from ..core.divergences import linkable, names, parse
from ..core.inputs import as_source
from ..core.names import unknown
from ..engine.planner import KINDS
from ..engine.projection import low_precision, mixed
from ..losses import FAMILY, LOSSES
from .findings import Report

TOKEN_STATS = "token_stats"  # the name of the numbers per token in a list of losses
KNOWN = (TOKEN_STATS, *LOSSES)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEAD = ("softcap", "scale", "temperature")
PLANS = ("auto", *KINDS)
Side = fl.Logits | fl.Hidden
Skipped = dict[tuple[str, str], list[str]]  # (plan, why): cases

# This library computes in float32 for every input dtype and rounds a gradient once, and the bound is based on this: a
# bound on eager bfloat16 would accept a kernel that has lost all but two digits. Where the problem itself magnifies
# rounding (models that are close, links that grow like e^h), no fp32 code reaches 1e-5; the error of eager torch then
# gives the bound, times two, because either error is one random draw. The rounding of a gradient is measured: unit
# roundoff times its norm would be too much for most, and too little where fp16 gradients are subnormal.
BASE, CHANCE = 1e-5, 2.0
RULE = """\
error    ||x - truth|| / ||truth|| over the whole tensor, masked rows included. The truth is fused_losses.reference in
         float64 on the same inputs, which are rounded to the dtype first. eager: fused_losses.reference in the dtype.
allowed  1e-5 or, if larger, twice the error of eager torch: in the dtype or in float32, whichever is smaller and a
         number (our values, and our logits from hidden states, are float32). For a gradient, which has the dtype of its
         tensor, plus what one rounding of the true gradient to that dtype costs (an ulp where Triton's interpreter
         writes it, which truncates to bfloat16). From hidden states on a GPU, products take factors in the dtype:
         three roundings for dz and what it gives; twice the error of eager torch in the dtype where X A^T, p of a
         frozen head, or tensors of a wider dtype are rounded."""

NOTHING = 1e-11  # a root of mean squares below this is rounding noise of the truth: errors are then relative to this


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    dtype: str
    what: str
    part: str  # value, or a gradient: dz, or dX dW db dA dB, to the policy's tensors, dw, or ref_dX ..., to the reference's
    eager: float
    ours: float
    allowed: float
    share: float  # how much of what is allowed, beyond the rounding that nothing avoids, is used up: above 1 fails
    plan: str = ""  # from hidden states

    @property
    def ok(self) -> bool:
        return self.ours <= self.allowed  # False if ours is NaN


@dataclass(frozen=True)
class Inputs:
    """Policy and reference with rows [2B, T] in the dtype to check, labels [2B, T], and incoming gradients [2B T].

    Gradients are compared for the tensors that require one, or for all tensors if none does.
    """

    policy: Tensor | Side
    ref: Tensor | Side
    labels: Tensor
    weight: Tensor

    def __post_init__(self) -> None:
        vocab, y = self.sides()[0].vocab, self.labels[self.labels != -100]
        if y.numel() and not 0 <= y.min() <= y.max() < vocab:
            raise ValueError(f"labels: expected ids in [0, {vocab}) or -100, got {y.min()} to {y.max()}")

    def sides(self, **head: Any) -> list[Any]:
        return [replace(as_source("source", x), **head) for x in (self.policy, self.ref)]


class Case(NamedTuple):
    what: str
    sides: str  # whose gradient is compared: z the policy's, w the reference's
    pick: Callable[[Any], Tensor]  # the value, from what token_stats or (pairs) preference_loss returns
    options: dict[str, Any]
    pairs: bool = False


def cases(divergences: Sequence[str] | None = None, losses: Sequence[str] | None = None) -> Iterator[Case]:
    """Yield the cases to check.

    It is an error if a divergence without an f-DPO link and a loss were both requested by name.
    """
    if others := set(losses or ()) - set(KNOWN):
        raise unknown("loss", others.pop(), KNOWN)
    asked = parse(divergences or names())
    if losses is None or TOKEN_STATS in losses:
        for name in ("logps", "ref_logps", "entropy", "lse"):
            yield Case(name, "w" if name == "ref_logps" else "z", attrgetter(name), {"entropy": name == "entropy"})
        for d in asked:
            yield Case(d.key, "zw", lambda stats: stats.divergence.popitem()[1], {"divergence": d})
    for loss in LOSSES if losses is None else [name for name in losses if name != TOKEN_STATS]:
        links = linkable() if loss == "sigmoid" else ("reverse_kl",)  # the others take the same scores
        for link in asked if losses and divergences else [d for d in asked if d.name in links]:
            link.f_dpo_link()
            options = {
                "loss_type": loss,
                "divergence": link,
                "discopop_tau": 1.0,
            }  # 0.05 magnifies the rounding of a margin
            yield Case(f"{loss}, {link.key}", "z", attrgetter("loss"), options, pairs=True)


def make_inputs(
    shape: Sequence[int],
    spread: float,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    hidden: Sequence[int] = (),
    bias: bool = False,
    lora: int = 0,
) -> Inputs:
    """Return random logits, policy = reference + spread * noise, and labels drawn from the reference.

    Every fifth label is masked. `hidden` is the H of policy and reference: the inputs are then hidden states and heads with
    such logits. The states share the features that both have.
    """
    rng = torch.Generator().manual_seed(seed)
    sides: list[Any]
    pairs, length, vocab = shape

    def normal(*size: int, by: float = 1.0) -> Tensor:
        return by * torch.randn(size, generator=rng)

    def source(h: int) -> fl.Hidden:
        low = fl.Lora(normal(lora, h, by=h**-0.5), normal(vocab, lora, by=2 * noise / max(1, lora) ** 0.5), 0.5)
        w, c = pad(weight, (0, h - common)) + normal(vocab, h, by=noise / h**0.5), offset + normal(vocab, by=noise)
        return fl.Hidden(states[..., :h], w, c if bias else None, lora=low if lora else None)

    if hidden:
        common, noise = min(hidden), spread / (2 * (1 + bias + (lora > 0))) ** 0.5
        states, weight = normal(2 * pairs, length, max(hidden)), normal(vocab, common, by=3 * common**-0.5)
        offset = normal(vocab)
        sides = [source(h) for h in hidden]
        logits = fl.reference.stats.projected(sides[1])
    else:
        logits = normal(2 * pairs, length, vocab, by=3)
        sides = [fl.Logits(logits + normal(*logits.shape, by=spread)), fl.Logits(logits)]
    labels = (logits - torch.empty_like(logits).exponential_(generator=rng).log()).argmax(-1)
    labels.view(-1)[3::5] = -100
    policy, ref = (_mapped(side, "", lambda _, t: t.to(device, dtype)) for side in sides)
    return Inputs(policy, ref, labels.to(device), normal(labels.numel()).to(device, dtype))


def _mapped(source: Side, side: str, f: Callable[[str, Tensor], Tensor]) -> Side:
    """Return the source with f(part, tensor) in place of each of its tensors."""
    if isinstance(source, fl.Logits):
        return replace(source, logits=f(f"d{side}", source.logits))
    d = "ref_d" if side == "w" else "d"
    x, weight = f(d + "X", source.hidden), f(d + "W", source.weight)
    bias = None if source.bias is None else f(d + "b", source.bias)
    low = source.lora and source.lora._replace(a=f(d + "A", source.lora.a), b=f(d + "B", source.lora.b))
    return replace(source, hidden=x, weight=weight, bias=bias, lora=low)


def error(x: Tensor, truth: Tensor) -> float:
    return ((x.double() - truth).norm() / truth.norm().clamp(min=NOTHING * math.sqrt(truth.numel()))).item()


def measure(
    case: Case,
    x: Inputs,
    head: dict[str, Any] | None = None,
    plans: Sequence[str] = ("auto",),
    workspace: int | None = None,
    skipped: Skipped | None = None,
) -> list[Row]:
    """Return the rows of one case: for each part and, from hidden states, for each plan.

    `head` has options of fl.Logits, for both sides. Plans that are not possible are added to `skipped`; without it they raise
    an error.
    """
    sides = x.sides(**(head or {}))
    tensors: dict[str, Tensor] = {}  # all tensors by part
    for source, side in zip(sides, "zw", strict=True):
        _mapped(source, side, tensors.setdefault)
    dtype, device = next((t.dtype, t.device) for t in tensors.values())
    hidden, named = tensors.keys() & {"dX", "ref_dX"}, any(t.requires_grad for t in tensors.values())
    side_of = {part: "zw"[part == "dw" or part.startswith("ref_")] for part in tensors}
    wanted = {part for part, t in tensors.items() if side_of[part] in case.sides and (t.requires_grad or not named)}
    how: dict[str, Any] = {"workspace": workspace} if hidden else {}
    if case.pairs:  # from hidden states a mean, of which the plan "row_blocks" finds the gradient in its forward
        how["reduction"] = "mean" if hidden else "none"

    def outcome(library: Any, dtype: torch.dtype | None = None, plan: str = "auto") -> dict[str, Tensor]:
        """Return the value and the gradients by part, computed by a library in a dtype (None: that of each tensor)."""
        leaves: dict[str, Tensor] = {}

        def leaf(part: str, t: Tensor) -> Tensor:
            t = t.detach().to(dtype or t.dtype)
            asked = part in wanted and (part == "dX" or plan != "frozen_head")
            return leaves.setdefault(part, t.requires_grad_()) if asked else t

        p, q = (_mapped(source, side, leaf) for source, side in zip(sides, "zw", strict=True))
        function = library.preference_loss if case.pairs else library.token_stats
        value = case.pick(function(p, x.labels, q, shift=False, plan=plan, **how, **case.options))
        weight = x.weight[: value.numel()].view(value.shape).to(value.dtype)
        gradients = torch.autograd.grad(value, list(leaves.values()), weight) if leaves else ()
        return {"value": value.detach(), **dict(zip(leaves, gradients, strict=True))}

    eager, truths = {d: outcome(fl.reference, d) for d in {dtype, torch.float32}}, outcome(fl.reference, torch.float64)
    wide = any(t.dtype != dtype for t in tensors.values()) or tensors.keys() & {"dA", "ref_dA"}
    rounds = hidden and low_precision(dtype) and mixed(device)  # factors of products
    truncates = not hidden and device.type == "cpu" and choose(device) == "triton"
    rows = []
    for plan in plans if hidden else ["auto"]:
        try:
            ours = outcome(fl, plan=plan)
        except ValueError as problem:
            why = str(problem).partition(" is not possible here: ")[2]
            if skipped is None or not why:
                raise
            skipped.setdefault((plan, why), []).append(case.what)
            continue
        frozen = plan != "row_blocks" and ours.keys() == {"value", "dX"}
        for part, result in ours.items():
            truth, kind, rounding = truths[part], result.dtype, 0.0
            errors = {d: error(results[part], truth) for d, results in eager.items()}
            loose = rounds and (wide or (frozen and part == "dX"))
            basis = [e for d, e in errors.items() if math.isfinite(e) and (d == dtype or not loose)]
            allowed = max(BASE, CHANCE * min(basis, default=torch.finfo(dtype).eps if loose else 0.0))
            if part != "value" and low_precision(kind):
                once = torch.finfo(kind).eps if truncates and kind == torch.bfloat16 else error(truth.to(kind), truth)
                rounding = 3 * once if rounds else once
            off = error(result, truth)
            share = math.inf if math.isnan(off) else (off - rounding) / allowed
            numbers = errors[dtype], off, allowed + rounding, share
            rows.append(Row(str(dtype).removeprefix("torch."), case.what, part, *numbers, plan if hidden else ""))
    return rows


def run(
    shape: Sequence[int] = (2, 7, 1003),
    dtypes: Sequence[torch.dtype] = tuple(DTYPES.values()),
    divergences: Sequence[str] | None = None,
    losses: Sequence[str] | None = None,
    *,
    hidden: Sequence[int] = (),
    bias: bool = False,
    lora: int = 0,
    plans: Sequence[str] = PLANS,
    workspace: int | None = None,
    skipped: Skipped | None = None,
    device: torch.device | str = "cpu",
    spread: float = 1.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **head: Any,
) -> list[Row]:
    """Return all rows of the table.

    `shape` is B, T, V. `hidden` is the H of policy and reference, if hidden states are to be checked, with a bias, LoRA
    factors of rank `lora`, and these plans. `head` has options of fl.Logits, for both sides. `skipped` is described in
    measure.
    """
    if len(shape) != 3 or min(*shape, *hidden) < 1 or not 0 <= spread < math.inf or lora < 0:
        what = f"got {shape}, {hidden}, {spread}, {lora}"
        raise ValueError(f"expected shape B,T,V and hidden of numbers >= 1, spread and lora >= 0, {what}")
    plan = list(cases(divergences, losses))
    # Links grow like e^h and h sums over T tokens: unless h stays about 1, they overflow in the truth and in training.
    near = min(spread, 1 / math.sqrt(shape[1]))
    rows: list[Row] = []
    for i, dtype in enumerate(dtypes):
        same = (seed, torch.device(device), dtype, hidden, bias, lora)
        tokens, pairs = (make_inputs(shape, s, *same) for s in (spread, near))
        for j, case in enumerate(plan):
            if progress:
                progress(i * len(plan) + j + 1, len(dtypes) * len(plan))
            rows += measure(case, pairs if case.pairs else tokens, head, plans, workspace, skipped)
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return the table of the rows that fail, and of the worst rows that pass.

    Of the rows that pass in several plans, the table has only the one nearest to failing.
    """
    worst = {(row.dtype, row.what, row.part): row for row in sorted(rows, key=lambda row: row.share)}
    rows = [row for row in rows if not row.ok or worst[row.dtype, row.what, row.part] is row]
    what, plan, part = (max(len(getattr(row, name)) for row in rows) for name in ("what", "plan", "part"))
    plan = plan and max(plan, 4) + 2
    named = f"{'dtype':<8}  {'what':<{what}}  {'plan':<{plan}.{plan}}{'part':<{part}}"
    lines = [f"{named}  eager error  our error  allowed  ok"]
    for r in rows:
        named = f"{r.dtype:<8}  {r.what:<{what}}  {r.plan:<{plan}}{r.part:<{part}}"
        lines.append(f"{named}  {r.eager:>11.1e}  {r.ours:>9.1e}  {r.allowed:>7.1e}  {'yes' if r.ok else 'NO'}")
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    worst = max(rows, key=lambda row: row.share)
    named = " ".join(filter(None, (worst.dtype, worst.what, worst.plan, worst.part)))
    bound = f"error {worst.ours:.1e} where {worst.allowed:.1e} is allowed"
    return f"{sum(row.ok for row in rows)} of {len(rows)} checks pass, worst: {named}, {bound}"


def as_json(ok: bool, setting: str, rows: Sequence[Row], notes: Sequence[str], reports: Sequence[Report]) -> str:
    """Return what the command found; a number that JSON does not have is a text."""

    def plain(row: Row) -> dict[str, Any]:
        fields = asdict(row) | {"ok": row.ok}
        return {n: x if not isinstance(x, float) or math.isfinite(x) else str(x) for n, x in fields.items()}

    verified = [{"subject": report.subject, "ok": report.ok, "findings": report.findings} for report in reports]
    found = {"ok": ok, "setting": setting, "rows": [plain(row) for row in rows], "not_run": notes, "verified": verified}
    return json.dumps(found, indent=2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = f"Values and gradients against the truth. Exit code 1 if one is worse than allowed.\n\n{RULE}"
    add = parser.add_argument
    add("--shape", default="2,7,1003", metavar="B,T,V", help="B pairs: logits [2B, T, V]; default %(default)s")
    add("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of all tensors; default: all three")
    add("--divergence", nargs="+", metavar="NAME", help="such as js or 'js(beta=0.3)'; default: all")
    add(
        "--loss",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(KNOWN)}, or functions such as "
        "simpo_loss, for which only fl.verify_loss runs; default: all of the former, sigmoid with all f-DPO links",
    )
    add("--hidden", type=int, metavar="H", help="start from hidden states [2B, T, H] and head weights, not from logits")
    add("--ref-hidden", type=int, metavar="H", help="of the reference; default: as --hidden")
    add("--bias", action="store_true", help="heads with a bias")
    add("--lora", type=int, default=0, metavar="R", help="heads with factors of rank R")
    add("--plan", nargs="+", choices=(*PLANS, "all"), help="with --hidden; default: all, wherever they apply")
    add("--workspace", type=int, metavar="BYTES", help="of the plans; default: FUSED_LOSSES_WORKSPACE, else 256 MiB")
    add("--device", default=device, help="default here: %(default)s")
    add("--backend", choices=BACKENDS, help="sets FUSED_LOSSES_BACKEND; on the CPU, triton means its interpreter: slow")
    add("--spread", type=float, default=1.0, help="standard deviation of policy - reference logits; default 1")
    add("--seed", type=int, default=0, help="of the inputs; default 0")
    add("--json", action="store_true", help="print every row, what was not run, and the findings as a JSON object")
    for name in HEAD:
        add(f"--{name}", type=float, help="head option of fl.Logits and fl.Hidden, for both sides")


def _use(backend: str, device: torch.device) -> None:
    os.environ["FUSED_LOSSES_BACKEND"] = backend
    if backend == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") not in ("1", "true"):
        if "triton" in sys.modules:
            raise ValueError("backend: Triton has been imported already; set TRITON_INTERPRET=1 before that")
        os.environ["TRITON_INTERPRET"] = "1"


def _show(done: int, total: int) -> None:
    print(f"\rcase {done} of {total}", end="" if done < total else "\n", file=sys.stderr, flush=True)


def _reports(args: argparse.Namespace, device: torch.device, backend: str) -> list[Report]:
    """Verify the divergences and the functions that the command names."""
    from .verify_divergence import verify_divergence  # not above: both import this module
    from .verify_loss import verify_loss

    reports = [verify_divergence(d, device=device, backends=[backend]) for d in parse(args.divergence)]
    return reports + [verify_loss(name, device=device) for name in args.loss or () if name in FAMILY]


def main(args: argparse.Namespace) -> int:
    shape = [int(size) if size.isdecimal() else 0 for size in args.shape.split(",")]
    try:
        device = torch.empty(0, device=args.device).device
        if args.backend:
            _use(args.backend, device)
        backend, reason = explain(device)
    except (RuntimeError, AssertionError) as problem:  # an unusable device is bad input, not a failed check
        raise ValueError(str(problem).splitlines()[0]) from None
    if args.hidden is None and (args.ref_hidden or args.bias or args.lora or args.plan or args.workspace):
        raise ValueError("ref-hidden, bias, lora, plan, workspace: go with --hidden")
    hidden = () if args.hidden is None else (args.hidden, args.ref_hidden or args.hidden)
    plans = PLANS if not args.plan or "all" in args.plan else args.plan
    head = {name: value for name in HEAD if (value := getattr(args, name)) is not None}
    skipped: Skipped = {}
    losses = None if args.loss is None else [name for name in args.loss if name not in FAMILY]
    rows = (
        []
        if args.loss and not losses
        else run(
            shape,
            [DTYPES[name] for name in args.dtype],
            args.divergence,
            losses,
            hidden=hidden,
            bias=args.bias,
            lora=args.lora,
            plans=plans,
            workspace=args.workspace,
            skipped=skipped,
            device=device,
            spread=args.spread,
            seed=args.seed,
            progress=_show if sys.stderr.isatty() else None,
            **head,
        )
    )
    notes = [f"{plan!r} not run for {of[0]} and {len({*of}) - 1} more: {why}" for (plan, why), of in skipped.items()]
    if notes and not rows:
        raise ValueError("\n".join(notes))
    reports = _reports(args, device, backend)
    sizes = f", H = {hidden[0]} and {hidden[1]}" if hidden else ""
    setting = f"B, T, V = {args.shape}{sizes} on {device}, spread {args.spread:g}\n{backend} backend: {reason}"
    ok = all(row.ok for row in rows) and all(report.ok for report in reports)
    if args.json:
        print(as_json(ok, setting, rows, notes, reports))
        return 0 if ok else 1
    parts = [setting, *map(str, reports)]
    if rows:
        parts += [table(rows), "\n".join(notes), RULE, summary(rows)]
    print(*filter(None, parts), sep="\n\n")
    return 0 if ok else 1
