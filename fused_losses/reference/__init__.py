"""Eager twins of the public functions, under the same names: the definition of correct, written to be read.

Plain torch, any float dtype, CPU or GPU, differentiable by autograd as often as one likes. They hold every log-softmax of
vocabulary size, as the code that this package replaces does. Run them in float64 to judge anything else.
"""

from . import (
    cross_entropy,
    distillation,
    drop_ins,
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
from .cross_entropy import *
from .distillation import *
from .drop_ins import *
from .lta_thinker import *
from .policy_gradient import *
from .preference import *
from .preference_matching import *
from .reference_free import *
from .stats import *
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
__all__ = ["token_stats", *drop_ins.__all__, *(name for module in MODULES for name in module.__all__)]
