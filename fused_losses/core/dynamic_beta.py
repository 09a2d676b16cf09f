"""The beta of beta-DPO: a number for each batch, which follows the margins of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from .running_delta import RunningDelta, mean_over_ranks
from .validation import check_positive, check_weights


class DynamicBeta:
    """The beta of preference_loss in beta-DPO (arXiv 2407.08639), one for each batch.

        beta_batch = beta max(1 + alpha (mean_i M_i - M_0), floor)      M = s_w - s_l of each pair

    M_0 is a running mean of the margins, m M_0 + (1 - m) mean_i M_i, which is first updated with the batch; the first batch
    sets it to its own mean. As in the released code, M has no factor beta; in the paper it has, so that its alpha is this
    one divided by beta.

    The attribute beta is the last result, a 0-d tensor on the device of the margins. The host never reads it.

    Args:
        beta: beta_0, > 0.
        alpha: how strongly beta follows the margins, >= 0. 0: DPO.
        momentum: m, in [0, 1).
        floor: the least factor of beta_0, > 0.
        process_group: The group whose ranks contribute their margins; beta is then the same on all of them. None: only the
            margins of this process count.
    """

    def __init__(
        self, beta: float, alpha: float, *, momentum: float = 0.9, floor: float = 1e-3, process_group: object = None
    ) -> None:
        check_positive(beta=beta, floor=floor)
        check_weights(alpha=alpha)
        self.base, self.alpha, self.floor = float(beta), float(alpha), float(floor)
        self.reference = RunningDelta(momentum, process_group)
        # fixed dtype and device, whatever the defaults are
        self.beta = torch.full((), self.base, dtype=torch.float32, device="cpu")

    @torch.no_grad()
    def update(self, margins: Tensor) -> Tensor:
        """Add the margins [B] of a batch to M_0, and return the beta of this batch, a 0-d tensor."""
        mean, _ = mean_over_ranks(margins, self.reference.process_group)
        ahead = mean - self.reference.update(margins)
        self.beta = self.base * (1 + self.alpha * ahead).clamp(min=self.floor)
        return self.beta

    def state_dict(self) -> dict[str, Tensor]:
        return self.reference.state_dict() | {"beta": self.beta.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.reference.load_state_dict(state)
        self.beta = state["beta"].clone()
