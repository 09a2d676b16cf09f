"""Compute a loss from sources: every loss is a formula of per-token numbers, which evaluate() computes.

    formula     a function from Tokens to the losses of the units, in plain torch on small tensors
    evaluate    calls token_stats, then the formula; for hidden states in the plan "row_blocks", it computes both block by
                block, and the gradient in the forward (plan_rows.py)

A formula gets all units or only some of them. The loss of a unit must not depend on other units, except for unit="batch".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.batch import Batch, CallOptions
from ..core.divergences import Divergence
from ..core.inputs import Hidden, Logits, LogProbs, Source, TokenStats, as_source, ordinary
from ..core.validation import given_logps
from .explain import add_step, end_call, explaining
from .fused_backward import FusedLossSpec, fused_loss
from .plan_rows import Units
from .prepare import ExecutionOptions, PreparedCall, prepare_call
from .token_stats import apart, check_sources, compute_stats, pack_stats
from .tokens import REF, Formula, Tokens

EACH = {"sequence": 1, "pair": 2, "triple": 3}  # number of sequences in a unit


class FormulaInputs(NamedTuple):
    """What a formula reads in addition to the log-probs.

    Args:
        unit: "token"; "sequence"; "pair": sequences s and B + s of 2B; "triple": s, B + s and 2B + s of 3B; or "batch",
            for a formula that cannot be split.
        divergences: The divergences of each token.
        per_token: Tensors in the shape of the mask, by name.
        per_sequence: Tensors [S], by name.
        collision: Whether log sum_v p_v^2 of each token is needed.
        lse: Whether lse and correct of each token are needed.
    """

    unit: str
    divergences: tuple[Divergence, ...] = ()
    per_token: Mapping[str, Tensor] = {}
    per_sequence: Mapping[str, Tensor] = {}
    collision: bool = False
    lse: bool = False


class Evaluated(NamedTuple):
    """The result of evaluate()."""

    losses: Tensor  # of the units: [S], [B]; for tokens in the shape of the mask, or flat where reduced
    stats: TokenStats
    tokens: Tokens  # of all sequences, without a graph: for metrics


def evaluate(
    formula: Formula, policy: Source, batch: Batch, ref: Source | None, inputs: FormulaInputs, options: CallOptions
) -> Evaluated:
    """Compute the losses of all units, with their graph.

    If the losses are reduced, the gradient may be computed in the forward. Where the time axis is split over the ranks of a
    group, the formula gets all tokens. The returned stats are those of this rank, and so are losses of tokens that are not
    reduced. The inputs per_token are those of this rank, the inputs per_sequence those of all ranks.
    """
    policy, source = as_source("policy", policy), None if ref is None else as_source("ref", ref)
    how = ExecutionOptions(**options.execution)
    if batch.shard.group is not None and how.plan == "row_blocks":
        raise ValueError(
            "plan: 'row_blocks' is not possible here: sequences are split over the ranks of sequence_group"
        )
    if not isinstance(policy, LogProbs):
        source, how = apart(policy, batch, source, inputs.divergences, how)
    summed = inputs.unit != "token" and isinstance(source, LogProbs) and _summed(source, batch, how.static_shapes)
    if isinstance(source, LogProbs) and source.logps.device != batch.labels.device:
        raise ValueError(
            f"ref: expected fl.LogProbs on {batch.labels.device} as the labels are, got {source.logps.device}"
        )
    per_token, per_sequence = (
        {name: ordinary(x) for name, x in numbers.items()} for numbers in (inputs.per_token, inputs.per_sequence)
    )
    inputs = inputs._replace(per_token=per_token, per_sequence=per_sequence)
    if isinstance(policy, Hidden) and (units := _units(policy, batch, inputs.unit, options, how)) is not None:
        call = _request(policy, batch, source, inputs, options, how, units)
        if call is not None and explaining():
            add_step(policy, source, call.plan)
            end_call()
        if call is not None:
            return _with_gradient(formula, batch, source, summed, inputs, options, units, call)
    return _from_stats(formula, policy, batch, source, summed, inputs, options._replace(**how._asdict()))


def _from_stats(
    formula: Formula,
    policy: Logits | Hidden | LogProbs,
    batch: Batch,
    ref: Logits | Hidden | LogProbs | None,
    summed: bool,
    inputs: FormulaInputs,
    options: CallOptions,
) -> Evaluated:
    """Compute the statistics of all tokens, and the formula on them."""
    known = None if summed else ref
    stats = compute_stats(policy, batch, known, inputs.divergences, inputs.collision, options)
    if explaining():
        end_call()

    def flat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(-1)

    tokens = Tokens(
        logps=stats.logps.reshape(-1),
        ref_logps=ref.logps if summed and isinstance(ref, LogProbs) else flat(stats.ref_logps),
        lse=flat(stats.lse) if inputs.lse else None,
        entropy=flat(stats.entropy),
        divergence={name: x.reshape(-1) for name, x in stats.divergence.items()},
        mask=batch.mask.reshape(-1),
        cu_seqlens=batch.cu_seqlens,
        sequences=batch.sequences,
        ref_summed=summed,
        extra={**inputs.per_sequence, **{name: x.reshape(-1) for name, x in inputs.per_token.items()}},
        collision=flat(stats.collision),
        correct=flat(stats.correct) if inputs.lse else None,
    ).whole(batch.shard, tuple(inputs.per_token))
    losses = formula(tokens)
    if inputs.unit == "token" and options.reduction == "none":
        losses = batch.shard.own(losses).reshape(batch.mask.shape)
    return Evaluated(losses, stats, tokens.detached())


def _with_gradient(
    formula: Formula,
    batch: Batch,
    ref: Logits | Hidden | LogProbs | None,
    summed: bool,
    inputs: FormulaInputs,
    options: CallOptions,
    units: Units,
    call: PreparedCall,
) -> Evaluated:
    """Compute the losses in blocks of units, and their gradient in the forward (plan_rows.py)."""
    tokenwise, extra = dict(inputs.per_token), dict(inputs.per_sequence)
    if isinstance(ref, LogProbs):
        (extra if summed else tokenwise)[REF] = ref.logps if summed else given_logps("ref", ref, batch.mask)
    for n, x in tokenwise.items():  # with shift, the last position predicts nothing
        extra[n] = (torch.nn.functional.pad(x, (0, 1)) if batch.shift else x).reshape(-1)
    loss = FusedLossSpec(
        formula=formula,
        plan=call.plan,
        units=units,
        sequences=batch.sequences,
        tokenwise=tuple(tokenwise),
        names=tuple(extra),
        summed=summed,
    )
    losses, out = fused_loss(loss, call.args, batch.cu_seqlens, extra)
    stats = pack_stats(out, call.asks, batch, None if summed else ref, inputs.divergences)
    tokens = loss.tokens(out, call.args.options.spec, extra, call.args.mask, batch.cu_seqlens, batch.sequences)
    if inputs.unit == "token" and options.reduction == "none":
        shape, mask = batch.labels.shape, batch.mask
        losses = losses.view(shape)[..., : mask.shape[-1]] if mask.dim() else losses.view(())
    return Evaluated(losses, stats, tokens.detached())


def _summed(source: LogProbs, batch: Batch, static_shapes: bool) -> bool:
    """Return whether the reference's log-probs are one number per sequence.

    On a rank with as many tokens as there are sequences the shape does not show it; the other ranks of the group decide.
    """
    labels, shard, sequences = batch.labels, batch.shard, batch.sequences
    one_each = source.logps.shape == (sequences,)
    by_shape = one_each and labels.shape != (sequences,)
    if labels.dim() > 1 or static_shapes or shard.group is None:
        return by_shape
    if not shard.any(by_shape, labels.device):
        return False
    if shard.any(not one_each, labels.device):
        raise ValueError(
            f"ref: expected fl.LogProbs [{sequences}] on all ranks of sequence_group, or per token on all, got "
            f"{list(source.logps.shape)} on this one"
        )
    return True


def _units(policy: Hidden, batch: Batch, unit: str, options: CallOptions, how: ExecutionOptions) -> Units | None:
    """Return the units as the plan "row_blocks" needs them, or None where that plan is not possible."""
    asked = how.plan == "row_blocks"
    split = batch.shard.group is not None or policy.process_group is not None
    if split or options.inplace_backward or not (options.reduction != "none" or asked):
        return None
    if torch.compiler.is_compiling() or unit == "batch":
        if asked:
            why = "this loss looks at the whole batch" if unit == "batch" else "torch.compile does not see through it"
            raise ValueError(f"plan: 'row_blocks' is not possible here: {why}")
        return None
    if unit == "token":
        return Units(None)
    if batch.cu_seqlens is None:
        length = batch.labels.shape[1]
        return Units([s * length for s in range(batch.sequences + 1)], EACH[unit])
    if batch.cu_seqlens.is_cpu or asked:
        return Units(batch.cu_seqlens.tolist(), EACH[unit])
    return None  # the offsets are not read on the host


def _request(
    policy: Hidden,
    batch: Batch,
    ref: Logits | Hidden | LogProbs | None,
    inputs: FormulaInputs,
    options: CallOptions,
    how: ExecutionOptions,
    units: Units,
) -> PreparedCall | None:
    """Return the request of the call if its plan is "row_blocks", else None."""
    check_sources(policy, batch.labels, ref, inputs.divergences)
    call = prepare_call(
        policy,
        batch,
        None if isinstance(ref, LogProbs) else ref,
        inputs.divergences,
        options.entropy,
        inputs.collision,
        how,
        max(1, units.longest),
    )
    return call if call.args.options.plan == "row_blocks" else None
