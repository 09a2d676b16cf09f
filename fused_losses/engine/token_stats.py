"""Define token_stats, the one differentiable primitive.

It checks its input, calls the operator, and reshapes the result.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..backends import choose
from ..core.batch import Batch, CallOptions, token_batch
from ..core.divergences import Asked, Divergence, parse
from ..core.inputs import (
    Hidden,
    Logits,
    LogProbs,
    Source,
    TokenStats,
    as_source,
    check_aligned,
    check_pair,
    unlike,
)
from ..core.layout import RowFactors, collapse, stats_dtype
from ..core.support import Support
from ..core.validation import given_logps
from . import hidden_ops, logits_ops
from .explain import add_step, end_call, explaining
from .operators import check_plain
from .prepare import Asks, ExecutionOptions, is_hidden, prepare_call, spec_of
from .stats_outputs import Outputs
from .support import on_support


def token_stats(
    policy: Source,
    labels: Tensor,
    ref: Source | None = None,
    *,
    divergence: Asked = None,
    entropy: bool = False,
    collision: bool = False,
    support: Support | None = None,
    shift: bool | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    plan: str = "auto",
    workspace: int | None = None,
    static_shapes: bool = False,
) -> TokenStats:
    """Compute log-probs, divergences and entropy per token, from hidden states and head weights or from logits.

        p = softmax(policy), q = softmax(ref)      logps = log p(y)    ref_logps = log q(y)    D(p, q)    H(p)

    From logits, one pass over them computes the outputs and one more the gradient, the only allocation of their size. From
    hidden states, logits are computed in tiles that fit a workspace; logits of all rows never exist. Each output may be
    differentiated on its own, with any incoming gradient. The reference gets a gradient only if one of its tensors requires
    one.

    Args:
        policy: fl.Hidden (states [..., H] and the head), logits [..., V] or fl.Logits with head options, or fl.LogProbs
            [...]. The dtype is float32, float16 or bfloat16, on the torch backend also float64. Strides may be arbitrary.
        labels: token ids [...], of any integer type.
        ref: the reference, given like policy, or None. Policy and reference may be different kinds of source, and H may
            differ. For a divergence both sides must have the same number of valid tokens, the same dtype of logits and the
            same process_group. Without a divergence these may differ too: each side is then computed on its own, and the
            labels must be tokens of both.
        divergence: a name such as "forward_kl" or "js(beta=0.3)", a fl.divergences.get(...), or several of these. None: no
            divergence.
        entropy: also return H(p).
        collision: also return log sum_v p_v^2, which is minus the Renyi entropy of order 2 (WPO, 2406.11827,
            https://arxiv.org/abs/2406.11827). It has no gradient.
        support: an fl.Support: the ids that a sampler kept at each token, over which p is normalised. logps, entropy, lse and
            collision are those of the kept ids, and correct compares the label with these. From hidden states only the rows of
            the head with these ids are read. It takes no ref and no plan. The mass that was kept is e^(logps - logps with
            support), from two calls.
        shift: True: labels [..., T] are the input ids, as for Hugging Face models; position t is scored on label t + 1, and
            outputs are [..., T - 1]. False: labels hold the token that each position predicts. It must be given, except for
            flat labels [N], which are rows without a time axis (shift=True makes them one sequence).
        ignore_index: tokens with this label are ignored and get zero gradient.
        inplace_backward: write the policy's gradient over its logits, whose values are lost.
        plan: for hidden states: "auto", or one of "vocab_chunks", "keep_logits", "frozen_head", "on_chip" (planner.py);
            results do not depend on it.
        workspace: for hidden states: the bytes that tiles of logits may take. None: FUSED_LOSSES_WORKSPACE, else 256 MiB.
        static_shapes: for hidden states: also project rows that are ignored; their states must then be finite. Without it
            these rows are dropped first. For that the host has to read their number, which is a synchronisation that a CUDA
            graph does not allow.

    Raises TypeError or ValueError with the name of the argument. Label ids out of range raise on the torch backend and give
    NaN log-probs on Triton; they never cause a read out of bounds.
    """
    batch = token_batch(labels, shift, ignore_index)
    options = CallOptions(
        entropy=entropy,
        inplace_backward=inplace_backward,
        plan=plan,
        workspace=workspace,
        static_shapes=static_shapes,
    )
    source = None if ref is None else as_source("ref", ref)
    policy, batch = on_support(policy, source, batch, support, options)
    stats = compute_stats(as_source("policy", policy), batch, source, parse(divergence), collision, options)
    if explaining():
        end_call()
    return stats


def compute_stats(
    policy: Logits | Hidden | LogProbs,
    batch: Batch,
    ref: Logits | Hidden | LogProbs | None,
    asked: tuple[Divergence, ...],
    collision: bool,
    options: CallOptions,
) -> TokenStats:
    """Compute token_stats of arguments that are read and checked."""
    how = ExecutionOptions(**options.execution)
    if isinstance(policy, LogProbs):
        if how != ExecutionOptions() and not is_hidden(ref):
            raise ValueError("plan, workspace, static_shapes: are for fl.Hidden sources, got fl.LogProbs")
        if asked or options.entropy or collision or options.inplace_backward:
            raise ValueError(
                "policy: fl.LogProbs has no distribution: divergence, entropy, collision and inplace_backward need "
                "fl.Hidden or logits"
            )
        logps = given_logps("policy", policy, batch.mask)
        if isinstance(ref, Logits | Hidden):
            ref = _alone(ref, batch, how)
        ref_logps = None if ref is None else given_logps("ref", ref, batch.mask)
        return TokenStats(logps, ref_logps, divergence={}, entropy=None, lse=None, mask=batch.mask, correct=None)

    ref, how = apart(policy, batch, ref, asked, how)
    check_sources(policy, batch.labels, ref, asked)
    if isinstance(policy, Hidden) or isinstance(ref, Hidden) or is_hidden(policy, ref):
        if options.inplace_backward:
            raise ValueError(
                "inplace_backward: is for logits on both sides; from hidden states there are none to write over"
            )
        return _from_hidden(policy, batch, ref, asked, options.entropy, collision, how)
    if how != ExecutionOptions():
        raise ValueError("plan, workspace, static_shapes: are for fl.Hidden sources, got logits")
    return _from_logits(policy, batch, ref, asked, options.entropy, collision, options.inplace_backward)


def check_sources(
    policy: Logits | Hidden, labels: Tensor, ref: Logits | Hidden | LogProbs | None, asked: tuple[Divergence, ...]
) -> None:
    """Check shapes, devices and vocabularies of both sides."""
    check_aligned("policy", policy, labels)
    if isinstance(ref, Logits | Hidden):
        check_aligned("ref", ref, labels)
        check_pair(policy, ref)
    elif asked:
        got = "None" if ref is None else "fl.LogProbs"
        hint = (
            ""
            if ref is None
            else "; its states are fl.at_head(reference, lambda q: q, **inputs).out, under torch.no_grad()"
        )
        raise ValueError(f"divergence: {asked[0].key!r} needs ref as fl.Hidden or logits, got {got}{hint}")


def _from_logits(
    policy: Logits,
    batch: Batch,
    ref: Logits | LogProbs | None,
    asked: tuple[Divergence, ...],
    entropy: bool,
    collision: bool,
    inplace: bool,
) -> TokenStats:
    with_head, labels = ref if isinstance(ref, Logits) else None, batch.labels
    ref_logits = None if with_head is None else with_head.logits
    tensors = [policy.logits, *([] if ref_logits is None else [ref_logits]), labels.unsqueeze(-1)]
    if labels.numel() and any(len(collapse(x, 1)) > 2 for x in tensors):
        if inplace:
            raise ValueError("inplace_backward: expected logits whose rows lie on two strides; make them contiguous")
        return _stack(policy, batch, ref, asked, entropy, collision)
    if inplace and 0 in policy.logits.stride():
        raise ValueError("inplace_backward: expected logits that own their memory, got an expanded (stride 0) view")
    check_plain("token_stats", policy.logits, ref_logits)
    if explaining():
        add_step(policy, ref, None)
        return _zeros(batch, asked, entropy, collision)
    args = logits_ops.TokenStatsArgs(
        policy=policy.logits,
        labels=labels,
        ref=ref_logits,
        spec=spec_of(policy, with_head, asked, entropy, collision, batch.shift, batch.ignore_index),
        backend=choose(policy.logits.device, policy.logits.dtype),
        inplace_backward=inplace,
        factors=RowFactors(flat_factors(policy), flat_factors(with_head)),
    )
    asks = Asks(policy.logits.requires_grad, ref_logits is not None and ref_logits.requires_grad)
    return pack_stats(logits_ops.stats(args), asks, batch, ref, asked)


def flat_factors(source: Logits | None) -> Tensor | None:
    """Return the factors [rows] of the rows of logits, if they have some."""
    factors = None if source is None else source.factors
    return (
        None if source is None or factors is None else factors.reshape(-1).to(stats_dtype(source.logits)).contiguous()
    )


def _from_hidden(
    policy: Logits | Hidden,
    batch: Batch,
    ref: Logits | Hidden | LogProbs | None,
    asked: tuple[Divergence, ...],
    entropy: bool,
    collision: bool,
    how: ExecutionOptions,
) -> TokenStats:
    distribution = None if isinstance(ref, LogProbs) else ref
    call = prepare_call(policy, batch, distribution, asked, entropy, collision, how)
    if explaining():
        add_step(policy, ref, call.plan)
        return _zeros(batch, asked, entropy, collision)
    out = hidden_ops.stats(call.args).asked(call.args.options.spec, distribution is not None)
    return pack_stats(out, call.asks, batch, ref, asked)


def _zeros(batch: Batch, asked: tuple[Divergence, ...], entropy: bool, collision: bool) -> TokenStats:
    """Return what stands for the statistics of a call that is only explained."""

    def zeros() -> Tensor:
        return torch.zeros_like(batch.mask, dtype=torch.float32)

    return TokenStats(
        logps=zeros(),
        ref_logps=zeros(),
        divergence={d.key: zeros() for d in asked},
        entropy=zeros() if entropy else None,
        lse=zeros(),
        mask=batch.mask,
        correct=torch.zeros_like(batch.mask),
        collision=zeros() if collision else None,
    )


def pack_stats(
    out: Outputs, asks: Asks, batch: Batch, ref: Logits | Hidden | LogProbs | None, asked: tuple[Divergence, ...]
) -> TokenStats:
    """Return TokenStats in the shape of the labels from the statistics of all rows.

    Outputs that depend on no tensor that asks for a gradient have no graph.
    """

    def shaped(x: Tensor, differentiable: bool = True) -> Tensor:
        x = (x if differentiable else x.detach()).view(batch.labels.shape)
        return x[..., :-1] if batch.shift else x

    ref_logps = given_logps("ref", ref, batch.mask) if isinstance(ref, LogProbs) else None
    values = [] if out.divergence is None else out.divergence.unbind(0)
    return TokenStats(
        logps=shaped(out.logps, asks.policy),
        ref_logps=ref_logps if out.ref_logps is None else shaped(out.ref_logps, asks.ref),
        divergence={d.key: shaped(x) for d, x in zip(asked, values, strict=True)},
        entropy=None if out.entropy is None else shaped(out.entropy, asks.policy),
        lse=shaped(out.lse, asks.policy),
        mask=batch.mask,
        correct=shaped(out.hit),
        collision=None if out.collision is None else shaped(out.collision),
    )


def _stack(
    policy: Logits,
    batch: Batch,
    ref: Logits | LogProbs | None,
    asked: tuple[Divergence, ...],
    entropy: bool,
    collision: bool,
) -> TokenStats:
    """Compute token_stats with one call for each entry of the first dimension.

    This is for rows that lie on more than two strides (a slice of a slice).
    """

    def parts_of(x: Logits | LogProbs | None) -> list:
        if x is None:
            return [None] * len(batch.labels)
        if isinstance(x, LogProbs):
            return [LogProbs(part) for part in x.logps.unbind(0)]
        given = x.temperature
        return [
            replace(x, logits=part, temperature=given[i] if isinstance(given, Tensor) else given)
            for i, part in enumerate(x.logits.unbind(0))
        ]

    parts = [
        _from_logits(p, batch.with_labels(labels), q, asked, entropy, collision, inplace=False)
        for p, labels, q in zip(parts_of(policy), batch.labels.unbind(0), parts_of(ref), strict=True)
    ]
    first = parts[0]

    def joined(name: str) -> Tensor | None:
        return None if getattr(first, name) is None else torch.stack([getattr(p, name) for p in parts])

    divergence = {k: torch.stack([p.divergence[k] for p in parts]) for k in first.divergence}
    names = ("logps", "ref_logps", "entropy", "lse", "mask", "correct", "collision")
    return TokenStats(divergence=divergence, **{n: joined(n) for n in names})  # type: ignore[arg-type]


def apart(
    policy: Logits | Hidden,
    batch: Batch,
    ref: Logits | Hidden | LogProbs | None,
    asked: tuple[Divergence, ...],
    how: ExecutionOptions,
) -> tuple[Logits | Hidden | LogProbs | None, ExecutionOptions]:
    """Return the reference, and the options for computing the call.

    Where the two sides cannot be computed in one pass, and no divergence requires that, the reference is returned as its
    log-probs, computed in a separate pass.
    """
    if asked or not isinstance(ref, Logits | Hidden) or unlike(policy, ref) is None:
        return ref, how
    check_aligned("policy", policy, batch.labels)
    if is_hidden(policy):
        ref_how = how._replace(plan="auto") if is_hidden(ref) else ExecutionOptions()
        return _alone(ref, batch, ref_how), how
    return _alone(ref, batch, how), how if not is_hidden(ref) else ExecutionOptions()


def _alone(ref: Logits | Hidden, batch: Batch, how: ExecutionOptions) -> LogProbs:
    check_aligned("ref", ref, batch.labels)
    return LogProbs(compute_stats(ref, batch, None, (), False, CallOptions(**how._asdict())).logps)
