"""A vocabulary (Shard) or the time axis of sequences (Span) split over the ranks of a process group: what they tell one
another. Everything else is local.

Vocabulary, forward: the rows' running sums (moments.SIDES) are gathered and merged, as those of slices are, in the order of
the ranks, so all ranks close the same numbers. Backward: gradients of what all ranks hold, hidden states and LoRA's a, are
summed.

Time axis, forward: the numbers of the tokens are gathered in the order of the ranks, and all ranks put the same formula on the
whole. Backward: nothing; of those numbers only a rank's own have a graph.
"""

from __future__ import annotations

from functools import reduce
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.inputs import Hidden, Logits
from ..core.layout import Problem


class Shard(NamedTuple):
    """This rank's part, as operators take it. group: the process group's name, "" for none."""

    group: str = ""
    first: int = 0
    total: int = 0

    def whole(self, problem: Problem) -> Problem:
        """Of all ranks."""
        return problem._replace(vocab=self.total, first=0) if self.group else problem

    def merged(self, problem: Problem, backend: ModuleType, state: Tensor) -> Tensor:
        """The sums over all ranks' columns."""
        if not self.group:
            return state
        group = _group(self.group)
        parts = [torch.empty_like(state) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, state.contiguous(), group=group)
        for part in parts[1:]:
            backend.merge_states(problem, parts[0], part)
        return parts[0]

    def summed(self, x: Tensor) -> Tensor:
        """Over all ranks, in place."""
        if self.group:
            dist.all_reduce(x, group=_group(self.group))
        return x


def _group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def shard_of(source: Logits | Hidden) -> Shard:
    """Where a source's columns lie. Without `shard` the ranks exchange their sizes: a collective, and a synchronisation."""
    group = source.process_group
    if group is None:
        return Shard()
    assert isinstance(group, dist.ProcessGroup)
    if source.shard is not None:
        return Shard(group.group_name, *source.shard)
    device = (source.hidden if isinstance(source, Hidden) else source.logits).device
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([source.vocab], device=device), group=group)
    counts = [int(n) for n in sizes]
    return Shard(group.group_name, sum(counts[: dist.get_rank(group)]), sum(counts))


class Span(NamedTuple):
    """This rank's part of a time axis that is split over the ranks of a group. group None: all of it, and nothing happens."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    lead: int = 1  # sequences, or whatever comes before the time axis
    sizes: tuple[int, ...] = ()  # tokens of each rank in each of these

    @property
    def first(self) -> int:
        """Tokens before this rank's, of each sequence, or packed of all."""
        return sum(self.sizes[: self.rank])

    def whole(self, tensors: list[Tensor]) -> list[Tensor]:
        """Numbers of this rank's tokens -> of all, flat [lead * total]. This rank's keep their graph, the others have none."""
        if self.group is None or not (longest := max(self.sizes)):
            return tensors
        shape = self.lead, self.sizes[self.rank]
        own = [x.reshape(shape) for x in tensors]
        dtype = reduce(torch.promote_types, (x.dtype for x in own), torch.float32)  # holds them all, masks as 0 and 1
        sent = own[0].new_zeros((len(own), self.lead, longest), dtype=dtype)
        for x, row in zip(own, sent, strict=True):
            row[:, : shape[1]] = x.detach()
        parts = [torch.empty_like(sent) for _ in self.sizes]
        dist.all_gather(parts, sent, group=self.group)

        def joined(i: int, x: Tensor) -> Tensor:
            pieces = [part[i, :, :n].to(x.dtype) for part, n in zip(parts, self.sizes, strict=True)]
            pieces[self.rank] = x
            return torch.cat(pieces, 1).reshape(-1)

        return [joined(i, x) for i, x in enumerate(own)]

    def own(self, x: Tensor) -> Tensor:
        """This rank's of whole()'s."""
        if self.group is None:
            return x
        return x.view(self.lead, sum(self.sizes))[:, self.first : self.first + self.sizes[self.rank]]

    def summed(self, x: Tensor) -> Tensor:
        """A number without a graph, over all ranks."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is true on some rank."""
        return flag if self.group is None else bool(self.summed(torch.tensor(int(flag), device=device)))


def span_of(
    labels: Tensor, sequence_group: object = None, *, cu_seqlens: Tensor | None = None, shift: bool = False,
    static_shapes: bool = False, **_: Any,
) -> Span:  # fmt: skip
    """Where a rank's labels [..., T_rank] lie on the time axis. The ranks exchange their sizes, a collective and a
    synchronisation; with static_shapes they are taken to be equal. A Span is handed back as it is."""
    if sequence_group is None or isinstance(sequence_group, Span):
        return sequence_group or Span()
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("sequence_group: torch.distributed is not initialised")
    if not isinstance(sequence_group, dist.ProcessGroup):
        got = type(sequence_group).__name__
        raise TypeError(f"sequence_group: expected a torch.distributed.ProcessGroup, got {got}")
    if shift:
        raise ValueError(
            "shift: beside sequence_group expected labels that were rolled before they were split, for a slice's last token "
            "predicts the next rank's first; got shift=True"
        )
    if labels.dim() == 0:
        raise ValueError("labels: beside sequence_group expected a time axis, got a 0-d tensor")
    rank, world = dist.get_rank(sequence_group), dist.get_world_size(sequence_group)
    lead, own = labels.shape[:-1].numel(), labels.shape[-1]
    if static_shapes:
        return Span(sequence_group, rank, lead, (own,) * world)
    if torch.compiler.is_compiling():
        raise ValueError(
            "sequence_group: inside torch.compile expected static_shapes=True, for the host reads sizes else"
        )
    found = [torch.zeros(2, dtype=torch.int64, device=labels.device) for _ in range(world)]
    dist.all_gather(found, torch.tensor([lead, own], device=labels.device), group=sequence_group)
    leads, sizes = zip(*torch.stack(found).tolist(), strict=True)
    if len(set(leads)) > 1:
        raise ValueError(f"labels: expected as many sequences on all ranks of sequence_group, got {list(leads)}")
    if cu_seqlens is not None and cu_seqlens.is_cpu and cu_seqlens[-1] != sum(sizes):
        raise ValueError(
            f"cu_seqlens: expected offsets rising from 0 to {sum(sizes)}, the labels of all ranks of sequence_group, got "
            f"{cu_seqlens.tolist()}"
        )
    return Span(sequence_group, rank, lead, sizes)
