"""python -m fused_losses memory: what a loss step allocates beyond the logits, in naive eager code and in ours."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from . import torch_backend
from .divergences import Divergence, parse

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}


def naive_loss(policy: Tensor, labels: Tensor, ref: Tensor | None, divergences: Sequence[Divergence]) -> Tensor:
    """The code that NAIVE and NAIVE_DIVERGENCE are about: fp32 log-softmaxes and textbook divergences of probabilities."""
    log_p = policy.float().log_softmax(-1)
    loss = log_p.gather(-1, labels.unsqueeze(-1)).sum()
    if ref is None:
        return loss
    log_q = ref.float().log_softmax(-1)
    loss = loss - log_q.gather(-1, labels.unsqueeze(-1)).sum()
    for divergence in divergences:
        loss = loss + divergence.define(log_p.exp(), log_q.exp()).sum()
    return loss


# Peak bytes per logit of one model, forward and backward of naive_loss. Measured with memory_probe.peak_bytes at two sizes
# (32 and 160 rows of 2048, torch 2.13, CPU); the slope came out whole, and the same for the three dtypes. First number:
# the gradient goes to the policy; second: to both models.
NAIVE = (12, 16)
# With one divergence: (peak, what it keeps for backward beyond the log-softmaxes). Several add up in naive_bytes.
NAIVE_DIVERGENCE = {
    "reverse_kl": ((28, 8), (39, 8)),
    "forward_kl": ((28, 8), (39, 8)),
    "jeffreys": ((31, 8), (43, 8)),
    "js": ((39, 12), (47, 12)),
    "alpha": ((29, 9), (36, 17)),
    "pearson_chi2": ((29, 9), (36, 17)),
    "neyman_chi2": ((29, 9), (36, 17)),
    "squared_hellinger": ((28, 12), (40, 20)),
    "total_variation": ((24, 8), (28, 12)),
    "skew_forward_kl": ((32, 12), (39, 12)),
    "skew_reverse_kl": ((32, 8), (39, 12)),
    "alpha_beta": ((32, 8), (40, 16)),
}

# Temporaries of the torch backend at its peak, in blocks of torch_backend.BLOCK_BYTES, measured in the same way: without
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

    def naive_per_logit(self) -> int:
        """Each divergence peaks on top of what those before it keep; in backward the ones after it have left a gradient."""
        peak, kept, last = NAIVE[self.both], 0, len(self.divergences) - 1
        for i, divergence in enumerate(self.divergences):
            if divergence.name not in NAIVE_DIVERGENCE:
                raise ValueError(f"divergence: {divergence.name!r} has not been measured; see NAIVE_DIVERGENCE")
            alone, keeps = NAIVE_DIVERGENCE[divergence.name][self.both]
            peak = max(peak, alone + kept + (4 + 4 * self.both if i < last else 0))
            kept += keeps
        return peak

    def naive(self) -> int:
        return self.rows * self.vocab * self.naive_per_logit()

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
