"""The running sums of a row: how the sums of two parts of the vocabulary merge, and how divergences follow from them.

One sweep over a row of policy logits z and reference logits r accumulates, for constants c, m_p, m_q of the row,

    a = e^(z - m_p)   b = e^(r - m_q)   d = z - r - c     (c is close to z - r, so d is small where the models agree)
    A = sum a   B = sum b   A1 = sum a d   B1 = sum b d   B2 = sum b d^2   R = sum a^s b^(1-s)   S = sum a^2

With delta = c - m_p + m_q and K = log E_q[e^d], log p - log q = d - K and

    KL(p||q) = E_p[d] - K      KL(q||p) = K - E_q[d]      log sum p^s q^(1-s) = log R/B - s log A/B

and log sum p^2 = log S - 2 log A. Near p = q these differences cancel and only noise remains: K is computed from
exponentials that are all about 1, with an absolute error of about the machine epsilon, while the KLs are of second order in
d. But K is also G(1) for G(s) = log E_q[e^(s d)]. The sums give the slopes G'(0) = E_q[d], G'(1) = E_p[d] and the curvature
G''(0) = Var_q[d] with an error that is small compared with d. Their interpolation, with J = E_p[d] - E_q[d] and v = Var_q[d],

    G(s) = s E_q[d] + v s^2/2 + (J - v) s^3/3

is therefore used where it agrees with the exponentials to within their noise. The smaller v is, the larger the difference
that is accepted, because the error of the interpolation grows as v^2. The noise includes the rounding error of z - r, which
d has and the exponentials do not have. It is relative to |c|, because the logits of the models may differ by a large
constant. The power family uses the same method with G(s) - s K.

The differences of large sums (A - B, R - B) are accumulated separately, so that nothing cancels when sums are merged or
when results are computed from them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .elementwise import HUGE, INF, absolute, difference, frame, log, log1p, maximum, nats, rescale, where


class RowMoments(NamedTuple):
    """The sums of a row over a part of the vocabulary.

    A field is a number of one row in a kernel, and a tensor [rows] in torch. This is also the order in which a state
    [fields, rows] holds them; PowerMoments of each power follow.
    """

    shift_p: Any  # m_p
    sum_p: Any  # A
    max_p: Any  # largest z
    label_p: Any  # z of the label; -inf if the label is in another part
    sum_p_log: Any  # sum a (z - m_p), for the entropy
    shift_q: Any  # m_q
    sum_q: Any  # B
    label_q: Any  # r of the label; -inf if the label is in another part
    center: Any  # c
    excess: Any  # A - B
    sum_pd: Any  # A1
    sum_qd: Any  # B1
    sum_qdd: Any  # B2
    sum_pp: Any  # S


class PowerMoments(NamedTuple):
    """The sum of a row for one power s, with a shift of its own."""

    total: Any  # R
    shift: Any  # that R still has to be multiplied with e^shift
    excess: Any  # R e^shift - B


class Moved(NamedTuple):
    """How merge() changed one of its two parts; merge_power() needs it."""

    shift_p: Any  # the old shift minus the new one
    shift_q: Any
    factor_q: Any  # e^shift_q
    sum_q: Any  # B before the change


class ClosedRow(NamedTuple):
    """The numbers that divergences are computed from."""

    log_mean: Any  # K
    reverse: Any  # KL(p||q)
    forward: Any  # KL(q||p)
    log_sums: Any  # log A/B
    variance: Any  # v
    gap: Any  # J


def fields(powers: int) -> int:
    """Return the number of fields of a state."""
    return len(RowMoments._fields) + len(PowerMoments._fields) * powers


def unpack(state: Tensor) -> tuple[RowMoments, list[PowerMoments]]:
    """Return the fields of a state [fields, rows] by name."""
    numbers = iter(state)
    sums = RowMoments(*(next(numbers) for _ in RowMoments._fields))
    powers = (len(state) - len(sums)) // len(PowerMoments._fields)
    return sums, [PowerMoments(*(next(numbers) for _ in PowerMoments._fields)) for _ in range(powers)]


def _scaled(x, factor):
    """Compute x * factor, and 0 where factor is 0, because the sum x may be infinite."""
    return where(factor == 0.0, 0.0 * factor, x * factor)


def merge(s, t):
    """Merge the RowMoments of two disjoint parts of the vocabulary.

    Return those of both together, and for each part how it was changed.
    """
    shift_p, shift_q = maximum(s.shift_p, t.shift_p), maximum(s.shift_q, t.shift_q)
    xs, ys, xt, yt = s.shift_p - shift_p, s.shift_q - shift_q, t.shift_p - shift_p, t.shift_q - shift_q
    fs, gs, ft, gt = rescale(xs), rescale(ys), rescale(xt), rescale(yt)
    bs, bt = _scaled(s.sum_q, gs), _scaled(t.sum_q, gt)
    center = where(bt > bs, t.center, s.center)  # that of the part with the larger total
    us, ut = s.center - center, t.center - center
    both = RowMoments(
        shift_p=shift_p,
        sum_p=_scaled(s.sum_p, fs) + _scaled(t.sum_p, ft),
        max_p=maximum(s.max_p, t.max_p),
        label_p=maximum(s.label_p, t.label_p),
        sum_p_log=_scaled(s.sum_p_log + s.sum_p * xs, fs) + _scaled(t.sum_p_log + t.sum_p * xt, ft),
        shift_q=shift_q,
        sum_q=bs + bt,
        label_q=maximum(s.label_q, t.label_q),
        center=center,
        excess=_moved(s.excess, s.sum_q, fs, gs, xs - ys) + _moved(t.excess, t.sum_q, ft, gt, xt - yt),
        sum_pd=_scaled(s.sum_pd + s.sum_p * us, fs) + _scaled(t.sum_pd + t.sum_p * ut, ft),
        sum_qd=_scaled(s.sum_qd + s.sum_q * us, gs) + _scaled(t.sum_qd + t.sum_q * ut, gt),
        sum_qdd=_scaled(s.sum_qdd + (2.0 * s.sum_qd + s.sum_q * us) * us, gs)
        + _scaled(t.sum_qdd + (2.0 * t.sum_qd + t.sum_q * ut) * ut, gt),
        sum_pp=_scaled(s.sum_pp, fs * fs) + _scaled(t.sum_pp, ft * ft),
    )
    return both, Moved(xs, ys, gs, s.sum_q), Moved(xt, yt, gt, t.sum_q)


def _moved(excess, base, f, g, x):
    """Compute sum (f a - g b) from sum (a - b), where x = log f - log g."""
    return _scaled(excess, f) + _scaled(difference(f, g, nats(x)), base)


def merge_power(r, u, moved_r, moved_u, s):
    """Merge the PowerMoments of two parts, which merge() changed as it returned."""
    vr = r.shift + (s * moved_r.shift_p + (1.0 - s) * moved_r.shift_q)
    vu = u.shift + (s * moved_u.shift_p + (1.0 - s) * moved_u.shift_q)
    shift = maximum(vr, vu)
    er, eu = s * (moved_r.shift_p - moved_r.shift_q), s * (moved_u.shift_p - moved_u.shift_q)
    excess_r = _moved(r.excess, moved_r.sum_q, rescale(er + moved_r.shift_q), moved_r.factor_q, er)
    excess_u = _moved(u.excess, moved_u.sum_q, rescale(eu + moved_u.shift_q), moved_u.factor_q, eu)
    total = _scaled(r.total, rescale(vr - shift)) + _scaled(u.total, rescale(vu - shift))
    return PowerMoments(total, shift, excess_r + excess_u)


def log_ratio(excess, total, base):
    """Compute log(total / base) from excess = total - base, which was summed without cancellation."""
    x = excess / base
    return where(absolute(x) < 0.5, log1p(x), log(total) - log(base))


def _agree(x, y, v, noise):
    """Return where the interpolation x and the exponentials y agree: the noise bounds |x - y| (1 + 2000 v)."""
    return absolute(x - y) * (1.0 + 2000.0 * v) <= noise


def log_totals(sums):
    """Compute log A/B, and K from the exponentials alone."""
    log_sums = log_ratio(sums.excess, sums.sum_p, sums.sum_q)
    return log_sums, log_sums - frame(sums.center, sums.shift_p, sums.shift_q)


def close_moments(sums, noise):
    """Compute the ClosedRow of RowMoments over the whole vocabulary."""
    log_sums, k = log_totals(sums)
    mean_p = sums.sum_pd / sums.sum_p
    mean_q = sums.sum_qd / sums.sum_q
    v = maximum(sums.sum_qdd / sums.sum_q - mean_q * mean_q, 0.0 * mean_q)
    j = mean_p - mean_q
    forward = v / 6.0 + j / 3.0
    near = _agree(mean_q + forward, k, v, noise)
    reverse = where(near, j - forward, mean_p - k)
    forward = where(near, forward, k - mean_q)
    k = where(near, mean_q + forward, k)
    reverse = where(reverse > HUGE, INF, maximum(reverse, 0.0 * k))
    forward = where(forward > HUGE, INF, maximum(forward, 0.0 * k))
    return ClosedRow(k, reverse, forward, log_sums, v, j)


def close_power(r, sum_q, row, s, noise):
    """Compute log sum p^s q^(1-s) from PowerMoments r, B and the ClosedRow.

    The result is <= 0 for s in (0, 1) and >= 0 for other s.
    """
    v = row.variance
    x = r.excess / sum_q
    log_rb = log(r.total) + nats(r.shift) - log(sum_q)
    exact = where(absolute(x) < 0.5, log1p(x), log_rb) - s * row.log_sums
    smooth = s * (s - 1.0) * (v / 2.0 + (row.gap - v) * (s + 1.0) / 3.0)
    m = where(_agree(smooth, exact, v, (1.0 + s * s) * noise), smooth, exact)
    return where(m * (s * (s - 1.0)) < 0.0, 0.0 * row.log_sums, m)
