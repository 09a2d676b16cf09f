"""Batches of changing shapes compile no kernel after the first: sizes, strides and addresses that change are in no key."""

import json
import os
from pathlib import Path

import pytest
from helpers import python

pytest.importorskip("triton")
MOST = 6  # kernels of a loop
LOOPS = (
    "dpo from logits, padded",
    "dpo from logits, odd vocabulary",
    "dpo from logits, shifted by hand",
    "dpo from logits, packed",
    "dpo, vocab_chunks",
    "dpo, keep_logits",
    "dpo, row_blocks",
    "distillation, vocab_chunks",
    "js, on_chip",
    "topk",
)


@pytest.fixture(scope="module")
def compilations():
    """[batch, kernel] of each compilation of every loop."""
    program = Path(__file__).parents[1] / "support" / "compilations.py"
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FUSED_LOSSES_BACKEND")}
    done = python(str(program), env=clean, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("loop", LOOPS)
def test_all_kernels_compile_in_the_first_batch(compilations, loop):
    found = compilations[loop]
    assert 4 <= len(found) <= MOST, found  # at least 4: launches are seen
    assert {batch for batch, _ in found} == {0}, found


def test_every_loop_is_known(compilations):
    assert set(compilations) == set(LOOPS)
