"""A whole training step inside torch's machinery: torch.compile, autocast, checkpoints, accumulation, CUDA graphs, transforms
and export. The operators by themselves: test_ops.py, test_hidden.py."""

import pytest
import torch
from torch import nn

import fused_losses as fl

V, H = 97, 32
SIZES = ((2, 5), (3, 6), (4, 9), (7, 7))  # pairs, length
LOSSES = {"dpo": fl.dpo_loss, "cross entropy": fl.cross_entropy_loss, "distillation": fl.distillation_loss}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    """Tokens to hidden states, and a head beside them."""

    def __init__(self, dtype=None):
        super().__init__()
        new = {"dtype": dtype}
        self.embed = nn.Embedding(V, H, **new)
        self.body = nn.Sequential(nn.Linear(H, 40, **new), nn.GELU(), nn.Linear(40, H, **new))
        self.head = nn.Linear(H, V, bias=False, **new)

    def forward(self, ids):
        return self.body(self.embed(ids))

    def source(self, ids, kind):
        hidden = self(ids)
        return self.head(hidden) if kind == "logits" else fl.Hidden(hidden, self.head.weight)


def llama():
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": V, "hidden_size": H, "intermediate_size": 48, "num_hidden_layers": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_attention_heads=4, **size))


def batch(pairs, length, packed=False):
    """Tokens, labels and options of 2 * pairs sequences, prompts of two tokens and padding of one."""
    ids = torch.randint(0, V, (2 * pairs, length))
    labels = ids.clone()
    labels[:, :2] = labels[::3, -1] = -100
    if not packed:
        return ids, labels, {"shift": True}
    offsets = torch.arange(0, ids.numel() + 1, length, dtype=torch.int32)
    return ids.view(-1), labels.view(-1), {"shift": True, "cu_seqlens": offsets}


def run(name, policy, labels, ref, **options):
    return LOSSES[name](policy, labels, *([] if name == "cross entropy" else [ref]), **options)


def training_step(model, ref, ids, labels, options, name, kind):
    with torch.no_grad():
        other = ref.source(ids, kind)
    out = run(name, model.source(ids, kind), labels, other, **options)
    return out.loss, out.metrics


def same(found, expected, **tolerance):
    for g, t in zip(found, expected, strict=True):
        torch.testing.assert_close(g, t, **tolerance)


# ---- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "packed"),
    [
        ("dpo", "hidden", False), ("dpo", "logits", True), ("cross entropy", "hidden", True),
        ("distillation", "hidden", False), ("distillation", "logits", True),
    ],
)  # fmt: skip
def test_one_graph_for_all_sizes(fresh, name, kind, packed):
    """In one graph, which the second size makes dynamic and no later one compiles anew."""
    model, ref = Model(), Model()
    compiled = torch.compile(training_step, fullgraph=True, backend="aot_eager")
    parameters = list(model.parameters())
    for i, size in enumerate(SIZES):
        given = (model, ref, *batch(*size, packed), name, kind)
        eager, metrics = training_step(*given)
        with torch.compiler.set_stance("fail_on_recompile" if i > 1 else "default"):
            loss, numbers = compiled(*given)
        torch.testing.assert_close(loss, eager)
        torch.testing.assert_close(numbers, metrics)
        same(torch.autograd.grad(loss, parameters), torch.autograd.grad(eager, parameters))


@pytest.mark.parametrize(("plan", "workspace"), [("auto", 60_000), ("whole", 100 << 20)])
def test_tiles_are_no_business_of_the_compiler(fresh, plan, workspace):
    """Tiles have another shape for every number of rows; the graph is the same."""
    weight, ref_weight = torch.randn(2000, 16, requires_grad=True), torch.randn(2000, 16)

    def step(x, ref_x, y):
        how = {"plan": plan, "workspace": workspace}
        return fl.dpo_loss(fl.Hidden(x, weight), y, fl.Hidden(ref_x, ref_weight), **how).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for i, (pairs, length) in enumerate(SIZES):
        x = torch.randn(2 * pairs, length, 16, requires_grad=True)
        given = x, torch.randn(2 * pairs, length, 16), torch.randint(0, 2000, (2 * pairs, length))
        with torch.compiler.set_stance("fail_on_recompile" if i > 1 else "default"):
            loss = compiled(*given)
        same(torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(step(*given), (x, weight)))


def test_compiles_without_a_warning(fresh, recwarn):
    """Divergences come out of a cache, of which torch.compile would warn."""
    z, w = torch.randn(4, 3, V, requires_grad=True), torch.randn(4, 3, V)
    step = lambda: fl.distillation_loss(z, torch.ones(4, 3, dtype=torch.long), w, divergence="js(beta=0.2)").loss  # noqa: E731
    torch.compile(step, fullgraph=True, backend="eager")()
    assert not [str(w.message) for w in recwarn]


def test_compiled_llama(fresh):
    """Backbones, heads and loss of policy and reference in one graph, the loss inside the head's module."""
    model, ref = llama(), llama()
    (head, body), (ref_head, ref_body) = ((fl.find_head(m), fl.backbone(m)) for m in (model, ref))

    def step(ids, labels):
        hidden = body(ids, use_cache=False).last_hidden_state
        with torch.no_grad():
            other = ref_head.source(ref_body(ids, use_cache=False).last_hidden_state)
        out = head(hidden, labels, other, loss=fl.dpo_loss, shift=True)
        return out.loss, out.metrics

    ids, labels, _ = batch(2, 5)
    (eager, metrics), (loss, numbers) = (
        f(ids, labels) for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager"))
    )
    torch.testing.assert_close((loss, numbers), (eager, metrics))
    parameters = list(model.parameters())
    same(torch.autograd.grad(loss, parameters), torch.autograd.grad(eager, parameters), rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_for_a_gpu(fresh, device, mode):
    """By inductor, and with its CUDA graphs."""
    model, ref = Model().to(device), Model().to(device)
    compiled = torch.compile(training_step, fullgraph=True, mode=mode)
    for _ in range(3):
        ids, labels, options = batch(3, 6)
        given = (model, ref, ids.to(device), labels.to(device), options | {"static_shapes": True}, "dpo", "hidden")
        torch.compiler.cudagraph_mark_step_begin()
        loss, eager = compiled(*given)[0], training_step(*given)[0]
        torch.testing.assert_close(loss, eager, rtol=1e-4, atol=1e-5)
        found = torch.autograd.grad(loss, list(model.parameters()))
        same(found, torch.autograd.grad(eager, list(model.parameters())), rtol=1e-3, atol=1e-5)
