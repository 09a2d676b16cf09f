"""Rows of logits that begin at any address: V odd, slices of larger tensors, sides that lie differently."""

import pytest
import torch

import fused_losses as fl

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = 6


def placed(x, offset, stride):
    """A copy of x with rows at this stride, the first one at this offset from an aligned address. Stride 0: column first."""
    if not stride:
        return x.t().contiguous().t()
    made = torch.full((offset + len(x) * stride + 64,), float("nan"), dtype=x.dtype, device=x.device)
    return made[offset:].as_strided(x.shape, (stride, 1)).copy_(x)


def numbers(z, w, y, vocab):
    leaves = [z.detach().requires_grad_(), w.detach().requires_grad_()]
    sides = [fl.Logits(x, valid_vocab=vocab) for x in leaves]
    asked = ["js", "alpha", "forward_kl"]
    s = fl.token_stats(sides[0], y, sides[1], divergence=asked, entropy=True, shift=False)
    found = [s.logps, s.ref_logps, s.lse, s.entropy, *s.divergence.values()]
    total = sum(n.sum() * (i + 1) for i, n in enumerate(found))
    return [n.detach() for n in found], torch.autograd.grad(total, leaves)


@pytest.mark.parametrize(
    ("vocab", "width", "policy", "ref"),
    [
        (2, 2, (0, 2), (0, 2)),  # shorter than what comes before the first aligned column
        (17, 17, (0, 17), (0, 17)),
        (1031, 1031, (0, 1031), (0, 1031)),
        (1031, 1031, (3, 1033), (3, 1033)),  # slices of a larger tensor
        (2063, 2063, (0, 2063), (0, 2064)),  # one side aligned
        (2063, 2063, (0, 2064), (0, 2063)),
        (1031, 1031, (0, 1031), (5, 1031)),  # as far apart in each row, but never aligned together
        (1031, 1031, (0, 1031), (0, 0)),
        (1000, 1031, (0, 1031), (0, 1031)),  # columns beyond the vocabulary
        (1023, 1024, (0, 1032), (0, 1032)),  # a multiple of 8 elements, which is aligned for 2 bytes
        (1023, 1024, (0, 1028), (0, 1028)),  # of 4, which is aligned for 4 bytes only
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_at_any_address(device, monkeypatch, vocab, width, policy, ref, dtype):
    """The same numbers as from rows that are aligned, up to the order of sums; gradients of every column are written."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton")
    z, w = (torch.randn(2, ROWS, width, device=device) * 2).to(dtype)
    y = torch.randint(vocab, (ROWS,), device=device)
    y[0], y[1], y[3] = 0, vocab - 1, -100
    there, gradients = numbers(placed(z, *policy), placed(w, *ref), y, vocab)
    whole = -(-width // 16) * 16
    here, truth = numbers(placed(z, 0, whole), placed(w, 0, whole), y, vocab)
    for a, b in zip(there, here, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-5, atol=3e-6)
    for a, b in zip(gradients, truth, strict=True):
        low = dtype == torch.float16
        torch.testing.assert_close(a, b, rtol=2e-3 if low else 3e-5, atol=2e-3 if low else 3e-6)
        assert not a[3].any() and not a[:, vocab:].any()
