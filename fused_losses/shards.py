"""A vocabulary split over the ranks of a process group: what they tell one another. Everything else is local.

Forward: the rows' running sums (moments.SIDES) are gathered and merged, as those of slices are, in the order of the ranks, so
all ranks close the same numbers. Backward: gradients of what all ranks hold, hidden states and LoRA's a, are summed.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import Problem
from .sources import Hidden, Logits


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
        """Over all ranks; half precision travels as float32."""
        if not self.group:
            return x
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
        wide = wide.clone() if wide is x else wide
        dist.all_reduce(wide, group=_group(self.group))
        return wide.to(x.dtype)


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
