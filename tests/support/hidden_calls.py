"""Calls from hidden states for tests: sources, plans in few bytes, and each plan on each backend."""

import pytest
from helpers import (
    Judge,
    hidden_leaves,
    hidden_source,
    least_workspace,
)

import fused_losses as fl
from fused_losses import divergences
from fused_losses.engine import planner

NAMES = divergences.names()
LINKS = divergences.linkable()


def tile_kernel():
    """Whether the Triton backend has a kernel behind plan="on_chip"."""
    try:
        from fused_losses.kernels import launch
    except ImportError:  # no Triton
        return False
    return hasattr(launch, "tile_states")


PLANS = ["auto", *(k for k in planner.KINDS if k != "row_blocks" and (k != "on_chip" or tile_kernel()))]
PAIR_PLANS = [*PLANS, "row_blocks"]


def cases(torch=PLANS, triton=PLANS, name="plan"):
    """Runs a test with each of these plans (or tuples of something) on each backend."""
    pairs = [("torch", x) for x in torch if x != "on_chip"] + [("triton", x) for x in triton]
    ids = ["-".join(map(str, (b, *x) if isinstance(x, tuple) else (b, x))) for b, x in pairs]
    return pytest.mark.parametrize(("backend", name), pairs, indirect=["backend"], ids=ids)


SLICED = [p for p in PLANS if p in ("vocab_chunks", "frozen_head", "on_chip")]  # the vocabulary in pieces


def tight(plan, call, times=2):
    """The plan in few bytes; call(plan=, workspace=)."""
    if plan not in ("vocab_chunks", "frozen_head"):
        return {"plan": plan}
    fewest = least_workspace(lambda bytes: call(plan=plan, workspace=bytes))
    return {
        "plan": plan,
        "workspace": times * fewest * (2 if plan == "frozen_head" else 1),
    }  # frozen keeps up to half of it


def frozen_head(leaves):
    """Only the policy's hidden states ask for a gradient."""
    for x in leaves[1:]:
        if x is not None:
            x.requires_grad_(False)
    return leaves


def both_sides(lead, device, widths=(6, 9), vocab=41, rank=2, ref_grad=False, **options):
    """Ten leaves: policy and reference with a bias and factors each."""
    policy = hidden_leaves(lead, widths[0], vocab, device, rank=rank, **options)
    ref = hidden_leaves(lead, widths[1], vocab, device, rank=rank, **options)
    return [*policy, *(x if x is None else x.requires_grad_(ref_grad) for x in ref)]


def two_sources(leaves, **head):
    return hidden_source(leaves[:5], **head), hidden_source(leaves[5:], **head)


def judge_dpo(build, leaves, y, tolerance=1e-5, slack=4.0, how=None, **options):
    """A Judge of fl.dpo_loss: build(leaves) -> policy, ref."""
    options = {"shift": False, **options}

    def call(f, **how):
        return lambda leaves: f.dpo_loss(build(leaves)[0], y, build(leaves)[1], **options, **how)

    return Judge(call(fl, **(how or {})), call(fl.reference), leaves, tolerance, slack)
