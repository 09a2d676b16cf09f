"""The reward shift of BCO: a running mean over batches, and over ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import ordinary


def mean_over_ranks(x: Tensor, process_group: object) -> tuple[Tensor, Tensor]:
    """The mean, 0 of nothing, and the number it is of, over all ranks."""
    total = torch.stack([x.sum(), torch.full_like(x.sum(), x.numel())])
    if process_group is not None:
        torch.distributed.all_reduce(total, group=process_group)
    return total[0] / total[1].clamp(min=1), total[1]


class RunningDelta:
    """BCO's reward shift: the running mean of all rewards so far.

    momentum: None for the plain mean over every reward seen, as TRL's BCOTrainer has it; m for m old + (1 - m) new, the first
    batch's mean taken whole. process_group: rewards of its ranks count too, and the state is the same on all.

    .mean and .count are 0-d tensors that live where the rewards do and are updated in place; the host never reads them.
    """

    def __init__(self, momentum: float | None = None, process_group: object = None) -> None:
        if momentum is not None and not 0 <= momentum < 1:
            raise ValueError(f"momentum: expected a number in [0, 1) or None, got {momentum!r}")
        self.momentum, self.process_group = momentum, process_group
        # whatever the defaults are, which update() could not take to where the rewards are
        self.mean, self.count = (torch.zeros((), dtype=torch.float32, device="cpu") for _ in range(2))

    @torch.no_grad()
    def update(self, rewards: Tensor) -> Tensor:
        """Takes in rewards [S]; returns the mean, a copy."""
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
