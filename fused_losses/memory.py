"""python -m fused_losses memory: what a loss step allocates beyond the logits, in naive eager code and in ours."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import torch_backend
from .divergences import Divergence, parse
from .memory_probe import peak_bytes

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}


def naive_loss(policy: Tensor, labels: Tensor, ref: Tensor | None, divergences: Sequence[Divergence]) -> Tensor:
    """The naive code that is measured: fp32 log-softmaxes and textbook divergences of probabilities."""
    log_p = policy.float().log_softmax(-1)
    loss = log_p.gather(-1, labels.unsqueeze(-1)).sum()
    if ref is None:
        return loss
    log_q = ref.float().log_softmax(-1)
    loss = loss - log_q.gather(-1, labels.unsqueeze(-1)).sum()
    for divergence in divergences:
        loss = loss + divergence.define(log_p.exp(), log_q.exp()).sum()
    return loss


def naive_bytes(rows: int, step: Step) -> int:
    """Peak of naive_loss, forward and backward, measured on `rows` rows of a small vocabulary on the CPU."""
    dtype = torch.float32 if step.itemsize == 4 else torch.bfloat16
    z, w = (torch.randn(rows, SMALL).to(dtype).requires_grad_(asks) for asks in (True, step.both))
    labels = torch.zeros(rows, dtype=torch.long)
    leaves = [z, w] if step.both else [z]
    ref = w if step.ref else None
    return peak_bytes(lambda: torch.autograd.grad(naive_loss(z, labels, ref, step.divergences), leaves))


SMALL = 2048

# Temporaries of the torch backend at its peak, in blocks of torch_backend.BLOCK_BYTES, measured by peak_bytes: without
# divergence (gradient to policy, to both), with those that close in one pass, with those that are summed over terms.
BLOCKS, BLOCKS_ROW, BLOCKS_TERM = (6, 10), 13, 18


@dataclass(frozen=True)
class Step:
    """A loss step on logits [rows, vocab], twice that with a reference."""

    rows: int
    vocab: int
    itemsize: int
    divergences: tuple[Divergence, ...] = ()
    ref: bool = True
    both: bool = False  # the gradient goes to the reference's logits too

    def __post_init__(self) -> None:
        if not self.ref and (self.divergences or self.both):
            raise ValueError("no-ref: a divergence, or a gradient to the reference, needs a reference")

    @property
    def logits(self) -> int:
        """Bytes of the logits of one model: also those of its gradient."""
        return self.rows * self.vocab * self.itemsize

    def naive_per_logit(self) -> float:
        """Bytes per logit of one model: the slope between two small sizes, so that whole-row numbers cancel."""
        rows = (32, 160)
        few, many = (naive_bytes(n, self) for n in rows)
        return (many - few) / ((rows[1] - rows[0]) * SMALL)

    def naive(self) -> int:
        return round(self.rows * self.vocab * self.naive_per_logit())

    def fused(self, backend: str, inplace: bool = False) -> int:
        """Gradients that do not go in place, numbers per row, and what the torch backend works in."""
        gradients = (not inplace) + self.both
        n = len(self.divergences)
        per_row = 4 * (3 + n) + 4 * (7 + 2 * n) + 4 * (2 + n) + 2  # outputs, saved, incoming gradients, two bools
        return gradients * self.logits + self.rows * per_row + (self._blocks() if backend == "torch" else 0)

    def _blocks(self) -> int:
        row = 4 * self.vocab
        block = row * min(self.rows, max(1, torch_backend.BLOCK_BYTES // row))
        if not self.divergences:
            return BLOCKS[self.both] * block
        return (BLOCKS_TERM if any(d.term for d in self.divergences) else BLOCKS_ROW) * block


def report(step: Step) -> dict[str, int]:
    """Bytes: the input, then what each code allocates on top of it."""
    return {
        "policy_logits": step.logits,
        "reference_logits": step.logits * step.ref,
        "naive": step.naive(),
        "triton": step.fused("triton"),
        "triton_inplace": step.fused("triton", inplace=True),
        "torch": step.fused("torch"),
        "torch_inplace": step.fused("torch", inplace=True),
    }


LABELS = {
    "naive": "naive eager code",
    "triton": "fused, Triton backend",
    "triton_inplace": "fused, Triton, inplace_backward=True",
    "torch": "fused, torch backend",
    "torch_inplace": "fused, torch, inplace_backward=True",
}


def size(count: int) -> str:
    power = min(3, max(0, count.bit_length() - 1) // 10)
    return f"{count / 1024**power:.2f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "What a loss step allocates beyond the logits, in naive eager code and in ours."
    add = parser.add_argument
    add("--batch", type=int, default=8, metavar="B", help="pairs, so 2B sequences; default %(default)s")
    add("--length", type=int, default=1024, metavar="T", help="tokens of a sequence; default %(default)s")
    add("--vocab", type=int, default=128256, metavar="V", help="default %(default)s")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the logits; default %(default)s")
    add("--no-ref", action="store_true", help="a loss without a reference model")
    add(
        "--divergence",
        nargs="+",
        metavar="NAME",
        help="a full-vocabulary divergence that the loss contains, or several",
    )
    add("--both", action="store_true", help="the gradient goes to the reference's logits too")
    add("--json", action="store_true", help="bytes for machines")


def _print(step: Step, sizes: dict[str, int]) -> None:
    inputs = sizes["policy_logits"] + sizes["reference_logits"]
    print(f"logits of policy{' and reference' * step.ref}: {size(inputs)}, the input\n")
    print(f"{'forward and backward of the loss':<38}{'on top of it':>14}{'together':>14}{'bytes a logit':>16}")
    for key, label in LABELS.items():
        per_logit = sizes[key] / step.rows / step.vocab
        print(f"{label:<38}{size(sizes[key]):>14}{size(inputs + sizes[key]):>14}{per_logit:>16.2f}")
    gradient = size(step.logits * (1 + step.both))
    print(
        f"\n{gradient} of it is the gradient of {'both' if step.both else 'the policy'}, which either code has to return;"
    )
    print(
        "inplace_backward=True writes the policy's over its logits. Naive: float32 log-softmax, textbook divergences."
    )


def main(args: argparse.Namespace) -> int:
    if min(args.batch, args.length, args.vocab) < 1:
        raise ValueError(f"expected batch, length, vocab >= 1, got {args.batch}, {args.length}, {args.vocab}")
    rows = 2 * args.batch * args.length
    step = Step(rows, args.vocab, DTYPES[args.dtype], parse(args.divergence), not args.no_ref, args.both)
    sizes = report(step)
    if args.json:
        print(json.dumps(sizes, indent=2))
        return 0
    names = ", ".join(d.key for d in step.divergences) or "none"
    print(f"[{2 * args.batch}, {args.length}, {args.vocab}] {args.dtype}, divergence: {names}")
    _print(step, sizes)
    return 0
