"""Trainers of TRL beside ours: data, models and logs that several tests of trainers share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset
from helpers import seeded
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

import fused_losses as fl
from fused_losses.cli import demo

ROWS, STEPS = 8, 2
PATH = Path(fl.__file__).parent / "cli/data/preferences.jsonl"
SIZES = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    initializer_range=0.3,
    pad_token_id=0,
    eos_token_id=0,
)


def new_tokenizer():
    made = PreTrainedTokenizerFast(tokenizer_object=demo.train_tokenizer(demo.load_pairs(str(PATH), 64), 300))
    made.eos_token = made.pad_token = made.convert_ids_to_tokens(0)
    return made


def rows(kind="pairs"):
    found = [json.loads(line) for line in PATH.read_text("utf-8").splitlines()[:ROWS]]
    short = [{k: r[k][:40] for k in ("prompt", "chosen", "rejected")} for r in found]
    if kind == "pairs":
        return Dataset.from_list(short)
    return Dataset.from_list(
        [
            {"prompt": r["prompt"], "completion": r["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
            for i, r in enumerate(short)
        ]
    )


def tiny(tokenizer, seed=1, cls=LlamaForCausalLM, **options):
    seeded(seed)
    made = {LlamaForCausalLM: LlamaConfig, MixtralForCausalLM: MixtralConfig}[cls]
    return cls(made(vocab_size=len(tokenizer), **SIZES | options))


def run(trainer, state, **settings):
    """The log of a training from these weights, under these settings."""
    trainer.model.load_state_dict(state)
    for name, value in settings.items():
        setattr(trainer, name, value)
    trainer.model.train()
    seeded(0)
    trainer.state.log_history.clear()
    trainer._total_train_tokens = 0
    trainer.train()
    ignored = ("runtime", "per_second", "flos", "epoch", "step_time")
    return [{k: x for k, x in entry.items() if not any(i in k for i in ignored)} for entry in trainer.state.log_history]


def same(mine, theirs, tolerance=2e-4):
    assert len(mine) == len(theirs) >= STEPS
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for name, x in b.items():
            assert a[name] == pytest.approx(x, rel=tolerance, abs=tolerance), name
