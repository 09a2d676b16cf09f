"""The running sums of a row: how the sums of two parts of the vocabulary merge, and how divergences follow from them.

One sweep over a row of policy logits z and reference logits w accumulates, for constants c, m_p, m_q of the row,

    a = e^(z - m_p)   b = e^(w - m_q)   d = z - w - c     (c is close to z - w, so d is small where the models agree)
    A = sum a   B = sum b   A1 = sum a d   B1 = sum b d   B2 = sum b d^2   R = sum a^s b^(1-s)   S = sum a^2

With delta = c - m_p + m_q and K = log E_q[e^d], log p - log q = d - K and

    KL(p||q) = E_p[d] - K      KL(q||p) = K - E_q[d]      log sum p^s q^(1-s) = log R/B - s log A/B

and log sum p^2 = log S - 2 log A. Near p = q these differences cancel and only noise remains: K is computed from
exponentials that are all about 1, with an absolute error of about the machine epsilon, while the KLs are of second order in
d. But K is also G(1) for G(s) = log E_q[e^(s d)]. The sums give the slopes G'(0) = E_q[d], G'(1) = E_p[d] and the curvature
G''(0) = Var_q[d] with an error that is small compared with d. Their interpolation, with J = E_p[d] - E_q[d] and v = Var_q[d],

    G(s) = s E_q[d] + v s^2/2 + (J - v) s^3/3

is therefore used where it agrees with the exponentials to within their noise. The smaller v is, the larger the difference
that is accepted, because the error of the interpolation grows as v^2. The noise includes the rounding error of z - w, which
d has and the exponentials do not have. It is relative to |c|, because the logits of the models may differ by a large
constant. The power family uses the same method with G(s) - s K.

The differences of large sums (A - B, R - B) are accumulated separately, so that nothing cancels when sums are merged or
when results are computed from them.
"""

from __future__ import annotations

from .elementwise import HUGE, INF, absolute, difference, frame, log, log1p, maximum, nats, rescale, where

# The sums of a row over a part of the vocabulary, in this order. Then for each power s: R, its own shift, R e^shift - B.
SIDES = ("m_p", "A", "max z", "z_y", "E", "m_q", "B", "w_y", "c", "A - B", "A1", "B1", "B2", "S")  # E = sum a (z - m_p)


def fields(powers: int) -> int:
    return len(SIDES) + 3 * powers


def _scaled(x, factor):
    """Compute x * factor, and 0 where factor is 0, because the sum x may be infinite."""
    return where(factor == 0.0, 0.0 * factor, x * factor)


def merge(s, t):
    """Merge the sums of two disjoint parts of the vocabulary.

    Return the sums of both, and by how much the shifts of each part changed (for merge_power).
    """
    mp, mq = maximum(s[0], t[0]), maximum(s[5], t[5])
    xs, ys, xt, yt = s[0] - mp, s[5] - mq, t[0] - mp, t[5] - mq
    fs, gs, ft, gt = rescale(xs), rescale(ys), rescale(xt), rescale(yt)
    bs, bt = _scaled(s[6], gs), _scaled(t[6], gt)
    c = where(bt > bs, t[8], s[8])  # that of the part with the larger total
    us, ut = s[8] - c, t[8] - c
    both = (
        mp,
        _scaled(s[1], fs) + _scaled(t[1], ft),
        maximum(s[2], t[2]),
        maximum(s[3], t[3]),
        _scaled(s[4] + s[1] * xs, fs) + _scaled(t[4] + t[1] * xt, ft),
        mq,
        bs + bt,
        maximum(s[7], t[7]),
        c,
        _moved(s[9], s[6], fs, gs, xs - ys) + _moved(t[9], t[6], ft, gt, xt - yt),
        _scaled(s[10] + s[1] * us, fs) + _scaled(t[10] + t[1] * ut, ft),
        _scaled(s[11] + s[6] * us, gs) + _scaled(t[11] + t[6] * ut, gt),
        _scaled(s[12] + (2.0 * s[11] + s[6] * us) * us, gs) + _scaled(t[12] + (2.0 * t[11] + t[6] * ut) * ut, gt),
        _scaled(s[13], fs * fs) + _scaled(t[13], ft * ft),
    )
    return both, (xs, ys, gs, xt, yt, gt)


def _moved(excess, base, f, g, x):
    """Compute sum (f a - g b) from sum (a - b), where x = log f - log g."""
    return _scaled(excess, f) + _scaled(difference(f, g, nats(x)), base)


def merge_power(r, u, b, moves, s):
    """Compute (R, shift, R e^shift - B) of both parts together; b[0] and b[1] are the sums B of the two parts."""
    xs, ys, gs, xt, yt, gt = moves
    vs, vt = r[1] + (s * xs + (1.0 - s) * ys), u[1] + (s * xt + (1.0 - s) * yt)
    shift = maximum(vs, vt)
    es, et = s * (xs - ys), s * (xt - yt)
    excess = _moved(r[2], b[0], rescale(es + ys), gs, es) + _moved(u[2], b[1], rescale(et + yt), gt, et)
    return _scaled(r[0], rescale(vs - shift)) + _scaled(u[0], rescale(vt - shift)), shift, excess


def log_ratio(excess, total, base):
    """Compute log(total / base) from excess = total - base, which was summed without cancellation."""
    x = excess / base
    return where(absolute(x) < 0.5, log1p(x), log(total) - log(base))


def _agree(x, y, v, noise):
    """Return where the interpolation x and the exponentials y agree: the noise bounds |x - y| (1 + 2000 v)."""
    return absolute(x - y) * (1.0 + 2000.0 * v) <= noise


def log_totals(sums):
    """Compute log A/B, and K from the exponentials alone."""
    log_ab = log_ratio(sums[9], sums[1], sums[6])
    return log_ab, log_ab - frame(sums[8], sums[0], sums[5])


def close_pair(sums, noise):
    """Compute K, KL(p||q) and KL(q||p), and log A/B, v and J for close_power."""
    log_ab, k = log_totals(sums)
    mean_p = sums[10] / sums[1]
    mean_q = sums[11] / sums[6]
    v = maximum(sums[12] / sums[6] - mean_q * mean_q, 0.0 * mean_q)
    j = mean_p - mean_q
    forward = v / 6.0 + j / 3.0
    near = _agree(mean_q + forward, k, v, noise)
    reverse = where(near, j - forward, mean_p - k)
    forward = where(near, forward, k - mean_q)
    k = where(near, mean_q + forward, k)
    reverse = where(reverse > HUGE, INF, maximum(reverse, 0.0 * k))
    forward = where(forward > HUGE, INF, maximum(forward, 0.0 * k))
    return k, reverse, forward, log_ab, v, j


def close_power(r, base, log_ab, v, j, s, noise):
    """Compute log sum p^s q^(1-s) from r = (R, shift, R e^shift - B) and base = B.

    The result is <= 0 for s in (0, 1) and >= 0 for other s.
    """
    x = r[2] / base
    log_rb = log(r[0]) + nats(r[1]) - log(base)
    exact = where(absolute(x) < 0.5, log1p(x), log_rb) - s * log_ab
    smooth = s * (s - 1.0) * (v / 2.0 + (j - v) * (s + 1.0) / 3.0)
    m = where(_agree(smooth, exact, v, (1.0 + s * s) * noise), smooth, exact)
    return where(m * (s * (s - 1.0)) < 0.0, 0.0 * log_ab, m)
