"""Exchange data between ranks that share the time axis of sequences.

Forward: the numbers of the tokens are gathered in the order of the ranks, and all ranks apply the same formula to all of them.
Backward: nothing is exchanged; of those numbers only a rank's own have a graph.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class SequenceShard(NamedTuple):
    """This rank's part of a time axis that is split over the ranks of a group.

    If group is None it is the whole axis, and no method communicates.
    """

    group: dist.ProcessGroup | None = None
    rank: int = 0
    lead: int = 1  # number of sequences: the product of the dimensions before the time axis
    sizes: tuple[int, ...] = ()  # for each rank, the number of its tokens in each sequence

    @property
    def first(self) -> int:
        """Return how many tokens come before this rank's, of each sequence, or of the packed sequences together."""
        return sum(self.sizes[: self.rank])

    def whole(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return numbers of the tokens of all ranks, flat [lead * total], from those of this rank.

        The numbers of this rank keep their graph, the others have none.
        """
        if self.group is None or not (longest := max(self.sizes)):
            return tensors
        shape = self.lead, self.sizes[self.rank]
        local = [x.reshape(shape) for x in tensors]
        dtype = reduce(torch.promote_types, (x.dtype for x in local), torch.float32)  # holds them all, masks as 0 and 1
        sent = local[0].new_zeros((len(local), self.lead, longest), dtype=dtype)
        for x, row in zip(local, sent, strict=True):
            row[:, : shape[1]] = x.detach()
        parts = [torch.empty_like(sent) for _ in self.sizes]
        dist.all_gather(parts, sent, group=self.group)

        def joined(i: int, x: Tensor) -> Tensor:
            pieces = [part[i, :, :n].to(x.dtype) for part, n in zip(parts, self.sizes, strict=True)]
            pieces[self.rank] = x
            return torch.cat(pieces, 1).reshape(-1)

        return [joined(i, x) for i, x in enumerate(local)]

    def own(self, x: Tensor) -> Tensor:
        """Return this rank's part of a tensor of the shape that whole() returns."""
        if self.group is None:
            return x
        return x.view(self.lead, sum(self.sizes))[:, self.first : self.first + self.sizes[self.rank]]

    def summed(self, x: Tensor) -> Tensor:
        """Sum a number without a graph over all ranks, in place."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return whether the flag is true on at least one rank."""
        return flag if self.group is None else bool(self.summed(torch.tensor(int(flag), device=device)))


def sequence_shard(
    labels: Tensor, sequence_group: object, cu_seqlens: Tensor | None, shift: bool, static_shapes: bool
) -> SequenceShard:
    """Return where the labels [..., T_rank] of this rank lie on the time axis.

    The ranks exchange their sizes, which is a collective and a synchronisation; with static_shapes the sizes are assumed to
    be equal. If sequence_group is a SequenceShard it is returned unchanged.
    """
    if sequence_group is None or isinstance(sequence_group, SequenceShard):
        return sequence_group or SequenceShard()
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
    lead, length = labels.shape[:-1].numel(), labels.shape[-1]
    if static_shapes:
        return SequenceShard(sequence_group, rank, lead, (length,) * world)
    if torch.compiler.is_compiling():
        raise ValueError(
            "sequence_group: inside torch.compile expected static_shapes=True, for the host reads sizes else"
        )
    gathered = [torch.zeros(2, dtype=torch.int64, device=labels.device) for _ in range(world)]
    dist.all_gather(gathered, torch.tensor([lead, length], device=labels.device), group=sequence_group)
    leads, sizes = zip(*torch.stack(gathered).tolist(), strict=True)
    if len(set(leads)) > 1:
        raise ValueError(f"labels: expected as many sequences on all ranks of sequence_group, got {list(leads)}")
    if cu_seqlens is not None and cu_seqlens.is_cpu and cu_seqlens[-1] != sum(sizes):
        raise ValueError(
            f"cu_seqlens: expected offsets rising from 0 to {sum(sizes)}, the labels of all ranks of sequence_group, got "
            f"{cu_seqlens.tolist()}"
        )
    return SequenceShard(sequence_group, rank, lead, sizes)
