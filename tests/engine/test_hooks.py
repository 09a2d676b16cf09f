"""What acts on saved tensors and on operators around a loss: checkpoints, offloading, counters. They do not see the gradient
that the plan "row_blocks" takes in the forward: forwards of the model and calls of hooks are counted here, not numbers
alone."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")

V, H = 61, 16
PLANS = ("vocab_chunks", "row_blocks", "auto")
LOSSES = {
    "dpo": lambda p, y, **o: fl.dpo_loss(p, y, None, **o).loss,
    "mixed": lambda p, y, **o: fl.preference_loss(p, y, None, loss_type=("hinge", "ipo", "sft"), **o).loss,
    "kto": lambda p, y, **o: fl.kto_loss(p, y, None, torch.arange(len(y)) % 2 == 0, **o).loss,
    "cross entropy": lambda p, y, **o: fl.cross_entropy_loss(p, y, z_loss=1e-3, **o).loss,
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = (
            nn.Embedding(V, H),
            nn.Sequential(nn.Linear(H, H), nn.GELU()),
            nn.Linear(H, V),
        )
        self.forwards = 0
        self.body.register_forward_hook(self.count)

    def count(self, *_):
        self.forwards += 1

    def loss(self, name, plan, embedded):
        return LOSSES[name](
            fl.Hidden(self.body(embedded), self.head.weight, self.head.bias), IDS, shift=True, plan=plan
        )

    def step(self, name, plan, around):
        """Forwards of the body until the loss is there, and in backward; and the gradients."""
        self.forwards = 0
        self.zero_grad()
        loss = around(partial(self.loss, name, plan), self.embed(IDS))
        before = self.forwards
        loss.backward()
        return (before, self.forwards - before), [p.grad.clone() for p in self.parameters()]


IDS = torch.arange(24).view(4, 6) % V


def nested(f, x):
    def inner(x):
        return checkpoint(f, x, use_reentrant=False)

    return checkpoint(inner, x, use_reentrant=False)


def selective(policy):
    contexts = partial(create_selective_checkpoint_contexts, policy)
    return lambda f, x: checkpoint(f, x, use_reentrant=False, context_fn=contexts)


def reentrant(f, x):
    return checkpoint(f, x, use_reentrant=True)


def plain(f, x):
    return f(x)


def offloaded(f, x):
    with save_on_cpu():
        return checkpoint(f, x, use_reentrant=False)


CHECKPOINTS = {
    "reentrant": reentrant,
    "not reentrant": lambda f, x: checkpoint(f, x, use_reentrant=False),
    "no check": lambda f, x: checkpoint(f, x, use_reentrant=False, determinism_check="none"),
    "products saved": selective([torch.ops.aten.mm.default, torch.ops.aten.addmm.default]),
    "nothing saved": selective(lambda *_, **__: CheckpointPolicy.MUST_RECOMPUTE),
    "offloaded": offloaded,
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", LOSSES)
def test_checkpoints_run_the_model_twice(name, plan):
    """Once in the forward and once in backward."""
    model = Model()
    counts, expected = model.step(name, "vocab_chunks", plain)
    assert counts == (1, 0)
    for kind, around in CHECKPOINTS.items():
        counts, grads = model.step(name, plan, around)
        assert counts == (1, 1), kind
        torch.testing.assert_close(grads, expected, msg=lambda words, kind=kind: f"{kind}: {words}")
    (before, _), grads = model.step(name, plan, nested)
    assert before == 1
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("plan", PLANS)
def test_inside_a_head(plan):
    transformers = pytest.importorskip("transformers")
    size = {
        "vocab_size": V,
        "hidden_size": H,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model, counts = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size)), []
    fl.backbone(model).register_forward_hook(lambda *_: counts.append(1))

    def f(x):
        loss = fl.at_head(model, lambda p: fl.dpo_loss(p, IDS, None, shift=True, plan=plan).loss, input_ids=IDS).out
        return loss + 0 * x

    x = torch.zeros((), requires_grad=True)
    f(x)
    counts.clear()
    loss = checkpoint(f, x, use_reentrant=False)
    assert len(counts) == 1
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert len(counts) == 2
    torch.testing.assert_close(found, torch.autograd.grad(f(x), list(model.parameters())))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", LOSSES)
def test_hooks_see_what_is_kept_for_backward(name, plan):
    """Each tensor once, packed in the forward and unpacked in backward; of the formula's own none in "row_blocks"."""
    model, calls = Model(), []
    x = torch.randn(4, 6, H, requires_grad=True)
    source = fl.Hidden(x, model.head.weight, model.head.bias)

    def pack(t):
        calls.append("pack")
        return t

    def unpack(t):
        calls.append("unpack")
        return t

    with saved_tensors_hooks(pack, unpack):
        loss = LOSSES[name](source, IDS, shift=True, plan=plan)
    assert set(calls) == {"pack"}
    if plan == "row_blocks":  # labels and head, the rows' numbers, desirable, and two numbers of the mean
        assert len(calls) <= 14
    packed, _ = len(calls), calls.clear()
    loss.backward()
    assert set(calls) == {"unpack"} and len(calls) <= packed


@pytest.mark.parametrize("plan", PLANS)
def test_where_hooks_are_forbidden(plan):
    model = Model()
    _, expected = model.step("dpo", "vocab_chunks", plain)

    def forbidden(f, x):
        with disable_saved_tensors_hooks("no hooks here"):
            return f(x)

    torch.testing.assert_close(model.step("dpo", plan, forbidden)[1], expected)


def test_floating_point_operations_are_counted_once():
    """A checkpoint adds one more forward, with the gradient that is found in it."""
    model = Model()

    def counted(around, backward=True):
        with FlopCounterMode(display=False) as counter:
            loss = around(partial(model.loss, "mixed", "row_blocks"), model.embed(IDS))
            if backward:
                torch.autograd.grad(loss, list(model.parameters()))
        return counter.get_total_flops()

    again = lambda f, x: checkpoint(f, x, use_reentrant=False)  # noqa: E731
    forward = counted(plain, backward=False)
    assert counted(again, backward=False) == forward > 0
    assert counted(again) == counted(plain) + forward
