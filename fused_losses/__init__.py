"""Fused loss head of preference optimisation: log-probs, divergences and pair losses of policy and reference without a
vocabulary-size temporary. Start at token_stats (stats.py) and preference_loss (losses.py); reference.py defines correct."""

from . import divergences, reference
from .head import FusedHead, backbone, find_head
from .losses import LossOutput, distillation_loss, dpo_loss, preference_loss
from .partial import PartialStats, merge_stats, partial_stats
from .sources import Hidden, Logits, LogProbs, Lora, TokenStats
from .stats import token_stats

__version__ = "0.1.0"

__all__ = [
    "FusedHead", "Hidden", "LogProbs", "Logits", "Lora", "LossOutput", "PartialStats", "TokenStats", "backbone",
    "distillation_loss", "divergences", "dpo_loss", "find_head", "merge_stats", "partial_stats", "preference_loss", "reference", "token_stats",
]  # fmt: skip
