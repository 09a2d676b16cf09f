"""python -m fused_losses check: how far values and gradients are from the truth on your shapes, eager torch's and ours.

`run` does the measuring and returns the rows of the table; `measure` takes tensors of your own."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fused_losses as fl

from .backend import BACKENDS, choose, explain
from .divergences import Divergence, linkable, names, parse
from .losses import LOSSES

TOKEN_STATS = "token_stats"  # stands for the numbers per token where losses are asked for
KNOWN = (TOKEN_STATS, *LOSSES)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEAD = ("softcap", "scale", "temperature")

# Ours computes in float32 whatever the input is and rounds a gradient once, so that is what it is held to: a bound on
# eager bfloat16 would pass a kernel that has lost all but two digits. Where the problem itself magnifies rounding
# (models that are close, links that grow like e^h) no fp32 code reaches 1e-5; eager torch then says what one may
# expect, twice that as either error is one draw. The rounding of a gradient is measured: unit roundoff times its norm
# would be too much for most, and too little where fp16 gradients are subnormal.
BASE, CHANCE = 1e-5, 2.0
RULE = """\
error    ||x - truth|| / ||truth|| over the whole tensor, masked rows included. The truth is fused_losses.reference in
         float64 on the same inputs, which are rounded to the dtype first. eager: fused_losses.reference in the dtype.
allowed  1e-5 or, if larger, twice the error of eager torch: in the dtype or in float32, whichever is smaller and a
         number (our values are float32). For a gradient, which has the dtype of the logits, plus what one rounding of
         the true gradient to that dtype costs (an ulp in Triton's interpreter, which truncates to bfloat16)."""

NOTHING = 1e-11  # a root of mean squares below this is the truth's own rounding noise: errors are relative to this then


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    dtype: str
    what: str
    part: str  # value, dz: gradient to the policy's logits, dw: gradient to the reference's
    eager: float
    ours: float
    allowed: float
    rounding: float  # the part of `allowed` that no gradient of this dtype can avoid

    @property
    def ok(self) -> bool:
        return self.ours <= self.allowed  # never where ours is NaN

    @property
    def share(self) -> float:
        """How much of what is allowed beyond the unavoidable is used up: above 1 fails."""
        return math.inf if math.isnan(self.ours) else (self.ours - self.rounding) / (self.allowed - self.rounding)


@dataclass(frozen=True)
class Inputs:
    """Logits [2B, T, V] of policy and reference in the dtype to check, labels [2B, T], incoming gradients [2B T]."""

    policy: Tensor
    ref: Tensor
    labels: Tensor
    weight: Tensor

    def __post_init__(self) -> None:
        vocab, y = self.policy.shape[-1], self.labels[self.labels != -100]
        if y.numel() and not 0 <= y.min() <= y.max() < vocab:
            raise ValueError(f"labels: expected ids in [0, {vocab}) or -100, got {y.min()} to {y.max()}")


class Case(NamedTuple):
    what: str
    sides: str  # whose gradient is compared: z the policy's, w the reference's
    output: Callable[[Any, fl.Logits, Tensor, fl.Logits], Tensor]
    pairs: bool = False


def _token_case(name: str) -> Case:
    side = "w" if name == "ref_logps" else "z"
    return Case(name, side, lambda lib, p, y, q: getattr(lib.token_stats(p, y, q, entropy=name == "entropy"), name))


def _divergence_case(d: Divergence) -> Case:
    return Case(d.key, "zw", lambda lib, p, y, q: lib.token_stats(p, y, q, divergence=d).divergence[d.key])


def _loss_case(loss: str, d: Divergence) -> Case:
    options = {"loss": loss, "divergence": d, "reduction": "none"}
    return Case(f"{loss}, {d.key}", "z", lambda lib, p, y, q: lib.preference_loss(p, y, q, **options).loss, pairs=True)


def cases(divergences: Sequence[str] | None = None, losses: Sequence[str] | None = None) -> Iterator[Case]:
    """What to check. A divergence without an f-DPO link is an error where it and a loss were both asked for by name."""
    if unknown := set(losses or ()) - set(KNOWN):
        raise ValueError(f"loss: unknown name {unknown.pop()!r}; known: {', '.join(KNOWN)}")
    asked = parse(divergences or names())
    if losses is None or TOKEN_STATS in losses:
        yield from map(_token_case, ("logps", "ref_logps", "entropy", "lse"))
        yield from map(_divergence_case, asked)
    for loss in LOSSES if losses is None else [name for name in losses if name != TOKEN_STATS]:
        for link in asked if losses and divergences else [d for d in asked if d.name in linkable()]:
            link.f_dpo_link()
            yield _loss_case(loss, link)


def make_inputs(shape: Sequence[int], spread: float, seed: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Random logits, policy = reference + spread * noise; labels drawn from the reference, every fifth one masked."""
    rng = torch.Generator().manual_seed(seed)
    pairs, length, vocab = shape
    ref = 3 * torch.randn(2 * pairs, length, vocab, generator=rng)
    policy = ref + spread * torch.randn(ref.shape, generator=rng)
    labels = (ref - torch.empty_like(ref).exponential_(generator=rng).log()).argmax(-1)
    labels.view(-1)[3::5] = -100
    weight = torch.randn(labels.numel(), generator=rng)
    return Inputs(policy.to(device, dtype), ref.to(device, dtype), labels.to(device), weight.to(device, dtype))


def _outcome(case: Case, library: Any, x: Inputs, dtype: torch.dtype, head: dict[str, Any]) -> dict[str, Tensor]:
    """Value and gradients by part, computed by a library in a dtype."""
    z, w = x.policy.detach().to(dtype), x.ref.detach().to(dtype)
    leaves = {f"d{side}": leaf.requires_grad_() for side, leaf in (("z", z), ("w", w)) if side in case.sides}
    out = case.output(library, fl.Logits(z, **head), x.labels, fl.Logits(w, **head))
    weight = x.weight[: out.numel()].view(out.shape).to(out.dtype)
    found = torch.autograd.grad(out, list(leaves.values()), weight)
    return {"value": out.detach(), **dict(zip(leaves, found, strict=True))}


def error(x: Tensor, truth: Tensor) -> float:
    return ((x.double() - truth).norm() / truth.norm().clamp(min=NOTHING * math.sqrt(truth.numel()))).item()


def _rounding(truth: Tensor, dtype: torch.dtype) -> float:
    """What the true gradient loses when it is rounded to the dtype."""
    if dtype == torch.bfloat16 and truth.is_cpu and choose(truth.device) == "triton":
        return torch.finfo(dtype).eps
    return error(truth.to(dtype), truth) if dtype in (torch.bfloat16, torch.float16) else 0.0


def measure(case: Case, x: Inputs, head: dict[str, Any] | None = None) -> list[Row]:
    """The rows of one case, one for each part. head: options of fl.Logits, for both sides."""
    head, dtype = head or {}, x.policy.dtype
    truths = _outcome(case, fl.reference, x, torch.float64, head)
    ours = _outcome(case, fl, x, dtype, head)
    eager = {d: _outcome(case, fl.reference, x, d, head) for d in {dtype, torch.float32}}
    rows = []
    for part, truth in truths.items():
        errors = {d: error(results[part], truth) for d, results in eager.items()}
        attainable = min((e for e in errors.values() if math.isfinite(e)), default=0.0)
        rounding = _rounding(truth, ours[part].dtype)
        allowed = max(BASE, CHANCE * attainable) + rounding
        numbers = errors[dtype], error(ours[part], truth), allowed, rounding
        rows.append(Row(str(dtype).removeprefix("torch."), case.what, part, *numbers))
    return rows


def run(
    shape: Sequence[int] = (2, 7, 1003), dtypes: Sequence[torch.dtype] = tuple(DTYPES.values()),
    divergences: Sequence[str] | None = None, losses: Sequence[str] | None = None, *,
    device: torch.device | str = "cpu", spread: float = 1.0, seed: int = 0,
    progress: Callable[[int, int], None] | None = None, **head: Any,
) -> list[Row]:  # fmt: skip
    """All rows of the table. shape: B, T, V. head: options of fl.Logits, for both sides."""
    if len(shape) != 3 or min(shape) < 1 or not 0 <= spread < math.inf:
        raise ValueError(f"expected shape B,T,V of numbers >= 1 and spread >= 0, got {shape} and {spread}")
    plan = list(cases(divergences, losses))
    # Links grow like e^h and h sums over T tokens: unless h stays about 1, they overflow in the truth and in training.
    near = min(spread, 1 / math.sqrt(shape[1]))
    rows: list[Row] = []
    for i, dtype in enumerate(dtypes):
        tokens, pairs = (make_inputs(shape, s, seed, torch.device(device), dtype) for s in (spread, near))
        for j, case in enumerate(plan):
            if progress:
                progress(i * len(plan) + j + 1, len(dtypes) * len(plan))
            rows += measure(case, pairs if case.pairs else tokens, head)
    return rows


def table(rows: Sequence[Row]) -> str:
    width = max(len(row.what) for row in rows)
    lines = [f"{'dtype':<8}  {'what':<{width}}  part   eager error  our error  allowed  ok"]
    for r in rows:
        numbers = f"{r.eager:>11.1e}  {r.ours:>9.1e}  {r.allowed:>7.1e}"
        lines.append(f"{r.dtype:<8}  {r.what:<{width}}  {r.part:<5}  {numbers}  {'yes' if r.ok else 'NO'}")
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    worst = max(rows, key=lambda row: row.share)
    named = f"{worst.dtype} {worst.what} {worst.part}, error {worst.ours:.1e} where {worst.allowed:.1e} is allowed"
    return f"{sum(row.ok for row in rows)} of {len(rows)} checks pass, worst: {named}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = f"Values and gradients against the truth. Exit code 1 if one is worse than allowed.\n\n{RULE}"
    add = parser.add_argument
    add("--shape", default="2,7,1003", metavar="B,T,V", help="B pairs: logits [2B, T, V]; default %(default)s")
    add("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the logits; default: all three")
    add("--divergence", nargs="+", metavar="NAME", help="such as js or 'js(beta=0.3)'; default: all")
    add("--loss", nargs="+", metavar="NAME", help=f"{', '.join(KNOWN)}; default: all, losses with all f-DPO links")
    add("--device", default=device, help="default here: %(default)s")
    add("--backend", choices=BACKENDS, help="sets FUSED_LOSSES_BACKEND; on the CPU, triton means its interpreter: slow")
    add("--spread", type=float, default=1.0, help="standard deviation of policy - reference logits; default 1")
    add("--seed", type=int, default=0, help="of the inputs; default 0")
    for name in HEAD:
        add(f"--{name}", type=float, help="head option of fl.Logits, for both sides")


def _use(backend: str, device: torch.device) -> None:
    os.environ["FUSED_LOSSES_BACKEND"] = backend
    if backend == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") not in ("1", "true"):
        if "triton" in sys.modules:
            raise ValueError("backend: Triton has been imported already; set TRITON_INTERPRET=1 before that")
        os.environ["TRITON_INTERPRET"] = "1"


def _show(done: int, total: int) -> None:
    print(f"\rcase {done} of {total}", end="" if done < total else "\n", file=sys.stderr, flush=True)


def main(args: argparse.Namespace) -> int:
    shape = [int(size) if size.isdecimal() else 0 for size in args.shape.split(",")]
    try:
        device = torch.empty(0, device=args.device).device
        if args.backend:
            _use(args.backend, device)
        backend, reason = explain(device)
    except (RuntimeError, AssertionError) as problem:  # what cannot run here is bad input, not a failed check
        raise ValueError(str(problem).splitlines()[0]) from None
    head = {name: value for name in HEAD if (value := getattr(args, name)) is not None}
    rows = run(
        shape, [DTYPES[name] for name in args.dtype], args.divergence, args.loss,
        device=device, spread=args.spread, seed=args.seed, progress=_show if sys.stderr.isatty() else None, **head,
    )  # fmt: skip
    setting = f"B, T, V = {args.shape} on {device}, spread {args.spread:g}\n{backend} backend: {reason}"
    print(setting, table(rows), RULE, summary(rows), sep="\n\n")
    return 0 if all(row.ok for row in rows) else 1
