"""Axolotl's plugin: on a BasePlugin of the same methods in every run, and in Axolotl's own manager where it is there."""

import contextlib
import copy
import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import on_ranks
from stand_ins_of_packages import adapter, module, real
from tiny_models import SMALL, V

transformers = pytest.importorskip("transformers")
pytest.importorskip("pydantic")
pytestmark = pytest.mark.usefixtures("one_thread")

NAME, BASE = "axolotl", "axolotl.integrations.base"
ROOT = Path(__file__).parents[2]


class BasePlugin:
    """As in axolotl 0.21.0."""

    def get_input_args(self):
        """Nothing."""

    def post_model_build(self, cfg, model):
        """Nothing."""

    def post_train_unload(self, cfg):
        """Nothing."""


@pytest.fixture(autouse=True)
def on_torch(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")


@pytest.fixture(params=["stand-in", "package"])
def ours(request):
    with contextlib.ExitStack() as stack:
        if request.param == "package":
            real(BASE)
            found = importlib.import_module(f"fused_losses.integrations.{NAME}")
        else:
            found = stack.enter_context(adapter(NAME, module(BASE, BasePlugin=BasePlugin)))
        yield found
        found.unpatch()


ON = SimpleNamespace(fused_losses_cross_entropy=True)
MODELS = {
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 3.0},
    "Cohere": {"logit_scale": 0.3},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
}


def model_of(name):
    config = getattr(transformers, name + "Config")(**{**SMALL, **MODELS[name]})
    return getattr(transformers, name + "ForCausalLM")(config)


def batch():
    ids = torch.randint(3, V, (2, 7))
    labels = ids.clone()
    labels[0, :3] = labels[1, 5:] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model, inputs):
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("items", [None, 5, torch.tensor(11)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_models(ours, name, items):
    model, inputs = model_of(name).train(), batch()
    inputs |= {} if items is None else {"num_items_in_batch": items}
    plain, exact = gradients(model, inputs)
    own, signature = type(model).forward, inspect.signature(type(model).forward)
    plugin = ours.FusedLossesPlugin()
    plugin.post_model_build(ON, model)
    assert type(model).forward is not own and inspect.signature(type(model).forward) == signature
    fused, found = gradients(model, inputs)
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-5, atol=1e-6)
    assert fused.logits is None and found.keys() == exact.keys()
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)
    plugin.post_train_unload(ON)
    assert type(model).forward is own and model(**inputs).logits is not None


def test_labels_that_are_shifted(ours):
    model, inputs = model_of("Llama").train(), batch()
    inputs["shift_labels"] = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    inputs["shift_labels"][1, 2] = -100
    plain, _ = gradients(model, inputs)
    ours.patch(type(model))
    torch.testing.assert_close(
        model(inputs["input_ids"], **{k: inputs[k] for k in ("labels", "shift_labels")}).loss, plain.loss
    )


def test_packed_samples(ours):
    """Positions that start anew, which is how transformers finds the samples."""
    model, inputs = model_of("Llama").train(), batch()
    inputs |= {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2), "use_cache": False}
    plain, exact = gradients(model, inputs)
    whole, _ = gradients(model, {k: x for k, x in inputs.items() if k != "position_ids"})
    assert abs(plain.loss - whole.loss) > 1e-4
    ours.patch(type(model))
    fused, found = gradients(model, inputs)
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)


def check_fsdp2(rank, group):
    """A model in FSDP2 on two ranks, with the same rows on each: loss and gradients of the plain model."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(group, "cpu")
    torch.manual_seed(0)
    model, inputs = model_of("Llama").train(), batch()
    plain, exact = gradients(model, inputs)
    with adapter(NAME, module(BASE, BasePlugin=BasePlugin)) as ours:
        ours.FusedLossesPlugin().post_model_build(ON, model)
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
        model.zero_grad()
        fused = model(**inputs)
        fused.loss.backward()
        assert fused.logits is None
        torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-5, atol=1e-6)
        found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)
        ours.unpatch()


@pytest.mark.slow
def test_fsdp2():
    on_ranks(2, check_fsdp2)


def test_what_stays_as_it_was(ours):
    """Without the line of the config, in evaluation, without labels; copies of a model run on their own weights."""
    model, inputs = model_of("Llama"), batch()
    own = type(model).forward
    ours.FusedLossesPlugin().post_model_build(SimpleNamespace(fused_losses_cross_entropy=None), model)
    assert type(model).forward is own
    ours.patch(type(model))
    ours.patch(type(model))
    assert model.eval()(**inputs).logits.shape == (2, 7, V)
    assert model.train()(input_ids=inputs["input_ids"]).logits.shape == (2, 7, V)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert abs(other(**inputs).loss - torch.tensor(float(V)).log()) < 1e-5
    ours.unpatch()
    assert type(model).forward is own


def test_lora_on_the_head(ours):
    peft = pytest.importorskip("peft")
    model, inputs = model_of("Llama"), batch()
    ours.FusedLossesPlugin().post_model_build(ON, model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).train()
    fused, found = gradients(adapted, inputs)
    assert fused.logits is None
    ours.unpatch()
    plain, exact = gradients(adapted, inputs)
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_steps_of_a_trainer(ours, tmp_path):
    """The same weights after steps with accumulation, with the Trainer's own count of label tokens."""
    rows = [{k: x[0].tolist() for k, x in batch().items()} for _ in range(8)]
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = model_of("Llama")
        if fused:
            ours.FusedLossesPlugin().post_model_build(ON, model)
        args = transformers.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            learning_rate=0.01,
            eval_strategy="steps",
            eval_steps=1,
        )
        trainer = transformers.Trainer(model, args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        found.append([x["eval_loss"] for x in trainer.state.log_history if "eval_loss" in x])
    assert len(found[0]) == 2 and found[0][0] != found[0][1]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_steps_of_axolotls_trainer(tmp_path):
    """The same losses from step to step."""
    trainers, arguments = real("axolotl.core.trainers.base"), real("axolotl.core.training_args")
    datasets, ours = pytest.importorskip("datasets"), importlib.import_module(f"fused_losses.integrations.{NAME}")
    rows = datasets.Dataset.from_list([{k: x[i % 2].tolist() for k, x in batch().items()} for i in range(8)])
    found = []
    for cfg in (SimpleNamespace(fused_losses_cross_entropy=False), ON):
        torch.manual_seed(0)
        model, plugin = model_of("Llama"), ours.FusedLossesPlugin()
        plugin.post_model_build(cfg, model)
        args = arguments.AxolotlTrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=3,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            learning_rate=0.01,
            logging_steps=1,
            include_tkps=True,
        )
        trainer = trainers.AxolotlTrainer(model=model, args=args, train_dataset=rows)
        trainer.axolotl_cfg = SimpleNamespace(sample_packing=False)
        trainer.train()
        plugin.post_train_unload(cfg)
        found.append([x["loss"] for x in trainer.state.log_history if "loss" in x])
    assert len(found[0]) == 3 and found[0][0] != found[0][2]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_words(ours):
    check = ours.FusedLossesArgs.model_validate
    for name in ours.OTHERS:
        with pytest.raises(ValueError, match=f"fused_losses_cross_entropy: expected no {name}, which"):
            check({"fused_losses_cross_entropy": True, name: "yes"})
        assert not check({name: "yes"}).fused_losses_cross_entropy
    with pytest.raises(ValueError, match="expected another adapter than multilora"):
        check({"fused_losses_cross_entropy": True, "adapter": "multilora"})
    assert check({"fused_losses_cross_entropy": True, "adapter": "lora"}).fused_losses_cross_entropy
    model = model_of("Llama")
    model.loss_function = lambda logits, labels, vocab_size: logits.sum()
    with pytest.raises(
        NotImplementedError, match="LlamaForCausalLM.loss_function is <lambda>, expected ForCausalLMLoss"
    ):
        ours.FusedLossesPlugin().post_model_build(ON, model)


def entry_point():
    text = (ROOT / "setup.py").read_text("utf-8")
    return text[text.index('"axolotl.plugins"') :].split('"')[3]


def test_the_entry_point(ours):
    name, _, target = entry_point().partition(" = ")
    module_name, _, cls = target.partition(":")
    assert name == "fused-losses" and module_name == ours.__name__ and cls == ours.FusedLossesPlugin.__name__


def test_axolotls_manager(monkeypatch):
    """The plugin is loaded by its entry point, and its line is part of Axolotl's config, with its checks."""
    base, config = real(BASE), real("axolotl.integrations.config")
    target = entry_point().partition(" = ")[2]
    points = [SimpleNamespace(value=target)] if target else []
    monkeypatch.setattr(base, "entry_points", lambda group: points if group == "axolotl.plugins" else [])
    monkeypatch.setattr(base, "BUILTIN_PLUGINS", ())
    monkeypatch.setattr(base.PluginManager, "_instance", None)
    try:
        manager = base.PluginManager.get_instance()
        assert [type(x).__name__ for x in manager.plugins.values()] == ["FusedLossesPlugin"]
        _, merged = config.merge_input_args()
        given = {"base_model": "x", "datasets": [{"path": "x", "type": "alpaca"}], "micro_batch_size": 1}
        given |= {"gradient_accumulation_steps": 1, "learning_rate": 0.1}
        cfg = merged(**given, fused_losses_cross_entropy=True)
        assert cfg.fused_losses_cross_entropy and not merged(**given).fused_losses_cross_entropy
        with pytest.raises(ValueError, match="expected no chunked_cross_entropy"):
            merged(**given, fused_losses_cross_entropy=True, chunked_cross_entropy=True)
        model, inputs = model_of("Llama").train(), batch()
        own = type(model).forward
        manager.post_model_build(cfg, model)
        assert model(**inputs).logits is None
        manager.post_train_unload(cfg)
        assert type(model).forward is own
    finally:
        base.reset_plugin_entry_points_cache()
