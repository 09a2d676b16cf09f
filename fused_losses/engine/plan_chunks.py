"""Loop over tiles of logits for fl.Hidden sources, forward and backward. See also plan_frozen.py and plan_rows.py.

A backend (backends/interface.py) computes on a tile of logits; projection.py computes the matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.interface import Backend
from ..core.layout import (
    Grads,
    HiddenRows,
    LowRankRows,
    Outputs,
    StatsSpec,
    stats_dtype,
    term_rows,
    write_divergence,
)
from ..core.moments import fields
from .planner import Plan
from .projection import Side, hidden_side, side_of
from .sides import BothGradients, Inputs, Wanted
from .stats_outputs import zero_outputs
from .vocab_parallel import VocabShard


class CompactCall(NamedTuple):
    """A call with only the rows that count, and how to compute it."""

    spec: StatsSpec
    backend: Backend
    plan: Plan
    labels: Tensor  # of the rows that count
    rows: Tensor | None  # their indices among all rows; None: all rows, of which some may be ignored
    policy: Side
    ref: Side | None
    dtype: torch.dtype
    shard: VocabShard = VocabShard()  # noqa: RUF009


def dtype_of(policy: Inputs, ref: Inputs | None) -> torch.dtype:
    """Return the dtype of the statistics."""
    dtypes = {stats_dtype(s.x) for s in (policy, ref) if s is not None}
    return torch.float64 if torch.float64 in dtypes else torch.float32


def drop_ignored_rows(
    spec: StatsSpec,
    backend: Backend,
    plan: Plan,
    labels: Tensor,
    policy: Inputs,
    ref: Inputs | None,
    static_shapes: bool,
    shard: VocabShard = VocabShard(),  # noqa: B008
) -> CompactCall:
    """Return the call without the rows that do not count, which are dropped before any product.

    static_shapes: keep all rows, and read no value of the labels.
    """
    labels = labels.reshape(-1).contiguous()
    rows = None
    if not static_shapes:
        rows = (labels != spec.ignore_index).nonzero().squeeze(1)
        labels = labels[rows]
        rows = None if len(rows) == labels.numel() == policy.x[..., 0].numel() else rows
    return CompactCall(
        spec=spec,
        backend=backend,
        plan=plan,
        labels=labels,
        rows=rows,
        policy=side_of(policy.operand(), rows),
        ref=None if ref is None else side_of(ref.operand(), rows),
        dtype=dtype_of(policy, ref),
        shard=shard,
    )


def allocate(call: CompactCall) -> Outputs:
    return zero_outputs(call.spec, call.labels, len(call.labels), call.ref is not None, call.dtype)


class Tiles:
    """Buffers for logits and ref_logits, and the iteration over slices of the vocabulary and blocks of rows.

    In the plan "keep_logits" there is one tile. It is kept [1 or 2, rows, V], and is computed at most once.
    """

    def __init__(self, call: CompactCall, with_ref: bool = True, kept: Tensor | None = None, filled: bool = False):
        self.call, self.keeps, self.filled = call, kept is not None, filled
        self.rows, self.columns = (max(1, min(call.plan.tile.rows, len(call.labels))), call.plan.tile.columns)
        shape = (self.rows, min(self.columns, call.spec.vocab))

        def buffer(i: int) -> Tensor:
            return kept[i] if kept is not None and i < len(kept) else call.labels.new_empty(shape, dtype=call.dtype)

        self.logits = buffer(0)
        self.ref = buffer(1) if with_ref and call.ref is not None else None

    @property
    def blocks(self) -> int:
        return -(-len(self.call.labels) // self.rows)

    @property
    def slices(self) -> int:
        return -(-self.call.spec.vocab // self.columns)

    def columns_of(self) -> Iterator[slice]:
        v = self.call.spec.vocab
        return (slice(c, min(c + self.columns, v)) for c in range(0, v, self.columns))

    def rows_of(self) -> Iterator[slice]:
        n = len(self.call.labels)
        return (slice(r, min(r + self.rows, n)) for r in range(0, n, self.rows))

    def load(self, r: slice, c: slice) -> tuple[StatsSpec, Tensor, Tensor | None]:
        """Compute the tile, unless it is kept already. Return what is asked of it, logits and ref_logits."""
        call, height, width = self.call, r.stop - r.start, c.stop - c.start
        logits = self.logits[:height, :width]
        ref_logits = None if self.ref is None else self.ref[:height, :width]
        if not self.filled:
            call.policy.tile(r, c, logits)
            if ref_logits is not None and call.ref is not None:
                call.ref.tile(r, c, ref_logits)
        self.filled = self.keeps
        return call.spec._replace(vocab=width, first=call.spec.first + c.start), logits, ref_logits


def powers(spec: StatsSpec) -> int:
    return len({d.power for d in spec.divergences if d.power is not None})


def states(call: CompactCall, tiles: Tiles | None) -> Tensor:
    """Compute the rows' sums (moments.RowMoments) over the columns that this call has.

    They are computed slice by slice, or in the tile kernel where tiles is None.
    """
    spec, n = call.spec, len(call.labels)
    state = call.labels.new_empty((fields(powers(spec)), n), dtype=call.dtype)
    if tiles is None:
        ref = None if call.ref is None else _hidden_rows(call.ref)
        call.backend.tile_states(spec, _hidden_rows(call.policy), call.labels, ref, state)
        return state
    for c in tiles.columns_of():
        for r in tiles.rows_of():
            part, logits, ref_logits = tiles.load(r, c)
            call.backend.fold(part, logits, call.labels[r], ref_logits, state[:, r], c.start == 0)
    return state


def forward(call: CompactCall, kept: Tensor | None = None) -> Outputs:
    """Compute the statistics of the rows; `kept` receives all logits in the plan "keep_logits"."""
    out, spec = allocate(call), call.spec
    if not len(call.labels):
        return out
    tiles = None if call.plan.kind == "on_chip" else Tiles(call, kept=kept)
    state = call.shard.merged(spec, call.backend, states(call, tiles))
    call.backend.close(call.shard.whole(spec), state, call.labels, out)
    if any(d.term is not None for d in spec.divergences):
        second_sweep(call, out, tiles)
    return out


def second_sweep(call: CompactCall, out: Outputs, tiles: Tiles | None, visit: Callable | None = None) -> None:
    """Compute the divergences that are sums of terms, from normalised tiles.

    visit(r, c, spec, logits, ref_logits) is called for each tile afterwards.
    """
    spec = call.spec
    if call.ref is None:
        raise TypeError("ref: expected a reference beside a divergence")
    sums = torch.zeros((2 * len(spec.divergences), len(call.labels)), dtype=call.dtype, device=call.labels.device)
    if tiles is None:
        ref = _hidden_rows(call.ref)
        call.backend.tile_terms(spec, _hidden_rows(call.policy), call.labels, ref, out.saved, sums)
    else:
        for c in tiles.columns_of():
            for r in tiles.rows_of():
                part, logits, ref_logits = tiles.load(r, c)
                if ref_logits is not None:
                    call.backend.terms(part, logits, call.labels[r], ref_logits, out.saved[:, r], sums[:, r])
                if visit is not None:
                    visit(r, c, part, logits, ref_logits)
    sums = call.shard.summed(sums).masked_fill_(call.labels == spec.ignore_index, 0)
    for i, d in enumerate(spec.divergences):
        if d.term is not None:
            value, slope = (sums[at] for at in term_rows(i))
            write_divergence(spec, i, value, slope, slice(None), out)


def _hidden_rows(side: Side) -> HiddenRows:
    """Return a side as the tile kernel takes it."""
    hidden = hidden_side(side)
    low_rank = None if hidden.low_rank is None else LowRankRows(hidden.low_rank.xa, hidden.low_rank.b, 1.0)
    x = hidden.x if hidden.x.stride(-1) == 1 else hidden.x.contiguous()
    return HiddenRows(x, hidden.weight, None if hidden.bias is None else hidden.bias.contiguous(), low_rank)


def backward(
    call: CompactCall, saved: Tensor, grads: Grads, wanted: Wanted, kept: Tensor | None = None
) -> BothGradients:
    """Compute the gradients of the tensors of both sides.

    For each tile, compute the logits again (unless they are kept), then d_policy, then its products.
    """
    policy, ref = call.policy, call.ref if wanted.ref.some else None
    tiles = Tiles(call, grads.divergence is not None or ref is not None, kept, filled=kept is not None)
    shared = bool(call.shard.group)
    spare = ref_spare = None
    if wanted.policy.some:
        policy.want(wanted.policy, tiles.blocks > 1, tiles.slices, shared)
        spare = spare_buffer(policy, tiles.logits, kept is not None)
    if ref is not None:
        ref.want(wanted.ref, tiles.blocks > 1, tiles.slices, shared)
        ref_spare = None if tiles.ref is None else spare_buffer(ref, tiles.ref, kept is not None)
    for c in tiles.columns_of():
        for r in tiles.rows_of():
            part, logits, ref_logits = tiles.load(r, c)
            g = Grads(*[None if x is None else x[..., r].contiguous() for x in grads])
            d_policy = _place(spare, logits) if wanted.policy.some else None
            d_ref = None if ref is None or ref_logits is None else _place(ref_spare, ref_logits)
            call.backend.backward(
                part, logits, call.labels[r], ref_logits, saved[:, r].contiguous(), g, d_policy, d_ref
            )
            if d_policy is not None:
                policy.push(r, c, d_policy)
            if ref is not None and d_ref is not None:
                ref.push(r, c, d_ref)
        if wanted.policy.some:
            policy.finish_slice(c)
        if ref is not None:
            ref.finish_slice(c)
    gradients = BothGradients()
    if wanted.policy.some:
        gradients = gradients._replace(policy=policy.gradients())
    return gradients if ref is None else gradients._replace(ref=ref.gradients())


def _place(spare: Tensor | None, tile: Tensor) -> Tensor:
    """Return where the gradient of a tile is written: in the spare buffer, or over the tile if there is none."""
    return tile if spare is None else spare[: tile.shape[0], : tile.shape[1]]


def spare_buffer(side: Side, tile: Tensor, kept: bool = False) -> Tensor | None:
    """Return a buffer for d_policy where the logits are kept, or where the products need another dtype.

    None means that d_policy is written over the logits.
    """
    dtype = side.dz_dtype(tile)
    return torch.empty_like(tile, dtype=dtype) if kept or dtype != tile.dtype else None
