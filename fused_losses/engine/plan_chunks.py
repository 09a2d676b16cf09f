"""Loop over tiles of logits for fl.Hidden sources, forward and backward. See also plan_frozen.py and plan_rows.py.

A backend (backends/interface.py) computes on a tile of logits; projection.py computes the matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.interface import Backend
from ..core.divergences import Divergence
from ..core.layout import Grads, HiddenRows, LowRank, Outputs, Problem, saved_rows, term_rows, write_divergence
from ..core.moments import fields
from .planner import Plan
from .projection import HiddenSide, Inputs, Side, side
from .shards import Shard


class Call(NamedTuple):
    """A problem with only the rows that count, and how to compute it."""

    problem: Problem
    backend: Backend
    plan: Plan
    labels: Tensor  # of the rows that count
    rows: Tensor | None  # their indices among all rows; None: all rows, of which some may be ignored
    policy: Side
    ref: Side | None
    dtype: torch.dtype
    shard: Shard = Shard()  # noqa: RUF009


def open_call(
    problem: Problem, backend: Backend, plan: Plan, labels: Tensor, policy: Inputs, ref: Inputs | None, static: bool
) -> Call:
    """Return the call without the rows that do not count, which are dropped before any product.

    static: keep all rows, and read no value of the labels.
    """
    labels = labels.reshape(-1).contiguous()
    rows = None
    if not static:
        rows = (labels != problem.ignore_index).nonzero().squeeze(1)
        labels = labels[rows]
        rows = None if len(rows) == labels.numel() == _count(policy) else rows
    dtypes = [torch.float64 if s.x.dtype == torch.float64 else torch.float32 for s in (policy, ref) if s is not None]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return Call(
        problem, backend, plan, labels, rows, side(policy, rows), None if ref is None else side(ref, rows), dtype
    )


def _count(inputs: Inputs) -> int:
    return inputs.x[..., 0].numel()


def plain_problem(
    divergences: tuple[Divergence, ...], entropy: bool, collision: bool, ignore_index: int, vocab: int
) -> Problem:
    """Return a problem without head options, for states: the options were applied when these were computed."""
    return Problem(divergences, entropy, collision, False, ignore_index, vocab, 0.0, 1.0, 0.0, 1.0)


def blank(problem: Problem, labels: Tensor, ref: bool, dtype: torch.dtype) -> Outputs:
    """Return zeros for the outputs of rows with these labels."""
    n, count = len(labels), len(problem.divergences)

    def new(*shape: int) -> Tensor:
        return labels.new_zeros(shape, dtype=dtype)

    return Outputs(
        new(n), new(n) if ref else None, new(n), new(n) if problem.entropy else None,
        new(count, n) if count else None, labels.new_zeros(n, dtype=torch.bool), new(n) if problem.collision else None,
        new(saved_rows(count), n),
    )  # fmt: skip


def allocate(call: Call) -> Outputs:
    return blank(call.problem, call.labels, call.ref is not None, call.dtype)


class Tiles:
    """Buffers for the logits of both sides, and the iteration over slices of the vocabulary and blocks of rows.

    In the plan "whole" there is one tile. It is kept [1 or 2, rows, V], and is computed at most once.
    """

    def __init__(self, call: Call, with_ref: bool = True, kept: Tensor | None = None, filled: bool = False):
        self.call, self.keeps, self.filled = call, kept is not None, filled
        self.rows, self.columns = (max(1, min(call.plan.tile[0], len(call.labels))), call.plan.tile[1])
        shape = (self.rows, min(self.columns, call.problem.vocab))

        def buffer(i: int) -> Tensor:
            return kept[i] if kept is not None and i < len(kept) else call.labels.new_empty(shape, dtype=call.dtype)

        self.z = buffer(0)
        self.ref = buffer(1) if with_ref and call.ref is not None else None

    @property
    def blocks(self) -> int:
        return -(-len(self.call.labels) // self.rows)

    @property
    def slices(self) -> int:
        return -(-self.call.problem.vocab // self.columns)

    def columns_of(self) -> Iterator[slice]:
        v = self.call.problem.vocab
        return (slice(c, min(c + self.columns, v)) for c in range(0, v, self.columns))

    def rows_of(self) -> Iterator[slice]:
        n = len(self.call.labels)
        return (slice(r, min(r + self.rows, n)) for r in range(0, n, self.rows))

    def load(self, r: slice, c: slice) -> tuple[Problem, Tensor, Tensor | None]:
        """Compute the tile, unless it is kept already. Return it as a problem of its own, with the logits of both sides."""
        call, height, width = self.call, r.stop - r.start, c.stop - c.start
        z = self.z[:height, :width]
        ref_logits = None if self.ref is None else self.ref[:height, :width]
        if not self.filled:
            call.policy.tile(r, c, z)
            if ref_logits is not None and call.ref is not None:
                call.ref.tile(r, c, ref_logits)
        self.filled = self.keeps
        return call.problem._replace(vocab=width, first=call.problem.first + c.start), z, ref_logits


def powers(problem: Problem) -> int:
    return len({d.power for d in problem.divergences if d.power is not None})


def states(call: Call, tiles: Tiles | None) -> Tensor:
    """Compute the rows' sums (a state, see moments.RowMoments) over the columns that this call has.

    They are computed slice by slice, or in the tile kernel where tiles is None.
    """
    problem, n = call.problem, len(call.labels)
    state = call.labels.new_empty((fields(powers(problem)), n), dtype=call.dtype)
    if tiles is None:
        policy, ref = _hidden_rows(call.policy), None if call.ref is None else _hidden_rows(call.ref)
        call.backend.tile_states(problem, policy, call.labels, ref, state)
        return state
    for c in tiles.columns_of():
        for r in tiles.rows_of():
            part, z, ref_logits = tiles.load(r, c)
            call.backend.fold(part, z, call.labels[r], ref_logits, state[:, r], c.start == 0)
    return state


def forward(call: Call, kept: Tensor | None = None) -> Outputs:
    """Compute the statistics of the rows; `kept` receives all logits in the plan "whole"."""
    out, problem = allocate(call), call.problem
    if not len(call.labels):
        return out
    tiles = None if call.plan.kind == "tiles" else Tiles(call, kept=kept)
    state = call.shard.merged(problem, call.backend, states(call, tiles))
    call.backend.close(call.shard.whole(problem), state, call.labels, out)
    if any(d.term is not None for d in problem.divergences):
        second_sweep(call, out, tiles)
    return out


def second_sweep(call: Call, out: Outputs, tiles: Tiles | None, visit: Callable | None = None) -> None:
    """Compute the divergences that are sums of terms, from normalised tiles.

    visit(r, c, problem, z, ref_logits) is called for each tile afterwards.
    """
    problem = call.problem
    if call.ref is None:
        raise AssertionError("a divergence needs a reference")
    sums = torch.zeros((2 * len(problem.divergences), len(call.labels)), dtype=call.dtype, device=call.labels.device)
    if tiles is None:
        rows = _hidden_rows(call.policy), call.labels, _hidden_rows(call.ref)
        call.backend.tile_terms(problem, *rows, out.saved, sums)
    else:
        for c in tiles.columns_of():
            for r in tiles.rows_of():
                part, z, ref_logits = tiles.load(r, c)
                if ref_logits is None:
                    raise AssertionError("a divergence needs a reference")
                call.backend.terms(part, z, call.labels[r], ref_logits, out.saved[:, r], sums[:, r])
                if visit is not None:
                    visit(r, c, part, z, ref_logits)
    sums = call.shard.summed(sums).masked_fill_(call.labels == problem.ignore_index, 0)
    for i, d in enumerate(problem.divergences):
        if d.term is not None:
            value, slope = (sums[at] for at in term_rows(i))
            write_divergence(problem, i, value, slope, slice(None), out)


def _hidden_rows(s: Side) -> HiddenRows:
    if not isinstance(s, HiddenSide) or (weight := s.inputs.weight) is None:
        raise AssertionError("the plan 'tiles' is chosen for hidden states alone")
    inputs = s.inputs
    low_rank = None if s.xa is None or inputs.b is None else LowRank(s.xa, inputs.b, 1.0)
    x = s.x if s.x.stride(-1) == 1 else s.x.contiguous()
    return HiddenRows(x, weight, None if inputs.bias is None else inputs.bias.contiguous(), low_rank)


def backward(
    call: Call, saved: Tensor, grads: Grads, wanted: list[bool], ref_wanted: list[bool], kept: Tensor | None = None
) -> list[Tensor | None]:
    """Compute the gradients of the ten tensors of both sides.

    For each tile, compute the logits again (unless they are kept), then d_policy, then its products.
    """
    to_policy, to_ref = any(wanted), any(ref_wanted)
    tiles = Tiles(call, grads.divergence is not None or to_ref, kept, filled=kept is not None)
    for s, flags in ((call.policy, wanted), (call.ref, ref_wanted)):
        if s is not None and any(flags):
            shared = bool(call.shard.group)
            s.want(flags, tiles.blocks > 1, tiles.slices, shared=shared) if isinstance(s, HiddenSide) else s.want()
    spare = [
        spare_buffer(s, x, kept is not None) if flag else None
        for s, x, flag in ((call.policy, tiles.z, to_policy), (call.ref, tiles.ref, to_ref))
    ]
    for c in tiles.columns_of():
        for r in tiles.rows_of():
            part, z, ref_logits = tiles.load(r, c)
            g = Grads(*(None if x is None else x[..., r].contiguous() for x in grads))
            d_policy, d_ref = (
                None if not flag else x if buffer is None else buffer[: z.shape[0], : z.shape[1]]
                for flag, x, buffer in ((to_policy, z, spare[0]), (to_ref, ref_logits, spare[1]))
            )
            call.backend.backward(part, z, call.labels[r], ref_logits, saved[:, r].contiguous(), g, d_policy, d_ref)
            if d_policy is not None:
                call.policy.push(r, c, d_policy)
            if d_ref is not None and call.ref is not None:
                call.ref.push(r, c, d_ref)
        for s, flag in ((call.policy, to_policy), (call.ref, to_ref)):
            if s is not None and flag:
                s.finish_slice(c)
    none: list[Tensor | None] = [None] * 5
    found = [s.gradients() if s is not None and f else none for s, f in ((call.policy, to_policy), (call.ref, to_ref))]
    return found[0] + found[1]


def spare_buffer(s: Side | None, tile: Tensor | None, kept: bool = False) -> Tensor | None:
    """Return a buffer for d_policy where the logits are kept, or where the products need another dtype.

    None means that d_policy is written over the logits.
    """
    if s is None or tile is None:
        return None
    dtype = s.dtype if isinstance(s, HiddenSide) else tile.dtype
    return torch.empty_like(tile, dtype=dtype) if kept or dtype != tile.dtype else None


def spread_out(out: Outputs, rows: Tensor | None, count: int) -> list[Tensor]:
    """Return the outputs for all rows, with zeros for those that do not count.

    Rows are the last dimension. An output that is None becomes an empty tensor.
    """

    def one(name: str, x: Tensor | None) -> Tensor:
        if x is None:
            return out.logps.new_zeros((0, count) if name == "div" else 0)
        return x if rows is None else x.new_zeros((*x.shape[:-1], count)).index_copy_(-1, rows, x)

    return [one(name, x) for name, x in out._asdict().items()]
