"""Find the largest of each row in plain torch, in one order on every device: of equal ones the first, NaN before all numbers.

torch.topk leaves open which of equal ones it takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = (
    64  # columns of which at first only the maximum is compared: what this takes is less than a second pass over all
)


def first_of_order(x: Tensor, k: int) -> Tensor:
    """Return the positions [rows, k] of the largest of x [rows, n], in their order."""
    if x.dtype == torch.float64:
        return x.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    bits = (x + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).masked_fill_(x.isnan(), 0x7FFFFFFF).long()
    place = torch.arange(x.shape[1] - 1, -1, -1, device=x.device)
    return ((order << 32) | place).topk(k).indices  # no two are equal


def top_positions(x: Tensor, k: int) -> Tensor:
    """Return what first_of_order() returns, in about one pass over x.

    The k largest are in those k groups of neighbours whose maxima are the k largest, and in what no group has.
    """
    groups = x.shape[1] // GROUP
    if groups <= 2 * k:
        return first_of_order(x, k)
    grouped = x[:, : groups * GROUP].unflatten(1, (groups, GROUP))
    chosen = first_of_order(grouped.amax(-1), k).sort(-1).values.unsqueeze(-1)  # ascending, as positions are
    rest = torch.arange(groups * GROUP, x.shape[1], device=x.device).expand(len(x), -1)
    inside = torch.arange(GROUP, device=x.device)
    positions = torch.cat([(chosen * GROUP + inside).flatten(1), rest], 1)
    return positions.gather(1, first_of_order(x.gather(1, positions), k))
