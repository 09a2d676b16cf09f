"""A whole training step inside torch's machinery: torch.compile, autocast, checkpoints, accumulation, CUDA graphs, transforms
and export. The operators by themselves: test_operators.py, test_hidden_operators.py."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers import seeded
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, hvp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fused_losses as fl
from fused_losses.engine import fused_backward, hidden_at, hidden_ops, logits_ops, pair_ops

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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "packed"),
    [
        ("dpo", "hidden", False), ("dpo", "logits", True), ("cross entropy", "hidden", True),
        ("distillation", "hidden", False),
    ],
)  # fmt: skip
def test_one_graph_for_all_sizes(fresh, name, kind, packed):
    """In one graph, which the second size makes dynamic and no later one compiles anew."""
    model, ref = Model(), Model().requires_grad_(False)
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


@pytest.mark.slow
def test_tiles_are_no_business_of_the_compiler(fresh):
    """Tiles have another shape for every number of rows; the graph is the same."""
    weight, ref_weight = torch.randn(2000, 16, requires_grad=True), torch.randn(2000, 16)

    def step(x, ref_x, y):
        return fl.dpo_loss(fl.Hidden(x, weight), y, fl.Hidden(ref_x, ref_weight), workspace=60_000, shift=False).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for i, (pairs, length) in enumerate(SIZES):
        x = torch.randn(2 * pairs, length, 16, requires_grad=True)
        given = x, torch.randn(2 * pairs, length, 16), torch.randint(0, 2000, (2 * pairs, length))
        with torch.compiler.set_stance("fail_on_recompile" if i > 1 else "default"):
            loss = compiled(*given)
        same(torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(step(*given), (x, weight)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["orpo_loss", "preference_matching_loss", "preference_loss"])
def test_dynamo_traces_a_loss_once(fresh, name):
    """A float that the library reads from an object would become an input, and tracing would start again without it."""
    x, weight = torch.randn(4, 5, 8, requires_grad=True), torch.randn(29, 8, requires_grad=True)
    several = {"ref": None, "loss_type": ("sigmoid", "discopop", "sft")} if name == "preference_loss" else {}

    def step(x, weight, y):
        return getattr(fl, name)(fl.Hidden(x, weight), y, shift=True, **several).loss

    graphs = CompileCounterWithBackend("aot_eager")  # it counts the graphs that are thrown away too
    torch.compile(step, fullgraph=True, dynamic=True, backend=graphs)(x, weight, torch.randint(0, 29, (4, 5)))
    assert graphs.frame_count == 1


def test_compiles_without_a_warning(fresh, recwarn):
    """Divergences come out of a cache, of which torch.compile would warn."""
    z, w = torch.randn(4, 3, V, requires_grad=True), torch.randn(4, 3, V)

    def step():
        y = torch.ones(4, 3, dtype=torch.long)
        return fl.distillation_loss(z, y, w, divergence="js(beta=0.2)", shift=False).loss

    torch.compile(step, fullgraph=True, backend="eager")()
    assert not [str(w.message) for w in recwarn]


@pytest.mark.slow
def test_compiled_llama(fresh):
    """Backbones, heads and loss of policy and reference in one graph, the loss inside the head's module."""
    model, ref = llama(), llama().requires_grad_(False)
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


def inside(model, what, ids, labels, options):
    """A step that has other machinery in it."""

    def loss_of(embedded):
        return fl.dpo_loss(fl.Hidden(model.body(embedded), model.head.weight), labels, None, **options).loss

    if what == "checkpoint":
        return checkpoint(loss_of, model.embed(ids), use_reentrant=False)
    if what == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model.embed(ids))
    return fl.dpo_loss(model.source(ids, "logits"), labels, None, inplace_backward=True, **options).loss


@pytest.mark.slow
@pytest.mark.parametrize("what", ["checkpoint", "autocast", "in place"])
def test_compiles_around_other_machinery(fresh, what):
    model = Model()
    given = model, what, *batch(3, 6)
    loss, eager = torch.compile(inside, fullgraph=True, backend="aot_eager")(*given), inside(*given)
    rough = {"rtol": 1e-2, "atol": 1e-4} if what == "autocast" else {}
    torch.testing.assert_close(loss, eager, **rough)
    parameters = list(model.parameters())
    same(torch.autograd.grad(loss, parameters), torch.autograd.grad(eager, parameters), **rough)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_for_a_gpu(fresh, device, mode):
    """By inductor, and with its CUDA graphs."""
    model, ref = Model().to(device), Model().to(device).requires_grad_(False)
    compiled = torch.compile(training_step, fullgraph=True, mode=mode)
    for _ in range(3):
        ids, labels, options = batch(3, 6)
        given = (model, ref, ids.to(device), labels.to(device), options | {"static_shapes": True}, "dpo", "hidden")
        torch.compiler.cudagraph_mark_step_begin()
        loss, eager = compiled(*given)[0], training_step(*given)[0]
        torch.testing.assert_close(loss, eager, rtol=1e-4, atol=1e-5)
        found = torch.autograd.grad(loss, list(model.parameters()))
        same(found, torch.autograd.grad(eager, list(model.parameters())), rtol=1e-3, atol=1e-5)


# ---- autocast ----------------------------------------------------------------------------------------------------------


def eager_step(model, ref, ids, labels):
    """DPO as people write it: logits, float32, log-softmax."""
    y, counts = labels[:, 1:], labels[:, 1:] != -100

    def logps(model):
        logits = model.head(model(ids))[:, :-1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        found = logits.log_softmax(-1).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return found.masked_fill(~counts, 0).sum(-1)

    with torch.no_grad():
        other = logps(ref)
    h = (logps(model) - other).tensor_split(2)
    return -nn.functional.logsigmoid(0.1 * (h[0] - h[1])).mean()


@pytest.mark.parametrize("kind", ["hidden", "logits"])
def test_autocast(kind):
    """Gradients in the parameters' dtype, statistics in float32, and no further from the truth than eager code inside."""
    model, ref = Model(), Model().requires_grad_(False)
    exact, exact_ref = Model(torch.float64), Model(torch.float64)
    exact.load_state_dict(model.state_dict())
    exact_ref.load_state_dict(ref.state_dict())
    ids, labels, options = batch(8, 9)
    truth = eager_step(exact, exact_ref, ids, labels)
    with torch.autocast("cpu", torch.bfloat16):
        eager = eager_step(model, ref, ids, labels)
        with torch.no_grad():
            other = ref.source(ids, kind)
        out = fl.dpo_loss(model.source(ids, kind), labels, other, **options)
    assert out.loss.dtype == out.stats.logps.dtype == out.metrics["rewards/margins"].dtype == torch.float32
    losses, parts = (truth, eager, out.loss), []
    for loss, m in zip(losses, (exact, model, model), strict=True):
        parts.append(
            torch.cat(
                [g.double().flatten() for g in torch.autograd.grad(loss, list(m.parameters()), retain_graph=True)]
            )
        )
    for true, theirs, ours in (losses, parts):
        assert (ours - true).norm() <= 1.25 * (theirs - true).norm() + 1e-4 * true.norm()
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.loss, list(model.parameters())))


@pytest.mark.parametrize("plan", ["row_blocks", "vocab_chunks", "keep_logits"])
def test_products_run_in_the_dtype_of_autocast(plan):
    x, weight = torch.randn(4, 3, H, requires_grad=True), torch.randn(V, H).bfloat16().float().requires_grad_()
    y = torch.randint(0, V, (4, 3))
    low, head = x.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        inside = fl.dpo_loss(fl.Hidden(x, weight), y, None, plan=plan, shift=False).loss
    outside = fl.dpo_loss(fl.Hidden(low, head), y, None, plan=plan, shift=False).loss
    assert torch.equal(inside, outside) and not torch.equal(
        inside, fl.dpo_loss(fl.Hidden(x, weight), y, None, plan=plan, shift=False).loss
    )
    same(
        torch.autograd.grad(inside, (x, weight)),
        torch.autograd.grad(outside, (low, head)),
        check_dtype=False,
        rtol=1e-2,
        atol=1e-5,
    )


# ---- checkpoints -------------------------------------------------------------------------------------------------------

SOURCES = [
    ("hidden", {"plan": "row_blocks"}),
    ("hidden", {"plan": "vocab_chunks"}),
    ("hidden", {"plan": "keep_logits"}),
    ("logits", {}),
]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("around", ["backbone", "all"])
@pytest.mark.parametrize(("kind", "how"), SOURCES, ids=str)
def test_checkpointing(kind, how, around, reentrant):
    """Of the backbone, or of the backbone and the loss, which is then computed anew in the backward."""
    model = Model(torch.float64)
    ids, labels, options = batch(3, 6)
    saved = fl.LogProbs(torch.randn(6, 5, dtype=torch.float64))

    def loss_of(hidden):
        source = model.head(hidden) if kind == "logits" else fl.Hidden(hidden, model.head.weight)
        return fl.dpo_loss(source, labels, saved, **options, **how).loss

    plain = loss_of(model(ids))
    embedded = model.embed(ids)
    if around == "all":
        loss = checkpoint(lambda x: loss_of(model.body(x)), embedded, use_reentrant=reentrant)
    else:
        loss = loss_of(checkpoint(model.body, embedded, use_reentrant=reentrant))
    torch.testing.assert_close(loss, plain)
    expected = torch.autograd.grad(plain, list(model.parameters()))
    loss.backward()
    same([p.grad for p in model.parameters()], expected)


@pytest.mark.parametrize(("kind", "how"), SOURCES, ids=str)
def test_saved_tensors_may_move(kind, how):
    """What waits for the backward may be packed away, as activation offloading does."""
    model = Model(torch.float64)
    ids, labels, options = batch(3, 6)
    loss = fl.cross_entropy_loss(model.source(ids, kind), labels, **options, **how).loss
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().clone(), lambda x: x):
        moved = fl.cross_entropy_loss(model.source(ids, kind), labels, **options, **how).loss
    parameters = list(model.parameters())
    same(torch.autograd.grad(moved, parameters), torch.autograd.grad(loss, parameters))


# ---- accumulation, and one graph for several losses -----------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "how"), SOURCES, ids=str)
@pytest.mark.parametrize("name", ["dpo", "cross entropy"])
def test_gradients_accumulate(name, kind, how):
    """Micro-batches of unequal size, told the count of the whole batch, train as the whole batch does."""
    whole, ref = Model(torch.float64), Model(torch.float64).requires_grad_(False)
    parts = Model(torch.float64)
    parts.load_state_dict(whole.state_dict())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (whole, parts)]

    def backward(model, rows, ids, labels, options, **count):
        with torch.no_grad():
            other = ref.source(ids[rows], kind)
        run(name, model.source(ids[rows], kind), labels[rows], other, **options, **how, **count).loss.backward()

    for _ in range(3):
        ids, labels, options = batch(5, 7)
        items = (labels[:, 1:] != -100).sum() if name == "cross entropy" else 5
        backward(whole, torch.arange(10), ids, labels, options)
        for a, b in ((0, 1), (1, 3), (3, 5)):  # pairs
            rows = torch.cat([torch.arange(a, b), torch.arange(5 + a, 5 + b)])
            backward(parts, rows, ids, labels, options, num_items=items)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    same(parts.parameters(), whole.parameters(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("kind", "how"), SOURCES, ids=str)
def test_several_losses_and_walks_of_one_graph(kind, how):
    model = Model(torch.float64)
    ids, labels, options = batch(3, 6)
    parameters = list(model.parameters())

    def losses():
        source = model.source(ids, kind)
        dpo = fl.dpo_loss(source, labels, None, **options, **how)
        return [dpo.loss, fl.cross_entropy_loss(source, labels, **options, **how).loss]

    alone = [torch.autograd.grad(losses()[i], parameters) for i in range(2)]
    a, b = losses()
    (a + 2 * b).backward(retain_graph=True)
    together = [g + 2 * h for g, h in zip(*alone, strict=True)]
    same([p.grad for p in parameters], together)
    a.backward()  # a second time, on top; and the graph below both is gone
    same([p.grad for p in parameters], [t + g for t, g in zip(together, alone[0], strict=True)])
    with pytest.raises(RuntimeError, match="second time"):
        b.backward()


@pytest.mark.parametrize(("kind", "how"), SOURCES, ids=str)
@pytest.mark.parametrize("name", ["dpo", "cross entropy", "distillation"])
def test_metrics_hold_no_graph(name, kind, how):
    """What is logged keeps no hidden state or logit alive, and no circle of references does."""
    model, ref = Model(), Model().requires_grad_(False)
    ids, labels, options = batch(3, 6)
    gc.disable()
    try:
        source = model.source(ids, kind)
        held = weakref.ref(source if kind == "logits" else source.hidden)
        with torch.no_grad():
            other = ref.source(ids, kind)
        out = run(name, source, labels, other, entropy=True, **options, **how)
        metrics, _ = out.metrics, out.loss.backward(retain_graph=True)
        del source
        assert held() is not None  # by the graph
        del out, _
        assert held() is None
    finally:
        gc.enable()
    assert len(metrics) > 2 and not any(x.requires_grad or x.dim() for x in metrics.values())


# ---- CUDA graphs -------------------------------------------------------------------------------------------------------


class NoReads(TorchDispatchMode):
    """Raises where a number travels from a tensor to the host, or a shape depends on one."""

    READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
    OURS = (
        pair_ops.pair_loss,
        pair_ops.pair_loss_backward,
        hidden_ops.hidden_stats,
        hidden_ops.hidden_stats_backward,
        hidden_at.hidden_at,
        hidden_at.hidden_at_backward,
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__.split(".")[0], kwargs or {}
        if func.namespace == "fused_losses":  # looked into
            (op,) = (op for op in self.OURS if op._opoverload is func)
            with self:
                return op._init_fn(*args, **kwargs)
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        counts = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in self.READS or counts or any(i is not None and i.dtype == torch.bool for i in masks):
            raise AssertionError(f"{func} reads a value")
        return func(*args, **kwargs)


@pytest.mark.parametrize("plan", ["auto", "vocab_chunks", "keep_logits", "frozen_head"])
@pytest.mark.parametrize("name", ["dpo", "cross entropy", "distillation"])
def test_static_shapes_read_nothing(monkeypatch, name, plan):
    """Around the kernels, which are left out: in the interpreter they run on the host."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton")
    kernels = "forward backward fold close terms merge_states pair_forward pair_backward tile_states tile_terms"
    pytest.importorskip("triton")
    silent = SimpleNamespace(
        **vars(logits_ops.backend_module("triton")) | dict.fromkeys(kernels.split(), lambda *_: None)
    )
    for module in (logits_ops, pair_ops, hidden_ops, fused_backward):
        monkeypatch.setattr(module, "backend_module", lambda _: silent)
    model, ref = Model(), Model().requires_grad_(False)
    model.head.requires_grad_(plan != "frozen_head")
    ids, labels, options = batch(2, 5)

    def step(**how):
        with torch.no_grad():
            other = ref.source(ids, "hidden")
        run(name, model.source(ids, "hidden"), labels, other, plan=plan, **options, **how).loss.backward()

    with NoReads():
        step(static_shapes=True)
        with pytest.raises(AssertionError, match="nonzero.* reads a value"):
            step()


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ["vocab_chunks", "keep_logits", "frozen_head"])
def test_cuda_graph(device, plan):
    """A captured step, forward and backward, on batches that it has not seen."""
    if device.type != "cuda":
        pytest.skip("needs CUDA graphs")
    model, ref = Model().to(device), Model().to(device).requires_grad_(False)
    model.head.requires_grad_(plan != "frozen_head")
    ids, labels = (x.to(device) for x in batch(3, 6)[:2])
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step(**how):
        with torch.no_grad():
            other = ref.source(ids, "hidden")
        out = fl.dpo_loss(model.source(ids, "hidden"), labels, other, shift=True, plan=plan, **how)
        return out.loss, *torch.autograd.grad(out.loss, parameters)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(static_shapes=True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static_shapes=True)
    for _ in range(3):
        fresh_ids, fresh_labels, _ = batch(3, 6)
        ids.copy_(fresh_ids)
        labels.copy_(fresh_labels)
        graph.replay()
        same(captured, step(), rtol=1e-4, atol=1e-6)


# ---- transforms and second derivatives ------------------------------------------------------------------------------------


def first_order():
    """By the operator that a call ends in: the call, and what it is a function of."""
    seeded(0)
    new = lambda *shape: torch.randn(shape, dtype=torch.float64)  # noqa: E731
    x, weight, z, other, logps = new(4, 3, 5), new(11, 5), new(4, 3, 11), new(4, 3, 11), new(4, 3)
    y, ids = torch.randint(0, 11, (4, 3)), torch.arange(2).expand(4, 3, 2)
    top = new(4, 3, 2).log_softmax(-1)
    given = fl.LogProbs(logps)
    several = {"loss_type": ("sigmoid", "hinge"), "shift": False}

    def rows(x):
        return fl.dpo_loss(fl.Hidden(x, weight), y, given, plan="row_blocks", shift=False).loss

    return {
        "logits": (lambda z: fl.token_stats(z, y, other, divergence="js", shift=False).divergence["js"].sum(), z),
        "hidden": (lambda x: fl.token_stats(fl.Hidden(x, weight), y, plan="vocab_chunks", shift=False).logps.sum(), x),
        "frozen": (
            lambda x: fl.token_stats(
                fl.Hidden(x, weight), y, plan="frozen_head", entropy=True, shift=False
            ).entropy.sum(),
            x,
        ),
        "rows": (rows, x),
        "rows, squared": (lambda x: rows(x) ** 2, x),
        "rows, weight": (
            lambda w: fl.cross_entropy_loss(fl.Hidden(x, w), y, plan="row_blocks", shift=False).loss,
            weight,
        ),
        "pairs": (lambda p: fl.dpo_loss(fl.LogProbs(p), y, given, shift=False).loss, logps + 1),
        "curve": (lambda p: fl.preference_loss(fl.LogProbs(p), y, given, **several).loss, logps + 1),
        "top k, logits": (lambda z: fl.topk_distillation_loss(z, y, top, ids, shift=False).loss, z),
        "top k, hidden": (lambda x: fl.topk_distillation_loss(fl.Hidden(x, weight), y, top, ids, shift=False).loss, x),
    }


def dual(f, x):
    with forward_ad.dual_level():
        f(forward_ad.make_dual(x, torch.ones_like(x)))


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x])),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "dual numbers": dual,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("what", first_order())
def test_transforms_are_refused_in_words(what, transform):
    """Left to torch, forward-mode derivatives through an operator are zero."""
    f, x = first_order()[what]
    words = r"fused_losses\.(token_stats|preference_loss): expected plain tensors, got .* or fused_losses.reference"
    with pytest.raises(RuntimeError, match=words):
        TRANSFORMS[transform](f, x)


def twice(f, x):
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    torch.autograd.grad(g.square().sum(), x, allow_unused=True)


def twice_by_factor(f, x):
    """With respect to what follows the loss."""
    factor = torch.ones((), dtype=x.dtype, requires_grad=True)
    (g,) = torch.autograd.grad(factor * f(x), x, create_graph=True)
    torch.autograd.grad(g.square().sum(), factor, allow_unused=True)


SECOND = {
    "grad of grad": twice, "by a factor": twice_by_factor, "hessian": hessian,
    "hvp": lambda f, x: hvp(f, x, torch.ones_like(x)),
}  # fmt: skip


@pytest.mark.parametrize("how", SECOND)
@pytest.mark.parametrize("what", first_order())
def test_second_derivatives_are_refused_in_words(what, how):
    """Never taken for zero."""
    f, x = first_order()[what]
    words = r"fused_losses\.(token_stats|preference_loss) can be differentiated once; use fused_losses.reference"
    with pytest.raises(RuntimeError, match=words):
        SECOND[how](f, x.requires_grad_())


@pytest.mark.parametrize("what", ["logits", "hidden", "rows", "pairs"])
def test_gradgradcheck_says_so(what):
    f, x = first_order()[what]
    with pytest.raises(RuntimeError, match="can be differentiated once; use fused_losses.reference"):
        torch.autograd.gradgradcheck(f, x.requires_grad_())


@pytest.mark.parametrize("what", sorted(first_order().keys() - {"curve"}))  # which is elementwise
def test_batched_gradients_have_no_rule(what):
    f, x = first_order()[what]
    loss = f(x.requires_grad_())
    with pytest.raises(RuntimeError, match="atching rule not implemented"):
        torch.autograd.grad(loss, x, torch.ones(2, dtype=x.dtype), is_grads_batched=True)


def test_the_twins_go_with_all_of_them():
    """What the refusals point to."""
    x, weight, y = (
        torch.randn(4, 3, 5, dtype=torch.float64),
        torch.randn(11, 5, dtype=torch.float64),
        torch.ones(4, 3).long(),
    )
    f = lambda x: fl.reference.dpo_loss(fl.Hidden(x, weight), y, None, shift=False).loss  # noqa: E731
    gradient, (_, slope) = TRANSFORMS["grad"](f, x), TRANSFORMS["jvp"](f, x)
    torch.testing.assert_close(slope, gradient.sum())
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(fl.dpo_loss(fl.Hidden(leaf, weight), y, None, shift=False).loss, leaf)[0], gradient
    )
    torch.testing.assert_close(TRANSFORMS["vmap"](f, x), f(x).expand(2))
    torch.testing.assert_close(hessian(f, x), TRANSFORMS["hessian"](f, x))


# ---- torch.export ------------------------------------------------------------------------------------------------------


class Statistics(nn.Module):
    def __init__(self, model, ref, kind, how):
        super().__init__()
        self.model, self.ref, self.kind, self.how = model, ref, kind, how

    def forward(self, ids, labels):
        policy, ref = (m.source(ids, self.kind) for m in (self.model, self.ref))
        stats = fl.token_stats(policy, labels, ref, divergence="js", entropy=True, shift=True, **self.how)
        return stats.logps, stats.ref_logps, stats.divergence["js"], stats.entropy, stats.correct, stats.mask


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "how", "strict"),
    [("hidden", {"static_shapes": True}, False), ("hidden", {}, True), ("logits", {}, False)], ids=str,
)  # fmt: skip
def test_export(fresh, kind, how, strict):
    """For all batch sizes and lengths."""
    module = Statistics(Model(), Model(), kind, how)
    sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=3, max=64)}
    with torch.no_grad():
        program = torch.export.export(module, batch(3, 6)[:2], dynamic_shapes=(sizes, sizes), strict=strict)
        for size in ((3, 6), (5, 9)):
            given = batch(*size)[:2]
            same(program.module()(*given), module(*given))
    called = [str(node.target) for node in program.graph.nodes if "fused_losses" in str(node.target)]
    assert called == [f"fused_losses.{'token' if kind == 'logits' else 'hidden'}_stats.default"]
