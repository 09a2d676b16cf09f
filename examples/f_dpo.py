"""f-DPO (arXiv 2309.16240): what a margin between chosen and rejected answers costs depends on the divergence. At the same
margin reverse KL (DPO) is nearest to the reference and has the lowest entropy, forward KL is the furthest; JS and alpha are
between them.

python examples/f_dpo.py [--seed N] [--plot FILE]

KL and entropy are means over the tokens of the answers in the batch, not of samples from the policy. The paper measures
accuracy and diversity of a large model; this is the same trade in miniature, on the answers that are trained on.
"""

import copy
from itertools import pairwise

import tiny
import torch
import torch.nn.functional as F

import fused_losses as fl
from fused_losses.integrations import data

MARGIN = 20  # of log-ratios, where the divergences are compared
DIVERGENCES = {  # and their links s(h), written out
    "reverse KL (DPO)": ("reverse_kl", lambda h: h),
    "JS": ("js", F.logsigmoid),
    "alpha 0.5": (fl.divergences.get("alpha", a=0.5), lambda h: -2 * (-h / 2).exp()),
    "forward KL": ("forward_kl", lambda h: -(-h).exp()),
}
options = tiny.options()
tokenizer = tiny.tokenizer()
reference = tiny.model(options.seed)
collator = data.PreferenceCollator(tokenizer.pad_token_id, max_length=64)
batch = collator(data.tokenize_preferences(tiny.rows(8), tokenizer))
inputs, labels = {k: batch[k] for k in ("input_ids", "attention_mask")}, batch["labels"]


def step(model, optimizer, function):
    out = fl.at_head(model, function, **inputs).out
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()


optimizer = torch.optim.AdamW(reference.parameters(), lr=3e-3)
for _ in range(40):  # a reference that has learnt both answers
    step(reference, optimizer, lambda p: fl.cross_entropy_loss(p, labels, shift=True))
with torch.no_grad():
    q = fl.at_head(reference, lambda q: q, **inputs).out
ref = fl.LogProbs(fl.token_stats(q, labels, shift=True).logps)


@torch.no_grad()
def measured(model):
    """margin, KL, entropy; and the log-ratios of chosen and rejected answers"""
    kinds = {"divergence": "reverse_kl", "entropy": True, "shift": True}
    stats = fl.at_head(model, lambda p: fl.token_stats(p, labels, q, **kinds), **inputs).out
    chosen, rejected = ((stats.logps - ref.logps) * stats.mask).sum(-1).chunk(2)
    kl, entropy = (x[stats.mask].mean().item() for x in (stats.divergence["reverse_kl"], stats.entropy))
    return ((chosen - rejected).mean().item(), kl, entropy), (chosen, rejected)


def train(divergence, link):
    """What is measured after each step, until the margin is reached."""
    model = copy.deepcopy(reference)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)
    seen, beta = [(0.0, 0.0, measured(model)[0][2])], 0.1
    while seen[-1][0] < MARGIN:
        assert len(seen) < 60  # learns

        def loss(p):
            return fl.dpo_loss(p, labels, ref, divergence=divergence, beta=beta, shift=True)

        step(model, optimizer, loss)
        now, (chosen, rejected) = measured(model)
        truth = -F.logsigmoid(beta * (link(chosen) - link(rejected))).mean()
        with torch.no_grad():
            torch.testing.assert_close(fl.at_head(model, loss, **inputs).out.loss, truth, rtol=1e-3, atol=1e-4)
        seen.append(now)
    return seen


def at_margin(seen, column):
    """Between the two steps where the margin is passed."""
    a, b = next(two for two in pairwise(seen) if two[1][0] >= MARGIN)
    share = (MARGIN - a[0]) / (b[0] - a[0])
    return a[column] + share * (b[column] - a[column])


paths = {name: train(*one) for name, one in DIVERGENCES.items()}
kls, entropies = ([at_margin(seen, column) for seen in paths.values()] for column in (1, 2))
for (name, seen), kl, entropy in zip(paths.items(), kls, entropies, strict=True):
    print(f"{name:17}margin {MARGIN} in {len(seen) - 1:2} steps, KL {kl:.3f}, entropy {entropy:.3f}")
assert all(1.05 * a < b for a, b in pairwise(kls))  # each divergence pays more KL than the one before
assert entropies[0] + 0.02 < min(entropies[1:])  # DPO is the least diverse
print("in this order: more KL at the same margin; reverse KL has the lowest entropy")

if options.plot:
    lines = {name: [list(x) for x in zip(*seen, strict=True)][1::-1] for name, seen in paths.items()}
    title = f"Reverse KL reaches a margin of {MARGIN} with the least KL, forward KL with the most"
    tiny.picture(options.plot, title, "KL from the reference per token", "margin of log-ratios", lines)
