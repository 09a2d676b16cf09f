"""Compute the sums, the terms and the gradients of a block of rows [rows, V], with the formulas of divergences.py.

These are functions of tensors without a branch on a value. The torch backend calls them on a few rows at a time, the
compiled backend compiles them for all rows at once. The logits of a block belong to the functions, which may overwrite them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..core.divergences import Divergence
from ..core.elementwise import HUGE, INF
from ..core.layout import Grads, SavedRow, StatsSpec, saved_row, slope_rows
from ..core.moments import PowerMoments, RowMoments, unpack

LOG2E = 1.4426950408889634


class Side(NamedTuple):
    """The logits [rows, V] of one model in a block, after softcap and multiplier, and their slope."""

    logits: Tensor
    slope: Tensor | float


class Block(NamedTuple):
    """Some rows: the logits of both sides, and the columns of their labels [rows], which may lie outside [0, V).

    label None: the caller takes care of the labels' own gradient.
    """

    policy: Side
    ref: Side | None
    label: Tensor | None = None


class Sums(NamedTuple):
    """The sums of some rows, and those of each power."""

    row: RowMoments
    powers: list[PowerMoments]

    @classmethod
    def of(cls, state: Tensor) -> Sums:
        """Return the fields of a state [fields, rows]."""
        return cls(*unpack(state))

    def state(self) -> Tensor:
        """Return a state [fields, rows]."""
        return torch.stack([*self.row, *(x for power in self.powers for x in power)])


class _Columns(NamedTuple):
    """p, q, t = log p - log q, log p and log q of a block, as formulas take them."""

    p: Tensor
    q: Tensor
    t: Tensor
    log_p: Tensor
    log_q: Tensor


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(1)


def exp_(x: Tensor, inplace: bool = False) -> Tensor:
    """Compute e^x with exp2; float64 uses exp, where nothing is compiled.

    On a CPU, torch needs a third of the time for exp2 that it needs for exp. The rounding of the argument is that of x.
    """
    if x.dtype == torch.float64 and not is_compiling():
        return x.exp_() if inplace else x.exp()
    return (x.mul_(LOG2E) if inplace else x * LOG2E).exp2_()


class RowExp:
    """The rows of one side (policy or reference) in a block: their maxima, centred logits, exponentials and totals.

    alone: the centred logits are needed only for their exponentials, so the exponentials overwrite them.
    """

    def __init__(self, logits: Tensor, alone: bool):
        # a row without any token sums to 0; its log-probs are NaN
        if is_compiling():
            self.shift = logits.clamp(min=-HUGE).amax(1)  # the loop that sums would clamp it at each step
        else:
            self.shift = logits.amax(1).clamp_(min=-HUGE)
        self.centred = torch.sub(logits, self.shift[:, None])
        self.exp = exp_(self.centred, inplace=alone)
        self.total = self.exp.sum(1)


class Totals(NamedTuple):
    """The reductions over the vocabulary of some rows; None: not asked for.

    They are apart from what follows for each row alone, because compiled loops over rows join only while each reduces.
    """

    shift_p: Tensor
    sum_p: Tensor
    sum_p_log: Tensor | None
    sum_pp: Tensor | None
    shift_q: Tensor | None = None
    sum_q: Tensor | None = None
    excess: Tensor | None = None
    sum_pd: Tensor | None = None
    sum_qd: Tensor | None = None
    sum_qdd: Tensor | None = None
    powers: tuple[tuple[Tensor, Tensor | None, Tensor], ...] = ()  # as PowerMoments; shift None: 0


def _at_columns(logits: Tensor, y: Tensor) -> Tensor:
    """Return the logit of each row in its column y; -inf where that is outside [0, V): the label is in other columns."""
    here = (y >= 0) & (y < logits.shape[1])
    return logits.gather(1, y.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1).masked_fill(~here, -INF)


def powers(spec: StatsSpec) -> list[float]:
    """Return the powers s of which the sums p^s q^(1-s) are needed."""
    return list(dict.fromkeys(d.power for d in spec.divergences if d.power is not None))


def _center(shift_p: Tensor, shift_q: Tensor) -> Tensor:
    """Return a number close to z - r; 0 for a side without any token, which its shift says before its total is known."""
    return (shift_p - shift_q).masked_fill((shift_p <= -HUGE) | (shift_q <= -HUGE), 0)


def totals(spec: StatsSpec, block: Block) -> Totals:
    """Compute the sums of a block of rows over its columns."""
    some = len(spec.divergences) > 0
    p = RowExp(block.policy.logits, not some and not spec.entropy)
    of_p = Totals(
        p.shift,
        p.total,
        _dot(p.exp, p.centred) if spec.entropy else None,
        _dot(p.exp, p.exp) if spec.collision else None,
    )
    if block.ref is None:
        return of_p
    q = RowExp(block.ref.logits, not some)
    of_both = of_p._replace(shift_q=q.shift, sum_q=q.total)
    if not some:
        return of_both
    d = (block.policy.logits - block.ref.logits).sub_(_center(p.shift, q.shift)[:, None])
    sum_pd = _dot(p.exp, d)
    qd = q.exp * d
    sum_qd = qd.sum(1)
    sum_qdd = _dot(qd, d)
    excess = (p.exp - q.exp if is_compiling() else torch.sub(p.exp, q.exp, out=qd)).sum(1)
    of_powers = []
    for s in powers(spec):
        x = torch.add(p.centred * s, q.centred, alpha=1 - s)
        top = x.amax(1) if s * (s - 1) > 0 else None  # for s between 0 and 1, x is at most 0
        terms = exp_(x if top is None else x.sub_(top[:, None]), inplace=True)
        total = terms.sum(1)
        whole = terms if top is None else terms.mul_(top.exp()[:, None])
        of_powers.append((total, top, whole.sub_(q.exp).sum(1)))
    return of_both._replace(excess=excess, sum_pd=sum_pd, sum_qd=sum_qd, sum_qdd=sum_qdd, powers=tuple(of_powers))


def sums(of_rows: Totals, block: Block) -> Sums:
    """Return the sums of rows from their totals, and from a block that has at least the columns of their labels."""
    zero, y, ref = torch.zeros_like(of_rows.shift_p), block.label, block.ref
    if y is None:
        raise AssertionError("sums need labels")

    def known(x: Tensor | None) -> Tensor:
        return zero if x is None else x

    center = zero
    if of_rows.excess is not None and of_rows.shift_q is not None:
        center = _center(of_rows.shift_p, of_rows.shift_q)
    row = RowMoments(
        shift_p=of_rows.shift_p,
        sum_p=of_rows.sum_p,
        max_p=of_rows.shift_p,
        label_p=_at_columns(block.policy.logits, y),
        sum_p_log=known(of_rows.sum_p_log),
        shift_q=known(of_rows.shift_q),
        sum_q=known(of_rows.sum_q),
        label_q=zero if ref is None else _at_columns(ref.logits, y),
        center=center,
        excess=known(of_rows.excess),
        sum_pd=known(of_rows.sum_pd),
        sum_qd=known(of_rows.sum_qd),
        sum_qdd=known(of_rows.sum_qdd),
        sum_pp=known(of_rows.sum_pp),
    )
    return Sums(row, [PowerMoments(total, known(top), excess) for total, top, excess in of_rows.powers])


def _normalised(z: Tensor, r: Tensor, row: SavedRow) -> _Columns:
    """Return the columns of a block from the logits of both sides."""
    row = SavedRow(*(x[:, None] for x in row))
    log_p = (z - row.shift_p).sub_(row.log_sum_p)
    log_q = (r - row.shift_q).sub_(row.log_sum_q)
    return _Columns(exp_(log_p), exp_(log_q), (z - r).sub_(row.center).sub_(row.log_mean), log_p, log_q)


def terms(spec: StatsSpec, policy: Tensor, ref: Tensor, saved: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (i, sum_v c, sum_v h) of every term divergence of a block, computed from the saved numbers of its rows."""
    x = _normalised(policy, ref, saved_row(saved))
    for i, div in enumerate(spec.divergences):
        if div.term is not None:
            yield i, div.term(*x, *div.params).sum(1), div.grad_p(*x, *div.params).sum(1)


class _Incoming(NamedTuple):
    """The incoming gradient of a divergence in a block, and the sums of its slopes."""

    divergence: Divergence
    g: Tensor
    slope_p: Tensor  # sum_v h
    slope_q: Tensor  # sum_v k


class BlockGradients(NamedTuple):
    """The gradients of the logits of both sides; None: not wanted."""

    policy: Tensor | None = None
    ref: Tensor | None = None


def gradients(  # noqa: PLR0913 (what is known of a block, what comes in, and what is wanted)
    spec: StatsSpec, block: Block, saved: Tensor, grads: Grads, active: Sequence[int], policy: bool, ref: bool
) -> BlockGradients:
    """Compute the gradients of the logits of a block.

    saved, grads: those of the rows of the block. active: the divergences whose gradient is not 0. policy, ref: what is
    wanted; a block has its reference only where one of its divergences is active or `ref` is wanted.
    """
    row, z = saved_row(saved), block.policy.logits
    x: _Columns | None = None
    if block.ref is not None:
        x = _normalised(z, block.ref.logits, row)
        p, log_p = x.p, x.log_p
    else:
        log_p = z.sub_(row.shift_p[:, None]).sub_(row.log_sum_p[:, None])
        p = exp_(log_p, inplace=grads.entropy is None)
    each = [_incoming(spec, saved, grads, i) for i in active]
    dz = dr = None
    if policy:
        coef = _sum_of(
            (-1, grads.logps), (1, grads.lse), *((-1, one.g * one.slope_p) for one in each), like=row.shift_p
        )
        p_log_p = None
        if grads.entropy is not None:
            coef -= grads.entropy * row.entropy
            p_log_p = (log_p.mul_(p) if x is None else p * log_p).mul_(grads.entropy[:, None])
        dz = p.mul_(coef[:, None]) if x is None else p * coef[:, None]
        if x is not None:
            for one in each:
                dz.add_(one.divergence.grad_p(*x, *one.divergence.params).mul_(one.g[:, None]))
        dz = _at_label(dz, block.label, grads.logps)
        if p_log_p is not None:
            dz = dz.sub_(p_log_p)
        dz = _times(dz, block.policy.slope)
    if ref and x is not None and block.ref is not None:
        coef = _sum_of((-1, grads.ref_logps), *((-1, one.g * one.slope_q) for one in each), like=row.shift_p)
        dr = x.q * coef[:, None]
        for one in each:
            dr.add_(one.divergence.grad_q(*x, *one.divergence.params).mul_(one.g[:, None]))
        dr = _times(_at_label(dr, block.label, grads.ref_logps), block.ref.slope)
    return BlockGradients(dz, dr)


def _incoming(spec: StatsSpec, saved: Tensor, grads: Grads, i: int) -> _Incoming:
    if grads.divergence is None:
        raise AssertionError("a divergence is active without a gradient")
    return _Incoming(spec.divergences[i], grads.divergence[i], *(saved[at] for at in slope_rows(i)))


def _sum_of(*terms: tuple[int, Tensor | None], like: Tensor) -> Tensor:
    """Return the sum of sign * x over those of the terms (sign, x) that are not None."""
    total = torch.zeros_like(like)
    for sign, x in terms:
        if x is not None:
            total.add_(x, alpha=sign)
    return total


def _at_label(out: Tensor, y: Tensor | None, g: Tensor | None) -> Tensor:
    """Add g to the column of each row's label, where it is in the block."""
    if g is None or y is None:
        return out
    here = (y >= 0) & (y < out.shape[1])
    return out.scatter_add_(1, y.clamp(0, out.shape[1] - 1)[:, None], (g * here)[:, None])


def _times(x: Tensor, slope: Tensor | float) -> Tensor:
    return x if isinstance(slope, float) and slope == 1.0 else x.mul_(slope)
