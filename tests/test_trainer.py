"""transformers' Trainer on our losses: from logits, from hidden states, with references of every kind; TrustRegionCallback."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import generator_of, seeded

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from datasets import Dataset  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments  # noqa: E402

import fused_losses as fl  # noqa: E402
from fused_losses.integrations.trainer import FusedLossMixin, TrustRegionCallback, compute_loss_func  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
VOCAB, LENGTH = 64, 8
SIZES = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    initializer_range=0.3, pad_token_id=0,
)  # fmt: skip


class FusedTrainer(FusedLossMixin, Trainer):
    pass


def tiny(seed=1, **options):
    seeded(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES | options))


def mixture(output_router_logits=True):
    seeded(1)
    more = dict(
        num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.3, output_router_logits=output_router_logits
    )
    return MixtralForCausalLM(MixtralConfig(**SIZES | more))


def near(model):
    made = copy.deepcopy(model)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return made


def rows(count=16):
    ids = torch.randint(1, VOCAB, (count, LENGTH), generator=generator_of(3))
    labels = ids.clone()
    for i in range(count):
        labels[i, : 1 + i % 4] = -100  # every row and micro-batch has another number of tokens
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "labels": labels.tolist()}
    )


def stacked(examples):
    return {k: torch.tensor([e[k] for e in examples]) for k in examples[0]}


def train(cls, model, path, *, more=None, data=None, **options):
    """The log of three steps, and the weights after them."""
    arguments = dict(
        output_dir=str(path), per_device_train_batch_size=4, max_steps=3, learning_rate=1e-2, logging_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, lr_scheduler_type="constant", disable_tqdm=True, gradient_accumulation_steps=2,
    )  # fmt: skip
    args = TrainingArguments(**arguments | options)
    trainer = cls(model, args, data_collator=stacked, train_dataset=rows() if data is None else data, **(more or {}))
    trainer.train()
    return trainer


def same(mine, theirs):
    a, b = ([e["loss"] for e in t.state.log_history if "loss" in e] for t in (mine, theirs))
    assert len(a) == 3 and a == pytest.approx(b, rel=1e-5)
    for (name, p), q in zip(mine.model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_cross_entropy_is_the_trainers_own(tmp_path):
    theirs = train(Trainer, tiny(), tmp_path)
    same(train(Trainer, tiny(), tmp_path, more={"compute_loss_func": compute_loss_func()}), theirs)
    same(train(FusedTrainer, tiny(), tmp_path), theirs)


def test_label_smoothing_is_the_trainers_own(tmp_path):
    theirs = train(Trainer, tiny(), tmp_path, label_smoothing_factor=0.2)
    more = {"compute_loss_func": compute_loss_func(fl.cross_entropy_loss, label_smoothing=0.2)}
    same(train(Trainer, tiny(), tmp_path, more=more), theirs)
    more = {"fused_loss": partial(fl.cross_entropy_loss, label_smoothing=0.2)}
    same(train(FusedTrainer, tiny(), tmp_path, more=more), theirs)


def test_a_mixtures_auxiliary_loss(tmp_path):
    mine = train(FusedTrainer, mixture(), tmp_path, more={"aux_loss_coef": 0.3}, gradient_accumulation_steps=1)
    theirs = train(Trainer, mixture(), tmp_path, gradient_accumulation_steps=1)
    same(mine, theirs)
    assert mine.state.log_history[0]["aux_loss"] > 0
    more = {"compute_loss_func": compute_loss_func(aux_loss_coef=0.3)}
    same(train(Trainer, mixture(), tmp_path, more=more, gradient_accumulation_steps=1), theirs)
    for more in ({"compute_loss_func": compute_loss_func()}, {}):
        with pytest.raises(ValueError, match="aux_loss_coef: the model returns an auxiliary loss"):
            train(Trainer if more else FusedTrainer, mixture(), tmp_path, more=more)
    none = "aux_loss_coef: got 0.3, but the model returned no auxiliary loss; set model.config.output_router_logits"
    both = (
        (Trainer, {"compute_loss_func": compute_loss_func(aux_loss_coef=0.3)}),
        (FusedTrainer, {"aux_loss_coef": 0.3}),
    )
    for cls, more in both:
        with pytest.raises(ValueError, match=none):
            train(cls, mixture(False), tmp_path, more=more)


def test_metrics_of_training_and_of_evaluation_are_kept_apart(tmp_path):
    data = rows()
    more = {"fused_loss": fl.dpo_loss, "reference": near(tiny())}
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, per_device_eval_batch_size=8, max_steps=4, logging_steps=4, eval_steps=2,
        eval_strategy="steps", learning_rate=0.0, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    made = FusedTrainer(tiny(), args, data_collator=stacked, train_dataset=data, eval_dataset=data, **more)
    made.train()
    log = made.state.log_history
    margins = [e["eval_rewards/margins"] for e in log if "eval_loss" in e]
    assert len(margins) == 2 and margins[0] == pytest.approx(margins[1], rel=1e-6)  # the weights did not move
    assert sum("rewards/margins" in e for e in log) == 1
    made.predict(data.select(range(8)))
    assert made.evaluate(metric_key_prefix="test")["test_rewards/margins"] == pytest.approx(margins[0], rel=1e-6)
    found = made.evaluate({"a": data, "b": data.select(range(8, 16))})
    assert found["eval_a_rewards/margins"] == pytest.approx(margins[0], rel=1e-6)
    assert found["eval_b_rewards/margins"] != pytest.approx(margins[0], rel=1e-3)


class NoKeywords(LlamaForCausalLM):
    accepts_loss_kwargs = False  # as Gemma 3, Qwen2.5-VL and others say


def test_tokens_are_counted_whatever_the_model_takes(tmp_path):
    seeded(1)
    model = NoKeywords(LlamaConfig(**SIZES))
    same(train(FusedTrainer, model, tmp_path), train(FusedTrainer, tiny(), tmp_path))


def test_evaluation_beside_liger(tmp_path):
    # whose forward would leave logits out for a loss of its own
    liger = pytest.importorskip("liger_kernel.transformers")
    parts = dict.fromkeys(("rope", "rms_norm", "swiglu", "cross_entropy"), False)
    model = tiny()
    liger.apply_liger_kernel_to_llama(**parts, fused_linear_cross_entropy=True, model=model)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, prediction_loss_only=True)
    options = {"args": args, "data_collator": stacked, "eval_dataset": rows()}
    mine, theirs = FusedTrainer(model, **options), Trainer(tiny(), **options)
    truth = theirs.evaluate()["eval_loss"]
    args.use_liger_kernel = True
    assert mine.evaluate()["eval_loss"] == pytest.approx(truth, rel=1e-5)


class Plain(Trainer):
    """The loss written out, on logits of both models."""

    reference, loss = None, None
    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        with torch.no_grad():
            ref = self.reference(**inputs).logits
        return type(self).loss(model(**inputs).logits, labels, ref, shift=True).loss


LOSSES = {
    "dpo": partial(fl.reference.dpo_loss, beta=0.3), "tdpo": fl.reference.tdpo_loss,
    "js link": partial(fl.reference.dpo_loss, divergence="js"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_a_reference_model(name, tmp_path):
    reference = near(tiny())
    plain = type("P", (Plain,), {"reference": reference, "loss": staticmethod(LOSSES[name])})
    theirs = train(plain, tiny(), tmp_path)
    twin = LOSSES[name]
    ours = getattr(fl, (twin.func if isinstance(twin, partial) else twin).__name__)
    ours = partial(ours, **twin.keywords) if isinstance(twin, partial) else ours
    mine = train(FusedTrainer, tiny(), tmp_path, more={"fused_loss": ours, "reference": near(tiny())})
    same(mine, theirs)
    assert "rewards/margins" in mine.state.log_history[0]


def test_a_teacher_of_another_width(tmp_path):
    """The Trainer counts tokens of both micro-batches, and the loss divides by them."""
    teacher = tiny(7, hidden_size=24)

    class Distil(Trainer):
        loss_is_scaled_for_ga = True

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            with torch.no_grad():
                ref = teacher(**inputs).logits
            twin = fl.reference.distillation_loss
            return twin(model(**inputs).logits, labels, ref, shift=True, num_items=num_items_in_batch).loss

    more = {"fused_loss": fl.distillation_loss, "reference": teacher}
    same(train(FusedTrainer, tiny(), tmp_path, more=more), train(Distil, tiny(), tmp_path))


@pytest.mark.parametrize("head", [False, True])
def test_the_adapter_off_is_the_reference(head, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"] + ["lm_head"] * head, init_lora_weights=False)

    def adapted():
        seeded(2)
        return peft.get_peft_model(tiny(), config)

    plain = type("P", (Plain,), {"reference": tiny(), "loss": staticmethod(fl.reference.tdpo_loss)})
    more = {"fused_loss": fl.tdpo_loss, "reference": "adapter off"}
    same(train(FusedTrainer, adapted(), tmp_path, more=more), train(plain, adapted(), tmp_path))


def test_the_adapter_off_has_no_dropout(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(attention_dropout=0.5), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    seen = []

    def loss(p, labels, q, shift):
        seen.append(fl.token_stats(q, labels, shift=True).logps.detach())
        return fl.dpo_loss(p, labels, q, shift=shift)

    more = {"fused_loss": loss, "reference": "adapter off", "per_token": False}
    made = train(FusedTrainer, model, tmp_path, more=more, max_steps=1)
    batch = stacked(list(rows()))
    made.model.train()
    for _ in range(2):
        made.compute_loss(made.model, batch)
        assert made.model.training
    made.model.eval()
    made.compute_loss(made.model, batch)
    assert not made.model.training
    assert torch.equal(seen[-3], seen[-2]) and torch.equal(seen[-2], seen[-1])


def test_saved_log_probs_and_evaluation(tmp_path):
    reference, data = near(tiny()), rows()
    batch = stacked(list(data))
    logps = fl.token_stats(reference(batch["input_ids"]).logits.detach(), batch["labels"], shift=True).logps
    saved = data.add_column("ref_logps", logps.tolist())
    online = train(FusedTrainer, tiny(), tmp_path, more={"fused_loss": fl.dpo_loss, "reference": near(tiny())})
    args = online.args
    assert args.remove_unused_columns  # which this is none of
    made = FusedTrainer(
        tiny(), args, data_collator=stacked, train_dataset=saved, eval_dataset=saved, fused_loss=fl.dpo_loss
    )
    made.train()
    same(made, online)
    found = made.evaluate()
    assert {"eval_loss", "eval_rewards/margins"} <= found.keys()
    predictions = made.predict(saved).predictions  # log-probs and hits per token, where a Trainer has logits
    assert predictions[0].shape == (16, LENGTH - 1) and predictions[1].dtype == bool
    truth = fl.token_stats(made.model(batch["input_ids"]).logits.detach(), batch["labels"], shift=True)
    torch.testing.assert_close(torch.tensor(predictions[0]), truth.logps, rtol=1e-4, atol=1e-5)


def test_refusals(tmp_path):
    for call, words in (
        (lambda: compute_loss_func(fl.dpo_loss), "loss: expected one whose units are tokens, got dpo_loss"),
        (lambda: compute_loss_func()({"logits": torch.zeros(1, 2, 3)}, None), "labels: expected them in the batch"),
        (lambda: compute_loss_func(lambda p, y: None), "per_token: expected True or False"),
        (lambda: train(FusedTrainer, tiny(), tmp_path, more={"reference": "base"}), "reference: expected a model"),
        (lambda: train(FusedTrainer, tiny(), tmp_path, more={"reference": "adapter off"}), "of PEFT models"),
        (
            lambda: train(FusedTrainer, tiny(), tmp_path, more={"fused_loss": fl.dpo_loss, "per_token": True}),
            "is a loss of pairs",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    model = tiny()
    with pytest.raises(ValueError, match="reference: is the model that is trained"):
        train(FusedTrainer, model, tmp_path, more={"fused_loss": fl.dpo_loss, "reference": model})
    assert all(p.requires_grad for p in model.parameters())
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(NotImplementedError, match="trains in full; give a model"):
        train(FusedTrainer, model, tmp_path, more={"fused_loss": fl.dpo_loss, "reference": "adapter off"})


def saved(**columns):
    data = rows()
    for name, x in ({"ref_logps": [[0.0] * (LENGTH - 1)] * len(data)} | columns).items():
        data = data.add_column(name, x)
    return data


WRONG = [
    (
        {"fused_loss": fl.dpo_loss},
        rows,
        r'^reference: expected one for dpo_loss, or "ref_logps" in the batch, got .*ref=None',
    ),
    ({"fused_loss": partial(fl.ipo_loss, beta=0.3)}, rows, "^reference: expected one for ipo_loss"),
    ({"fused_loss": fl.distillation_loss}, rows, "^reference: expected one for distillation_loss, or .*labels$"),
    ({"fused_loss": fl.tdpo_loss}, saved, "ref: .*LogProbs"),  # which log-probs are not enough for
    ({"fused_loss": fl.dpo_loss, "reference": "model"}, saved, '^reference: expected None beside "ref_logps"'),
    ({"fused_loss": fl.dpo_loss, "callbacks": "follow"}, saved, "^ref_logps: go stale where TrustRegionCallback"),
    ({"reference": "model"}, rows, "^reference: cross_entropy_loss has none, got LlamaForCausalLM"),
    ({"fused_loss": fl.simpo_loss, "reference": "model"}, rows, "^reference: simpo_loss has none"),
    ({"compute_loss_func": compute_loss_func()}, rows, "^compute_loss_func: is for a Trainer without FusedLossMixin"),
    ({"label_smoothing_factor": 0.2}, rows, "^label_smoothing_factor: expected 0, got 0.2"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_references_and_losses_that_would_be_ignored(case, tmp_path):
    more, data, words = WRONG[case]
    reference, more = near(tiny()), dict(more)
    given = {"reference": {"reference": reference}, "callbacks": {"callbacks": [TrustRegionCallback(reference)]}}
    for name in given.keys() & more.keys():
        more |= given[name]
    options = {k: more.pop(k) for k in ("label_smoothing_factor",) if k in more}
    with pytest.raises((TypeError, ValueError), match=words):
        train(FusedTrainer, tiny(), tmp_path, more=more, data=data(), **options)


def test_without_a_reference_on_purpose(tmp_path):
    class Plain(Trainer):
        loss_is_scaled_for_ga = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return fl.reference.dpo_loss(model(inputs["input_ids"]).logits, inputs["labels"], shift=True).loss

    same(
        train(FusedTrainer, tiny(), tmp_path, more={"fused_loss": partial(fl.dpo_loss, ref=None)}),
        train(Plain, tiny(), tmp_path),
    )


def test_a_model_compiled_as_a_whole_is_refused(tmp_path):
    with pytest.raises(NotImplementedError, match="OptimizedModule is compiled as a whole"):
        train(FusedTrainer, tiny(), tmp_path, torch_compile=True)


def test_images_reach_the_model(tmp_path):
    """And so does whatever else a processor makes."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    seeded(1)
    text = LlamaConfig(**SIZES)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=63, vision_feature_layer=-1)
    model = LlavaForConditionalGeneration(config)
    pixels = torch.randn(16, 3, 8, 8, generator=generator_of(4))
    with_images = []
    for row, image in zip(rows(), pixels.tolist(), strict=True):
        row["input_ids"] = [63] * 4 + [min(i, 62) for i in row["input_ids"][4:]]
        row["labels"] = [-100] * 4 + row["input_ids"][4:]
        with_images.append(row | {"pixel_values": image})
    data = Dataset.from_list(with_images)
    theirs = train(Trainer, copy.deepcopy(model), tmp_path, data=data, optim="sgd")
    same(train(FusedTrainer, copy.deepcopy(model), tmp_path, data=data, optim="sgd"), theirs)
    blank = data.map(lambda row: {"pixel_values": torch.zeros(3, 8, 8).tolist()})
    with pytest.raises(AssertionError):
        same(train(FusedTrainer, copy.deepcopy(model), tmp_path, data=blank, optim="sgd"), theirs)


def test_what_splits_or_does_not_shift_labels_is_refused(tmp_path, monkeypatch):
    config = transformers.BartConfig(
        vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config)
    for cls, more in ((FusedTrainer, {}), (Trainer, {"compute_loss_func": compute_loss_func()})):
        with pytest.raises(NotImplementedError, match="is an encoder-decoder, whose labels are not shifted"):
            train(cls, model, tmp_path, more=more)

    class Split(Trainer):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            split = SimpleNamespace(cp_enabled=True, sp_enabled=False)
            monkeypatch.setattr(type(self.accelerator), "parallelism_config", split)

    with pytest.raises(NotImplementedError, match="splits sequences before labels are shifted"):
        train(type("T", (FusedLossMixin, Split), {}), tiny(), tmp_path)


# ---- TrustRegionCallback --------------------------------------------------------------------------------------------------


def follow(path, reference, **options):
    region = TrustRegionCallback(reference, alpha=0.5, every=2)
    more = {"fused_loss": fl.dpo_loss, "reference": reference, "callbacks": [region]}
    return train(FusedTrainer, tiny(), path, more=more, max_steps=4, **options), region


def test_a_reference_that_follows_resumes(tmp_path):
    whole, region = follow(tmp_path / "a", near(tiny()))
    assert (region.region.steps, region.region.updates) == (4, 2)
    _, first = follow(tmp_path / "b", near(tiny()), save_strategy="steps", save_steps=3)
    start = near(tiny())
    callback = TrustRegionCallback(start, alpha=0.5, every=2)
    args = TrainingArguments(**whole.args.to_dict() | {"output_dir": str(tmp_path / "b"), "use_cpu": True})
    again = FusedTrainer(
        tiny(),
        args,
        data_collator=stacked,
        train_dataset=rows(),
        fused_loss=fl.dpo_loss,
        reference=start,
        callbacks=[callback],
    )
    again.train(resume_from_checkpoint=str(tmp_path / "b/checkpoint-3"))
    assert (callback.region.steps, callback.region.updates) == (4, 2)
    for a, b in zip(callback.reference.parameters(), region.reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_resuming_without_the_reference_is_refused(tmp_path):
    import shutil

    follow(tmp_path, near(tiny()), save_strategy="steps", save_steps=3)
    shutil.rmtree(tmp_path / "checkpoint-3/trust_region")
    reference = near(tiny())
    args = TrainingArguments(str(tmp_path), max_steps=4, use_cpu=True, report_to=[], disable_tqdm=True)
    again = FusedTrainer(
        tiny(), args, data_collator=stacked, train_dataset=rows(), fused_loss=fl.dpo_loss, reference=reference,
        callbacks=[TrustRegionCallback(reference)],
    )  # fmt: skip
    with pytest.raises(FileNotFoundError, match="reference: training goes on at step 3"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_log_probs_that_go_stale_are_refused():
    """TRL's columns, under a reference that moves."""
    args = TrainingArguments(use_cpu=True, report_to=[])
    args.precompute_ref_log_probs = True
    with pytest.raises(
        ValueError, match="^precompute_ref_log_probs: expected False, log-probs computed ahead go stale"
    ):
        TrustRegionCallback(near(tiny())).on_train_begin(args, transformers.TrainerState(), None, model=tiny())
