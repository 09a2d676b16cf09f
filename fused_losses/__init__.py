"""Fused loss head of preference optimisation: log-probs, divergences and pair losses of policy and reference without a
vocabulary-size temporary. Start at token_stats (stats.py) and preference_loss (losses.py); reference.py defines correct."""

from . import divergences, reference
from .losses import LossOutput, dpo_loss, preference_loss
from .sources import Hidden, Logits, LogProbs, Lora, TokenStats
from .stats import token_stats

__version__ = "0.1.0"

__all__ = [
    "Hidden", "LogProbs", "Logits", "Lora", "LossOutput", "TokenStats", "divergences", "dpo_loss", "preference_loss",
    "reference", "token_stats",
]  # fmt: skip
