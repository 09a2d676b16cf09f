"""The two cost models, which need no GPU: bytes that a launch asks for, and the machine code that it compiles to."""

import os
import sys
from pathlib import Path

import pytest
import torch
import traffic

from fused_losses import divergences
from fused_losses.core import margin_losses

pytest.importorskip("triton")
if str(ROOT := Path(__file__).parents[2]) not in sys.path:
    sys.path.append(str(ROOT))  # last: it holds kernels/

from bench import static  # noqa: E402

ON_CPU = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts bytes in Triton's interpreter")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
NAMES = divergences.names()
TWO_PASS = {n for n in NAMES if divergences.get(n).term is not None}


@pytest.mark.slow
@ON_CPU
@pytest.mark.parametrize("name", [None, *NAMES, "both"])
def test_requested_over_compulsory_bytes(monkeypatch, name):
    """Each logit is read once forward (twice by the two-pass divergences) and once backward, each gradient written once."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton")
    asked = ["reverse_kl", "forward_kl"] if name == "both" else name
    forward, backward = traffic.measure(asked, entropy=True, vocab=20011)
    assert forward <= (2.03 if name in TWO_PASS else 1.03) and backward <= 1.03
    assert forward >= 0.99 and backward >= 0.99  # the counter counts


@ON_CPU
def test_bytes_of_ignored_rows_and_of_the_reference_gradient(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton")
    forward, backward = traffic.measure("forward_kl", rows=3, masked=2, to_ref=True, vocab=20011, dtype=torch.float16)
    assert forward <= 1.03 and backward <= 1.03


@pytest.fixture(scope="module")
def machine_code(static_report):
    """Rows of token_stats and of the pair kernels."""
    kernels = ("token_stats", "pair")
    return {(r["target"], r["workload"], r["direction"]): r for r in static_report.rows if r["kernel"] in kernels}


def test_every_divergence_compiles(machine_code):
    """For sm_90 and one more, and those that are kinds of their own for all."""
    for name in NAMES:
        both = [{t for t in TARGETS if (t, name, way) in machine_code} for way in ("forward", "backward, both")]
        assert both[0] == both[1] and "sm_90" in both[0] and len(both[0]) == (4 if name in static.KINDS else 2), name


@pytest.mark.parametrize("target", TARGETS)
def test_every_term_and_link_of_pairs_compiles(machine_code, target):
    wanted = {f"sigmoid_term, {name}" for name in divergences.linkable()}
    wanted |= {f"{term.__name__}, reverse_kl" for term in margin_losses.TERMS.values()}
    for workload in wanted:
        for direction in ("forward", "backward"):
            assert machine_code[target, workload, direction]["spills"] == 0


def test_no_spills_and_wide_loads_on_sm_90(machine_code):
    for (target, workload, direction), row in machine_code.items():
        if target == "sm_90" and row["kernel"] == "token_stats":
            assert row["spills"] == 0, (workload, direction)
            assert set(row["loads"]) == {"128"}, (workload, direction, row["loads"])
            assert direction == "forward" or set(row["stores"]) == {"128"}, (workload, row["stores"])


@pytest.mark.parametrize(("workload", "direction"), static.MEMORY_BOUND)
def test_one_pass_kernels_stay_memory_bound_on_an_h200(machine_code, workload, direction):
    row = machine_code["sm_90", workload, direction]
    assert 1 < row["instructions"] <= static.MEMORY_BOUND[workload, direction]
    assert 0 < row["mufu"] <= row["mufu_limit"]


def test_the_hot_loop_uses_asynchronous_copies(machine_code):
    assert machine_code["sm_90", "both KLs", "forward"]["shared"] > 8192
