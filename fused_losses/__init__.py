"""Compute log-probs, divergences and losses of preference optimisation without a vocabulary-size temporary.

The fused loss head takes a policy and a reference. To read the code, start at token_stats (engine/token_stats.py) and losses/.
The reference implementations in reference/ define which results are correct.
"""

from typing import TYPE_CHECKING, Any

from . import losses, reference
from .core import divergences
from .core.inputs import Hidden, Logits, LogProbs, Lora, TokenStats
from .engine.partial_stats import PartialStats, merge_stats, partial_stats
from .engine.token_stats import token_stats
from .integrations.trl_functions import (  # fmt: skip
    entropy_from_logits,
    generalized_jsd_loss,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
)
from .losses import (  # fmt: skip
    LossOutput,
    RunningDelta,
    bco_loss,
    bradley_terry_loss,
    conditional_preference_matching_loss,
    cpo_loss,
    cross_entropy_loss,
    distillation_loss,
    dpo_loss,
    expectile_loss,
    group_advantages,
    grpo_loss,
    ipo_loss,
    kto_baseline,
    kto_loss,
    lta_thinker_loss,
    orpo_loss,
    plackett_luce_loss,
    preference_loss,
    preference_matching_gap,
    preference_matching_loss,
    preference_matching_reward,
    reasoning_focus_loss,
    sampled_distillation_loss,
    semantic_alignment_loss,
    simpo_loss,
    tdpo_loss,
    topk_distillation_loss,
    upo_loss,
)
from .losses.calibration import calibration
from .nn.at_head import at_head
from .nn.fused_head import FusedHead, backbone, find_head
from .nn.trust_region import TrustRegion

if TYPE_CHECKING:
    from .cli.verify_divergence import verify_divergence
    from .cli.verify_loss import verify_loss

__version__ = "0.1.0"

__all__ = [
    "FusedHead", "Hidden", "LogProbs", "Logits", "Lora", "LossOutput", "PartialStats", "RunningDelta", "TokenStats",
    "TrustRegion", "at_head", "backbone", "bco_loss", "bradley_terry_loss", "calibration",
    "conditional_preference_matching_loss", "cpo_loss", "cross_entropy_loss", "distillation_loss", "divergences", "dpo_loss",
    "entropy_from_logits",
    "expectile_loss", "find_head", "generalized_jsd_loss", "group_advantages", "grpo_loss", "ipo_loss", "kto_baseline",
    "kto_loss", "losses", "lta_thinker_loss", "merge_stats", "orpo_loss", "partial_stats", "plackett_luce_loss",
    "preference_loss", "preference_matching_gap", "preference_matching_loss", "preference_matching_reward",
    "reasoning_focus_loss", "reference", "sampled_distillation_loss", "selective_log_softmax",
    "selective_log_softmax_and_entropy", "semantic_alignment_loss", "simpo_loss", "tdpo_loss", "token_stats",
    "topk_distillation_loss", "upo_loss", "verify_divergence", "verify_loss",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import the functions that verify entries with the first use: they are for people who add one."""
    if name.startswith("verify_") and name in __all__:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.cli.{name}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
