"""TR-DPO: a reference that follows the policy, here all the way after every fourth step.

python examples/tr_dpo.py [--seed N] [--plot FILE]

In a Trainer, transformers' or TRL's, it is integrations.trainer.TrustRegionCallback(reference, alpha=, every=).
"""

import copy

import tiny
import torch

import fused_losses as fl
from fused_losses.integrations import data

options = tiny.options()
tokenizer = tiny.tokenizer()
policy = tiny.model(options.seed)
reference = copy.deepcopy(policy)  # weights of its own
region = fl.TrustRegion(reference, policy, alpha=1.0, every=4)  # alpha < 1: a soft update

collator = data.PreferenceCollator(tokenizer.pad_token_id, max_length=64)
batch = collator(data.tokenize_preferences(tiny.rows(4), tokenizer))
inputs, labels = {k: batch[k] for k in ("input_ids", "attention_mask")}, batch["labels"]


def dpo():
    with torch.no_grad():
        ref = fl.at_head(reference, lambda q: fl.token_stats(q, labels, shift=True).logps, **inputs).out
    return fl.at_head(policy, lambda p: fl.dpo_loss(p, labels, fl.LogProbs(ref), shift=True), **inputs).out


optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-4)
margins = []
for step in range(9):
    out = dpo()
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    margins.append(out.metrics["rewards/margins"].item())
    moved = region.step()  # once after each step of the optimizer
    print(f"step {step}: margin {margins[-1]:.4f}" + ("   the reference becomes the policy" if moved else ""))

assert margins[0] < margins[3] and margins[4] < margins[7]  # learns
assert abs(margins[4]) < 1e-4 and abs(margins[8]) < 1e-4  # from a reference that agrees with it
assert region.updates == 2

if options.plot:
    lines = {"margin": (list(range(9)), margins), "after an update": ([0, 8], [0, 0])}
    title = "After an update of the reference the margin is 0 again: h = 0"
    tiny.picture(options.plot, title, "step", "margin of rewards, before the step", lines, "after an update")
