"""One module for each kind of loss; FAMILY lists all that tests, checks, benchmarks and tables iterate over.

common               results, reductions, the way through objective.evaluate, Entry
preference           pairs: DPO and the loss types of TRL
tdpo                 pairs: TDPO
reference_free       pairs without a reference: SimPO, CPO, ORPO
unpaired             KTO, BCO, APO-zero
policy_gradient      GRPO and its relatives
distillation         from a teacher
topk                 from a teacher's K best tokens
cross_entropy        with label smoothing and z-loss
preference_matching  PM-RLHF, Bradley-Terry, Plackett-Luce
upo                  UPO
lta_thinker          LTA-Thinker
"""

from . import (
    cross_entropy,
    distillation,
    lta_thinker,
    policy_gradient,
    preference,
    preference_matching,
    reference_free,
    tdpo,
    topk,
    unpaired,
    upo,
)
from .common import Entry, LossOutput
from .cross_entropy import *
from .distillation import *
from .lta_thinker import *
from .policy_gradient import *
from .preference import *
from .preference_matching import *
from .reference_free import *
from .tdpo import *
from .topk import *
from .unpaired import *
from .upo import *

MODULES = (
    preference,
    tdpo,
    reference_free,
    unpaired,
    policy_gradient,
    distillation,
    topk,
    cross_entropy,
    preference_matching,
    upo,
    lta_thinker,
)
FAMILY: dict[str, Entry] = {entry.call.__name__: entry for module in MODULES for entry in module.ENTRIES}

__all__ = ["FAMILY", "Entry", "LossOutput", *(name for module in MODULES for name in module.__all__)]
