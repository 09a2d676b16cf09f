"""Convert fl.Hidden sources to the operators' arguments, and choose the plan of a call."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from ..backends import choose as choose_backend
from ..core.batch import Batch
from ..core.divergences import Divergence
from ..core.inputs import Hidden, Logits, LogProbs
from ..core.layout import StatsSpec
from .hidden_ops import HiddenStatsArgs, Options, plan_inputs
from .operators import check_plain
from .planner import Plan, PlanInputs, choose_plan_kind, make_plan, workspace_bytes
from .sides import InputFlags, Inputs, Wanted
from .vocab_parallel import shard_of


class ExecutionOptions(NamedTuple):
    """The options for computing a call that users pass as plan, workspace and static_shapes."""

    plan: str = "auto"
    workspace: int | None = None
    static_shapes: bool = False


class Asks(NamedTuple):
    """Whether policy and reference ask for a gradient."""

    policy: bool
    ref: bool


class PreparedCall(NamedTuple):
    """A call in the form that the operators take, and what its plan follows from."""

    args: HiddenStatsArgs
    inputs: PlanInputs
    kind: str  # of the plan asked for

    @property
    def plan(self) -> Plan:
        """Return the plan of kind args.options.plan, with its tiles."""
        return make_plan(self.inputs, self.kind, self.args.options.workspace)

    @property
    def asks(self) -> Asks:
        return Asks(self.args.wanted.policy.some, self.args.wanted.ref.some)


def under_autocast(source: Hidden) -> Hidden:
    """Return the source with hidden states in autocast's dtype where autocast is on.

    So the products run in that dtype, as those of a linear layer would. float64 states are not converted.
    """
    device = source.hidden.device.type
    if source.hidden.is_meta or not torch.is_autocast_enabled(device) or source.hidden.dtype == torch.float64:
        return source
    return replace(source, hidden=source.hidden.to(torch.get_autocast_dtype(device)))


def inputs_of(source: Logits | Hidden) -> Inputs:
    """Return the tensors of a source, with hidden states in autocast's dtype."""
    if isinstance(source, Logits):
        return Inputs(source.logits)
    source = under_autocast(source)
    a, b, scaling = source.lora or (None, None, 1.0)
    return Inputs(source.hidden, source.weight, source.bias, a, b, float(scaling))


def spec_of(
    policy: Logits | Hidden,
    ref: Logits | Hidden | None,
    divergences: tuple[Divergence, ...],
    entropy: bool,
    collision: bool,
    shift: bool,
    ignore_index: int,
    first: int = 0,
) -> StatsSpec:
    """Return what is asked for, with the head options of both sides. first: the token of the policy's first column."""
    return StatsSpec(
        divergences=divergences,
        entropy=entropy,
        collision=collision,
        shift=shift,
        ignore_index=ignore_index,
        vocab=policy.vocab,
        softcap=policy.softcap or 0.0,
        multiplier=policy.multiplier,
        ref_softcap=0.0 if ref is None else ref.softcap or 0.0,
        ref_multiplier=1.0 if ref is None else ref.multiplier,
        first=first,
    )


def prepare_call(
    policy: Logits | Hidden,
    batch: Batch,
    ref: Logits | Hidden | None,
    asked: tuple[Divergence, ...],
    entropy: bool,
    collision: bool,
    how: ExecutionOptions,
    unit: int = 0,
) -> PreparedCall:
    """Return the call in the form that the operators take.

    unit: rows of the longest unit where the loss is known; 0: not known.
    """
    for name, source in (("policy", policy), ("ref", ref)):
        if isinstance(source, Logits) and source.factors is not None:
            raise ValueError(f"temperature: of {name}, expected a number beside hidden states, got a tensor")
    labels = batch.predicted
    inputs, ref_inputs = inputs_of(policy), None if ref is None else inputs_of(ref)
    sides = [inputs] if ref_inputs is None else [inputs, ref_inputs]
    check_plain("token_stats", labels, *[x for s in sides for x in (s.x, s.weight, s.bias, s.a, s.b)])
    wanted = Wanted()
    if torch.is_grad_enabled():
        wanted = Wanted(InputFlags.required(inputs), InputFlags.required(ref_inputs))
    double = any(s.x.dtype == torch.float64 for s in sides)
    backend = choose_backend(labels.device, torch.float64 if double else None)
    budget, shard = workspace_bytes(how.workspace), shard_of(policy)
    spec = spec_of(policy, ref, asked, entropy, collision, False, batch.ignore_index, shard.first)
    if shard.group and how.plan in ("row_blocks", "frozen_head"):
        raise ValueError(f"plan: {how.plan!r} is not possible where the vocabulary is split over a process_group")
    call = plan_inputs(spec, inputs, ref_inputs, labels.numel(), backend, wanted, unit, how.static_shapes)
    kind = "vocab_chunks" if shard.group and how.plan == "auto" else how.plan
    options = Options(
        spec=spec,
        backend=backend,
        plan=choose_plan_kind(call, kind, budget).kind,
        workspace=budget,
        static_shapes=how.static_shapes,
        group=shard.group,
        total=shard.total,
    )
    return PreparedCall(HiddenStatsArgs(labels, inputs, ref_inputs, options, wanted), call, kind)


def is_hidden(*sources: Logits | Hidden | LogProbs | None) -> bool:
    """Return whether the operator for hidden states is needed, which also handles split vocabularies."""
    return any(isinstance(s, Hidden) or (isinstance(s, Logits) and s.process_group is not None) for s in sources)
