"""A reference that does not change: its log-probs are computed once, kept on disk, and refused where they do not belong.

python examples/saved_reference.py
"""

import tempfile

import tiny
import torch
from torch.utils.data import DataLoader

import fused_losses as fl
from fused_losses.integrations import data, ref_logps

tokenizer = tiny.tokenizer()
rows = data.tokenize_preferences(tiny.rows(16), tokenizer)
collator = data.PreferenceCollator(tokenizer.pad_token_id, max_length=64)

# Once, by itself. Where it is interrupted, the same call goes on.
reference, folder = tiny.model(), tempfile.mkdtemp()
ref_logps.precompute(reference, rows, collator, folder, batch_size=8, tokenizer=tokenizer, progress=False)

# Whenever there is training, in another process: the reference is not needed any more.
saved = ref_logps.load(folder, collator=collator, tokenizer=tokenizer)
loader = DataLoader(saved.attach(rows), batch_size=4, shuffle=True, collate_fn=collator)
policy = tiny.model()
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)


def dpo(batch):
    inputs, labels, ref = {k: batch[k] for k in ("input_ids", "attention_mask")}, batch["labels"], batch["ref_logps"]
    return fl.at_head(policy, lambda p: fl.dpo_loss(p, labels, fl.LogProbs(ref), shift=True), **inputs).out


@torch.no_grad()
def error(batch):
    """Of the saved log-probs: how far from those of the reference itself, in nats of a sequence."""
    inputs, labels = {k: batch[k] for k in ("input_ids", "attention_mask")}, batch["labels"]
    logps = fl.at_head(reference, lambda q: fl.token_stats(q, labels, shift=True).logps.sum(1), **inputs).out
    return (logps - batch["ref_logps"]).abs().max().item()


seen = []
for batch in [*loader, *loader]:
    out = dpo(batch)
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    seen.append(out.loss.item())
    print(f"loss {seen[-1]:.4f}, saved log-probs within {error(batch):.0e} of the reference's")
    assert error(batch) < 1e-3
assert seen[-1] < seen[0]

# Not of this model, these rows, this tokenizer or this truncation: an error says which.
try:
    ref_logps.load(folder, model=policy)
except RuntimeError as refusal:
    print(f"refused: {refusal}")
else:
    raise AssertionError("the policy is no longer the reference, and its log-probs were taken for the reference's")
