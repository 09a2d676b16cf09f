"""The loss functions: one module for each kind of loss.

FAMILY lists all losses that the tests and the table of the README iterate over. The names in __all__ are those of fused_losses.

registry             FAMILY, and the decorator that adds a loss to it
shared               results, reductions, the call of evaluate
preference           pairs: DPO and the loss types of TRL; their formulas are in pair_losses
tdpo                 pairs: TDPO
reference_free       pairs without a reference: SimPO, CPO, ORPO; triples: TPO
unpaired             KTO, BCO, APO-zero
regression           REBEL, A*-PO
policy_gradient      GRPO and its relatives; their terms are in policy_terms
rollouts             advantages, importance weights and masks of sampled responses
distillation         from a teacher
topk                 from a teacher's K best tokens
speculative          a draft model for speculative decoding
cross_entropy        with label smoothing and z-loss; DFT
fine_tuning          EAFT, ASFT
preference_matching  PM-RLHF, Bradley-Terry, Plackett-Luce
calibration          compares confidence with accuracy, from the statistics that a loss returns
experimental         upo (UPO) and lta_thinker (LTA-Thinker)
"""

from ..core.dynamic_beta import DynamicBeta
from ..core.outputs import LossOutput
from ..core.running_delta import RunningDelta
from .cross_entropy import cross_entropy_loss
from .distillation import distillation_loss, sampled_distillation_loss
from .experimental.lta_thinker import lta_thinker_loss, reasoning_focus_loss, semantic_alignment_loss
from .experimental.upo import expectile_loss, upo_loss
from .fine_tuning import asft_loss, eaft_loss
from .policy_gradient import grpo_loss
from .preference import LOSSES as LOSSES
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
from .registry import FAMILY as FAMILY
from .registry import Entry as Entry
from .regression import a2po_loss, rebel_loss
from .rollouts import entropy_quantile_mask, group_advantages, optimal_values, rollout_weights
from .speculative import speculative_loss
from .tdpo import tdpo_loss
from .topk import TopKOverlap, topk_distillation_loss, topk_overlap
from .unpaired import bco_loss, kto_baseline, kto_loss

__all__ = [
    "DynamicBeta", "LossOutput", "RunningDelta", "TopKOverlap", "a2po_loss", "asft_loss", "bco_loss",
    "bradley_terry_loss", "conditional_preference_matching_loss", "cpo_loss", "cross_entropy_loss", "distillation_loss",
    "dpo_loss", "eaft_loss", "entropy_quantile_mask", "expectile_loss", "group_advantages", "grpo_loss", "ipo_loss",
    "kto_baseline", "kto_loss", "lta_thinker_loss", "optimal_values", "orpo_loss", "plackett_luce_loss",
    "preference_loss", "preference_matching_gap", "preference_matching_loss", "preference_matching_reward",
    "reasoning_focus_loss", "rebel_loss", "rollout_weights", "sampled_distillation_loss", "semantic_alignment_loss",
    "simpo_loss", "speculative_loss", "tdpo_loss", "topk_distillation_loss", "topk_overlap", "tpo_loss",
    "upo_loss",
]  # fmt: skip
