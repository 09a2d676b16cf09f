"""Compute token_stats in plain torch, with the same sums and formulas as the Triton kernels, a few rows at a time.

A block of rows is small enough for the processor's cache, so on a CPU this is also faster than code on whole tensors.
block.py has what is computed of a block. The functions here are those of interface.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import elementwise
from ..core.elementwise import HUGE, INF, transform_logits
from ..core.layout import (
    BLOCK_BYTES,
    NO_FACTORS,
    Grads,
    HiddenRows,
    Outputs,
    PairGrads,
    PairLossSpec,
    PairOutputs,
    RowFactors,
    SavedRow,
    StatsSpec,
    finite,
    rows_view,
    saved_row,
    sequence_sums,
    shifted_labels,
    spread_sequences,
    stats_dtype,
    term_rows,
    write_divergence,
)
from ..core.moments import close_moments, close_power, merge, merge_power
from .block import Block, Side, Sums, gradients, powers, sums, totals
from .block import terms as block_terms
from .order import first_of_order, top_positions


def _at(x: Tensor, rows: Tensor) -> tuple:
    """Return an index of the given rows in x [outer, inner, V].

    Indexing with it gives a view if the rows are consecutive, otherwise a copy of this block.
    """
    inner = x.shape[1]
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == rows.numel() and first // inner == last // inner:
        return first // inner, slice(first % inner, last % inner + 1)
    return rows // inner, rows % inner


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


def _close(of_rows: Sums, spec: StatsSpec, ref: bool) -> _Closed:
    row = of_rows.row
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
    by_power = dict(zip(powers(spec), of_rows.powers, strict=True))
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


def forward(
    spec: StatsSpec,
    policy: Tensor,
    labels: Tensor,
    ref: Tensor | None,
    out: Outputs,
    factors: RowFactors = NO_FACTORS,
) -> None:
    labels = shifted_labels(labels, spec.shift, spec.ignore_index)
    check_labels(spec, labels)
    clear(out)
    second = any(d.term is not None for d in spec.divergences)
    held: list[tuple[Tensor, Tensor]] = []  # rows and their sums: closing many at once takes as long as closing a few
    for rows, block in _blocks(spec, policy, labels, ref if out.ref_logps is not None else None, factors):
        of_rows = sums(totals(spec, block), block)
        if not second or block.ref is None:
            held.append((rows, of_rows.state()))
            continue
        write(spec, rows, of_rows, out)
        for i, value, slope in block_terms(spec, block.policy.logits, block.ref.logits, out.saved[:, rows]):
            write_divergence(spec, i, value, slope, rows, out)
    if held:
        every, states = (torch.cat(x, dim=-1) for x in zip(*held, strict=True))
        write(spec, every, Sums.of(states), out)


def clear(out: Outputs) -> None:
    for x in out:
        if x is not None:
            x.zero_()


def _times(multiplier: float, factors: Tensor | None, rows: Tensor) -> float | Tensor:
    """Return the multiplier of some rows [rows, 1], or the one of all rows."""
    return multiplier if factors is None else (multiplier * factors[rows])[:, None]


def _blocks(
    spec: StatsSpec, policy: Tensor, labels: Tensor, ref: Tensor | None, factors: RowFactors = NO_FACTORS
) -> Iterator[tuple[Tensor, Block]]:
    """Yield the numbers of the rows of each block, and the block, of rows that are not ignored."""
    dtype, v = stats_dtype(policy), spec.vocab
    z_rows, r_rows = rows_view(policy, 1), rows_view(ref, 1) if ref is not None else None
    y = labels.reshape(-1).long()
    counted = (y != spec.ignore_index).nonzero().squeeze(1)
    for rows in counted.split(max(1, BLOCK_BYTES // max(1, v * dtype.itemsize))):
        if rows.numel():
            own = spec.softcap, _times(spec.multiplier, factors.policy, rows)
            z = transform_logits(z_rows[_at(z_rows, rows)][:, :v], *own, dtype)
            r = None
            if r_rows is not None:
                own = spec.ref_softcap, _times(spec.ref_multiplier, factors.ref, rows)
                r = Side(*transform_logits(r_rows[_at(r_rows, rows)][:, :v], *own, dtype))
            yield rows, Block(Side(*z), r, y[rows] - spec.first)


def write(spec: StatsSpec, rows: Tensor, of_rows: Sums, out: Outputs) -> None:
    """Write the outputs of some rows, computed from their sums.

    Divergences that need a second sweep are not written here; the caller writes them with write_divergence.
    """
    closed = _close(of_rows, spec, out.ref_logps is not None)
    out.logps[rows] = closed.logp
    out.lse[rows] = closed.lse
    out.hit[rows] = of_rows.row.label_p >= of_rows.row.max_p
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
        (rows, sums(totals(spec, block), block).state()) for rows, block in _blocks(spec, policy, labels, ref)
    ]
    if not held:
        return
    rows, new = (torch.cat(x, dim=-1) for x in zip(*held, strict=True))
    state[:, rows] = new if fresh else merged(spec, state[:, rows], new)


def merged(spec: StatsSpec, state: Tensor, other: Tensor) -> Tensor:
    """Return the state of both of two disjoint parts of the vocabulary."""
    s, t = Sums.of(state), Sums.of(other)
    row, moved_s, moved_t = merge(s.row, t.row)
    each = zip(s.powers, t.powers, powers(spec), strict=True)
    return Sums(row, [merge_power(r, u, moved_s, moved_t, power) for r, u, power in each]).state()


def merge_states(spec: StatsSpec, state: Tensor, other: Tensor) -> None:
    state.copy_(merged(spec, state, other))


def close(spec: StatsSpec, state: Tensor, labels: Tensor, out: Outputs) -> None:
    clear(out)
    rows = (labels != spec.ignore_index).nonzero().squeeze(1)
    write(spec, rows, Sums.of(state[:, rows]), out)


def top(spec: StatsSpec, logits: Tensor, values: Tensor, ids: Tensor, fresh: bool) -> None:
    rows = rows_view(logits, 1)
    every = torch.arange(len(values), device=logits.device)
    for r in every.split(max(1, BLOCK_BYTES // max(1, spec.vocab * values.itemsize))):
        x = rows[_at(rows, r)][:, : spec.vocab].to(values.dtype)
        k = min(values.shape[1], x.shape[1])
        at = top_positions(x, k)
        found, tokens = x.gather(1, at), at + spec.first
        here = slice(int(r[0]), int(r[-1]) + 1)
        if not fresh:  # those of earlier columns come first, because their ids are lower
            found, tokens = torch.cat([values[here], found], 1), torch.cat([ids[here], tokens], 1)
            best = first_of_order(found, values.shape[1])
            found, tokens = found.gather(1, best), tokens.gather(1, best)
        values[here], ids[here] = found, tokens


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
    for rows, block in _blocks(spec, policy, labels, ref):
        if block.ref is not None:
            for i, *totals in block_terms(spec, block.policy.logits, block.ref.logits, saved[:, rows]):
                for at, total in zip(term_rows(i), totals, strict=True):
                    sums[at, rows] += total


def backward(  # noqa: PLR0913 (the interface)
    spec: StatsSpec,
    policy: Tensor,
    labels: Tensor,
    ref: Tensor | None,
    saved: Tensor,
    grads: Grads,
    d_policy: Tensor | None,
    d_ref: Tensor | None,
    factors: RowFactors = NO_FACTORS,
) -> None:
    labels = shifted_labels(labels, spec.shift, spec.ignore_index)
    active = active_divergences(grads)
    for out in (d_policy, d_ref):
        if out is not None:
            zero_outside(rows_view(out, 1), labels, spec)
    needed = ref if active or d_ref is not None else None
    for rows, block in _blocks(spec, policy, labels, needed, factors):
        of_rows = Grads(*(None if g is None else g[..., rows] for g in grads))
        each = gradients(spec, block, saved[:, rows], of_rows, active, d_policy is not None, d_ref is not None)
        for place, gradient in zip((d_policy, d_ref), each, strict=True):
            if place is not None and gradient is not None:
                _store(place, rows, spec.vocab, gradient)


def active_divergences(grads: Grads) -> list[int]:
    """Return the divergences whose gradient is not 0."""
    return [] if grads.divergence is None else [i for i, g in enumerate(grads.divergence) if bool(g.any())]


def _store(out: Tensor, rows: Tensor, columns: int, x: Tensor) -> None:
    """Write a block of gradients in the dtype of `out`."""
    view = rows_view(out, 1)
    view[(*_at(view, rows), slice(columns))] = x.to(out.dtype)


def zero_outside(out: Tensor, labels: Tensor, spec: StatsSpec) -> None:
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
