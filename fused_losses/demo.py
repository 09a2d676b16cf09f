"""A small DPO training, from preference pairs to a picture: with the loss as most people write it and with fl.dpo_loss.

Both runs start from the same weights and see the same batches, so their losses must agree; memory and time need not.
The policy is an untrained two-layer Llama with a vocabulary of full size: the vocabulary is what a loss pays for.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import fused_losses as fl

from .memory_probe import peak_bytes

COLUMNS = ("prompt", "chosen", "rejected")
FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
TOKENS = 4096  # all that a few hundred pairs can fill; the rest of the model's vocabulary is never seen, but paid for
PAD, EOS, IGNORE = 0, 1, -100

# Relative differences that rounding explains. At the first step all margins are 0, in either code. Later the log-probs
# of an answer sum to hundreds, where fp32 moves in steps of 6e-5: a margin is good to 1e-5, loss and gradient to a few
# times that. Over two trainings Adam feeds such rounding back into the weights and the curves drift: 1e-5 in 20 steps.
FIRST_STEP, SAME_LOGITS, SAME_TRAINING = 1e-5, 1e-4, 1e-3

Pair = tuple[str, str, str]  # prompt, chosen, rejected
Loss = tuple[Tensor, dict[str, Tensor]]  # and metrics
LossFunction = Callable[[Tensor, Tensor, Tensor], Loss]


def naive_dpo_loss(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, beta: float) -> Loss:
    """The code to replace. Logits [2B, T, V] and labels [2B, T], chosen rows first."""
    labels = labels[:, 1:].clone()
    mask = labels != IGNORE
    labels[~mask] = 0

    def sequence_logps(logits: Tensor) -> Tensor:
        logps = logits[:, :-1].float().log_softmax(-1)  # as large as the logits, and kept for backward
        return (logps.gather(-1, labels.unsqueeze(-1)).squeeze(-1) * mask).sum(-1)

    rewards = beta * (sequence_logps(policy_logits) - sequence_logps(ref_logits))
    chosen, rejected = rewards.chunk(2)
    loss = -F.logsigmoid(chosen - rejected).mean()
    margins = (chosen - rejected).detach()
    return loss, {"rewards/margins": margins.mean(), "rewards/accuracies": (margins > 0).float().mean()}


def fused_dpo_loss(policy: Tensor, ref: Tensor, labels: Tensor, library: Any = fl, **options: Any) -> Loss:
    """What replaces it. `fl.reference` as the library is the eager twin that defines what is correct."""
    out = library.dpo_loss(policy, labels, ref, shift=True, **options)
    return out.loss, out.metrics


class Batch(NamedTuple):
    input_ids: Tensor  # [2B, T], chosen rows first
    labels: Tensor  # [2B, T], prompt and padding are IGNORE

    def logits(self, model: Any) -> Tensor:
        return model(self.input_ids, attention_mask=self.input_ids != PAD, use_cache=False).logits


class Step(NamedTuple):
    loss: float
    margin: float
    accuracy: float
    loss_seconds: float
    seconds: float


def plain_text(value: Any, column: str) -> str:
    """A string as it is; of a list of chat messages all of the prompt, but only the assistant's part of an answer."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"column {column!r}: expected a string or a list of messages, got {type(value).__name__}")
    others = () if column == "prompt" else ("system", "user")
    return "\n".join(message["content"] for message in value if message.get("role") not in others)


def load_pairs(name: str, limit: int) -> list[Pair]:
    """The first pairs of a local file, or of the train split of a dataset on the hub."""
    import datasets

    datasets.disable_progress_bars()
    builder = FORMATS.get(Path(name).suffix)
    rows = datasets.load_dataset(builder or name, data_files=name if builder else None, split="train")
    if missing := [column for column in COLUMNS if column not in rows.column_names]:
        raise ValueError(f"{name} lacks {', '.join(missing)}: expected {COLUMNS}, got {tuple(rows.column_names)}")
    rows = rows.select(range(min(limit, len(rows))))
    prompts, chosen, rejected = ([plain_text(value, column) for value in rows[column]] for column in COLUMNS)
    return list(zip(prompts, chosen, rejected, strict=True))


def train_tokenizer(pairs: list[Pair], vocab: int) -> Any:
    """Byte-level BPE on the pairs themselves: nothing to download, and no text is out of vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "<eos>"]  # in the order of PAD and EOS
    trainer = trainers.BpeTrainer(vocab_size=min(vocab, TOKENS), special_tokens=special, show_progress=False)
    trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator((text for pair in pairs for text in pair), trainer)
    return tokenizer


def make_batches(pairs: list[Pair], tokenizer: Any, args: argparse.Namespace) -> list[Batch]:
    """One right-padded batch per step, the pairs in a seeded order."""

    def encode(prompt: str, answer: str) -> tuple[Tensor, Tensor]:
        start, end = tokenizer.encode(prompt + "\n\n").ids, tokenizer.encode(answer).ids + [EOS]
        tokens, labels = start + end, [IGNORE] * len(start) + end
        return torch.tensor(tokens[: args.max_length]), torch.tensor(labels[: args.max_length])

    rows = [(encode(prompt, chosen), encode(prompt, rejected)) for prompt, chosen, rejected in pairs]
    rows = [row for row in rows if all(labels[-1] != IGNORE for _, labels in row)]  # the prompt alone may fill a row
    if not rows:
        raise ValueError(f"--max-length: expected room for a prompt and some of its answer, got {args.max_length}")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).tolist()
    batches = []
    for first in range(0, args.batch * max(args.steps, args.f_steps), args.batch):
        picked = [rows[order[i % len(rows)]] for i in range(first, first + args.batch)]
        sequences = [chosen for chosen, _ in picked] + [rejected for _, rejected in picked]
        ids = pad_sequence([tokens for tokens, _ in sequences], batch_first=True, padding_value=PAD)
        labels = pad_sequence([targets for _, targets in sequences], batch_first=True, padding_value=IGNORE)
        batches.append(Batch(ids.to(args.device), labels.to(args.device)))
    return batches


def build_model(args: argparse.Namespace) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    size = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=args.vocab, max_position_embeddings=args.max_length, pad_token_id=PAD, **size)
    return LlamaForCausalLM(config).to(args.device)


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def forward_and_backward(loss_function: LossFunction, logits: Tensor, *args: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Loss, its gradient at the logits and the metrics. Cutting the graph there lets the loss be measured alone."""
    leaf = logits.detach().requires_grad_()
    loss, metrics = loss_function(leaf, *args)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0], metrics


def train_step(policy: Any, optimizer: Any, reference: Any, batch: Batch, loss_function: LossFunction) -> Step:
    device = batch.labels.device
    start = clock(device)
    with torch.no_grad():
        ref_logits = batch.logits(reference)
    logits = batch.logits(policy)
    loss_start = clock(device)
    loss, gradient, metrics = forward_and_backward(loss_function, logits, ref_logits, batch.labels)
    loss_seconds = clock(device) - loss_start
    logits.backward(gradient)
    optimizer.step()
    optimizer.zero_grad()
    seconds = clock(device) - start
    margin, accuracy = metrics["rewards/margins"].item(), metrics["rewards/accuracies"].item()
    return Step(loss.item(), margin, accuracy, loss_seconds, seconds)


def error_of_loss(loss_function: partial[Loss], policy: Tensor, ref: Tensor, labels: Tensor) -> float:
    """Relative difference to the eager twin in float64 on the same logits: of the loss, or its gradient if that is more."""
    twin = partial(loss_function, library=fl.reference)
    ours = forward_and_backward(loss_function, policy, ref, labels)[:2]
    truth = forward_and_backward(twin, policy.double(), ref.double(), labels)[:2]
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, truth, strict=True))


def report(naive: list[Step], fused: list[Step], peaks: list[float], gradient: float) -> None:
    print(f"\n{'step':>4} {'naive':>11} {'fused':>11} {'|difference|':>14}")
    differences = [abs(a.loss - b.loss) for a, b in zip(naive, fused, strict=True)]
    for i, (a, b, difference) in enumerate(zip(naive, fused, differences, strict=True), 1):
        print(f"{i:>4} {a.loss:>11.6f} {b.loss:>11.6f} {difference:>14.1e}")
    print(f"largest difference {max(differences):.1e}\n\n{'':<30} {'naive':>11} {'fused':>11}")
    runs = naive, fused
    for name, form, values in (
        ("peak memory of the loss, MiB", ".0f", peaks),
        ("time of the loss, ms", ".0f", [1e3 * median(step.loss_seconds for step in run) for run in runs]),
        ("time of a step, ms", ".0f", [1e3 * median(step.seconds for step in run) for run in runs]),
        ("reward margin, last 5 steps", ".3f", [mean(step.margin for step in run[-5:]) for run in runs]),
        ("reward accuracy, last 5 steps", ".2f", [mean(step.accuracy for step in run[-5:]) for run in runs]),
    ):
        print(f"{name:<30} {values[0]:>11{form}} {values[1]:>11{form}}")
    print("The loss is forward and backward from the logits on; times are medians. Memory is beyond the logits of both")
    print(f"models; {gradient:.0f} MiB of it is the gradient of the policy's logits, which either code has to return.")


def draw(path: Path, runs: dict[str, list[Step]], peaks: list[float], gradient: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), facecolor="white", layout="constrained")  # white: for dark pages too
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    grey, blue, dotted = "#bbbbbb", "#0b6e99", {"color": "black", "linewidth": 0.8, "linestyle": ":"}
    styles = {"naive": {"color": grey, "linewidth": 6}, "fused": {"color": blue, "linewidth": 1.8}}
    curves.set_prop_cycle(color=["#d1495b", "#e09f3e"])
    for name, run in runs.items():
        curves.plot(range(1, len(run) + 1), [s.loss for s in run], label=name, **styles.get(name, {"linestyle": "--"}))
    curves.axhline(math.log(2), label="ln 2: no preference yet", **dotted)
    curves.set(xlabel="step", ylabel="loss", title="DPO from the same weights on the same batches")
    curves.legend(frameon=False)
    bars.bar_label(bars.bar(["naive", "fused"], peaks, color=[grey, blue], width=0.6), fmt="%.0f MiB", padding=3)
    bars.axhline(gradient, label="gradient of the logits alone", **dotted)
    bars.margins(y=0.15)
    bars.legend(frameon=False)
    bars.set(ylabel="MiB beyond the logits", title="Peak memory of the loss")
    figure.savefig(path, dpi=150)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    pairs = str(Path(__file__).parent / "data" / "preferences.jsonl")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--dataset", default=pairs, help="json, jsonl, parquet or csv file, or a name on the hub")
    parser.add_argument("--pairs", type=int, default=2000, help="use at most this many pairs")
    parser.add_argument("--steps", type=int, default=20, help="steps of each of the two DPO runs")
    parser.add_argument("--f-steps", type=int, default=6, help="steps of each f-DPO run")
    parser.add_argument("--batch", type=int, default=4, help="pairs in a batch")
    parser.add_argument("--max-length", type=int, default=128, help="tokens in a sequence, the rest is cut off")
    parser.add_argument("--vocab", type=int, default=50304, help="vocabulary of the model, at least 258")
    parser.add_argument("--beta", type=float, default=0.1, help="strength of the pull towards the reference")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the pairs")
    parser.add_argument("--device", type=torch.device, default=device, help="where to train")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="where the picture goes")


def main(args: argparse.Namespace) -> int:
    """0: both codes agree. 1: they do not. 2: something is missing."""
    try:
        import matplotlib  # noqa: F401  (missing? say so before the training)
        from tqdm import tqdm

        pairs = load_pairs(args.dataset, args.pairs)
        batches = make_batches(pairs, train_tokenizer(pairs, args.vocab), args)
        reference = build_model(args)
    except (ImportError, OSError) as error:  # OSError: no such file, no such dataset, no network
        hint = '; try: pip install "fused_losses[demo]"' if isinstance(error, ImportError) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return 2
    print(f"{len(pairs)} pairs, {args.batch} a step, {args.vocab} tokens, torch {torch.__version__} on {args.device}")

    js, alpha = fl.divergences.get("js"), fl.divergences.get("alpha", a=0.5)
    divergences = {"fused": "reverse_kl", "f-DPO, js": js, "f-DPO, alpha 0.5": alpha}
    losses: dict[str, partial[Loss]] = {"naive": partial(naive_dpo_loss, beta=args.beta)}
    losses |= {name: partial(fused_dpo_loss, beta=args.beta, divergence=d) for name, d in divergences.items()}
    steps = {name: args.f_steps if name.startswith("f-DPO") else args.steps for name in losses}
    policies = {name: copy.deepcopy(reference) for name in losses}
    optimizers = {name: torch.optim.AdamW(policy.parameters(), lr=args.lr) for name, policy in policies.items()}
    runs: dict[str, list[Step]] = {name: [] for name in losses}
    peaks, errors = dict[str, float](), dict[str, float]()
    with tqdm(total=sum(steps.values()), unit="step") as progress:
        for i, batch in enumerate(batches):
            for name, loss_function in losses.items():  # in turns: what else the machine does slows them all alike
                if i < steps[name]:
                    runs[name].append(train_step(policies[name], optimizers[name], reference, batch, loss_function))
                    progress.update()
                if i == 0:  # the policy has left the reference, but no exponential link has become steep yet
                    with torch.no_grad():
                        inputs = batch.logits(policies[name]), batch.logits(reference), batch.labels
                    peaks[name] = peak_bytes(partial(forward_and_backward, loss_function, *inputs)) / 2**20
                    if name != "naive":
                        errors[name] = error_of_loss(loss_function, *inputs)

    bars, gradient = [peaks["naive"], peaks["fused"]], batches[0].labels.numel() * args.vocab * 4 / 2**20
    report(runs["naive"], runs["fused"], bars, gradient)
    for name, difference in errors.items():
        print(f"{name}: loss and gradient after one step within {difference:.0e} of fl.reference.dpo_loss in float64")
    draw(args.out, runs, bars, gradient)
    print(f"picture: {args.out}")

    drift = [abs(a.loss - b.loss) / a.loss for a, b in zip(runs["naive"], runs["fused"], strict=True)]
    agree = drift[0] <= FIRST_STEP and all(error <= SAME_LOGITS for error in errors.values())  # NaN is not <= either
    if agree and all(difference <= SAME_TRAINING for difference in drift):
        return 0
    print("error: the losses differ by more than rounding", file=sys.stderr)
    return 1
