"""Compute the plan "rows", for a known loss: blocks of rows over the whole vocabulary, gradient in the forward.

A block holds whole units, whose losses do not depend on one another: tokens, sequences, or pairs of sequences. Its logits
still exist when its loss is computed, so nothing is projected twice: the only products are z, w, dX and dW.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.interface import Backend
from ..core.layout import Grads, Outputs, Problem, effective
from .plan_chunks import Call, Tiles, allocate, spare_buffer, spread_out
from .planner import Plan
from .projection import HiddenSide, Inputs, side


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


def _layout(labels: Tensor, ignore_index: int, units: Units, most: int) -> tuple[Tensor, list[tuple[int, list, list]]]:
    """Return the rows that count, in the order of the blocks, and a description of each block.

    The description is the block's end among those rows, its sequences, and the ends of these inside the block.
    """
    counts = (labels != ignore_index).nonzero().squeeze(1)
    if units.offsets is None:
        n = len(counts)
        return counts, [(min(end, n), [], []) for end in range(most, n + most, most)]
    cuts = torch.searchsorted(counts, torch.tensor(units.offsets, device=labels.device)).tolist()
    lengths = [b - a for a, b in pairwise(cuts)]
    count = len(lengths) // units.each
    blocks, end = [], 0
    for a, b in grouped([sum(lengths[u::count]) for u in range(count)], most):
        sequences = [j * count + u for j in range(units.each) for u in range(a, b)]
        ends = list(accumulate(lengths[s] for s in sequences))
        end += ends[-1]
        blocks.append((end, sequences, ends))
    if units.each > 1:
        pieces = [counts[cuts[s] : cuts[s + 1]] for _, sequences, _ in blocks for s in sequences]
        counts = torch.cat(pieces) if pieces else counts[:0]
    return counts, blocks


def row_blocks(
    problem: Problem, backend: Backend, plan: Plan, labels: Tensor, policy: Inputs, ref: Inputs | None, units: Units,
    wanted: list[bool], dtype: torch.dtype, loss: Loss,
) -> tuple[list[Tensor], Tensor, list[Tensor | None]]:  # fmt: skip
    """Compute statistics of all rows, losses of all units, and the policy's gradients of the sum of the losses.

    Rows that do not count have a loss of 0. The gradients are not rounded.
    """
    labels = labels.reshape(-1).contiguous()
    rows, blocks = _layout(labels, problem.ignore_index, units, plan.tile[0])
    other = None if ref is None else side(ref, rows)
    call = Call(problem, backend, plan, labels[rows], rows, side(policy, rows), other, dtype)
    assert isinstance(call.policy, HiddenSide)
    call.policy.want(wanted, True, wide=True)
    out, every = allocate(call), slice(0, problem.vocab)
    ranges = [slice(a, b) for a, b in pairwise([0, *(end for end, _, _ in blocks)])]
    longest = max((r.stop - r.start for r in ranges), default=0)
    tiles = Tiles(call._replace(plan=plan._replace(tile=(max(1, longest), problem.vocab))))
    spare = spare_buffer(call.policy, tiles.z)
    found = [out.logps.new_zeros(0)]
    for r, (_, sequences, ends) in zip(ranges, blocks, strict=True):
        part, y = _part(out, r), call.labels[r]
        _, z, ref_logits = tiles.load(r, every)
        if r.stop > r.start:
            backend.forward(problem, z, y, ref_logits, part)
        cu_seqlens = torch.tensor([0, *ends], device=labels.device) if sequences else None
        losses, grads = loss(Block(rows[r], sequences, cu_seqlens), part)
        found.append(losses)
        if r.stop > r.start and any(wanted) and any(g is not None for g in grads):
            dz = z if spare is None else spare[: z.shape[0]]
            backend.backward(problem, z, y, ref_logits, part.saved, effective(grads, problem.vocab), dz, None)
            call.policy.push(r, every, dz)
        for whole, piece in zip(out, part, strict=True):
            if whole is not None and piece is not None:
                whole[..., r] = piece
    call.policy.finish_slice(every)
    losses = torch.cat(found)
    if units.offsets is None:
        losses = losses.new_zeros(labels.numel()).index_copy_(0, rows, losses)
    return spread_out(out, rows, labels.numel()), losses, call.policy.gradients()


def _part(out: Outputs, r: slice) -> Outputs:
    """Return contiguous outputs for some rows, filled with zeros."""
    fresh = [None if x is None else x.new_zeros((*x.shape[:-1], r.stop - r.start)) for x in out]
    return Outputs(*fresh)  # type: ignore[arg-type]
