"""Tensors that are not here, or not what they seem: refused by every function that would have read them, in words."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tiny_models import Tiny, batch
from torch import nn
from torch.utils._pytree import tree_map_only

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")

Z, X, W, Y = torch.zeros(4, 3, 11), torch.zeros(4, 3, 5), torch.zeros(11, 5), torch.zeros(4, 3, dtype=torch.long)


@pytest.fixture(scope="module")
def split():
    """A DTensor of a tensor, over the one rank that there is."""
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("no process group to be had")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda x: distribute_tensor(x, mesh, [Shard(0)])
    dist.destroy_process_group()


SPLIT = {
    "logits": lambda d: fl.token_stats(d(Z), Y, shift=False),
    "logits of the reference": lambda d: fl.dpo_loss(Z, Y, d(Z), shift=False),
    "logits with options": lambda d: fl.Logits(d(Z), softcap=3.0),
    "hidden": lambda d: fl.Hidden(d(X), W),
    "weight": lambda d: fl.Hidden(X, d(W)),
    "bias": lambda d: fl.Hidden(X, W, d(W[:, 0])),
    "lora a": lambda d: fl.Hidden(X, W, lora=(d(W[:2]), W[:, :2])),
    "lora b": lambda d: fl.Hidden(X, W, lora=(W[:2], d(W[:, :2]))),
    "logps": lambda d: fl.dpo_loss(Z, Y, fl.LogProbs(d(Z[..., 0])), shift=False),
    "labels": lambda d: fl.token_stats(Z, d(Y), shift=False),
    "labels of a loss": lambda d: fl.kto_loss(
        fl.Hidden(X, W), d(Y), None, torch.ones(4, dtype=torch.bool), shift=False
    ),
    "labels of parts": lambda d: fl.partial_stats(Z, d(Y)),
    "logits of a drop-in": lambda d: fl.selective_log_softmax(d(Z), Y),
    "logits of TRL's": lambda d: fl.generalized_jsd_loss(d(Z), Z),
}


@pytest.mark.parametrize("name", SPLIT)
def test_dtensors(split, name):
    with pytest.raises(
        TypeError, match=rf"^{name.split(' of ')[0].split(' with ')[0]}: got a DTensor; gather it first"
    ):
        SPLIT[name](split)


@pytest.mark.parametrize("layout", ["sparse", "mkldnn"])
def test_other_layouts(layout):
    change = {"sparse": torch.Tensor.to_sparse, "mkldnn": torch.Tensor.to_mkldnn}[layout]
    for name, call in (
        ("logits", lambda: fl.Logits(change(Z))),
        ("hidden", lambda: fl.Hidden(change(X), W)),
        ("weight", lambda: fl.Hidden(X, change(W))),
        ("logps", lambda: fl.LogProbs(change(Z[..., 0].contiguous()))),
    ):
        with pytest.raises(TypeError, match=f"^{name}: expected a dense tensor, got torch"):
            call()
    with pytest.raises(TypeError, match="^labels: expected a dense tensor, got torch.sparse"):
        fl.token_stats(Z, Y.to_sparse(), shift=False)


class Packed(torch.Tensor):
    """As libraries of quantisation have it: bfloat16 by its name, integers and scales inside."""

    @staticmethod
    def __new__(cls, whole):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=whole.dtype)

    def __init__(self, whole):
        self.whole = whole

    def __tensor_flatten__(self):
        return ["whole"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Packed(inner["whole"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args, kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Packed(args[0].whole)
        return function(*tree_map_only(Packed, lambda x: x.whole, args), **(kwargs or {}))


def test_packed_heads():
    """They are nn.Linear still, and multiply as such; what a kernel would find at their address is something else."""
    model = Tiny(nn.Linear(32, 97, bias=False))
    model.lm_head.weight = nn.Parameter(Packed(model.lm_head.weight.detach()), requires_grad=False)
    inputs, _ = batch()
    assert model(**inputs).logits.shape == (4, 6, 97)
    words = r"Tiny.lm_head.*: Linear has a weight of Packed; expected a dense weight .* quantised, leave the head out"
    for call in (
        lambda: fl.at_head(model, lambda p: p.hidden.sum(), **inputs),
        lambda: fl.find_head(model),
        lambda: fl.backbone(model),
    ):
        with pytest.raises(TypeError, match=words):
            call()
    with pytest.raises(TypeError, match=r"head \(Linear\): Linear has a weight of Packed"):
        fl.FusedHead(model.lm_head)


@pytest.mark.parametrize("side", ["policy", "ref"])
@pytest.mark.parametrize("plan", ["vocab_chunks", "keep_logits", "frozen_head"])
def test_a_weight_scattered_before_backward(plan, side, backend):
    """As ZeRO-3 does after a forward that it does not see, and does to the parameter itself."""
    weights = {
        name: nn.Parameter(torch.randn(11, 5), requires_grad=plan != "frozen_head") for name in ("policy", "ref")
    }
    x = torch.randn(4, 3, 5, requires_grad=True)
    policy, ref = (fl.Hidden(y, weights[name]) for name, y in (("policy", x), ("ref", x.detach())))
    stats = fl.token_stats(policy, Y, ref, divergence="js", plan=plan, shift=False)
    weights[side].data = torch.empty(0)
    with pytest.raises(
        RuntimeError, match=rf"^{side}: the weight has shape \[0\] in backward: .* call fl.FusedHead as a module"
    ):
        stats.divergence["js"].sum().backward()


# ---- parts of the vocabulary ----------------------------------------------------------------------------------------------


def part(**options):
    return fl.partial_stats(Z, Y, **{"ref": Z, "divergence": "forward_kl"} | options)


PARTS = [
    (lambda: part(divergence="js"), ValueError, "divergence: 'js' takes a second sweep, which partial statistics do not"),
    (lambda: part(ref=None), ValueError, r"divergence: 'forward_kl' needs ref, got None"),
    (lambda: part(ref=fl.LogProbs(Z[..., 0])), TypeError, "ref: expected logits, fl.Logits or fl.Hidden, got fl.LogProbs"),
    (lambda: fl.partial_stats(Z, Y[:2]), ValueError, r"policy: expected logits \[2, 3, V\]"),
    (lambda: part(ref=Z[..., :7]), ValueError, "ref: expected the policy's vocabulary of 11, got 7"),
    (lambda: fl.merge_stats([]), ValueError, "parts: expected at least one PartialStats, got none"),
    (lambda: fl.merge_stats([part(), part(entropy=True)]), ValueError, "parts: expected the same entropy, got False and True"),
    (lambda: fl.merge_stats([part(), part(divergence="reverse_kl")]), ValueError, "parts: expected the same divergences"),
    (lambda: fl.merge_stats([part(), fl.partial_stats(Z[:2], Y[:2], Z[:2], divergence="forward_kl")]), ValueError,
     r"parts: expected states \[\d+, 12\], got \[\d+, 6\]"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(PARTS)))
def test_parts(case, monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    call, error, words = PARTS[case]
    with pytest.raises(error, match=words):
        call()
