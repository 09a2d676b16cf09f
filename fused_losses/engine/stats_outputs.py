"""Name the statistics of rows: those that a backend writes, and those that an operator returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.layout import Outputs, StatsSpec, saved_rows


class StatsTensors(NamedTuple):
    """The statistics of all rows as an operator returns them: those not asked for are empty."""

    logps: Tensor
    ref_logps: Tensor
    lse: Tensor
    entropy: Tensor
    divergence: Tensor
    hit: Tensor
    collision: Tensor
    saved: Tensor

    def asked(self, spec: StatsSpec, ref: bool) -> Outputs:
        """Return the statistics with None for those that were not asked for."""
        return Outputs(
            logps=self.logps,
            ref_logps=self.ref_logps if ref else None,
            lse=self.lse,
            entropy=self.entropy if spec.entropy else None,
            divergence=self.divergence if spec.divergences else None,
            hit=self.hit,
            collision=self.collision if spec.collision else None,
            saved=self.saved,
        )


def empty_outputs(spec: StatsSpec, like: Tensor, rows: int, ref: bool, dtype: torch.dtype) -> Outputs:
    """Return outputs that are not written yet, on the device of `like`."""

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return like.new_empty(shape, dtype=dtype)

    return Outputs(
        logps=new(rows),
        ref_logps=new(rows) if ref else None,
        lse=new(rows),
        entropy=new(rows) if spec.entropy else None,
        divergence=new(len(spec.divergences), rows) if spec.divergences else None,
        hit=new(rows, dtype=torch.bool),
        collision=new(rows) if spec.collision else None,
        saved=new(saved_rows(len(spec.divergences)), rows),
    )


def zero_outputs(spec: StatsSpec, like: Tensor, rows: int, ref: bool, dtype: torch.dtype) -> Outputs:
    """Return zeros for the outputs, on the device of `like`."""
    out = empty_outputs(spec, like, rows, ref, dtype)
    return Outputs(*[x if x is None else x.zero_() for x in out])  # type: ignore[arg-type]


def spread_out(out: Outputs, rows: Tensor | None, count: int) -> StatsTensors:
    """Return the outputs for all rows, with zeros for those that do not count.

    Rows are the last dimension. An output that is None becomes an empty tensor.
    """

    def one(x: Tensor | None, *empty: int) -> Tensor:
        if x is None:
            return out.logps.new_empty(empty)
        return x if rows is None else x.new_zeros((*x.shape[:-1], count)).index_copy_(-1, rows, x)

    return StatsTensors(
        logps=one(out.logps),
        ref_logps=one(out.ref_logps, 0),
        lse=one(out.lse),
        entropy=one(out.entropy, 0),
        divergence=one(out.divergence, 0, count),
        hit=one(out.hit),
        collision=one(out.collision, 0),
        saved=one(out.saved),
    )
