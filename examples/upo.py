"""UPO (arXiv 2405.17956): KTO, and auxiliary rewards that no preference names, as a weighted likelihood with learned values.

python examples/upo.py [--seed N] [--plot FILE]

From the paper: the base is KTO, and rewards enter as a weighted maximum likelihood without sampling. Our interpretation, for
there is no public code: the weight exp(A / tau) of a whole answer, and values that are expectiles, from a head whose gradient
does not reach the model. The two auxiliary rewards are made up: an answer should be short, and repeat few words.
"""

import copy

import tiny
import torch
from torch.utils.data import DataLoader

import fused_losses as fl
from fused_losses.integrations import data

STEPS, WEIGHTS = 80, {"short": 0.7, "few repeats": 0.3}
options = tiny.options()
tokenizer = tiny.tokenizer()
policy = tiny.model(options.seed)
reference = copy.deepcopy(policy).requires_grad_(False)

rows = data.tokenize_preferences(tiny.rows(16), tokenizer)
batch = next(
    iter(DataLoader(rows, batch_size=16, collate_fn=data.PreferenceCollator(tokenizer.pad_token_id, max_length=64)))
)
labels, inputs = batch["labels"], {k: batch[k] for k in ("input_ids", "attention_mask")}
answers = [y[y != -100] for y in labels]  # 16 chosen, then 16 rejected
desirable = torch.arange(len(answers)) < len(answers) // 2


def standardised(numbers):
    x = torch.tensor(numbers)
    return (x - x.mean()) / x.std()


auxiliary = {
    "short": standardised([-float(len(y)) for y in answers]),
    "few repeats": standardised([len(y.unique()) / len(y) for y in answers]),
}
rewards = sum(WEIGHTS[name] * auxiliary[name] for name in WEIGHTS)


def mean_logps(model):
    """The mean log-prob of the tokens of each answer, whatever its length."""
    stats = fl.at_head(model, lambda p: fl.token_stats(p, labels, shift=True), **inputs).out
    return (stats.logps * stats.mask).sum(-1) / stats.mask.sum(-1)


with torch.no_grad():
    ref = fl.LogProbs(fl.at_head(reference, lambda p: fl.token_stats(p, labels, shift=True).logps, **inputs).out)
    before = mean_logps(reference)
better = torch.where((rewards[:16] > rewards[16:]), 1.0, -1.0)  # which answer of a prompt the auxiliary rewards prefer


def gain(model):
    """How much more likely the answers have become that the auxiliary rewards prefer, and the chosen ones, in nats a token."""
    with torch.no_grad():
        chosen, rejected = (mean_logps(model) - before).chunk(2)
    return (better * (chosen - rejected)).mean().item(), (chosen - rejected).mean().item()


def kto(p, values):
    return fl.kto_loss(p, labels, ref, desirable, beta=0.1, shift=True).loss


def upo(p, values):
    how = {"loss_type": fl.kto_loss, "desirable": desirable, "beta": 0.1, "tau": 0.5, "weight": 0.01, "clip": 5.0}
    return fl.upo_loss(p, labels, ref, (rewards, values), shift=True, **how).loss + fl.expectile_loss(rewards, values)


def upo_written_out(values):
    """At the start, where the policy is the reference and KTO's losses are 1/2."""
    nll = -before * torch.tensor([len(y) for y in answers])
    off = rewards - values
    weights = (off / 0.5).exp().clamp(max=5.0)
    return 0.5 + 0.01 * (weights * nll).mean() + (torch.where(off < 0, 0.3, 0.7) * off.square()).mean()


def train(loss):
    model, head = copy.deepcopy(policy), torch.nn.Linear(policy.config.hidden_size, 1)
    prompt_ends = (labels != -100).int().argmax(-1) - 1  # the last token of each prompt
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=5e-4)

    def with_values(p):
        states = p.hidden[torch.arange(len(labels)), prompt_ends].detach()
        return loss(p, head(states).squeeze(-1))

    gains = []
    for _ in range(STEPS):
        fl.at_head(model, with_values, **inputs).out.backward()
        optimizer.step()
        optimizer.zero_grad()
        gains.append(gain(model))
    return gains


torch.manual_seed(options.seed)
values = torch.randn(len(answers))
with torch.no_grad():
    torch.testing.assert_close(fl.at_head(policy, lambda p: upo(p, values), **inputs).out, upo_written_out(values))

found = {name: train(loss) for name, loss in {"KTO": kto, "UPO": upo}.items()}
for name, gains in found.items():
    print(
        f"{name}: chosen over rejected {gains[-1][1]:+.2f} nats a token, better by auxiliary rewards {gains[-1][0]:+.2f}"
    )

(kto_aux, kto_chosen), (upo_aux, upo_chosen) = (gains[-1] for gains in found.values())
assert kto_chosen > 1 and upo_chosen > 0.2 and upo_aux > kto_aux + 0.2
print("UPO follows the auxiliary rewards and the preferences; KTO the preferences alone")

if options.plot:
    steps = list(range(1, STEPS + 1))
    lines = {name: (steps, [auxiliary for auxiliary, _ in gains]) for name, gains in found.items()}
    title = "UPO takes up the auxiliary rewards that KTO goes against"
    tiny.picture(options.plot, title, "step", "nats a token in favour of the answer with more reward", lines)
