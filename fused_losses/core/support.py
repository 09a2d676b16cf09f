"""fl.Support: the ids that a sampler kept at each token, and their reading."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import Batch
from .names import short_fields

INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True, repr=False)
class Support:
    """The ids that a sampler kept at each token (its top-k, top-p or min-p mask), with which log-probs are renormalised.

        log p_S(y) = z_y - log sum_{v in S} e^z_v

    Args:
        ids: [..., K], the ids of each output token ([..., T - 1, K] with shift; [total, K] packed), padded with -1. Or, with
            offsets, flat [M]: the ids of all output tokens one after another, those that are ignored among them (they may
            have none). The ids of a token differ from one another, and its label is one of them.
        offsets: [N + 1] for N output tokens: those of token n are ids[offsets[n] : offsets[n + 1]].
        width: with offsets, the largest number of ids of a token, or more. None: it is read on the host.

    Raises:
        TypeError, ValueError: If the tensors are not those of this form.
    """

    ids: Tensor
    offsets: Tensor | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        for name, x in (("ids", self.ids), ("offsets", self.offsets)):
            if x is not None and (not isinstance(x, Tensor) or x.dtype not in INTEGERS):
                got = getattr(x, "dtype", type(x).__name__)
                raise TypeError(f"support: expected {name} as an int32 or int64 tensor, got {got}")
        if self.offsets is None and self.width is not None:
            raise ValueError(f"support: width is for flat ids with offsets, got {self.width!r}")
        if self.offsets is not None and (self.offsets.dim() != 1 or self.ids.dim() != 1):
            shapes = f"{list(self.ids.shape)} and {list(self.offsets.shape)}"
            raise ValueError(f"support: expected flat ids [M] and offsets [N + 1], got {shapes}")

    def __repr__(self) -> str:
        return short_fields(self)


def padded(support: object, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the ids of each output token [..., K], int64, and which of them there are; none where the mask is False."""
    if not isinstance(support, Support):
        raise TypeError(f"support: expected fl.Support(ids), got {type(support).__name__}")
    shape, ids = batch.mask.shape, support.ids
    if ids.device != batch.labels.device:
        raise ValueError(f"support: expected ids on {batch.labels.device} as the labels are, got {ids.device}")
    if support.offsets is None:
        if ids.dim() == 0 or ids.shape[:-1] != shape:
            raise ValueError(f"support: expected ids {[*shape, 'K']}, got {list(ids.shape)}")
        keep = ids >= 0
    else:
        ids, keep = _spread(ids, support.offsets, support.width, shape)
    keep = keep & batch.mask.unsqueeze(-1)
    return ids.long().masked_fill(~keep, 0), keep


def _spread(flat: Tensor, offsets: Tensor, width: int | None, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return flat ids as [..., K], and which of them there are."""
    n = shape.numel()
    if len(offsets) != n + 1:
        raise ValueError(f"support: expected {n + 1} offsets for {n} output tokens {list(shape)}, got {len(offsets)}")
    counts = offsets.diff()
    if offsets.is_cpu and not torch.compiler.is_compiling():
        if n and (offsets[0] != 0 or offsets[-1] != len(flat) or (counts < 0).any()):
            raise ValueError(
                f"support: expected offsets that rise from 0 to {len(flat)}, got {offsets.tolist()[:9]} ..."
            )
        if width is not None and n and counts.max() > width:
            raise ValueError(f"support: expected width >= {int(counts.max())}, got {width!r}")
    columns = max(1, (int(counts.max()) if n else 0) if width is None else width)
    place = torch.arange(columns, device=flat.device)
    keep = place < counts.unsqueeze(-1)
    if not len(flat):
        return torch.zeros_like(keep, dtype=torch.long).view(*shape, columns), keep.view(*shape, columns)
    at = (offsets[:-1].unsqueeze(-1) + place).clamp(max=len(flat) - 1)
    return flat[at].view(*shape, columns), keep.view(*shape, columns)
