"""fl.Hidden in the preference losses: every plan against the float64 twin, on both backends."""

import pytest
import torch
from helpers import (
    gradients_of,
    hidden_leaves,
    hidden_source,
    labels_for,
    least_workspace,
    outputs,
)
from hidden_calls import LINKS, PAIR_PLANS, PLANS, cases, frozen_head, judge_dpo

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")


PACKED = [0, 3, 3, 7, 9, 14, 15]  # six sequences, one of them empty
REFS = ["hidden", "logits", "tokens", "sequences", None]


def pair_call(kind, packed, device, vocab=29, **options):
    """Leaves, build(leaves) -> policy, ref, labels and options of three pairs; ref gets no gradient."""
    lead = (PACKED[-1],) if packed else (6, 4)
    leaves = hidden_leaves(lead, 5, vocab, device, rank=2)
    y = labels_for(lead, vocab, device)
    options["cu_seqlens"] = torch.tensor(PACKED, device=device) if packed else None
    options["shift"] = not packed
    shape = {"hidden": (*lead, 7), "logits": (*lead, vocab), "sequences": (6,), None: ()}
    given = torch.randn(shape.get(kind, lead if packed else (6, 3)), device=device)
    head = torch.randn(vocab, 7, device=device)
    as_leaves = [*leaves, given - 3 if kind in ("tokens", "sequences") else given, head]

    def build(leaves):
        *policy, given, head = leaves
        refs = {
            "hidden": lambda: fl.Hidden(given, head, softcap=3.0),
            "logits": lambda: fl.Logits(given),
            None: lambda: None,
        }
        return hidden_source(policy, softcap=4.0), refs.get(kind, lambda: fl.LogProbs(given))()

    return as_leaves, build, y, options


ALL_PAIRS = [(p, packed, kind) for p in PAIR_PLANS for packed in (False, True) for kind in REFS]


@cases(
    [c for c in ALL_PAIRS if c[0] != "on_chip"],
    # whence the reference comes is no business of a kernel: padded and packed take turns
    [("row_blocks", i % 2 > 0, kind) for i, kind in enumerate(REFS)] + [(p, True, "hidden") for p in PLANS], name="what",
)  # fmt: skip
def test_preference_loss_matches_the_twin(backend, device, poison, what):
    """Loss, metrics, statistics and gradients: under a factor, walked twice, with the statistics in the loss as well."""
    plan, packed, kind = what
    leaves, build, y, options = pair_call(kind, packed, device, entropy=True, beta=0.3, label_smoothing=0.1)
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    options["divergence"] = "js" if kind else "reverse_kl"
    options["ignore_index"] = -100
    policy, ref = build(leaves)
    how = {"plan": plan, "static_shapes": plan != "row_blocks" and packed == (kind in ("hidden", "tokens"))}
    if plan in ("row_blocks", "vocab_chunks", "frozen_head"):
        call = lambda bytes: fl.dpo_loss(policy, y, ref, **options, **how | {"workspace": bytes})  # noqa: E731
        how["workspace"] = 2 * least_workspace(call) + (2000 if plan == "frozen_head" else 0)
    judge = judge_dpo(build, leaves, y, how=how, **options)
    judge.value("loss", lambda out: out.loss)
    assert judge.mine.metrics.keys() == judge.truth.metrics.keys()
    for key in judge.truth.metrics:
        judge.value(key, lambda out, key=key: out.metrics[key])
    for key in outputs(judge.truth.stats):
        if key != "ref_logps" or kind in ("hidden", "logits"):
            judge.value(key, lambda out, key=key: outputs(out.stats)[key])
    assert torch.equal(judge.mine.stats.mask, judge.truth.stats.mask)
    assert torch.equal(judge.mine.stats.correct, judge.truth.stats.correct)
    judge.gradients("three times the loss", lambda out: 3 * out.loss)
    judge.gradients("the loss again", lambda out: out.loss)
    weight = torch.randn(judge.truth.stats.logps.shape, device=device)
    judge.gradients("loss and log-probs", lambda out: out.loss + (out.stats.logps * weight.to(out.loss.dtype)).sum())
    judge.gradients("entropy alone", lambda out: (out.stats.entropy * weight.to(out.loss.dtype)).sum())


@cases(LINKS, ["js", "alpha"], name="key")
def test_every_link_in_row_blocks(backend, device, key):
    leaves, build, y, options = pair_call("hidden", False, device, divergence=key, beta=0.5)
    policy, ref = build(leaves)
    fewest = least_workspace(lambda bytes: fl.dpo_loss(policy, y, ref, plan="row_blocks", workspace=bytes, **options))
    judge = judge_dpo(build, leaves, y, how={"plan": "row_blocks", "workspace": fewest}, **options)
    judge.value("loss", lambda out: out.loss)
    judge.gradients("loss", lambda out: out.loss)


@cases([("row_blocks", False), ("row_blocks", True), ("vocab_chunks", False)], [("row_blocks", True)], name="what")
def test_reductions(backend, device, what):
    plan, packed = what
    leaves, build, y, options = pair_call("hidden", packed, device)
    for reduction, weight in (("none", torch.tensor([0.5, -1.0, 3.0], device=device)), ("sum", 2.0), ("none", 1.0)):
        judge = judge_dpo(build, leaves, y, how={"plan": plan}, reduction=reduction, **options)
        judge.value(reduction, lambda out: out.loss)
        judge.gradients(reduction, lambda out, weight=weight: (out.loss * weight).sum())
    for count in (7, torch.tensor(7, device=device)):
        judge = judge_dpo(build, leaves, y, how={"plan": plan}, num_items=count, **options)
        judge.value("num_items", lambda out: out.loss)
        judge.gradients("num_items", lambda out: out.loss)


@pytest.mark.parametrize("kind", ["tokens", "sequences", "hidden", "logits"])
@cases(["auto", "vocab_chunks", "row_blocks"], ["row_blocks"])
def test_gradient_to_the_reference(backend, device, plan, kind):
    """Given log-probs may learn in any plan; a reference model in all but row blocks, which say so."""
    leaves, build, y, options = pair_call(kind, False, device)
    leaves[5].requires_grad_()
    if plan == "row_blocks" and kind in ("hidden", "logits"):
        with pytest.raises(
            ValueError, match="plan: 'row_blocks' is not possible here: .*reference that needs no gradient"
        ):
            fl.dpo_loss(build(leaves)[0], y, build(leaves)[1], plan="row_blocks", **options)
        return
    judge = judge_dpo(build, leaves, y, how={"plan": plan}, **options)
    judge.gradients("loss", lambda out: out.loss)
    judge.gradients("twice", lambda out: 2 * out.loss)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (4, 1)], ids=str)
@cases(["auto", "vocab_chunks", "row_blocks"], ["auto", "vocab_chunks", "row_blocks"])
def test_empty_batches(backend, device, plan, shape):
    leaves = hidden_leaves(shape, 5, 9, device)
    y = torch.zeros(shape, dtype=torch.long, device=device)
    for shift in (False, True):
        judge = judge_dpo(lambda leaves: (hidden_source(leaves), None), leaves, y, how={"plan": plan}, shift=shift)
        judge.value("loss", lambda out: out.loss)
        judge.gradients("loss", lambda out: out.loss)
    nothing = torch.zeros(1, dtype=torch.int32, device=device)
    flat = [leaves[0].reshape(-1, 5)[:0], *leaves[1:3]]
    out = fl.dpo_loss(
        fl.Hidden(*flat),
        torch.zeros(0, dtype=torch.long, device=device),
        None,
        cu_seqlens=nothing,
        plan=plan,
        shift=False,
    )
    assert out.loss == 0
    out.loss.backward()


@cases(["auto", "vocab_chunks", "row_blocks"], ["row_blocks"])
def test_pairs_without_a_token(backend, device, poison, plan):
    """A masked pair costs log 2 and gives no gradient, alone in its block or not."""
    leaves, build, y, options = pair_call("hidden", False, device)
    y[1], y[4] = -100, -100
    policy, ref = build(leaves)
    for workspace in (None, 200_000):
        out = fl.dpo_loss(policy, y, ref, reduction="none", plan=plan, workspace=workspace, **options)
        assert abs(out.loss[1].item() - 0.6931472) < 1e-6
        g = torch.autograd.grad(out.loss.sum(), leaves[0])[0]
        assert g.isfinite().all() and not g[1].any() and not g[4].any() and g[0].any()
    out = fl.dpo_loss(policy, torch.full_like(y, -100), ref, plan=plan, **options)
    assert abs(out.loss.item() - 0.6931472) < 1e-6
    assert not any(g.any() for g in gradients_of(out.loss, leaves))


@cases(PAIR_PLANS, ["auto", "row_blocks", "on_chip"] if "on_chip" in PLANS else ["auto", "row_blocks"])
def test_without_gradients(backend, device, plan):
    """Evaluation under no_grad, with the training step's arguments."""
    leaves, build, y, options = pair_call("hidden", False, device)
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    policy, ref = build(leaves)
    expected = fl.dpo_loss(policy, y, ref, **options).loss
    with torch.no_grad():
        out = fl.dpo_loss(policy, y, ref, plan=plan, **options)
    assert not out.loss.requires_grad and not out.stats.logps.requires_grad
    torch.testing.assert_close(out.loss, expected.detach())
