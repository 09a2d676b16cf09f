"""What fl.Hidden refuses, in words: bad input, a workspace that is too small, labels out of range."""

from functools import partial

import pytest
import torch
from helpers import (
    labels_for,
    least_workspace,
)
from hidden_calls import (
    both_sides,
    cases,
    frozen_head,
    two_sources,
)

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")


X, W, Y = torch.zeros(4, 3, 5), torch.zeros(11, 5), torch.zeros(4, 3, dtype=torch.long)
H, ASKS = fl.Hidden(X, W), fl.Hidden(X.clone().requires_grad_(), W)
ALL = fl.Hidden(X.clone().requires_grad_(), W.clone().requires_grad_())
Hidden, stats = fl.Hidden, partial(fl.token_stats, shift=False)


def dpo(policy, labels, ref=None, **options):
    return fl.dpo_loss(policy, labels, ref, shift=False, **options)


BAD = [
    (lambda: stats(Hidden(torch.zeros(4, 3, 11), W), Y), r"policy: .*\[4, 3, 11\].*looks like logits: pass them as fl.Logits"),
    (lambda: stats(H, Y, Hidden(torch.zeros(4, 3, 11), W)), r"ref: .*looks like logits"),
    (lambda: stats(Hidden(X, W.T), Y), r"policy: .*weight looks transposed: pass weight.T"),
    (lambda: stats(H, Y, Hidden(X, W.T)), r"ref: .*weight looks transposed"),
    (lambda: Hidden(X, W[:0]), r"weight: has no elements, shape \[0, 5\].*GatheredParameters"),
    (lambda: Hidden(X, torch.zeros(0)), r"weight: has no elements"),
    (lambda: Hidden(X, W.flatten()), r"weight: expected 2 dimensions, got shape \[55\]"),
    (lambda: Hidden(X, W.long()), "weight: expected float32"),
    (lambda: Hidden(X.tolist(), W), "hidden: expected a tensor, got list"),
    (lambda: Hidden(X, W.to_sparse()), "weight: expected a dense tensor"),
    (lambda: stats(Hidden(X[..., :4], W), Y), r"policy: expected hidden \[..., 5\].*got \[4, 3, 4\]"),
    (lambda: stats(H, Y, Hidden(X[..., :4], W)), r"ref: expected hidden \[..., 5\].*got \[4, 3, 4\]"),
    (lambda: dpo(H, Y, Hidden(X[..., :4], W)), r"ref: expected hidden \[..., 5\]"),
    (lambda: dpo(Hidden(X[..., :4], W), Y, H, plan="row_blocks"), r"policy: expected hidden \[..., 5\]"),
    (lambda: stats(Hidden(X, W, W[:7, 0]), Y), r"policy: expected bias \[11\].*got \[7\]"),
    (lambda: stats(H, Y, Hidden(X, W, W[:7, 0])), r"ref: expected bias \[11\]"),
    (lambda: Hidden(X, W, W), r"bias: expected 1 dimensions"),
    (lambda: stats(Hidden(X, W, lora=(W[:2, :4], W[:, :2])), Y), r"policy: expected lora a \[r, 5\] and b \[11, r\]"),
    (lambda: stats(H, Y, Hidden(X, W, lora=(W[:2], W[:, :3]))), r"ref: expected lora a .*got \[2, 5\] and \[11, 3\]"),
    (lambda: Hidden(X, W, lora=(W[:2], W[:, :2], "1")), "lora scaling: expected a number, got '1'"),
    (lambda: Hidden(X, W, valid_vocab=12), r"valid_vocab: expected an int in \[1, 11\]"),
    (lambda: Hidden(X, W, softcap=0), "softcap: expected a finite number > 0"),
    (lambda: Hidden(X, W, process_group=object()), "process_group: torch.distributed is not initialised"),
    (lambda: stats(H, Y, Hidden(X, torch.zeros(12, 5)), divergence="js"), "ref: .*vocabulary of 11, got 12.*fl.Hidden.*valid"),
    (lambda: stats(H, Y, torch.zeros(4, 3, 12), divergence="js"), "ref: .*vocabulary of 11, got 12.*fl.Logits.*valid_vocab"),
    (lambda: fl.tdpo_loss(H, Y, Hidden(X, torch.zeros(12, 5)), shift=False), "ref: expected the policy's vocabulary of 11"),
    (lambda: stats(H, Y[:2]), r"policy: expected hidden \[2, 3, H\] for labels \[2, 3\], got \[4, 3, 5\]"),
    (lambda: stats(H, Y, Hidden(X[:2], W)), r"ref: expected hidden \[4, 3, H\]"),
    (lambda: stats(H, Y, divergence="js"), "divergence: 'js' needs ref as fl.Hidden or logits, got None"),
    (lambda: stats(H, Y, fl.LogProbs(X[..., 0]), divergence="js"), "got fl.LogProbs"),
    (lambda: stats(H, Y, fl.LogProbs(X)), r"ref: expected fl.LogProbs \[4, 3\]"),
    (lambda: stats(H, Y, workspace=8), r"workspace: expected at least \d+ bytes, for 11 logits of one row, got 8"),
    (lambda: stats(ASKS, Y, plan="frozen_head", workspace=8), r"workspace: expected at least \d+ bytes.*got 8$"),
    (lambda: dpo(ASKS, Y, plan="row_blocks", workspace=8),
     r"plan: 'row_blocks' is not possible here: .*unit takes \d+ bytes of 8"),
    (lambda: stats(H, Y, workspace=1e9), "workspace: expected a number of bytes >= 1, got 1000000000.0"),
    (lambda: stats(H, Y, workspace="1"), "workspace: expected a number of bytes >= 1, got '1'"),
    (lambda: stats(H, Y, workspace=0), "workspace: expected a number of bytes >= 1, got 0"),
    (lambda: stats(H, Y, workspace=True), "workspace: expected a number of bytes >= 1, got True"),
    (lambda: dpo(H, Y, workspace=-5), "workspace: expected a number of bytes >= 1, got -5"),
    (lambda: stats(H, Y, plan="fast"), "plan: expected one of auto, .*vocab_chunks.*, got 'fast'"),
    (lambda: dpo(H, Y, plan="fast"), "plan: expected one of auto, .*vocab_chunks.*, got 'fast'"),
    (lambda: stats(ASKS, Y, plan="row_blocks"), "plan: 'row_blocks' is not possible here: it is for losses that are reduced"),
    (lambda: stats(ALL, Y, plan="frozen_head"), "plan: 'frozen_head' is not possible here: .*head.*no gradient"),
    (lambda: stats(ASKS, Y, plan="on_chip"), "plan: 'on_chip' is not possible here: it is a Triton kernel"),
    (lambda: stats(ASKS, Y, plan="keep_logits", workspace=50), "plan: 'keep_logits' is not possible here: .* bytes of 50"),
    (lambda: stats(X, Y, plan="vocab_chunks"), "plan, workspace, static_shapes: are for fl.Hidden sources, got logits"),
    (lambda: stats(X, Y, workspace=9), "plan, workspace, static_shapes: are for fl.Hidden"),
    (lambda: dpo(X, Y, static_shapes=True), "plan, workspace, static_shapes: are for fl.Hidden"),
    (lambda: stats(ASKS, Y, inplace_backward=True), "inplace_backward: is for logits on both sides"),
    (lambda: dpo(ASKS, Y, inplace_backward=True), "inplace_backward: is for logits on both sides"),
    (lambda: stats(torch.zeros(4, 3, 11), Y, H, inplace_backward=True), "inplace_backward: is for logits on both sides"),
    (lambda: stats(H, Y - 1), r"labels: expected ids in \[0, 11\)"),
    (lambda: stats(H, Y + 11, plan="vocab_chunks"), r"labels: expected ids in \[0, 11\).*got 11"),
    (lambda: dpo(ASKS, Y + 11, plan="row_blocks"), r"labels: expected ids in \[0, 11\).*got 11"),
    (lambda: stats(H, Y.to("meta")), "policy: expected hidden on meta as the labels are, got cpu"),
    (lambda: stats(Hidden(X, W.to("meta")), Y), "policy: expected weight on cpu as hidden is, got meta"),
    (lambda: stats(H, Y, Hidden(X, W, W[:, 0].to("meta"))), "ref: expected bias on cpu as hidden is, got meta"),
    (lambda: stats(Hidden(X, W, lora=(W[:2], W[:, :2].to("meta"))), Y), "policy: expected lora b on cpu"),
    (lambda: stats(H, Y, Hidden(X.to("meta"), W.to("meta"))), "ref: expected hidden on cpu as the labels are, got meta"),
    (lambda: stats(H.hidden, Y, H, divergence="js"), "ref: expected the policy's vocabulary of 5, got 11"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_gets_words(case, monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    call, words = BAD[case]
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=words):
        call()


@pytest.mark.parametrize("value", ["", "256MiB", "-1", "0", "1e9"])
def test_a_workspace_variable_that_is_no_number(monkeypatch, value):
    monkeypatch.setenv("FUSED_LOSSES_WORKSPACE", value)
    with pytest.raises(ValueError, match="FUSED_LOSSES_WORKSPACE: expected a number of bytes >= 1, got"):
        fl.token_stats(H, Y, shift=False)


def test_the_workspace_variable_counts_and_the_argument_wins(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_WORKSPACE", "8")
    with pytest.raises(ValueError, match="workspace: expected at least .* got 8"):
        fl.token_stats(H, Y, shift=False)
    fl.token_stats(H, Y, workspace=1 << 20, shift=False)
    monkeypatch.setenv("FUSED_LOSSES_WORKSPACE", str(1 << 20))
    fl.token_stats(H, Y, shift=False)


@cases(["auto", "frozen_head", "keep_logits", "vocab_chunks"], ["vocab_chunks"])
def test_the_least_workspace_is_enough(backend, device, plan):
    """What the refusal asks for does."""
    leaves = both_sides((3,), device)
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    policy, ref = two_sources(leaves)
    y = labels_for((3,), 41, device)
    run = lambda bytes: fl.token_stats(policy, y, ref, divergence="js", plan=plan, workspace=bytes, shift=False)  # noqa: E731
    fewest = least_workspace(run)
    run(fewest).logps.sum().backward()
    assert least_workspace(lambda _: run(fewest - 1)) == fewest


@pytest.mark.parametrize("plan", ["vocab_chunks", "keep_logits"])
def test_labels_out_of_range_on_triton(device, monkeypatch, plan):
    """NaN for their rows, and no other row is touched."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton")
    x, weight = torch.randn(3, 5, device=device).requires_grad_(), torch.randn(11, 5, device=device)
    for bad in (11, -7):
        stats = fl.token_stats(fl.Hidden(x, weight), torch.tensor([1, bad, 2], device=device), plan=plan, shift=False)
        assert stats.logps.isnan().tolist() == [False, True, False]
        good = fl.token_stats(fl.Hidden(x, weight), torch.tensor([1, 0, 2], device=device), plan=plan, shift=False)
        assert torch.equal(stats.logps[::2], good.logps[::2])
        (g,) = torch.autograd.grad(stats.logps[::2].sum(), x)
        torch.testing.assert_close(g[::2], torch.autograd.grad(good.logps[::2].sum(), x)[0][::2])


def test_dtensor_is_refused_in_words():
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("no process group to be had")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weight = distribute_tensor(W, init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match=r"weight: got a DTensor; gather it first \(.full_tensor\(\)\)"):
            fl.Hidden(X, weight)
    finally:
        dist.destroy_process_group()
