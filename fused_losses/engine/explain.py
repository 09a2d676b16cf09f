"""fl.explain: say how a call would be computed, without computing it."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import explain as explain_backend
from ..core.inputs import Hidden, Logits, LogProbs
from .planner import Plan

Steps = list["Step"]
_STEPS: ContextVar[Steps | None] = ContextVar("steps", default=None)


class Explained(Exception):
    """End a call of which all steps are known."""


class Step(NamedTuple):
    """One pass over hidden states or logits.

    Attributes:
        policy: The source, in words.
        ref: The reference that the same pass reads, in words, or an empty string.
        backend: The name of the backend.
        reason: Why this backend runs.
        plan: The plan from hidden states; print(plan) describes it. None from logits, which need no plan.
    """

    policy: str
    ref: str
    backend: str
    reason: str
    plan: Plan | None

    def __str__(self) -> str:
        sources = self.policy + (f", and {self.ref}" if self.ref else "")
        how = "one pass over the logits, and one more for their gradient" if self.plan is None else str(self.plan)
        return f"{sources}\nbackend {self.backend!r}: {self.reason}\n{how}"


@dataclass(frozen=True)
class Explanation:
    """How a call would be computed. print(explanation) describes it; .steps holds the numbers."""

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        if not self.steps:
            return "no pass over a vocabulary seen: log-probs are given, or the call is compiled, or it is none of fused_losses"
        return "\n\n".join(map(str, self.steps))


def explain(call: Callable[..., Any], *args: Any, **options: Any) -> Explanation:
    """Return how a call of a loss or of token_stats would be computed: its passes, backends and plans, with the reasons.

        print(fl.explain(fl.dpo_loss, policy, labels, ref, beta=0.1, shift=True))

    The arguments are checked as in the call itself, but nothing of the vocabulary's size is computed, and no state changes.

    Args:
        call: A loss of this library, token_stats, or a function that calls one of them.
        *args: The arguments of the call.
        **options: The options of the call.

    Raises:
        TypeError, ValueError: As the call itself.
    """
    if not callable(call):
        raise TypeError(f"call: expected a function and its arguments, explain(f, *args), got {type(call).__name__}")
    steps: Steps = []
    token = _STEPS.set(steps)
    try:
        call(*args, **options)
    except Explained:
        pass
    finally:
        _STEPS.reset(token)
    return Explanation(tuple(steps))


def explaining() -> bool:
    """Return whether the call is only to be explained; False inside torch.compile."""
    return not torch.compiler.is_compiling() and _STEPS.get() is not None


def add_step(policy: Logits | Hidden, ref: Logits | Hidden | LogProbs | None, plan: Plan | None) -> None:
    """Record a pass of the call that is explained."""
    steps = _STEPS.get()
    if steps is not None:
        x = policy.hidden if isinstance(policy, Hidden) else policy.logits
        distribution = None if isinstance(ref, LogProbs) else ref
        steps.append(Step(_words(policy), _words(distribution), *explain_backend(x.device, x.dtype), plan))


def _words(source: Logits | Hidden | None) -> str:
    if source is None:
        return ""
    if isinstance(source, Logits):
        return f"logits {_shape(source.logits)}"
    return f"hidden states {_shape(source.hidden)} with a weight {_shape(source.weight)}"


def _shape(x: Tensor) -> str:
    grad = ", requires grad" if x.requires_grad else ""
    return f"{list(x.shape)} ({str(x.dtype).removeprefix('torch.')}{grad})"
