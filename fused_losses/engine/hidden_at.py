"""Logits at K tokens of each row: the reading of the ids, and the operator hidden_at for hidden states.

They are x . W[ids], a few rows at a time: the gathered rows of the head take at most BYTES (CACHED_BYTES on a CPU), or what
one row x needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.batch import Batch
from ..core.elementwise import transform_logits
from ..core.inputs import Hidden, Logits
from ..core.layout import stats_dtype
from .operator_args import Layout
from .operators import once_differentiable, operator
from .prepare import inputs_of
from .projection import HiddenSide
from .sides import BothGradients, InputFlags, InputGradients, Inputs, Wanted
from .vocab_parallel import VocabShard, shard_of

BYTES = 64 << 20
CACHED_BYTES = 1 << 20  # on a CPU: what stays in the cache of a core between the gather and the product


class RowIds(NamedTuple):
    """The ids [..., K] of each row of a source. With shift, the last row predicts nothing and has none."""

    ids: Tensor  # 0 where keep is False
    keep: Tensor
    wrong: Tensor  # an id that is not a token
    shift: bool
    shard: VocabShard

    def outputs(self, x: Tensor) -> Tensor:
        """Return numbers at the ids of the output tokens, from those of the rows; NaN where an id is wrong."""
        x = x.masked_fill(self.wrong, float("nan"))
        return x[..., :-1, :] if self.shift else x


def row_ids(source: Logits | Hidden, batch: Batch, ids: Tensor, keep: Tensor) -> RowIds:
    """Return the ids of the rows from those of the output tokens; raise on a CPU for one that is not a token."""
    shard = shard_of(source)
    vocab = shard.total if shard.group else source.vocab
    wrong = keep & ((ids < 0) | (ids >= vocab))
    if ids.is_cpu and not torch.compiler.is_compiling() and wrong.any():
        raise ValueError(f"ids: expected tokens in [0, {vocab}), got {int(ids[wrong][0])}")
    ids = ids.long().masked_fill(~keep | wrong, 0)
    if batch.shift:
        ids, keep, wrong = (pad(x, (0, 0, 0, 1)) for x in (ids, keep, wrong))
    return RowIds(ids, keep, wrong, batch.shift, shard)


def hidden_logits(policy: Hidden, rows: RowIds) -> Tensor:
    """Return the logits [..., K] of hidden states at the ids of the rows, 0 where keep is False."""
    args = HiddenAtArgs(
        ids=rows.ids,
        keep=rows.keep,
        softcap=policy.softcap or 0.0,
        multiplier=policy.multiplier,
        inputs=inputs_of(policy),
        vocab=policy.vocab,
        first=rows.shard.first,
        group=rows.shard.group,
    )
    return HIDDEN_AT_RESULT.unpack(hidden_at(*HIDDEN_AT.pack(args))).logits


class HiddenAtArgs(NamedTuple):
    """The arguments of hidden_at."""

    ids: Tensor
    keep: Tensor
    softcap: float
    multiplier: float
    inputs: Inputs
    vocab: int  # of this rank
    first: int = 0  # the id of its first token
    group: str = ""  # the ranks that share the vocabulary

    @property
    def shard(self) -> VocabShard:
        return VocabShard(self.group, self.first)


class HiddenAt(NamedTuple):
    """What hidden_at returns."""

    logits: Tensor  # [..., K]
    slope: Tensor  # their derivatives by the products, of a shape that broadcasts to [rows, K]


class HiddenAtBackwardArgs(NamedTuple):
    """The arguments of hidden_at_backward."""

    g: Tensor
    slope: Tensor
    call: HiddenAtArgs
    wanted: Wanted


class _SavedHiddenAt(NamedTuple):
    """What the forward saves for backward."""

    call: HiddenAtArgs
    slope: Tensor


HIDDEN_AT = Layout(HiddenAtArgs)
HIDDEN_AT_RESULT = Layout(HiddenAt)
HIDDEN_AT_BACKWARD = Layout(HiddenAtBackwardArgs)
SAVED_HIDDEN_AT = Layout(_SavedHiddenAt)


class _Gathered:
    """The rows of hidden states and the rows of the head that they are multiplied with, block by block."""

    def __init__(self, args: HiddenAtArgs):
        self.side = HiddenSide(args.inputs.hidden_operand(), None)
        ids, keep = (x.reshape(-1, x.shape[-1]) for x in (args.ids, args.keep))
        if args.group:  # entries of other ranks are theirs
            ids = ids - args.first
            keep = keep & (ids >= 0) & (ids < args.vocab)
            ids = ids.masked_fill(~keep, 0)
        self.ids, self.keep = ids, keep
        self.counts = keep.any(-1, keepdim=True)  # other rows may hold any value

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield a slice of the rows, (x, x A') [rows, H + rank], and (W, B) at their ids [rows, K, H + rank]."""
        side, (n, k) = self.side, self.ids.shape
        heads, states = side.heads(), [side.x] if side.low_rank is None else [side.x, side.low_rank.xa]
        width = sum(w.shape[1] for w in heads)
        room = BYTES if self.ids.is_cuda else CACHED_BYTES
        for first in range(0, n, step := max(1, room // max(1, k * width * side.sums.itemsize))):
            r = slice(first, min(n, first + step))
            x = _joined([t[r].to(side.sums) for t in states])
            flat = self.ids[r].reshape(-1)
            gathered = _joined([w.index_select(0, flat).to(side.dtype).to(side.sums) for w in heads])
            yield r, x.masked_fill(~self.counts[r], 0), gathered.view(-1, k, width)


def _joined(parts: list[Tensor]) -> Tensor:
    """Join tensors along the last dimension, without a copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def logits_of_rows(source: Logits | Hidden, rows: RowIds) -> Tensor:
    """Return the logits [..., K] of a source at the ids of the rows, 0 where keep is False."""
    if isinstance(source, Hidden):
        return hidden_logits(source, rows)
    ids, keep = rows.ids - rows.shard.first, rows.keep
    if rows.shard.group:
        keep = keep & (ids >= 0) & (ids < source.vocab)
    z = source.logits.gather(-1, ids.masked_fill(~keep, 0)).to(stats_dtype(source.logits)).masked_fill(~keep, 0)
    z = _SumOverRanks.apply(z, rows.shard) if rows.shard.group else z
    z = source.softcap * torch.tanh(z / source.softcap) if source.softcap else z
    z = z * source.multiplier if source.factors is None else z * source.multiplier * source.factors.unsqueeze(-1).to(z)
    return z.masked_fill(~rows.keep, 0)


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks of numbers of which each is on one rank. All ranks have the same incoming gradient."""

    @staticmethod
    def forward(ctx, x, shard):  # type: ignore[no-untyped-def]
        return shard.summed(x.clone())

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return g, None


@operator("hidden_at", HIDDEN_AT, HIDDEN_AT_RESULT)
def hidden_at(*values: Any) -> tuple[Tensor, ...]:
    """Compute the logits [..., K] of hidden states [..., H] at ids [..., K], 0 where keep is False."""
    args = HIDDEN_AT.unpack(values)
    ids, keep, bias = args.ids, args.keep, args.inputs.bias
    with torch.autocast(ids.device.type, enabled=False):
        rows = _Gathered(args)
        logits = torch.zeros(rows.ids.shape, dtype=rows.side.sums, device=ids.device)
        for r, x, gathered in rows.blocks():
            torch.bmm(gathered, x.unsqueeze(-1), out=logits[r].unsqueeze(-1))
    if bias is not None:
        logits += bias.to(logits.dtype)[rows.ids]
    if args.group:
        logits = args.shard.summed(logits.masked_fill_(~rows.keep, 0))
    logits, slope = transform_logits(logits, args.softcap, args.multiplier, logits.dtype)
    slope = slope if isinstance(slope, Tensor) else logits.new_full((1, 1), slope)
    return tuple(HIDDEN_AT_RESULT.pack(HiddenAt(logits.view(ids.shape).masked_fill(~keep, 0), slope)))


@hidden_at.register_fake
def _(*values: Any) -> tuple[Tensor, ...]:
    args = HIDDEN_AT.unpack(values)
    logits = args.ids.new_empty(args.ids.shape, dtype=stats_dtype(args.inputs.x))
    slope = logits.new_empty(logits.reshape(-1, logits.shape[-1]).shape if args.softcap else (1, 1))
    return tuple(HIDDEN_AT_RESULT.pack(HiddenAt(logits, slope)))


@operator("hidden_at_backward", HIDDEN_AT_BACKWARD, "Tensor[]")
def hidden_at_backward(*values: Any) -> list[Tensor]:
    """Return the gradients of those tensors that need one, in their order."""
    args = HIDDEN_AT_BACKWARD.unpack(values)
    call, inputs, wanted = args.call, args.call.inputs, args.wanted.policy
    rows = _Gathered(call)
    side, low_rank, width = rows.side, rows.side.low_rank, rows.side.weight.shape[1]
    g = args.g.reshape(rows.ids.shape).to(side.sums).masked_fill(~rows.keep, 0) * args.slope

    def zeros(x: Tensor | None, flag: bool) -> Tensor | None:
        return x.new_zeros(x.shape, dtype=side.sums) if x is not None and flag else None

    tensors = inputs.x, inputs.weight, inputs.bias, inputs.a, inputs.b
    sums = InputGradients(*[zeros(x, flag) for x, flag in zip(tensors, wanted, strict=True)])
    for r, x, gathered in rows.blocks():
        flat = rows.ids[r].reshape(-1)
        if sums.x is not None or sums.a is not None:
            back = torch.bmm(g[r].unsqueeze(1), gathered).squeeze(1)  # at x, and in the last columns at x A'
            at_x, at_low = back[:, :width], back[:, width:] * inputs.scaling
            if sums.x is not None:
                with_low = at_x if low_rank is None else torch.addmm(at_x, at_low, low_rank.a.to(side.sums))
                sums.x.view(-1, width)[r] = with_low
            if sums.a is not None:
                sums.a.addmm_(at_low.T, x[:, :width])
        for out, part in ((sums.weight, x[:, :width]), (sums.b, x[:, width:])):
            if out is not None:
                out.index_add_(0, flat, (g[r].unsqueeze(-1) * part.unsqueeze(1)).view(len(flat), -1))
        if sums.bias is not None:
            sums.bias.index_add_(0, flat, g[r].reshape(-1))
    for shared in (sums.x, sums.a):  # all ranks hold the same states and the same a
        if shared is not None:
            call.shard.summed(shared)
    rounded = [None if s is None or t is None else s.to(t.dtype) for s, t in zip(sums, tensors, strict=True)]
    return args.wanted.chosen(BothGradients(policy=InputGradients(*rounded)))


@hidden_at_backward.register_fake
def _(*values: Any) -> list[Tensor]:
    args = HIDDEN_AT_BACKWARD.unpack(values)
    inputs = args.call.inputs
    tensors = inputs.x, inputs.weight, inputs.bias, inputs.a, inputs.b
    return [x.new_empty(x.shape) for x, flag in zip(tensors, args.wanted.policy, strict=True) if x is not None and flag]


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    result = HIDDEN_AT_RESULT.unpack(output)
    SAVED_HIDDEN_AT.save(ctx, _SavedHiddenAt(HIDDEN_AT.unpack(inputs), result.slope))
    ctx.mark_non_differentiable(result.slope)


def _backward(ctx: Any, g: Tensor, _slope: Tensor) -> tuple:
    saved, needs = SAVED_HIDDEN_AT.saved(ctx), HIDDEN_AT.named(ctx.needs_input_grad)
    wanted = Wanted(policy=InputFlags.of(needs.inputs))
    back = HiddenAtBackwardArgs(g, saved.slope, saved.call, wanted)
    gradients = wanted.placed(hidden_at_backward(*HIDDEN_AT_BACKWARD.pack(back)))
    return tuple(HIDDEN_AT.gradients(inputs=gradients.policy))


hidden_at.register_autograd(_backward, setup_context=_setup)
once_differentiable(hidden_at_backward, "token_stats")
