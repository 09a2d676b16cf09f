"""Where kernels read and write: beyond 2^31 elements, on the device of the tensors, rows on the one axis without a limit."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import fused_losses as fl

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("one_thread")
FAR = 1 << 30  # elements between rows: the third row's offset is no int32
ROWS, V, H = 3, 40, 16


def far(x, *strides):
    """A copy of x at these strides, and as much before it, for offsets that wrap around: a wrong number is better than a
    crash. Memory that nobody touches costs nothing."""
    last = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
    try:
        made = torch.empty(2 * FAR + last + 1, dtype=x.dtype)
    except RuntimeError as e:
        pytest.skip(f"needs an address space: {e}")
    return made.as_strided(x.shape, strides, 2 * FAR).copy_(x)


@pytest.fixture
def triton(device, monkeypatch):
    if device.type != "cpu":
        pytest.skip(
            "memory that is not touched is only free on a CPU; a GPU's test is in tests/engine/test_token_stats.py"
        )
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton")


def numbers(z, w, y, **how):
    s = fl.token_stats(z, y, w, divergence=["js", "forward_kl"], entropy=True, collision=True, **how, shift=False)
    return [s.logps, s.ref_logps, s.lse, s.entropy, s.collision, *s.divergence.values()]


def same(mine, truth):
    for a, b in zip(mine, truth, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("strides", [(FAR, 1), (1, FAR // 16)], ids=["row_blocks", "columns"])
def test_logits_far_apart(triton, strides):
    z, w = torch.randn(2, ROWS, V).half()
    y = torch.tensor([1, -100, 39])
    a, b, there = far(z, *strides), far(w, *strides), far(y.int(), FAR)
    same(numbers(a, b, y), numbers(z, w, y))
    same(numbers(a, b, there), numbers(z, w, y))
    leaves = [x.requires_grad_() for x in (a, b, z, w)]
    gradients = [
        torch.autograd.grad(sum(x[::2].sum() for x in numbers(*pair, y)), pair) for pair in (leaves[:2], leaves[2:])
    ]
    same(*gradients)


def test_gradients_written_far_apart(triton):
    z, y = torch.randn(ROWS, V).half(), torch.tensor([1, -100, 39])
    (truth,) = torch.autograd.grad(fl.token_stats(leaf := z.clone().requires_grad_(), y, shift=False).logps.sum(), leaf)
    there = far(z, FAR, 1)
    leaf = there.detach().requires_grad_()
    fl.token_stats(leaf.view_as(leaf), y, inplace_backward=True, shift=False).logps.sum().backward()
    assert torch.equal(there, truth)  # in place of the logits


@pytest.mark.parametrize("static", [False, True])  # rows that count are copied together, but for static shapes
@pytest.mark.parametrize("plan", ["on_chip", "vocab_chunks", "keep_logits"])
def test_heads_far_apart(triton, plan, static):
    x, weight, y = torch.randn(ROWS, H).half(), torch.randn(V, H).half(), torch.tensor([1, -100, 39])
    there = fl.Hidden(far(x, FAR, 1), far(weight, FAR // 16, 1))
    here = fl.Hidden(x, weight)
    with torch.no_grad():
        same(
            numbers(there, there, y, plan=plan, static_shapes=static),
            numbers(here, here, y, plan=plan, static_shapes=static),
        )


KERNELS = Path(fl.__file__).parent / "kernels"
LAUNCHERS = ast.parse((KERNELS / "launch.py").read_text("utf-8"))


@pytest.mark.parametrize("name", ["token_stats", "vocab_chunks", "pair_loss"])
def test_row_numbers_are_wide(name):
    """Those of a tile of logits too, which is as large as the workspace."""
    text = (KERNELS / f"{name}.py").read_text("utf-8")
    assert text.count("tl.program_id(0).to(tl.int64)") == text.count("tl.program_id(") > 0
    assert text.count("tl.num_programs(0).to(tl.int64)") == text.count("tl.num_programs(")


def launches(tree):
    """kernel[grid](...)"""
    return [n.func for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript)]


def test_launches():
    """A grid's second axis ends at 65,535; a kernel runs on the current device, whatever tensors it is given."""
    found = launches(LAUNCHERS)
    assert len(found) >= 9
    for launch in found:
        assert isinstance(launch.slice, ast.Tuple) and len(launch.slice.elts) == 1, ast.unparse(launch)
    guarded = [
        n
        for n in ast.walk(LAUNCHERS)
        if isinstance(n, ast.With) and ast.unparse(n.items[0].context_expr).startswith("on(")
    ]
    assert {id(x) for n in guarded for x in launches(n)} == {id(x) for x in found}
