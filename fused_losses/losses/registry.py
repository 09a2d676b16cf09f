"""The registry of losses: FAMILY, which tests, tables and benchmarks iterate over, and the decorator that fills it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from ..core.names import nearest
from ..core.outputs import LossOutput

P = ParamSpec("P")
R = TypeVar("R")


REQUIRED = {
    "ref": "the reference as fl.Hidden, logits or fl.LogProbs, or None for the policy's log-probs alone",
    "teacher": "the teacher, as fl.Hidden or logits (sampled_distillation_loss takes fl.LogProbs too)",
}


def takes(options: type, *allowed: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a loss raise an error for an unknown option or a missing reference; the error names the loss.

    Args:
        options: the TypedDict of the loss's keyword arguments.
        *allowed: names that are allowed to pass, because the loss itself raises an error for them.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters.values()
        parameter_names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
        known = tuple(dict.fromkeys([*parameter_names, *options.__annotations__]))
        listed = [name for name in known if name not in ("policy", "student", "labels")]
        needed = [(i, p.name) for i, p in enumerate(parameters) if p.name in REQUIRED and p.default is p.empty]

        @wraps(function)
        def call(*args: P.args, **keywords: P.kwargs) -> R:
            for name in keywords:
                if name not in known and name not in allowed:
                    what = f"fl.{function.__name__}: unknown option {name!r}{nearest(name, (*known, *allowed))}"
                    raise TypeError(f"{what}; its options: {', '.join(listed)}")
            for i, name in needed:
                # an argument missing before this one is named by Python's own message
                earlier_given = all(earlier in keywords for earlier in parameter_names[len(args) : i])
                if len(args) <= i and name not in keywords and earlier_given:
                    raise TypeError(f"fl.{function.__name__}: {name}: expected {REQUIRED[name]}, got none")
            return function(*args, **keywords)

        return call

    return decorate


@dataclass(frozen=True)
class Entry:
    """A public loss, and what the tests and the table of the README need to call it."""

    call: Callable[..., LossOutput]  # fused_losses.reference has the same name for its reference implementation
    # "pairs": labels [2B, T], chosen first; "triples": [3B, T], gold last; "sequences": [S, T]; "tokens": [..., T]. All may be
    # packed but the last
    batch: str
    source: str  # papers, or whose code
    variants: Mapping[str, Mapping[str, Any]]  # names of special cases -> options
    ref: str = "needed"  # or "optional", or "unused"
    distribution: bool = False  # both sides need whole distributions: log-probs of labels are not enough
    inputs: Mapping[str, str] = field(default_factory=dict)  # other tensors: name -> one of INPUTS
    tokens_for: Mapping[str, Sequence[str]] = field(default_factory=dict)  # options with which num_items counts tokens
    options: frozenset[str] = frozenset()  # the names of all arguments


# The kinds: numbers, bools, hidden states [S, H] (vector) and [S, J, H] (vectors), top-k tensors [..., K].
INPUTS = (
    "per sequence", "per token", "bool per sequence", "vector per sequence", "vectors per sequence",
    "top-k log-probs per token", "top-k ids per token",
)  # fmt: skip


FAMILY: dict[str, Entry] = {}


def register(
    options: type,
    *allowed: str,
    batch: str,
    source: str,
    variants: Mapping[str, Mapping[str, Any]],
    ref: str = "needed",
    distribution: bool = False,
    inputs: Mapping[str, str] | None = None,
    tokens_for: Mapping[str, Sequence[str]] | None = None,
) -> Callable[[Callable[P, LossOutput]], Callable[P, LossOutput]]:
    """Add a loss to FAMILY, with checks of its options as takes() makes them.

    Args:
        options: as in takes.
        *allowed: as in takes.
        batch: a field of Entry, as all that follow.
        source: the papers that define the loss, or whose code does.
        variants: names of special cases, and their options.
        ref: "needed", "optional" or "unused".
        distribution: whether log-probs of labels are not enough.
        inputs: the other tensors that the loss takes, and of which kind they are.
        tokens_for: the values of options with which num_items counts tokens.
    """

    def decorate(function: Callable[P, LossOutput]) -> Callable[P, LossOutput]:
        call = takes(options, *allowed)(function)
        names = frozenset([*inspect.signature(function).parameters, *options.__annotations__])
        FAMILY[function.__name__] = Entry(
            call, batch, source, variants, ref, distribution, inputs or {}, tokens_for or {}, names
        )
        return call

    return decorate
