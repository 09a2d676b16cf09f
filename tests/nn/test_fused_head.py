"""FusedHead, find_head, backbone: a model's own logits, hooks around the loss, adapters, and what is refused."""

import pytest
import torch
from tiny_models import FAMILIES, SMALL, Body, H, Tiny, V, assert_same, batch, make
from torch import nn

import fused_losses as fl
from fused_losses.nn.fused_head import FusedHead, backbone, find_head


@pytest.mark.parametrize("name", FAMILIES)
def test_the_logits_of_a_family(name):
    config, softcap, scale = FAMILIES[name]
    model = make(name, **config)
    inputs, labels = batch()
    head, body = find_head(model), backbone(model)
    assert (head.options["softcap"], head.options["scale"]) == (softcap, scale)
    assert head.weight is model.get_output_embeddings().weight and head.bias is model.get_output_embeddings().bias
    assert_same(head.source(body(**inputs).last_hidden_state), model(**inputs).logits, labels)
    assert model.get_output_embeddings() is not None and type(body).__name__ in str(model)  # the stand-ins are gone


def test_a_vision_model_keeps_its_tower():
    transformers = pytest.importorskip("transformers")
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = transformers.LlamaConfig(**SMALL)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=90, vision_feature_layer=-1
    )
    model = transformers.LlavaForConditionalGeneration(config).double().eval()
    ids = torch.tensor([[1, 90, 90, 90, 90, 5, 6]])
    inputs = dict(input_ids=ids, pixel_values=torch.randn(1, 3, 8, 8).double())
    body = backbone(model)
    assert body is model.model is not model.get_decoder()
    assert_same(find_head(model).source(body(**inputs).last_hidden_state), model(**inputs).logits, ids)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "T5ForConditionalGeneration"])
def test_a_transformers_model_with_more_before_its_head_is_refused(name):
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, name)
    with torch.device("meta"):
        model = cls(cls.config_class())
    with pytest.raises(NotImplementedError, match=rf"{name}\..*\(Linear\).*fl.FusedHead"):
        find_head(model)


def test_measured_options():
    model = Tiny(before=lambda h: h * 0.5, after=lambda z: (30 * torch.tanh(z * 3 / 30) * 0.25)[..., :90])
    head = find_head(model, temperature=2.0)
    assert head.options == dict(softcap=20.0, scale=0.375, temperature=2.0, valid_vocab=90)
    assert type(FusedHead.from_model(model)) is FusedHead
    ids = torch.randint(3, 90, (2, 5))
    logits = model(ids).logits / 2
    torch.testing.assert_close(
        fl.token_stats(head.source(model.body.embed(ids)), ids, shift=False).lse, logits.logsumexp(-1)
    )


@pytest.mark.parametrize(
    "around, says",
    [
        (dict(before=lambda h: h + 1), "last_hidden_state"),
        (dict(before=lambda h: h.flip(-1)), "last_hidden_state"),
        (dict(before=nn.Linear(H, H)), "before.weight|Tiny.forward"),
        (dict(after=lambda z: z + 1), "logits that are not"),
        (dict(after=lambda z: z.index_fill(-1, torch.tensor([7]), -1e9)), "logits that are not"),
        (dict(after=lambda z: z.clamp(-30, 30)), "logits that are not"),
        (dict(after=lambda z: z.flip(-1)), "logits that are not"),
        (dict(after=lambda z: -z), "logits that are not"),
        (dict(after=lambda z: z[:, -1:]), r"logits \[1, 1, 97\]"),
        (dict(after=lambda z: z[:, None]), r"logits \[1, 1, 3, 97\]"),
        (dict(after=lambda z: z.undefined), "AttributeError"),
        (dict(head=nn.Linear(H, V), before=lambda h: h / 2), "head with a bias"),
    ],
)
def test_what_fl_hidden_cannot_do_is_refused(around, says):
    model = Tiny(**around)
    before = dict(model.named_modules())
    with pytest.raises(NotImplementedError, match=rf"Tiny.lm_head \(Linear\): .*({says})"):
        find_head(model)
    assert dict(model.named_modules()) == before


def named(name, **attributes):
    """A module of a class of that name."""
    module = type(name, (nn.Module,), {"forward": lambda self, x: x})()
    for k, x in attributes.items():
        setattr(module, k, x)
    return module


def integers(dtype):
    return nn.Parameter(torch.zeros(V * H // 2, 1, dtype=dtype), requires_grad=False)


def sharded():
    head = nn.Linear(H, V, bias=False)
    head.weight.data = torch.empty(0)
    return head


def colwise():
    head = nn.Linear(H, V, bias=False)
    head.weight.data = torch.empty(V // 2, H)
    return head


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "head, error, says",
    [
        (named("Linear4bit", weight=integers(torch.uint8)), TypeError, "quantised"),
        (named("Linear4bit", weight=nn.Parameter(torch.zeros(V, H))), TypeError, "quantised"),  # not on its device yet
        (named("Linear8bitLt", weight=integers(torch.int8)), TypeError, "quantised"),
        (named("GPTQLinear", qweight=integers(torch.int32)), TypeError, "has no weight.*quantised"),
        (named("FP8Linear", weight=nn.Parameter(torch.zeros(V, H, dtype=torch.float8_e4m3fn))), TypeError, "quantised"),
        (named("Projection", weight=nn.Parameter(torch.zeros(V, H))), TypeError, "got Projection"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(H, V)), TypeError, "plain nn.Parameter"),
        (Doubled(H, V), TypeError, "got Doubled"),
        (sharded(), ValueError, r"sharded.*make the FusedHead before"),
        (colwise(), ValueError, r"\[48, 32\]: it is sharded or tensor-parallel"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_a_head_that_is_not_a_dense_linear_layer_is_refused_by_name(head, error, says):
    kind = type(head).__name__
    with pytest.raises(error, match=rf"Tiny.lm_head \({kind}\): .*{says}"):
        find_head(Tiny(head))
    with pytest.raises(error, match=rf"my head \({kind}\): "):
        FusedHead(head, name="my head")


def test_a_dtensor_is_refused(tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        head = nn.Linear(H, V, bias=False)
        head.weight = nn.Parameter(distribute_tensor(head.weight.data, init_device_mesh("cpu", (1,))))
        with pytest.raises(TypeError, match=r"Tiny.lm_head \(Linear\): .*DTensor; make the FusedHead before"):
            find_head(Tiny(head))
    finally:
        distributed.destroy_process_group()


def test_no_head_and_wrappers():
    with pytest.raises(TypeError, match="Body: no output head"):
        find_head(Body())
    model = Tiny()
    wrapped = named("DistributedDataParallel", module=torch.compile(model))
    assert find_head(wrapped).weight is model.lm_head.weight and backbone(wrapped) is model.body


@pytest.mark.parametrize("bias", [False, True])
def test_parameters_are_shared(bias):
    linear = nn.Linear(H, V, bias=bias)
    head = FusedHead(linear)
    both = nn.ModuleDict(dict(lm=linear, head=head))
    assert dict(head.named_parameters()) == dict(linear.named_parameters())
    assert list(dict(both.named_parameters())) == [f"lm.{k}" for k, _ in linear.named_parameters()]  # each once
    assert both.load_state_dict(both.state_dict()) and head.state_dict().keys() == linear.state_dict().keys()
    assert both.double() and head.weight is linear.weight and head.weight.dtype == torch.float64


def test_gradients_of_loss_and_statistics_reach_the_tied_embedding():
    model = Tiny().double()
    head = find_head(model)
    inputs, labels = batch()
    states = model.body(**inputs).last_hidden_state
    ref = torch.randn(4, 6, V).double()
    out = head(states, labels, ref, loss=fl.dpo_loss, beta=0.3, shift=True)
    truth = fl.dpo_loss(model(**inputs).logits, labels, ref, beta=0.3, shift=True)
    assert (
        type(out) is fl.LossOutput and type(out.stats) is fl.TokenStats and out.metrics.keys() == truth.metrics.keys()
    )
    weight = model.body.embed.weight
    torch.testing.assert_close(out.loss, truth.loss)
    torch.testing.assert_close(*(torch.autograd.grad(x.loss, weight)[0] for x in (out, truth)))
    stats = head(model.body(**inputs).last_hidden_state, labels, loss=fl.token_stats, entropy=True, shift=False)
    assert type(stats) is fl.TokenStats and stats.entropy.shape == labels.shape
    assert head(states, labels, loss=lambda source, y: source.weight) is weight  # anything else as it is
    with torch.no_grad():
        assert not head.source(states).weight.requires_grad


def tensors(x):
    """As DeepSpeed looks for them: not in dataclasses."""
    if isinstance(x, torch.Tensor):
        return [x]
    inner = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ()
    return [t for y in inner for t in tensors(y)]


def shard(module, log):
    """ZeRO-3: the weight is whole inside forward, and from the first gradient of an output on."""
    full, empty = module.weight.data.clone(), torch.empty(0, dtype=module.weight.dtype)

    def gather(*_):
        log.append(module)
        module.weight.data = full

    def release(_, args, output):
        module.weight.data = empty
        found = [t for t in tensors(output) if t.requires_grad]
        assert found and not any(t.numel() == V * H for t in found)
        for t in found:
            t.register_hook(lambda g: gather() if module.weight.numel() == 0 else None)

    gather.__module__ = release.__module__ = "deepspeed.runtime.zero"  # by which they are known for an engine's
    module.register_forward_pre_hook(gather)
    module.register_forward_hook(release)
    module.weight.data = empty
    module.weight.ds_id = 0


@pytest.mark.parametrize("loss", [fl.dpo_loss, fl.token_stats])
def test_the_loss_runs_inside_the_hooks_of_both_heads(loss):
    policy, ref = nn.Linear(H, V, bias=False), nn.Linear(H, V, bias=False).requires_grad_(False)
    states, other = torch.randn(4, 6, H, requires_grad=True), torch.randn(4, 6, H)
    labels = torch.randint(0, V, (4, 6))
    scalar = lambda out: out.loss if loss is fl.dpo_loss else (out.logps - out.ref_logps).sum()  # noqa: E731
    truth = scalar(loss(fl.Hidden(states, policy.weight), labels, fl.Hidden(other, ref.weight), shift=False))
    exact = torch.autograd.grad(truth, (states, policy.weight))
    head, ref_head, log = FusedHead(policy), FusedHead(ref), []
    shard(head, log), shard(ref_head, log)
    with pytest.raises(
        ValueError, match=r"head \(Linear\): its weight is a Parameter \[0\] of a sharding engine: call the FusedHead"
    ):
        head.source(states)
    ours = scalar(head(states, labels, (ref_head, other), loss=loss, shift=False))
    assert log == [head, ref_head] and head.weight.numel() == ref_head.weight.numel() == 0
    torch.testing.assert_close(ours, truth)
    gradient = torch.autograd.grad(ours, (states, head.weight))
    assert log[2:].count(head) == 1  # gathered again for backward
    torch.testing.assert_close(gradient, exact)


def test_a_sharded_head_is_found_before_it_is_gathered():
    model = Tiny(nn.Linear(H, V, bias=False), after=lambda z: z / 4)
    shard(model.lm_head, [])
    assert find_head(model).options["scale"] == 0.25


class Linear(nn.Module):
    """peft's lora.Linear, what of it matters."""

    def __init__(self, base, adapters=("default",), dropout=0.0):
        super().__init__()
        self.base_layer, self.active_adapters, self.disable_adapters, self.merged = base, list(adapters), False, False
        self.lora_A = nn.ModuleDict({a: nn.Linear(H, 4, bias=False) for a in adapters})
        self.lora_B = nn.ModuleDict({a: nn.Linear(4, V, bias=False) for a in adapters})
        self.lora_dropout = nn.ModuleDict({a: nn.Dropout(dropout) if dropout else nn.Identity() for a in adapters})
        self.scaling, self.use_dora, self.lora_variant = dict.fromkeys(adapters, 2.0), {}, {}


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda m: m.lora_B.default.register_parameter("bias", nn.Parameter(torch.zeros(V))), "lora_bias"),
        (lambda m: setattr(m, "merged", True), "merged"),
        (lambda m: m.use_dora.update(default=True), "DoRA"),
        (lambda m: m.lora_variant.update(default=object()), "DoRA or another variant"),
        (lambda m: m.lora_dropout.update({"default": nn.Dropout(0.1)}), "dropout"),
        (lambda m: m._modules.pop("lora_A"), "only LoRA"),
    ],
)
def test_an_adapter_that_is_more_than_lora_is_refused(change, says):
    layer = Linear(nn.Linear(H, V))
    change(layer)
    with pytest.raises(NotImplementedError, match=rf"head \(Linear\): .*{says}"):
        FusedHead(layer)
    assert FusedHead(layer, adapter=False).lora_a is None  # without it, the head is as good as any


def test_adapters_of_a_head():
    several = Linear(nn.Linear(H, V), ("a", "b"))
    with pytest.raises(NotImplementedError, match=r"several adapters are active, \['a', 'b'\]"):
        FusedHead(several)
    several.active_adapters = ["a"]
    head, states = FusedHead(several), torch.randn(2, 3, H)
    assert head.source(states).lora == fl.Lora(several.lora_A.a.weight, several.lora_B.a.weight, 2.0)
    several.active_adapters = ["b"]
    with pytest.raises(ValueError, match="'b' is active, was 'a': make a new FusedHead"):
        head.source(states)
    several.disable_adapters = True
    assert head.source(states).lora is None
    layer = Linear(nn.Linear(H, V), dropout=0.1)
    assert FusedHead(layer.eval()).source(states).lora is not None
    with pytest.raises(NotImplementedError, match="dropout"):
        layer.train() and FusedHead(layer)
    with pytest.raises(TypeError, match=r"head \(Linear\): Linear4bit has a weight of torch.uint8"):
        FusedHead(Linear(named("Linear4bit", weight=integers(torch.uint8))))


def test_peft_lora_on_the_head():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(make("LlamaForCausalLM"), config).double()
    inputs, labels = batch()
    head, original, body = find_head(model), find_head(model, adapter=False), backbone(model)
    assert head.name == "LlamaForCausalLM.lm_head (Linear)"
    assert_same(head.source(body(**inputs).last_hidden_state), model(**inputs).logits, labels)
    with model.disable_adapter(), torch.no_grad():
        states, logits = body(**inputs).last_hidden_state, model(**inputs).logits
        reference = head.source(states)
    assert_same(reference, logits, labels)
    assert_same(original.source(states), logits, labels)
    out = head(body(**inputs).last_hidden_state, labels, reference, loss=fl.dpo_loss, shift=True)
    truth = fl.dpo_loss(model(**inputs).logits, labels, logits, shift=True)
    torch.testing.assert_close(out.loss, truth.loss)
    factors = model.get_base_model().lm_head.lora_A.default.weight, model.get_base_model().lm_head.lora_B.default.weight
    torch.testing.assert_close(torch.autograd.grad(out.loss, factors), torch.autograd.grad(truth.loss, factors))


def test_peft_modules_to_save():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        make("LlamaForCausalLM"), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save.default.weight.mul_(1.1)
    inputs, labels = batch()
    head, original, body = find_head(model), find_head(model, adapter=False), backbone(model)
    assert_same(head.source(body(**inputs).last_hidden_state), model(**inputs).logits, labels)
    with model.disable_adapter():
        states = body(**inputs).last_hidden_state
        assert_same(original.source(states), model(**inputs).logits, labels)
        with pytest.raises(ValueError, match=r"LlamaForCausalLM.lm_head \(ModulesToSaveWrapper\): .*adapter=False"):
            head.source(states)


def test_peft_dora_and_prompts_are_refused():
    peft = pytest.importorskip("peft")
    dora = peft.get_peft_model(make("LlamaForCausalLM"), peft.LoraConfig(target_modules=["lm_head"], use_dora=True))
    with pytest.raises(NotImplementedError, match=r"LlamaForCausalLM.lm_head \(Linear\): .*DoRA"):
        find_head(dora)
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(NotImplementedError, match="prompt learning"):
        find_head(peft.get_peft_model(make("LlamaForCausalLM"), prompts))
