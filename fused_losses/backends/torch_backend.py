"""Compute token_stats in plain torch, with the same sums and formulas as the Triton kernels, a few rows at a time.

A block of rows is small enough for the processor's cache, so on a CPU this is also faster than code on whole tensors.
The functions are those of interface.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import elementwise
from ..core.divergences import Divergence
from ..core.elementwise import HUGE, INF, transform_logits
from ..core.layout import (
    BLOCK_BYTES,
    Grads,
    HiddenRows,
    Outputs,
    PairGrads,
    PairLossSpec,
    PairOutputs,
    SavedRow,
    StatsSpec,
    finite,
    rows_view,
    saved_row,
    sequence_sums,
    shifted_labels,
    slope_rows,
    spread_sequences,
    stats_dtype,
    term_rows,
    write_divergence,
)
from ..core.moments import (
    PowerMoments,
    RowMoments,
    close_moments,
    close_power,
    merge,
    merge_power,
    unpack,
)

LOG2E = 1.4426950408889634


class _Sums(NamedTuple):
    """The sums of some rows, and those of each power."""

    row: RowMoments
    powers: list[PowerMoments]

    @classmethod
    def of(cls, state: Tensor) -> _Sums:
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


def _blocks(labels: Tensor, spec: StatsSpec, row_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the row numbers and the label columns of each block of rows that are not ignored."""
    y = labels.reshape(-1).long()
    rows = (y != spec.ignore_index).nonzero().squeeze(1)
    for block in rows.split(max(1, BLOCK_BYTES // max(1, row_bytes))):
        if block.numel():
            yield block, y[block] - spec.first


def _at(x: Tensor, rows: Tensor) -> tuple:
    """Return an index of the given rows in x [outer, inner, V].

    Indexing with it gives a view if the rows are consecutive, otherwise a copy of this block.
    """
    inner = x.shape[1]
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == rows.numel() and first // inner == last // inner:
        return first // inner, slice(first % inner, last % inner + 1)
    return rows // inner, rows % inner


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(1)


def _exp(x: Tensor, inplace: bool = False) -> Tensor:
    """Compute e^x with exp2; float64 uses exp.

    On a CPU, torch needs a third of the time for exp2 that it needs for exp. The rounding of the argument is that of x.
    """
    if x.dtype == torch.float64:
        return x.exp_() if inplace else x.exp()
    return (x.mul_(LOG2E) if inplace else x * LOG2E).exp2_()


class RowExp:
    """The rows of one side (policy or reference) in a block: logits, their maxima, exponentials and totals.

    y: the columns of the labels; a column outside [0, V) means that the label is not in these columns. alone: the centred
    logits are needed only for their exponentials, so the exponentials overwrite them.
    """

    def __init__(self, logits: Tensor, y: Tensor, alone: bool):
        self.logits = logits
        self.shift = logits.amax(1).clamp_(min=-HUGE)  # a row without any token sums to 0; its log-probs are NaN
        self.centred = torch.sub(logits, self.shift[:, None])
        self.exp = _exp(self.centred, inplace=alone)
        self.total = self.exp.sum(1)
        here = (y >= 0) & (y < logits.shape[1])
        columns = y.clamp(0, logits.shape[1] - 1)[:, None]
        self.label = logits.gather(1, columns).squeeze(1).masked_fill(~here, -INF)


def _normalised(z: Tensor, r: Tensor, row: SavedRow) -> _Columns:
    """Return the columns of a block from the logits of both sides."""
    row = SavedRow(*(x[:, None] for x in row))
    log_p = (z - row.shift_p).sub_(row.log_sum_p)
    log_q = (r - row.shift_q).sub_(row.log_sum_q)
    return _Columns(_exp(log_p), _exp(log_q), (z - r).sub_(row.center).sub_(row.log_mean), log_p, log_q)


def _powers(spec: StatsSpec) -> list[float]:
    return list(dict.fromkeys(d.power for d in spec.divergences if d.power is not None))


def _sums(z: Tensor, r: Tensor | None, y: Tensor, spec: StatsSpec) -> _Sums:
    """Compute the sums of a block of rows [rows, V] with labels in columns y."""
    alone = not spec.divergences
    p = RowExp(z, y, alone and not spec.entropy)
    q = None if r is None else RowExp(r, y, alone)
    zero = torch.zeros_like(p.shift)
    one_side = RowMoments(
        shift_p=p.shift,
        sum_p=p.total,
        max_p=p.shift,
        label_p=p.label,
        sum_p_log=_dot(p.exp, p.centred) if spec.entropy else zero,
        shift_q=zero,
        sum_q=zero,
        label_q=zero,
        center=zero,
        excess=zero,
        sum_pd=zero,
        sum_qd=zero,
        sum_qdd=zero,
        sum_pp=_dot(p.exp, p.exp) if spec.collision else zero,
    )
    if q is None:
        return _Sums(one_side, [])
    two_sides = one_side._replace(shift_q=q.shift, sum_q=q.total, label_q=q.label)
    if not spec.divergences:
        return _Sums(two_sides, [])
    center = (p.shift - q.shift).masked_fill((p.total == 0) | (q.total == 0), 0)
    d = (p.logits - q.logits).sub_(center[:, None])
    sum_pd = _dot(p.exp, d)
    qd = q.exp * d
    sum_qd = qd.sum(1)
    sum_qdd = _dot(qd, d)
    excess = torch.sub(p.exp, q.exp, out=qd).sum(1)
    moments = two_sides._replace(center=center, excess=excess, sum_pd=sum_pd, sum_qd=sum_qd, sum_qdd=sum_qdd)
    powers = []
    for s in _powers(spec):
        x = torch.add(p.centred * s, q.centred, alpha=1 - s)
        top = x.amax(1) if s * (s - 1) > 0 else zero  # for s between 0 and 1, x is at most 0
        terms = _exp(x.sub_(top[:, None]), inplace=True)
        total = terms.sum(1)
        powers.append(PowerMoments(total, top, terms.mul_(top.exp()[:, None]).sub_(q.exp).sum(1)))
    return _Sums(moments, powers)


class _Closed(NamedTuple):
    """The results that are computed from the sums of some rows."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor
    collision: Tensor
    logq: Tensor
    saved: SavedRow
    results: list[tuple[Tensor, Tensor] | None]  # D and sum_v h of each divergence; None: needs the second sweep


def _log_prob(shift: Tensor, total: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-prob of a label, and the logarithm of the total."""
    log_total = total.log()
    logp = ((label - shift) - log_total).clamp(max=0).masked_fill(label < -HUGE, -INF)
    return logp.masked_fill(total == 0, float("nan")), log_total


def _close(sums: _Sums, spec: StatsSpec, ref: bool) -> _Closed:
    row = sums.row
    logp, log_sum_p = _log_prob(row.shift_p, row.sum_p, row.label_p)
    empty = row.sum_p == 0
    lse = row.shift_p.masked_fill(empty, 0) + log_sum_p
    entropy = (log_sum_p - row.sum_p_log / row.sum_p).clamp(min=0)
    collision = (row.sum_pp.log() - 2 * log_sum_p).clamp(max=0).masked_fill(empty, float("nan"))
    log_sum_p = log_sum_p.masked_fill(empty, 0)
    zero = torch.zeros_like(lse)
    kept_entropy = finite(entropy) if spec.entropy else zero
    saved = SavedRow(row.shift_p, log_sum_p, zero, zero, zero, zero, kept_entropy)
    if not ref:
        return _Closed(logp, lse, entropy, collision, logp, saved, [])
    logq, log_sum_q = _log_prob(row.shift_q, row.sum_q, row.label_q)
    empty = empty | (row.sum_q == 0)  # no token on one side
    center = row.center.masked_fill(empty, 0)
    saved = saved._replace(shift_q=row.shift_q, log_sum_q=log_sum_q.masked_fill(row.sum_q == 0, 0), center=center)
    if not spec.divergences:
        return _Closed(logp, lse, entropy, collision, logq, saved._replace(log_mean=center), [])
    # The error of a log-ratio of two sums (their largest term is exactly 1), plus that of z - r relative to its size.
    eps = torch.finfo(lse.dtype).eps
    noise = 6 * eps * (1 - 1 / row.sum_q) + eps / 2 * row.center.abs()
    closed = close_moments(row, noise)
    by_power = dict(zip(_powers(spec), sums.powers, strict=True))
    results: list[tuple[Tensor, Tensor] | None] = []
    for div in spec.divergences:
        if div.row is None:
            results.append(None)
            continue
        power = torch.zeros_like(closed.log_mean)
        if div.power is not None:
            power = close_power(by_power[div.power], row.sum_q, closed, div.power, noise)
        results.append(div.row(closed.reverse, closed.forward, power, *div.params))
    saved = saved._replace(log_mean=closed.log_mean.masked_fill(empty, 0))
    return _Closed(logp, lse, entropy, collision, logq, saved, results)


def _terms(z: Tensor, r: Tensor, saved: Tensor, spec: StatsSpec) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (i, sum_v c, sum_v h) of every term divergence of a block, computed from the saved numbers of its rows."""
    x = _normalised(z, r, saved_row(saved))
    for i, div in enumerate(spec.divergences):
        if div.term is not None:
            yield i, div.term(*x, *div.params).sum(1), div.grad_p(*x, *div.params).sum(1)


def check_labels(spec: StatsSpec, labels: Tensor) -> None:
    """Raise an error if a label is out of range."""
    bad = (labels != spec.ignore_index) & ((labels < 0) | (labels >= spec.vocab))
    if labels.is_cpu:
        if bad.any():
            raise ValueError(
                f"labels: expected ids in [0, {spec.vocab}) or ignore_index={spec.ignore_index}, "
                f"got {int(labels[bad][0])}"
            )
    else:
        torch._assert_async(~bad.any())


def forward(spec: StatsSpec, policy: Tensor, labels: Tensor, ref: Tensor | None, out: Outputs) -> None:
    labels = shifted_labels(labels, spec.shift, spec.ignore_index)
    check_labels(spec, labels)
    _clear(out)
    second = any(d.term is not None for d in spec.divergences)
    held: list[tuple[Tensor, Tensor]] = []  # rows and their sums: closing many at once takes as long as closing a few
    for rows, y, z, r in _tiles(spec, policy, labels, ref if out.ref_logps is not None else None):
        sums = _sums(z, r, y, spec)
        if not second or r is None:
            held.append((rows, sums.state()))
            continue
        _write(spec, rows, sums, out)
        for i, value, slope in _terms(z, r, out.saved[:, rows], spec):
            write_divergence(spec, i, value, slope, rows, out)
    if held:
        every, states = (torch.cat(x, dim=-1) for x in zip(*held, strict=True))
        _write(spec, every, _Sums.of(states), out)


def _clear(out: Outputs) -> None:
    for x in out:
        if x is not None:
            x.zero_()


def _tiles(
    spec: StatsSpec, policy: Tensor, labels: Tensor, ref: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Yield (rows, label columns, z, r) of each block of rows that are not ignored.

    z and r [rows, V] are the logits of policy and reference after softcap and multiplier, as the loss uses them.
    """
    dtype, v = stats_dtype(policy), spec.vocab
    z_rows, r_rows = rows_view(policy, 1), rows_view(ref, 1) if ref is not None else None
    for rows, y in _blocks(labels, spec, v * dtype.itemsize):
        z, _ = transform_logits(z_rows[_at(z_rows, rows)][:, :v], spec.softcap, spec.multiplier, dtype)
        r = None
        if r_rows is not None:
            own = spec.ref_softcap, spec.ref_multiplier
            r, _ = transform_logits(r_rows[_at(r_rows, rows)][:, :v], *own, dtype)
        yield rows, y, z, r


def _write(spec: StatsSpec, rows: Tensor, sums: _Sums, out: Outputs) -> None:
    """Write the outputs of some rows, computed from their sums.

    Divergences that need a second sweep are not written here; the caller writes them with write_divergence.
    """
    closed = _close(sums, spec, out.ref_logps is not None)
    out.logps[rows] = closed.logp
    out.lse[rows] = closed.lse
    out.hit[rows] = sums.row.label_p >= sums.row.max_p
    for place, x in zip(saved_row(out.saved), closed.saved, strict=True):
        place[rows] = x
    if out.entropy is not None:
        out.entropy[rows] = closed.entropy
    if out.collision is not None:
        out.collision[rows] = closed.collision
    if out.ref_logps is not None:
        out.ref_logps[rows] = closed.logq
    for i, result in enumerate(closed.results):
        if result is not None:
            value, slope = result
            write_divergence(spec, i, value, slope, rows, out)


def fold(spec: StatsSpec, policy: Tensor, labels: Tensor, ref: Tensor | None, state: Tensor, fresh: bool) -> None:
    held = [  # rows and their sums: merging many at once takes as long as merging a few
        (rows, _sums(z, r, y, spec).state()) for rows, y, z, r in _tiles(spec, policy, labels, ref)
    ]
    if not held:
        return
    rows, new = (torch.cat(x, dim=-1) for x in zip(*held, strict=True))
    state[:, rows] = new if fresh else _merged(spec, state[:, rows], new)


def _merged(spec: StatsSpec, state: Tensor, other: Tensor) -> Tensor:
    """Return the state of both of two disjoint parts of the vocabulary."""
    s, t = _Sums.of(state), _Sums.of(other)
    row, moved_s, moved_t = merge(s.row, t.row)
    each = zip(s.powers, t.powers, _powers(spec), strict=True)
    return _Sums(row, [merge_power(r, u, moved_s, moved_t, power) for r, u, power in each]).state()


def merge_states(spec: StatsSpec, state: Tensor, other: Tensor) -> None:
    state.copy_(_merged(spec, state, other))


def close(spec: StatsSpec, state: Tensor, labels: Tensor, out: Outputs) -> None:
    _clear(out)
    rows = (labels != spec.ignore_index).nonzero().squeeze(1)
    _write(spec, rows, _Sums.of(state[:, rows]), out)


def saved_log(x: Tensor) -> Tensor:
    """Return the logarithm in nats."""
    return x.log()


def in_nats(x: Tensor) -> Tensor:
    """Return x, which is in nats already."""
    return x


def frame(c: Tensor, mp: Tensor, mq: Tensor) -> Tensor:
    """Compute elementwise.frame()."""
    return elementwise.frame(c, mp, mq)


def terms(spec: StatsSpec, policy: Tensor, labels: Tensor, ref: Tensor, saved: Tensor, sums: Tensor) -> None:
    for rows, _, z, r in _tiles(spec, policy, labels, ref):
        if r is not None:
            for i, *totals in _terms(z, r, saved[:, rows], spec):
                for at, total in zip(term_rows(i), totals, strict=True):
                    sums[at, rows] += total


def _times(x: Tensor, slope: Tensor | float) -> Tensor:
    return x if isinstance(slope, float) and slope == 1.0 else x.mul_(slope)


def _slopes(
    x: _Columns | None,
    grads: list[tuple[Callable, _Incoming]],
    prob: Tensor,
    coef: Tensor,
    y: Tensor,
    g: Tensor | None,
) -> Tensor:
    """Compute prob * coef + sum_i g_i h_i + g 1[v = y].

    grads holds (the formula of h_i, the gradient). If x is None, the result overwrites prob.
    """
    out = prob.mul_(coef[:, None]) if x is None else prob * coef[:, None]
    for formula, one in grads:
        if x is not None:
            out.add_(formula(*x, *one.divergence.params).mul_(one.g[:, None]))
    if g is not None:
        here = (y >= 0) & (y < out.shape[1])
        out.scatter_add_(1, y.clamp(0, out.shape[1] - 1)[:, None], (g * here)[:, None])
    return out


def backward(
    spec: StatsSpec,
    policy: Tensor,
    labels: Tensor,
    ref: Tensor | None,
    saved: Tensor,
    grads: Grads,
    d_policy: Tensor | None,
    d_ref: Tensor | None,
) -> None:
    labels = shifted_labels(labels, spec.shift, spec.ignore_index)
    dtype, v = stats_dtype(policy), spec.vocab
    by_divergence = (
        () if grads.divergence is None else tuple(enumerate(zip(spec.divergences, grads.divergence, strict=True)))
    )
    active = [(i, d, g) for i, (d, g) in by_divergence if bool(g.any())]
    z_rows = rows_view(policy, 1)
    r_rows = rows_view(ref, 1) if ref is not None and (bool(active) or d_ref is not None) else None
    for out in (d_policy, d_ref):
        if out is not None:
            _zero_outside(rows_view(out, 1), labels, spec)

    for rows, y in _blocks(labels, spec, v * dtype.itemsize):
        of_rows = saved[:, rows]
        row = saved_row(of_rows)
        z, slope_p = transform_logits(z_rows[_at(z_rows, rows)][:, :v], spec.softcap, spec.multiplier, dtype)
        x: _Columns | None = None
        slope_q: Tensor | float = 1.0
        if r_rows is not None:
            own = spec.ref_softcap, spec.ref_multiplier
            r, slope_q = transform_logits(r_rows[_at(r_rows, rows)][:, :v], *own, dtype)
            x = _normalised(z, r, row)
            p, log_p = x.p, x.log_p
        else:
            log_p = z.sub_(row.shift_p[:, None]).sub_(row.log_sum_p[:, None])
            p = _exp(log_p, inplace=grads.entropy is None)
        g = Grads(*(None if t is None else t[rows] for t in grads._replace(divergence=None)))
        each = [_Incoming(d, g_i[rows], *(of_rows[at] for at in slope_rows(i))) for i, d, g_i in active]
        if d_policy is not None:
            coef = _sum_of((-1, g.logps), (1, g.lse), *((-1, one.g * one.slope_p) for one in each), like=row.shift_p)
            p_log_p = None
            if g.entropy is not None:
                coef -= g.entropy * row.entropy
                p_log_p = (log_p.mul_(p) if x is None else p * log_p).mul_(g.entropy[:, None])
            dz = _slopes(x, [(one.divergence.grad_p, one) for one in each], p, coef, y, g.logps)
            if p_log_p is not None:
                dz.sub_(p_log_p)
            _store(d_policy, rows, v, _times(dz, slope_p))
        if d_ref is not None and x is not None:
            coef = _sum_of((-1, g.ref_logps), *((-1, one.g * one.slope_q) for one in each), like=row.shift_p)
            dr = _slopes(x, [(one.divergence.grad_q, one) for one in each], x.q, coef, y, g.ref_logps)
            _store(d_ref, rows, v, _times(dr, slope_q))


class _Incoming(NamedTuple):
    """The incoming gradient of a divergence in a block, and the sums of its slopes."""

    divergence: Divergence
    g: Tensor
    slope_p: Tensor  # sum_v h
    slope_q: Tensor  # sum_v k


def _sum_of(*terms: tuple[int, Tensor | None], like: Tensor) -> Tensor:
    """Return the sum of sign * x over those of the terms (sign, x) that are not None."""
    total = torch.zeros_like(like)
    for sign, x in terms:
        if x is not None:
            total.add_(x, alpha=sign)
    return total


def _store(out: Tensor, rows: Tensor, columns: int, x: Tensor) -> None:
    """Write a block of gradients in the dtype of `out`."""
    view = rows_view(out, 1)
    view[(*_at(view, rows), slice(columns))] = x.to(out.dtype)


def _zero_outside(out: Tensor, labels: Tensor, spec: StatsSpec) -> None:
    """Write zeros to ignored rows and to padded columns."""
    inner = out.shape[1]
    rows = (labels.reshape(-1) == spec.ignore_index).nonzero().squeeze(1)
    out[rows // inner, rows % inner] = 0
    out[..., spec.vocab :] = 0


def _spread(x: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Copy the number of each sequence to its tokens where the mask is True, and 0 to the other tokens."""
    return spread_sequences(x, mask.numel(), cu_seqlens).masked_fill(~mask, 0)


def pair_forward(
    spec: PairLossSpec, logps: Tensor, ref: Tensor | None, mask: Tensor, cu_seqlens: Tensor | None, out: PairOutputs
) -> None:
    dtype = out.coef.dtype
    out.seq_logps.copy_(sequence_sums(logps.to(dtype), mask, spec.sequences, cu_seqlens))
    h = out.seq_logps.clone()
    if ref is not None and spec.ref_summed:
        h -= ref
    elif ref is not None:  # subtract token by token, where the ratio is small
        h = sequence_sums(logps.to(dtype) - ref.to(dtype), mask, spec.sequences, cu_seqlens)
    torch.sub(out.seq_logps, h, out=out.seq_ref)
    pairs = out.losses.numel()
    score, slope = spec.divergence.f_dpo_link()(h, *spec.divergence.params)
    loss, gain = spec.term(spec.beta * (score[:pairs] - score[pairs:]), *spec.term_params)
    out.losses.copy_(loss)
    out.coef.copy_(torch.cat([gain, -gain]) * slope * spec.beta)


def pair_backward(
    spec: PairLossSpec,
    grads: PairGrads,
    coef: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    d_logps: Tensor | None,
    d_ref: Tensor | None,
) -> None:
    g = torch.zeros_like(coef) if grads.losses is None else coef * grads.losses.repeat(2)
    if d_logps is not None:
        d_logps.copy_(_spread(g if grads.seq_logps is None else g + grads.seq_logps, mask, cu_seqlens))
    if d_ref is not None:
        g = -g if grads.seq_ref is None else grads.seq_ref - g
        d_ref.copy_(g if spec.ref_summed else _spread(g, mask, cu_seqlens))


def tile_states(spec: StatsSpec, policy: HiddenRows, labels: Tensor, ref: HiddenRows | None, state: Tensor) -> None:
    """Raise: here no logits stay on a chip, and the planner does not choose the plan "on_chip"."""
    raise NotImplementedError("plan: 'on_chip' is a Triton kernel, and this runs on the torch backend")


def tile_terms(
    spec: StatsSpec, policy: HiddenRows, labels: Tensor, ref: HiddenRows, saved: Tensor, sums: Tensor
) -> None:
    """Raise, as tile_states() does."""
    raise NotImplementedError("plan: 'on_chip' is a Triton kernel, and this runs on the torch backend")
