"""fl.explain says how a call would be computed: the plan that it takes, and nothing is computed for that."""

import threading

import pytest
import torch
import torch.utils.checkpoint
from family_batches import FAMILY, Batch

import fused_losses as fl
from fused_losses.engine import evaluate, hidden_ops, logits_ops

pytestmark = pytest.mark.usefixtures("one_thread")
X, W, Y = torch.randn(4, 6, 8), torch.randn(50, 8), torch.randint(0, 50, (4, 6))


@pytest.fixture(autouse=True)
def on_torch(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")


def forbidden(*_, **__):
    raise AssertionError("expected nothing to be computed")


@pytest.mark.parametrize("source", ["hidden", "logits"])
@pytest.mark.parametrize(("name", "variant"), [(n, next(iter(entry.variants))) for n, entry in FAMILY.items()])
def test_every_loss_is_explained_and_not_computed(monkeypatch, name, variant, source):
    for module in (hidden_ops, logits_ops):
        monkeypatch.setattr(module, "stats", forbidden)
    monkeypatch.setattr(evaluate, "fused_loss", forbidden)
    batch = Batch(name, variant)
    calls = []

    def loss(policy, ref):
        calls.append(1)
        return batch.loss(fl, torch.float32, policy, ref)

    x, weight, ref_x, ref_weight = batch.x, batch.weight, batch.ref_x, batch.ref_weight
    if source == "hidden":
        sides = fl.Hidden(x.requires_grad_(), weight), fl.Hidden(ref_x, ref_weight)
    else:
        sides = fl.Logits(x @ weight.T), fl.Logits(ref_x @ ref_weight.T)
    steps = fl.explain(loss, *sides).steps
    assert calls and steps and all(step.backend == "torch" for step in steps)
    assert (steps[-1].plan is None) == (source == "logits")


def test_the_plan_is_the_one_that_is_taken(monkeypatch):
    taken = []
    run = hidden_ops.stats
    monkeypatch.setattr(hidden_ops, "stats", lambda args: (taken.append(args.options.plan), run(args))[1])
    fused = evaluate.fused_loss
    monkeypatch.setattr(evaluate, "fused_loss", lambda *a: (taken.append(a[1].options.plan), fused(*a))[1])
    for grad, plan in (
        (True, "auto"),
        (False, "auto"),
        (True, "vocab_chunks"),
        (True, "keep_logits"),
        (True, "frozen_head"),
    ):
        policy = fl.Hidden(X.clone().requires_grad_(grad), W.clone().requires_grad_(grad and plan != "frozen_head"))
        for ref in (fl.Hidden(-X, W), fl.Hidden(-X, W[:, :8].repeat(2, 1)), fl.LogProbs(torch.zeros(4, 5)), None):
            taken.clear()
            call = {"shift": True, "plan": plan, "labels": Y}
            kinds = [step.plan.kind for step in fl.explain(fl.dpo_loss, policy, ref=ref, **call).steps]
            fl.dpo_loss(policy, ref=ref, **call)
            assert kinds == taken


def test_words():
    text = str(fl.explain(fl.dpo_loss, fl.Hidden(X, W), Y, X @ W.T, shift=True, workspace=1 << 20))
    assert "hidden states [4, 6, 8] (float32) with a weight [50, 8] (float32), and logits [4, 6, 50]" in text
    assert "backend 'torch': FUSED_LOSSES_BACKEND=torch" in text and "nothing asks for a gradient" in text
    assert "of a workspace of 1.0 MiB" in text
    given = fl.explain(fl.dpo_loss, fl.LogProbs(torch.zeros(4, 6)), Y, None, shift=False)
    assert not given.steps and "log-probs are given" in str(given)


def test_state_stays_as_it_is():
    delta = fl.RunningDelta()
    fl.explain(fl.bco_loss, X @ W.T, Y, None, torch.ones(4, dtype=torch.bool), delta=delta, shift=False)
    assert delta.count == 0


def test_errors_are_those_of_the_call():
    with pytest.raises(TypeError, match="shift: expected True or False"):
        fl.explain(fl.dpo_loss, X @ W.T, Y, None)
    with pytest.raises(ValueError, match="plan: expected one of"):
        fl.explain(fl.dpo_loss, fl.Hidden(X, W), Y, None, shift=False, plan="fast")
    assert fl.dpo_loss(X @ W.T, Y, None, shift=False).loss.isfinite()


@pytest.mark.parametrize("error", [Exception, BaseException], ids=lambda e: e.__name__)
def test_handlers_of_errors_change_nothing(error):
    """A fallback is no part of the explanation, even where the handler catches everything."""

    def loss():
        try:
            return fl.dpo_loss(fl.Hidden(X, W), Y, None, shift=False)
        except error:
            return fl.cross_entropy_loss(X @ W.T, Y, shift=False)

    (step,) = fl.explain(loss).steps
    assert step.plan is not None


@pytest.mark.parametrize("name", ["dpo_loss", "token_stats"])
def test_nothing_runs_after_the_first_call(name):
    """No backward of what was not computed, no second call, no number that the caller would take for a result."""
    weight = W.clone().requires_grad_()
    seen = []

    def step():
        out = getattr(fl, name)(fl.Hidden(X, weight), Y, None, shift=False)
        seen.append(out)
        (out.loss if name == "dpo_loss" else out.logps.sum()).backward()
        fl.token_stats(X @ W.T, Y, shift=False)

    assert len(fl.explain(step).steps) == 1 and not seen and weight.grad is None


def test_inside_a_backward():
    """Where a checkpoint calls the loss again, in backward, this call is explained."""
    x = X.clone().requires_grad_()

    def loss(x):
        return fl.dpo_loss(fl.Hidden(x, W), Y, None, shift=False).loss

    loss_of_x = torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=False)
    (step,) = fl.explain(loss_of_x.backward).steps
    assert step.plan is not None and x.grad is None


def test_meta_tensors_are_refused():
    """A plan depends on the device."""
    x, w, y = (t.to("meta") for t in (X, W, Y))
    for policy in (fl.Hidden(x, w), x @ w.T):
        with pytest.raises(
            ValueError, match="explain: expected tensors on the device of the call, .* got meta tensors"
        ):
            fl.explain(fl.dpo_loss, policy, y, None, shift=False)


def test_other_threads_compute():
    """While one thread explains, a loss of another is a number."""
    seen = []

    def loss(*_):
        thread = threading.Thread(target=lambda: seen.append(fl.dpo_loss(X @ W.T, Y, None, shift=False).loss))
        thread.start()
        thread.join()
        return fl.dpo_loss(X @ W.T, Y, None, shift=False)

    assert len(fl.explain(loss).steps) == 1
    assert seen[0] == fl.dpo_loss(X @ W.T, Y, None, shift=False).loss
