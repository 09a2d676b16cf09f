"""fl.explain: say how a call would be computed, without computing it."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch

from ..backends import explain as explain_backend
from ..core.inputs import Hidden, Logits, LogProbs
from ..core.names import tensor_words
from .planner import Plan


class Explained(BaseException):
    """End a call of which all steps are known. It is no Exception, so that the caller's handlers of errors do not catch it."""


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


@dataclass
class _Call:
    """The call that is explained."""

    steps: list[Step] = field(default_factory=list)
    ended: bool = False  # steps of later calls are not recorded, should a handler of BaseException go on


_CALL: ContextVar[_Call | None] = ContextVar("call", default=None)


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
        call: A loss of this library, token_stats, or a function that calls one of them. Such a function runs up to its first
            call of this library, which does not return: nothing after it runs, neither a backward nor a second loss.
        *args: The arguments of the call.
        **options: The options of the call.

    Raises:
        TypeError, ValueError: As the call itself; and for meta tensors, because the plan depends on the device.
    """
    if not callable(call):
        raise TypeError(f"call: expected a function and its arguments, explain(f, *args), got {type(call).__name__}")
    explained = _Call()
    token = _CALL.set(explained)
    try:
        call(*args, **options)
    except Explained:
        pass
    finally:
        _CALL.reset(token)
    return Explanation(tuple(explained.steps))


def explaining() -> bool:
    """Return whether the call is only to be explained; False inside torch.compile."""
    return not torch.compiler.is_compiling() and _CALL.get() is not None


def add_step(policy: Logits | Hidden, ref: Logits | Hidden | LogProbs | None, plan: Plan | None) -> None:
    """Record a pass of the call that is explained."""
    call = _CALL.get()
    if call is None or call.ended:
        return
    x = policy.hidden if isinstance(policy, Hidden) else policy.logits
    if x.is_meta:
        raise ValueError(
            "explain: expected tensors on the device of the call, on which its plan depends, got meta tensors; "
            "python -m fused_losses memory --hidden predicts the plan from sizes"
        )
    distribution = None if isinstance(ref, LogProbs) else ref
    call.steps.append(Step(_words(policy), _words(distribution), *explain_backend(x.device, x.dtype), plan))


def end_call() -> NoReturn:
    """End the call that is explained."""
    call = _CALL.get()
    if call is not None:
        call.ended = True
    raise Explained


def _words(source: Logits | Hidden | None) -> str:
    if source is None:
        return ""
    if isinstance(source, Logits):
        return f"logits {tensor_words(source.logits)}"
    return f"hidden states {tensor_words(source.hidden)} with a weight {tensor_words(source.weight)}"
