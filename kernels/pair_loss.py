"""Compute masked sequence sums, log-ratios, link, margin and pair term of a preference batch.

    pair_forward    one program for each pair; it also stores dloss/dh of each sequence, so that backward only scales it
    pair_backward   one program for each sequence; it writes the gradient of the sequence to each of its tokens

Sequences are rows of T tokens, or are packed from cu_seqlens[i] to cu_seqlens[i + 1]; chosen first, then rejected.
"""

import triton
import triton.language as tl


@triton.jit
def bounds(Cu, s, tokens, T):
    """Return the first token and the end of sequence s, clipped to the batch for any values in Cu."""
    if Cu is None:
        return s * T, s * T + T
    else:
        first = tl.load(Cu + s).to(tl.int64)
        end = tl.load(Cu + s + 1).to(tl.int64)
        return tl.maximum(first, 0), tl.minimum(end, tokens)


@triton.jit
def sequence_sums(Logp, Ref, Mask, Cu, s, tokens, T, REF_TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the sums of log p and of log p - log q over the tokens where the mask is True.

    With REF_TOKENS the ratio is subtracted token by token, where it is small.
    """
    first, end = bounds(Cu, s, tokens, T)
    policy = tl.zeros([BLOCK], tl.float32)
    ratio = tl.zeros([BLOCK], tl.float32)
    for start in range(first, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        keep = tl.load(Mask + i, mask=i < end, other=0).to(tl.int1) & (i < end)
        logp = tl.load(Logp + i, mask=keep, other=0.0).to(tl.float32)
        policy += logp
        if REF_TOKENS:
            ratio += logp - tl.load(Ref + i, mask=keep, other=0.0).to(tl.float32)
    total = tl.sum(policy)
    h = tl.sum(ratio)
    if not REF_TOKENS:
        h = total
        if Ref is not None:
            h = total - tl.load(Ref + s).to(tl.float32)
    return total, h


@triton.jit
def pair_forward(
    Logp, Ref, Mask, Cu,  # [tokens], [tokens] or [2 B] or None, [tokens], [2 B + 1] or None
    Loss, SeqLogp, SeqRef, Coef,  # [B], [2 B], [2 B], [2 B]: dLoss / dh of each sequence
    tokens, T, beta, link_numbers, term_numbers,
    LINK: tl.constexpr, TERM: tl.constexpr, REF_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute loss = TERM(beta (s(h_chosen) - s(h_rejected))) with h = sum log p - sum log q."""
    b = tl.program_id(0).to(tl.int64)
    pairs = tl.num_programs(0).to(tl.int64)
    policy_w, h_w = sequence_sums(Logp, Ref, Mask, Cu, b, tokens, T, REF_TOKENS, BLOCK)
    policy_l, h_l = sequence_sums(Logp, Ref, Mask, Cu, b + pairs, tokens, T, REF_TOKENS, BLOCK)
    score_w, slope_w = LINK(h_w, *link_numbers)
    score_l, slope_l = LINK(h_l, *link_numbers)
    loss, slope = TERM(beta * (score_w - score_l), *term_numbers)
    tl.store(Loss + b, loss)
    tl.store(SeqLogp + b, policy_w)
    tl.store(SeqLogp + b + pairs, policy_l)
    tl.store(SeqRef + b, policy_w - h_w)
    tl.store(SeqRef + b + pairs, policy_l - h_l)
    tl.store(Coef + b, beta * slope * slope_w)
    tl.store(Coef + b + pairs, -beta * slope * slope_l)


@triton.jit
def pair_backward(
    dLoss, dSeqLogp, dSeqRef, Coef, Mask, Cu,  # incoming [B], [2 B], [2 B], each or None
    dLogp, dRef,  # [tokens], [tokens] or [2 B], each or None
    pairs, tokens, T, REF_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    first, end = bounds(Cu, s, tokens, T)
    g = 0.0
    if dLoss is not None:
        g = tl.load(dLoss + s % pairs) * tl.load(Coef + s)
    g_policy = g + tl.load(dSeqLogp + s) if dSeqLogp is not None else g
    g_ref = tl.load(dSeqRef + s) - g if dSeqRef is not None else -g
    for start in range(first, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        keep = tl.load(Mask + i, mask=i < end, other=0).to(tl.int1)
        if dLogp is not None:
            tl.store(dLogp + i, tl.where(keep, g_policy, 0.0), mask=i < end)
        if REF_TOKENS:
            if dRef is not None:
                tl.store(dRef + i, tl.where(keep, g_ref, 0.0), mask=i < end)
    if not REF_TOKENS:
        if dRef is not None:
            tl.store(dRef + s, g_ref)
