"""Compute token_stats and the logits at K tokens of each row, to compare with a teacher's top-k log-probs.

From logits they are gathered, and the gradients of both are one tensor of the logits' size, rounded once. From hidden states
they are x . W[ids], a few rows at a time: the gathered rows of the head take at most BYTES, or what one row x needs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..backends import choose
from ..core.batch import Batch, CallOptions
from ..core.elementwise import transform_logits
from ..core.inputs import Hidden, Logits, TokenStats
from ..core.layout import Grads, Outputs, StatsSpec, collapse
from . import logits_ops
from .explain import end_call, explaining
from .hidden_at import logits_of_rows, row_ids
from .operator_args import Layout
from .operators import check_plain, once
from .prepare import Asks, ExecutionOptions, spec_of
from .token_stats import check_sources, compute_stats, pack_stats


def stats_at(
    policy: Logits | Hidden, batch: Batch, ids: Tensor, keep: Tensor, options: CallOptions
) -> tuple[TokenStats, Tensor, Tensor]:
    """Return token_stats, the logits [..., K] at ids [..., K] in the dtype of the statistics, and log sum_v exp z_v [...].

    The head's options (softcap, multiplier) are applied to the logits. keep [..., K]: the entries that count; the others are
    0, and get no gradient. Ids may repeat. An id that is not a token raises on a CPU, and gives NaN elsewhere. A second
    differentiation raises.
    """
    if isinstance(policy, Logits) and policy.factors is not None:
        raise ValueError("temperature: beside top-k from logits, expected a number, got a tensor")
    check_sources(policy, batch.labels, None, ())
    if isinstance(policy, Logits) and ExecutionOptions(**options.execution) != ExecutionOptions():
        raise ValueError("plan, workspace, static_shapes: are for fl.Hidden sources, got logits")
    if explaining():
        compute_stats(policy, batch, None, (), False, options)
        end_call()
    rows = row_ids(policy, batch, ids, keep & batch.mask.unsqueeze(-1))
    if isinstance(policy, Hidden) or rows.shard.group:
        stats = compute_stats(policy, batch, None, (), False, options)
        logits = logits_of_rows(policy, rows)
    else:
        stats, logits = _from_logits(policy, batch, rows.ids, rows.keep, options)
    return stats, rows.outputs(logits), stats.lse  # type: ignore[return-value]


# ---- logits ----------------------------------------------------------------------------------------------------------


def _from_logits(
    policy: Logits, batch: Batch, ids: Tensor, keep: Tensor, options: CallOptions
) -> tuple[TokenStats, Tensor]:
    x, y = policy.logits, batch.predicted
    x = x if len(collapse(x, 1)) <= 2 else x.contiguous()
    spec = spec_of(policy, None, (), options.entropy, False, False, batch.ignore_index)
    check_plain("token_stats", x)
    logps, lse, entropies, hit, saved, logits = _LogitsAt.apply(
        x, y.contiguous(), ids, keep, spec, choose(x.device, x.dtype), options.inplace_backward
    )
    out = Outputs(
        logps=logps,
        ref_logps=None,
        lse=lse,
        entropy=entropies if options.entropy else None,
        divergence=None,
        hit=hit,
        collision=None,
        saved=saved,
    )
    return pack_stats(out, Asks(x.requires_grad, False), batch, None, ()), logits


class _SavedAt(NamedTuple):
    """What _LogitsAt saves for backward."""

    x: Tensor
    labels: Tensor
    ids: Tensor  # followed by the label
    keep: Tensor  # the same
    counts: Tensor  # whether the row counts
    raw: Tensor  # the logits at ids, before the options of the head
    lse: Tensor
    entropy: Tensor
    saved: Tensor
    spec: StatsSpec
    backend: str
    inplace: bool


SAVED_AT = Layout(_SavedAt)


class _LogitsAt(torch.autograd.Function):
    """Compute log-probs of the labels, lse, entropy and hits [rows], and the logits at ids."""

    @staticmethod
    def forward(ctx, x, labels, ids, keep, spec, backend, inplace):  # type: ignore[no-untyped-def]
        args = logits_ops.TokenStatsArgs(x, labels, None, spec, backend, inplace)
        out = logits_ops.STATS.unpack(logits_ops.token_stats(*logits_ops.ARGS.pack(args)))
        counts = (labels != spec.ignore_index).unsqueeze(-1)
        label = labels.long().unsqueeze(-1).clamp(0, spec.vocab - 1).masked_fill(~counts, 0)
        ids, keep = torch.cat([ids, label], dim=-1), torch.cat([keep, counts], dim=-1)
        raw = x.gather(-1, ids).to(out.lse.dtype)
        SAVED_AT.save(
            ctx,
            _SavedAt(x, labels, ids, keep, counts, raw, out.lse, out.entropy, out.saved, spec, backend, inplace),
        )
        ctx.mark_non_differentiable(out.hit, out.saved)
        ctx.set_materialize_grads(False)
        logits = transform_logits(raw[..., :-1], spec.softcap, spec.multiplier, out.lse.dtype)[0]
        return out.logps, out.lse, out.entropy, out.hit, out.saved, logits.masked_fill(~keep[..., :-1], 0)

    @staticmethod
    @once("token_stats")
    def backward(ctx, g_logps, g_lse, g_entropy, _hit, _saved, g_z):  # type: ignore[no-untyped-def]
        """Compute dz_v = g_lse p_v - g_entropy p_v (log p_v + H), and add the incoming gradients at their ids.

        That sum is rounded once.
        """
        s = SAVED_AT.saved(ctx)

        def shaped(g):  # type: ignore[no-untyped-def]
            return (torch.zeros_like(s.lse) if g is None or not g.numel() else g).view(s.labels.shape).unsqueeze(-1)

        to_label = shaped(g_logps)  # log p(y) = z_y - lse
        to_lse, to_entropy = shaped(g_lse) - to_label, shaped(g_entropy)
        to_ids = torch.zeros_like(s.raw[..., :-1]) if g_z is None else g_z
        arrived = torch.cat([to_ids, to_label], dim=-1).masked_fill(~s.keep, 0)

        logits, slope = transform_logits(s.raw, s.spec.softcap, s.spec.multiplier, s.lse.dtype)
        logp = logits - s.lse.view(s.labels.shape).unsqueeze(-1)
        without = to_lse - to_entropy * (logp + shaped(s.entropy)) if g_entropy is not None else to_lse
        back = logits_ops.TokenStatsBackwardArgs(
            grads=Grads(lse=to_lse.reshape(-1), entropy=g_entropy),
            saved=s.saved,
            policy=s.x.detach(),
            labels=s.labels,
            ref=None,
            spec=s.spec,
            backend=s.backend,
            grad_policy=True,
            grad_ref=False,
        )
        if s.inplace:
            logits_ops.token_stats_backward_(*logits_ops.BACKWARD_ARGS.pack(back))
            dz = back.policy
        else:
            (dz,) = logits_ops.token_stats_backward(*logits_ops.BACKWARD_ARGS.pack(back))
        values = (without * logp.exp() + summed(s.ids, arrived)) * slope
        dz = dz.scatter_(-1, s.ids, values.where(s.counts, 0).to(dz.dtype))
        return dz, None, None, None, None, None, None


def summed(ids: Tensor, x: Tensor) -> Tensor:
    """Sum x [..., K] over equal ids of a row, and return the same sum at each of them."""
    ordered, order = ids.sort(-1)
    group = pad(ordered[..., 1:] != ordered[..., :-1], (1, 0)).cumsum(-1)
    group = torch.empty_like(group).scatter_(-1, order, group)
    return torch.zeros_like(x).scatter_add_(-1, group, x).gather(-1, group)
