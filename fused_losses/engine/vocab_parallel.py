"""Exchange data between ranks that share a vocabulary.

Forward: the rows' running sums (moments.RowMoments) are gathered and merged, as those of slices are, in the order of
the ranks, so all ranks compute the same results. Backward: the gradients of tensors that all ranks hold, hidden states and
LoRA's a, are summed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.interface import Backend
from ..core.inputs import Hidden, Logits
from ..core.layout import StatsSpec


class VocabShard(NamedTuple):
    """This rank's part of the vocabulary, as operators take it. group: the process group's name, "" for none."""

    group: str = ""
    first: int = 0
    total: int = 0

    def whole(self, spec: StatsSpec) -> StatsSpec:
        """Return the spec over the vocabulary of all ranks."""
        return spec._replace(vocab=self.total, first=0) if self.group else spec

    def merged(self, spec: StatsSpec, backend: Backend, state: Tensor) -> Tensor:
        """Return the running sums over the columns of all ranks."""
        if not self.group:
            return state
        group = group_of(self.group)
        parts = [torch.empty_like(state) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, state.contiguous(), group=group)
        for part in parts[1:]:
            backend.merge_states(spec, parts[0], part)
        return parts[0]

    def summed(self, x: Tensor) -> Tensor:
        """Sum x over all ranks, in place."""
        if self.group:
            dist.all_reduce(x, group=group_of(self.group))
        return x


def group_of(name: str) -> dist.ProcessGroup:
    """Return the group that operators get by its name."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def shard_of(source: Logits | Hidden) -> VocabShard:
    """Return which part of the vocabulary the columns of a source are.

    If the source has no `shard`, the ranks exchange their sizes, which is a collective and a synchronisation.
    """
    group = source.process_group
    if group is None:
        return VocabShard()
    if source.shard is not None:
        return VocabShard(group.group_name, *source.shard)
    device = (source.hidden if isinstance(source, Hidden) else source.logits).device
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([source.vocab], device=device), group=group)
    counts = [int(n) for n in sizes]
    return VocabShard(group.group_name, sum(counts[: dist.get_rank(group)]), sum(counts))
