"""at_head under DDP, FSDP and FSDP2 (gloo): every loss gives what one process gives, wherever the head's weight is sharded."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from family_batches import CASES, Batch, H, V
from helpers import generator_of, seeded
from ranks import on_ranks
from torch import nn

import fused_losses as fl

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed"),
]


@pytest.fixture(autouse=True)
def on_torch(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")


def sharded(model, group, *parts):
    """FSDP2 on these modules one by one, and on the rest."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = DeviceMesh.from_group(group, "cpu")
    for part in (*parts, model):
        fully_shard(part, mesh=mesh)
    return model


def close(mine, truth, what=""):
    torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-11, msg=lambda m: f"{what}: {m}")


# ---- every loss ---------------------------------------------------------------------------------------------------------


class States(nn.Module):
    def __init__(self, x):
        super().__init__()
        self.x = nn.Parameter(x.clone())

    def forward(self, ids):
        return (self.x * 1.0,)


class Model(nn.Module):
    """A backbone whose hidden states are a parameter."""

    def __init__(self, x, weight):
        super().__init__()
        self.model, self.lm_head = States(x), nn.Linear(H, V, bias=False, dtype=x.dtype)
        self.lm_head.weight.data.copy_(weight)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, return_dict=True):
        logits = self.lm_head(self.model(input_ids)[0])
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


def check_family(rank, group):
    """On four ranks one variant a loss."""
    cases = CASES if dist.get_world_size(group) == 2 else list(dict(CASES).items())
    for i, (name, variant) in enumerate(cases):
        batch = Batch(name, variant)
        ref = None if batch.entry.ref == "unused" else "hidden"
        truth, (dx, dw) = batch.call(fl, torch.float64, "hidden", ref)
        model = Model(batch.x.double(), batch.weight.double())
        sharded(model, group, *(model.lm_head,) * (i % 2))
        other = fl.Hidden(batch.ref_x.double(), batch.ref_weight.double())

        def loss(p, batch=batch, other=other):
            return batch.loss(fl, torch.float64, p, other)

        out, _ = fl.at_head(model, loss, input_ids=torch.zeros(1, 1, dtype=torch.long))
        (out.loss.sum() * 1.5).backward()
        close(out.loss, truth.loss, name)
        close(model.model.x.grad.full_tensor(), dx, f"{name} {variant}, dx")
        close(model.lm_head.weight.grad.full_tensor(), dw, f"{name} {variant}, dw")


@pytest.mark.parametrize("world", [2, 4])
def test_every_loss_of_a_sharded_head(world):
    on_ranks(world, check_family)


# ---- a transformers model, each rank with its part of the batch ----------------------------------------------------------


def tiny(seed, **options):
    seeded(seed)
    sizes = dict(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | options)).double()


def step(model, reference, ids, labels):
    with torch.no_grad():
        ref = fl.at_head(reference, lambda q: fl.token_stats(q, labels, shift=True).logps, input_ids=ids).out
    out, _ = fl.at_head(model, lambda p: fl.dpo_loss(p, labels, fl.LogProbs(ref), shift=True), input_ids=ids)
    out.loss.backward()
    return out


def distil(model, teacher, ids, labels):
    def loss(q):
        with torch.enable_grad():
            return fl.at_head(model, lambda p: fl.distillation_loss(p, labels, q, shift=True), input_ids=ids).out

    with torch.no_grad():
        out = fl.at_head(teacher, loss, input_ids=ids).out
    out.loss.backward()
    return out


def batch():
    ids = torch.randint(0, V, (8, 6), generator=generator_of(1))
    labels = ids.clone()
    labels[:, 0] = -100
    return ids, labels


def check_step(rank, group, engine, tied, loss):
    ids, labels = batch()
    base, ref = tiny(1, tie_word_embeddings=tied), tiny(2)
    truth = globals()[loss](base, ref, ids, labels)
    mine = torch.arange(8).view(2, 2, 2)[:, rank].flatten()  # two pairs
    model = tiny(1, tie_word_embeddings=tied)
    if engine == "ddp":
        model = nn.parallel.DistributedDataParallel(model, process_group=group)
    elif engine.startswith("fsdp1"):
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

        options = dict(process_group=group, device_id=torch.device("cpu"), use_orig_params=engine == "fsdp1")
        model, ref = (FSDP(m, **options) for m in (model, ref))
    else:
        parts = lambda m: [*m.model.layers, *(m.lm_head,) * (engine == "head apart")]  # noqa: E731
        model, ref = sharded(model, group, *parts(model)), sharded(ref, group, *parts(ref))
    out = globals()[loss](model, ref, ids[mine], labels[mine])
    total = out.loss.detach().clone()
    dist.all_reduce(total, group=group)
    close(total / 2, truth.loss.detach())
    if engine == "fsdp1":
        with FSDP.summon_full_params(model, with_grads=True):
            for p, q in zip(model.parameters(), base.parameters(), strict=True):
                close(p.grad, q.grad)
    elif engine == "fsdp1, flat":  # each rank has its part of all gradients in one
        (flat,) = model.parameters()
        total = flat.grad.square().sum()
        dist.all_reduce(total, group=group)
        close(total, sum(q.grad.square().sum() for q in base.parameters()))
    else:
        for (name, p), q in zip(model.named_parameters(), base.parameters(), strict=True):
            close(getattr(p.grad, "full_tensor", lambda p=p: p.grad)(), q.grad, name)
    inner = getattr(model, "module", model)
    assert all("forward" not in m.__dict__ for m in inner.modules())


@pytest.mark.parametrize("loss", ["step", "distil"])
@pytest.mark.parametrize(
    ("engine", "tied"),
    [("ddp", False), ("fsdp", False), ("fsdp", True), ("head apart", False), ("fsdp1", True), ("fsdp1, flat", False)],
)
def test_parts_of_a_batch(engine, tied, loss):
    on_ranks(2, check_step, engine, tied, loss)


def check_follow(rank, group):
    """TrustRegion mixes shards where they lie."""
    policy, reference = tiny(1), tiny(2)
    truth = {
        k: 0.25 * p + 0.75 * q for (k, p), q in zip(policy.named_parameters(), reference.parameters(), strict=True)
    }
    policy, reference = (sharded(m, group, *m.model.layers) for m in (policy, reference))
    fl.TrustRegion(reference, policy, alpha=0.25, every=1).step()
    for k, p in reference.named_parameters():
        assert p.to_local().numel() < p.numel()
        close(p.full_tensor(), truth[k], k)


def test_trust_region_of_shards():
    on_ranks(2, check_follow)


def refusals(rank, group):
    ids, labels = batch()
    model = sharded(tiny(1), group)
    with pytest.raises(TypeError, match="DTensor; make the FusedHead before fully_shard"):
        fl.find_head(model)
    head = model.get_output_embeddings()
    with pytest.raises(TypeError, match="weight: got a DTensor"):
        fl.Hidden(torch.zeros(2, 16), head.weight)


def test_refusals():
    on_ranks(2, refusals)
