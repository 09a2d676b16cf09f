"""Compute masked sequence sums, log-ratios, link, margin and pair term of a preference batch.

    pair_forward    one program for each pair; it also stores dloss/dh of each sequence, so that backward only scales it
    pair_backward   one program for each sequence; it writes the gradient of the sequence to each of its tokens

Sequences are rows of T tokens, or are packed from cu_seqlens[i] to cu_seqlens[i + 1]; chosen first, then rejected.
"""

import triton
import triton.language as tl


@triton.jit
def bounds(cu_seqlens, tokens, length, s):
    """Return the first token and the end of sequence s, clipped to the batch for any offsets.

    length: of each sequence; -1: cu_seqlens [2 B + 1] has where each starts, and the end.
    """
    first = s * length
    end = first + length
    if length < 0:
        first = tl.maximum(tl.load(cu_seqlens + s).to(tl.int64), 0)
        end = tl.minimum(tl.load(cu_seqlens + s + 1).to(tl.int64), tokens)
    return first, end


@triton.jit
def sequence_sums(logps, ref, mask, s, first, end, REF_TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the sums of log p and of log p - log q over the tokens of a sequence where the mask is True.

    With REF_TOKENS the ratio is subtracted token by token, where it is small.
    """
    policy = tl.zeros([BLOCK], tl.float32)
    ratio = tl.zeros([BLOCK], tl.float32)
    for start in range(first, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        keep = tl.load(mask + i, mask=i < end, other=0).to(tl.int1) & (i < end)
        logp = tl.load(logps + i, mask=keep, other=0.0).to(tl.float32)
        policy += logp
        if REF_TOKENS:
            ratio += logp - tl.load(ref + i, mask=keep, other=0.0).to(tl.float32)
    total = tl.sum(policy)
    h = tl.sum(ratio)
    if not REF_TOKENS:
        h = total
        if ref is not None:
            h = total - tl.load(ref + s).to(tl.float32)
    return total, h


@triton.jit(
    do_not_specialize=["tokens", "length"],
    do_not_specialize_on_alignment=["logps", "ref", "mask", "cu_seqlens"],
)
def pair_forward(
    logps,
    ref,
    mask,
    cu_seqlens,
    tokens,
    length,
    out,
    beta,
    link_params,
    term_params,
    LINK: tl.constexpr,
    TERM: tl.constexpr,
    REF_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute loss = TERM(beta (s(h_chosen) - s(h_rejected))) with h = sum log p - sum log q.

    logps, mask: [tokens]. ref: [tokens], [2 B] or None. cu_seqlens, tokens, length: as in bounds(). out: PairOutputs.
    """
    chosen = tl.program_id(0).to(tl.int64)
    rejected = chosen + tl.num_programs(0).to(tl.int64)
    first, end = bounds(cu_seqlens, tokens, length, chosen)
    logp_chosen, h_chosen = sequence_sums(logps, ref, mask, chosen, first, end, REF_TOKENS, BLOCK)
    first, end = bounds(cu_seqlens, tokens, length, rejected)
    logp_rejected, h_rejected = sequence_sums(logps, ref, mask, rejected, first, end, REF_TOKENS, BLOCK)
    score_chosen, slope_chosen = LINK(h_chosen, *link_params)
    score_rejected, slope_rejected = LINK(h_rejected, *link_params)
    loss, slope = TERM(beta * (score_chosen - score_rejected), *term_params)
    tl.store(out.losses + chosen, loss)
    tl.store(out.seq_logps + chosen, logp_chosen)
    tl.store(out.seq_logps + rejected, logp_rejected)
    tl.store(out.seq_ref + chosen, logp_chosen - h_chosen)
    tl.store(out.seq_ref + rejected, logp_rejected - h_rejected)
    tl.store(out.coef + chosen, beta * slope * slope_chosen)
    tl.store(out.coef + rejected, -beta * slope * slope_rejected)


@triton.jit(
    do_not_specialize=["tokens", "length", "pairs"],
    do_not_specialize_on_alignment=[
        "grad_losses",
        "grad_logps",
        "grad_ref",
        "coef",
        "mask",
        "cu_seqlens",
        "d_logps",
        "d_ref",
    ],
)
def pair_backward(
    grad_losses,
    grad_logps,
    grad_ref,
    coef,
    mask,
    cu_seqlens,
    tokens,
    length,
    d_logps,
    d_ref,
    pairs,
    REF_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradients at the log-probs of one sequence.

    grad_...: those of PairGrads. d_logps: [tokens], or None. d_ref: [tokens], [2 B] or None.
    """
    s = tl.program_id(0).to(tl.int64)
    first, end = bounds(cu_seqlens, tokens, length, s)
    g = 0.0
    if grad_losses is not None:
        g = tl.load(grad_losses + s % pairs) * tl.load(coef + s)
    to_policy = g + tl.load(grad_logps + s) if grad_logps is not None else g
    to_ref = tl.load(grad_ref + s) - g if grad_ref is not None else -g
    for start in range(first, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        keep = tl.load(mask + i, mask=i < end, other=0).to(tl.int1)
        if d_logps is not None:
            tl.store(d_logps + i, tl.where(keep, to_policy, 0.0), mask=i < end)
        if REF_TOKENS:
            if d_ref is not None:
                tl.store(d_ref + i, tl.where(keep, to_ref, 0.0), mask=i < end)
    if not REF_TOKENS:
        if d_ref is not None:
            tl.store(d_ref + s, to_ref)
