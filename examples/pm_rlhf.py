"""Preference matching RLHF (arXiv 2405.16455): rewards alone, and rewards with a KL to the reference, make the majority's
answer nearly the only one; the preference matching regulariser ends at softmax(reward), the preferences themselves.

python examples/pm_rlhf.py [--seed N] [--plot FILE]

An answer is one token, a letter, where the "entropy" form has the gradient of the whole objective. Beta is 1: softmax(r / beta)
has the preferences of the reward model at no other beta.
"""

import copy

import tiny
import torch

import fused_losses as fl

STEPS, LETTERS = 150, "ABCD"
options = tiny.options()
tokenizer = tiny.tokenizer()
policy = tiny.model(options.seed)
prompts = tokenizer([row["prompt"] for row in tiny.rows(8)], return_tensors="pt", padding=True, padding_side="left")
inputs = {k: prompts[k] for k in ("input_ids", "attention_mask")}
letters = torch.tensor(tokenizer.convert_tokens_to_ids(list(LETTERS)))
assert len(letters.unique()) == len(LETTERS)  # known tokens
rewards = torch.randn(8, len(LETTERS), generator=torch.Generator().manual_seed(options.seed))
target, best = rewards.log_softmax(-1), rewards.argmax(-1)[:, None]  # log P(letter) of Bradley-Terry and Plackett-Luce


def at_letters(model, function):
    """function of the last state of each prompt [8, 1, H], and the four rows of the head that are answers."""
    return fl.at_head(model, lambda p: function(fl.Hidden(p.hidden[:, -1:], p.weight[letters])), **inputs).out


def logits(source):
    return (source.hidden @ source.weight.T)[:, 0]


def expected(source):
    return (logits(source).softmax(-1) * rewards).sum(-1).mean()


def reward_alone(source):
    return -expected(source)


def with_kl(source):
    with torch.no_grad():
        q = at_letters(reference, lambda q: q)
    return fl.token_stats(source, best, q, divergence="reverse_kl", shift=False).divergence[
        "reverse_kl"
    ].mean() - expected(source)


def matching(source):
    """A label only says which position counts: the expectation is over the whole row."""
    return fl.preference_matching_loss(source, best, loss_type="entropy", beta=1.0, shift=False).loss - expected(source)


def train(model, loss, steps):
    """The share of the best letter after each step, a mean over prompts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    shares = []
    for _ in range(steps):
        at_letters(model, loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        shares.append(probabilities(model).gather(-1, best).mean().item())
    return shares


@torch.no_grad()
def probabilities(model):
    return at_letters(model, logits).softmax(-1)


train(policy, lambda p: fl.cross_entropy_loss(p, best, shift=False).loss, 4)  # as fine-tuning on the best answers
reference = copy.deepcopy(policy).requires_grad_(False)

p = probabilities(policy)
written_out = (p * (p.log() - rewards)).sum(-1).mean()  # -E[r - log p]
torch.testing.assert_close(at_letters(policy, matching).detach(), written_out)

gaps, lines = {}, {}
for name, loss in {"reward alone": reward_alone, "reward and KL": with_kl, "preference matching": matching}.items():
    model = copy.deepcopy(policy)
    lines[name] = list(range(1, STEPS + 1)), train(model, loss, STEPS)
    p = probabilities(model)
    gaps[name] = fl.preference_matching_gap(p.log(), rewards).item()
    distance = (p - target.exp()).abs().sum(-1).mean() / 2
    print(f"{name:20}best letter {lines[name][1][-1]:.2f}, total variation {distance:.3f}, gap {gaps[name]:.3f}")
share = target.exp().gather(-1, best).mean().item()
print(f"{'softmax(reward)':20}best letter {share:.2f}")

last = {name: line[1][-1] for name, line in lines.items()}
assert last["reward alone"] > 0.97 and last["reward and KL"] > share + 0.1  # collapse, or the reference's bias
assert abs(last["preference matching"] - share) < 0.02
assert gaps["preference matching"] < 0.02 < 0.2 < min(gaps["reward alone"], gaps["reward and KL"])
print("only preference matching ends at softmax(reward)")

if options.plot:
    lines["softmax(reward)"] = [1, STEPS], [share, share]
    title = "Only preference matching ends at the preferences, softmax(reward)"
    tiny.picture(options.plot, title, "step", "probability of the best of 4 answers", lines, "softmax(reward)")
