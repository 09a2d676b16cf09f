"""TDPO: the margin of a pair has the KL from the reference in it, token by token over the whole vocabulary. Log-probs, KL and
all gradients come from one pass over hidden states; logits never exist.

python examples/tdpo.py
"""

import tiny
import torch
import torch.nn.functional as F

import fused_losses as fl
from fused_losses.integrations import data

tokenizer = tiny.tokenizer()
policy, reference = tiny.model(seed=0), tiny.model(seed=1)
collator = data.PreferenceCollator(tokenizer.pad_token_id, max_length=64)
batch = collator(data.tokenize_preferences(tiny.rows(4), tokenizer))
inputs, labels = {k: batch[k] for k in ("input_ids", "attention_mask")}, batch["labels"]


def written_out(alpha=0.5, beta=0.1):
    """TDPO2 of 2404.11999, with the log-softmaxes of both models."""
    y, mask = labels[:, 1:].clamp(min=0)[..., None], labels[:, 1:] != -100
    p = policy(**inputs).logits[:, :-1].log_softmax(-1)
    with torch.no_grad():
        q = reference(**inputs).logits[:, :-1].log_softmax(-1)
    chosen, rejected = ((p - q).gather(-1, y)[..., 0] * mask).sum(-1).chunk(2)
    kl_chosen, kl_rejected = ((q.exp() * (q - p)).sum(-1) * mask).sum(-1).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected + alpha * (kl_chosen.detach() - kl_rejected))).mean()


def step():
    with torch.no_grad():
        q = fl.at_head(
            reference, lambda q: q, **inputs
        ).out  # the reference's states and head; under FSDP: see fsdp2.py
    return fl.at_head(policy, lambda p: fl.tdpo_loss(p, labels, q, alpha=0.5, beta=0.1, shift=True), **inputs).out


optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
first = step()
truth = written_out()
ours, theirs = (torch.autograd.grad(loss, list(policy.parameters())) for loss in (first.loss, truth))
print(f"loss {first.loss:.6f}, written out {truth:.6f}")
torch.testing.assert_close(first.loss, truth)
for a, b in zip(ours, theirs, strict=True):
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)

for i in range(6):
    out = step()
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    kl = out.metrics["kl/chosen"], out.metrics["kl/rejected"]
    print(f"step {i}: loss {out.loss:.4f}, KL of chosen answers {kl[0]:.2f}, of rejected ones {kl[1]:.2f}")
assert out.loss < first.loss
