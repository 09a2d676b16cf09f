"""Convert fl.Hidden sources to the operators' arguments, and choose the plan of a call."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import choose as choose_backend
from ..core.divergences import Divergence
from ..core.inputs import Hidden, Logits, LogProbs
from . import hidden_ops
from .logits_ops import check_plain
from .planner import Facts, Plan, choose, choose_kind, workspace_bytes
from .projection import Inputs
from .shards import shard_of


class How(NamedTuple):
    """The options for computing a call that users pass as plan, workspace and static_shapes."""

    plan: str = "auto"
    workspace: int | None = None
    static_shapes: bool = False


class Request(NamedTuple):
    """A call in the form that the operators take."""

    tensors: tuple[Tensor | None, ...]  # labels, then five of each side
    options: hidden_ops.Options
    wanted: list[bool]
    facts: Facts
    asked: str  # the plan asked for

    @property
    def plan(self) -> Plan:
        """Return the plan of kind options.plan, with its tiles."""
        return choose(self.facts, self.asked, self.options.workspace)

    @property
    def asks(self) -> tuple[bool, bool]:
        """Return whether the policy asks for a gradient, and whether the reference does."""
        return any(self.wanted[:5]), any(self.wanted[5:])


def under_autocast(source: Hidden) -> Hidden:
    """Return the source with hidden states in autocast's dtype where autocast is on.

    So the products run in that dtype, as those of a linear layer would. float64 states are not converted.
    """
    device = source.hidden.device.type
    if not torch.is_autocast_enabled(device) or source.hidden.dtype == torch.float64:
        return source
    return replace(source, hidden=source.hidden.to(torch.get_autocast_dtype(device)))


def _inputs(source: Logits | Hidden) -> Inputs:
    if isinstance(source, Logits):
        return Inputs(source.logits)
    source = under_autocast(source)
    a, b, scaling = source.lora or (None, None, 1.0)
    return Inputs(source.hidden, source.weight, source.bias, a, b, float(scaling))


def request(
    policy: Logits | Hidden, labels: Tensor, ref: Logits | Hidden | None, asked: tuple[Divergence, ...], entropy: bool,
    collision: bool, ignore_index: int, how: How, unit: int = 0,
) -> Request:  # fmt: skip
    """Return the call in the form that the operators take. labels must be aligned with the rows already.

    unit: rows of the longest unit where the loss is known; 0: not known.
    """
    z, w = _inputs(policy), None if ref is None else _inputs(ref)
    tensors = (labels, *z[:5], *((None,) * 5 if w is None else w[:5]))
    check_plain("token_stats", *tensors)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors[1:]]
    doubles = [x for x in (z.x, None if w is None else w.x) if x is not None and x.dtype == torch.float64]
    backend = choose_backend(labels.device, doubles[0].dtype if doubles else None)
    budget = workspace_bytes(how.workspace)
    options = hidden_ops.Options(
        z.scaling, 1.0 if w is None else w.scaling, ";".join(d.key for d in asked), entropy, collision,
        ignore_index, policy.vocab, policy.softcap or 0.0, policy.multiplier,
        (ref.softcap or 0.0) if ref else 0.0, ref.multiplier if ref else 1.0, backend, how.plan, budget, how.static_shapes,
        *shard_of(policy),
    )  # fmt: skip
    if options.group and how.plan in ("rows", "frozen"):
        raise ValueError(f"plan: {how.plan!r} is not possible where the vocabulary is split over a process_group")
    facts = hidden_ops.facts_of(options.problem(), z, w, labels.numel(), backend, wanted, unit, how.static_shapes)
    kind = "slices" if options.group and how.plan == "auto" else how.plan
    return Request(tensors, options._replace(plan=choose_kind(facts, kind, budget)[0]), wanted, facts, kind)


def is_hidden(*sources: Logits | Hidden | LogProbs | None) -> bool:
    """Return whether the operator for hidden states is needed, which also handles split vocabularies."""
    return any(isinstance(s, Hidden) or (isinstance(s, Logits) and s.process_group is not None) for s in sources)
