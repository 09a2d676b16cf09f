"""Find the ids of the largest logits of each row, tile by tile: the tokens that a model itself prefers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import backend_module, choose
from ..backends.order import first_of_order
from ..core.inputs import Hidden, Logits, LogProbs, Source, as_source, check_aligned
from ..core.layout import RowFactors, StatsSpec, collapse, stats_dtype
from ..core.moments import fields
from ..core.outputs import TopK
from .explain import add_step, end_call, explaining
from .hidden_ops import Options, plan_inputs
from .operator_args import Layout
from .operators import operator
from .plan_chunks import CompactCall, Tiles, drop_ignored_rows
from .planner import Plan, make_plan, workspace_bytes
from .prepare import inputs_of, is_hidden, spec_of
from .sides import Inputs, Wanted
from .stats_outputs import zero_outputs
from .token_stats import flat_factors
from .vocab_parallel import VocabShard, group_of, shard_of

__all__ = ["topk"]

MOST = 128  # of them one warp holds in registers


class TopArgs(NamedTuple):
    """The arguments of the operator topk."""

    inputs: Inputs
    factors: Tensor | None  # on the logits of each row, where a temperature is a tensor
    options: Options
    k: int
    log_probs: bool


ARGS, RESULT = Layout(TopArgs), Layout(TopK)


def topk(policy: Source, k: int, *, log_probs: bool = False, workspace: int | None = None) -> TopK:
    """Find the k largest logits of each position, and their ids, without the logits of all tokens in memory.

        z = the logits after the options of the head (softcap, scale, temperature)
        values = z_(1) >= ... >= z_(k), or log p of the same tokens

    From hidden states the logits are computed in tiles that fit the workspace, and each tile is read once. The choice has no
    gradient. Values with a gradient, or those of another model at the same ids, are

        ids = fl.topk(policy, k).ids
        z = fl.logits_at(policy, ids)  # log-probs: z - fl.token_stats(policy, labels, shift=False).lse.unsqueeze(-1)

    The order is that of the logits before softcap, scale and temperature, which do not change it. Equal logits are in the order
    of their ids, lowest first, on every backend and for any number of ranks. NaN counts as larger than every number, as in
    torch.topk. Suppressed tokens (-inf) come last.

    Args:
        policy: fl.Hidden (states [..., H] and the head), or logits [..., V]; of a teacher as well. With a process_group the
            result is the same on all its ranks, and ids are those of the whole vocabulary.
        k: how many, from 1 to 128, and at most the number of tokens.
        log_probs: return log-probs, normalised over all tokens, in place of logits. From logits they take one more pass.
        workspace: for hidden states: the bytes that tiles of logits may take. None: FUSED_LOSSES_WORKSPACE, else 256 MiB.

    Returns:
        fl.TopK(values, ids), both [..., k]. k = 1 gives the argmax.

    Raises:
        TypeError, ValueError: If k is no such number, or the source has no logits.
    """
    source = as_source("policy", policy)
    if isinstance(source, LogProbs):
        raise ValueError("policy: fl.LogProbs has no logits; expected fl.Hidden or logits")
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= MOST:
        raise ValueError(f"k: expected an int from 1 to {MOST}, got {k!r}")
    x = source.hidden if isinstance(source, Hidden) else source.logits
    check_aligned("policy", source, x.new_empty(x.shape[:-1], dtype=torch.long))
    if workspace is not None and not is_hidden(source):
        raise ValueError("workspace: is for fl.Hidden sources, got logits")
    shard = shard_of(source)
    vocab = shard.total if shard.group else source.vocab
    if k > vocab:
        raise ValueError(f"k: expected at most the number of tokens, {vocab}, got {k}")
    args = TopArgs(
        inputs=_constants(source),
        factors=flat_factors(source) if isinstance(source, Logits) else None,
        options=_options(source, shard, workspace),
        k=k,
        log_probs=bool(log_probs),
    )
    if explaining():
        add_step(source, None, _plan(args) if is_hidden(source) else None)
        end_call()
    return RESULT.unpack(_topk(*ARGS.pack(args)))


def _constants(source: Logits | Hidden) -> Inputs:
    """Return the tensors of a source without their gradients, logits with rows that lie on two strides."""
    inputs = inputs_of(source)
    tensors: dict[str, Any] = {name: x.detach() for name, x in inputs._asdict().items() if isinstance(x, Tensor)}
    x = tensors["x"]
    if isinstance(source, Logits) and len(collapse(x, 1)) > 2:
        tensors["x"] = x.contiguous()
    return inputs._replace(**tensors)


def _options(source: Logits | Hidden, shard: VocabShard, workspace: int | None) -> Options:
    x = source.hidden if isinstance(source, Hidden) else source.logits
    return Options(
        spec=spec_of(source, None, (), False, False, False, -100, shard.first),
        backend=choose(x.device, x.dtype),
        plan="vocab_chunks",
        workspace=workspace_bytes(workspace),
        static_shapes=True,
        group=shard.group,
        total=shard.total,
    )


def _plan(args: TopArgs) -> Plan:
    """Return the plan, whose tiles have at least as many columns as are to be found."""
    options, rows = args.options, args.inputs.x[..., 0].numel()
    call = plan_inputs(options.spec, args.inputs, None, rows, options.backend, Wanted(), static=True)
    plan = make_plan(call, options.plan, options.workspace)
    return plan._replace(tile=plan.tile._replace(columns=max(args.k, plan.tile.columns)))


@operator("topk", ARGS, RESULT)
def _topk(*packed: Any) -> tuple[Tensor, ...]:
    """Compute the largest values [..., k] and their ids."""
    args = ARGS.unpack(packed)
    options, x, spec = args.options, args.inputs.x, args.options.spec
    lead, dtype, k = x.shape[:-1], stats_dtype(x), min(args.k, spec.vocab)
    labels = x.new_zeros(lead, dtype=torch.long)  # log-probs need none, but the sums are of rows with labels
    values = x.new_empty((labels.numel(), k), dtype=dtype)
    ids = torch.empty_like(values, dtype=torch.long)
    lse = x.new_zeros(labels.numel(), dtype=dtype)
    with torch.autocast(x.device.type, enabled=False):
        if labels.numel() and args.inputs.weight is None and not options.group:
            lse = _from_logits(args, labels, values, ids)
        elif labels.numel():
            lse = _from_tiles(args, labels, values, ids)
        if options.group:
            values, ids = _of_all_ranks(values, ids, args.k, options.group)
    values = transformed(values, spec)
    values = values if args.factors is None else values * args.factors.unsqueeze(-1)
    if args.log_probs:
        values -= lse.unsqueeze(-1)
    return tuple(x.view(*lead, args.k) for x in (values, ids))


@_topk.register_fake
def _(*packed: Any) -> tuple[Tensor, ...]:
    args = ARGS.unpack(packed)
    x = args.inputs.x
    shape = (*x.shape[:-1], args.k)
    return x.new_empty(shape, dtype=stats_dtype(x)), x.new_empty(shape, dtype=torch.long)


def _from_logits(args: TopArgs, labels: Tensor, values: Tensor, ids: Tensor) -> Tensor:
    """Write the largest logits, and return log sum_v exp z_v [rows], or any numbers where no log-probs are wanted."""
    spec, backend = args.options.spec, backend_module(args.options.backend)
    backend.top(spec, args.inputs.x, values, ids, True)
    out = zero_outputs(spec, labels, labels.numel(), False, values.dtype)
    if args.log_probs:
        backend.forward(spec, args.inputs.x, labels, None, out, RowFactors(policy=args.factors))
    return out.lse


def _from_tiles(args: TopArgs, labels: Tensor, values: Tensor, ids: Tensor) -> Tensor:
    """Do what _from_logits() does, with tiles of logits of this rank's part of the vocabulary."""
    options, backend = args.options, backend_module(args.options.backend)
    call: CompactCall = drop_ignored_rows(
        options.spec, backend, _plan(args), labels, args.inputs, None, static_shapes=True, shard=options.shard
    )
    out = zero_outputs(options.spec, call.labels, len(call.labels), False, values.dtype)
    state = values.new_empty((fields(0), len(call.labels)))
    tiles = Tiles(call)
    for c in tiles.columns_of():
        for r in tiles.rows_of():
            part, logits, _ = tiles.load(r, c)
            backend.top(part, logits, values[r], ids[r], c.start == 0)
            if args.log_probs:
                backend.fold(part, logits, call.labels[r], None, state[:, r], c.start == 0)
    if args.log_probs:
        backend.close(call.shard.whole(options.spec), call.shard.merged(options.spec, backend, state), call.labels, out)
    return out.lse


def _of_all_ranks(values: Tensor, ids: Tensor, k: int, name: str) -> tuple[Tensor, Tensor]:
    """Return the k largest of all ranks. A rank with fewer tokens than k fills up with -inf and the id -1."""
    group, missing = group_of(name), (0, k - values.shape[1])
    mine = (
        torch.nn.functional.pad(values, missing, value=float("-inf")),
        torch.nn.functional.pad(ids, missing, value=-1),
    )
    every = [[torch.empty_like(x) for _ in range(dist.get_world_size(group))] for x in mine]
    for parts, x in zip(every, mine, strict=True):
        dist.all_gather(parts, x, group=group)
    values, ids = (torch.cat(parts, dim=1) for parts in every)
    filled = (ids < 0).to(torch.uint8).sort(dim=1, stable=True).indices  # after suppressed tokens, which are -inf, too
    values, ids = values.gather(1, filled), ids.gather(1, filled)
    best = first_of_order(values, k)
    return values.gather(1, best), ids.gather(1, best)


def transformed(x: Tensor, spec: StatsSpec) -> Tensor:
    """Return logits after the options of the head; a suppressed one stays -inf where there is no softcap."""
    x = spec.softcap * torch.tanh(x / spec.softcap) if spec.softcap else x
    return x * spec.multiplier
