"""GRPO on sampled answers: each batch of them is trained on several times, with clipped ratios and the exact KL to the
reference, over the whole vocabulary, from the same pass as the log-probs.

python examples/grpo.py
"""

import copy

import tiny
import torch

import fused_losses as fl

GROUP = 8  # answers to a prompt
tokenizer = tiny.tokenizer()
policy = tiny.model()
reference = copy.deepcopy(policy).requires_grad_(False)
with torch.no_grad():
    for w in policy.parameters():
        w.mul_(1 + 0.1 * torch.randn_like(w))  # as after some training

prompts = torch.tensor([tokenizer(row["prompt"])["input_ids"][:6] for row in tiny.rows(2)]).repeat_interleave(GROUP, 0)
ids = policy.generate(
    prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=12, min_new_tokens=12, do_sample=True
)
labels = ids.clone()
labels[:, : prompts.shape[1]] = -100
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

wanted = torch.rand(tiny.TOKENS) < 0.5  # a reward that can be computed: how many tokens are among these
rewards = wanted[ids[:, prompts.shape[1] :]].float().mean(1)
advantages = fl.group_advantages(rewards, GROUP)

with torch.no_grad():
    q = fl.at_head(reference, lambda q: q, **inputs).out
    old = fl.at_head(policy, lambda p: fl.token_stats(p, labels, shift=True).logps, **inputs).out
options = {"old_logps": old, "ref": q, "beta": 0.04, "kl": "reverse_kl", "epsilon": 0.2, "shift": True}


def written_out():
    y, mask = labels[:, 1:].clamp(min=0)[..., None], labels[:, 1:] != -100
    p, r = (model(**inputs).logits[:, :-1].log_softmax(-1) for model in (policy, reference))
    ratio, a = (p.gather(-1, y)[..., 0] - old).exp(), advantages[:, None]
    kl = (p.exp() * (p - r)).sum(-1)
    losses = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) + 0.04 * kl
    return ((losses * mask).sum(1) / mask.sum(1)).mean()


optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
seen = []
for i in range(4):
    out = fl.at_head(policy, lambda p: fl.grpo_loss(p, labels, advantages, **options), **inputs).out
    truth = written_out()
    torch.testing.assert_close(out.loss, truth, rtol=1e-4, atol=1e-5)
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    seen.append(out.loss.item())
    clipped = out.metrics["clip_ratio/region_mean"]
    print(f"step {i}: loss {seen[-1]:.5f} (written out {truth:.5f}), KL {out.metrics['kl']:.5f}, clipped {clipped:.1%}")
assert seen[-1] < seen[0]
