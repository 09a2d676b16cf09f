"""What float32 loses: float64 code in which every operation rounds as it does in float32, at random."""

from __future__ import annotations

import torch
from helpers import EPS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# They copy numbers, or choose among them.
EXACT = {
    aten.abs, aten.amax, aten.amin, aten.cat, aten.clamp, aten.clamp_min, aten.clamp_max, aten.clone, aten.copy_, aten.gather,
    aten.index, aten.masked_fill, aten.masked_fill_, aten.maximum, aten.minimum, aten.neg, aten.relu, aten.stack, aten.where,
    aten._to_copy,
}  # fmt: skip
SUMS = {aten.sum, aten.mean, aten.mm, aten.bmm}


class RoundedAsFloat32(TorchDispatchMode):
    """Move results of operations in float64 by a rounding of float32, in backward too.

    What an operation in float32 is off by is relative to its result, and where it adds up several numbers, which may cancel,
    to the sum of their sizes: so it is to 1 in a log-prob, whose sum of exponentials is at least 1.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view or func.overloadpacket in EXACT:
            return out
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and x.dtype == torch.float64:
                noise = torch.randn_like(x) * EPS[torch.float32] * _size(func, args, kwargs, x)
                x += noise.masked_fill(~noise.isfinite(), 0)
                if func.overloadpacket is aten._log_softmax:
                    x.clamp_(max=0)
        return out


def _size(func, args, kwargs, out):
    """Return what the rounding error of an operation is relative to."""
    kind = func.overloadpacket
    if kind in SUMS:
        return func(*(x.abs() if isinstance(x, Tensor) else x for x in args), **kwargs)
    if kind in (aten._log_softmax, aten.logsumexp, aten.logaddexp):
        return 1 + out.abs()
    if kind is aten._log_softmax_backward_data:
        grad, logps, dim, *_ = args
        return grad.abs() + logps.exp() * grad.abs().sum(dim, keepdim=True)
    return out.abs()
