"""KTO: answers that are good or bad, without pairs, and its baseline from mismatched prompts and answers.

python examples/kto.py
"""

import copy

import tiny
import torch
from torch.utils.data import DataLoader

import fused_losses as fl
from fused_losses.integrations import data

tokenizer = tiny.tokenizer()
policy = tiny.model()
reference = copy.deepcopy(policy).requires_grad_(False)

rows = data.tokenize_unpaired(tiny.unpaired_rows(16), tokenizer)  # prompt, completion, label
collator = data.UnpairedCollator(tokenizer.pad_token_id, max_length=64, kl=True)
batches = DataLoader(rows, batch_size=8, collate_fn=collator)


@torch.no_grad()
def logps(model, batch):
    """Of labels, without a graph [S, T - 1]."""
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    return fl.at_head(model, lambda p: fl.token_stats(p, batch["labels"], shift=True).logps, **inputs).out


def baseline(mismatched):
    p, q = (fl.LogProbs(logps(model, mismatched)) for model in (policy, reference))
    return fl.kto_baseline(p, mismatched["labels"], q, shift=True)


def loss(batch):
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    ref, z0 = fl.LogProbs(logps(reference, batch)), baseline(batch["kl"])
    options = {"baseline": z0, "beta": 0.1, "shift": True}
    return fl.at_head(
        policy, lambda p: fl.kto_loss(p, batch["labels"], ref, batch["desirable"], **options), **inputs
    ).out


def written_out(batch, beta=0.1):
    def log_ratio(batch):
        y, mask = batch["labels"][:, 1:].clamp(min=0)[..., None], batch["labels"][:, 1:] != -100
        p, q = (
            m(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)[:, :-1].gather(-1, y)
            for m in (policy, reference)
        )
        return ((p - q)[..., 0] * mask).sum(-1)

    z0 = log_ratio(batch["kl"]).mean().clamp(min=0).detach()
    x = log_ratio(batch) - z0
    return (1 - torch.where(batch["desirable"], beta * x, -beta * x).sigmoid()).mean()


optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
seen = []
for batch in [*batches] * 4:
    out, truth = loss(batch), written_out(batch)
    torch.testing.assert_close(out.loss, truth, rtol=1e-4, atol=1e-5)
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    seen.append(out.loss.item())
    m = out.metrics
    print(f"loss {seen[-1]:.4f} (written out {truth:.4f}), margin {m['rewards/margins']:.3f}, baseline {m['kl']:.3f}")
assert seen[-1] < seen[0]
