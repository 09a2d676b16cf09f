"""A reference that cannot go through one pass with the policy: of another vocabulary, dtype of logits or process_group. Where
no divergence between the two is asked for, each side is gone through on its own."""

from __future__ import annotations

import pytest
import torch
from family_batches import CASES, REF_H, Batch, V
from helpers import doubles, hidden_leaves, labels_for, relative

import fused_losses as fl
from fused_losses.losses import FAMILY

pytestmark = pytest.mark.usefixtures("one_thread")

PLANS = ("auto", "vocab_chunks", "row_blocks", "keep_logits", "frozen_head")
BOTH = [(a, b) for a in ("hidden", "logits") for b in ("hidden", "logits")]
APART = [(name, variant) for name, variant in CASES if FAMILY[name].ref != "unused" and not FAMILY[name].distribution]


@pytest.mark.parametrize(("name", "variant", "more"), [(*case, (-5, 11)[i % 2]) for i, case in enumerate(APART)])
def test_losses(monkeypatch, name, variant, more):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    for packed in (False, True):
        batch = Batch(name, variant, packed, seed=9)
        batch.y = torch.where(batch.y >= V - 5, batch.y - 5, batch.y)  # tokens of both
        batch.ref_weight = torch.randn(V + more, REF_H) * 0.5
        for source, ref in BOTH:
            batch.compare(source, ref)
            batch.compare(source, ref, reduction="none")
        for plan in PLANS:
            try:
                batch.compare("hidden", "hidden", plan=plan)
            except ValueError as refusal:
                assert "is not possible here" in str(refusal)
            batch.compare("hidden", "logits", workspace=1 << 16)
    if not any("per token" in kind for kind in batch.entry.inputs.values()):
        batch = Batch(name, variant, seed=9)
        batch.y = torch.where(batch.y >= V - 5, batch.y - 5, batch.y)
        batch.ref_weight = torch.randn(V + more, REF_H) * 0.5
        batch.compare("hidden", "hidden", shift=True)


@pytest.mark.parametrize("sides", BOTH, ids=str)
@pytest.mark.parametrize("shift", [False, True])
def test_token_stats(backend, device, sides, shift):
    """Every number, and the gradients of both sides."""
    leaves = [
        *hidden_leaves((3, 4), 6, 23, device, bias=False)[:2],
        *hidden_leaves((3, 4), 5, 31, device, bias=False)[:2],
    ]
    y = labels_for((3, 4), 23, device)

    def call(f, leaves, **options):
        made = [
            fl.Hidden(x, head, temperature=t) if kind == "hidden" else fl.Logits(x @ head.T, temperature=t)
            for kind, x, head, t in zip(sides, leaves[::2], leaves[1::2], (0.7, 1.3), strict=True)
        ]
        stats = f.token_stats(made[0], y, made[1], entropy=True, collision=True, shift=shift, **options)
        ratio = (stats.logps - stats.ref_logps).square().sum() + stats.entropy.sum()
        return stats, torch.autograd.grad(ratio, leaves)

    (mine, grads), (true, exact) = call(fl, leaves), call(fl.reference, doubles(leaves))
    for name in ("logps", "ref_logps", "entropy", "collision", "lse"):
        assert relative(getattr(mine, name), getattr(true, name)) <= 1e-5, name
    for g, e in zip(grads, exact, strict=True):
        assert relative(g, e) <= 1e-5


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_logits_of_two_dtypes(backend, device, dtypes):
    z, w = (torch.randn(4, 5, 19, device=device).to(d).requires_grad_() for d in dtypes)
    y = labels_for((4, 5), 19, device)
    mine, true = (
        fl.dpo_loss(z, y, w, shift=False).loss,
        fl.reference.dpo_loss(z.double(), y, w.double(), shift=False).loss,
    )
    assert relative(mine, true) <= 1e-5
    for g, e, x in zip(torch.autograd.grad(mine, (z, w)), torch.autograd.grad(true, (z, w)), (z, w), strict=True):
        assert g.dtype == x.dtype and relative(g, e) <= (2**-7 if x.dtype == torch.bfloat16 else 1e-5)


def test_labels_are_tokens_of_both(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, w, y = torch.randn(4, 3, 9), torch.randn(4, 3, 7), torch.full((4, 3), 8)
    for policy, ref in ((z, w), (w, z)):
        with pytest.raises(ValueError, match=r"labels: expected ids in \[0, 7\).*got 8"):
            fl.dpo_loss(policy, y, ref, shift=False)
    y[:, 1:] = -100
    y[:, 0] = 6
    assert fl.dpo_loss(z, y, w, shift=False).loss.isfinite()


def test_refused_with_a_divergence(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, y = torch.randn(4, 3, 9), torch.zeros(4, 3, dtype=torch.long)
    for call in (
        lambda ref: fl.token_stats(z, y, ref, divergence="js", shift=False),
        lambda ref: fl.tdpo_loss(z, y, ref, shift=False),
        lambda ref: fl.distillation_loss(z, y, ref, shift=False),
        lambda ref: fl.grpo_loss(z, y, torch.ones(4), ref=ref, beta=0.1, kl="reverse_kl", shift=False),
        lambda ref: fl.reference.token_stats(z, y, ref, divergence="js", shift=False),
    ):
        with pytest.raises(
            ValueError, match="ref: expected the policy's vocabulary of 9, got 7; if one side is padded"
        ):
            call(torch.randn(4, 3, 7))
        with pytest.raises(TypeError, match=r"ref: expected torch.float32 as the policy has, got torch.bfloat16"):
            call(z.bfloat16())


@pytest.mark.parametrize("ref", ["hidden", "logits"])
def test_words_name_the_reference(monkeypatch, ref):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, y, x, head = torch.randn(4, 3, 9), torch.zeros(4, 3, dtype=torch.long), torch.randn(4, 2, 5), torch.randn(7, 5)
    other = fl.Hidden(x, head) if ref == "hidden" else x @ head.T
    for policy in (z, fl.LogProbs(z[..., 0])):
        with pytest.raises(ValueError, match=rf"ref: expected {ref} \[4, 3"):
            fl.dpo_loss(policy, y, other, shift=False)


def test_compiles(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    x, head, w = torch.randn(4, 3, 5, requires_grad=True), torch.randn(9, 5), torch.randn(4, 3, 7)
    y = torch.randint(0, 7, (4, 3))
    step = lambda x: fl.dpo_loss(fl.Hidden(x, head), y, w, shift=True).loss  # noqa: E731
    torch._dynamo.reset()
    mine = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(torch.autograd.grad(mine, x), torch.autograd.grad(step(x), x))
    torch._dynamo.reset()
