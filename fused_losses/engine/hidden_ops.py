"""Define the operators for hidden states: arguments, shapes (fake), autograd. The computation is in the plans.

fused_losses::hidden_stats -> hidden_stats_backward
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import backend_module
from ..core.layout import Grads, StatsSpec, effective, stats_dtype
from . import plan_chunks, plan_frozen
from .operator_args import Layout
from .operators import needs_graph, observed, once, once_differentiable, operator
from .planner import PlanInputs, make_plan
from .projection import mixed, spread
from .sides import BothGradients, InputFlags, InputGradients, Inputs, Wanted
from .stats_outputs import StatsTensors, spread_out, zero_outputs
from .vocab_parallel import VocabShard


class Options(NamedTuple):
    """What is asked for, and how it is computed."""

    spec: StatsSpec
    backend: str
    plan: str
    workspace: int
    static_shapes: bool
    group: str = ""  # of ranks that share the vocabulary; "": none
    total: int = 0  # tokens of the vocabulary of all ranks

    @property
    def shard(self) -> VocabShard:
        return VocabShard(self.group, self.spec.first, self.total)


class HiddenStatsArgs(NamedTuple):
    """The arguments of hidden_stats."""

    labels: Tensor
    policy: Inputs
    ref: Inputs | None
    options: Options
    wanted: Wanted

    @property
    def mask(self) -> Tensor:
        """Return which rows count."""
        return self.labels.reshape(-1) != self.options.spec.ignore_index


class HiddenStats(NamedTuple):
    """What hidden_stats returns."""

    stats: StatsTensors
    keep: Tensor  # what backward needs in addition to the numbers of the rows; those that count come first


class HiddenStatsBackwardArgs(NamedTuple):
    """The arguments of hidden_stats_backward."""

    grads: Grads
    logps: Tensor
    saved: Tensor
    keep: Tensor
    call: HiddenStatsArgs


class _Saved(NamedTuple):
    """What the forward saves for backward."""

    call: HiddenStatsArgs
    logps: Tensor
    saved: Tensor
    keep: Tensor


ARGS = Layout(HiddenStatsArgs)
RESULT = Layout(HiddenStats)
BACKWARD_ARGS = Layout(HiddenStatsBackwardArgs)
_SAVED = Layout(_Saved)


def plan_inputs(
    spec: StatsSpec,
    policy: Inputs,
    ref: Inputs | None,
    rows: int,
    backend: str,
    wanted: Wanted,
    unit: int = 0,
    static: bool = False,
) -> PlanInputs:
    """Return what the planner needs to know of a call."""
    sides = [policy] if ref is None else [policy, ref]
    sums = max([stats_dtype(side.x).itemsize for side in sides])
    row_cast = column_cast = 0
    sizes = []
    for side in sides:
        if side.weight is not None:
            product = side.x.dtype if mixed(side.x.device) else stats_dtype(side.x)
            width = side.weight.shape[1] * product.itemsize
            row_cast = row_cast if side.x.dtype == product else max(row_cast, width)
            column_cast = column_cast if side.weight.dtype == product else max(column_cast, width)
            sizes.append(side.x.dtype.itemsize)
    heads = [x for side in sides for x in (side.weight, side.b) if x is not None]
    bases = plan_frozen.bases(spec)
    return PlanInputs(
        rows=rows,
        vocab=spec.vocab,
        hidden=policy.hidden,
        ref_hidden=0 if ref is None else ref.hidden,
        itemsize=min(sizes) if sizes else sums,
        sums=sums,
        ref=ref is not None,
        device=policy.x.device.type,
        backend=backend,
        bases=spec.entropy + len(bases),
        pair=len(spec.divergences) > 0,
        second=any(d.term is not None for d in spec.divergences),
        frozen_second=any(d.scaling is None for d in bases),
        grad_hidden=wanted.policy.x,
        grad_head=wanted.policy.head,
        grad_weight=wanted.policy.weight,
        grad_ref=wanted.ref.some,
        unit=unit,
        weight=0 if policy.weight is None else policy.weight.numel(),
        row_cast=row_cast,
        column_cast=column_cast,
        static=static,
        dense=all(x.stride(-1) == 1 for x in heads),
    )


def check_gathered(policy: Inputs, ref: Inputs | None) -> None:
    """Raise where a sharding engine has scattered a weight since the forward."""
    for name, side in (("policy", policy), ("ref", ref)):
        if side is not None and side.weight is not None and side.weight.dim() != 2:
            raise RuntimeError(
                f"{name}: the weight has shape {list(side.weight.shape)} in backward: its sharding engine has scattered it "
                "after the forward; call fl.FusedHead as a module inside the engine's forward, so that its hooks gather it "
                "again"
            )


def _compact(args: HiddenStatsArgs) -> plan_chunks.CompactCall:
    """Return the call with its plan, without the rows that are ignored."""
    options, labels = args.options, args.labels
    check_gathered(args.policy, args.ref)
    call = plan_inputs(
        options.spec,
        args.policy,
        args.ref,
        labels.numel(),
        options.backend,
        args.wanted,
        static=options.static_shapes,
    )
    plan = make_plan(call, options.plan, options.workspace)
    backend = backend_module(options.backend)
    backend.check_labels(options.shard.whole(options.spec), labels)
    return plan_chunks.drop_ignored_rows(
        options.spec, backend, plan, labels, args.policy, args.ref, options.static_shapes, options.shard
    )


def _kept_shape(args: HiddenStatsArgs) -> tuple[int, ...]:
    """Return the shape of HiddenStats.keep: sums in the plan "frozen_head", all logits in the plan "keep_logits"."""
    spec, rows = args.options.spec, args.labels.numel()
    if args.options.plan == "frozen_head":
        return plan_frozen.kept_sums(spec), rows, args.policy.hidden
    if args.options.plan == "keep_logits":
        with_ref = args.ref is not None and (bool(spec.divergences) or args.wanted.ref.some)
        return 1 + with_ref, rows, spec.vocab
    return 0, 0, 0


def _computed(args: HiddenStatsArgs) -> HiddenStats:
    plan, call = args.options.plan, _compact(args)
    # sums start from zero; logits are written before they are read
    make = torch.empty if plan == "keep_logits" else torch.zeros
    keep = make(_kept_shape(args), dtype=call.dtype, device=args.labels.device)
    kept = keep[:, : len(call.labels)]
    if plan == "frozen_head":
        out = plan_frozen.frozen_forward(call, kept)
    else:
        out = plan_chunks.forward(call, kept if plan == "keep_logits" else None)
    return HiddenStats(spread_out(out, call.rows, args.labels.numel()), keep)


@operator("hidden_stats", ARGS, RESULT)
def hidden_stats(*values: Any) -> tuple[Tensor, ...]:
    return tuple(RESULT.pack(_computed(ARGS.unpack(values))))


@hidden_stats.register_fake
def _(*values: Any) -> tuple[Tensor, ...]:
    args = ARGS.unpack(values)
    labels, dtype = args.labels, plan_chunks.dtype_of(args.policy, args.ref)
    out = zero_outputs(args.options.spec, labels, labels.numel(), args.ref is not None, dtype)
    keep = labels.new_zeros(_kept_shape(args), dtype=dtype)
    return tuple(RESULT.pack(HiddenStats(spread_out(out, None, labels.numel()), keep)))


def _gradients(args: HiddenStatsBackwardArgs) -> BothGradients:
    asked, wanted = args.call, args.call.wanted
    if asked.options.plan == "row_blocks":  # the gradients that forward computed are not valid here: compute them again
        asked = asked._replace(options=asked.options._replace(plan="vocab_chunks"))
    if not wanted.ref.some and (args.grads.divergence is None or not args.grads.divergence.numel()):
        asked = asked._replace(ref=None)  # neither the reference's logits nor its rows are needed
    call = _compact(asked)

    def compact(x: Tensor) -> Tensor:
        return x if call.rows is None else x.index_select(-1, call.rows)

    grads = Grads(*[None if g is None or not g.numel() else compact(g) for g in args.grads])
    grads = effective(grads, call.shard.whole(call.spec).vocab)
    kept, saved = args.keep[:, : len(call.labels)], compact(args.saved)
    if asked.options.plan == "frozen_head":
        x = asked.policy.x
        dx = plan_frozen.frozen_backward(call, kept, compact(args.logps), saved, grads)
        dx = spread(dx, call.rows, asked.labels.numel(), x.dtype).contiguous().view(x.shape)
        return BothGradients(policy=InputGradients(x=dx))
    gradients = plan_chunks.backward(call, saved, grads, wanted, kept if asked.options.plan == "keep_logits" else None)
    policy = _over_ranks(call.shard, asked.policy, gradients.policy)
    ref = gradients.ref if asked.ref is None else _over_ranks(call.shard, asked.ref, gradients.ref)
    return BothGradients(policy, ref)


@operator("hidden_stats_backward", BACKWARD_ARGS, "Tensor[]")
def hidden_stats_backward(*values: Any) -> list[Tensor]:
    """Return the gradients of those tensors of both sides that need one, in their order."""
    args = BACKWARD_ARGS.unpack(values)
    return args.call.wanted.chosen(_gradients(args))


def _over_ranks(shard: VocabShard, inputs: Inputs, gradients: InputGradients) -> InputGradients:
    """Return the gradients of hidden states and of a, which are the same on all ranks, as sums over the ranks."""

    def summed(gradient: Tensor | None, x: Tensor | None) -> Tensor | None:
        if gradient is None or x is None or inputs.weight is None:
            return gradient
        return shard.summed(gradient).to(x.dtype)  # rounded after the sum: parts may cancel

    return gradients._replace(x=summed(gradients.x, inputs.x), a=summed(gradients.a, inputs.a))


@hidden_stats_backward.register_fake
def _(*values: Any) -> list[Tensor]:
    """Return empty gradients: those of logits have the memory layout of the logits, the others are contiguous."""
    call = BACKWARD_ARGS.unpack(values).call

    def like(side: Inputs | None) -> InputGradients:
        if side is None:
            return InputGradients()
        layout = torch.preserve_format if side.weight is None else torch.contiguous_format
        tensors = side.x, side.weight, side.bias, side.a, side.b
        return InputGradients(*[None if x is None else torch.empty_like(x, memory_format=layout) for x in tensors])

    return call.wanted.chosen(BothGradients(like(call.policy), like(call.ref)))


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _save(ctx, ARGS.unpack(inputs), RESULT.unpack(output))


def _save(ctx: Any, args: HiddenStatsArgs, out: HiddenStats) -> None:
    _SAVED.save(ctx, _Saved(args, out.stats.logps, out.stats.saved, out.keep))
    ctx.mark_non_differentiable(out.stats.hit, out.stats.collision, out.stats.saved, out.keep)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple:
    saved, grad_stats, needs = _SAVED.saved(ctx), RESULT.named(grads).stats, ARGS.named(ctx.needs_input_grad)
    wanted = Wanted(InputFlags.of(needs.policy), InputFlags.of(needs.ref))
    back = HiddenStatsBackwardArgs(
        grads=Grads(grad_stats.logps, grad_stats.ref_logps, grad_stats.lse, grad_stats.entropy, grad_stats.divergence),
        logps=saved.logps,
        saved=saved.saved,
        keep=saved.keep,
        call=saved.call._replace(wanted=wanted),
    )
    found = gradients(back)
    return tuple(ARGS.gradients(policy=found.policy, ref=found.ref))


hidden_stats.register_autograd(_backward, setup_context=_setup)
once_differentiable(hidden_stats_backward, "token_stats")


# ---- the same for calls that nothing observes ------------------------------------------------------------------------


def stats(args: HiddenStatsArgs) -> StatsTensors:
    """Compute the statistics of rows, with their graph."""
    values = ARGS.flat(args)
    tensors = [x for x in values if isinstance(x, Tensor)]
    if observed(*tensors):
        return RESULT.unpack(hidden_stats(*ARGS.pack(args))).stats
    if needs_graph(*tensors):
        return RESULT.named(_HiddenStats.apply(*values)).stats
    return _computed(args).stats


def gradients(args: HiddenStatsBackwardArgs) -> BothGradients:
    """Compute the gradients of those tensors of both sides that need one."""
    wanted = args.call.wanted
    if torch.is_grad_enabled() or observed(*[x for x in BACKWARD_ARGS.flat(args) if isinstance(x, Tensor)]):
        return wanted.placed(hidden_stats_backward(*BACKWARD_ARGS.pack(args)))
    return wanted.placed(wanted.chosen(_gradients(args)))


class _HiddenStats(torch.autograd.Function):
    """The operator without torch's dispatcher; it takes its arguments as they are."""

    @staticmethod
    def forward(ctx, *values):  # type: ignore[no-untyped-def]
        args: HiddenStatsArgs = ARGS.named(values)
        out = _computed(args)
        _save(ctx, args, out)
        return tuple(RESULT.flat(out))

    backward = staticmethod(once("token_stats")(_backward))


def log_probs(labels: Tensor, ref: Inputs, options: Options) -> Tensor:
    """Return the reference's log-probs per row, computed in slices of the vocabulary.

    So blocks of rows hold the logits of one model only.
    """
    both = options.spec
    spec = StatsSpec(
        divergences=(),
        entropy=False,
        collision=False,
        shift=False,
        ignore_index=both.ignore_index,
        vocab=both.vocab,
        softcap=both.ref_softcap,
        multiplier=both.ref_multiplier,
    )
    call = plan_inputs(spec, ref, None, labels.numel(), options.backend, Wanted())
    plan = make_plan(call, "vocab_chunks", options.workspace)
    backend = backend_module(options.backend)
    compact = plan_chunks.drop_ignored_rows(spec, backend, plan, labels, ref, None, options.static_shapes)
    return spread_out(plan_chunks.forward(compact), compact.rows, labels.numel()).logps
