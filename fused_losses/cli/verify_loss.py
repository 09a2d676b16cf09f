"""fl.verify_loss: say in words where a loss differs from its reference implementation.

Every variant of its Entry runs on small batches: from hidden states, logits and log-probs; padded and packed; with each
reduction; with an empty sequence; and with NaN in the rows that are ignored.
"""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fused_losses as fl

from .. import reference as references
from ..core.batch import EACH
from ..core.names import unknown
from ..losses import FAMILY, Entry
from ..losses.registry import INPUTS
from .check import error
from .findings import Report, backends_here, running_on
from .loss_batches import LossBatch, sources_of

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9}
METRIC = {"rtol": 1e-4, "atol": 1e-5}


def verify_loss(
    loss: str | Entry | Callable,
    reference: Callable | None = None,
    *,
    variants: Sequence[str] | None = None,
    device: torch.device | str | None = None,
) -> Report:
    """Compare a loss with its reference implementation, and report in words what differs.

    Args:
        loss: the name of a registered loss (fused_losses.losses.FAMILY), or its function. For a loss of your own, decorate it
            with fused_losses.losses.registry.register, or pass an Entry, which says how it is called.
        reference: its reference implementation. None: the function of the same name in fused_losses.reference.
        variants: names of variants of its Entry. None: all.
        device: where to run. None: the accelerator, or the CPU if there is none.

    Returns:
        A report: print it. Its `findings` are sentences; there are none if nothing differs.
    """
    entry = _entry(loss)
    name = entry.call.__name__
    if others := set(variants or ()) - set(entry.variants):
        raise unknown("variants", others.pop(), entry.variants)
    if variants is not None:
        entry = replace(entry, variants={variant: entry.variants[variant] for variant in variants})
    report = Report(f"loss {name}")
    where = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    backend = "torch" if where.type == "cpu" else backends_here(where)[0][-1]
    for text in _wrong_entry(entry):
        report.add(text)
    twin = reference or getattr(references, name, None)
    if twin is None:
        report.add(f"reference: fused_losses.reference has no function {name}; write one, or pass `reference`")
    if twin is None or report.findings:
        return report
    comparison = Comparison(entry, twin, where)
    with running_on(backend):
        for case in _cases(entry, double=backend == "torch"):
            comparison.run(case)
    for text in comparison.findings():
        report.add(text)
    report.ran.append(
        f"{len(comparison.cases)} cases of {len(entry.variants)} variant{'s' * (len(entry.variants) > 1)} on {backend}"
    )
    return report


def _entry(loss: str | Entry | Callable) -> Entry:
    if isinstance(loss, Entry):
        return loss
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", repr(loss))
    if name not in FAMILY or (callable(loss) and FAMILY[name].call is not loss):
        raise unknown("loss", name, FAMILY)
    return FAMILY[name]


def _wrong_entry(entry: Entry) -> Iterator[str]:
    """Yield what is wrong with an entry and can be seen without a call."""
    text = inspect.getdoc(entry.call) or ""
    if entry.batch not in EACH:
        yield f"batch: expected one of {', '.join(map(repr, EACH))}, got {entry.batch!r}"
    if entry.ref not in ("needed", "optional", "unused"):
        yield f"ref: expected 'needed', 'optional' or 'unused', got {entry.ref!r}"
    if not entry.variants:
        yield "variants: expected at least one, such as {'plain': {}}"
    for name, kind in entry.inputs.items():
        if kind not in INPUTS:
            yield f"inputs: expected one of {', '.join(INPUTS)} for {name}, got {kind!r}"
        if name not in text:
            yield f"docstring: describe {name}, which the loss takes"
    if "metrics" not in text and "as there" not in text:
        yield "docstring: say what the metrics are"
    name = entry.call.__name__
    if FAMILY.get(name) is entry and getattr(fl, name, None) is not entry.call:
        yield f"name: fused_losses has no {name}; import it in fused_losses/__init__.py, and name it in __all__"
    if not any(word in text for word in entry.source.replace(",", " ").split()):
        yield f"docstring: name the source, {entry.source}"


class Case(NamedTuple):
    """One call of the loss: how its batch is made, and its options."""

    variant: str
    source: str
    ref: str | None
    packed: bool = False
    spoilt: str = ""  # what is done to the batch: "an empty sequence", "NaN in ignored rows"
    dtype: torch.dtype = torch.float32
    how: tuple[tuple[str, Any], ...] = ()

    def labels(self) -> set[str]:
        """Return what is special about the case, in words."""
        labels = {f"{n}={value!r}" for n, value in self.how} | {f"{self.source} and {self.ref or 'no'} reference"}
        labels |= {self.spoilt} - {""} | {"packed" if self.packed else "padded", str(self.dtype).removeprefix("torch.")}
        return labels | {f"the variant {self.variant!r}"}

    def __str__(self) -> str:
        return ", ".join(sorted(self.labels()))


def _cases(entry: Entry, double: bool) -> Iterator[Case]:
    first, *_ = pairs = sources_of(entry)
    hows: list[dict[str, Any]] = [{"reduction": "sum"}, {"reduction": "none"}, {"num_items": 7}, {"num_items": 0}]
    hows += [{"plan": "vocab_chunks", "entropy": True}]
    for variant in entry.variants:
        for packed in (False,) if entry.batch == "tokens" else (False, True):  # tokens are packed as they come
            yield from (Case(variant, *sources, packed) for sources in pairs)
            if double:
                yield Case(variant, *first, packed, dtype=torch.float64)
            for spoilt in ("an empty sequence", "NaN in ignored rows"):
                yield Case(variant, *first, packed, spoilt)
        yield from (Case(variant, *first, how=tuple(how.items())) for how in hows)


class Difference(NamedTuple):
    case: Case
    text: str


@dataclass
class Comparison:
    """A loss beside its reference: the cases that were run, and what differs, by the thing that differs."""

    entry: Entry
    twin: Callable
    device: torch.device
    cases: list[Case] = field(default_factory=list)
    differences: dict[str, list[Difference]] = field(default_factory=dict)

    def run(self, case: Case) -> None:
        """Run one case, and note what differs."""
        self.cases.append(case)
        for about, text in self._differences(case):
            self.differences.setdefault(about, []).append(Difference(case, text))

    def findings(self) -> Iterator[str]:
        """Yield a sentence for each thing that differs, with the cases in which it does."""
        for about, differences in self.differences.items():
            case, text = differences[0]
            yield f"{about}: {text}; {self._where([d.case for d in differences])}, for example {case}"

    def _where(self, wrong: list[Case]) -> str:
        """Return in which cases something differs: all that have something in common, or a count."""
        if len(wrong) == len(self.cases):
            return "in every case"
        right = [label for case in self.cases if case not in wrong for label in case.labels()]
        common = set.intersection(*(case.labels() for case in wrong))
        # some cases are right by chance: with num_items=0 every loss is 0
        special = sorted(label for label in common if right.count(label) <= len(wrong) // 4)
        return f"in {len(wrong)} of {len(self.cases)} cases" + (f", all with {', '.join(special)}" if special else "")

    def _differences(self, case: Case) -> Iterator[tuple[str, str]]:
        plain = {n: value for n, value in case.how if n != "plan"}
        ours = self._outcome(self.entry.call, case, case.dtype, dict(case.how), case.spoilt)
        truth = self._outcome(self.twin, case, torch.float64, plain, case.spoilt.replace("NaN in ignored rows", ""))
        for what, outcome in {"the reference": truth, "the loss": ours}.items():
            if isinstance(outcome, Exception):
                yield what, f"raises {type(outcome).__name__}: {outcome}"
        if not isinstance(ours, Exception) and not isinstance(truth, Exception):
            yield from _compared(ours, truth, case)

    def _outcome(self, function: Callable, case: Case, dtype: torch.dtype, how: dict[str, Any], spoilt: str) -> Any:
        g = torch.Generator().manual_seed(zlib.crc32(case.variant.encode()))
        batch = LossBatch(self.entry, case.variant, g, case.packed, self.device)
        if spoilt == "an empty sequence":
            _empty_last(batch)
        elif spoilt:
            _spoil_ignored(batch)
        try:
            return batch.call(function, dtype, case.source, case.ref, how)
        except Exception as problem:  # of any kind: it is what the report says
            return problem


def _empty_last(batch: LossBatch) -> None:
    """Leave the last sequence no token that counts, and packed no token at all."""
    if "cu_seqlens" not in batch.options:
        batch.y[-1] = -100
        return
    cu = batch.options["cu_seqlens"] = batch.options["cu_seqlens"].clone()
    cu[-1] = cu[-2]
    batch.x, batch.ref_x, batch.y = (x[: cu[-1]] for x in (batch.x, batch.ref_x, batch.y))
    for name, kind in batch.entry.inputs.items():
        if "per token" in kind:
            batch.extra[name] = batch.extra[name][: cu[-1]]


def _spoil_ignored(batch: LossBatch) -> None:
    """Put NaN where labels are ignored: into the policy's rows, and into what is given per token."""
    ignored = batch.y == -100
    batch.x = batch.x.masked_fill(ignored[..., None], math.nan)
    for name, kind in batch.entry.inputs.items():
        x = batch.extra[name]
        if "per token" in kind and x.is_floating_point():
            at = ignored.view(*ignored.shape, *[1] * (x.dim() - ignored.dim()))
            batch.extra[name] = x.masked_fill(at, math.nan)


def _compared(ours: Any, truth: Any, case: Case) -> Iterator[tuple[str, str]]:
    (out, grads), (exact, exact_grads) = ours, truth
    if out.loss.shape != exact.loss.shape:
        yield "loss", f"has the shape {list(out.loss.shape)}, that of the reference {list(exact.loss.shape)}"
        return
    if text := _wrong(out.loss, exact.loss, TOLERANCE[case.dtype]):
        yield "loss", text
    names = {"hidden": ("hidden", "weight"), "logits": ("logits",), "log-probs": ("log-probs",)}[case.source]
    for name, g, e in zip(names, grads, exact_grads, strict=True):
        if text := _wrong(g, e, TOLERANCE[case.dtype]):
            yield f"gradient of {name}", text
    if others := out.metrics.keys() ^ exact.metrics.keys():
        yield "metrics", f"only one of the loss and the reference has {', '.join(sorted(others))}"
    for name in out.metrics.keys() & exact.metrics.keys():
        x, y = out.metrics[name].double(), exact.metrics[name].double()
        if x.shape != y.shape or not torch.allclose(x, y, equal_nan=True, **METRIC):
            yield f"metrics[{name!r}]", f"is {x.tolist()}, in the reference {y.tolist()}"


def _wrong(x: Tensor, truth: Tensor, tolerance: float) -> str:
    """Return how x differs from the reference's number, or an empty string."""
    if x.isnan().any() and not truth.isnan().any():
        return "is NaN, and in the reference it is a number"
    x, truth = x.detach().double().nan_to_num(1e30), truth.detach().double().nan_to_num(1e30)
    if (off := error(x, truth)) <= tolerance:
        return ""
    factor = ((x * truth).sum() / truth.square().sum()).item() if truth.any() else math.nan
    if x.numel() > 1 and error(x, factor * truth) <= 1e-4 * abs(factor):
        return f"is {factor:.4g} times that of the reference"
    if x.numel() == 1:
        return f"is {x.item():.6g}, in the reference {truth.item():.6g}"
    return f"differs from that of the reference by {off:.1e} of its norm"
