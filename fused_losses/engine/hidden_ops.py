"""Define the operators for hidden states: schema, fake shapes, autograd. The computation is in plan_chunks.py.

fused_losses::hidden_stats -> hidden_stats_backward
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import backend_module
from ..core import divergences as registry
from ..core.layout import Grads, Problem, effective, saved_rows, stats_dtype
from . import plan_chunks, plan_frozen
from .logits_ops import once_differentiable, operator
from .planner import Facts, choose
from .projection import Inputs, mixed, spread
from .shards import Shard

_SIDE = "Tensor {0}x, Tensor? {0}weight, Tensor? {0}bias, Tensor? {0}a, Tensor? {0}b"
_TENSORS = f"Tensor labels, {_SIDE.format('')}, {_SIDE.format('ref_').replace('Tensor ref_x', 'Tensor? ref_x')}"
_OPTIONS = (
    "float scaling, float ref_scaling, str divergences, bool entropy, bool collision, int ignore_index, int vocab, "
    "float softcap, float multiplier, float ref_softcap, float ref_multiplier, str backend, str plan, int workspace, "
    "bool static_shapes, str group, int first, int total"
)


class Options(NamedTuple):
    """The arguments of the operators that are not tensors, in their order."""

    scaling: float
    ref_scaling: float
    divergences: str
    entropy: bool
    collision: bool
    ignore_index: int
    vocab: int
    softcap: float
    multiplier: float
    ref_softcap: float
    ref_multiplier: float
    backend: str
    plan: str
    workspace: int
    static_shapes: bool
    group: str = ""
    first: int = 0
    total: int = 0

    def problem(self) -> Problem:
        bound = tuple(registry.from_key(key) for key in self.divergences.split(";") if key)
        return Problem(bound, self.entropy, self.collision, False, *self[5:11], self.first)

    @property
    def shard(self) -> Shard:
        return Shard(self.group, self.first, self.total)


def sides(tensors: tuple, options: Options) -> tuple[Inputs, Inputs | None]:
    """Return the tensors of the policy, and of the reference or None."""
    for side, head in (("policy", tensors[2]), ("ref", tensors[7])):
        if head is not None and head.dim() != 2:
            raise RuntimeError(
                f"{side}: the weight has shape {list(head.shape)} in backward: its sharding engine has scattered it after the "
                "forward; call fl.FusedHead as a module inside the engine's forward, so that its hooks gather it again"
            )
    x, weight, bias, a, b = tensors[1:6]
    policy = Inputs(x, weight, bias, a, b, options.scaling)
    x, weight, bias, a, b = tensors[6:11]
    return policy, None if x is None else Inputs(x, weight, bias, a, b, options.ref_scaling)


def sides_of(request) -> tuple[Inputs, Inputs | None]:  # type: ignore[no-untyped-def]
    """Return the tensors of policy and reference of a prepare.Request."""
    return sides(request.tensors, request.options)


def _factors(policy: Inputs, ref: Inputs | None, i: int) -> list[tuple[Any, Any, torch.dtype]]:
    """Return each side that has a head, with one of its factors and the dtype in which the factors are multiplied.

    i: 0 for the hidden states, 1 for the weight.
    """
    sides = [s for s in (policy, ref) if s is not None and s.weight is not None]
    return [(s, s[i], s.x.dtype if mixed(s.x.device) else stats_dtype(s.x)) for s in sides]


def facts_of(
    problem: Problem, policy: Inputs, ref: Inputs | None, rows: int, backend: str, wanted: tuple[bool, ...] | list[bool],
    unit: int = 0, static: bool = False,
) -> Facts:  # fmt: skip
    """Return what the planner needs to know of a call.

    wanted: for each of the ten tensors, in the order of the operator, whether its gradient is needed.
    """
    sums = max(stats_dtype(s.x).itemsize for s in (policy, ref) if s is not None)
    casts = [0, 0]
    for i in (0, 1):
        for s, x, dtype in _factors(policy, ref, i):
            if x.dtype != dtype:
                casts[i] = max(casts[i], s.weight.shape[1] * dtype.itemsize)
    return Facts(
        rows=rows, vocab=problem.vocab, hidden=(policy.hidden, 0 if ref is None else ref.hidden),
        itemsize=min([s.x.dtype.itemsize for s, _, _ in _factors(policy, ref, 0)] or [sums]),
        sums=sums, ref=ref is not None, device=policy.x.device.type, backend=backend,
        bases=problem.entropy + len(plan_frozen.bases(problem)), pair=len(problem.divergences) > 0,
        second=any(d.term is not None for d in problem.divergences),
        frozen_second=any(d.scaling is None for d in plan_frozen.bases(problem)),
        to_hidden=wanted[0], to_head=any(wanted[1:5]), to_weight=wanted[1], to_ref=any(wanted[5:]), unit=unit,
        weight=0 if policy.weight is None else policy.weight.numel(), casts=(casts[0], casts[1]), static=static,
        dense=all(t is None or t.stride(-1) == 1 for s in (policy, ref) if s is not None for t in (s.weight, s.b)),
    )  # fmt: skip


def _call(tensors: tuple, options: Options, wanted: list[bool]) -> plan_chunks.Call:
    problem, (policy, ref) = options.problem(), sides(tensors, options)
    labels = tensors[0]
    facts = facts_of(problem, policy, ref, labels.numel(), options.backend, wanted, static=options.static_shapes)
    plan = choose(facts, options.plan, options.workspace)
    backend = backend_module(options.backend)
    backend.check_labels(options.shard.whole(problem), labels)
    call = plan_chunks.open_call(problem, backend, plan, labels, policy, ref, options.static_shapes)
    return call._replace(shard=options.shard)


def dtype_of(policy: Inputs, ref: Inputs | None) -> torch.dtype:
    """Return the dtype of the statistics."""
    dtypes = {stats_dtype(s.x) for s in (policy, ref) if s is not None}
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _kept_shape(tensors: tuple, options: Options, wanted: list[bool]) -> tuple[int, ...]:
    """Return the shape of what forward keeps for backward in addition to the numbers of the rows.

    It keeps sums in the plan "frozen", all logits in the plan "whole". The rows that count come first.
    """
    problem, rows = options.problem(), tensors[0].numel()
    if options.plan == "frozen":
        return 1 + problem.entropy + len(plan_frozen.bases(problem)), rows, sides(tensors, options)[0].hidden
    if options.plan == "whole":
        return 1 + (tensors[6] is not None and (bool(problem.divergences) or any(wanted[5:]))), rows, problem.vocab
    return 0, 0, 0


def _allocate(tensors: tuple, options: Options, wanted: list[bool]) -> list[Tensor]:
    """Return zeros for logps, ref_logps, lse, entropy [rows], divergences [n, rows], hit, collision, saved and keep.

    keep has the shape that _kept_shape returns.
    """
    labels, ref_x = tensors[0], tensors[6]
    problem, rows = options.problem(), labels.numel()
    dtype = dtype_of(*sides(tensors, options))
    n = len(problem.divergences)

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return labels.new_zeros(shape, dtype=dtype)

    return [
        new(rows), new(rows if ref_x is not None else 0), new(rows), new(rows if problem.entropy else 0), new(n, rows),
        new(rows, dtype=torch.bool), new(rows if problem.collision else 0), new(saved_rows(n), rows),
        new(*_kept_shape(tensors, options, wanted)),
    ]  # fmt: skip


@operator(
    "hidden_stats",
    f"({_TENSORS}, {_OPTIONS}, bool[] wanted) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
def hidden_stats(*args):  # type: ignore[no-untyped-def]
    tensors, options, wanted = args[:11], Options(*args[11:-1]), args[-1]
    call = _call(tensors, options, wanted)
    count, shape = tensors[0].numel(), _kept_shape(tensors, options, wanted)
    # sums start from zero; logits are written before they are read
    keep = (torch.empty if options.plan == "whole" else torch.zeros)(shape, dtype=call.dtype, device=tensors[0].device)
    kept = keep[:, : len(call.labels)]
    if options.plan == "frozen":
        out = plan_frozen.frozen_forward(call, kept)
    else:
        out = plan_chunks.forward(call, kept if options.plan == "whole" else None)
    return (*plan_chunks.spread_out(out, call.rows, count), keep)


@hidden_stats.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    return tuple(_allocate(args[:11], Options(*args[11:-1]), args[-1]))


_GRADS = "Tensor? g_logps, Tensor? g_ref_logps, Tensor? g_lse, Tensor? g_entropy, Tensor? g_div"


def _like(tensors: tuple, wanted: list[bool]) -> list[Tensor]:
    """Return empty gradients: those of logits have the memory layout of the logits, the others are contiguous."""
    kept = torch.preserve_format
    logits = [tensors[i] is None and x is not None for i, x in ((2, tensors[1]), (7, tensors[6]))]
    formats = [kept if logits[0] else torch.contiguous_format] * 5 + [
        kept if logits[1] else torch.contiguous_format
    ] * 5
    given = zip(tensors[1:11], formats, wanted, strict=True)
    return [torch.empty_like(x, memory_format=f) for x, f, flag in given if flag]


@operator(
    "hidden_stats_backward",
    f"({_GRADS}, Tensor logps, Tensor saved, Tensor keep, {_TENSORS}, {_OPTIONS}, bool[] wanted) -> Tensor[]",
)  # fmt: skip
def hidden_stats_backward(*args):  # type: ignore[no-untyped-def]
    """Return the gradients of those of the ten tensors that need one, in their order."""
    grads, (logps, saved, keep), tensors = args[:5], args[5:8], args[8:19]
    options, wanted = Options(*args[19:-1]), args[-1]
    if options.plan == "rows":  # the gradients that forward found are not valid here: compute them again
        options = options._replace(plan="slices")
    if not any(wanted[5:]) and (args[4] is None or not args[4].numel()):
        tensors = (*tensors[:6], *[None] * 5)  # neither w nor the reference's rows are needed
    call = _call(tensors, options, wanted)

    def compact(x: Tensor) -> Tensor:
        return x if call.rows is None else x.index_select(-1, call.rows)

    grads = Grads(*(None if g is None or not g.numel() else compact(g) for g in grads))
    grads = effective(grads, call.shard.whole(call.problem).vocab)
    saved = compact(saved)
    if options.plan == "frozen":
        dx = plan_frozen.frozen_backward(call, keep[:, : len(call.labels)], compact(logps), saved, grads)
        x = tensors[1]
        return [spread(dx, call.rows, tensors[0].numel(), x.dtype).contiguous().view(x.shape)]
    kept = keep[:, : len(call.labels)] if options.plan == "whole" else None
    found = plan_chunks.backward(call, saved, grads, wanted[:5], wanted[5:], kept)
    for i, weight in (
        (0, tensors[2]),
        (3, tensors[2]),
        (5, tensors[7]),
        (8, tensors[7]),
    ):  # x and a are the same on all ranks
        if wanted[i] and weight is not None and (gradient := found[i]) is not None:
            found[i] = options.shard.summed(gradient).to(tensors[i + 1].dtype)  # after the sum: parts may cancel
    return [g for g, flag in zip(found, wanted, strict=True) if flag]


@hidden_stats_backward.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    return _like(args[8:19], args[-1])


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *ctx.options, _ = inputs[11:]
    ctx.save_for_backward(*inputs[:11], output[0], *output[-2:])
    ctx.mark_non_differentiable(*output[-4:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grads, tensors, logps, saved, keep):  # type: ignore[no-untyped-def]
    """Return the gradients of all eleven tensors, None where not wanted."""
    wanted = list(ctx.needs_input_grad[1:11])
    found = iter(hidden_stats_backward(*grads, logps, saved, keep, *tensors, *ctx.options, wanted))
    return [None, *(next(found) if flag else None for flag in wanted)]


def _backward(ctx, *grads):  # type: ignore[no-untyped-def]
    *tensors, logps, saved, keep = ctx.saved_tensors
    return (*_gradients(ctx, grads[:5], tensors, logps, saved, keep), *[None] * (len(ctx.options) + 1))


hidden_stats.register_autograd(_backward, setup_context=_setup)
once_differentiable(hidden_stats_backward, "token_stats")


def log_probs(labels: Tensor, ref: Inputs, options: Options) -> Tensor:
    """Return the reference's log-probs per row, computed in slices of the vocabulary.

    So blocks of rows hold the logits of one model only.
    """
    problem = Problem((), False, False, False, options.ignore_index, options.vocab, *options[9:11], 0.0, 1.0)
    facts = facts_of(problem, ref, None, labels.numel(), options.backend, [False] * 10)
    backend, plan = backend_module(options.backend), choose(facts, "slices", options.workspace)
    call = plan_chunks.open_call(problem, backend, plan, labels, ref, None, options.static_shapes)
    return plan_chunks.spread_out(plan_chunks.forward(call), call.rows, labels.numel())[0]
