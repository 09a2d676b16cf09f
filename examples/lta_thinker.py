"""LTA-Thinker (arXiv 2509.12875): a small thinker writes latent thoughts into the input of a frozen language model.

python examples/lta_thinker.py [--seed N] [--plot FILE]

The paper wants the distribution of latent thoughts to be learnable and varied: thoughts that depend on the question. Here the
variance of a thought over questions grows while answers become likelier and the question comes closer to the thought that is
most like its answer. Our data has no reasoning steps: the thoughts are the steps.
"""

import tiny
import torch
from torch import nn

import fused_losses as fl

STEPS, THOUGHTS, B = 120, 4, 16
options = tiny.options()
tokenizer = tiny.tokenizer()
model = tiny.model(options.seed)
embed, width = model.get_input_embeddings(), model.config.hidden_size


def padded(texts, side):
    made = tokenizer(texts, return_tensors="pt", padding=True, padding_side=side, truncation=True, max_length=24)
    return made["input_ids"], made["attention_mask"]


rows = tiny.rows(B)
questions, asked = padded([row["prompt"] for row in rows], "left")
answers, there = padded([row["chosen"] for row in rows], "right")
mask = torch.cat([asked, torch.ones(B, THOUGHTS, dtype=torch.long), there], 1)
labels = torch.cat([torch.full((B, questions.shape[1] + THOUGHTS), -100), answers.masked_fill(there == 0, -100)], 1)


def with_thoughts(thoughts, function):
    """function of the model's states, where the thoughts stand between question and answer."""
    inputs = torch.cat([embed(questions), thoughts, embed(answers)], 1)
    return fl.at_head(model, function, inputs_embeds=inputs, attention_mask=mask).out


def answer_loss(source):
    return fl.cross_entropy_loss(source, labels, shift=True).loss


# a language model: it has seen the answers, without thoughts of use
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(40):
    with_thoughts(torch.zeros(B, THOUGHTS, width), answer_loss).backward()
    optimizer.step()
    optimizer.zero_grad()
model.requires_grad_(False)


class Thinker(nn.Module):
    """A transformer block over the question and learnt places for thoughts: the question's state, and the thoughts."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(0.02 * torch.randn(THOUGHTS, width))
        self.block = nn.TransformerEncoderLayer(width, 4, 96, dropout=0.0, batch_first=True, norm_first=True)
        self.project = nn.Linear(width, width)

    def forward(self):
        x = torch.cat([embed(questions), self.places.expand(B, -1, -1)], 1)
        hidden = torch.cat([asked == 0, torch.zeros(B, THOUGHTS, dtype=torch.bool)], 1)
        z = self.project(self.block(x, src_key_padding_mask=hidden))
        return z[:, questions.shape[1] - 1], z[:, questions.shape[1] :]


torch.manual_seed(options.seed)
thinker = Thinker()
optimizer = torch.optim.AdamW(thinker.parameters(), lr=3e-3)
meaning = (embed(answers) * there[..., None]).sum(1) / there.sum(1, keepdim=True)
variances, seen = [], []
for step in range(STEPS):
    question, thoughts = thinker()
    out = with_thoughts(
        thoughts,
        lambda p: fl.lta_thinker_loss(p, labels, question, thoughts, thoughts, meaning, shift=True),  # noqa: B023
    )
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    variances.append(thoughts.detach().var(0).mean().item())  # over questions
    seen.append({name: x.item() for name, x in out.metrics.items()})
    torch.testing.assert_close(out.loss.item(), 0.33 * sum(seen[-1].values()), rtol=1e-5, atol=1e-6)
    if step % 40 == 0 or step == STEPS - 1:
        print(
            f"step {step + 1}: variance of thoughts {variances[-1]:.4f}", {k: round(v, 3) for k, v in seen[-1].items()}
        )

first, last = seen[0], seen[-1]
assert variances[-1] > 2 * variances[0] and last["sft"] < first["sft"] - 0.02
assert last["reasoning_focus"] < first["reasoning_focus"] - 0.3
print(f"the variance of thoughts over questions has grown {variances[-1] / variances[0]:.1f} times")

if options.plot:
    lines = {"variance over questions": (list(range(1, STEPS + 1)), variances)}
    tiny.picture(
        options.plot, "The latent thoughts come to depend on the question", "step", "variance of a thought", lines
    )
