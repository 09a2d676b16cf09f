"""Losses of the Bradley-Terry form: formulas of the margin m that the pair kernel evaluates.

The margin is m = beta (s(h_chosen) - s(h_rejected)). Each function returns the loss and its derivative. Losses that
depend on more than the margin belong in losses/pair_losses.py, as plain torch on the sequence log-probs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .elementwise import cap, exp, sigmoid, softplus, where


def sigmoid_term(m, smoothing):
    """Compute -(1 - eps) log sigmoid(m) - eps log sigmoid(-m).

    This is DPO (Rafailov et al. 2023, eq. 7); with label smoothing it is cDPO.
    """
    loss = (1.0 - smoothing) * softplus(-m) + smoothing * where(m < 1e30, softplus(m), 1e30)  # no 0 * inf
    return loss, smoothing * sigmoid(m) - (1.0 - smoothing) * sigmoid(-m)


def robust_term(m, smoothing):
    """Compute (-(1 - eps) log sigmoid(m) + eps log sigmoid(-m)) / (1 - 2 eps).

    This loss is unbiased if a share eps of the labels is flipped.
    """
    gain = 1.0 / (1.0 - 2.0 * smoothing)
    loss = (1.0 - smoothing) * softplus(-m) - smoothing * where(m < 1e30, softplus(m), 1e30)
    return gain * loss, -gain * ((1.0 - smoothing) * sigmoid(-m) + smoothing * sigmoid(m))


def hinge_term(m):
    """Compute max(0, 1 - m), the loss of SLiC-HF and RSO; the slope at m = 1 is 0, as that of relu at 0."""
    return where(m >= 1.0, 0.0, 1.0 - m), where(m >= 1.0, 0.0, -1.0)


def exo_term(m, log_keep, log_flip):
    """Compute KL((sigmoid(m), sigmoid(-m)) || (1 - eps, eps)) from log(1 - eps) and log eps.

    This is EXO (Ji et al. 2024, eq. 16).
    """
    p_chosen, p_rejected = sigmoid(m), sigmoid(-m)
    loss = -p_chosen * (softplus(-m) + log_keep) - p_rejected * (softplus(m) + log_flip)
    return loss, p_chosen * p_rejected * (m + log_flip - log_keep)


def discopop_term(m, tau):
    """Compute -(1 - w) log sigmoid(m) + w e^-m with w = sigmoid(m / tau): DiscoPOP (Lu et al. 2024, eq. 5).

    w e^-m is computed as the exponential of one number: for tau < 1 it tends to 0 as m -> -inf, where e^-m alone overflows.
    """
    w, complement = sigmoid(m / tau), sigmoid(-m / tau)
    far = m < -1e30  # where a product with the infinite loss would be NaN
    x = where(far, -1e30, -m - softplus(-m / tau))
    e = exp(cap(x))
    slope = where(x < 80.0, e * (complement / tau - 1.0), 0.0)
    plain = where(far, 1e30, softplus(-m))
    return complement * plain + e, slope - complement * (w / tau * plain + sigmoid(-m))


TERMS: dict[str, Callable[..., Any]] = {
    "sigmoid": sigmoid_term, "robust": robust_term, "hinge": hinge_term, "exo_pair": exo_term, "discopop": discopop_term,
}  # fmt: skip
