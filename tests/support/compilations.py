"""Which kernels a training loop compiles in which batch, counted by the keys under which Triton keeps what it compiled.

A program of its own, because Triton's interpreter, in which tests run, has no keys. Nothing is compiled and nothing runs.
"""

import json
import random
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.append(str(Path(__file__).parents[2]))  # last: it holds kernels/

from bench import machine_code  # noqa: E402
from fused_losses import backends  # noqa: E402

V, H = 256, 32
BATCHES = 30
SMALL = 60_000  # bytes of workspace: several chunks of the vocabulary
random_sizes = random.Random(0)
weight = torch.randn(V, H, dtype=torch.bfloat16, requires_grad=True)


def logits(*shape, vocab=V):
    return torch.zeros(*shape, vocab, dtype=torch.bfloat16, requires_grad=True)


def labels(*shape):
    return torch.randint(0, V, shape)


def padded(fl, b, t):
    z = logits(b, t)
    fl.dpo_loss(z, labels(b, t), z.detach(), shift=True).loss.backward()


def odd_vocabulary(fl, b, t):
    z = logits(b, t, vocab=V + 1)
    fl.dpo_loss(z, labels(b, t), z.detach(), shift=True).loss.backward()


def shifted_by_hand(fl, b, t):
    z, y = logits(b, t + 1), labels(b, t + 1)
    fl.dpo_loss(z[:, :-1], y[:, 1:], z.detach()[:, :-1], shift=False).loss.backward()


def packed(fl, b, t):
    lengths = [random_sizes.randint(1, t) for _ in range(b)]
    z = logits(sum(lengths))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    fl.dpo_loss(z, labels(len(z)), z.detach(), shift=True, cu_seqlens=offsets).loss.backward()


def hidden(fl, b, t):
    x, y = torch.randn(b, t, H, dtype=torch.bfloat16, requires_grad=True), labels(b, t)
    y[torch.rand(b, t) < 0.3] = -100
    y[:, -1] = 5
    return fl.Hidden(x, weight), y, fl.Hidden(x.detach(), weight.detach())


def dpo(plan, workspace=None):
    def step(fl, b, t):
        fl.dpo_loss(*hidden(fl, b, t), shift=True, plan=plan, workspace=workspace).loss.backward()

    return step


def distillation(fl, b, t):
    fl.distillation_loss(*hidden(fl, b, t), shift=True, plan="vocab_chunks", workspace=SMALL).loss.backward()


def on_chip(fl, b, t):
    with torch.no_grad():
        fl.token_stats(*hidden(fl, b, t), divergence="js", plan="on_chip", shift=False)


def topk(fl, b, t):
    policy, k = hidden(fl, b, t)[0], random_sizes.randint(1, 16)
    fl.topk(policy, k, log_probs=True, workspace=SMALL)


LOOPS = {
    "dpo from logits, padded": padded,
    "dpo from logits, odd vocabulary": odd_vocabulary,
    "dpo from logits, shifted by hand": shifted_by_hand,
    "dpo from logits, packed": packed,
    "dpo, vocab_chunks": dpo("vocab_chunks", SMALL),
    "dpo, keep_logits": dpo("keep_logits"),
    "dpo, row_blocks": dpo("row_blocks"),
    "distillation, vocab_chunks": distillation,
    "js, on_chip": on_chip,
    "topk": topk,
}


def compilations(step):
    """Return [batch, kernel] of each compilation."""
    import fused_losses as fl

    seen, found = set(), []
    with machine_code.keys("sm_90") as launched:
        for batch in range(BATCHES):
            # not of one token, whose rows are laid out in another way
            step(fl, random_sizes.choice((2, 4, 8)), random_sizes.randint(2, 60))
            found += [[batch, name] for name, key in launched if not ((name, key) in seen or seen.add((name, key)))]
            launched.clear()
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with mock.patch.object(backends, "TRITON_DEVICES", (*backends.TRITON_DEVICES, "cpu")):
        print(json.dumps({name: compilations(step) for name, step in LOOPS.items()}))
