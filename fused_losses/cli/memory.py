"""The command python -m fused_losses memory: it prints what a loss step allocates beyond its input.

It compares naive eager code with this library. The input is logits or, with --hidden H, hidden states and head weights. The
memory of this library is predicted from the shapes alone.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..core.divergences import Divergence, parse
from ..core.layout import StatsSpec, saved_rows
from ..engine import planner
from ..engine.hidden_ops import plan_inputs
from ..engine.sides import InputFlags, Inputs, Wanted
from .memory_probe import peak_bytes

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}


def naive_loss(policy: Tensor, labels: Tensor, ref: Tensor | None, divergences: Sequence[Divergence]) -> Tensor:
    """Compute the loss with the naive code that is measured: fp32 log-softmaxes and textbook divergences."""
    log_p = policy.float().log_softmax(-1)
    loss = log_p.gather(-1, labels.unsqueeze(-1)).sum()
    if ref is None:
        return loss
    log_q = ref.float().log_softmax(-1)
    loss = loss - log_q.gather(-1, labels.unsqueeze(-1)).sum()
    for divergence in divergences:
        loss = loss + divergence.define(log_p, log_q).sum()
    return loss


def naive_bytes(rows: int, step: Step) -> int:
    """Measure the peak of naive_loss, forward and backward, on `rows` rows of a small vocabulary on the CPU."""
    dtype = torch.float32 if step.itemsize == 4 else torch.bfloat16
    z, w = (torch.randn(rows, SMALL).to(dtype).requires_grad_(asks) for asks in (True, step.both))
    labels = torch.zeros(rows, dtype=torch.long)
    leaves = [z, w] if step.both else [z]
    ref = w if step.ref else None
    return peak_bytes(lambda: torch.autograd.grad(naive_loss(z, labels, ref, step.divergences), leaves))


SMALL = 2048


@dataclass(frozen=True)
class Step:
    """A loss step on logits [rows, vocab], and on as many logits again with a reference."""

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
        """Return the bytes of the logits of one model, which are also those of its gradient."""
        return self.rows * self.vocab * self.itemsize

    def naive_per_logit(self) -> float:
        """Return the bytes per logit of one model.

        This is the slope between two small sizes, so that numbers that do not depend on the rows cancel.
        """
        rows = (32, 160)
        few, many = (naive_bytes(n, self) for n in rows)
        return (many - few) / ((rows[1] - rows[0]) * SMALL)

    def naive(self) -> int:
        return round(self.rows * self.vocab * self.naive_per_logit())

    def fused(self, backend: str, inplace: bool = False) -> int:
        """Return the bytes of this library's code.

        They are gradients that are not written in place, numbers per row, and the temporaries of the torch backend.
        """
        gradients = (not inplace) + self.both
        n = len(self.divergences)
        per_row = 4 * (3 + n) + 4 * saved_rows(n) + 4 * (2 + n) + 2  # outputs, saved, incoming gradients, two bools
        blocks = planner.logits_blocks(self.rows, self.vocab, self.divergences, self.both)
        return gradients * self.logits + self.rows * per_row + (blocks if backend == "torch" else 0)


@dataclass(frozen=True)
class HeadStep(Step):
    """A loss step on hidden states [rows, hidden] and head weights [vocab, hidden]."""

    hidden: int = 1
    ref_hidden: int = 1
    frozen: bool = False  # the head has no gradient
    unit: int = 0  # rows of a unit of the loss, 0 if the loss is not known

    def input(self) -> int:
        """Return the bytes of states and heads."""
        return (self.rows + self.vocab) * (self.hidden + self.ref * self.ref_hidden) * self.itemsize

    def naive_per_logit(self) -> float:
        """Return the bytes per logit that grow with rows times vocabulary.

        This is the second difference between small sizes.
        """
        rows, vocab = (32, 160), (512, SMALL)
        small, large = ([naive_head_bytes(n, v, self) for n in rows] for v in vocab)
        return (large[1] - large[0] - small[1] + small[0]) / ((rows[1] - rows[0]) * (vocab[1] - vocab[0]))

    def naive(self) -> int:
        """Return the bytes at the peak of the naive code.

        The peak is in the backward of the log-softmaxes or, with large states, in the products after it.
        """
        return max(
            super().naive(), self.logits * (1 + self.both) + sum(planner.gradient_bytes(self.plan_inputs()).values())
        )

    def plan_inputs(self, device: str = "cpu") -> planner.PlanInputs:
        """Return what the planner needs to know: from tensors of these sizes on the device, which take no memory."""
        dtype = torch.float32 if self.itemsize == 4 else torch.bfloat16

        def side(width: int) -> Inputs:
            x, weight = (torch.empty(n, width, dtype=dtype, device=device) for n in (self.rows, self.vocab))
            return Inputs(x, weight)

        with FakeTensorMode():
            return plan_inputs(
                StatsSpec(self.divergences, False, False, shift=False, ignore_index=-100, vocab=self.vocab),
                side(self.hidden),
                side(self.ref_hidden) if self.ref else None,
                self.rows,
                "torch" if device == "cpu" else "triton",
                Wanted(InputFlags(x=True, weight=not self.frozen), InputFlags(x=self.both, weight=self.both)),
                self.unit,
            )

    def ours(self, device: str, plan: planner.Plan) -> dict[str, int]:
        """Return the bytes at the peak of this library's code, by purpose."""
        return planner.peak(self.plan_inputs(device), plan, len(self.divergences)).parts


def naive_head_bytes(rows: int, vocab: int, step: HeadStep) -> int:
    """Measure the peak of naive_loss behind both heads, on small heads of H = 8."""
    dtype = torch.float32 if step.itemsize == 4 else torch.bfloat16
    asks = (True, not step.frozen, step.both, step.both)
    x, head, ref_x, ref_head = (
        torch.randn(size, 8).to(dtype).requires_grad_(a) for size, a in zip((rows, vocab) * 2, asks, strict=True)
    )
    labels = torch.zeros(rows, dtype=torch.long)
    leaves = [t for t in (x, head, ref_x, ref_head) if t.requires_grad]

    def run() -> object:
        loss = naive_loss(x @ head.T, labels, ref_x @ ref_head.T if step.ref else None, step.divergences)
        return torch.autograd.grad(loss, leaves)

    return peak_bytes(run)


def report(step: Step) -> dict[str, int]:
    """Return bytes: the input, then what each code allocates in addition."""
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
    power = min(4, max(0, count.bit_length() - 1) // 10)
    return f"{count / 1024**power:.2f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def byte_count(text: str) -> int:
    """Convert text such as 1048576, 1024K, 256M, 256MiB or 2G to a number of bytes; each unit is 1024 of the one before."""
    match = re.fullmatch(r"(\d+)([KMG]?)(?:I?B)?", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a number of bytes such as 1048576, 1024K, 256M or 2G, got {text!r}")
    return int(match[1]) << 10 * ("KMG".find(match[2]) + 1 if match[2] else 0)


VOCAB = 128256  # unless --vocab or --config says another


def read_config(path: Path) -> tuple[int, int]:
    """Return the sizes of the vocabulary and of the hidden states from a transformers config.json, or the folder with one.

    Models of text and images have these sizes in a part of their own, such as text_config.
    """
    file = path / "config.json" if path.is_dir() else path
    wanted = "a transformers config.json with vocab_size and hidden_size, as in --config model/config.json"
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"config: expected {wanted}, got {file}: {error}") from None
    for part in (config, *(x for x in config.values() if isinstance(x, dict))):
        if isinstance(part.get("vocab_size"), int) and isinstance(part.get("hidden_size"), int):
            return part["vocab_size"], part["hidden_size"]
    raise ValueError(f"config: expected {wanted}, got keys {', '.join(list(config)[:8])}, ... in {file}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "What a loss step allocates beyond its input, in naive eager code and in ours."
    add = parser.add_argument
    add("--batch", type=int, default=8, metavar="B", help="pairs, so 2B sequences; default %(default)s")
    add("--length", type=int, default=1024, metavar="T", help="tokens of a sequence; default %(default)s")
    add("--vocab", type=int, metavar="V", help=f"default {VOCAB}")
    add(
        "--config",
        type=Path,
        metavar="FILE",
        help="a transformers config.json, or its folder, in place of --vocab and --hidden",
    )
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the logits; default %(default)s")
    add("--no-ref", action="store_true", help="a loss without a reference model")
    add(
        "--divergence",
        nargs="+",
        metavar="NAME",
        help="a full-vocabulary divergence that the loss contains, or several",
    )
    add("--both", action="store_true", help="the gradient goes to the reference too")
    add("--json", action="store_true", help="bytes for machines")
    add("--plot", type=Path, metavar="FILE", help="also draw the memory by sequence length, up to --length")
    add = parser.add_argument_group("from hidden states").add_argument
    add("--hidden", type=int, metavar="H", help="features of the states: the input is states and heads, not logits")
    add("--ref-hidden", type=int, metavar="H", help="of the reference; default: the policy's")
    add("--frozen", action="store_true", help="the head has no gradient")
    add("--workspace", type=byte_count, metavar="BYTES", help="for tiles of logits; default 256M")
    losses = (
        "stats: made of token_stats; else one of this library's, by unit, which may compute gradients in its forward"
    )
    units = ("stats", "tokens", "sequences", "pairs")
    add("--loss", choices=units, default="stats", help=f"{losses}; default %(default)s")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="to predict for; default %(default)s")


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


def _print_head(step: HeadStep, plan: planner.Plan, naive: int, ours: dict[str, int]) -> None:
    def row(name: str, count: int, suffix: str = "") -> None:
        print(f"{name:<58}{size(count):>12}{suffix}")

    row(f"states and head of policy{' and reference' * step.ref}, the input", step.input())
    print("\nforward and backward of head and loss, on top of it")
    row("naive: logits, log-softmaxes, gradients", naive, f"   {naive / step.rows / step.vocab:.2f} bytes a logit")
    total = sum(ours.values())
    row("ours, at most", total, f"   {naive / total:.0f} times less" * (naive > 2 * total))
    for name, count in ours.items():
        row(f"  {name}{', which either code has to return' * name.startswith('gradient')}", count)
    print(f"\n{plan}")


def lengths_up_to(length: int) -> list[int]:
    """Return powers of 2 from 128 on, and the length itself."""
    return [n for n in (128 << k for k in range(20)) if n < length] + [length]


def draw(args: argparse.Namespace, file: Path) -> None:
    """Draw the memory of naive code and of ours by sequence length, both axes logarithmic."""
    import matplotlib.pyplot as plt

    lengths = lengths_up_to(args.length)
    steps = [head_step(args, length) for length in lengths]
    plans = [planner.make_plan(step.plan_inputs(args.device), workspace=args.workspace) for step in steps]
    ours = [sum(step.ours(args.device, plan).values()) for step, plan in zip(steps, plans, strict=True)]
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    naive = [step.naive() for step in steps]
    for name, values, colour in (("naive", naive, "#3f4a57"), ("fused_losses", ours, "#cf4a0a")):
        axes.plot(lengths, [x / 2**30 for x in values], marker="o", color=colour)
        end = (lengths[-1], values[-1] / 2**30)
        axes.annotate(name, end, xytext=(-12, -2), textcoords="offset points", ha="right", va="bottom", color=colour)
    last = naive[-1] / ours[-1]
    axes.set_title(f"The memory of the loss: {last:.0f} times less at {lengths[-1]:,} tokens", loc="left", fontsize=10)
    axes.set(xscale="log", yscale="log", xlabel="tokens of a sequence", ylabel="GiB beside states and heads")
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.margins(y=0.12)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(True, alpha=0.3)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def head_step(args: argparse.Namespace, length: int) -> HeadStep:
    """Return the step from hidden states that the arguments describe, for sequences of this length."""
    unit = {"stats": 0, "tokens": 1, "sequences": length, "pairs": 2 * length}[args.loss]
    width = args.hidden if args.ref_hidden is None else args.ref_hidden
    if min(args.hidden, width) < 1:
        raise ValueError(f"hidden, ref-hidden: expected numbers >= 1, got {args.hidden}, {width}")
    return HeadStep(hidden=args.hidden, ref_hidden=width, frozen=args.frozen, unit=unit, **_fields(args, length))


def _fields(args: argparse.Namespace, length: int) -> dict[str, Any]:
    rows = 2 * args.batch * length
    fields: dict[str, Any] = {"rows": rows, "vocab": args.vocab, "itemsize": DTYPES[args.dtype]}
    return fields | {"divergences": parse(args.divergence), "ref": not args.no_ref, "both": args.both}


def _main_hidden(args: argparse.Namespace) -> int:
    step = head_step(args, args.length)
    if args.plot:
        draw(args, args.plot)
    plan = planner.make_plan(step.plan_inputs(args.device), workspace=args.workspace)
    naive, ours = step.naive(), step.ours(args.device, plan)
    if args.json:
        chosen = plan._asdict() | {"gemms": plan.gemms}
        sizes = {"input": step.input(), "naive": naive, "ours": sum(ours.values())}
        print(json.dumps(sizes | {"parts": ours, "plan": chosen}, indent=2))
        return 0
    names = ", ".join(d.key for d in step.divergences) or "none"
    states = f"states [{2 * args.batch}, {args.length}, {args.hidden}], head [{args.vocab}, {args.hidden}]"
    print(f"{states}, {args.dtype} on {args.device}, divergence: {names}")
    _print_head(step, plan, naive, ours)
    return 0


def main(args: argparse.Namespace) -> int:
    if args.config is not None:
        if args.vocab is not None or args.hidden is not None:
            raise ValueError("config: expected it in place of --vocab and --hidden, got both")
        args.vocab, args.hidden = read_config(args.config)
    args.vocab = VOCAB if args.vocab is None else args.vocab
    if min(args.batch, args.length, args.vocab) < 1:
        raise ValueError(f"expected batch, length, vocab >= 1, got {args.batch}, {args.length}, {args.vocab}")
    if args.hidden is not None:
        return _main_hidden(args)
    alone = {"loss": args.loss != "stats", "device": args.device != "cuda"}
    alone |= {name: bool(getattr(args, name)) for name in ("frozen", "workspace", "ref_hidden", "plot")}
    if refused := [f"--{name.replace('_', '-')}" for name, flag in alone.items() if flag]:
        raise ValueError(f"{', '.join(refused)}: need --hidden H beside it, for logits are given whole")
    step = Step(**_fields(args, args.length))
    sizes = report(step)
    if args.json:
        print(json.dumps(sizes, indent=2))
        return 0
    names = ", ".join(d.key for d in step.divergences) or "none"
    print(f"[{2 * args.batch}, {args.length}, {args.vocab}] {args.dtype}, divergence: {names}")
    _print(step, sizes)
    return 0
