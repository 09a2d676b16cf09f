"""Find the largest of each row in plain torch, in one order on every device: of equal ones the first, NaN before all numbers.

torch.topk leaves open which of equal ones it takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of which only the maximum is compared at first. The more there are, the faster are their maxima; but groups have to be
# many more than k.
SIZES = (64, 16)


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
    n = x.shape[1]
    size = next((size for size in SIZES if n // size > 2 * k), n)
    if size == n:
        return first_of_order(x, k)
    end = n // size * size
    maxima = x[:, :end].unflatten(1, (-1, size)).amax(-1)
    chosen = first_of_order(maxima, k).sort(-1).values.unsqueeze(-1)  # ascending, as positions are
    rest = torch.arange(end, n, device=x.device).expand(len(x), -1)
    inside = torch.arange(size, device=x.device)
    positions = torch.cat([(chosen * size + inside).flatten(1), rest], 1)
    return positions.gather(1, first_of_order(x.gather(1, positions), k))
