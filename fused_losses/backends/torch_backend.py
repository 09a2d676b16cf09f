"""Compute token_stats in plain torch, with the same sums and formulas as the Triton kernels, a few rows at a time.

A block of rows is small enough for the processor's cache, so on a CPU this is also faster than code on whole tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.divergences import Divergence
from ..core.elementwise import FLOOR, HUGE, INF, frame
from ..core.layout import PairLossSpec, StatsSpec, rows_view, shifted_labels, stats_dtype
from ..core.moments import SIDES, close_pair, close_power, merge, merge_power

__all__ = ["frame"]  # frame() of a row's shifts: plan_frozen.py calls it on either backend

LOG2E = 1.4426950408889634
BLOCK_BYTES = 1 << 20  # size of one temporary: about ten of them fit in a processor's cache
Sums = tuple[list[Tensor], list[list[Tensor]]]  # moments.SIDES of some rows, and three numbers for each power


def _blocks(labels: Tensor, problem: StatsSpec, row_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the row numbers and the label columns of each block of rows that are not ignored."""
    y = labels.reshape(-1).long()
    rows = (y != problem.ignore_index).nonzero().squeeze(1)
    for block in rows.split(max(1, BLOCK_BYTES // max(1, row_bytes))):
        if block.numel():
            yield block, y[block] - problem.first


def _at(x: Tensor, rows: Tensor) -> tuple:
    """Return an index of the given rows in x [outer, inner, V].

    Indexing with it gives a view if the rows are consecutive, otherwise a copy of this block.
    """
    inner = x.shape[1]
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == rows.numel() and first // inner == last // inner:
        return first // inner, slice(first % inner, last % inner + 1)
    return rows // inner, rows % inner


def _head(x: Tensor, softcap: float, multiplier: float, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    """Compute softcap tanh(x / softcap) * multiplier, raised to at least FLOOR, and its derivative."""
    x = x.to(dtype)
    slope: Tensor | float = multiplier
    if softcap:
        y = (x / softcap).tanh_()
        slope = (1 - y * y).mul_(multiplier)
        x = y.mul_(softcap)
    if multiplier != 1.0:
        x = x * multiplier
    return x.clamp(min=FLOOR), slope


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(1)


def _exp(x: Tensor, inplace: bool = False) -> Tensor:
    """Compute e^x with exp2; float64 uses exp.

    On a CPU, torch needs a third of the time for exp2 that it needs for exp. The rounding of the argument is that of x.
    """
    if x.dtype == torch.float64:
        return x.exp_() if inplace else x.exp()
    return (x.mul_(LOG2E) if inplace else x * LOG2E).exp2_()


class _Side:
    """The rows of one side (policy or reference) in a block: logits, their maxima, exponentials and totals.

    y: the columns of the labels; a column outside [0, V) means that the label is not in these columns. alone: the centred
    logits are needed only for their exponentials, so the exponentials overwrite them.
    """

    def __init__(self, x: Tensor, y: Tensor, alone: bool):
        self.x = x
        self.shift = x.amax(1).clamp_(min=-HUGE)  # a row without any token sums to 0; its log-probs are NaN
        self.centred = torch.sub(x, self.shift[:, None])
        self.exp = _exp(self.centred, inplace=alone)
        self.total = self.exp.sum(1)
        here = (y >= 0) & (y < x.shape[1])
        self.target = x.gather(1, y.clamp(0, x.shape[1] - 1)[:, None]).squeeze(1).masked_fill(~here, -INF)


def _normalised(z: Tensor, w: Tensor, row: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return p, q, t = log p - log q, log p and log q of a block."""
    mp, log_a, mq, log_b, c, k = (r[:, None] for r in row)
    lp = (z - mp).sub_(log_a)
    lq = (w - mq).sub_(log_b)
    return _exp(lp), _exp(lq), (z - w).sub_(c).sub_(k), lp, lq


def _pair_of(problem: StatsSpec, z: Tensor, w: Tensor | None, y: Tensor) -> tuple[_Side, _Side | None]:
    alone = not problem.divergences
    return _Side(z, y, alone and not problem.entropy), None if w is None else _Side(w, y, alone)


def _powers(problem: StatsSpec) -> list[float]:
    return list(dict.fromkeys(d.power for d in problem.divergences if d.power is not None))


def _sums(p: _Side, q: _Side | None, problem: StatsSpec) -> Sums:
    """Compute the sums of a block of rows, in the order of moments.SIDES, and the sums of each power."""
    zero = torch.zeros_like(p.shift)
    e = _dot(p.exp, p.centred) if problem.entropy else zero
    squares = _dot(p.exp, p.exp) if problem.collision else zero
    one = [p.shift, p.total, p.shift, p.target, e]
    if q is None:
        return [*one, *[zero] * 8, squares], []
    two = [*one, q.shift, q.total, q.target]
    if not problem.divergences:
        return [*two, *[zero] * 5, squares], []
    c = (p.shift - q.shift).masked_fill((p.total == 0) | (q.total == 0), 0)
    d = (p.x - q.x).sub_(c[:, None])
    a1 = _dot(p.exp, d)
    bd = q.exp * d
    b1 = bd.sum(1)
    b2 = _dot(bd, d)
    pair = [*two, c, torch.sub(p.exp, q.exp, out=bd).sum(1), a1, b1, b2, squares]
    powers = []
    for s in _powers(problem):
        x = torch.add(p.centred * s, q.centred, alpha=1 - s)
        top = x.amax(1) if s * (s - 1) > 0 else zero  # for s between 0 and 1, x is at most 0
        r = _exp(x.sub_(top[:, None]), inplace=True)
        powers.append([r.sum(1), top, r.mul_(top.exp()[:, None]).sub_(q.exp).sum(1)])
    return pair, powers


class _Row(NamedTuple):
    """The results that are computed from the sums of some rows."""

    logp: Tensor
    lse: Tensor
    log_total: Tensor
    entropy: Tensor
    collision: Tensor
    logq: Tensor
    log_total_q: Tensor
    c: Tensor
    k: Tensor
    results: list[tuple[Tensor, Tensor] | None]  # D and sum_v h of each divergence; None: needs the second sweep
    empty: Tensor  # no token on one side


def _log_prob(shift: Tensor, total: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    log_total = total.log()
    logp = ((target - shift) - log_total).clamp(max=0).masked_fill(target < -HUGE, -INF)
    return logp.masked_fill(total == 0, float("nan")), log_total


def _close(sums: Sums, problem: StatsSpec, ref: bool) -> _Row:
    pair, powers = sums
    mp, a, _, zy, e, mq, b, wy, c = pair[:9]
    logp, log_a = _log_prob(mp, a, zy)
    lse = mp.masked_fill(a == 0, 0) + log_a
    empty = a == 0
    entropy = (log_a - e / a).clamp(min=0)
    collision = (pair[13].log() - 2 * log_a).clamp(max=0).masked_fill(empty, float("nan"))
    log_a = log_a.masked_fill(empty, 0)
    if not ref:
        return _Row(logp, lse, log_a, entropy, collision, mq, mq, mq, mq, [], empty)
    logq, log_b = _log_prob(mq, b, wy)
    empty = empty | (b == 0)
    log_b = log_b.masked_fill(b == 0, 0)
    if not problem.divergences:
        return _Row(logp, lse, log_a, entropy, collision, logq, log_b, c, c, [], empty)
    # The error of a log-ratio of two sums (their largest term is exactly 1), plus that of z - w relative to its size.
    eps = torch.finfo(c.dtype).eps
    noise = 6 * eps * (1 - 1 / b) + eps / 2 * c.abs()
    k, reverse, forward, log_ab, curve, j = close_pair(pair, noise)
    by_power = dict(zip(_powers(problem), powers, strict=True))
    results: list[tuple[Tensor, Tensor] | None] = []
    for div in problem.divergences:
        if div.row is None:
            results.append(None)
            continue
        power = torch.zeros_like(k)
        if div.power is not None:
            power = close_power(by_power[div.power], b, log_ab, curve, j, div.power, noise)
        results.append(div.row(reverse, forward, power, *div.params))
    return _Row(logp, lse, log_a, entropy, collision, logq, log_b, c, k, results, empty)


def _terms(z: Tensor, w: Tensor, saved: Tensor, problem: StatsSpec) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (i, sum_v c, sum_v h) of every term divergence of a block, computed from the saved numbers of its rows."""
    x = _normalised(z, w, list(saved[:6]))
    for i, div in enumerate(problem.divergences):
        if div.term is not None:
            yield i, div.term(*x, *div.params).sum(1), div.grad_p(*x, *div.params).sum(1)


def finite(x: Tensor) -> Tensor:
    """Return x with 0 where it is infinite: the slope of an infinite value is left out of the gradient."""
    return x.masked_fill(x.isinf(), 0)


def check_labels(labels: Tensor, problem: StatsSpec) -> None:
    """Raise an error if a label is out of range.

    The Triton backend instead gives NaN for such a row; it does not read out of bounds.
    """
    bad = (labels != problem.ignore_index) & ((labels < 0) | (labels >= problem.vocab))
    if labels.is_cpu:
        if bad.any():
            raise ValueError(
                f"labels: expected ids in [0, {problem.vocab}) or ignore_index={problem.ignore_index}, "
                f"got {int(labels[bad][0])}"
            )
    else:
        torch._assert_async(~bad.any())


def forward(
    problem: StatsSpec, policy: Tensor, labels: Tensor, ref: Tensor | None, logps: Tensor, ref_logps: Tensor | None,
    lse: Tensor, entropy: Tensor | None, div: Tensor | None, hit: Tensor, collision: Tensor | None, saved: Tensor,
) -> None:  # fmt: skip
    labels = shifted_labels(labels, problem.shift, problem.ignore_index)
    check_labels(labels, problem)
    out = (logps, ref_logps, lse, entropy, div, hit, collision, saved)
    for x in out:
        if x is not None:
            x.zero_()
    terms = any(d.term is not None for d in problem.divergences)
    held: list[tuple[Tensor, Tensor]] = []  # rows and their sums: closing many at once takes as long as closing a few
    for rows, y, z, w in _tiles(problem, policy, labels, ref if ref_logps is not None else None):
        sums = _sums(*_pair_of(problem, z, w, y), problem)
        if not terms or w is None or div is None or ref_logps is None:
            held.append((rows, _packed(sums)))
            continue
        _write(problem, rows, sums, *out)
        for i, value, slope in _terms(z, w, saved[:, rows], problem):
            write_divergence(problem, i, value, slope, rows, logps, ref_logps, div, saved)
    if held:
        every, states = (torch.cat(x, dim=-1) for x in zip(*held, strict=True))
        _write(problem, every, _unpack(states), *out)


def _packed(sums: Sums) -> Tensor:
    """Stack the sums into one tensor [fields, rows]."""
    return torch.stack([*sums[0], *(x for power in sums[1] for x in power)])


def _tiles(
    problem: StatsSpec, policy: Tensor, labels: Tensor, ref: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Yield (rows, label columns, z, w) of each block of rows that are not ignored.

    z and w are the logits after softcap and multiplier, as the loss uses them.
    """
    dtype, v = stats_dtype(policy), problem.vocab
    z_rows, w_rows = rows_view(policy, 1), rows_view(ref, 1) if ref is not None else None
    for rows, y in _blocks(labels, problem, v * dtype.itemsize):
        z, _ = _head(z_rows[_at(z_rows, rows)][:, :v], problem.softcap, problem.multiplier, dtype)
        w = None
        if w_rows is not None:
            w, _ = _head(w_rows[_at(w_rows, rows)][:, :v], problem.ref_softcap, problem.ref_multiplier, dtype)
        yield rows, y, z, w


def _write(
    problem: StatsSpec, rows: Tensor, sums: Sums, logps: Tensor, ref_logps: Tensor | None, lse: Tensor,
    entropy: Tensor | None, div: Tensor | None, hit: Tensor, collision: Tensor | None, saved: Tensor,
) -> None:  # fmt: skip
    """Write the outputs of some rows, computed from their sums.

    Divergences that need a second sweep are not written here; the caller writes them with write_divergence.
    """
    row, pair = _close(sums, problem, ref_logps is not None), sums[0]
    logps[rows] = row.logp
    lse[rows] = row.lse
    hit[rows] = pair[3] >= pair[2]
    saved[0, rows], saved[1, rows] = pair[0], row.log_total
    if entropy is not None:
        entropy[rows] = row.entropy
        saved[6, rows] = finite(row.entropy)
    if collision is not None:
        collision[rows] = row.collision
    if ref_logps is None:
        return
    ref_logps[rows] = row.logq
    saved[2, rows], saved[3, rows] = pair[5], row.log_total_q
    saved[4, rows], saved[5, rows] = row.c.masked_fill(row.empty, 0), row.k.masked_fill(row.empty, 0)
    for i, found in enumerate(row.results):
        if found is not None and div is not None:
            value, slope = found
            write_divergence(problem, i, value, slope, rows, logps, ref_logps, div, saved)


def write_divergence(
    problem: StatsSpec, i: int, value: Tensor, slope: Tensor, rows: Tensor | slice, logps: Tensor, ref_logps: Tensor,
    div: Tensor, saved: Tensor,
) -> None:  # fmt: skip
    """Write a divergence of some rows, and the sums sum_v h and sum_v k that backward needs."""
    empty = (logps[rows] + ref_logps[rows]).isnan()  # no token on one side
    value = value.clamp(min=0).masked_fill(value > HUGE, INF)
    other = finite(problem.divergences[i].degree * value) - finite(slope)
    div[i, rows] = value.masked_fill(empty, float("nan"))
    saved[7 + 2 * i, rows] = finite(slope).masked_fill(empty, 0)
    saved[8 + 2 * i, rows] = other.masked_fill(empty, 0)


def fold(problem: StatsSpec, z: Tensor, labels: Tensor, w: Tensor | None, state: Tensor, fresh: bool) -> None:
    """Add logits [rows, columns] to the running sums in state [fields, rows].

    Column 0 is the token problem.first of the vocabulary. fresh: the state holds no sums yet and is overwritten.
    """
    held = [  # rows and their sums: merging many at once takes as long as merging a few
        (rows, _packed(_sums(*_pair_of(problem, z_block, w_block, y), problem)))
        for rows, y, z_block, w_block in _tiles(problem, z, labels, w)
    ]
    if not held:
        return
    rows, new = (torch.cat(x, dim=-1) for x in zip(*held, strict=True))
    if not fresh:
        new = _packed(merge_sums(_unpack(state[:, rows]), _unpack(new), _powers(problem)))
    state[:, rows] = new


def _unpack(state: Tensor) -> Sums:
    n = len(SIDES)
    rest = list(state[n:])
    return list(state[:n]), [rest[i : i + 3] for i in range(0, len(rest), 3)]


def merge_sums(s: Sums, t: Sums, powers: list[float]) -> Sums:
    """Merge the sums of two disjoint parts of the vocabulary into the sums of both."""
    pair, moves = merge(s[0], t[0])
    bases = s[0][6], t[0][6]
    merged = [merge_power(r, u, bases, moves, a) for r, u, a in zip(s[1], t[1], powers, strict=True)]
    return list(pair), [list(m) for m in merged]


def merge_states(problem: StatsSpec, state: Tensor, other: Tensor) -> None:
    """Merge other into state in place, both [fields, rows]."""
    state.copy_(_packed(merge_sums(_unpack(state), _unpack(other), _powers(problem))))


def close(
    problem: StatsSpec, state: Tensor, labels: Tensor, logps: Tensor, ref_logps: Tensor | None, lse: Tensor,
    entropy: Tensor | None, div: Tensor | None, hit: Tensor, collision: Tensor | None, saved: Tensor,
) -> None:  # fmt: skip
    """Write the outputs of all rows, computed from the sums over the whole vocabulary.

    Term divergences are not written here; terms() computes them.
    """
    out = (logps, ref_logps, lse, entropy, div, hit, collision, saved)
    for x in out:
        if x is not None:
            x.zero_()
    rows = (labels != problem.ignore_index).nonzero().squeeze(1)
    _write(problem, rows, _unpack(state[:, rows]), *out)


def saved_log(x: Tensor) -> Tensor:
    """Return the logarithm of a total in the unit in which it is saved: here in nats."""
    return x.log()


def in_nats(x: Tensor) -> Tensor:
    """Convert a saved shift, or a saved logarithm of a total, to nats: here it is in nats already."""
    return x


def terms(problem: StatsSpec, z: Tensor, labels: Tensor, w: Tensor, saved: Tensor, sums: Tensor) -> None:
    """Add sum_v c and sum_v h of the term divergences of logits [rows, columns] to sums [2 n, rows]."""
    for rows, _, z_block, w_block in _tiles(problem, z, labels, w):
        assert w_block is not None
        for i, value, slope in _terms(z_block, w_block, saved[:, rows], problem):
            sums[2 * i, rows] += value
            sums[2 * i + 1, rows] += slope


def _times(x: Tensor, slope: Tensor | float) -> Tensor:
    return x if isinstance(slope, float) and slope == 1.0 else x.mul_(slope)


def _slopes(
    x: list[Tensor],
    grads: list[tuple[Divergence, bool, Tensor]],
    prob: Tensor,
    coef: Tensor,
    y: Tensor,
    g: Tensor | None,
) -> Tensor:
    """Compute prob * coef + sum_i g_i h_i + g 1[v = y].

    grads holds (divergence, whether it is for the policy side, g_i). If x is empty, the result overwrites prob.
    """
    out = prob * coef[:, None] if x else prob.mul_(coef[:, None])
    for div, policy_side, g_i in grads:
        formula = div.grad_p if policy_side else div.grad_q
        out.add_(formula(*x, *div.params).mul_(g_i[:, None]))
    if g is not None:
        here = (y >= 0) & (y < out.shape[1])
        out.scatter_add_(1, y.clamp(0, out.shape[1] - 1)[:, None], (g * here)[:, None])
    return out


def backward(
    problem: StatsSpec, policy: Tensor, labels: Tensor, ref: Tensor | None, saved: Tensor,
    grads: tuple[Tensor | None, ...], dz: Tensor | None, dw: Tensor | None,
) -> None:  # fmt: skip
    """Write the gradients dz and dw; dz may be the tensor of the policy logits itself."""
    g_logp, g_ref, g_lse, g_entropy, g_div = grads
    labels = shifted_labels(labels, problem.shift, problem.ignore_index)
    dtype, v = stats_dtype(policy), problem.vocab
    active = [(i, d) for i, d in enumerate(problem.divergences) if g_div is not None and bool(g_div[i].any())]
    pair = ref is not None and (bool(active) or dw is not None)
    z_rows = rows_view(policy, 1)
    w_rows = rows_view(ref, 1) if ref is not None else None
    for out in (dz, dw):
        if out is not None:
            _zero_outside(rows_view(out, 1), labels, problem)

    for rows, y in _blocks(labels, problem, v * dtype.itemsize):
        s = saved[:, rows]
        z, slope_p = _head(z_rows[_at(z_rows, rows)][:, :v], problem.softcap, problem.multiplier, dtype)
        x: list[Tensor] = []
        slope_q: Tensor | float = 1.0
        if pair and w_rows is not None:
            w, slope_q = _head(w_rows[_at(w_rows, rows)][:, :v], problem.ref_softcap, problem.ref_multiplier, dtype)
            x = list(_normalised(z, w, list(s[:6])))
            p, lp = x[0], x[3]
        else:
            lp = z.sub_(s[0, :, None]).sub_(s[1, :, None])
            p = _exp(lp, inplace=g_entropy is None)
        g = [None if t is None else t[rows] for t in (g_logp, g_ref, g_lse, g_entropy)]
        g_i = [(i, d, g_div[i, rows]) for i, d in active if g_div is not None]
        if dz is not None:
            coef = torch.zeros_like(s[0])
            for i, _, gi in g_i:
                coef -= gi * s[7 + 2 * i]
            if g[0] is not None:
                coef -= g[0]
            if g[2] is not None:
                coef += g[2]
            if g[3] is not None:
                coef -= g[3] * s[6]
            plogp = None if g[3] is None else lp.mul_(p).mul_(g[3][:, None]) if not x else (p * lp).mul_(g[3][:, None])
            out = _slopes(x, [(d, True, gi) for _, d, gi in g_i], p, coef, y, g[0])
            if plogp is not None:
                out.sub_(plogp)
            dz_rows = rows_view(dz, 1)
            dz_rows[(*_at(dz_rows, rows), slice(v))] = _times(out, slope_p).to(dz.dtype)
        if dw is not None:
            coef = torch.zeros_like(s[0])
            for i, _, gi in g_i:
                coef -= gi * s[8 + 2 * i]
            if g[1] is not None:
                coef -= g[1]
            out = _slopes(x, [(d, False, gi) for _, d, gi in g_i], x[1], coef, y, g[1])
            dw_rows = rows_view(dw, 1)
            dw_rows[(*_at(dw_rows, rows), slice(v))] = _times(out, slope_q).to(dw.dtype)


def _zero_outside(out: Tensor, labels: Tensor, problem: StatsSpec) -> None:
    """Write zeros to ignored rows and to padded columns."""
    inner = out.shape[1]
    rows = (labels.reshape(-1) == problem.ignore_index).nonzero().squeeze(1)
    out[rows // inner, rows % inner] = 0
    out[..., problem.vocab :] = 0


def _sequence_sums(
    x: Tensor, mask: Tensor, problem: PairLossSpec, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> Tensor:
    x = x.to(dtype).masked_fill(~mask, 0)
    if cu_seqlens is None:
        return x.view(problem.sequences, -1).sum(1)
    return torch.segment_reduce(x, "sum", offsets=cu_seqlens.long(), initial=0.0)


def _spread(x: Tensor, mask: Tensor, problem: PairLossSpec, cu_seqlens: Tensor | None) -> Tensor:
    """Copy the number of each sequence to its tokens where the mask is True, and 0 to the other tokens."""
    if cu_seqlens is None:
        tokens = x[:, None].expand(-1, mask.numel() // problem.sequences).reshape(-1)
    else:
        tokens = x.repeat_interleave(cu_seqlens.diff().long(), output_size=mask.numel())
    return tokens.masked_fill(~mask, 0)


def pair_forward(
    problem: PairLossSpec, logps: Tensor, ref: Tensor | None, mask: Tensor, cu_seqlens: Tensor | None,
    losses: Tensor, seq_logps: Tensor, seq_ref: Tensor, coef: Tensor,
) -> None:  # fmt: skip
    seq_logps.copy_(_sequence_sums(logps, mask, problem, cu_seqlens, coef.dtype))
    h = seq_logps.clone()
    if ref is not None and problem.ref_summed:
        h -= ref
    elif ref is not None:  # subtract token by token, where the ratio is small
        h = _sequence_sums(logps.to(coef.dtype) - ref.to(coef.dtype), mask, problem, cu_seqlens, coef.dtype)
    torch.sub(seq_logps, h, out=seq_ref)
    pairs = losses.numel()
    score, slope = problem.divergence.f_dpo_link()(h, *problem.divergence.params)
    loss, gain = problem.term(problem.beta * (score[:pairs] - score[pairs:]), *problem.term_params)
    losses.copy_(loss)
    coef.copy_(torch.cat([gain, -gain]) * slope * problem.beta)


def pair_backward(
    problem: PairLossSpec, grads: tuple[Tensor | None, ...], coef: Tensor, mask: Tensor, cu_seqlens: Tensor | None,
    d_logps: Tensor | None, d_ref: Tensor | None,
) -> None:  # fmt: skip
    g_losses, g_logps, g_ref = grads
    g = torch.zeros_like(coef) if g_losses is None else coef * g_losses.repeat(2)
    if d_logps is not None:
        d_logps.copy_(_spread(g if g_logps is None else g + g_logps, mask, problem, cu_seqlens))
    if d_ref is not None:
        g = -g if g_ref is None else g_ref - g
        d_ref.copy_(g if problem.ref_summed else _spread(g, mask, problem, cu_seqlens))
