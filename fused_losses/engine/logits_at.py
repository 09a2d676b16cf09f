"""Compute token_stats and the logits at K tokens of each row, to compare with a teacher's top-k log-probs.

From logits they are gathered, and the gradients of both are one tensor of the logits' size, rounded once. From hidden states
they are x . W[ids], a few rows at a time: the gathered rows of the head take at most BYTES, or what one row x needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..backends import choose
from ..core.elementwise import transform_logits
from ..core.inputs import Hidden, Logits, TokenStats
from ..core.layout import collapse, labels_mask, shifted_labels
from . import logits_ops
from .prepare import How
from .prepare import _inputs as inputs_of
from .projection import HiddenSide, Inputs
from .token_stats import check_sources, pack_stats, token_stats

BYTES = 64 << 20


def stats_at(
    policy: Logits | Hidden, labels: Tensor, ids: Tensor, keep: Tensor, *, entropy: bool = False, shift: bool = False,
    ignore_index: int = -100, inplace_backward: bool = False, **how: Any,
) -> tuple[TokenStats, Tensor]:  # fmt: skip
    """Return token_stats, and the logits [..., K] at ids [..., K] in the dtype of the statistics.

    The head's options (softcap, multiplier) are applied to the logits. keep [..., K]: the entries that count; the others are
    0, and get no gradient. Ids may repeat. An id that is not a token raises on a CPU, and gives NaN elsewhere. A second
    differentiation raises.
    """
    if policy.process_group is not None:
        raise ValueError("process_group: logits at given tokens are not there where the vocabulary is split over ranks")
    check_sources(policy, labels, None, ())
    if isinstance(policy, Logits) and How(**how) != How():
        raise ValueError("plan, workspace, static_shapes: are for fl.Hidden sources, got logits")
    keep = keep & labels_mask(labels, shift, ignore_index).unsqueeze(-1)
    wrong = keep & ((ids < 0) | (ids >= policy.vocab))
    if ids.is_cpu and not torch.compiler.is_compiling() and wrong.any():
        raise ValueError(f"ids: expected tokens in [0, {policy.vocab}), got {int(ids[wrong][0])}")
    ids = ids.long().masked_fill(~keep | wrong, 0)
    if shift:  # the last position predicts nothing
        ids, keep, wrong = (pad(x, (0, 0, 0, 1)) for x in (ids, keep, wrong))
    if isinstance(policy, Hidden):
        given = {"entropy": entropy, "shift": shift, "ignore_index": ignore_index, "inplace_backward": inplace_backward}
        stats = token_stats(policy, labels, **given, **how)  # type: ignore[arg-type]
        z = _HiddenAt.apply(ids, keep, policy.softcap or 0.0, policy.multiplier, *_tensors(inputs_of(policy)))
    else:
        stats, z = _from_logits(policy, labels, ids, keep, entropy, shift, ignore_index, inplace_backward)
    z = z.masked_fill(wrong, float("nan"))
    return stats, z[..., :-1, :] if shift else z


# ---- logits ----------------------------------------------------------------------------------------------------------


def _from_logits(
    policy: Logits,
    labels: Tensor,
    ids: Tensor,
    keep: Tensor,
    entropy: bool,
    shift: bool,
    ignore_index: int,
    inplace: bool,
) -> tuple[TokenStats, Tensor]:
    x, y = policy.logits, shifted_labels(labels, shift, ignore_index)
    x = x if len(collapse(x, 1)) <= 2 else x.contiguous()
    head_options = policy.vocab, policy.softcap or 0.0, policy.multiplier
    problem = "", entropy, False, False, ignore_index, *head_options, 0.0, 1.0, choose(x.device, x.dtype)
    logits_ops.check_plain("token_stats", x)
    logps, lse, ent, hit, z = _LogitsAt.apply(x, y.contiguous(), ids, keep, problem, inplace)
    empty = lse.new_empty((0, lse.numel()))
    found = logps, empty, lse, ent, empty, hit, empty
    return pack_stats(found, (x.requires_grad, False), labels, None, (), entropy, False, shift, ignore_index), z


class _LogitsAt(torch.autograd.Function):
    """Compute log-probs of the labels, lse, entropy and hits [rows], and the logits at ids."""

    @staticmethod
    def forward(ctx, x, labels, ids, keep, problem, inplace):  # type: ignore[no-untyped-def]
        logps, _, lse, entropy, _, hit, _, saved = logits_ops.token_stats(x, labels, None, *problem, inplace)
        counts = (labels != problem[4]).unsqueeze(-1)
        label = labels.long().unsqueeze(-1).clamp(0, problem[5] - 1).masked_fill(~counts, 0)
        ids, keep = torch.cat([ids, label], dim=-1), torch.cat([keep, counts], dim=-1)
        raw = x.gather(-1, ids).to(lse.dtype)
        ctx.problem, ctx.inplace = problem, inplace
        ctx.save_for_backward(x, labels, ids, keep, counts, raw, lse, entropy, saved)
        ctx.mark_non_differentiable(hit)
        ctx.set_materialize_grads(False)
        z = transform_logits(raw[..., :-1], problem[6], problem[7], lse.dtype)[0]
        return logps, lse, entropy, hit, z.masked_fill(~keep[..., :-1], 0)

    @staticmethod
    @logits_ops.once("token_stats")
    def backward(ctx, g_logps, g_lse, g_entropy, _, g_z):  # type: ignore[no-untyped-def]
        """Compute dz_v = g_lse p_v - g_entropy p_v (log p_v + H), and add the incoming gradients at their ids.

        That sum is rounded once.
        """
        x, labels, ids, keep, counts, raw, lse, entropy, saved = ctx.saved_tensors

        def shaped(g):  # type: ignore[no-untyped-def]
            return (torch.zeros_like(lse) if g is None or not g.numel() else g).view(labels.shape).unsqueeze(-1)

        to_label = shaped(g_logps)  # log p(y) = z_y - lse
        to_lse, to_entropy = shaped(g_lse) - to_label, shaped(g_entropy)
        to_ids = torch.zeros_like(raw[..., :-1]) if g_z is None else g_z
        arrived = torch.cat([to_ids, to_label], dim=-1).masked_fill(~keep, 0)

        z, slope = transform_logits(raw, ctx.problem[6], ctx.problem[7], lse.dtype)
        logp = z - lse.view(labels.shape).unsqueeze(-1)
        own = to_lse - to_entropy * (logp + shaped(entropy)) if g_entropy is not None else to_lse
        op = logits_ops.token_stats_backward_ if ctx.inplace else logits_ops.token_stats_backward
        grads = None, None, to_lse.reshape(-1), g_entropy, None
        found = op(*grads, saved, x.detach(), labels, None, *ctx.problem, True, False)
        dz = x.detach() if ctx.inplace else found[0]
        values = (own * logp.exp() + summed(ids, arrived)) * slope
        return dz.scatter_(-1, ids, values.where(counts, 0).to(dz.dtype)), *[None] * 5


def summed(ids: Tensor, x: Tensor) -> Tensor:
    """Sum x [..., K] over equal ids of a row, and return the same sum at each of them."""
    ordered, order = ids.sort(-1)
    group = pad(ordered[..., 1:] != ordered[..., :-1], (1, 0)).cumsum(-1)
    group = torch.empty_like(group).scatter_(-1, order, group)
    return torch.zeros_like(x).scatter_add_(-1, group, x).gather(-1, group)


# ---- hidden states ---------------------------------------------------------------------------------------------------


def _tensors(inputs: Inputs) -> tuple[Any, ...]:
    return inputs.scaling, *inputs[:5]


class _Gathered:
    """The rows of hidden states and the rows of the head that they are multiplied with, block by block."""

    def __init__(self, ids: Tensor, keep: Tensor, inputs: Inputs):
        self.side = HiddenSide(inputs, None)
        self.ids, self.keep = ids.reshape(-1, ids.shape[-1]), keep.reshape(-1, ids.shape[-1])
        self.counts = self.keep.any(-1, keepdim=True)  # other rows may hold any value

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield a slice of the rows, (x, x A') [rows, H + rank], and (W, B) at their ids [rows, K, H + rank]."""
        side, (n, k) = self.side, self.ids.shape
        heads = [w for w in (side.inputs.weight, side.inputs.b) if w is not None]
        width = sum(w.shape[1] for w in heads)
        for first in range(0, n, step := max(1, BYTES // max(1, k * width * side.sums.itemsize))):
            r = slice(first, min(n, first + step))
            x = torch.cat([t[r].to(side.sums) for t in (side.x, side.xa) if t is not None], dim=-1)
            gathered = torch.cat([w[self.ids[r]].to(side.dtype).to(side.sums) for w in heads], dim=-1)
            yield r, x.masked_fill(~self.counts[r], 0), gathered


class _HiddenAt(torch.autograd.Function):
    """Compute the logits [..., K] of hidden states [..., H] at ids [..., K], 0 where keep is False."""

    @staticmethod
    def forward(ctx, ids, keep, softcap, multiplier, scaling, *tensors):  # type: ignore[no-untyped-def]
        with torch.autocast(ids.device.type, enabled=False):
            rows = _Gathered(ids, keep, Inputs._make((*tensors, scaling)))
            z = torch.zeros(rows.ids.shape, dtype=rows.side.sums, device=ids.device)
            for r, x, gathered in rows.blocks():
                torch.bmm(gathered, x.unsqueeze(-1), out=z[r].unsqueeze(-1))
        if tensors[2] is not None:
            z += tensors[2].to(z.dtype)[rows.ids]
        z, slope = transform_logits(z, softcap, multiplier, z.dtype)
        slope = slope if isinstance(slope, Tensor) else torch.full_like(z[:1, :1], slope)
        ctx.scaling = scaling
        ctx.save_for_backward(ids, keep, slope, *tensors)
        return z.view(ids.shape).masked_fill(~keep, 0)

    @staticmethod
    @logits_ops.once("token_stats")
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        ids, keep, slope, *tensors = ctx.saved_tensors
        to_x, to_weight, to_bias, to_a, to_b = wanted = ctx.needs_input_grad[5:]
        rows = _Gathered(ids, keep, Inputs._make((*tensors, ctx.scaling)))
        side, width = rows.side, tensors[1].shape[1]
        g = g.reshape(rows.ids.shape).to(side.sums).masked_fill(~rows.keep, 0) * slope
        sums = [
            t.new_zeros(t.shape, dtype=side.sums) if flag else None for t, flag in zip(tensors, wanted, strict=True)
        ]
        dx, dw, dbias, da, db = sums
        for r, x, gathered in rows.blocks():
            flat = rows.ids[r].reshape(-1)
            if to_x or to_a:
                back = torch.bmm(g[r].unsqueeze(1), gathered).squeeze(1)  # at x, and in the last columns at x A'
                low = back[:, width:] * ctx.scaling
                if dx is not None:
                    dx.view(-1, width)[r] = back[:, :width] if tensors[3] is None else torch.addmm(
                        back[:, :width], low, tensors[3].to(side.sums)
                    )  # fmt: skip
                if da is not None:
                    da.addmm_(low.T, x[:, :width])
            for out, part in ((dw, x[:, :width]), (db, x[:, width:])):
                if out is not None:
                    out.index_add_(0, flat, (g[r].unsqueeze(-1) * part.unsqueeze(1)).view(len(flat), -1))
            if dbias is not None:
                dbias.index_add_(0, flat, g[r].reshape(-1))
        found = (s if s is None else s.to(t.dtype) for s, t in zip(sums, tensors, strict=True))
        return *[None] * 5, *found
