"""The reward shift of BCO: a running mean over batches, and over ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import ordinary


def mean_over_ranks(x: Tensor, process_group: object) -> tuple[Tensor, Tensor]:
    """Return the mean of x over all ranks, and the number of its elements there; the mean of no elements is 0."""
    total = torch.stack([x.sum(), torch.full_like(x.sum(), x.numel())])
    if process_group is not None:
        torch.distributed.all_reduce(total, group=process_group)
    return total[0] / total[1].clamp(min=1), total[1]


class RunningDelta:
    """The reward shift of BCO: the running mean of all rewards so far.

    The attributes mean and count are 0-d tensors on the device of the rewards. They are updated in place; the host never
    reads them.

    Args:
        momentum: None for the plain mean over all rewards so far, as in TRL's BCOTrainer. A number m in [0, 1) for
            m old + (1 - m) new, where the first batch sets the mean to its own mean.
        process_group: The group whose ranks contribute their rewards; the state is then the same on all of them. None: only
            the rewards of this process count.
    """

    def __init__(self, momentum: float | None = None, process_group: object = None) -> None:
        if momentum is not None and not 0 <= momentum < 1:
            raise ValueError(f"momentum: expected a number in [0, 1) or None, got {momentum!r}")
        self.momentum, self.process_group = momentum, process_group
        # fixed dtype and device, whatever the defaults are; update() moves them to those of the rewards
        self.mean, self.count = (torch.zeros((), dtype=torch.float32, device="cpu") for _ in range(2))

    @torch.no_grad()
    def update(self, rewards: Tensor) -> Tensor:
        """Add rewards [S] to the running mean and return a copy of the mean."""
        self.mean, self.count = (ordinary(x.to(rewards)) for x in (self.mean, self.count))  # updates are in place
        new, n = mean_over_ranks(rewards, self.process_group)
        if self.momentum is None:
            share = n / (self.count + n).clamp(min=1)
        else:
            share = (1 - self.momentum * (self.count > 0).to(n)) * (n > 0)
        self.mean.lerp_(new, share)
        self.count.add_(n)
        return self.mean.clone()

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean.clone(), "count": self.count.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.mean, self.count = state["mean"].clone(), state["count"].clone()
