"""A head that is split over two processes, unevenly: each has its rows of the weight, and the loss is that of one process.

torchrun --nproc-per-node 2 examples/vocabulary_parallel.py
"""

import tiny
import torch
import torch.distributed as dist

import fused_losses as fl
from fused_losses.integrations import data

dist.init_process_group("gloo")
rank, group = dist.get_rank(), dist.group.WORLD
rows = (slice(0, 300), slice(300, tiny.TOKENS))[rank]  # of the vocabulary

tokenizer = tiny.tokenizer()
policy, reference = tiny.model(seed=0), tiny.model(seed=1).requires_grad_(False)
body, ref_body = fl.backbone(policy), fl.backbone(reference)
weight = policy.lm_head.weight[rows].detach().clone().requires_grad_()  # this rank's
ref_weight = reference.lm_head.weight[rows].clone()

collator = data.PreferenceCollator(tokenizer.pad_token_id, max_length=64)
batch = collator(data.tokenize_preferences(tiny.rows(4), tokenizer))
inputs, labels = {k: batch[k] for k in ("input_ids", "attention_mask")}, batch["labels"]  # the same on all ranks

hidden, ref_hidden = (model(**inputs).last_hidden_state for model in (body, ref_body))
p = fl.Hidden(hidden, weight, process_group=group)
q = fl.Hidden(ref_hidden, ref_weight, process_group=group)
out = fl.tdpo_loss(p, labels, q, shift=True)
out.loss.backward()  # the gradient at the hidden states, and so the backbone's, is summed over the group

split = [w.grad.clone() for w in body.parameters()]
policy.zero_grad()
with torch.no_grad():
    q = fl.at_head(reference, lambda q: q, **inputs).out
whole = fl.at_head(policy, lambda p: fl.tdpo_loss(p, labels, q, shift=True), **inputs).out
whole.loss.backward()

torch.testing.assert_close(out.loss, whole.loss)
torch.testing.assert_close(weight.grad, policy.lm_head.weight.grad[rows], rtol=1e-3, atol=1e-6)
for found, w in zip(split, body.parameters(), strict=True):
    torch.testing.assert_close(found, w.grad, rtol=1e-3, atol=1e-6)
print(
    f"rank {rank}: {len(weight)} of {tiny.TOKENS} tokens, loss {out.loss:.6f}, in one process {whole.loss:.6f}",
    flush=True,
)
tiny.leave()
