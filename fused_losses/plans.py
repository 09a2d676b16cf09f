"""The loops over tiles behind fl.Hidden: forward, backward, frozen head, and row blocks with the gradient inside.

A backend (torch_backend or kernels/launch) does what happens to a tile of logits, projection.py does the products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import Divergence, from_key
from .layout import PairProblem, Problem
from .moments import fields, log_ratio
from .planner import Plan
from .projection import HiddenSide, Inputs, Side, side
from .torch_backend import write_divergence


class Outputs(NamedTuple):
    """Of the rows that count; what was not asked for is None. saved: what backward needs."""

    logps: Tensor
    ref_logps: Tensor | None
    lse: Tensor
    entropy: Tensor | None
    div: Tensor | None
    hit: Tensor
    saved: Tensor


class Call(NamedTuple):
    """A problem with its rows compacted, and how to carry it out."""

    problem: Problem
    backend: ModuleType
    plan: Plan
    labels: Tensor  # of the rows that count
    rows: Tensor | None  # their numbers among all; None: all rows, of which some may be ignored
    policy: Side
    ref: Side | None
    dtype: torch.dtype


def open_call(
    problem: Problem, backend: ModuleType, plan: Plan, labels: Tensor, policy: Inputs, ref: Inputs | None, static: bool
) -> Call:
    """Drops the rows that do not count, before any product; with static shapes (and no look at a value) keeps them."""
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


def plain_problem(divergences: tuple[Divergence, ...], entropy: bool, ignore_index: int, vocab: int) -> Problem:
    """Without head options: for states, which have them behind them."""
    return Problem(divergences, entropy, False, ignore_index, vocab, 0.0, 1.0, 0.0, 1.0)


def blank(problem: Problem, labels: Tensor, ref: bool, dtype: torch.dtype) -> Outputs:
    """Zeros for the outputs of rows with these labels."""
    n, count = len(labels), len(problem.divergences)

    def new(*shape: int) -> Tensor:
        return labels.new_zeros(shape, dtype=dtype)

    return Outputs(
        new(n), new(n) if ref else None, new(n), new(n) if problem.entropy else None,
        new(count, n) if count else None, labels.new_zeros(n, dtype=torch.bool), new(7 + 2 * count, n),
    )  # fmt: skip


def allocate(call: Call) -> Outputs:
    return blank(call.problem, call.labels, call.ref is not None, call.dtype)


class Tiles:
    """Buffers for z and w, and the walk over slices of the vocabulary and blocks of rows. In the plan "whole" the one tile
    is kept [1 or 2, rows, V], and is computed at most once."""

    def __init__(self, call: Call, with_ref: bool = True, kept: Tensor | None = None, filled: bool = False):
        self.call, self.keeps, self.filled = call, kept is not None, filled
        self.rows, self.columns = (max(1, min(call.plan.tile[0], len(call.labels))), call.plan.tile[1])
        shape = (self.rows, min(self.columns, call.problem.vocab))

        def buffer(i: int) -> Tensor:
            return kept[i] if kept is not None and i < len(kept) else call.labels.new_empty(shape, dtype=call.dtype)

        self.z = buffer(0)
        self.w = buffer(1) if with_ref and call.ref is not None else None

    @property
    def blocks(self) -> int:
        return -(-len(self.call.labels) // self.rows)

    def columns_of(self) -> Iterator[slice]:
        v = self.call.problem.vocab
        return (slice(c, min(c + self.columns, v)) for c in range(0, v, self.columns))

    def rows_of(self) -> Iterator[slice]:
        n = len(self.call.labels)
        return (slice(r, min(r + self.rows, n)) for r in range(0, n, self.rows))

    def load(self, r: slice, c: slice) -> tuple[Problem, Tensor, Tensor | None]:
        """The tile as a problem of its own, z and w."""
        call, height, width = self.call, r.stop - r.start, c.stop - c.start
        z = self.z[:height, :width]
        w = None if self.w is None else self.w[:height, :width]
        if not self.filled:
            call.policy.tile(r, c, z)
            if w is not None and call.ref is not None:
                call.ref.tile(r, c, w)
        self.filled = self.keeps
        return call.problem._replace(vocab=width, first=call.problem.first + c.start), z, w


def _powers(problem: Problem) -> int:
    return len({d.power for d in problem.divergences if d.power is not None})


def states(call: Call, tiles: Tiles | None) -> Tensor:
    """The rows' sums (moments.SIDES) over the columns there are: slice by slice, or (None) in the tile kernel."""
    problem, n = call.problem, len(call.labels)
    state = call.labels.new_empty((fields(_powers(problem)), n), dtype=call.dtype)
    if tiles is None:
        call.backend.tile_states(problem, *_tile_arguments(call), state)
        return state
    for c in tiles.columns_of():
        for r in tiles.rows_of():
            part, z, w = tiles.load(r, c)
            call.backend.fold(part, z, call.labels[r], w, state[:, r], c.start == 0)
    return state


def forward(call: Call, kept: Tensor | None = None) -> Outputs:
    """Row statistics; `kept` receives all logits in the plan "whole"."""
    out, problem = allocate(call), call.problem
    if not len(call.labels):
        return out
    tiles = None if call.plan.kind == "tiles" else Tiles(call, kept=kept)
    call.backend.close(problem, states(call, tiles), call.labels, *out)
    if any(d.term is not None for d in problem.divergences):
        _second_sweep(call, out, tiles)
    return out


def _second_sweep(call: Call, out: Outputs, tiles: Tiles | None, visit: Callable | None = None) -> None:
    """Divergences that are sums of terms, from normalised tiles; visit(r, c, problem, z, w) sees each tile afterwards."""
    problem = call.problem
    sums = torch.zeros((2 * len(problem.divergences), len(call.labels)), dtype=call.dtype, device=call.labels.device)
    if tiles is None:
        call.backend.tile_terms(problem, *_tile_arguments(call), out.saved, sums)
    else:
        for c in tiles.columns_of():
            for r in tiles.rows_of():
                part, z, w = tiles.load(r, c)
                call.backend.terms(part, z, call.labels[r], w, out.saved[:, r], sums[:, r])
                if visit is not None:
                    visit(r, c, part, z, w)
    assert out.ref_logps is not None and out.div is not None
    sums.masked_fill_(call.labels == problem.ignore_index, 0)
    for i, d in enumerate(problem.divergences):
        if d.term is not None:
            value, slope = sums[2 * i], sums[2 * i + 1]
            write_divergence(problem, i, value, slope, slice(None), out.logps, out.ref_logps, out.div, out.saved)


def _tile_arguments(call: Call) -> tuple:
    def one(s: Side | None) -> tuple | None:
        if s is None:
            return None
        assert isinstance(s, HiddenSide)
        inputs = s.inputs
        low_rank = None if s.xa is None else (s.xa, inputs.b, 1.0)
        x = s.x if s.x.stride(-1) == 1 else s.x.contiguous()
        return x, inputs.weight, None if inputs.bias is None else inputs.bias.contiguous(), low_rank

    return one(call.policy), call.labels, one(call.ref)


Grads = tuple[Tensor | None, ...]  # to logps, ref_logps, lse, entropy [n], divergences [n_div, n]; None: none


def backward(
    call: Call, saved: Tensor, grads: Grads, wanted: list[bool], ref_wanted: list[bool], kept: Tensor | None = None
) -> list[Tensor | None]:
    """Gradients of the ten tensors of both sides: logits again (unless kept), tile by tile, then dz, then its products."""
    to_policy, to_ref = any(wanted), any(ref_wanted)
    pair = grads[4] is not None
    tiles = Tiles(call, pair or to_ref, kept, filled=kept is not None)
    for s, flags in ((call.policy, wanted), (call.ref, ref_wanted)):
        if s is not None and any(flags):
            s.want(flags, tiles.blocks > 1) if isinstance(s, HiddenSide) else s.want()
    spare = [
        _spare(s, x, kept is not None) if flag else None
        for s, x, flag in ((call.policy, tiles.z, to_policy), (call.ref, tiles.w, to_ref))
    ]
    for c in tiles.columns_of():
        for r in tiles.rows_of():
            part, z, w = tiles.load(r, c)
            g = tuple(None if x is None else x[..., r].contiguous() for x in grads)
            dz, dw = (
                None if not flag else x if buffer is None else buffer[: z.shape[0], : z.shape[1]]
                for flag, x, buffer in ((to_policy, z, spare[0]), (to_ref, w, spare[1]))
            )
            call.backend.backward(part, z, call.labels[r], w, saved[:, r].contiguous(), g, dz, dw)
            if dz is not None:
                call.policy.push(r, c, dz)
            if dw is not None and call.ref is not None:
                call.ref.push(r, c, dw)
        for s, flag in ((call.policy, to_policy), (call.ref, to_ref)):
            if s is not None and flag:
                s.finish_slice(c)
    none: list[Tensor | None] = [None] * 5
    found = [s.gradients() if s is not None and f else none for s, f in ((call.policy, to_policy), (call.ref, to_ref))]
    return found[0] + found[1]


def _spare(s: Side | None, tile: Tensor | None, kept: bool = False) -> Tensor | None:
    """A buffer for dz where the logits are kept, or the products want another dtype; None: it goes in their place."""
    if s is None or tile is None:
        return None
    dtype = s.dtype if isinstance(s, HiddenSide) else tile.dtype
    return torch.empty_like(tile, dtype=dtype) if kept or dtype != tile.dtype else None


# ---- frozen head -----------------------------------------------------------------------------------------------------
#
# Per row E[h W] = sum_v h_v s_v W_v (s_v the slope of the head) for h = p, for p log p where the entropy has a gradient,
# and for h = dD/dlog p of each divergence. During the first sweep p and q are normalised by the totals so far. Those grow by
# e^-x and e^-y: Divergence.scaling then gives h = a h' + b p', two numbers a row that bring a sum up to date. (Sums of
# numbers that are not normalised would do in exact arithmetic, but p' may be huge against h.) Divergences without a scaling
# have their sums from a second sweep, over tiles that are normalised for good.


def bases(problem: Problem) -> list[Divergence]:
    """The divergences that are no sum of others, each once."""
    return [from_key(k) for k in dict.fromkeys(k for d in problem.divergences for k in (d.parts or (d.key,)))]


class _Frozen:
    """The sums keep[i] of a call: 0 for p, then the entropy's, then one for each base."""

    def __init__(self, call: Call, keep: Tensor, tiles: Tiles):
        assert isinstance(call.policy, HiddenSide)
        self.call, self.keep, self.policy = call, keep, call.policy
        self.bases = bases(call.problem)
        self.at = 1 + call.problem.entropy  # of the first base
        self.dz = torch.empty_like(tiles.z, dtype=call.policy.dtype)
        self.one = torch.ones((1, tiles.rows), dtype=call.dtype, device=call.labels.device)

    def _add(
        self, i: int, r: slice, c: slice, part: Problem, z: Tensor, w: Tensor | None, frame: Tensor, g: int
    ) -> None:
        """keep[i] += sum_v h_v s_v W_v: what backward writes as dz when only output g has a gradient, of 1 (entropy: -1)."""
        dz = self.dz[: z.shape[0], : z.shape[1]]
        grads: list[Tensor | None] = [None] * 5
        one = self.one[:, : z.shape[0]]
        grads[g] = {2: one[0], 3: -one[0], 4: one}[g]
        self.call.backend.backward(part, z, self.call.labels[r], w, frame, tuple(grads), dz, None)
        self.policy.pull(self.keep[i, r], c, dz)

    def add_slice(self, r: slice, c: slice, part: Problem, z: Tensor, w: Tensor | None, frame: Tensor) -> None:
        alone = part._replace(divergences=())
        self._add(0, r, c, alone, z, None, frame[:7].contiguous(), 2)
        if part.entropy:
            self._add(1, r, c, alone, z, None, frame[:7].contiguous(), 3)
        self.add_bases(r, c, part, z, w, frame, second=False)

    def add_bases(
        self, r: slice, c: slice, part: Problem, z: Tensor, w: Tensor | None, frame: Tensor, second: bool
    ) -> None:
        for i, d in enumerate(self.bases, self.at):
            if (d.scaling is None) == second:
                self._add(i, r, c, part._replace(divergences=(d,)), z, w, frame, 4)

    def rescale(self, r: slice, x: Tensor, y: Tensor) -> None:
        """From p and q to e^x p and e^y q."""
        keep = self.keep[:, r]
        if self.call.problem.entropy:
            keep[1].mul_(x.exp()[:, None]).addcmul_(keep[0], (x.exp() * x)[:, None])
        for i, d in enumerate(self.bases, self.at):
            if d.scaling is not None:
                a, b = d.scaling(x, y, *d.params)
                keep[i].mul_(a[:, None]).addcmul_(keep[0], b[:, None])
        keep[0].mul_(x.exp()[:, None])


def frozen_forward(call: Call, keep: Tensor) -> Outputs:
    """As forward(), and keep filled for frozen_backward()."""
    out, problem, backend = allocate(call), call.problem, call.backend
    n = len(call.labels)
    if not n:
        return out
    state = call.labels.new_zeros((fields(_powers(problem)), n), dtype=call.dtype)
    tiles = Tiles(call)
    sums = _Frozen(call, keep, tiles)
    frames = state.new_zeros((9, n))  # what backward takes for saved numbers, of the vocabulary so far
    for c in tiles.columns_of():
        for r in tiles.rows_of():
            part, z, w = tiles.load(r, c)
            backend.fold(part, z, call.labels[r], w, state[:, r], c.start == 0)
            old, new = frames[:, r], _frame(backend, state[:, r], call.ref is not None)
            if c.start:
                x, y = (backend.in_nats((old[i] - new[i]) + (old[i + 1] - new[i + 1])) for i in (0, 2))
                near = x - ((old[4] - new[4]) + (old[5] - new[5]))  # the same y with the digits that x - y needs
                sums.rescale(r, x, torch.where((near - y).abs() < 1e-3, near, y))
            old.copy_(new)
            sums.add_slice(r, c, part, z, w, new)
    backend.close(problem, state, call.labels, *out)
    if any(d.scaling is None for d in sums.bases):

        def visit(r: slice, c: slice, part: Problem, z: Tensor, w: Tensor) -> None:
            row = torch.cat([out.saved[:6, r], torch.zeros_like(out.saved[:3, r])])
            sums.add_bases(r, c, part, z, w, row, second=True)

        _second_sweep(call, out, tiles, visit)
    return out


def _frame(backend: ModuleType, state: Tensor, ref: bool) -> Tensor:
    """m_p, log A, m_q, log B, c, K, and zeros for sums of slopes, from running sums."""
    frame = torch.zeros((9, state.shape[1]), dtype=state.dtype, device=state.device)
    a, b = (state[i].masked_fill(state[i] == 0, 1) for i in (1, 6))
    frame[0], frame[1] = state[0], backend.saved_log(a)
    if ref:
        frame[2], frame[3], frame[4] = state[5], backend.saved_log(b), state[8]
        frame[5] = log_ratio(state[9], a, b) - backend.frame(state[8], state[0], state[5])
    return frame


def frozen_backward(call: Call, keep: Tensor, logps: Tensor, saved: Tensor, grads: Grads) -> Tensor:
    """The gradient at the policy's hidden states: kept rows, scaled."""
    problem, policy = call.problem, call.policy
    assert isinstance(policy, HiddenSide)
    n, g = len(call.labels), grads
    coef = torch.zeros(n, dtype=call.dtype, device=call.labels.device)
    for x, sign in ((g[0], -1), (g[2], 1)):
        if x is not None:
            coef.add_(x, alpha=sign)
    if g[3] is not None:
        coef.sub_(g[3] * saved[6])
    at = 1 + problem.entropy
    weights = [torch.zeros_like(coef) for _ in keep[at:]]
    every = [d.key for d in bases(problem)]
    for i, d in enumerate(problem.divergences):
        if g[4] is not None:
            coef.sub_(g[4][i] * saved[7 + 2 * i])
            for part in d.parts or (d.key,):
                weights[every.index(part)].add_(g[4][i])
    dx = keep[0] * coef[:, None]
    if g[3] is not None:
        dx.addcmul_(keep[1], -g[3][:, None])
    for row, weight in zip(keep[at:], weights, strict=True):
        dx.addcmul_(row, weight[:, None])
    if g[0] is not None:
        slope = torch.full_like(coef, problem.multiplier)
        if problem.softcap:
            y = logps + call.backend.in_nats(saved[0] + saved[1])  # the label's logit as the loss sees it
            slope *= 1 - (y / (problem.multiplier * problem.softcap)).clamp(-1, 1).square()
        here = call.labels != problem.ignore_index
        slope = (slope * g[0]).masked_fill(~here, 0)
        ids = call.labels.long().clamp(0, problem.vocab - 1)
        for r in range(0, n, max(1, call.plan.tile[0] // 8)):
            block = slice(r, r + max(1, call.plan.tile[0] // 8))
            dx[block].addcmul_(policy.rows_of_head(ids[block]), slope[block, None])
    return policy.pulled(dx)


# ---- row blocks ------------------------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """The loss of a row-blocks call: sequence s is rows offsets[s] to offsets[s + 1], chosen first."""

    problem: PairProblem
    offsets: list[int]
    ref_logps: Tensor | None  # precomputed, per token or (problem.ref_summed) per sequence


class PairOutputs(NamedTuple):
    losses: Tensor
    seq_logps: Tensor
    seq_ref: Tensor
    coef: Tensor


def grouped(offsets: list[int], most: int) -> list[tuple[int, int]]:
    """Runs of pairs [first, last) of at most so many rows together, each at least one pair."""
    pairs = (len(offsets) - 1) // 2
    groups, start, size = [], 0, 0
    for b in range(pairs):
        rows = offsets[b + 1] - offsets[b] + offsets[pairs + b + 1] - offsets[pairs + b]
        if b > start and size + rows > most:
            groups.append((start, b))
            start, size = b, 0
        size += rows
    return [*groups, (start, pairs)] if pairs else []


def row_blocks(
    problem: Problem, backend: ModuleType, plan: Plan, labels: Tensor, policy: Inputs, pairs: Pairs, wanted: list[bool],
    dtype: torch.dtype,
) -> tuple[list[Tensor], PairOutputs, list[Tensor | None]]:  # fmt: skip
    """Statistics of all rows, losses of all pairs, and the policy's gradients of the sum of the losses, not rounded."""
    labels, device = labels.reshape(-1).contiguous(), labels.device
    count, offsets = (len(pairs.offsets) - 1) // 2, pairs.offsets
    groups = grouped(offsets, plan.tile[0])
    sequences = [s for a, b in groups for s in (*range(a, b), *range(count + a, count + b))]
    order = torch.cat([torch.arange(offsets[s], offsets[s + 1]) for s in sequences] or [torch.arange(0)]).to(device)
    ends = torch.tensor([0, *(offsets[s + 1] - offsets[s] for s in sequences)]).cumsum(0)
    counts = (labels[order] != problem.ignore_index).nonzero().squeeze(1)
    rows = order[counts]
    cuts = torch.searchsorted(counts, ends.to(device))  # where each sequence starts among those
    ends = cuts.cpu()
    call = Call(problem, backend, plan, labels[rows], rows, side(policy, rows), None, dtype)
    out = allocate(call)
    loss = PairOutputs(*(out.logps.new_zeros(k) for k in (count, 2 * count, 2 * count, 2 * count)))
    assert isinstance(call.policy, HiddenSide)
    call.policy.want(wanted, True, wide=True)
    starts = [2 * a for a, _ in groups] + [2 * count]
    bounds = [int(ends[s]) for s in starts]
    longest = max((b - a for a, b in zip(bounds, bounds[1:], strict=False)), default=0)
    tiles = Tiles(call._replace(plan=plan._replace(tile=(max(1, longest), problem.vocab))))
    spare = _spare(call.policy, tiles.z)
    every = slice(0, problem.vocab)
    for i, (a, b) in enumerate(groups):
        r = slice(bounds[i], bounds[i + 1])
        part = _part(out, r)
        y = call.labels[r]
        if r.stop > r.start:
            _, z, w = tiles.load(r, every)
            backend.forward(problem, z, y, w, *part)
        which = [*range(a, b), *range(count + a, count + b)]
        cu = cuts[2 * a : 2 * b + 1] - cuts[2 * a]
        given = pairs.ref_logps
        if given is not None:
            given = given[which] if pairs.problem.ref_summed else given[rows[r]]
        result = PairOutputs(*(x.new_empty(k) for x, k in zip(loss, (b - a, *[2 * (b - a)] * 3), strict=True)))
        inner = pairs.problem._replace(sequences=2 * (b - a))
        mask = y != problem.ignore_index
        backend.pair_forward(inner, part.logps, given, mask, cu, *result)
        loss.losses[a:b] = result.losses
        for x, found in zip(loss[1:], result[1:], strict=True):
            x[a:b], x[count + a : count + b] = found[: b - a], found[b - a :]
        if r.stop > r.start and any(wanted):
            d_logps, one = torch.zeros_like(part.logps), torch.ones_like(result.losses)
            backend.pair_backward(inner, (one, None, None), result.coef, mask, cu, d_logps, None)
            dz = z if spare is None else spare[: z.shape[0]]
            backend.backward(problem, z, y, None, part.saved, (d_logps, None, None, None, None), dz, None)
            call.policy.push(r, every, dz)
        for whole, piece in zip(out, part, strict=True):
            if whole is not None and piece is not None:
                whole[..., r] = piece
    call.policy.finish_slice(every)
    return spread_out(out, rows, labels.numel()), loss, call.policy.gradients()


def _part(out: Outputs, r: slice) -> Outputs:
    """Contiguous outputs for some rows."""
    fresh = [None if x is None else x.new_zeros((*x.shape[:-1], r.stop - r.start)) for x in out]
    return Outputs(*fresh)  # type: ignore[arg-type]


def spread_out(out: Outputs, rows: Tensor | None, count: int) -> list[Tensor]:
    """The outputs of the rows that count among zeros for the others, rows the last dimension; what is None becomes empty."""

    def one(name: str, x: Tensor | None) -> Tensor:
        if x is None:
            return out.logps.new_zeros((0, count) if name == "div" else 0)
        return x if rows is None else x.new_zeros((*x.shape[:-1], count)).index_copy_(-1, rows, x)

    return [one(name, x) for name, x in out._asdict().items()]
