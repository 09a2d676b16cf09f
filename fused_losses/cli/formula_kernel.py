"""A Triton kernel that computes one formula of a divergence, for verify_divergence. It is imported where Triton runs."""

import torch
import triton
import triton.language as tl

from ..kernels.elementwise import jit

LANES = 64


@triton.jit
def apply_formula(Columns, stride, Out, count, numbers, FORMULA: tl.constexpr, LANES: tl.constexpr):
    at = tl.program_id(0) * LANES + tl.arange(0, LANES)
    mask = at < count
    p = tl.load(Columns + at, mask=mask, other=0.5)
    q = tl.load(Columns + stride + at, mask=mask, other=0.5)
    t = tl.load(Columns + 2 * stride + at, mask=mask, other=0.0)
    lp = tl.load(Columns + 3 * stride + at, mask=mask, other=-0.69314718)
    lq = tl.load(Columns + 4 * stride + at, mask=mask, other=-0.69314718)
    tl.store(Out + at, FORMULA(p, q, t, lp, lq, *numbers), mask=mask)


def computed(formula, columns: torch.Tensor, numbers: tuple[float, ...]) -> torch.Tensor:
    """Compute a formula of a divergence at columns [5, n]: p, q, t, log p, log q."""
    out = torch.empty_like(columns[0])
    grid = (triton.cdiv(out.numel(), LANES),)
    apply_formula[grid](columns, columns.stride(0), out, out.numel(), numbers, FORMULA=jit(formula), LANES=LANES)
    return out
