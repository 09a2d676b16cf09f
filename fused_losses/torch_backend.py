"""token_stats in plain torch: the same sums and formulas as the Triton kernels, a few rows at a time.

A block of rows is small enough for the processor's cache, so on a CPU this is also faster than whole-tensor code.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .divergences import Divergence
from .layout import PairProblem, Problem, rows_view, stats_dtype
from .moments import close_pair, close_power
from .pointwise import FLOOR, HUGE, INF

BLOCK_BYTES = 4 << 20  # of one temporary


def _blocks(labels: Tensor, problem: Problem, row_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(row numbers, labels) of each block of rows that count."""
    y = labels.reshape(-1).long()
    rows = (y != problem.ignore_index).nonzero().squeeze(1)
    for block in rows.split(max(1, BLOCK_BYTES // max(1, row_bytes))):
        if block.numel():
            yield block, y[block]


def _at(x: Tensor, rows: Tensor) -> tuple:
    """Index of rows in x [outer, inner, V]: a view where they follow one another, else a copy of this block."""
    inner = x.shape[1]
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == rows.numel() and first // inner == last // inner:
        return first // inner, slice(first % inner, last % inner + 1)
    return rows // inner, rows % inner


def _head(x: Tensor, softcap: float, multiplier: float, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    """softcap tanh(x / softcap) * multiplier, at least FLOOR, and its derivative."""
    x = x.to(dtype)
    slope: Tensor | float = multiplier
    if softcap:
        y = (x / softcap).tanh_()
        slope = (1 - y * y).mul_(multiplier)
        x = y.mul_(softcap)
    if multiplier != 1.0:
        x = x * multiplier
    return x.clamp(min=FLOOR), slope


def _shifted_labels(labels: Tensor, problem: Problem) -> Tensor:
    if not problem.shift:
        return labels
    last = labels.new_full((*labels.shape[:-1], 1), problem.ignore_index)
    return torch.cat([labels[..., 1:], last], dim=-1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(1)


class _Side:
    """One side's rows of a block, exponentiated about their maximum."""

    def __init__(self, x: Tensor, y: Tensor):
        self.x = x
        self.shift = x.amax(1)
        self.shift.masked_fill_(self.shift < -HUGE, 0)  # a row without any token: its sum is 0, its log-probs NaN
        self.exp = torch.sub(x, self.shift[:, None]).exp_()
        self.total = self.exp.sum(1)
        log_total = self.total.log()
        self.target = x.gather(1, y[:, None]).squeeze(1)
        logp = ((self.target - self.shift) - log_total).clamp(max=0).masked_fill(self.target < -HUGE, -INF)
        empty = self.total == 0
        self.logp = logp.masked_fill(empty, float("nan"))
        self.lse = self.shift + log_total
        self.log_total = log_total.masked_fill(empty, 0)


def _normalised(z: Tensor, w: Tensor, row: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """p, q, t = log p - log q, log p, log q."""
    mp, log_a, mq, log_b, c, k = (r[:, None] for r in row)
    lp = (z - mp).sub_(log_a)
    lq = (w - mq).sub_(log_b)
    return lp.exp(), lq.exp(), (z - w).sub_(c).sub_(k), lp, lq


def _pair_sums(p: _Side, q: _Side, problem: Problem) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """c, K and (D, sum_v h) of every divergence of a block."""
    c = p.shift - q.shift
    spare = p.shift - c
    delta = -((p.shift - (c + spare)) + (spare - q.shift))  # what rounding c lost
    d = (p.x - q.x).sub_(c[:, None])
    a1 = _dot(p.exp, d)
    bd = q.exp * d
    b1 = bd.sum(1)
    b2 = _dot(bd, d)
    noise = 2 * torch.finfo(d.dtype).eps * (1 - 1 / q.total)  # the largest term is 1 without error
    excess = torch.sub(p.exp, q.exp, out=bd).sum(1)
    k, *rest = close_pair(p.total, q.total, excess, a1, b1, b2, delta, noise)
    reverse, forward, log_ab, curve, j = rest
    results: list[tuple[Tensor, Tensor]] = []
    terms = None
    for div in problem.divergences:
        if div.term is not None:
            if terms is None:
                row = [p.shift, p.log_total, q.shift, q.log_total, c, k]
                terms = _normalised(p.x, q.x, row)
            value = div.term(*terms, *div.params).sum(1)
            value = value.clamp(min=0).masked_fill(value > HUGE, INF)
            results.append((value, div.grad_p(*terms, *div.params).sum(1)))
            continue
        assert div.row is not None
        power = torch.zeros_like(k)
        if div.power is not None:
            s = div.power
            x = (p.x - p.shift[:, None]).mul_(s).add_((q.x - q.shift[:, None]).mul_(1 - s))
            top = x.amax(1) if s * (s - 1) > 0 else torch.zeros_like(k)  # between 0 and 1 nothing exceeds 0
            x.sub_(top[:, None]).exp_()
            log_rb = x.sum(1).log() + top - q.total.log()
            excess = x.mul_(top.exp()[:, None]).sub_(q.exp).sum(1) / q.total
            power = close_power(excess, log_rb, log_ab, curve, j, s, noise)
        results.append(div.row(reverse, forward, power, *div.params))
    return c, k, results


def _finite(x: Tensor) -> Tensor:
    """x, and 0 where it is infinite: the slope of an infinite value is left out of the gradient."""
    return x.masked_fill(x.isinf(), 0)


def check_labels(labels: Tensor, problem: Problem) -> None:
    """Out-of-range ids are an error here; the Triton backend gives NaN for their row instead of reading out of bounds."""
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
    problem: Problem, policy: Tensor, labels: Tensor, ref: Tensor | None, logps: Tensor, ref_logps: Tensor | None,
    lse: Tensor, entropy: Tensor | None, div: Tensor | None, hit: Tensor, saved: Tensor,
) -> None:  # fmt: skip
    labels = _shifted_labels(labels, problem)
    check_labels(labels, problem)
    dtype, v = stats_dtype(policy), problem.vocab
    z_rows = rows_view(policy, 1)
    w_rows = rows_view(ref, 1) if ref is not None else None
    for out in (logps, ref_logps, lse, entropy, div, hit, saved):
        if out is not None:
            out.zero_()
    for rows, y in _blocks(labels, problem, v * dtype.itemsize):
        z, _ = _head(z_rows[_at(z_rows, rows)][:, :v], problem.softcap, problem.multiplier, dtype)
        p = _Side(z, y)
        logps[rows] = p.logp
        lse[rows] = p.lse
        hit[rows] = p.target >= p.shift
        saved[0, rows], saved[1, rows] = p.shift, p.log_total
        if entropy is not None:
            value = (p.log_total - _dot(p.exp, p.x - p.shift[:, None]) / p.total).clamp(min=0)
            entropy[rows] = value
            saved[6, rows] = _finite(value)
        if w_rows is None or ref_logps is None:
            continue
        w, _ = _head(w_rows[_at(w_rows, rows)][:, :v], problem.ref_softcap, problem.ref_multiplier, dtype)
        q = _Side(w, y)
        ref_logps[rows] = q.logp
        saved[2, rows], saved[3, rows] = q.shift, q.log_total
        if div is None:
            continue
        c, k, results = _pair_sums(p, q, problem)
        empty = (p.total == 0) | (q.total == 0)
        saved[4, rows], saved[5, rows] = c.masked_fill(empty, 0), k.masked_fill(empty, 0)
        for i, (value, slope) in enumerate(results):
            other = _finite(problem.divergences[i].degree * value) - _finite(slope)
            div[i, rows] = value.masked_fill(empty, float("nan"))
            saved[7 + 2 * i, rows] = _finite(slope).masked_fill(empty, 0)
            saved[8 + 2 * i, rows] = other.masked_fill(empty, 0)


def _slopes(
    x: list[Tensor],
    grads: list[tuple[Divergence, bool, Tensor]],
    prob: Tensor,
    coef: Tensor,
    y: Tensor,
    g: Tensor | None,
) -> Tensor:
    """prob * coef + sum_i g_i h_i + g 1[v = y]; grads holds (divergence, policy side?, g_i)."""
    out = prob * coef[:, None]
    for div, policy_side, g_i in grads:
        formula = div.grad_p if policy_side else div.grad_q
        out.add_(formula(*x, *div.params).mul_(g_i[:, None]))
    if g is not None:
        out.scatter_add_(1, y[:, None], g[:, None])
    return out


def backward(
    problem: Problem, policy: Tensor, labels: Tensor, ref: Tensor | None, saved: Tensor,
    grads: tuple[Tensor | None, ...], dz: Tensor | None, dw: Tensor | None,
) -> None:  # fmt: skip
    """Writes dz and dw; dz may be the policy logits themselves."""
    g_logp, g_ref, g_lse, g_entropy, g_div = grads
    labels = _shifted_labels(labels, problem)
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
            lp = (z - s[0, :, None]).sub_(s[1, :, None])
            p = lp.exp()
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
            out = _slopes(x, [(d, True, gi) for _, d, gi in g_i], p, coef, y, g[0])
            if g[3] is not None:
                out.sub_((p * lp).mul_(g[3][:, None]))
            dz_rows = rows_view(dz, 1)
            dz_rows[(*_at(dz_rows, rows), slice(v))] = out.mul_(slope_p).to(dz.dtype)
        if dw is not None:
            coef = torch.zeros_like(s[0])
            for i, _, gi in g_i:
                coef -= gi * s[8 + 2 * i]
            if g[1] is not None:
                coef -= g[1]
            out = _slopes(x, [(d, False, gi) for _, d, gi in g_i], x[1], coef, y, g[1])
            dw_rows = rows_view(dw, 1)
            dw_rows[(*_at(dw_rows, rows), slice(v))] = out.mul_(slope_q).to(dw.dtype)


def _zero_outside(out: Tensor, labels: Tensor, problem: Problem) -> None:
    """Zeros in ignored rows and in padded columns."""
    inner = out.shape[1]
    rows = (labels.reshape(-1) == problem.ignore_index).nonzero().squeeze(1)
    out[rows // inner, rows % inner] = 0
    out[..., problem.vocab :] = 0


def _sequence_sums(
    x: Tensor, mask: Tensor, problem: PairProblem, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> Tensor:
    x = x.to(dtype).masked_fill(~mask, 0)
    if cu_seqlens is None:
        return x.view(problem.sequences, -1).sum(1)
    return torch.segment_reduce(x, "sum", offsets=cu_seqlens.long(), initial=0.0)


def _spread(x: Tensor, mask: Tensor, problem: PairProblem, cu_seqlens: Tensor | None) -> Tensor:
    """Each sequence's number on its tokens that count."""
    if cu_seqlens is None:
        tokens = x[:, None].expand(-1, mask.numel() // problem.sequences).reshape(-1)
    else:
        tokens = x.repeat_interleave(cu_seqlens.diff().long(), output_size=mask.numel())
    return tokens.masked_fill(~mask, 0)


def pair_forward(
    problem: PairProblem, logps: Tensor, ref: Tensor | None, mask: Tensor, cu_seqlens: Tensor | None,
    losses: Tensor, seq_logps: Tensor, seq_ref: Tensor, coef: Tensor,
) -> None:  # fmt: skip
    seq_logps.copy_(_sequence_sums(logps, mask, problem, cu_seqlens, coef.dtype))
    h = seq_logps.clone()
    if ref is not None and problem.ref_summed:
        h -= ref
    elif ref is not None:  # the ratio token by token, where it is small
        h = _sequence_sums(logps.to(coef.dtype) - ref.to(coef.dtype), mask, problem, cu_seqlens, coef.dtype)
    torch.sub(seq_logps, h, out=seq_ref)
    pairs = losses.numel()
    score, slope = problem.divergence.f_dpo_link()(h, *problem.divergence.params)
    loss, gain = problem.term(problem.beta * (score[:pairs] - score[pairs:]), *problem.term_params)
    losses.copy_(loss)
    coef.copy_(torch.cat([gain, -gain]) * slope * problem.beta)


def pair_backward(
    problem: PairProblem, grads: tuple[Tensor | None, ...], coef: Tensor, mask: Tensor, cu_seqlens: Tensor | None,
    d_logps: Tensor | None, d_ref: Tensor | None,
) -> None:  # fmt: skip
    g_losses, g_logps, g_ref = grads
    g = torch.zeros_like(coef) if g_losses is None else coef * g_losses.repeat(2)
    if d_logps is not None:
        d_logps.copy_(_spread(g if g_logps is None else g + g_logps, mask, problem, cu_seqlens))
    if d_ref is not None:
        g = -g if g_ref is None else g_ref - g
        d_ref.copy_(g if problem.ref_summed else _spread(g, mask, problem, cu_seqlens))
