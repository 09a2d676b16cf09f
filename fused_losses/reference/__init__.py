"""Reference implementations of the public functions, under the same names: they define what is correct.

They are plain eager torch, written to be read, for any float dtype, on CPU or GPU, and differentiable by autograd any number
of times. They store every log-softmax of vocabulary size, as the code that this package replaces does. Run them in float64 to
check other code.
"""

from .cross_entropy import cross_entropy_loss
from .distillation import distillation_loss, sampled_distillation_loss
from .fine_tuning import asft_loss, eaft_loss
from .lta_thinker import lta_thinker_loss, reasoning_focus_loss, semantic_alignment_loss
from .policy_gradient import grpo_loss
from .preference import dpo_loss, ipo_loss, preference_loss
from .preference_matching import (
    bradley_terry_loss,
    conditional_preference_matching_loss,
    plackett_luce_loss,
    preference_matching_gap,
    preference_matching_loss,
    preference_matching_reward,
)
from .reference_free import cpo_loss, orpo_loss, simpo_loss, tpo_loss
from .regression import a2po_loss, rebel_loss
from .rollouts import entropy_quantile_mask, group_advantages, optimal_values, rollout_weights
from .speculative import speculative_loss
from .stats import token_stats
from .tdpo import tdpo_loss
from .topk import topk, topk_distillation_loss
from .trl_functions import (
    entropy_from_logits,
    generalized_jsd_loss,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
)
from .unpaired import bco_loss, kto_baseline, kto_loss
from .upo import expectile_loss, upo_loss

__all__ = [
    "a2po_loss", "asft_loss", "bco_loss", "bradley_terry_loss", "conditional_preference_matching_loss", "cpo_loss",
    "cross_entropy_loss", "distillation_loss", "dpo_loss", "eaft_loss", "entropy_from_logits", "entropy_quantile_mask",
    "expectile_loss", "generalized_jsd_loss", "group_advantages", "grpo_loss", "ipo_loss", "kto_baseline", "kto_loss",
    "lta_thinker_loss", "optimal_values", "orpo_loss", "plackett_luce_loss", "preference_loss",
    "preference_matching_gap", "preference_matching_loss", "preference_matching_reward", "reasoning_focus_loss",
    "rebel_loss", "rollout_weights", "sampled_distillation_loss", "selective_log_softmax",
    "selective_log_softmax_and_entropy", "semantic_alignment_loss", "simpo_loss", "speculative_loss", "tdpo_loss",
    "token_stats", "topk", "topk_distillation_loss", "tpo_loss", "upo_loss",
]  # fmt: skip
