"""Put our operators behind OpenRLHF's log-probs and entropies, so that its trainers run on ours unchanged.

    with openrlhf.patched():
        runpy.run_module("openrlhf.cli.train_dpo", run_name="__main__")

    openrlhf.models.utils    log_probs_from_logits, compute_entropy

Actor.forward calls the former for every trainer, and the latter where the loss has an entropy. Each is then one pass over the
logits, and one for their gradient. The actors of PPO are processes of Ray, and patch() belongs into these: it can be their
worker_process_setup_hook. Arguments and outputs have the same shapes and gradients. These differences exist:

  * logits are not divided by the temperature in place.
  * Results are float32 for low-precision logits. OpenRLHF's have the dtype of the logits (Actor makes them float32).
  * A label out of range is an error on a CPU and NaN on a GPU, also -100, for which flash-attn's kernel returns 0.

Tested with 0.11.2.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager

from torch import Tensor

from .patching import EntryPoints, Patch, check_version
from .trl_functions import entropy_from_logits, selective_log_softmax

__all__ = ["patch", "patched", "unpatch"]

TESTED = "0.11.2"


def _entry_points() -> EntryPoints:
    """Return OpenRLHF's functions with ours."""
    check_version("openrlhf", "openrlhf", TESTED)
    utils = importlib.import_module("openrlhf.models.utils")
    return EntryPoints(
        functions=[(utils.log_probs_from_logits, _log_probs_from_logits), (utils.compute_entropy, _compute_entropy)]
    )


_PATCH = Patch("openrlhf", __name__, _entry_points)


def patched() -> AbstractContextManager[None]:
    """Run OpenRLHF on our operators inside the block, and restore it afterwards, also after an error.

    Blocks may be nested. Raises ImportError where OpenRLHF is not installed, or has another version than 0.11.x.
    """
    return _PATCH.block()


def patch() -> None:
    """Start what patched() does, for a process of its own; each call needs an unpatch()."""
    _PATCH.start()


def unpatch() -> None:
    """End what patched() does."""
    _PATCH.end()


def _log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-probs of the labels."""
    return selective_log_softmax(logits, labels, temperature)


def _compute_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of each row."""
    return entropy_from_logits(logits)
