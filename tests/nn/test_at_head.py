"""at_head: the model's own logits, auxiliary loss, images, adapters and engines; nothing is left behind."""

import types
from functools import partial

import pytest
import torch
from tiny_models import FAMILIES, SMALL, H, V, assert_same, batch, make
from torch import nn

import fused_losses as fl

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
MOE = dict(num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.1)


def moe():
    config = transformers.MixtralConfig(**SMALL | MOE, output_router_logits=True)
    return transformers.MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_logits_of_a_family(name):
    model = make(name, **FAMILIES[name][0])
    inputs, labels = batch()
    before = {k: dict(m.__dict__) for k, m in model.named_modules()}
    truth = model(**inputs).logits

    def look(source):
        assert_same(source, truth, labels)
        return source.hidden.sum()

    out, aux = fl.at_head(model, look, **inputs)
    assert aux is None and out.requires_grad
    assert before.keys() == dict(model.named_modules()).keys()
    for k, m in model.named_modules():
        assert m.__dict__.keys() == before[k].keys(), k
    torch.testing.assert_close(model(**inputs).logits, truth)


def test_a_step_equals_the_step_from_logits():
    model, reference = make("Gemma2ForCausalLM", final_logit_softcapping=20.0), make("LlamaForCausalLM")
    inputs, labels = batch()
    with torch.no_grad():
        ref = fl.at_head(reference, lambda q: fl.token_stats(q, labels, shift=True).logps, **inputs).out
        ref_logits = reference(**inputs).logits
    out, _ = fl.at_head(model, lambda p: fl.dpo_loss(p, labels, fl.LogProbs(ref), shift=True), **inputs)
    truth = fl.dpo_loss(model(**inputs).logits, labels, ref_logits, shift=True)
    assert isinstance(out, fl.LossOutput) and out.metrics.keys() == truth.metrics.keys()
    torch.testing.assert_close(out.loss, truth.loss)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(out.loss, parameters), torch.autograd.grad(truth.loss, parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_two_distributions_nest():
    student, teacher = make("LlamaForCausalLM"), make("Qwen2ForCausalLM", hidden_size=48)
    inputs, labels = batch()

    def loss(q):
        with torch.enable_grad():
            return fl.at_head(student, lambda p: fl.distillation_loss(p, labels, q, shift=True).loss, **inputs).out

    with torch.no_grad():
        found = fl.at_head(teacher, loss, **inputs).out
    with torch.no_grad():
        logits = teacher(**inputs).logits
    truth = fl.distillation_loss(student(**inputs).logits, labels, logits, shift=True).loss
    torch.testing.assert_close(found, truth)
    ours, theirs = (torch.autograd.grad(x, list(student.parameters())) for x in (found, truth))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_mixture_returns_its_auxiliary_loss():
    model = moe()
    inputs, labels = batch()
    inputs["attention_mask"][0, 4:] = 0
    out, aux = fl.at_head(model, lambda p: fl.cross_entropy_loss(p, labels, shift=True).loss, **inputs)
    truth = model(**inputs, labels=labels)
    torch.testing.assert_close(out + 0.1 * aux, truth.loss)
    ours, theirs = (torch.autograd.grad(x, list(model.parameters())) for x in (out + 0.1 * aux, truth.loss))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_vision_model_sees_its_image():
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**SMALL),
        image_token_index=90,
        vision_feature_layer=-1,
    )
    model = transformers.LlavaForConditionalGeneration(config).double().eval()
    inputs, labels = batch(2, 8)
    inputs["input_ids"][labels == 90] = 91  # no others stand for a part of the image
    inputs["input_ids"][:, 1:5] = 90
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    truth = model(**inputs, pixel_values=pixels).logits
    fl.at_head(model, lambda p: assert_same(p, truth, labels), **inputs, pixel_values=pixels)
    with pytest.raises(AssertionError):
        fl.at_head(model, lambda p: assert_same(p, truth, labels), **inputs, pixel_values=-pixels)


def test_return_dict_is_the_models_own_affair():
    model = make("LlamaForCausalLM")
    inputs, labels = batch()
    truth = model(**inputs).logits
    for value in (True, False):
        fl.at_head(model, lambda p: assert_same(p, truth, labels), **inputs, return_dict=value)


@pytest.mark.parametrize("name,where", [("Gemma2ForCausalLM", "config"), ("CohereForCausalLM", "model")])
def test_a_softcap_or_scale_that_changes_is_measured_anew(name, where):
    model = make(name, **FAMILIES[name][0])
    inputs, labels = batch()
    number = {"config": "final_logit_softcapping", "model": "logit_scale"}[where]
    for value in (None, 5.0, 0.5) if where == "config" else (0.25, 2.0):
        setattr(model.config if where == "config" else model, number, value)
        truth = model(**inputs).logits
        fl.at_head(model, lambda p: assert_same(p, truth, labels), **inputs)  # noqa: B023


def test_a_model_is_in_one_call_at_a_time():
    model = make("LlamaForCausalLM")
    inputs, labels = batch()

    def again(q):
        return fl.at_head(model, lambda p: fl.distillation_loss(p, labels, q, shift=True).loss, **inputs).out

    with pytest.raises(ValueError, match="is in another at_head already, of a loss that calls the same model"):
        fl.at_head(model, again, **inputs)
    truth = model(**inputs).logits
    fl.at_head(model, lambda p: assert_same(p, truth, labels), **inputs)
    with torch.no_grad():
        q = fl.at_head(model, lambda q: q, **inputs).out  # as the message says
    torch.testing.assert_close(again(q), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-12)


def test_weights_that_wait_elsewhere():
    """accelerate's offload: the head's weights come for its forward alone."""
    accelerate = pytest.importorskip("accelerate")
    model = make("LlamaForCausalLM")
    inputs, labels = batch()
    truth = model(**inputs).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    with torch.no_grad():
        fl.at_head(model, lambda p: assert_same(p, truth, labels), **inputs)
        torch.testing.assert_close(model(**inputs).logits, truth)
    assert model.lm_head.weight.is_meta


def test_an_encoder_decoder_is_refused():
    config = transformers.BartConfig(
        vocab_size=V,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
    )
    model = transformers.BartForConditionalGeneration(config)
    with pytest.raises(NotImplementedError, match="is an encoder-decoder, whose labels are not shifted"):
        fl.at_head(model, lambda p: p.hidden.sum(), **batch()[0])


LORA = {
    "lora": dict(target_modules=["q_proj", "lm_head"], init_lora_weights=False),
    "saved": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("options", LORA.values(), ids=LORA)
def test_adapters_on_and_off(options):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make("LlamaForCausalLM"), peft.LoraConfig(r=4, **options)).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    inputs, labels = batch()
    for context in (torch.enable_grad, model.disable_adapter):
        with context(), torch.no_grad():
            truth = model(**inputs).logits
            fl.at_head(model, lambda p: assert_same(p, truth, labels), **inputs)  # noqa: B023
    fl.at_head(model, lambda p: p.hidden.sum(), **inputs).out.backward()


def test_autocast_and_hooks_stay_around_the_forward():
    model = make("LlamaForCausalLM").float()
    inputs, labels = batch()
    seen = []
    model.lm_head.register_forward_pre_hook(lambda m, args: seen.append("head"))
    model.register_forward_hook(lambda m, args, out: seen.append(type(out)))
    with torch.autocast("cpu", torch.bfloat16):
        out = fl.at_head(model, lambda p: (fl.token_stats(p, labels, shift=False).logps, p.hidden), **inputs).out
        truth = fl.token_stats(model(**inputs).logits, labels, shift=False).logps
    assert seen[:2] == ["head", dict] and out[0].dtype == torch.float32
    torch.testing.assert_close(out[0], truth, rtol=0, atol=0.3)  # logits of hundreds in bfloat16


class Twice(nn.Module):
    """Asks its head twice, or not at all."""

    def __init__(self, times):
        super().__init__()
        self.model, self.lm_head, self.times = nn.Embedding(V, H), nn.Linear(H, V), times

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, return_dict=True):
        hidden = self.model(input_ids)
        measuring = not isinstance(self.model, nn.Embedding)  # a stand-in is there
        hidden = hidden[0] if measuring else hidden
        logits = [self.lm_head(hidden) for _ in range(1 if measuring else self.times)]
        return type("Output", (), {"logits": logits[0] if logits else None, "aux_loss": None})()


def test_refusals():
    inputs, labels = batch()
    model = make("LlamaForCausalLM")
    for kept, m, words, error, more in (
        (1, model, "labels: go to the loss", ValueError, {"labels": labels}),
        (2, torch.compile(model), "compiled as a whole", NotImplementedError, {}),
        (3, nn.DataParallel(model), "DataParallel copies", NotImplementedError, {}),
        (4, Twice(0), "did not call its head", ValueError, {}),
        (5, Twice(2), "calls its head twice", ValueError, {}),
    ):
        given = {"input_ids": inputs["input_ids"]} if kept > 3 else inputs
        with pytest.raises(error, match=words):
            fl.at_head(m, lambda p: p.hidden.sum(), **given, **more)
        assert all("forward" not in x.__dict__ for x in (*model.modules(), *getattr(m, "module", m).children()))
        assert not any(x._forward_hooks for x in m.modules())
    model.lm_head.weight.ds_id = 1
    with pytest.raises(NotImplementedError, match="ZeRO-3"):
        fl.at_head(model, lambda p: p.hidden.sum(), **inputs)


def test_an_adapter_for_each_row_is_refused():
    """Where the head has one; without, the rows' states differ and the head does not."""
    peft = pytest.importorskip("peft")
    inputs, labels = batch()
    for modules in (["q_proj"], ["q_proj", "lm_head"]):
        config = peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
        model = peft.get_peft_model(make("LlamaForCausalLM"), config).double()
        model.add_adapter("other", config)
        model.double().eval()
        inputs["adapter_names"] = ["default", "other", "__base__", "default"]
        truth = model(**inputs).logits
        if "lm_head" not in modules:
            fl.at_head(model, lambda p: assert_same(p, truth, labels), **inputs)  # noqa: B023
            continue
        with pytest.raises(
            ValueError, match="lm_head: was given adapter_names beside hidden states, expected these alone"
        ):
            fl.at_head(model, lambda p: p.hidden.sum(), **inputs)


HEAD_TOO = {  # of a tied head: what the adapter is on; what of it is trained
    "embedding": (dict(target_modules=["embed_tokens"]), 2),
    "embedding, tied": (dict(target_modules=["embed_tokens"], ensure_weight_tying=True), 4),
    "both": (dict(target_modules=["embed_tokens", "lm_head"]), 4),
    "embedding in full": (dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]), 5),
    "head in full": (dict(target_modules=["q_proj"], modules_to_save=["lm_head"]), 5),
    "rsLoRA": (dict(target_modules=["lm_head"], use_rslora=True), 2),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HEAD_TOO)
def test_adapters_on_tied_embeddings(name):
    """The logits are the model's own, and so are the gradients of all that is trained."""
    peft = pytest.importorskip("peft")
    options, count = HEAD_TOO[name]
    model = peft.get_peft_model(make("LlamaForCausalLM", tie_word_embeddings=True), peft.LoraConfig(r=2, **options))
    model.double()
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.add_(0.1 * torch.randn_like(p))
    inputs, labels = batch()
    loss = lambda source: fl.token_stats(source, labels, shift=True).logps.sum()  # noqa: E731
    truth = loss(model(**inputs).logits)
    ours, theirs = (
        torch.autograd.grad(x, trained, allow_unused=True) for x in (fl.at_head(model, loss, **inputs).out, truth)
    )
    assert sum(g is not None for g in theirs) == count
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("tied", [False, True])
def test_single_tokens_that_an_adapter_trains_are_refused(tied):
    """As rows of the head: all others are the base model's."""
    peft = pytest.importorskip("peft")
    tokens = [3, 5] if tied else {"lm_head": [3, 5]}
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=tokens)
    model = peft.get_peft_model(make("LlamaForCausalLM", tie_word_embeddings=tied), config)
    with pytest.raises(TypeError, match=r"lm_head \(TrainableTokensWrapper\): expected nn.Linear or LoRA on one"):
        fl.at_head(model, lambda p: p.hidden.sum(), **batch()[0])


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model", "head", "forward"])
@pytest.mark.filterwarnings("error:Dynamo does not know")
def test_compiled_in_place(what):
    """Modules that say how to call them faster are still called with the loss in place of the head."""
    torch._dynamo.reset()
    model = make("LlamaForCausalLM")
    inputs, labels = batch()
    loss = lambda source: fl.token_stats(source, labels, shift=True).logps.sum()  # noqa: E731
    truth = torch.autograd.grad(loss(model(**inputs).logits), list(model.parameters()))
    if what == "forward":
        model.forward = torch.compile(model.forward, backend="aot_eager")
    else:
        (model if what == "model" else model.lm_head).compile(backend="aot_eager")
    before = dict(model.__dict__)
    for _ in range(2):
        found = torch.autograd.grad(fl.at_head(model, loss, **inputs).out, list(model.parameters()))
        torch.testing.assert_close(found, truth, rtol=1e-8, atol=1e-10)
    assert model.__dict__.keys() == before.keys() and model.__dict__.get("forward") is before.get("forward")
    torch._dynamo.reset()


def test_a_compiled_head_is_refused():
    model = make("LlamaForCausalLM")
    model.lm_head = torch.compile(model.lm_head)
    with pytest.raises(TypeError, match=r"lm_head \(OptimizedModule\): expected nn.Linear or LoRA on one"):
        fl.at_head(model, lambda p: p.hidden.sum(), **batch()[0])


def test_a_failing_loss_leaves_nothing():
    model = make("LlamaForCausalLM")
    with pytest.raises(ZeroDivisionError):
        fl.at_head(model, lambda p: 1 / 0, **batch()[0])
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_another_head_is_measured_anew():
    model = make("LlamaForCausalLM")
    inputs, labels = batch()
    fl.at_head(model, lambda p: p.hidden.sum(), **inputs)
    model.resize_token_embeddings(V + 7, mean_resizing=False)
    truth = model(**inputs).logits
    fl.at_head(model, lambda p: assert_same(p, truth, labels), **inputs)


def test_packed_sequences_do_not_see_one_another():
    """transformers finds them in position_ids where no cache is asked for."""
    model = make("LlamaForCausalLM")
    ids = torch.randint(3, V, (1, 11))
    positions = torch.cat([torch.arange(5), torch.arange(6)])[None]
    packed = fl.at_head(model, lambda p: p.hidden, input_ids=ids, position_ids=positions).out
    alone = [fl.at_head(model, lambda p: p.hidden, input_ids=part).out for part in ids.split([5, 6], 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1))


def test_a_loss_may_call_its_model():
    """Not by at_head, but as ever: the logits of other inputs, say."""
    model = make("LlamaForCausalLM")
    (inputs, labels), (others, _) = batch(), batch(2, 5)
    truth, other = model(**inputs).logits, model(**others).logits

    def look(source):
        torch.testing.assert_close(model(**others).logits, other)
        assert_same(source, truth, labels)

    fl.at_head(model, look, **inputs)


def test_who_wants_logits():
    """A hook on the model, and a model that goes around the hooks of its head: named, in words."""
    model = make("LlamaForCausalLM")
    inputs, _ = batch()
    model.register_forward_hook(lambda m, args, out: halve_logits(out))
    with pytest.raises(
        ValueError, match="a hook or wrapper of LlamaForCausalLM failed on a dict of the loss.*'logits'"
    ):
        fl.at_head(model, lambda p: p.hidden.sum(), **inputs)
    model._forward_hooks.clear()

    def forward(input_ids, **_):
        logits = model.lm_head.forward(model.model(input_ids).last_hidden_state)
        return types.SimpleNamespace(logits=logits.double())

    model.forward = forward
    with pytest.raises(ValueError, match="failed after it had called its head's forward.*'double'"):
        fl.at_head(model, lambda p: p.hidden.sum(), **inputs)
    with pytest.raises(ZeroDivisionError):
        fl.at_head(model, lambda p: 1 / 0, **inputs)


# ---- wrappers that have kept the model's own forward ---------------------------------------------------------------------


class Keeps(nn.Module):
    def __init__(self, module, call, after=lambda out: out):
        super().__init__()
        self.module, self.call, self.after = module, call, after

    def forward(self, **inputs):
        return self.after(self.call(**inputs))


KEPT = {
    "bound": lambda m: m.forward,
    "partial": lambda m: partial(m.forward, output_hidden_states=False),
    "of the class": lambda m: types.MethodType(type(m).forward, m),
    "in a closure": lambda m: (lambda f: lambda **inputs: f(**inputs))(m.forward),
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("cls", ["Llama", "Gemma2", "Mixtral"])
def test_wrappers_that_keep_a_forward(cls, name):
    model = {
        "Llama": lambda: make("LlamaForCausalLM"),
        "Gemma2": lambda: make("Gemma2ForCausalLM", final_logit_softcapping=0.5),
        "Mixtral": moe,
    }[cls]()
    wrapper = Keeps(model, KEPT[name](model))
    inputs, labels = batch()
    loss = lambda source: fl.cross_entropy_loss(source, labels, shift=True)  # noqa: E731
    (out, aux), (truth, true_aux) = fl.at_head(wrapper, loss, **inputs), fl.at_head(model, loss, **inputs)
    assert isinstance(out, fl.LossOutput) and (aux is None) == (true_aux is None) == (cls != "Mixtral")
    ours, theirs = (x.loss + (0 if a is None else a) for x, a in ((out, aux), (truth, true_aux)))
    torch.testing.assert_close(ours, theirs)
    parameters = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters))
    assert all("forward" not in m.__dict__ for m in wrapper.modules()) and not model.lm_head._forward_hooks


def halve_logits(out):
    out.logits = out.logits * 0.5
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_such_wrappers_may_not_do(dtype):
    model = make("Gemma2ForCausalLM", final_logit_softcapping=20.0).to(dtype)
    inputs, _ = batch()
    look = lambda p: p.hidden.sum()  # noqa: E731
    fl.at_head(Keeps(model, model.forward), look, **inputs)
    for after, words in (
        (halve_logits, "Keeps changes the logits that Gemma2ForCausalLM.forward returns"),
        (lambda out: out.to_tuple(), "returned tuple, in which an auxiliary loss would not be found.*return_dict=True"),
        (lambda out: out.logits, "returned Tensor, in which an auxiliary loss"),
    ):
        with pytest.raises(ValueError, match=f"model: Keeps .*{words.removeprefix('Keeps ')}"):
            fl.at_head(Keeps(model, model.forward, after), look, **inputs)
    with pytest.raises(ValueError, match="in which an auxiliary loss"):
        fl.at_head(Keeps(model, model.forward), look, **inputs, return_dict=False)
    with pytest.raises(
        ValueError, match="Keeps returned tuple in place of what Gemma2ForCausalLM.forward had returned"
    ):
        fl.at_head(Keeps(model, lambda **own: model(**own), lambda out: (out["out"],)), look, **inputs)


def test_adaption_prompts():
    peft = pytest.importorskip("peft")
    config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM")
    model = peft.get_peft_model(make("LlamaForCausalLM"), config).double()
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.normal_()
    inputs, labels = batch()
    loss = lambda source: fl.token_stats(source, labels, shift=True).logps.sum()  # noqa: E731
    found, truth = fl.at_head(model, loss, **inputs).out, loss(model(**inputs).logits)
    torch.testing.assert_close(found, truth)
    ours, theirs = (torch.autograd.grad(x, trained) for x in (found, truth))
    assert ours and all(g.any() for g in ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
