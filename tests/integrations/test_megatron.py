"""The hook of Megatron-core's GPTModel: against its own cross entropy where it is installed, and with a head of the same
attributes on two ranks."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

import fused_losses as fl
from fused_losses.integrations import megatron

pytestmark = pytest.mark.usefixtures("one_thread")

S, B, H, V = 6, 3, 8, 40


def numbers():
    g = torch.Generator().manual_seed(3)
    x, weight = torch.randn(S, B, H, generator=g).double(), torch.randn(V, H, generator=g).double()
    labels, mask = torch.randint(V, (B, S), generator=g), (torch.rand(B, S, generator=g) > 0.3).long()
    return x, weight, labels, mask


def forward(x, layer, labels, mask, processor=None, **more):
    """What GPTModel.forward passes on, by name (megatron-core 0.19.2, models/gpt/gpt_model.py)."""
    others = dict.fromkeys(
        ("input_ids", "position_ids", "attention_mask", "decoder_input", "runtime_gather_output", "config")
    )
    named = {"output_weight": None, "packed_seq_params": None, "inference_context": None, "context": None, **others}
    named |= {"compute_language_model_loss": None, "scale_logits": lambda z: z} | more
    processor = processor or megatron.output_processor()
    return processor(hidden_states=x, output_layer=layer, labels=labels, loss_mask=mask, **named)


def head(weight, group=None, sequence_parallel=False, bias=None):
    return SimpleNamespace(weight=weight, bias=bias, tp_group=group, sequence_parallel=sequence_parallel)


def by_hand(x, weight, labels, mask, scale=1.0):
    logits = scale * (x @ weight.T).transpose(0, 1)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape) * mask


@pytest.mark.parametrize("shared", [False, True])
def test_one_rank(monkeypatch, shared):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    x, weight, labels, mask = numbers()
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    others = [t.clone().requires_grad_() for t in (x, weight)]
    layer = head(None if shared else leaves[1])
    mine = forward(
        leaves[0], layer, labels, mask, output_weight=leaves[1] if shared else None, scale_logits=lambda z: 0.4 * z
    )
    exact = by_hand(*others, labels, mask, scale=0.4)
    torch.testing.assert_close(mine, exact, rtol=1e-6, atol=1e-6)
    found, truth = (torch.autograd.grad(y.sum() * 0.7, t) for y, t in ((mine, leaves), (exact, others)))
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-6)


def test_packed_sequences_and_a_loss_of_ones_own(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    x, weight, labels, mask = numbers()
    flat, cu = x.transpose(0, 1).reshape(-1, 1, H)[: 4 * S // 2], torch.tensor([0, 5, 8, 12])
    y, keep = labels.reshape(1, -1)[:, : len(flat)], mask.reshape(1, -1)[:, : len(flat)]
    packed = SimpleNamespace(cu_seqlens_q=cu)
    losses = forward(flat, head(weight), y, keep, packed_seq_params=packed)
    torch.testing.assert_close(losses, by_hand(flat, weight, y, keep), rtol=1e-6, atol=1e-6)

    def grpo(policy, batch):
        return fl.grpo_loss(policy, batch.labels, batch.context, cu_seqlens=batch.cu_seqlens, shift=False).loss

    advantages = torch.tensor([1.0, -0.5, 0.3])
    mine = forward(
        flat, head(weight), y, keep, megatron.output_processor(grpo), packed_seq_params=packed, context=advantages
    )
    marked = y[0].masked_fill(keep[0] == 0, -100)
    torch.testing.assert_close(
        mine, fl.grpo_loss(fl.Hidden(flat[:, 0], weight), marked, advantages, cu_seqlens=cu, shift=False).loss
    )


def check_split(rank, group, sequence_parallel):
    """A vocabulary in two parts, and the sequence in two where the layer says so."""
    x, weight, labels, mask = numbers()
    leaf, whole = x.clone().requires_grad_(), weight.clone().requires_grad_()
    exact = by_hand(leaf, whole, labels, mask)
    dx, dw = torch.autograd.grad(exact.mean(), (leaf, whole))
    rows, steps = slice(rank * V // 2, (rank + 1) * V // 2), slice(rank * S // 2, (rank + 1) * S // 2)
    steps = steps if sequence_parallel else slice(None)
    mine, own = x[steps].clone().requires_grad_(), weight[rows].clone().requires_grad_()
    losses = forward(mine, head(own, group, sequence_parallel), labels, mask)
    found = torch.autograd.grad(losses.mean(), (mine, own))
    for a, b in ((losses, exact), (found[0], dx[steps]), (found[1], dw[rows])):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_and_sequence_parallel(monkeypatch, sequence_parallel):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    on_ranks(2, check_split, sequence_parallel)


def test_words():
    x, weight, labels, mask = numbers()
    with pytest.raises(ValueError, match="labels: expected token ids"):
        forward(x, head(weight), None, mask)
    with pytest.raises(ValueError, match="inference_context: .* expected None"):
        forward(x, head(weight), labels, mask, inference_context=object())
    with pytest.raises(ValueError, match="loss_mask: expected 0 and 1"):
        forward(x, head(weight), labels, mask * 0.5)


@pytest.fixture
def parallel_state():
    """Megatron's groups of one rank."""
    state = pytest.importorskip("megatron.core.parallel_state", reason="megatron-core is not installed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    state.initialize_model_parallel()
    yield state
    state.destroy_model_parallel()
    dist.destroy_process_group()


def test_a_real_model(monkeypatch, parallel_state):
    """A tiny GPTModel on a CPU: losses and gradients of every parameter, with the hook and without."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    if torch.cuda.is_available():
        model_parallel_cuda_manual_seed(1)
    else:  # its attention asks for a device and for random numbers of a GPU, although nothing is dropped
        monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
        monkeypatch.setattr(get_cuda_rng_tracker(), "fork", lambda *_: contextlib.nullcontext())
    config = TransformerConfig(
        num_layers=1,
        hidden_size=H,
        num_attention_heads=2,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=V, max_sequence_length=S)
    _, _, labels, mask = numbers()
    ids, positions = labels.roll(1, 1), torch.arange(S).expand(B, S)
    causal = torch.ones(1, 1, S, S, dtype=torch.bool).triu(1)
    found = []
    for more in ({}, {"output_processor": megatron.output_processor()}):
        model.zero_grad()
        losses = model(ids, positions, causal, labels=labels, loss_mask=mask, **more)
        (losses * mask).sum().backward()
        found.append((losses.detach() * mask, [p.grad.clone() for p in model.parameters()]))
    (theirs, exact), (mine, gradients) = found
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert math.isfinite(mine.sum()) and len(gradients) > 3
    torch.testing.assert_close(gradients, exact, rtol=1e-4, atol=1e-5)
