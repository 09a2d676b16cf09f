"""DPO in a loop of one's own: the loss as most people write it, and what replaces it.

python examples/plain_loop.py
"""

import copy

import tiny
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import fused_losses as fl
from fused_losses.cli.memory_probe import peak_bytes
from fused_losses.integrations import data

tokenizer = tiny.tokenizer()
model = tiny.model(vocab_size=16384)
reference = copy.deepcopy(model).requires_grad_(False)

rows = data.tokenize_preferences(tiny.rows(16), tokenizer)
collator = data.PreferenceCollator(tokenizer.pad_token_id, max_length=64)
batches = DataLoader(rows, batch_size=4, collate_fn=collator)  # 4 chosen sequences, then 4 rejected ones


def before(policy, inputs, labels):
    """Makes logits [8, 64, 16384] of both models, and log-probs of the same size."""
    targets, mask = labels[:, 1:].clamp(min=0), labels[:, 1:] != -100

    def logps(model):
        z = model(**inputs).logits[:, :-1].float()
        return (z.log_softmax(-1).gather(-1, targets[..., None])[..., 0] * mask).sum(-1)

    with torch.no_grad():
        ref = logps(reference)
    chosen, rejected = (logps(policy) - ref).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def after(policy, inputs, labels):
    """Logits fit 4 MiB at a time. (Leave `workspace` out at real sizes: it is 256 MiB then.)"""
    less = {"shift": True, "workspace": 4 << 20}
    with torch.no_grad():
        ref = fl.at_head(reference, lambda q: fl.token_stats(q, labels, **less).logps, **inputs).out
    return fl.at_head(policy, lambda p: fl.dpo_loss(p, labels, fl.LogProbs(ref), beta=0.1, **less), **inputs).out.loss


def train(loss):
    """The losses of two epochs, and the MiB that forward and backward take."""
    policy = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    losses = []
    for batch in [*batches, *batches]:
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        losses.append(loss(policy, inputs, batch["labels"]))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses).detach(), peak_bytes(lambda: loss(policy, inputs, batch["labels"]).backward()) / 2**20


naive, naive_peak = train(before)
ours, our_peak = train(after)
for i, pair in enumerate(zip(naive, ours, strict=True)):
    print(f"step {i}: loss {pair[0]:.6f} before, {pair[1]:.6f} after")
print(f"forward and backward: {naive_peak:.0f} MiB before, {our_peak:.0f} MiB after, at the most")

torch.testing.assert_close(ours, naive, rtol=1e-3, atol=1e-4)
assert ours[-1] < ours[0] and our_peak < naive_peak / 2
