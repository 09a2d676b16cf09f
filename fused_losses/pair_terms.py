"""Bradley-Terry shaped losses: formulas of the margin m = beta (s(h_chosen) - s(h_rejected)) that the pair kernel evaluates.

Each returns the loss and its derivative. Losses that are not a function of the margin alone belong in losses.py, as
plain torch on the sequence log-probs that the same op returns.
"""

from __future__ import annotations

from .pointwise import sigmoid, softplus


def sigmoid_term(m, smoothing):
    """-(1 - eps) log sigmoid(m) - eps log sigmoid(-m): DPO (Rafailov et al. 2023, eq. 7), with label smoothing cDPO."""
    loss = (1.0 - smoothing) * softplus(-m) + smoothing * softplus(m)
    return loss, smoothing * sigmoid(m) - (1.0 - smoothing) * sigmoid(-m)


TERMS = {"sigmoid": sigmoid_term}
