"""Compute with some ids of each token: logits at ids, and a source and labels restricted to the ids that a sampler kept.

From hidden states, only the rows of the head with these ids are read: nothing is multiplied with the whole head.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..core.batch import Batch, CallOptions, token_batch
from ..core.elementwise import FAR
from ..core.inputs import Hidden, Logits, LogProbs, Source, as_source, check_aligned
from ..core.support import Support, padded
from .hidden_at import logits_of_rows, row_ids
from .prepare import ExecutionOptions

__all__ = ["logits_at"]


def logits_at(policy: Source, ids: Tensor) -> Tensor:
    """Compute the logits of given tokens at each position, without the logits of the others.

        z_v = the logit of v after the options of the head (softcap, scale, temperature), for v in ids

    Args:
        policy: fl.Hidden (states [..., H] and the head), or logits [..., V].
        ids: [..., K], int32 or int64; -1 for an entry that is not there, whose logit is 0 without a gradient.

    Returns:
        [..., K] in float32 (float64 for float64). Differentiable once. An id that is not a token raises on a CPU and gives NaN
        elsewhere.

    Raises:
        TypeError, ValueError: If the shapes do not go together.
    """
    source = as_source("policy", policy)
    if not isinstance(ids, Tensor) or ids.dim() == 0:
        raise TypeError(f"ids: expected an integer tensor [..., K], got {getattr(ids, 'shape', type(ids).__name__)}")
    batch = token_batch(torch.zeros_like(ids[..., 0], dtype=torch.long), False, -100)
    found, keep = padded(Support(ids), batch)
    return _logits(source, batch, found, keep)


def _logits(source: Logits | Hidden | LogProbs, batch: Batch, ids: Tensor, keep: Tensor) -> Tensor:
    """Return the logits at ids [..., K], 0 where keep is False."""
    if isinstance(source, LogProbs):
        raise ValueError("policy: fl.LogProbs has no logits; expected fl.Hidden or logits")
    check_aligned("policy", source, batch.labels)
    rows = row_ids(source, batch, ids, keep)
    return rows.outputs(logits_of_rows(source, rows))


def on_support(
    policy: Source, ref: Source | None, batch: Batch, support: object, options: CallOptions
) -> tuple[Source, Batch]:
    """Return the policy as logits [..., K] of the ids that were kept, and the batch with labels among these.

    Both are returned as they are if the support is None. Labels and logits are those of output tokens: the batch has no shift.
    A label that is not among its ids raises on a CPU and gives NaN elsewhere.
    """
    if support is None:
        return policy, batch
    if ref is not None:
        raise ValueError(
            "ref: with support=, expected None: the reference needs the whole vocabulary, in a call of its own"
        )
    if ExecutionOptions(**options.execution) != ExecutionOptions() or options.inplace_backward:
        raise ValueError("plan, workspace, static_shapes, inplace_backward: are for a whole vocabulary, got support=")
    ids, keep = padded(support, batch)
    predicted = batch.predicted[..., :-1] if batch.shift else batch.predicted
    hit = (ids == predicted.unsqueeze(-1)) & keep
    known = hit.any(-1) | ~batch.mask
    if ids.is_cpu and not torch.compiler.is_compiling():
        _check_ids(ids, keep, known, predicted)
    z = _logits(as_source("policy", policy), batch, ids, keep)
    z = z.masked_fill(~keep, -FAR).masked_fill(~known.unsqueeze(-1), float("nan"))
    labels = hit.long().argmax(-1).masked_fill(~batch.mask, batch.ignore_index)
    return Logits(z), replace(batch, labels=labels, shift=False)


def _check_ids(ids: Tensor, keep: Tensor, known: Tensor, labels: Tensor) -> None:
    """Raise where a label is not among the ids of its token, or ids of a token are equal."""
    if not known.all():
        where = (~known).nonzero()[0].tolist()
        raise ValueError(
            f"support: expected the label of each token among its ids; label {int(labels[tuple(where)])} at {where} is not"
        )
    ordered = ids.masked_fill(~keep, -1).sort(-1).values
    equal = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if equal.any():
        where = equal.any(-1).nonzero()[0].tolist()
        raise ValueError(f"support: expected ids that differ from one another, got equal ones at {where}")
