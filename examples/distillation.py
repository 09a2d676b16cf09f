"""Distillation from a larger teacher, with another hidden size: generalised JSD over the whole vocabulary at a temperature.

python examples/distillation.py
"""

import tiny
import torch
from torch.utils.data import DataLoader

import fused_losses as fl
from fused_losses.cli.memory_probe import peak_bytes
from fused_losses.integrations import data

TEMPERATURE = 0.9
tokenizer = tiny.tokenizer()
student, teacher = tiny.model(hidden_size=32, vocab_size=8192), tiny.model(seed=1, hidden_size=96, vocab_size=8192)

rows = data.tokenize_unpaired(tiny.unpaired_rows(16), tokenizer)
batches = DataLoader(rows, batch_size=4, collate_fn=data.UnpairedCollator(tokenizer.pad_token_id, max_length=64))


def ours(inputs, labels):
    hot = {"temperature": TEMPERATURE}
    with torch.no_grad():
        q = fl.at_head(teacher, lambda q: q, **hot, **inputs).out
    options = {"beta": 0.5, "shift": True, "workspace": 4 << 20}  # 256 MiB unless given
    return fl.at_head(student, lambda p: fl.distillation_loss(p, labels, q, **options), **hot, **inputs).out.loss


def written_out(inputs, labels):
    p = (student(**inputs).logits[:, :-1] / TEMPERATURE).log_softmax(-1)
    with torch.no_grad():
        q = (teacher(**inputs).logits[:, :-1] / TEMPERATURE).log_softmax(-1)
    m = ((p.exp() + q.exp()) / 2).log()
    jsd = (q.exp() * (q - m) + p.exp() * (p - m)).sum(-1) / 2
    return jsd[labels[:, 1:] != -100].mean()


optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
seen = []
for batch in [*batches] * 2:
    inputs, labels = {k: batch[k] for k in ("input_ids", "attention_mask")}, batch["labels"]
    found, truth = ours(inputs, labels), written_out(inputs, labels)
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-6)
    found.backward()
    optimizer.step()
    optimizer.zero_grad()
    seen.append(found.item())
    print(f"JSD {seen[-1]:.6f} (written out {truth:.6f})")

peaks = [peak_bytes(lambda loss=loss: loss(inputs, labels).backward()) / 2**20 for loss in (written_out, ours)]
print(f"forward and backward: {peaks[1]:.0f} MiB (written out {peaks[0]:.0f}), at the most")
assert seen[-1] < seen[0] and peaks[1] < peaks[0] / 2
