"""A temperature per row or sequence: the states are divided by it, in losses, statistics and inside a model."""

from dataclasses import replace

import pytest
import torch
from helpers import Judge, hidden_leaves, labels_for, relative

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")

V = 41


@pytest.fixture(autouse=True)
def on_torch(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")


def source(leaves, temperature, **head):
    x, weight, _, a, b = leaves
    return fl.Hidden(x, weight, lora=None if a is None else (a, b, 0.7), temperature=temperature, **head)


@pytest.mark.parametrize("plan", ["auto", "vocab_chunks", "keep_logits"])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("by", ["row", "sequence", "all"])
def test_matches_logits_that_are_divided(by, rank, plan):
    leaves, ref = (
        hidden_leaves((3, 5), 8, V, "cpu", rank=rank, bias=False),
        hidden_leaves((3, 5), 6, V, "cpu", bias=False),
    )
    t = 0.5 + torch.rand({"row": (3, 5), "sequence": (3,), "all": ()}[by])
    y = labels_for((3, 5), V, "cpu")
    w = fl.Hidden(ref[0].detach(), ref[1].detach())

    def ours(leaves):
        how = {"entropy": True, "divergence": "forward_kl", "shift": False, "plan": plan}
        other = fl.Hidden(w.hidden.to(leaves[0].dtype), w.weight.to(leaves[0].dtype))
        return fl.token_stats(source(leaves, t, scale=1.5), y, other, **how)

    def twin(leaves):
        x, weight, _, a, b = leaves
        z = x @ weight.T + (0 if a is None else 0.7 * (x @ a.T) @ b.T)
        each = t.to(x.dtype).view(t.shape + (1,) * (z.dim() - t.dim()))
        other = fl.Hidden(w.hidden.to(x.dtype), w.weight.to(x.dtype))
        return fl.reference.token_stats(1.5 * z / each, y, other, entropy=True, divergence="forward_kl", shift=False)

    judge = Judge(ours, twin, leaves)
    for name in ("logps", "entropy", "lse"):
        judge.value(name, lambda stats, name=name: getattr(stats, name))
    judge.value("kl", lambda stats: stats.divergence["forward_kl"])
    judge.gradients("sum", lambda stats: (stats.logps - stats.entropy + stats.divergence["forward_kl"]).sum())


def test_rows_of_one_temperature_are_a_number():
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(V, 8)
    y = labels_for((6,), V, "cpu")
    each, number = (
        fl.cross_entropy_loss(fl.Hidden(x, weight, temperature=t), y).loss for t in (torch.full((6,), 0.7), 0.7)
    )
    torch.testing.assert_close(each, number)
    gradients = [torch.autograd.grad(loss, x)[0] for loss in (each, number)]
    assert relative(*gradients) <= 1e-6


def test_inside_a_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model, ids, t = LlamaForCausalLM(config), torch.randint(V, (2, 7)), torch.tensor([0.6, 1.3])
    loss = fl.at_head(
        model, lambda p: fl.cross_entropy_loss(replace(p, temperature=t), ids, shift=True).loss, input_ids=ids
    ).out
    z = model(input_ids=ids).logits / t[:, None, None]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(z[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


X, W, B = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(5)
BAD = [
    (lambda: fl.Hidden(X, W, B, temperature=torch.ones(2)), "temperature: a tensor divides the hidden states"),
    (
        lambda: fl.Hidden(X, W, softcap=3.0, temperature=torch.ones(2)),
        "temperature: a tensor divides the hidden states",
    ),
    (
        lambda: fl.Hidden(X, W, temperature=torch.ones(3)),
        r"temperature: expected a number or a float tensor \[2, 3\] or \[2\]",
    ),
    (lambda: fl.Hidden(X, W, temperature=torch.ones(2).long()), "temperature: expected a number or a float tensor"),
    (lambda: fl.Hidden(X, W, temperature=torch.tensor([1.0, 0.0])), "temperature: expected numbers > 0"),
    (lambda: fl.Logits(X, temperature=torch.ones(2)), "temperature: expected"),
]


@pytest.mark.parametrize(("call", "words"), BAD)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
