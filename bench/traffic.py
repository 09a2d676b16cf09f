"""The traffic model: bytes that a kernel asks for, counted in Triton's interpreter, against the bytes it cannot avoid.

count() wraps the interpreter's masked load and store, so only lanes whose mask is true count. Run on CPU tensors with
TRITON_INTERPRET=1 set before Triton is imported; `python -m bench static` makes a report.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch


class Bytes:
    """Requested bytes, read and written."""

    def __init__(self) -> None:
        self.read = self.written = 0

    @property
    def total(self) -> int:
        return self.read + self.written


@contextlib.contextmanager
def count() -> Iterator[Bytes]:
    """Counts the loads and stores of every kernel interpreted inside."""
    from triton.runtime.interpreter import InterpreterBuilder

    seen = Bytes()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def width(pointers) -> int:
        return pointers.get_element_ty().primitive_bitwidth // 8

    def counted_load(self, pointers, mask, *args, **kwargs):
        seen.read += int(mask.data.sum()) * width(pointers)
        return load(self, pointers, mask, *args, **kwargs)

    def counted_store(self, pointers, value, mask, *args, **kwargs):
        seen.written += int(mask.data.sum()) * width(pointers)
        return store(self, pointers, value, mask, *args, **kwargs)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
    ):
        yield seen


def measure(
    divergence=None,
    entropy: bool = False,
    ref: bool = True,
    rows: int = 2,
    vocab: int = 50257,
    dtype=torch.float32,
    to_ref: bool = False,
    masked: int = 0,
    collision: bool = False,
) -> tuple[float, float]:
    """Requested / compulsory bytes of the forward and of the backward. Compulsory: each logit of a row that counts read
    once, each gradient written once (ignored rows are written, not read)."""
    import fused_losses as fl

    z = torch.randn(rows, vocab).to(dtype).requires_grad_()
    w = (z.detach() + torch.randn(rows, vocab)).to(dtype) if ref else None
    if w is not None:
        w.requires_grad_(to_ref)
    y = torch.randint(0, vocab, (rows,))
    y[:masked] = -100
    row = vocab * z.element_size()
    live = rows - masked
    with count() as forward:
        stats = fl.token_stats(z, y, w, divergence=divergence, entropy=entropy, collision=collision)
    loss = stats.logps.sum() + sum(d.sum() for d in stats.divergence.values())
    loss = loss + (stats.entropy.sum() if stats.entropy is not None else 0)
    with count() as backward:
        loss.backward()
    reads_ref = ref and divergence is not None
    return (
        forward.total / (row * live * (2 if ref else 1)),
        backward.total / (row * (live * (2 if reads_ref else 1) + rows * (2 if to_ref else 1))),
    )
