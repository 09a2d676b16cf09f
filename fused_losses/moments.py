"""From a row's running sums to its divergences: the closing arithmetic of the one-pass (separable) forward.

One sweep over a row of policy logits z and reference logits w keeps, for constants c, m_p, m_q of the row,

    a = e^(z - m_p)   b = e^(w - m_q)   d = z - w - c     (c about z - w, so d is small where the models agree)
    A = sum a   B = sum b   A1 = sum a d   B1 = sum b d   B2 = sum b d^2   R = sum a^s b^(1-s)

With delta = c - m_p + m_q and K = log E_q[e^d], log p - log q = d - K and

    KL(p||q) = E_p[d] - K      KL(q||p) = K - E_q[d]      log sum p^s q^(1-s) = log R/B - s log A/B

Near p = q these differences cancel to noise: K comes from exponentials that are all about 1, with an absolute error of
about the machine epsilon, while the KLs are of second order in d. But K is also G(1) for G(s) = log E_q[e^(s d)], whose
slopes G'(0) = E_q[d], G'(1) = E_p[d] and curvature G''(0) = Var_q[d] the sums give with an error that is small against
d itself. Their interpolation, with J = E_p[d] - E_q[d] and v = Var_q[d],

    G(s) = s E_q[d] + v s^2/2 + (J - v) s^3/3

is therefore used wherever it agrees with the exponentials to within their noise: the more readily, the smaller v, since
its own error grows as v^2. The power family is treated alike, by G(s) - s K.
"""

from __future__ import annotations

from .pointwise import HUGE, INF, absolute, log, log1p, maximum, where


def _log_ratio(excess, total, base):
    """log(total / base), excess = total - base summed without cancellation."""
    x = excess / base
    return where(absolute(x) < 0.5, log1p(x), log(total) - log(base))


def _agree(x, y, v, noise):
    """Where interpolation and exponentials differ by no more than the noise that counts at this variance."""
    return absolute(x - y) * (1.0 + 2000.0 * v) <= noise


def close_pair(A, B, A_minus_B, A1, B1, B2, delta, noise):
    """K, KL(p||q), KL(q||p), and for close_power log A/B, v, J."""
    log_ab = _log_ratio(A_minus_B, A, B)
    k = log_ab - delta
    mean_p = A1 / A
    mean_q = B1 / B
    v = maximum(B2 / B - mean_q * mean_q, 0.0 * mean_q)
    j = mean_p - mean_q
    forward = v / 6.0 + j / 3.0
    near = _agree(mean_q + forward, k, v, noise)
    reverse = where(near, j - forward, mean_p - k)
    forward = where(near, forward, k - mean_q)
    k = where(near, mean_q + forward, k)
    reverse = where(reverse > HUGE, INF, maximum(reverse, 0.0 * k))
    forward = where(forward > HUGE, INF, maximum(forward, 0.0 * k))
    return k, reverse, forward, log_ab, v, j


def close_power(R_minus_B_over_B, log_rb, log_ab, v, j, s, noise):
    """log sum p^s q^(1-s) from log R/B: <= 0 for s in (0, 1), >= 0 beyond."""
    x = R_minus_B_over_B
    exact = where(absolute(x) < 0.5, log1p(x), log_rb) - s * log_ab
    smooth = s * (s - 1.0) * (v / 2.0 + (j - v) * (s + 1.0) / 3.0)
    m = where(_agree(smooth, exact, v, (1.0 + s * s) * noise), smooth, exact)
    return where(m * (s * (s - 1.0)) < 0.0, 0.0 * log_ab, m)
