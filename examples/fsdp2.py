"""DPO and TDPO under FSDP2, on two processes: the loss runs inside the forward, where the head's weight is gathered.

torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import warnings

import tiny
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fused_losses as fl
from fused_losses.integrations import data

warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))

tokenizer = tiny.tokenizer()
collator = data.PreferenceCollator(tokenizer.pad_token_id, max_length=64)
rows = data.tokenize_preferences(tiny.rows(4), tokenizer)


def dpo(policy, reference, inputs, labels):
    """The reference's log-probs are enough: one model after the other."""
    with torch.no_grad():
        ref = fl.at_head(reference, lambda q: fl.token_stats(q, labels, shift=True).logps, **inputs).out
    return fl.at_head(policy, lambda p: fl.dpo_loss(p, labels, fl.LogProbs(ref), shift=True), **inputs).out.loss


def tdpo(policy, reference, inputs, labels):
    """Both distributions are needed at once, so the policy runs inside the reference, whose weight is there till then."""

    def inside(q):
        with torch.enable_grad():
            return fl.at_head(policy, lambda p: fl.tdpo_loss(p, labels, q, shift=True), **inputs).out

    with torch.no_grad():
        return fl.at_head(reference, inside, **inputs).out.loss


def step(loss, models, rows):
    batch = collator(rows)
    found = loss(*models, {k: batch[k] for k in ("input_ids", "attention_mask")}, batch["labels"])
    found.backward()
    return found.detach()


def sharded(model):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


for loss in (dpo, tdpo):
    one = [tiny.model(seed=0), tiny.model(seed=1)]
    two = [sharded(tiny.model(seed=0)), sharded(tiny.model(seed=1))]
    truth = step(loss, one, rows)
    found = step(loss, two, rows[2 * rank : 2 * rank + 2])  # each rank has pairs of its own; FSDP averages gradients
    dist.all_reduce(found)
    torch.testing.assert_close(found / 2, truth)
    for a, b in zip(two[0].parameters(), one[0].parameters(), strict=True):
        torch.testing.assert_close(a.grad.full_tensor(), b.grad, rtol=1e-3, atol=1e-6)
    head = two[0].lm_head.weight.to_local()
    print(
        f"rank {rank}: {list(head.shape)} of the head, {loss.__name__} {found / 2:.6f}, in one process {truth:.6f}",
        flush=True,
    )
tiny.leave()
