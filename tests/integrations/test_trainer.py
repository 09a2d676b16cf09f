"""transformers' Trainer on our losses: from logits, from hidden states, with references of every kind; TrustRegionCallback."""

from __future__ import annotations

import copy
import inspect
import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import generator_of, seeded
from ranks import Ranks

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from datasets import Dataset  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments  # noqa: E402

import fused_losses as fl  # noqa: E402
from fused_losses.core.batch import EACH  # noqa: E402
from fused_losses.integrations.data import PreferenceCollator, UnpairedCollator  # noqa: E402
from fused_losses.integrations.trainer import FusedLossMixin, TrustRegionCallback, compute_loss_func  # noqa: E402
from fused_losses.losses import FAMILY  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
VOCAB, LENGTH = 64, 8
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    initializer_range=0.3,
    pad_token_id=0,
)


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
    """The log of three steps, and the weights after them. Adam would make whole steps of gradients that are roundings."""
    arguments = dict(
        output_dir=str(path),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=0.1,
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        lr_scheduler_type="constant",
        disable_tqdm=True,
        gradient_accumulation_steps=2,
        report_to=[],
    )
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
        str(tmp_path),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        max_steps=4,
        logging_steps=4,
        eval_steps=2,
        eval_strategy="steps",
        learning_rate=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    made = FusedTrainer(tiny(), args, data_collator=stacked, train_dataset=data, eval_dataset=data, **more)
    made.train()
    log = made.state.log_history
    margins = [e["eval_rewards/margins"] for e in log if "eval_loss" in e]
    close = partial(pytest.approx, rel=1e-6, abs=1e-6)  # margins are differences of sums, and may cancel
    assert len(margins) == 2 and margins[0] == close(margins[1])  # the weights did not move
    assert sum("rewards/margins" in e for e in log) == 1
    made.predict(data.select(range(8)))
    assert made.evaluate(metric_key_prefix="test")["test_rewards/margins"] == close(margins[0])
    found = made.evaluate({"a": data, "b": data.select(range(8, 16))})
    assert found["eval_a_rewards/margins"] == close(margins[0])
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
            return fl.reference.dpo_loss(model(inputs["input_ids"]).logits, inputs["labels"], None, shift=True).loss

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
        vocab_size=VOCAB,
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


# ---- sums, not means of means: micro-batches, ranks, evaluation; and what a loss reads of a batch --------------------------


def without_a_default(entry):
    """The options that a loss needs, as its first variant has them."""
    parameters = inspect.signature(entry.call).parameters.values()
    needed = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    variant = next(iter(entry.variants.values()))
    return {name: variant[name] for name in needed if name in variant}


# Every loss of the family, and special cases whose units or numbers are counted otherwise.
CALLS = {name: partial(entry.call, **without_a_default(entry)) for name, entry in FAMILY.items()} | {
    "dpo_loss": partial(fl.dpo_loss), "MPO": partial(fl.preference_loss, loss_type=("sigmoid", "sft"), loss_weights=(1, 0.5)),
    "dapo": partial(fl.grpo_loss, loss_type="dapo", beta=0.1), "CPO-SimPO": partial(fl.simpo_loss, cpo_alpha=0.5),
    "UPO on KTO": partial(fl.upo_loss, loss_type=fl.kto_loss),
    "sampled": partial(fl.preference_matching_loss, loss_type="sampled"),
}  # fmt: skip
MADE = {
    "per sequence": lambda k: torch.randn(k), "per token": lambda k: -torch.rand(k, LENGTH - 1),
    "bool per sequence": lambda k: torch.rand(k) > 0.4, "vector per sequence": lambda k: torch.randn(k, 4),
    "vectors per sequence": lambda k: torch.randn(k, 3, 4),
    "top-k log-probs per token": lambda k: torch.randn(k, LENGTH - 1, 5).log_softmax(-1) - 0.1,
    "top-k ids per token": lambda k: torch.rand(k, LENGTH - 1, VOCAB).argsort(-1)[..., :5],
}  # fmt: skip


def entry_of(loss):
    return FAMILY.get(getattr(loss, "__name__", ""), FAMILY["preference_loss"])


def units(name, count):
    """Rows that are pairs or sequences, with all that the loss reads; each has another number of tokens. The same in every
    process and for every trainer."""
    loss, base = CALLS[name].func, CALLS[name].keywords.get("loss_type")
    torch.manual_seed(5)
    kind = entry_of(base if callable(base) else loss)
    extra = entry_of(loss).inputs | kind.inputs
    k = EACH[kind.batch]
    found = []
    for i in range(count):
        ids = torch.randint(1, VOCAB, (k, LENGTH))
        labels = ids.clone()
        for j in range(k):
            labels[j, : 1 + (2 * i + j) % 5] = -100
        found.append({"input_ids": ids, "labels": labels} | {n: MADE[what](k) for n, what in extra.items()})
    return found


def collate(batch):
    """Chosen rows first."""
    return {k: torch.stack([row[k] for row in batch]).transpose(0, 1).flatten(0, 1) for k in batch[0]}


def arguments(path, **options):
    fixed = dict(
        output_dir=str(path),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        lr_scheduler_type="constant",
        optim="sgd",
        learning_rate=0.5,
        max_grad_norm=1e9,
        logging_steps=1,
        max_steps=1,
        remove_unused_columns=False,
    )
    return TrainingArguments(**fixed | options)


def trainer_of(name, path, model=None, count=6, **options):
    more = {"fused_loss": CALLS[name]}
    if entry_of(CALLS[name].func).ref != "unused":
        more["reference"] = near(tiny())
    data = units(name, count)
    model = tiny() if model is None else model
    return FusedTrainer(
        model, arguments(path, **options), data_collator=collate, train_dataset=data, eval_dataset=data, **more
    )


def numbers(log, prefix=""):
    """Of a log, without times."""
    words = ("runtime", "per_second", "epoch", "step", "_time", "flos", "learning_rate")
    return {k.removeprefix(prefix): x for k, x in log.items() if not any(w in k for w in words)}


def assert_near(mine, theirs, what=""):
    assert mine.keys() == theirs.keys(), what
    for k, x in theirs.items():
        assert mine[k] == pytest.approx(x, rel=2e-4, abs=2e-5), f"{what} {k}"


@pytest.mark.parametrize("name", CALLS)
def test_micro_batches_are_one_batch(name, tmp_path):
    """The step and all that is logged, in micro-batches of 6, and of 4 and 2; and all that an evaluation says."""
    options = dict(per_device_train_batch_size=6, per_device_eval_batch_size=6)
    whole = trainer_of(name, tmp_path, **options)
    evaluated = numbers(whole.evaluate(), "eval_")
    whole.train()
    start = dict(tiny().named_parameters())
    assert any((p - start[n]).abs().max() > 1e-6 for n, p in whole.model.named_parameters())  # there was a step
    options = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, per_device_eval_batch_size=4)
    made = trainer_of(name, tmp_path, **options)
    assert_near(numbers(made.evaluate(), "eval_"), evaluated, "evaluation")
    made.train()
    assert_near(*(numbers(t.state.log_history[-2]) for t in (made, whole)), "training")
    for (n, p), q in zip(made.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=lambda m, n=n: f"{n}: {m}")


def test_the_loss_of_an_evaluation_is_that_of_its_tokens(tmp_path):
    """Where transformers has the mean of batch means."""
    made = trainer_of("cross_entropy_loss", tmp_path, per_device_eval_batch_size=4)
    found = made.evaluate()
    batch = collate(units("cross_entropy_loss", 6))
    truth = fl.reference.cross_entropy_loss(made.model(batch["input_ids"]).logits.double(), batch["labels"], shift=True)
    assert found["eval_loss"] == pytest.approx(truth.loss.item(), rel=1e-5)
    assert found["eval_logps"] == pytest.approx(-found["eval_loss"], rel=1e-5)


def test_counts_add_up_and_absent_classes_are_left_out(tmp_path):
    data = units("kto_loss", 5)
    for row, good in zip(data, (True, True, True, True, False), strict=True):
        row["desirable"] = torch.tensor([good])
    options = dict(data_collator=collate, eval_dataset=data, fused_loss=fl.kto_loss, reference=near(tiny()))
    found = FusedTrainer(tiny(), arguments(tmp_path, per_device_eval_batch_size=2), **options).evaluate()
    assert (found["eval_count/chosen"], found["eval_count/rejected"]) == (4, 1)
    assert found["eval_rewards/margins"] == pytest.approx(found["eval_rewards/chosen"] - found["eval_rewards/rejected"])
    options["eval_dataset"] = data[:4]
    alone = FusedTrainer(tiny(), arguments(tmp_path, per_device_eval_batch_size=2), **options).evaluate()
    assert "eval_rewards/chosen" in alone and not {"eval_rewards/rejected", "eval_rewards/margins"} & alone.keys()


def test_metrics_that_nobody_logs_take_no_memory(tmp_path):
    held, pairs = [], []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *args, **options):
            terms = made.fused_metrics["train"].terms
            held.append(sum(x.numel() for each in terms.values() for x in each))
            pairs.append(terms["rewards/margins"][0][1].item())

    made = trainer_of("dpo_loss", tmp_path, logging_strategy="no", max_steps=5, per_device_train_batch_size=2)
    made.add_callback(Watch())
    made.train()
    assert pairs == [2, 4, 6, 8, 10] and len(set(held)) == 1


def own_loss(p, labels, ref, shift):
    """A user's, whose metrics are means alone."""
    out = fl.dpo_loss(p, labels, ref, shift=shift)
    return type(out)(out.loss, {"margin": out.metrics["rewards/margins"]}, out.stats)


def test_metrics_of_a_loss_without_parts_are_weighed_by_rows(tmp_path):
    made = trainer_of("dpo_loss", tmp_path, per_device_eval_batch_size=4)
    wanted = made.evaluate()["eval_rewards/margins"]
    options = dict(data_collator=collate, eval_dataset=units("dpo_loss", 6), reference=near(tiny()))
    args = arguments(tmp_path, per_device_eval_batch_size=4)
    made = FusedTrainer(tiny(), args, fused_loss=own_loss, per_token=False, **options)
    assert made.evaluate()["eval_margin"] == pytest.approx(wanted, rel=1e-4)


def test_a_loss_that_returns_a_tensor_gets_words(tmp_path):
    options = dict(data_collator=collate, eval_dataset=units("dpo_loss", 6), reference=near(tiny()))
    bare = lambda p, labels, ref, shift: fl.dpo_loss(p, labels, ref, shift=shift).loss  # noqa: E731
    made = FusedTrainer(tiny(), arguments(tmp_path), fused_loss=bare, per_token=False, **options)
    with pytest.raises(TypeError, match="fused_loss: expected fl.LossOutput from <lambda>, got Tensor; return"):
        made.evaluate()


def test_predictions_of_pairs_have_all_rows(tmp_path):
    made = trainer_of("dpo_loss", tmp_path, count=7, per_device_eval_batch_size=3)
    found = made.predict(made.eval_dataset)
    batches = [collate(made.eval_dataset[i : i + 3]) for i in (0, 3, 6)]
    assert found.predictions[0].shape == (14, LENGTH - 1)
    assert (found.label_ids == torch.cat([b["labels"] for b in batches]).numpy()).all()
    assert "test_rewards/margins" in found.metrics


COPIES = Dataset.from_list([rows()[0]] * 4)


def aux_alone(cls, path, size, steps, data=COPIES, **options):
    """What the auxiliary loss alone does to the weights: with it less without it."""
    found = []
    for coefficient in (0.1, 0.0):
        more = {k: f(coefficient) for k, f in options.items()}
        args = arguments(path, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        made = cls(mixture(), args, data_collator=stacked, train_dataset=data, **more)
        made.train()
        found.append([p.detach() for p in made.model.parameters()])
    return torch.cat([(a - b).flatten() for a, b in zip(*found, strict=True)])


KINDS = {
    "tokens": (FusedTrainer, {"aux_loss_coef": lambda c: c}),
    "logits": (Trainer, {"compute_loss_func": lambda c: compute_loss_func(aux_loss_coef=c)}),
    "pairs": (FusedTrainer, {"aux_loss_coef": lambda c: c, "fused_loss": lambda c: partial(fl.dpo_loss, ref=None)}),
    "own": (
        FusedTrainer,
        {
            "aux_loss_coef": lambda c: c, "per_token": lambda c: False,
            "fused_loss": lambda c: lambda p, y, shift: fl.dpo_loss(p, y, None, shift=shift),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_an_auxiliary_loss_counts_once_in_micro_batches(kind, tmp_path):
    """Four copies of a row have the same auxiliary loss in one batch, in two and in four."""
    cls, options = KINDS[kind]
    one = aux_alone(cls, tmp_path, 4, 1, **options)
    assert one.norm() > 1e-3
    for size, steps in ((2, 2), (1, 4)) if kind in ("tokens", "logits") else ((2, 2),):
        torch.testing.assert_close(aux_alone(cls, tmp_path, size, steps, **options), one, rtol=1e-3, atol=2e-6)


def check_two_ranks(rank, group, path, truth):
    """Against one process: the share of the auxiliary loss, steps of uneven micro-batches, evaluation of 7 rows by 2."""
    import warnings

    from accelerate.state import AcceleratorState, GradientState, PartialState

    warnings.filterwarnings("ignore")
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }

    def fresh():
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()

    for kind in ("tokens", "logits", "pairs"):
        cls, options = KINDS[kind]
        for size, steps in ((2, 1), (1, 2)) if kind != "pairs" else ((2, 1),):
            fresh()
            found = aux_alone(cls, path, size, steps, **options)
            torch.testing.assert_close(found, truth[kind], rtol=1e-3, atol=2e-6, msg=lambda m, k=kind: f"{k}: {m}")
    for name in RANKED:
        fresh()
        made = trainer_of(name, path, count=7, per_device_eval_batch_size=2)
        assert made.accelerator.num_processes == 2
        assert_near(numbers(made.evaluate(), "eval_"), truth[name], name)
        found = made.predict(made.eval_dataset).predictions[0]
        assert len(found) == truth[name, "rows"], (name, len(found))
    for name in ("cpo_loss", "cross_entropy_loss"):
        fresh()
        made = trainer_of(name, path, count=4, per_device_train_batch_size=1, gradient_accumulation_steps=2)
        made.train()
        for p, q in zip(made.model.parameters(), truth[name, "weights"], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


RANKED = ("dpo_loss", "kto_loss", "cross_entropy_loss")


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_two_ranks_are_one_batch(tmp_path):
    truth = {
        kind: aux_alone(KINDS[kind][0], tmp_path, 4, 1, **KINDS[kind][1]) for kind in ("tokens", "logits", "pairs")
    }
    for name in RANKED:
        made = trainer_of(name, tmp_path, count=7, per_device_eval_batch_size=7)
        truth[name] = numbers(made.evaluate(), "eval_")
        truth[name, "rows"] = len(made.predict(made.eval_dataset).predictions[0])
    for name in ("cpo_loss", "cross_entropy_loss"):
        made = trainer_of(name, tmp_path, count=4, per_device_train_batch_size=4)
        made.train()
        truth[name, "weights"] = [p.detach() for p in made.model.parameters()]
    two = Ranks(2)
    try:
        two.run(2, check_two_ranks, tmp_path, truth, timeout=500.0)
    finally:
        two.kill()


def tokenised(paired, count=6):
    torch.manual_seed(8)
    ids = lambda n: torch.randint(1, VOCAB, (n,)).tolist()  # noqa: E731
    names = ("chosen_ids", "rejected_ids") if paired else ("completion_ids",)
    made = [
        {"prompt_ids": ids(2 + i % 3), **{n: ids(2 + (i + j) % 4) for j, n in enumerate(names)}} for i in range(count)
    ]
    return [row if paired else row | {"label": i % 3 > 0} for i, row in enumerate(made)]


COLLATED = {
    "dpo": (True, {}, fl.dpo_loss), "dpo, saved": (True, {}, fl.dpo_loss), "orpo": (True, {}, fl.orpo_loss),
    "tdpo": (True, {}, fl.tdpo_loss), "kto": (False, {}, fl.kto_loss), "kto, baseline": (False, {"kl": True}, fl.kto_loss),
    "bco": (False, {}, fl.bco_loss), "sft": (True, {}, fl.cross_entropy_loss),
}  # fmt: skip


@pytest.mark.parametrize("name", COLLATED)
def test_collators_of_this_library_padded_and_packed(name, tmp_path):
    """Their columns are kept, in micro-batches too; and packed batches give the loss of padded ones."""
    paired, options, loss = COLLATED[name]
    collator_of, data, found = PreferenceCollator if paired else UnpairedCollator, tokenised(paired), []
    if "saved" in name:
        data = [row | {"ref_chosen_logps": -3.0 - i, "ref_rejected_logps": -4.0} for i, row in enumerate(data)]
    more = {} if "saved" in name or loss in (fl.orpo_loss, fl.cross_entropy_loss) else {"reference": near(tiny())}
    for packed in (False, True):
        args = arguments(
            tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=2, remove_unused_columns=True
        )
        collator = collator_of(0, packed=packed, **options)
        given = {"data_collator": collator, "train_dataset": Dataset.from_list(data), "eval_dataset": data, **more}
        made = FusedTrainer(tiny(), args, fused_loss=loss, **given)
        made.train()
        found.append((numbers(made.state.log_history[-2]), numbers(made.evaluate())))
    assert_near(found[1][0], found[0][0], "training")
    assert_near(found[1][1], found[0][1], "evaluation")
    if name == "kto, baseline":
        assert found[0][0]["kl"] >= 0
        batch = collator_of(0, **options)(data[:3])
        mixed, model, reference = batch["kl"], tiny(), more["reference"]
        both = [m(mixed["input_ids"], attention_mask=mixed["attention_mask"]).logits for m in (model, reference)]
        truth = fl.reference.kto_baseline(both[0].detach(), mixed["labels"], both[1].detach(), shift=True)
        made = FusedTrainer(model, args, fused_loss=loss, **given)
        made.model.train()
        made.compute_loss(made.model, batch)
        assert made.fused_metrics["train"].values(made.accelerator, 1)["kl"] == pytest.approx(
            truth.item(), rel=1e-4, abs=1e-6
        )


def sequences(**columns):
    """rows() with more columns, tensors [16, ...]."""
    data = rows()
    for name, x in columns.items():
        data = data.add_column(name, x.tolist())
    return data


UNREAD = [  # what is given, columns, the batch comes from a collator of the user's, and words
    ({"fused_loss": fl.kto_loss, "reference": "model"}, {}, False, r"train_dataset: kto_loss needs desirable in the batches"),
    ({"fused_loss": fl.grpo_loss, "reference": "model"}, {}, False, "train_dataset: grpo_loss needs advantages"),
    ({"fused_loss": partial(fl.upo_loss, loss_type=fl.kto_loss), "reference": "model"}, {}, False,
     "needs advantages, desirable"),
    ({"fused_loss": fl.topk_distillation_loss}, {}, False, "needs topk_ids, topk_logps"),
    ({"fused_loss": fl.kto_loss, "reference": "model"}, {}, True, "desirable: kto_loss needs it in the batch"),
    ({"fused_loss": fl.cross_entropy_loss}, {"weight": torch.ones(16)}, True, "weight: in the batch, but neither the model"),
    ({"fused_loss": fl.cross_entropy_loss}, {"ref_logps": torch.ones(16)}, True, "ref_logps: in the batch, but cross_entropy"),
    ({"fused_loss": partial(fl.dpo_loss, betta=0.1), "reference": "model"}, {}, True, "dpo_loss has no option 'betta'"),
    ({"fused_loss": partial(fl.kto_loss, deserable=1), "reference": "model"}, {}, True, "kto_loss has no option 'deserable'"),
    ({"fused_loss": partial(fl.dpo_loss, reduction="sum")}, {}, True, "reduction: expected 'mean'"),
    ({"fused_loss": partial(fl.dpo_loss, num_items=3)}, {}, True, "num_items: expected it unbound"),
    ({"fused_loss": partial(fl.dpo_loss, ref=None), "reference": "model"}, {}, True, "ref is bound in fused_loss"),
    (
        {"fused_loss": partial(fl.kto_loss, desirable=torch.ones(4, dtype=torch.bool)), "reference": "model"},
        {"desirable": torch.ones(16, dtype=torch.bool)}, True, "desirable: is bound in fused_loss, and in the batch",
    ),
    ({"fused_loss": fl.grpo_loss}, {"advantages": torch.ones(16)}, True, r"reference: expected one for grpo_loss.*ref=None"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(UNREAD)))
def test_what_nobody_reads_and_what_is_missing(case, tmp_path):
    more, columns, own, words = UNREAD[case]
    more = more | ({"reference": near(tiny())} if "reference" in more else {})
    given = {"data_collator": stacked} if own else {}
    with pytest.raises(ValueError, match=words):
        FusedTrainer(tiny(), arguments(tmp_path), train_dataset=sequences(**columns), **given, **more).train()


def test_columns_of_the_loss_are_kept(tmp_path):
    """With transformers' own collator, and its removal of columns that the model does not take."""
    data = sequences(desirable=torch.arange(16) % 3 > 0, nobodys=torch.ones(16))
    args = arguments(tmp_path, remove_unused_columns=True)
    made = FusedTrainer(tiny(), args, train_dataset=data, fused_loss=fl.kto_loss, reference=near(tiny()))
    made.train()
    assert made.state.log_history[0]["count/chosen"] > 0


def test_labels_that_are_shifted_already(tmp_path):
    """As collators for packed rows make them: labels alone would cross from one sequence to the next."""
    data = rows()
    shifted = [[*row[1:4], -100, *row[5:], -100] for row in data["labels"]]
    own = data.add_column("shift_labels", shifted)
    labels = [[*row[:4], -100, *row[5:]] for row in data["labels"]]
    plain = data.remove_columns("labels").add_column("labels", labels)
    same(train(FusedTrainer, tiny(), tmp_path, data=own), train(FusedTrainer, tiny(), tmp_path, data=plain))


def test_another_adapter_is_the_reference(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(2)
        made = peft.get_peft_model(tiny(attention_dropout=0.0), config)
        torch.manual_seed(9)
        made.add_adapter("ref", config)
        return made

    def whole():
        """The same distribution, in a model of its own."""
        made = adapted()
        made.set_adapter("ref")
        return made.merge_and_unload()

    for head in (False, True):
        targets = ["q_proj"] + ["lm_head"] * head
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        for loss in (fl.dpo_loss, fl.tdpo_loss):
            mine = train(FusedTrainer, adapted(), tmp_path, more={"fused_loss": loss, "reference": "ref"})
            theirs = train(FusedTrainer, adapted(), tmp_path, more={"fused_loss": loss, "reference": whole()})
            same(mine, theirs)
        model = mine.accelerator.unwrap_model(mine.model)
        assert model.active_adapters == ["default"]
        learns = {n for n, p in model.named_parameters() if p.requires_grad}
        assert learns and all(".default." in n for n in learns)
        before = dict(adapted().named_parameters())
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if ".ref." in n)
    for name, words in (
        ("other", r"reference: expected the name of an adapter, got 'other'; the model has 'default', 'ref'"),
        ("default", "reference: 'default' is the adapter that is trained"),
    ):
        with pytest.raises(ValueError, match=words):
            train(FusedTrainer, adapted(), tmp_path, more={"fused_loss": fl.dpo_loss, "reference": name})


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
        tiny(),
        args,
        data_collator=stacked,
        train_dataset=rows(),
        fused_loss=fl.dpo_loss,
        reference=reference,
        callbacks=[TrustRegionCallback(reference)],
    )
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
