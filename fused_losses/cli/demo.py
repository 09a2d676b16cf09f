"""The command python -m fused_losses demo: a small DPO training, from preference pairs to a picture.

It trains with the loss as most people write it, with fl.dpo_loss on logits, and with fl.dpo_loss on hidden states, where the
logits of all rows never exist. The runs start from the same weights and see the same batches, so their losses must agree;
memory and time may differ. The policy is an untrained two-layer Llama with a vocabulary of full size, because the cost of a
loss depends on the vocabulary.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import fused_losses as fl

from .memory import byte_count
from .memory_probe import peak_bytes

COLUMNS = ("prompt", "chosen", "rejected")
FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
TOKENS = 4096  # enough for a few hundred pairs; the rest of the model's vocabulary never occurs, but has its cost
PAD, EOS, IGNORE = 0, 1, -100
PLAIN = ("naive", "from logits", "from hidden")  # the three runs of plain DPO that have to agree

# Relative differences that rounding explains. At the first step all margins are 0, in any code. Later the log-probs
# of an answer sum to hundreds, where fp32 moves in steps of 6e-5: a margin is good to 1e-5, loss and gradient to a few
# times that. Over two trainings Adam feeds such rounding back into the weights and the curves drift: 1e-5 in 20 steps.
FIRST_STEP, SAME_WEIGHTS, SAME_TRAINING = 1e-5, 1e-4, 1e-3

Pair = tuple[str, str, str]  # prompt, chosen, rejected
Loss = tuple[Tensor, dict[str, Tensor]]  # and metrics
LossFunction = Callable[[fl.Hidden, fl.Hidden, Tensor], Loss]


def logits(source: fl.Hidden) -> Tensor:
    return F.linear(source.hidden, source.weight)


def naive(policy: fl.Hidden, ref: fl.Hidden, labels: Tensor, beta: float) -> Loss:
    """Compute DPO with the code that fl.dpo_loss replaces.

    Hidden states are [2B, T, H] and labels [2B, T], chosen rows first.
    """
    labels = labels[:, 1:].clone()
    mask = labels != IGNORE
    labels[~mask] = 0

    def sequence_logps(source: fl.Hidden) -> Tensor:
        logps = logits(source)[:, :-1].float().log_softmax(-1)  # as large as the logits, and kept for backward
        return (logps.gather(-1, labels.unsqueeze(-1)).squeeze(-1) * mask).sum(-1)

    chosen, rejected = (beta * (sequence_logps(policy) - sequence_logps(ref))).chunk(2)
    margins = (chosen - rejected).detach()
    metrics = {"rewards/margins": margins.mean(), "rewards/accuracies": (margins > 0).float().mean()}
    return -F.logsigmoid(chosen - rejected).mean(), metrics


def from_logits(policy: fl.Hidden, ref: fl.Hidden, labels: Tensor, **options: Any) -> Loss:
    out = fl.dpo_loss(logits(policy), labels, logits(ref), shift=True, **options)
    return out.loss, out.metrics


def from_hidden(policy: fl.Hidden, ref: fl.Hidden, labels: Tensor, library: Any = fl, **options: Any) -> Loss:
    """Compute DPO without logits, with the code that replaces `naive`.

    With `fl.reference` as the library this is the eager reference implementation, which defines what is correct.
    """
    out = library.dpo_loss(policy, labels, ref, shift=True, **options)
    return out.loss, out.metrics


class Batch(NamedTuple):
    input_ids: Tensor  # [2B, T], chosen rows first
    labels: Tensor  # [2B, T], prompt and padding are IGNORE


class Model:
    """A causal LM as hidden states and a head."""

    def __init__(self, model: Any):
        self.model, self.backbone, self.head = model, fl.backbone(model), fl.find_head(model)

    def source(self, batch: Batch) -> fl.Hidden:
        out = self.backbone(batch.input_ids, attention_mask=batch.input_ids != PAD, use_cache=False)
        return self.head.source(out.last_hidden_state)


class Step(NamedTuple):
    loss: float
    margin: float
    accuracy: float
    loss_seconds: float
    seconds: float


def plain_text(value: Any, column: str) -> str:
    """Return a string unchanged, and the text of a list of chat messages.

    Of a prompt this is the text of all messages, of an answer only the assistant's part.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"column {column!r}: expected a string or a list of messages, got {type(value).__name__}")
    others = () if column == "prompt" else ("system", "user")
    return "\n".join(message["content"] for message in value if message.get("role") not in others)


def load_pairs(name: str, limit: int) -> list[Pair]:
    """Return the first pairs of a local file, or of the train split of a dataset on the hub."""
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
    """Train a byte-level BPE on the pairs themselves.

    Nothing is downloaded, and no text is out of vocabulary.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "<eos>"]  # in the order of PAD and EOS
    trainer = trainers.BpeTrainer(vocab_size=min(vocab, TOKENS), special_tokens=special, show_progress=False)
    trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator((text for pair in pairs for text in pair), trainer)
    return tokenizer


def make_batches(pairs: list[Pair], tokenizer: Any, args: argparse.Namespace) -> list[Batch]:
    """Return one right-padded batch per step, with the pairs in a seeded order."""

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


class LossAndGradients(NamedTuple):
    """A loss, and its gradients at the policy's hidden states and head."""

    loss: Tensor
    hidden: Tensor
    head: Tensor


def forward_and_backward(
    loss_function: LossFunction, policy: fl.Hidden, ref: fl.Hidden, labels: Tensor
) -> tuple[LossAndGradients, dict[str, Tensor]]:
    """Return the loss with its gradients, and the metrics.

    The graph is cut at the hidden states, so that head and loss can be measured alone.
    """
    leaf = policy.hidden.detach().requires_grad_()
    loss, metrics = loss_function(replace(policy, hidden=leaf), ref, labels)
    return LossAndGradients(loss.detach(), *torch.autograd.grad(loss, [leaf, policy.weight])), metrics


def train_step(policy: Model, optimizer: Any, reference: Model, batch: Batch, loss_function: LossFunction) -> Step:
    device = batch.labels.device
    start = clock(device)
    ref, source = reference.source(batch), policy.source(batch)
    loss_start = clock(device)
    found, metrics = forward_and_backward(loss_function, source, ref, batch.labels)
    loss_seconds = clock(device) - loss_start
    source.weight.grad = found.head
    source.hidden.backward(found.hidden)
    optimizer.step()
    optimizer.zero_grad()
    seconds = clock(device) - start
    margin, accuracy = metrics["rewards/margins"].item(), metrics["rewards/accuracies"].item()
    return Step(found.loss.item(), margin, accuracy, loss_seconds, seconds)


def error_of_loss(loss_function: partial[Loss], policy: fl.Hidden, ref: fl.Hidden, labels: Tensor) -> float:
    """Return the largest relative difference of the loss, or of one of its gradients, to the reference implementation.

    The eager reference implementation runs in float64.
    """
    few = slice(None), slice(None, None, max(1, labels.shape[1] // 16))  # float64 logits of all tokens would take long
    z, w = (replace(s, hidden=s.hidden[few].detach(), weight=s.weight.detach()) for s in (policy, ref))
    z64, w64 = (replace(s, hidden=s.hidden.double(), weight=s.weight.double()) for s in (z, w))
    for source in (z, z64):
        source.weight.requires_grad_()
    twin = partial(from_hidden, library=fl.reference, **loss_function.keywords)
    ours, _ = forward_and_backward(loss_function, z, w, labels[few])
    truth, _ = forward_and_backward(twin, z64, w64, labels[few])
    errors = [(a - b).norm() / b.norm() for a, b in zip(ours, truth, strict=True)]
    return torch.stack(errors).max().item()  # NaN stays NaN


def report(runs: dict[str, list[Step]], peaks: dict[str, float], gradients: float) -> None:
    def line(name: str, values: Iterable[float], form: str, suffix: str = "") -> None:
        print(f"{name:<30}{''.join(f'{value:>14{form}}' for value in values)}{suffix}")

    names = "".join(f"{name:>14}" for name in runs)
    print(f"\n{'loss, step':<30}{names}{'|difference|':>14}")
    losses = [[step.loss for step in steps] for steps in zip(*runs.values(), strict=True)]
    for i, values in enumerate(losses, 1):
        line(f"{i:>10}", values, ".6f", f"{max(values) - min(values):>14.1e}")
    print(f"largest difference {max(max(values) - min(values) for values in losses):.1e}\n\n{'':<30}{names}")
    line("peak memory of the loss, MiB", peaks.values(), ".0f")
    line("time of the loss, ms", [1e3 * median(step.loss_seconds for step in run) for run in runs.values()], ".0f")
    line("time of a step, ms", [1e3 * median(step.seconds for step in run) for run in runs.values()], ".0f")
    line("reward margin, last 5 steps", [mean(step.margin for step in run[-5:]) for run in runs.values()], ".3f")
    line("reward accuracy, last 5 steps", [mean(step.accuracy for step in run[-5:]) for run in runs.values()], ".2f")
    print(
        "The loss starts and ends at the policy's hidden states: heads of both models, loss, backward to hidden states and\n"
        "head weight. Memory: all that this allocates, so logits and their gradient where there are any, and the gradients\n"
        f"of hidden states and head weight ({gradients:.0f} MiB), which any code has to return. Times are medians."
    )


def draw(path: Path, runs: dict[str, list[Step]], peaks: dict[str, float], gradients: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.4), facecolor="white", layout="constrained")  # white: for dark pages too
    curves, memory, times = figure.subplots(1, 3, width_ratios=(5, 3, 3))
    colors = dict(zip(PLAIN, ("#c4c4c4", "#7fb8d4", "#0b6e99"), strict=True))
    widths = dict(zip(PLAIN, (8, 4, 1.2), strict=True))  # the curves overlap: all three must be visible
    curves.set_prop_cycle(color=["#d1495b", "#e09f3e"])
    for name, run in runs.items():
        style = {"color": colors[name], "linewidth": widths[name]} if name in PLAIN else {"linestyle": "--"}
        curves.plot(range(1, len(run) + 1), [s.loss for s in run], label=name, **style)
    curves.axhline(math.log(2), label="ln 2: no preference yet", color="black", linewidth=0.8, linestyle=":")
    curves.set(xlabel="step", ylabel="loss", title="DPO from the same weights on the same batches")
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.legend(frameon=False)
    medians = [1e3 * median(step.loss_seconds for step in runs[name]) for name in PLAIN]
    for panel, values, unit in ((memory, [peaks[name] for name in PLAIN], "MiB"), (times, medians, "ms")):
        bars = panel.bar(PLAIN, values, color=list(colors.values()), width=0.6)
        panel.bar_label(bars, fmt=f"%.0f {unit}", padding=3)
        panel.margins(y=0.3)
    hatched = {"fill": False, "edgecolor": "black", "linewidth": 0.6, "hatch": "////", "width": 0.6}
    memory.bar(PLAIN, gradients, label="gradients of hidden states and\nhead, which any code returns", **hatched)
    memory.legend(frameon=False, loc="upper right")
    memory.set(ylabel="MiB beyond hidden states and weights", title="Peak memory of head and loss")
    times.set(ylabel="ms, forward and backward", title="Time of head and loss")
    figure.savefig(path, dpi=150)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    pairs = str(Path(__file__).parent / "data" / "preferences.jsonl")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--dataset", default=pairs, help="json, jsonl, parquet or csv file, or a name on the hub")
    parser.add_argument("--pairs", type=int, default=2000, help="use at most this many pairs")
    parser.add_argument("--steps", type=int, default=20, help="steps of each of the three DPO runs")
    parser.add_argument("--f-steps", type=int, default=6, help="steps of each f-DPO run")
    parser.add_argument("--batch", type=int, default=4, help="pairs in a batch")
    parser.add_argument("--max-length", type=int, default=128, help="tokens in a sequence, the rest is cut off")
    parser.add_argument("--vocab", type=int, default=50304, help="vocabulary of the model, at least 258")
    parser.add_argument("--beta", type=float, default=0.1, help="strength of the pull towards the reference")
    parser.add_argument("--workspace", type=byte_count, default="64M", help="bytes for tiles, from hidden states")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the pairs")
    parser.add_argument("--device", type=torch.device, default=device, help="where to train")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="where the picture goes")


def main(args: argparse.Namespace) -> int:
    """Return 0 if all codes agree, 1 if they do not, and 2 if something is missing."""
    try:
        import matplotlib  # noqa: F401  (missing? say so before the training)
        from tqdm import tqdm

        pairs = load_pairs(args.dataset, args.pairs)
        batches = make_batches(pairs, train_tokenizer(pairs, args.vocab), args)
        model = build_model(args)
    except (ImportError, OSError) as error:  # OSError: no such file, no such dataset, no network
        hint = '; in the checkout: pip install -e ".[demo]"' if isinstance(error, ImportError) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return 2
    print(f"{len(pairs)} pairs, {args.batch} a step, {args.vocab} tokens, torch {torch.__version__} on {args.device}")

    hidden = partial(from_hidden, beta=args.beta, workspace=args.workspace)
    losses: dict[str, partial[Loss]] = {
        "naive": partial(naive, beta=args.beta),
        "from logits": partial(from_logits, beta=args.beta),
        "from hidden": hidden,
        "f-DPO, js": partial(hidden, divergence=fl.divergences.get("js")),
        "f-DPO, alpha 0.5": partial(hidden, divergence=fl.divergences.get("alpha", a=0.5)),
    }
    steps = {name: args.steps if name in PLAIN else args.f_steps for name in losses}
    policies = {name: Model(copy.deepcopy(model)) for name in losses}
    reference = Model(model.requires_grad_(False))
    optimizers = {name: torch.optim.AdamW(p.model.parameters(), lr=args.lr) for name, p in policies.items()}
    runs: dict[str, list[Step]] = {name: [] for name in losses}
    peaks, errors = dict[str, float](), dict[str, float]()
    with tqdm(total=sum(steps.values()), unit="step") as progress:
        for i, batch in enumerate(batches):
            for name, loss_function in losses.items():  # in turns, so that other load on the machine slows all alike
                if i < steps[name]:
                    runs[name].append(train_step(policies[name], optimizers[name], reference, batch, loss_function))
                    progress.update()
                if i == 0:  # the policy has left the reference, but no exponential link has become steep yet
                    inputs = policies[name].source(batch), reference.source(batch), batch.labels
                    errors[name] = error_of_loss(loss_function, *inputs)
                    if name in PLAIN:
                        peaks[name] = peak_bytes(partial(forward_and_backward, loss_function, *inputs)) / 2**20

    policy, ref, labels = inputs
    plan = fl.explain(fl.dpo_loss, policy, labels, ref, shift=True, workspace=args.workspace).steps[-1].plan
    print(f"from hidden: {plan}")
    plain = {name: runs[name] for name in PLAIN}
    gradients = (policy.hidden.nbytes + policy.weight.nbytes) / 2**20
    report(plain, peaks, gradients)
    for name, difference in errors.items():
        print(f"{name}: loss and gradients after one step within {difference:.0e} of fl.reference.dpo_loss in float64")
    draw(args.out, runs, peaks, gradients)
    print(f"picture: {args.out}")

    drift = [abs(step.loss / first.loss - 1) for first, *others in zip(*plain.values(), strict=True) for step in others]
    same = all(x <= FIRST_STEP for x in drift[:2]) and all(x <= SAME_TRAINING for x in drift)  # NaN is not <= either
    if same and all(error <= SAME_WEIGHTS for error in errors.values()):
        return 0
    print("error: the losses differ by more than rounding", file=sys.stderr)
    return 1
