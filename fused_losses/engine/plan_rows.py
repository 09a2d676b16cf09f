"""Compute the plan "row_blocks", for a known loss: blocks of rows over the whole vocabulary, gradient in the forward.

A block holds whole units, whose losses do not depend on one another: tokens, sequences, or pairs of sequences. Its logits
still exist when its loss is computed, so nothing is projected twice: the only products are those of both logits, dX and dW.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.interface import Backend
from ..core.layout import Grads, Outputs, StatsSpec, effective
from .plan_chunks import CompactCall, Tiles, allocate, spare_buffer
from .planner import Plan, Tile
from .projection import HiddenSide, side_of
from .sides import HiddenOperand, InputFlags, InputGradients, Operand
from .stats_outputs import StatsTensors, spread_out


class Units(NamedTuple):
    """The units of a call: which rows belong together.

    Unit u of U consists of the sequences u, u + U, ..., which are `each` in number. Sequence s consists of the rows from
    offsets[s] to offsets[s + 1]. Without offsets every row is a unit.
    """

    offsets: list[int] | None
    each: int = 1

    @property
    def longest(self) -> int:
        """Return the number of rows of the longest unit."""
        if self.offsets is None:
            return 1
        lengths = [b - a for a, b in pairwise(self.offsets)]
        count = len(lengths) // self.each
        return max((sum(lengths[u::count]) for u in range(count)), default=1)


class Block(NamedTuple):
    """The description of a block that a loss gets. Its rows are those that count, one sequence after another."""

    rows: Tensor  # their indices among all rows
    sequences: list[int]
    cu_seqlens: Tensor | None  # where each sequence starts among the rows, and the end; None: rows are units


Loss = Callable[[Block, Outputs], tuple[Tensor, Grads]]  # the units' losses, and the gradients of their sum


def grouped(sizes: list[int], most: int) -> list[tuple[int, int]]:
    """Return groups [first, last) of successive units, each with at most `most` rows or with one unit only.

    sizes: the number of rows of each unit.
    """
    groups, start, size = [], 0, 0
    for u, rows in enumerate(sizes):
        if u > start and size + rows > most:
            groups.append((start, u))
            start, size = u, 0
        size += rows
    return [*groups, (start, len(sizes))] if sizes else []


class _Range(NamedTuple):
    """Which of the rows that count are in a block: those up to `end`, from the end of the block before."""

    end: int
    sequences: list[int]
    ends: list[int]  # of the sequences, inside the block


def _layout(labels: Tensor, ignore_index: int, units: Units, most: int) -> tuple[Tensor, list[_Range]]:
    """Return the rows that count, in the order of the blocks, and a description of each block."""
    counts = (labels != ignore_index).nonzero().squeeze(1)
    if units.offsets is None:
        n = len(counts)
        return counts, [_Range(min(end, n), [], []) for end in range(most, n + most, most)]
    cuts = torch.searchsorted(counts, torch.tensor(units.offsets, device=labels.device)).tolist()
    lengths = [b - a for a, b in pairwise(cuts)]
    count = len(lengths) // units.each
    blocks, end = [], 0
    for a, b in grouped([sum(lengths[u::count]) for u in range(count)], most):
        sequences = [j * count + u for j in range(units.each) for u in range(a, b)]
        ends = list(accumulate(lengths[s] for s in sequences))
        end += ends[-1]
        blocks.append(_Range(end, sequences, ends))
    if units.each > 1:
        pieces = [counts[cuts[s] : cuts[s + 1]] for block in blocks for s in block.sequences]
        counts = torch.cat(pieces) if pieces else counts[:0]
    return counts, blocks


class RowBlocks(NamedTuple):
    """What row_blocks() computes."""

    stats: StatsTensors  # of all rows
    losses: Tensor  # of all units; rows that do not count have a loss of 0
    gradients: InputGradients  # the policy's, of the sum of the losses; not rounded


def row_blocks(  # noqa: PLR0913 (the parts of a call whose rows are not laid out yet)
    spec: StatsSpec,
    backend: Backend,
    plan: Plan,
    labels: Tensor,
    policy: HiddenOperand,
    ref: Operand | None,
    units: Units,
    wanted: InputFlags,
    dtype: torch.dtype,
    loss: Loss,
) -> RowBlocks:
    """Compute statistics of all rows, losses of all units, and the policy's gradients of the sum of the losses."""
    labels = labels.reshape(-1).contiguous()
    rows, blocks = _layout(labels, spec.ignore_index, units, plan.tile.rows)
    side, all_columns = HiddenSide(policy, rows), slice(0, spec.vocab)
    ranges = [slice(a, b) for a, b in pairwise([0, *(block.end for block in blocks)])]
    longest = max((r.stop - r.start for r in ranges), default=0)
    call = CompactCall(
        spec=spec,
        backend=backend,
        plan=plan._replace(tile=Tile(max(1, longest), spec.vocab)),
        labels=labels[rows],
        rows=rows,
        policy=side,
        ref=None if ref is None else side_of(ref, rows),
        dtype=dtype,
    )
    side.want(wanted, several_blocks=True, wide=True)
    out, tiles = allocate(call), Tiles(call)
    spare = spare_buffer(side, tiles.logits)
    block_losses = [out.logps.new_zeros(0)]
    for r, block in zip(ranges, blocks, strict=True):
        part, y = _part(out, r), call.labels[r]
        _, logits, ref_logits = tiles.load(r, all_columns)
        if r.stop > r.start:
            backend.forward(spec, logits, y, ref_logits, part)
        cu_seqlens = torch.tensor([0, *block.ends], device=labels.device) if block.sequences else None
        losses, grads = loss(Block(rows[r], block.sequences, cu_seqlens), part)
        block_losses.append(losses)
        if r.stop > r.start and wanted.some and any(g is not None for g in grads):
            d_policy = logits if spare is None else spare[: logits.shape[0]]
            backend.backward(spec, logits, y, ref_logits, part.saved, effective(grads, spec.vocab), d_policy, None)
            side.push(r, all_columns, d_policy)
        for whole, piece in zip(out, part, strict=True):
            if whole is not None and piece is not None:
                whole[..., r] = piece
    side.finish_slice(all_columns)
    losses = torch.cat(block_losses)
    if units.offsets is None:
        losses = losses.new_zeros(labels.numel()).index_copy_(0, rows, losses)
    return RowBlocks(spread_out(out, rows, labels.numel()), losses, side.gradients())


def _part(out: Outputs, r: slice) -> Outputs:
    """Return contiguous outputs for some rows, filled with zeros."""
    fresh = [None if x is None else x.new_zeros((*x.shape[:-1], r.stop - r.start)) for x in out]
    return Outputs(*fresh)  # type: ignore[arg-type]
