"""A temperature per row or sequence: states are divided by it, logits are in the kernels; in losses and inside a model."""

from dataclasses import replace

import pytest
import torch
from helpers import Judge, hidden_leaves, labels_for, relative

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")

V = 41


def source(leaves, temperature, **head):
    x, weight, _, a, b = leaves
    return fl.Hidden(x, weight, lora=None if a is None else (a, b, 0.7), temperature=temperature, **head)


@pytest.mark.parametrize("plan", ["auto", "vocab_chunks", "keep_logits"])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("by", ["row", "sequence", "all"])
def test_hidden_states_match_logits_that_are_divided(monkeypatch, by, rank, plan):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
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


@pytest.mark.parametrize("name", ["torch", "compiled", "triton"])
@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
@pytest.mark.parametrize("by", ["row", "sequence", "all"])
def test_logits_match_logits_that_are_divided(monkeypatch, by, divergence, name):
    """Both sides have their own, beside softcap, scale, padded columns and ignored rows."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", name)
    size, head = {"row": (3, 5), "sequence": (3,), "all": ()}[by], {"softcap": 4.0, "scale": 1.5}
    z, w = (torch.randn(3, 5, V + 7, requires_grad=True) for _ in range(2))
    t, s = (0.5 + torch.rand(size) for _ in range(2))
    y = labels_for((3, 5), V, "cpu")

    def ours(leaves):
        sides = [fl.Logits(x, temperature=each, valid_vocab=V, **head) for x, each in zip(leaves, (t, s), strict=True)]
        return fl.token_stats(sides[0], y, sides[1], entropy=True, collision=True, divergence=divergence, shift=True)

    def twin(leaves):
        sides = [
            1.5 * 4.0 * torch.tanh(x[..., :V] / 4.0) / each.to(x.dtype).view(each.shape + (1,) * (3 - each.dim()))
            for x, each in zip(leaves, (t, s), strict=True)
        ]
        return fl.reference.token_stats(sides[0], y, sides[1], entropy=True, divergence=divergence, shift=True)

    judge = Judge(ours, twin, [z, w])
    for number in ("logps", "ref_logps", "entropy", "lse"):
        judge.value(number, lambda stats, number=number: getattr(stats, number))
    judge.value("D", lambda stats: stats.divergence[fl.divergences.get(divergence).key])
    judge.gradients(
        "sum",
        lambda stats: (
            stats.logps - stats.entropy + 0.3 * stats.ref_logps + stats.divergence[fl.divergences.get(divergence).key]
        ).sum(),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_logits_of_any_dtype_and_strides(monkeypatch, dtype, inplace):
    """Rows on three strides are computed one part at a time; the gradient may be written over the logits."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    whole = torch.randn(4, 6, 5, V, dtype=dtype)
    x = whole[::2, 1:4, ::2] if not inplace else whole[:2, :3, :3].contiguous()
    y, t = labels_for((2, 3, 3), V, "cpu"), 0.5 + torch.rand(2, 3, 3)
    leaf = x.detach().clone().requires_grad_()
    given = x.detach().requires_grad_()
    policy = fl.Logits(given * 1 if inplace else given, temperature=t)
    ours = fl.token_stats(policy, y, shift=False, inplace_backward=inplace)
    divided = fl.token_stats(leaf.to(torch.float64) / t[..., None], y, shift=False)
    tolerance = {torch.float64: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(ours.logps.double(), divided.logps, rtol=1e-5, atol=1e-5)
    (mine,), (exact,) = (torch.autograd.grad(s.logps.sum(), at) for s, at in ((ours, given), (divided, leaf)))
    torch.testing.assert_close(mine, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("call", ["dpo", "cross entropy", "support"])
def test_losses_and_compiled_callers(backend, call):
    """In losses, under torch.compile of the caller, and over the ids of a support."""
    z, w, y = torch.randn(4, 6, V), torch.randn(4, 6, V), torch.randint(V, (4, 6))
    t = torch.tensor([0.6, 1.0, 1.4, 0.9])
    ids = (y[..., None] + torch.arange(5)) % V

    def loss(z, divided):
        policy = z / t[:, None, None] if divided else fl.Logits(z, temperature=t)
        if call == "support":
            return -fl.token_stats(policy, y, support=fl.Support(ids), shift=False).logps.mean()
        if call == "dpo":
            return fl.dpo_loss(
                policy, y, w / t[:, None, None] if divided else fl.Logits(w, temperature=t), shift=True
            ).loss
        return fl.cross_entropy_loss(policy, y, label_smoothing=0.1, shift=True).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for function in (loss, compiled) if backend == "torch" else (loss,):
        a, b = (z.clone().requires_grad_() for _ in range(2))
        mine, exact = function(a, False), loss(b, True)
        torch.testing.assert_close(mine, exact)
        torch.testing.assert_close(*(torch.autograd.grad(x, leaf)[0] for x, leaf in ((mine, a), (exact, b))))


def test_rows_of_one_temperature_are_a_number(backend):
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
Y = torch.zeros(2, 3, dtype=torch.long)
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
    (
        lambda: fl.Logits(X, temperature=torch.ones(4)),
        r"temperature: expected a number or a float tensor \[2, 3\] or \[2\]",
    ),
    (
        lambda: fl.token_stats(
            fl.Logits(X, temperature=torch.ones(2)), Y, fl.Hidden(X, W[:4]), divergence="js", shift=False
        ),
        "temperature: of policy, expected a number beside hidden states, got a tensor",
    ),
    (
        lambda: fl.topk_distillation_loss(
            fl.Logits(X, temperature=torch.ones(2)), Y, -torch.ones(2, 3, 1), Y[..., None], shift=False
        ),
        "temperature: beside top-k from logits, expected a number",
    ),
]


@pytest.mark.parametrize(("call", "words"), BAD)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
