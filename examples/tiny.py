"""What stands in for from_pretrained and load_dataset in these examples: models with random weights, a tokenizer trained on
the spot, and the preference pairs that come with the package. Nothing is downloaded."""

import argparse
import json
import os
import sys
from importlib.resources import files

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fused_losses.cli import demo

TOKENS = 1000
SIZES = {
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def rows(count: int = 16) -> list[dict]:
    """prompt, chosen, rejected"""
    lines = (files("fused_losses") / "cli/data/preferences.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def unpaired_rows(count: int = 16) -> list[dict]:
    """prompt, completion, label: one answer of each pair, good and bad ones in turn."""
    found = [(row["prompt"], row["rejected" if i % 2 else "chosen"], i % 2 == 0) for i, row in enumerate(rows(count))]
    return [dict(zip(("prompt", "completion", "label"), row, strict=True)) for row in found]


def tokenizer() -> PreTrainedTokenizerFast:
    texts = [tuple(row.values()) for row in rows(64)]
    made = PreTrainedTokenizerFast(tokenizer_object=demo.train_tokenizer(texts, TOKENS))
    made.pad_token, made.eos_token = made.convert_ids_to_tokens([0, 1])
    made.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    return made


def model(seed: int = 0, vocab_size: int = TOKENS, hidden_size: int = 48, **options) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocab_size, hidden_size=hidden_size, **SIZES | options)
    return LlamaForCausalLM(config)


def options() -> argparse.Namespace:
    """seed and plot; what else there is in the command line is not ours."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE", help="save a picture (needs matplotlib)")
    return parser.parse_known_args()[0]


def picture(file: str, title: str, x: str, y: str, lines: dict[str, tuple[list, list]], dashed: str = "") -> None:
    """Each line (xs, ys) has its name at its end; names that would overlap are moved apart."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.set_title(title, loc="left", fontsize=12)
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    grey = {"color": "0.4", "ls": "--", "zorder": 3}
    drawn = [(axes.plot(*line, lw=2, **grey if name == dashed else {})[0], name) for name, line in lines.items()]
    axes.margins(y=0.1)  # room for names that are moved up
    low, high = axes.get_ylim()
    width, gap, last = axes.get_xlim(), 0.06 * (high - low), low - high  # a line of text is 0.06 of the height
    for line, name in sorted(drawn, key=lambda one: one[0].get_ydata()[-1]):
        end = line.get_xdata()[-1], line.get_ydata()[-1]
        last = max(end[1], last + gap)
        at = end[0] + 0.015 * (width[1] - width[0]), last
        axes.annotate(name, end, at, color=line.get_color(), va="center", annotation_clip=False)
    axes.set_ylim(low, max(high, last + gap))
    figure.savefig(file, dpi=120)


def leave() -> None:
    """Ends a process of torchrun that has come to its end: gloo's threads may abort an interpreter that exits under load
    ("terminate called without an active exception"), so this one does not take the usual way out."""
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
