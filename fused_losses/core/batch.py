"""Read the labels of a batch, and the options that say how a call is computed, once for each call of a public function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .inputs import check_labels, ordinary
from .layout import labels_mask, shift_packed, shifted_labels
from .sequence_parallel import SequenceShard, sequence_shard
from .validation import Count, check_reduction

MISSING_SHIFT = (
    "shift: expected True or False for labels {shape}, got none; True: labels are the input ids, and position t is scored on "
    "label t + 1, as Hugging Face models do; False: labels hold the next token of each position already"
)

EACH = {"tokens": 1, "sequences": 1, "pairs": 2, "triples": 3}  # sequences of a unit, by the kind of a batch
SHAPES = {  # of labels, where a unit has several sequences
    2: "labels: expected [2B, T], chosen rows then rejected rows",
    3: "labels: expected [3B, T], chosen rows, rejected rows, then gold rows",
}


class CallOptions(NamedTuple):
    """The options of a call that are not about its labels. preference_loss describes them."""

    reduction: str = "mean"
    num_items: Count | None = None
    entropy: bool = False
    inplace_backward: bool = False
    plan: str = "auto"
    workspace: int | None = None
    static_shapes: bool = False

    @property
    def execution(self) -> dict[str, Any]:
        """Return the options of token_stats that say how a call from hidden states is computed."""
        return {"plan": self.plan, "workspace": self.workspace, "static_shapes": self.static_shapes}


@dataclass(frozen=True)
class Batch:
    """The labels of a batch, checked, and which of them count.

    Attributes:
        labels: Token ids, int32 or int64: [S, T], or packed [total], or [...] where the units are tokens. Packed labels are
            shifted already.
        shift: Whether the position t of the last axis predicts the label t + 1.
        ignore_index: The label that marks tokens that do not count.
        mask: The tokens that count, in the shape of the outputs, which are one shorter than the labels with shift.
        cu_seqlens: The offsets of packed sequences [S + 1]. None: sequences of equal length, or tokens.
        sequences: The number S of sequences; 0 where the units are tokens.
        shard: The part of the time axis that this rank has.
        rolled: Whether packed labels were shifted.
    """

    labels: Tensor
    shift: bool
    ignore_index: int
    mask: Tensor
    cu_seqlens: Tensor | None = None
    sequences: int = 0
    shard: SequenceShard = SequenceShard()
    rolled: bool = False

    @property
    def predicted(self) -> Tensor:
        """Return the label that each position predicts, in the shape of the labels."""
        return shifted_labels(self.labels, self.shift, self.ignore_index)

    def among_first(self, sequences: int) -> Tensor:
        """Return which tokens belong to the first `sequences` sequences, in a shape that broadcasts with the mask."""
        rows = torch.arange(len(self.labels), device=self.labels.device)
        if self.cu_seqlens is None:
            return rows[:, None] < sequences
        return rows + self.shard.first < self.cu_seqlens[sequences]

    def texts(self, each: int) -> Tensor:
        """Return which tokens belong to the sequences whose negative log-likelihood is a part of the loss, as among_first().

        each: the sequences of a unit. Of pairs these are the chosen, which come first; of triples the gold, which come last.
        """
        last = self.among_first(self.sequences // each * (each - 1))
        return last if each == 2 else ~last

    def count(self, among: Tensor | bool = True) -> Tensor:
        """Return the number of tokens that count, of all ranks of the sequence group, at least 1.

        among: a mask of the tokens among which they are counted.
        """
        return self.shard.summed((self.mask & among).sum()).clamp(min=1)

    def aligned(self, labels: Tensor) -> Tensor:
        """Return other labels of the same tokens, shifted as the labels of the batch are."""
        if not self.rolled or self.cu_seqlens is None:
            return labels
        return shift_packed(labels, self.cu_seqlens, self.ignore_index)

    def with_labels(self, labels: Tensor) -> Batch:
        """Return the batch with other labels, which are aligned."""
        return replace(self, labels=labels, mask=labels_mask(labels, self.shift, self.ignore_index))


def token_batch(labels: object, shift: bool | None, ignore_index: int) -> Batch:
    """Read labels whose units are tokens. A flat tensor [N] has no time axis and needs no `shift`."""
    return read_batch(labels, "tokens", {"shift": shift, "ignore_index": ignore_index})


def read_batch(labels: object, kind: str, options: Mapping[str, Any]) -> Batch:
    """Read the labels of a batch.

    Args:
        labels: The labels that a user has passed.
        kind: A key of EACH: "tokens"; "sequences" for [S, T] or packed; "pairs" for an even number of sequences, the chosen
            first; or "triples", where the gold sequences follow as a third part.
        options: The options of a loss; shift, ignore_index, cu_seqlens, sequence_group and static_shapes are read.

    Raises:
        TypeError: If `shift` is missing where the labels have a time axis.
    """
    labels = check_labels(labels)
    shift, ignore_index = options.get("shift"), options.get("ignore_index", -100)
    group, cu_seqlens = options.get("sequence_group"), options.get("cu_seqlens")
    if shift is None and (kind != "tokens" or labels.dim() > 1 or cu_seqlens is not None or group is not None):
        raise TypeError(MISSING_SHIFT.format(shape=list(labels.shape)))
    if shift is not None and not isinstance(shift, bool):
        hint = "" if isinstance(shift, str) else "; pass bool(shift)"
        raise TypeError(f"shift: expected True or False, got {shift!r} of type {type(shift).__name__}{hint}")
    if shift and labels.dim() == 0:
        raise ValueError("shift: expected labels with a time dimension, got a 0-d tensor")
    cu_seqlens = ordinary(cu_seqlens) if isinstance(cu_seqlens, Tensor) else cu_seqlens
    sequences = 0
    if kind != "tokens" or cu_seqlens is not None:
        sequences = count_sequences(labels, cu_seqlens, group, EACH[kind])
    shard = sequence_shard(labels, group, cu_seqlens, bool(shift), bool(options.get("static_shapes")))
    rolled = bool(shift) and cu_seqlens is not None
    if rolled and cu_seqlens is not None:
        labels, shift = shift_packed(labels, cu_seqlens, ignore_index), False
    mask = labels_mask(labels, bool(shift), ignore_index)
    sequences = 0 if kind == "tokens" else sequences
    return Batch(labels, bool(shift), ignore_index, mask, cu_seqlens, sequences, shard, rolled)


def read_options(options: Mapping[str, Any]) -> CallOptions:
    """Return the options of a loss that are not about its labels, checked."""
    values = {name: options[name] for name in CallOptions._fields if name in options}
    values["num_items"] = check_reduction(values.get("reduction", "mean"), values.get("num_items"))
    return CallOptions(**values)


def count_sequences(labels: Tensor, cu_seqlens: Tensor | None, sequence_group: object, each: int) -> int:
    """Check the shape of labels and return the number of sequences, which must be a multiple of `each`.

    With sequence_group, labels are those of this rank, and the offsets cu_seqlens are those of all ranks.
    """
    if cu_seqlens is not None:
        return _check_offsets(labels, cu_seqlens, sequence_group, each)
    if labels.dim() != 2 or labels.shape[0] % each:
        if each == 1:
            raise ValueError(f"labels: expected [S, T] (or cu_seqlens for packed), got {list(labels.shape)}")
        raise ValueError(f"{SHAPES[each]} (or cu_seqlens for packed), got {list(labels.shape)}")
    return labels.shape[0]


def _check_offsets(labels: Tensor, cu_seqlens: Tensor, sequence_group: object, each: int) -> int:
    if labels.dim() != 1:
        raise ValueError(f"labels: expected packed labels [total] with cu_seqlens, got {list(labels.shape)}")
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = getattr(cu_seqlens, "dtype", type(cu_seqlens))
        raise TypeError(f"cu_seqlens: expected an int32 or int64 tensor, got {got}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0 or (cu_seqlens.numel() - 1) % each:
        shape = "[S + 1]" if each == 1 else f"[{each}B + 1]"
        raise ValueError(f"cu_seqlens: expected {shape} offsets, got {list(cu_seqlens.shape)}")
    if cu_seqlens.device != labels.device:
        raise ValueError(f"cu_seqlens: expected on {labels.device} as the labels are, got {cu_seqlens.device}")
    if cu_seqlens.is_cpu and not torch.compiler.is_compiling():
        # the labels of one rank do not tell where the last sequence ends; sequence_shard() checks it
        end = labels.numel() if sequence_group is None else int(cu_seqlens[-1])
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != end or (cu_seqlens.diff() < 0).any():
            raise ValueError(f"cu_seqlens: expected offsets rising from 0 to {end}, got {cu_seqlens.tolist()}")
    return cu_seqlens.numel() - 1
