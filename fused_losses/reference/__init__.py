"""Eager twins of the public functions, under the same names: the definition of correct, written to be read.

Plain torch, any float dtype, CPU or GPU, differentiable by autograd as often as one likes. They hold every log-softmax of
vocabulary size, as the code that this package replaces does. Run them in float64 to judge anything else.
"""

from .preference import dpo_loss, preference_loss
from .stats import token_stats

__all__ = ["dpo_loss", "preference_loss", "token_stats"]
