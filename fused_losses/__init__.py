"""Compute log-probs, divergences and losses of preference optimisation without a vocabulary-size temporary.

The fused loss head takes a policy and a reference. To read the code, start at token_stats (engine/token_stats.py) and losses/.
The reference implementations in reference/ define which results are correct.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

from . import losses, reference
from .core import divergences
from .core.inputs import Hidden, Logits, LogProbs, Lora, TokenStats
from .core.names import nearest
from .core.outputs import TopK
from .core.support import Support
from .engine.explain import Explanation, explain
from .engine.partial_stats import PartialStats, merge_stats, partial_stats
from .engine.support import logits_at
from .engine.token_stats import token_stats
from .engine.topk import topk
from .integrations.trl_functions import (
    entropy_from_logits,
    generalized_jsd_loss,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
)
from .losses import *  # noqa: F403
from .losses.calibration import calibration
from .nn.at_head import at_head
from .nn.fused_head import FusedHead, backbone, find_head
from .nn.trust_region import TrustRegion

if TYPE_CHECKING:
    from .cli.verify_divergence import verify_divergence
    from .cli.verify_loss import verify_loss

__version__ = "0.1.0"

__all__ = [
    "Explanation", "FusedHead", "Hidden", "LogProbs", "Logits", "Lora", "PartialStats", "Support", "TokenStats", "TopK",
    "TrustRegion", "at_head", "backbone", "calibration", "divergences", "entropy_from_logits", "explain", "find_head",
    "generalized_jsd_loss", "logits_at", "losses", "merge_stats", "partial_stats", "reference", "selective_log_softmax",
    "selective_log_softmax_and_entropy", "token_stats", "topk", "verify_divergence", "verify_loss",
]  # fmt: skip
__all__ += losses.__all__


def __getattr__(name: str) -> Any:
    """Import the functions that verify entries with the first use: they are for people who add one."""
    if name.startswith("verify_") and name in __all__:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.cli.{name}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{nearest(name, __all__)}")


def _verify(name: str, *args: Any, **options: Any) -> Any:
    return __getattr__(name)(*args, **options)


# the same functions, beside what they verify
divergences.verify = partial(_verify, "verify_divergence")  # type: ignore[attr-defined]
losses.verify = partial(_verify, "verify_loss")  # type: ignore[attr-defined]
