"""The plan for a loss that is known: blocks of rows over the whole vocabulary, with the gradient found on the way.

A block holds whole units, whose losses do not depend on one another: tokens, sequences, or pairs of sequences. Its logits
are there when its loss is, so nothing is projected twice: z, w, dX and dW are all the products.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.layout import Problem, effective
from .plan_chunks import Call, Grads, Outputs, Tiles, allocate, spare_buffer, spread_out
from .planner import Plan
from .projection import HiddenSide, Inputs, side


class Units(NamedTuple):
    """Which rows belong together: unit u of U is the sequences u, u + U, ..., `each` of them; sequence s is the rows from
    offsets[s] to offsets[s + 1]. Without offsets every row is a unit."""

    offsets: list[int] | None
    each: int = 1

    @property
    def longest(self) -> int:
        """Rows of the longest unit."""
        if self.offsets is None:
            return 1
        lengths = [b - a for a, b in pairwise(self.offsets)]
        count = len(lengths) // self.each
        return max((sum(lengths[u::count]) for u in range(count)), default=1)


class Block(NamedTuple):
    """What a loss is told of a block. Its rows are those that count, sequence after sequence."""

    rows: Tensor  # their numbers
    sequences: list[int]
    cu_seqlens: Tensor | None  # where each sequence starts among the rows, and the end; None: rows are units


Loss = Callable[[Block, Outputs], tuple[Tensor, Grads]]  # the units' losses, and the gradients of their sum


def grouped(sizes: list[int], most: int) -> list[tuple[int, int]]:
    """Runs [first, last) of units of so many rows, at most `most` rows or one unit together."""
    groups, start, size = [], 0, 0
    for u, rows in enumerate(sizes):
        if u > start and size + rows > most:
            groups.append((start, u))
            start, size = u, 0
        size += rows
    return [*groups, (start, len(sizes))] if sizes else []


def _layout(labels: Tensor, ignore_index: int, units: Units, most: int) -> tuple[Tensor, list[tuple[int, list, list]]]:
    """The rows that count in the order of the blocks; of each block its end among them, its sequences and where they end."""
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
    problem: Problem, backend: ModuleType, plan: Plan, labels: Tensor, policy: Inputs, ref: Inputs | None, units: Units,
    wanted: list[bool], dtype: torch.dtype, loss: Loss,
) -> tuple[list[Tensor], Tensor, list[Tensor | None]]:  # fmt: skip
    """Statistics of all rows, losses of all units (rows that do not count have 0), and the policy's gradients of the sum of
    the losses, not rounded."""
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
        _, z, w = tiles.load(r, every)
        if r.stop > r.start:
            backend.forward(problem, z, y, w, *part)
        cu_seqlens = torch.tensor([0, *ends], device=labels.device) if sequences else None
        losses, grads = loss(Block(rows[r], sequences, cu_seqlens), part)
        found.append(losses)
        if r.stop > r.start and any(wanted) and any(g is not None for g in grads):
            dz = z if spare is None else spare[: z.shape[0]]
            backend.backward(problem, z, y, w, part.saved, effective(grads, problem.vocab), dz, None)
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
    """Contiguous outputs for some rows."""
    fresh = [None if x is None else x.new_zeros((*x.shape[:-1], r.stop - r.start)) for x in out]
    return Outputs(*fresh)  # type: ignore[arg-type]
