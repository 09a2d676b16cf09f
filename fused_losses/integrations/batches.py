"""Divide a Trainer's batch into inputs of the loss and of the model, and count the units of a loss in a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, get_args

from torch import Tensor, nn

from ..core.batch import EACH, Batch, read_batch
from ..core.names import present
from ..core.options import SequenceOptions
from ..losses import FAMILY, Entry, dpo_loss, ipo_loss, kto_loss, preference_loss, upo_loss
from ..nn.fused_head import unwrapped

__all__ = ["Counts", "Loss", "check_columns", "model_inputs"]

# What the mixin itself reads, or what repeats labels and cu_seqlens (from the collators of data.py).
READ = ("labels", "shift_labels", "num_items_in_batch", "skip_logits", "completion_mask", "max_length")
# Options that every loss takes. FROM_BATCHES: the one of them that a batch may contain.
OPTIONS = frozenset(SequenceOptions.__annotations__)
FROM_BATCHES, EMPTY = "cu_seqlens", inspect.Parameter.empty
OURS = {
    "shift": "labels are not shifted yet",
    "num_items": "the Trainer counts",
    "num_nll_tokens": "the Trainer counts",
}


class Counts(NamedTuple):
    """Store the counts of a batch, or of all micro-batches of a step."""

    items: int | Tensor  # units, as num_items of the loss counts them
    nll_tokens: int | Tensor | None  # num_nll_tokens, where the loss takes it


class Loss:
    """Describe a loss by its signature.

    The loss is one of this library, possibly inside functools.partial, or a function of the user.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.function = call, call
        bound: dict[str, Any] = {}
        while isinstance(self.function, partial):
            bound = {**self.function.keywords, **bound}
            self.function = self.function.func
        self.bound = bound
        self.name = getattr(self.function, "__name__", repr(self.function))
        known = "preference_loss" if self.function is dpo_loss else self.name
        registered = known in FAMILY and self.function in (FAMILY[known].call, dpo_loss)
        self.entry: Entry | None = FAMILY[known] if registered else None
        signature = inspect.signature(call.forward if isinstance(call, nn.Module) else call)
        parameters = [p for p in signature.parameters.values() if p.name not in bound]
        self.open = not registered and any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        places = [p.name for p in named if p.kind is not p.KEYWORD_ONLY]
        self.reference = next((n for n in ("ref", "teacher") if n in {p.name for p in named}), None)
        if registered and self.entry is not None and self.entry.ref == "unused":
            self.reference = None
        # a function of the user may use any name for its reference: it is the third parameter, if that has no value yet
        thirds = [p.name for p in parameters if p.kind is p.VAR_POSITIONAL]
        thirds = [
            n for n in places[2:3] if n not in OURS and signature.parameters[n].default in (EMPTY, None)
        ] or thirds
        self.third = thirds[0] if thirds and not registered and self.reference is None else None
        self.optional_reference = registered and (
            FAMILY[known].ref == "optional" or any(p.name == self.reference and p.default is None for p in named)
        )
        batch_parameters = [p for p in named if p.name not in (*places[:2], self.reference, *OURS)]
        self.takes = {p.name for p in batch_parameters if not registered or "Tensor" in str(p.annotation)} - OPTIONS
        self.needs = {p.name for p in batch_parameters if p.default is p.empty and p.name != self.third}
        self.names = {p.name for p in inspect.signature(self.function).parameters.values()}
        self.base: Loss | None = None
        if registered:
            self.takes.add(FROM_BATCHES)
            self.names |= OPTIONS
            if self.function in (dpo_loss, ipo_loss):
                self.names |= inspect.signature(preference_loss).parameters.keys()
            if self.function is upo_loss:  # it also takes the options of its base
                base = bound.get("loss_type")
                self.base = Loss(base if callable(base) else preference_loss)
                self.names |= self.base.names
                self.takes |= self.base.takes - bound.keys()
                self.needs |= self.base.needs - bound.keys()
            self._check_bound()

    def _check_bound(self) -> None:
        """Raise ValueError for options that are bound in fused_loss but unknown or not allowed there."""
        for name, x in self.bound.items():
            if name not in self.names:
                raise ValueError(f"fused_loss: {self.name} has no option {name!r}")
            if name in OURS and not (name == "shift" and x is True):
                raise ValueError(f"{name}: expected it unbound in fused_loss, for {OURS[name]}; got {x!r}")
        if self.bound.get("reduction", "mean") != "mean":
            raise ValueError(
                f"reduction: expected 'mean' in fused_loss, for the Trainer adds up micro-batches and ranks; got "
                f"{self.bound['reduction']!r}"
            )
        if self.bound.get("sequence_group") is not None:
            raise ValueError("sequence_group: expected None in fused_loss: the Trainer's batches are whole")

    @property
    def unit(self) -> str:
        """Return what num_items counts: "tokens", "sequences", "pairs" or "triples"."""
        entry = present("fused_loss", self.entry)
        if self.base is not None and self.base.entry is not None:
            return self.base.unit
        variants = entry.tokens_for
        return "tokens" if any(self.bound.get(name) in values for name, values in variants.items()) else entry.batch

    @property
    def baseline(self) -> bool:
        """Return whether mismatched completions in a batch are used for the baseline of KTO."""
        return self.function is kto_loss and "baseline" not in self.bound

    def counts(self, batch: Mapping[str, Any]) -> Counts:
        """Return the numbers of units and of NLL tokens in a batch."""
        read = self.read(batch)
        each = EACH[self.unit]
        items: int | Tensor = read.sequences // each
        if self.unit == "tokens":
            items = read.mask.sum()
        if not self._counts_nll:
            return Counts(items, None)
        if batch.get("nll_labels") is not None:
            nll_labels = read.aligned(batch["nll_labels"])
            read = read.with_labels(read.labels.where(read.labels != read.ignore_index, nll_labels))
        mask = read.mask
        if each > 1:
            mask = mask & read.texts(each)
        return Counts(items, mask.sum())

    def read(self, batch: Mapping[str, Any]) -> Batch:
        """Return the labels of a batch as the loss will read them."""
        entry = present("fused_loss", self.entry)
        labels, shift = labels_of(batch)
        ignore = self.bound.get("ignore_index", -100)
        options = {"cu_seqlens": batch.get("cu_seqlens"), "shift": shift, "ignore_index": ignore}
        return read_batch(labels, "tokens" if entry.batch == "tokens" else "sequences", options)

    @property
    def _counts_nll(self) -> bool:
        """Return whether the loss takes num_nll_tokens with its bound options."""
        if self.function in (preference_loss, dpo_loss, ipo_loss):
            names = self.bound.get("loss_type", ())
            return "sft" in ((names,) if isinstance(names, str) else names)
        return self.entry is not None and "num_nll_tokens" in inspect.signature(self.function).parameters

    def split(self, batch: Mapping[str, Any], model: ModelInputs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the part of a batch for the model and the part for the loss.

        Raises ValueError for names that neither reads, and where the loss needs a name that is missing.
        """
        to_model, to_loss, nobody = {}, {}, []
        for name, x in batch.items():
            if name in self.takes:
                to_loss[name] = x
            elif name in self.bound and name not in READ:
                raise ValueError(f"{name}: is bound in fused_loss, and in the batch: which one is it?")
            if name in READ:
                continue
            if name in model.forward_names or (name not in self.takes and (name in model.below or model.any)):
                to_model[name] = x
            elif name in self.takes:
                continue
            elif self.open:
                to_loss[name] = x
            else:
                nobody.append(name)
        if nobody:
            raise ValueError(
                f"{', '.join(nobody)}: in the batch, but neither the model nor {self.name} reads it; leave it out"
            )
        if missing := self.needs - to_loss.keys():
            raise ValueError(
                f"{', '.join(sorted(missing))}: {self.name} needs it in the batch, or bound by functools.partial, got "
                f"{', '.join(batch)}"
            )
        return to_model, to_loss


def labels_of(batch: Mapping[str, Any]) -> tuple[Tensor, bool]:
    """Return the labels of a batch, and whether the loss must shift them; some collators have already shifted them."""
    if batch.get("labels") is None:
        raise ValueError(f"labels: expected them in the batch, got {', '.join(batch)}")
    shifted = batch.get("shift_labels")
    labels, shift = (batch["labels"], True) if shifted is None else (shifted, False)
    return (labels.flatten() if batch.get("cu_seqlens") is not None else labels), shift


class ModelInputs(NamedTuple):
    """Store the names of the inputs that a model takes."""

    forward_names: set[str]  # parameters of the forward
    below: set[str]  # what it may pass on to other modules
    any: bool  # whether it may take other names, too


def model_inputs(model: nn.Module) -> ModelInputs:
    """Return the names of the inputs that a model's forward takes.

    Its **kwargs may have a type with named fields, as in transformers' models. Then the forward takes these fields, and
    the parameters of the modules in the model.
    """
    inner = unwrapped(model)
    parameters = inspect.signature(type(inner).forward).parameters
    keywords = next((p for p in parameters.values() if p.kind is p.VAR_KEYWORD), None)
    names = {p.name for p in parameters.values() if p.kind is not p.VAR_KEYWORD} - {"self"}
    if keywords is None:
        return ModelInputs(names, set(), False)
    typed = [x for x in get_args(keywords.annotation) if hasattr(x, "__total__")]
    for kind in typed:
        names |= set(kind.__annotations__)
    modules = {type(c) for x in inner.children() for c in (x, *x.children())}
    below = {name for kind in modules for name in inspect.signature(kind.forward).parameters}
    return ModelInputs(names, below - {"self", "args", "kwargs", "input"}, not typed)


def check_columns(loss: Loss, dataset: Any, collator: Any, argument: str) -> None:
    """Raise ValueError where a column that the loss needs is missing from a dataset.

    This is checked only where the columns are known and the collator passes them on unchanged.
    """
    columns = getattr(dataset, "column_names", None)
    made = made_by(collator)
    if not isinstance(columns, list) or made is None:
        return
    if missing := loss.needs - {*columns, *made}:
        raise ValueError(
            f"{argument}: {loss.name} needs {', '.join(sorted(missing))} in the batches, or bound by functools.partial; the "
            f"columns are {', '.join(columns)}"
        )


def made_by(collator: Any) -> Collection[str] | None:
    """Return the names that a collator adds to a batch, or None for a collator that is not known."""
    if hasattr(collator, "columns") and hasattr(collator, "settings"):
        return ("desirable", "kl") if "completion_ids" in collator.columns else ()
    kind = collator if inspect.isfunction(collator) else type(collator)
    return () if (kind.__module__ or "").startswith("transformers.") else None


def collator_columns(collator: Any) -> Iterable[str]:
    """Return the columns that the collators of integrations.data read; none for other collators."""
    if not (hasattr(collator, "columns") and hasattr(collator, "settings")):
        return ()
    return ("prompt_ids", "label", *collator.columns, *collator.columns.values())
