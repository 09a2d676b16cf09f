"""Fused loss head of preference optimisation: log-probs, divergences and pair losses of policy and reference without a
vocabulary-size temporary. Start at token_stats (stats.py) and preference_loss (losses.py); reference.py defines correct."""

from . import divergences, losses, reference
from .calibration import calibration
from .drop_ins import *
from .drop_ins import __all__ as _drop_ins
from .head import FusedHead, backbone, find_head
from .losses import *
from .losses import __all__ as _losses
from .partial import PartialStats, merge_stats, partial_stats
from .sources import Hidden, Logits, LogProbs, Lora, TokenStats
from .stats import token_stats
from .trust_region import TrustRegion

__version__ = "0.1.0"

__all__ = [
    "FusedHead", "Hidden", "LogProbs", "Logits", "Lora", "PartialStats", "TokenStats", "TrustRegion", "backbone", "calibration",
    "divergences", "find_head", "losses", "merge_stats", "partial_stats", "reference", "token_stats", *_drop_ins, *_losses,
]  # fmt: skip
