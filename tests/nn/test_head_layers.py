"""What hangs on the layers of a head is honoured, or refused by its name: by at_head and find_head, wherever it hangs."""

import copy
import pickle

import pytest
import torch
from tiny_models import assert_same, batch, make
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import fused_losses as fl
from fused_losses.nn.head_layers import active_adapter

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


def adapted(**options):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make("LlamaForCausalLM"), peft.LoraConfig(r=2, init_lora_weights=False, **options))
    return model.double().eval()


LORA, SAVED = dict(target_modules=["lm_head"]), dict(target_modules=["q_proj"], modules_to_save=["lm_head"])
LAYERS = {  # the model, its layer, and how the layer is called
    "head": (lambda: make("LlamaForCausalLM"), lambda m: m.lm_head),
    "lora": (lambda: adapted(**LORA), lambda m: m.get_base_model().lm_head),
    "lora.base_layer": (lambda: adapted(**LORA), lambda m: m.get_base_model().lm_head.base_layer),
    "lora.lora_B.default": (lambda: adapted(**LORA), lambda m: m.get_base_model().lm_head.lora_B.default),
    "saved": (lambda: adapted(**SAVED), lambda m: m.get_base_model().lm_head),
    "saved.modules_to_save.default": (
        lambda: adapted(**SAVED),
        lambda m: m.get_base_model().lm_head.modules_to_save.default,
    ),
}


def halved(module, args, *rest):
    return 0.5 * rest[-1] if rest else (0.5 * args[0],)


def halved_gradient(module, grads, *_):
    return tuple(None if g is None else 0.5 * g for g in grads)


def own_forward(module):
    before = module.forward
    module.forward = lambda *args, **options: 0.5 * before(*args, **options)


def own_call(module):
    kind = type(module)
    module.__class__ = type("Halved", (kind,), {"__call__": lambda self, *a, **k: 0.5 * kind.__call__(self, *a, **k)})
    module.__class__.__name__ = kind.__name__


def accelerate_hook(module):
    hooks = pytest.importorskip("accelerate.hooks")
    own = type("OwnHook", (hooks.ModelHook,), {"post_forward": lambda self, module, out: 0.5 * out})
    own.__module__ = __name__
    hooks.add_hook_to_module(module, hooks.SequentialHook(hooks.ModelHook(), own()))


CHANGES = {  # how, and a word of the refusal
    "own forward": (own_forward, "own_forward.*in place of (Linear|ModulesToSaveWrapper).forward"),
    "own __call__": (own_call, "own_call.*in place of"),
    "accelerate's hook of one's own": (accelerate_hook, "OwnHook.*in place of"),
    "forward hook": (lambda m: m.register_forward_hook(halved), "forward hook .*halved"),
    "forward hook, always": (
        lambda m: m.register_forward_hook(halved, with_kwargs=True, always_call=True, prepend=True),
        "forward hook .*halved",
    ),
    "backward hook": (lambda m: m.register_full_backward_hook(halved_gradient), "backward hook .*halved_gradient"),
    "backward pre-hook": (
        lambda m: m.register_full_backward_pre_hook(halved_gradient),
        "backward pre-hook .*halved_gradient",
    ),
    "pre-hook": (lambda m: m.register_forward_pre_hook(halved), "forward pre-hook .*halved"),
    "pre-hook with kwargs": (
        lambda m: m.register_forward_pre_hook(lambda m, a, k: ((0.5 * a[0],), k), with_kwargs=True),
        "forward pre-hook .*lambda",
    ),
}


def sources(model, inputs):
    """The two ways to a source, as functions."""
    return {
        "at_head": lambda: fl.at_head(model, lambda p: p, **inputs).out,
        "find_head": lambda: fl.find_head(model).source(fl.backbone(model)(**inputs).last_hidden_state),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("where", LAYERS)
def test_what_changes_the_logits(where, change):
    new, layer_of = LAYERS[where]
    model = new()
    inputs, labels = batch()
    plain = model(**inputs).logits
    made = fl.find_head(model)  # before anything hangs there
    states = fl.backbone(model)(**inputs).last_hidden_state
    how, words = CHANGES[change]
    how(layer_of(model))
    truth = model(**inputs).logits
    assert "backward" in change or not torch.allclose(truth, plain)
    _, _, below = where.partition(".")
    for way, source in sources(model, inputs).items():
        if way == "at_head" and "pre-hook" in change and "backward" not in change and not below:
            assert_same(source(), truth, labels)
            continue
        with pytest.raises(NotImplementedError, match=rf"LlamaForCausalLM\.lm_head.*{below}.*: .*({words})"):
            source()
    with pytest.raises(NotImplementedError, match=words):
        made.source(states)
    torch.testing.assert_close(model(**inputs).logits, truth)


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
def test_hooks_on_all_modules(kind):
    model = make("LlamaForCausalLM")
    inputs, labels = batch()
    seen = []

    def watch(module, *_):
        seen.append(module)

    handle = getattr(torch_module, f"register_module_{kind}_hook")(watch)
    try:
        truth = model(**inputs).logits
        for way, source in sources(model, inputs).items():
            if way == "at_head" and kind == "forward_pre":
                seen.clear()
                assert_same(source(), truth, labels)
                assert seen.count(model.lm_head) == 1
                continue
            with pytest.raises(NotImplementedError, match=r"lm_head.*: has the .*hook .*watch"):
                source()
    finally:
        handle.remove()


@pytest.mark.parametrize("package", ["accelerate.hooks", "deepspeed.runtime", "torch.distributed.fsdp", "trl.models"])
def test_the_hooks_of_engines_stay(package):
    model = make("LlamaForCausalLM")
    inputs, labels = batch()
    seen = []

    def pre(module, args):
        seen.append("pre")

    def post(module, args, out):
        seen.append("post")

    pre.__module__ = post.__module__ = package
    model.lm_head.register_forward_pre_hook(pre)
    model.lm_head.register_forward_hook(post, always_call=True)
    truth = model(**inputs).logits
    seen.clear()
    for source in sources(model, inputs).values():
        assert_same(source(), truth, labels)
    assert seen == ["pre", "post"]


def test_a_wrapper_that_is_not_of_peft_has_no_adapter():
    assert active_adapter(nn.Sequential(nn.Linear(2, 3)), "head") is None


def test_flops_are_counted():
    model = make("LlamaForCausalLM")
    inputs, labels = batch()
    truth = model(**inputs).logits
    with FlopCounterMode(display=False) as counter:
        source = fl.at_head(model, lambda p: p, **inputs).out
    assert counter.get_total_flops() > 0
    assert_same(source, truth, labels)


def test_a_forward_that_is_the_layers_own():
    """Put on the instance as it was, or compiled."""
    model = make("LlamaForCausalLM")
    inputs, labels = batch()
    truth = model(**inputs).logits
    for forward in (model.lm_head.forward, torch.compile(model.lm_head.forward, backend="eager")):
        model.lm_head.forward = forward
        for source in sources(model, inputs).values():
            assert_same(source(), truth, labels)
        assert model.lm_head.__dict__["forward"] is forward


WEIGHTS = {
    "weight_norm": lambda m: nn.utils.parametrizations.weight_norm(m),
    "orthogonal": lambda m: nn.utils.parametrizations.orthogonal(m),
    "prune": lambda m: prune.l1_unstructured(m, "weight", 0.5),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_computed(name):
    """at_head sees what the head's forward would; find_head's head has parameters alone."""
    model = make("LlamaForCausalLM")
    inputs, labels = batch()
    WEIGHTS[name](model.lm_head)
    loss = lambda source: fl.token_stats(source, labels, shift=False).logps.sum()  # noqa: E731
    parameters = list(model.parameters())
    truth = torch.autograd.grad(loss(model(**inputs).logits), parameters)
    found = torch.autograd.grad(fl.at_head(model, loss, **inputs).out, parameters)
    torch.testing.assert_close(found, truth, rtol=1e-7, atol=1e-9)
    with pytest.raises(TypeError, match="plain nn.Parameter"):
        fl.find_head(model)


def test_a_patched_linear_layer(monkeypatch):
    model = make("LlamaForCausalLM")
    inputs, _ = batch()
    before = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 0.5 * before(self, x))
    for source in sources(model, inputs).values():
        with pytest.raises(TypeError, match="expected nn.Linear .* whose forward may do something else"):
            source()


def test_copies_and_heads_that_are_gone():
    head = fl.FusedHead(nn.Linear(4, 5))  # nobody else has the layer
    states = torch.randn(2, 4)
    for other in (head, copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        torch.testing.assert_close(other.source(states).weight, head.weight)
