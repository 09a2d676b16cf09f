"""The operators of fl.Hidden as torch sees them: opcheck, torch.compile, checkpoints, second derivatives."""

import pytest
import torch
from helpers import (
    asking,
    gradients_of,
    hidden_leaves,
    labels_for,
)
from hidden_calls import PAIR_PLANS, PLANS, both_sides, cases, frozen_head, two_sources
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import fused_losses as fl
from fused_losses import divergences
from fused_losses.core.layout import Grads, StatsSpec
from fused_losses.engine import hidden_at, hidden_ops
from fused_losses.engine.sides import InputFlags, Inputs, Wanted

pytestmark = pytest.mark.usefixtures("one_thread")
OPS = torch.ops.fused_losses


def stats_arguments(leaves, y, plan, backend, divergence="forward_kl;js", workspace=1 << 20, static=False):
    """Of fused_losses::hidden_stats, ten leaves."""
    policy, ref = Inputs(*leaves[:5], 0.7), Inputs(*leaves[5:], 0.7)
    wanted = Wanted(InputFlags.required(policy), InputFlags.required(ref))
    spec = StatsSpec(divergences.parse(divergence.split(";")), True, True, False, -100, 41)
    return hidden_ops.HiddenStatsArgs(
        y, policy, ref, hidden_ops.Options(spec, backend, plan, workspace, static), wanted
    )


LAYOUTS = [(p, layout, static) for p in PLANS for layout in ("contiguous", "transposed") for static in (False, True)]


@pytest.mark.slow
@cases(
    [c for c in LAYOUTS if c[0] not in ("auto", "on_chip")],
    [c for c in LAYOUTS if c == ("on_chip", "contiguous", False)], name="what",
)  # fmt: skip
def test_opcheck_hidden_stats(backend, device, what):
    plan, layout, static = what
    leaves = both_sides((2, 3), device)
    if layout == "transposed":  # hidden states [time, batch], weights [H, V]
        turn = lambda x: x.detach().mT.contiguous().mT.requires_grad_()  # noqa: E731
        leaves[0] = leaves[0].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        leaves[1], leaves[3], leaves[4] = turn(leaves[1]), turn(leaves[3]), turn(leaves[4])
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    # what "keep_logits" keeps is not written for rows that do not count, and opcheck compares all of it
    y = labels_for((2, 3), 41, device, masked=plan != "keep_logits" or static)
    args = stats_arguments(leaves, y, plan, backend, static=static)
    opcheck(OPS.hidden_stats.default, tuple(hidden_ops.ARGS.pack(args)))
    detached = [x if x is None else x.detach() for x in leaves]
    call = stats_arguments(detached, y, plan, backend, static=static)._replace(wanted=args.wanted)
    found = hidden_ops.RESULT.unpack(OPS.hidden_stats(*hidden_ops.ARGS.pack(call)))
    g = torch.randn(6, device=device)
    grads = Grads(logps=g, entropy=g, divergence=torch.randn(2, 6, device=device))
    back = hidden_ops.HiddenStatsBackwardArgs(grads, found.stats.logps, found.stats.saved, found.keep, call)
    back = tuple(hidden_ops.BACKWARD_ARGS.pack(back))
    opcheck(OPS.hidden_stats_backward.default, back, test_utils=("test_schema", "test_faketensor"))


def hidden_at_arguments(leaves, softcap=3.0):
    """Of fused_losses::hidden_at: three tokens of each row, of which some do not count."""
    ids, keep = torch.randint(0, 41, (2, 3, 3)), torch.rand(2, 3, 3) > 0.3
    return hidden_at.HiddenAtArgs(ids, keep, softcap, 0.5, Inputs(*leaves, 0.7), vocab=len(leaves[1]))


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_opcheck_hidden_at(softcap):
    leaves = hidden_leaves((2, 3), 6, 41, "cpu", rank=2)
    opcheck(OPS.hidden_at.default, tuple(hidden_at.HIDDEN_AT.pack(hidden_at_arguments(leaves, softcap))))
    call = hidden_at_arguments([x.detach() for x in leaves], softcap)
    found = hidden_at.HIDDEN_AT_RESULT.unpack(OPS.hidden_at(*hidden_at.HIDDEN_AT.pack(call)))
    wanted = Wanted(InputFlags(x=True, weight=False, bias=True, a=True, b=True))
    back = hidden_at.HiddenAtBackwardArgs(torch.randn(2, 3, 3), found.slope, call, wanted)
    back = tuple(hidden_at.HIDDEN_AT_BACKWARD.pack(back))
    opcheck(OPS.hidden_at_backward.default, back, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
def test_top_k_compiles_once_for_all_sizes():
    """The loop over blocks of rows is no business of the compiler, which would unroll it for each number of rows."""
    leaves = hidden_leaves((2, 3), 6, 41, "cpu", rank=2)

    def step(x, weight, bias, a, b, y, logps, ids):
        policy = fl.Hidden(x, weight, bias, lora=(a, b, 0.5), softcap=3.0)
        return fl.topk_distillation_loss(policy, y, logps, ids, hard=0.3, shift=True).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for i, length in enumerate((4, 6, 9, 5)):
        x, y = torch.randn(2, length, 6, requires_grad=True), labels_for((2, length), 41, "cpu")
        ids = torch.rand(2, length - 1, 41).argsort(-1)[..., :4]
        given = x, *leaves[1:], y, torch.randn(2, length - 1, 6).log_softmax(-1)[..., :4], ids
        with torch.compiler.set_stance("fail_on_recompile" if i > 1 else "default"):
            loss = compiled(*given)
        eager, at = step(*given), given[:5]
        torch.testing.assert_close(loss, eager)
        torch.testing.assert_close(torch.autograd.grad(loss, at), torch.autograd.grad(eager, at))
    torch._dynamo.reset()


def training_step(x, weight, a, b, ref_x, ref_weight, y, plan):
    """A loss, a divergence as a penalty, an entropy bonus."""
    policy, ref = fl.Hidden(x, weight, lora=(a, b, 0.5)), fl.Hidden(ref_x, ref_weight)
    how = {"plan": plan, "workspace": 1 << 20}
    out = fl.dpo_loss(policy, y, ref, divergence="js", shift=True, **how)
    sums = {"entropy": True, "collision": True}
    stats = fl.token_stats(policy, y, ref, divergence=["forward_kl", "js"], shift=True, **sums, **how)
    penalty = sum(d.mean() for d in stats.divergence.values()) - (stats.entropy * stats.collision.exp()).mean()
    return out.loss + penalty, out.metrics["rewards/margins"]


@pytest.mark.slow
@cases(
    [("frozen_head", False), ("keep_logits", False), ("vocab_chunks", False), ("vocab_chunks", True), ("auto", False),
    ("auto", True)],
    [("auto", False)], name="what",  # in operators that the compiler does not look into
)  # fmt: skip
def test_compile_without_graph_breaks(backend, device, what):
    """ "auto" takes row blocks in eager mode, and what torch.compile sees through when it compiles."""
    plan, dynamic = what
    torch._dynamo.reset()
    compiled = torch.compile(training_step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (3, 4) if dynamic else (3,):
        leaves = both_sides((4, length), device, rank=2)
        leaves[0] = leaves[0].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        leaves[1] = leaves[1].detach().T.contiguous().T.requires_grad_()
        if plan == "frozen_head":
            leaves = frozen_head(leaves)
        x, weight, _, a, b, ref_x, ref_weight, *_ = leaves
        y = labels_for((4, length), 41, device)
        eager, margin = training_step(x, weight, a, b, ref_x, ref_weight, y, plan)
        loss, metric = compiled(x, weight, a, b, ref_x, ref_weight, y, plan)
        torch.testing.assert_close(loss, eager)
        torch.testing.assert_close(metric, margin)
        asked = asking([x, weight, a, b])
        for g, t in zip(torch.autograd.grad(loss, asked), torch.autograd.grad(eager, asked), strict=True):
            torch.testing.assert_close(g, t)
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, True])
@cases(PAIR_PLANS, ["row_blocks"])
def test_checkpointing(backend, device, plan, reentrant):
    leaves = both_sides((4, 2), device)
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    y = labels_for((4, 2), 41, device)

    def call(x):
        policy, ref = two_sources([x * 1.0, *leaves[1:]])
        return fl.dpo_loss(policy, y, ref, plan=plan, shift=False).loss

    expected = gradients_of(call(leaves[0]), leaves)
    checkpoint(call, leaves[0], use_reentrant=reentrant).backward()
    for x, t in zip(asking(leaves), expected, strict=True):
        torch.testing.assert_close(x.grad, t)


@cases(PAIR_PLANS, ["row_blocks"])
def test_second_derivative_is_refused_in_words(backend, device, plan):
    """Also where the gradient came with the forward, and depends on what follows the loss."""
    leaves = both_sides((4, 2), device)
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    y = labels_for((4, 2), 41, device)
    policy, ref = two_sources(leaves)
    if plan != "row_blocks":
        stats = fl.token_stats(policy, y, ref, divergence="js", plan=plan, shift=False)
        (g,) = torch.autograd.grad(stats.divergence["js"].sum(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="can be differentiated once; use fused_losses.reference"):
            torch.autograd.grad(g.sum(), leaves[0])
    for after in (lambda loss: loss, lambda loss: loss**2):
        loss = after(fl.dpo_loss(policy, y, ref, plan=plan, shift=False).loss)
        (g,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="can be differentiated once; use fused_losses.reference"):
            torch.autograd.grad(g.square().sum(), leaves[0])
