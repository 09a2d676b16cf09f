"""Our subclasses of TRL's trainers beside TRL's own: the same seed, data and model give the same losses and logged metrics."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import generator_of, in_pairs, seed_of, seeded

pytest.importorskip("trl")
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from ranks import Ranks  # noqa: E402
from transformers import LlamaConfig, MixtralForCausalLM  # noqa: E402
from trl_setup import SIZES, STEPS, new_tokenizer, rows, run, same, tiny  # noqa: E402

import fused_losses as fl  # noqa: E402
from fused_losses.integrations import trl_trainers as ours  # noqa: E402
from fused_losses.integrations.trainer import TrustRegionCallback  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

LINKED = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"]
OTHERS = ["nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"]
LINKS = {"reverse_kl": 0.5, "forward_kl": 0.5, "js_divergence": 0.5, "alpha_divergence": 0.7}
COMBINATIONS = [(t, k) for t in LINKED for k in LINKS] + [(t, "reverse_kl") for t in OTHERS]
MODES = ["full", "lora", "precomputed"]
SMOOTHED = {"exo_pair", "robust", "aot", "aot_unpaired"}


@pytest.fixture(scope="module")
def tokenizer():
    return new_tokenizer()


def build(cls, config, tokenizer, path, mode="full", data=None, model=None, evaluated=None, **options):
    """A trainer of TRL's or ours with the same everything."""
    arguments = dict(
        output_dir=str(path),
        per_device_train_batch_size=2,
        max_steps=STEPS,
        learning_rate=3e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        seed=seed_of(3),
        max_length=48,
        disable_tqdm=True,
        lr_scheduler_type="constant",
        bf16=False,
    )
    policy = tiny(tokenizer) if model is None else model()
    more = {} if evaluated is None else {"eval_dataset": evaluated}
    if mode == "lora":
        peft = pytest.importorskip("peft")
        more["peft_config"] = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    else:
        more["ref_model"] = copy.deepcopy(policy)
        with torch.no_grad():
            for p in more["ref_model"].parameters():
                p.add_(0.02 * torch.randn_like(p))
    if mode == "precomputed":
        options["precompute_ref_log_probs"] = True
    args = config(**arguments | options)
    made = cls(policy, args=args, train_dataset=rows() if data is None else data, processing_class=tokenizer, **more)
    if mode == "lora":  # near its base, for TRL's discopop is inf * 0 where an f-divergence makes margins large
        with torch.no_grad():
            for name, p in made.model.named_parameters():
                if "lora_B" in name:
                    p.mul_(0.1)
    return made


@pytest.fixture(scope="module", params=MODES)
def dpo(request, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("dpo")
    made = [
        build(cls, trl.DPOConfig, tokenizer, path / n, request.param, use_weighting=True)
        for n, cls in (("theirs", trl.DPOTrainer), ("ours", ours.DPOTrainer))
    ]
    state = {k: x.clone() for k, x in made[0].model.state_dict().items()}
    return made, state


# How a model is trained and where its reference comes from has no part in a formula: every two of the three meet.
DPO = in_pairs(MODES, [*LINKED, *OTHERS], LINKS, allowed=lambda mode, loss, link: (loss, link) in COMBINATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("dpo,loss,link", DPO, indirect=["dpo"])
def test_dpo(dpo, loss, link):
    made, state = dpo
    settings = dict(
        loss_types=[loss],
        loss_weights=[1.0],
        f_divergence_type=link,
        f_alpha_divergence_coef=LINKS[link],
        beta=0.3,
        label_smoothing=0.1 if loss in SMOOTHED else 0.0,
        use_weighting=False,
    )
    theirs, mine = (run(t, state, **settings) for t in made)
    assert {"loss", "rewards/margins", "logits/chosen", "entropy", "mean_token_accuracy", "num_tokens"} <= mine[
        0
    ].keys()
    # the slope of DiscoPOP grows as e^-m: after a step, roundings of float32 have grown by it, in TRL's numbers as in ours
    same(mine, theirs, 1e-3 if loss == "discopop" else 2e-4)


MORE = {
    "several": dict(loss_types=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    "weights of WPO": dict(loss_types=["ipo"], use_weighting=True),
    "LD-DPO": dict(loss_types=["sigmoid"], ld_alpha=0.4),
    "alpha at its end": dict(loss_types=["hinge"], f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_dpo_with(name, dpo):
    made, state = dpo
    if name == "LD-DPO" and made[0].precompute_ref_logps:
        pytest.skip("the columns are of another ld_alpha: test_precomputed_columns_of_ld_dpo")
    settings = dict(
        loss_weights=[1.0], f_divergence_type="reverse_kl", beta=0.3, label_smoothing=0.0, use_weighting=False
    )
    settings |= dict(ld_alpha=None) | MORE[name]
    theirs, mine = (run(t, state, **settings) for t in made)
    for t in made:
        t.ld_alpha = None
    same(mine, theirs)


def pair(ours_, theirs_, config, tokenizer, path, **options):
    made = [build(cls, config, tokenizer, path / n, **options) for n, cls in (("theirs", theirs_), ("ours", ours_))]
    return made, {k: x.clone() for k, x in made[0].model.state_dict().items()}


def compare(made, state, **settings):
    theirs, mine = (run(t, state, **settings) for t in made)
    same(mine, theirs)
    return mine


def test_precomputed_columns_of_ld_dpo(tokenizer, tmp_path):
    compare(
        *pair(ours.DPOTrainer, trl.DPOTrainer, trl.DPOConfig, tokenizer, tmp_path, mode="precomputed", ld_alpha=0.4)
    )


def test_columns_precomputed_by_ours_equal_those_by_trl(tokenizer, tmp_path):
    (theirs, mine), _ = pair(
        ours.DPOTrainer, trl.DPOTrainer, trl.DPOConfig, tokenizer, tmp_path, mode="precomputed", ld_alpha=0.3
    )
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert mine.train_dataset[name] == pytest.approx(theirs.train_dataset[name], rel=1e-5)


TRAINING = {
    "accumulation": dict(gradient_accumulation_steps=2),
    "checkpoints": dict(gradient_checkpointing=True),
    "reentrant checkpoints": dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    ),
    "evaluation": dict(eval_strategy="steps", eval_steps=1, prediction_loss_only=True),
    "cut": dict(max_length=20, truncation_mode="keep_end"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_dpo_trained_with(name, tokenizer, tmp_path):
    made = []
    for n, cls in (("theirs", trl.DPOTrainer), ("ours", ours.DPOTrainer)):
        evaluated = rows() if name == "evaluation" else None
        made.append(build(cls, trl.DPOConfig, tokenizer, tmp_path / n, evaluated=evaluated, **TRAINING[name]))
    found = compare(made, {k: x.clone() for k, x in made[0].model.state_dict().items()})
    assert name != "evaluation" or any("eval_rewards/margins" in entry for entry in found)


def test_lengths_without_a_prompt(tokenizer, tmp_path):
    # the loss is that of the tokens that have a log-prob, however many others there are
    made = build(ours.DPOTrainer, trl.DPOConfig, tokenizer, tmp_path, loss_type=["ipo"])
    ids = torch.randint(1, 200, (2, 7), generator=generator_of(0))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        p, q = (fl.token_stats(m(ids).logits, ids, shift=True).logps for m in (made.model, made.ref_model))
        found = made.compute_loss(made.model, {"input_ids": ids, "attention_mask": mask, "completion_mask": mask})
    chosen, rejected = (p - q).mean(1)
    torch.testing.assert_close(found, (chosen - rejected - 1 / (2 * made.beta)) ** 2, rtol=1e-4, atol=1e-4)


def test_dpo_in_bfloat16(tokenizer, tmp_path):
    """Autocast, as TRL has it by default: products in bfloat16, so only roughly the same."""
    made, state = pair(ours.DPOTrainer, trl.DPOTrainer, trl.DPOConfig, tokenizer, tmp_path, bf16=True)
    theirs, mine = (run(t, state) for t in made)
    for a, b in zip(mine[:STEPS], theirs[:STEPS], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=0.03) and a["logps/chosen"] == pytest.approx(
            b["logps/chosen"], rel=0.01
        )


def test_dpo_of_a_mixture_keeps_its_auxiliary_loss(tokenizer, tmp_path):
    made = []
    for n, cls in (("theirs", trl.DPOTrainer), ("ours", ours.DPOTrainer)):
        options = dict(num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5)
        model = lambda options=options: tiny(tokenizer, cls=MixtralForCausalLM, **options)  # noqa: E731
        made.append(build(cls, trl.DPOConfig, tokenizer, tmp_path / n, model=model))
    found = compare(made, {k: x.clone() for k, x in made[0].model.state_dict().items()})
    assert found[0]["aux_loss"] > 0


def test_kto_of_a_mixture_keeps_its_auxiliary_loss(tokenizer, tmp_path):
    options = dict(num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5)
    model = lambda: tiny(tokenizer, cls=MixtralForCausalLM, **options)  # noqa: E731
    given = dict(model=model, data=rows("unpaired"))
    found = compare(*pair(ours.KTOTrainer, trl.KTOTrainer, trl.KTOConfig, tokenizer, tmp_path, **given))
    assert found[0]["aux_loss"] > 0


def llava(tokenizer):
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    seeded(1)
    text = LlamaConfig(vocab_size=len(tokenizer), **SIZES)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1)
    )


IMAGE = 299


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_images_reach_the_policy_and_the_reference(kind, tokenizer, tmp_path):
    """The losses of a batch as a processor makes it, and of the same with other images."""
    ids = torch.randint(1, 200, (4, 10), generator=generator_of(0))
    ids[:, :4] = IMAGE
    mask = torch.ones_like(ids)
    mask[:, :6] = 0
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    if kind == "kto":
        other = torch.cat([ids[:, :6], ids[:, 6:].roll(1, 0)], 1)
        inputs |= {
            "label": torch.tensor([True, False, True, False]),
            "KL_input_ids": other,
            "KL_attention_mask": inputs["attention_mask"],
            "KL_completion_mask": mask,
        }
    names = {"dpo": "DPO", "kto": "KTO"}[kind]
    config, data = getattr(trl, names + "Config"), rows("pairs" if kind == "dpo" else "unpaired")
    classes = [getattr(m, names + "Trainer") for m in (ours, trl)]
    (theirs, mine), _ = pair(*classes, config, tokenizer, tmp_path, model=lambda: llava(tokenizer), data=data)
    found = []
    for pixels in torch.randn(2, 4, 3, 8, 8):
        batch = inputs | {"pixel_values": pixels}
        a, b = (t.compute_loss(t.model, dict(batch)) for t in (mine, theirs))
        assert a.item() == pytest.approx(b.item(), rel=1e-4)
        found.append(a.item())
    assert abs(found[0] - found[1]) > 1e-5


def test_an_adapter_that_is_trained_further(tokenizer, tmp_path):
    """The reference is the adapter that training began with, as TRL keeps it under "ref"."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    made = []
    for n, cls in (("theirs", trl.DPOTrainer), ("ours", ours.DPOTrainer)):
        policy = tiny(tokenizer)
        seeded(5)
        model = peft.get_peft_model(policy, config)
        args = trl.DPOConfig(
            str(tmp_path / n),
            max_steps=STEPS,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=2,
            learning_rate=3e-3,
            save_strategy="no",
        )
        made.append(cls(model, args=args, train_dataset=rows(), processing_class=tokenizer))
    found = compare(made, {k: x.clone() for k, x in made[0].model.state_dict().items()})
    assert found[0]["rewards/margins"] == pytest.approx(0, abs=1e-5) != found[1]["rewards/margins"]


def test_a_reference_that_follows(tokenizer, tmp_path):
    """sync_ref_model: TRL's callback and fl.TrustRegion give the same reference."""
    options = dict(sync_ref_model=True, ref_model_mixup_alpha=0.6, ref_model_sync_steps=1, max_steps=3)
    made, state = pair(ours.DPOTrainer, trl.DPOTrainer, trl.DPOConfig, tokenizer, tmp_path, **options)
    start = copy.deepcopy(made[0].ref_model.state_dict())
    compare(made, state)
    for (name, a), b in zip(made[0].ref_model.named_parameters(), made[1].ref_model.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
        assert not torch.equal(a, start[name])
    (region,) = (c.region for c in made[1].callback_handler.callbacks if hasattr(c, "region"))
    assert (region.steps, region.updates, region.alpha) == (3, 3, 0.6)


def test_a_reference_that_follows_kto(tokenizer, tmp_path):
    options = dict(sync_ref_model=True, ref_model_mixup_alpha=0.6, ref_model_sync_steps=1, data=rows("unpaired"))
    made, state = pair(ours.KTOTrainer, trl.KTOTrainer, trl.KTOConfig, tokenizer, tmp_path, **options)
    compare(made, state)
    for a, b in zip(made[0].ref_model.parameters(), made[1].ref_model.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
    (region,) = (c.region for c in made[1].callback_handler.callbacks if hasattr(c, "region"))
    assert region.updates == STEPS


@pytest.fixture(scope="module", params=["full", "lora", "precomputed"])
def kto(request, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("kto")
    return pair(
        ours.KTOTrainer, trl.KTOTrainer, trl.KTOConfig, tokenizer, path, mode=request.param, data=rows("unpaired")
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, dict(desirable_weight=1.3, undesirable_weight=0.7)], ids=str)
def test_kto(kto, options):
    found = compare(*kto, beta=0.4, loss_type="kto", **options)
    assert {"kl", "rewards/margins", "logits/chosen", "entropy", "num_tokens"} <= found[0].keys()


def test_apo_zero_unpaired(tokenizer, tmp_path):
    options = dict(loss_type="apo_zero_unpaired", data=rows("unpaired"), per_device_train_batch_size=1, max_steps=3)
    found = compare(*pair(ours.KTOTrainer, trl.KTOTrainer, trl.KTOConfig, tokenizer, tmp_path, **options))
    assert any("rewards/chosen" in x and "rewards/rejected" not in x for x in found)  # batches of one kind alone


def messages():
    return Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["chosen"]}]}
            for r in rows()
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gkd(tokenizer, tmp_path, beta):
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    made = []
    for n, cls in (("theirs", GKDTrainer), ("ours", ours.GKDTrainer)):
        config = GKDConfig(
            str(tmp_path / n),
            max_steps=STEPS,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            lmbda=0.0,
            per_device_train_batch_size=2,
            learning_rate=3e-3,
            save_strategy="no",
            beta=beta,
            max_length=64,
            gradient_accumulation_steps=2,
        )
        teacher = tiny(tokenizer, seed=7, hidden_size=24)
        made.append(cls(tiny(tokenizer), teacher, args=config, train_dataset=messages(), processing_class=tokenizer))
    compare(made, {k: x.clone() for k, x in made[0].model.state_dict().items()})


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_distillation_on_the_students_own_tokens(tokenizer, tmp_path, beta):
    """Of a wider teacher; completions are sampled, so all steps are on the first weights."""
    made = []
    for n, cls in (("theirs", trl.DistillationTrainer), ("ours", ours.DistillationTrainer)):
        config = trl.DistillationConfig(
            str(tmp_path / n),
            max_steps=STEPS,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            beta=beta,
            per_device_train_batch_size=2,
            learning_rate=1e-12,
            save_strategy="no",
            max_completion_length=8,
            temperature=0.8,
        )
        teacher = tiny(tokenizer, seed=7, hidden_size=24)
        prompts = rows().select_columns(["prompt"])
        made.append(cls(tiny(tokenizer), teacher, args=config, train_dataset=prompts, processing_class=tokenizer))
    found = compare(made, {k: x.clone() for k, x in made[0].model.state_dict().items()})
    assert {"entropy", "grad_norm"} <= found[0].keys()


def check_ranks(rank, group, path):
    """DDP, with everything that accelerate does about it. (For FSDP2 it wants an accelerator: see tests/nn/test_engines.py.)"""
    import os
    import warnings

    from accelerate.state import AcceleratorState, PartialState

    warnings.filterwarnings("ignore")
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }
    logs = []
    for cls in (trl.DPOTrainer, ours.DPOTrainer):
        AcceleratorState._reset_state()
        PartialState._reset_state()
        options = dict(sync_ref_model=True, ref_model_sync_steps=1, gradient_checkpointing=False)
        made = build(cls, trl.DPOConfig, new_tokenizer(), path / cls.__module__, **options)
        made.train()
        assert made.accelerator.num_processes == 2
        assert isinstance(made.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        ignored = ("per_second", "runtime")
        logs.append([{k: x for k, x in e.items() if not any(i in k for i in ignored)} for e in made.state.log_history])
    same(*logs)


@pytest.mark.parametrize("name", ours.__all__)
def test_split_sequences_are_refused(name, monkeypatch):
    def init(self):
        self.accelerator = SimpleNamespace(parallelism_config=SimpleNamespace(cp_enabled=False, sp_enabled=True))

    cls = getattr(ours, name)
    monkeypatch.setattr(next(c for c in cls.__mro__ if c.__module__.startswith("trl.")), "__init__", init)
    with pytest.raises(NotImplementedError, match="parallelism_config: the Trainer splits sequences before labels"):
        cls()


@pytest.mark.slow
def test_two_ranks(tmp_path):
    two = Ranks(2)
    try:
        two.run(2, check_ranks, tmp_path)
    finally:
        two.kill()


REFUSED = [  # when the trainer is made, where TRL finds out in the first step or never
    (dict(loss_type=["sigmoid", "dpo"]), "loss_type: unknown name 'dpo'; the loss of DPO is 'sigmoid'"),
    (dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0]), "`loss_weights` must have the same length as `loss_type`"),
    (dict(loss_type=["hinge"], label_smoothing=0.1), "label_smoothing: read by aot, .*; got loss_type hinge"),
    (dict(loss_type=["ipo"], label_smoothing=0.1), "label_smoothing: read by aot, .*; got loss_type ipo"),
    (dict(loss_type=["robust"], label_smoothing=0.5), r"label_smoothing: expected a number in \[0, 0.5\), got 0.5"),
    (dict(f_divergence_type="kl"), "f_divergence_type: expected one of reverse_kl, .*, got 'kl'"),
    (dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=2.0), "^f_alpha_divergence_coef: expected a number"),
    (dict(loss_type=["apo_zero"], f_divergence_type="js_divergence"), "f_divergence_type='js_divergence'` is only supported"),
    (dict(ld_alpha=1.5), r"ld_alpha: expected a number in \[0, 1\] or None, got 1.5"),
    (dict(beta=0.0), "beta: expected a finite number > 0, got 0.0"),
    (dict(loss_type=["discopop"], discopop_tau=0.0), "discopop_tau: expected a finite number > 0, got 0.0"),
    (dict(loss_type=["aot"], use_weighting=True), "WPO-style weighting is not implemented for 'aot'"),
    (dict(sync_ref_model=True, mode="precomputed"), "any precomputed reference log-probs stale"),
    (dict(ref_model_mixup_alpha=1.5, sync_ref_model=True), None),  # of the callback, when training begins
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_options_are_looked_at_when_a_trainer_is_made(case, tokenizer, tmp_path):
    options, words = REFUSED[case]
    if words is None:
        made = build(ours.DPOTrainer, trl.DPOConfig, tokenizer, tmp_path, **options)
        with pytest.raises(ValueError, match=r"alpha: expected a number in \(0, 1\], got 1.5"):
            made.train()
        return
    with pytest.raises((ValueError, NotImplementedError), match=words):
        build(ours.DPOTrainer, trl.DPOConfig, tokenizer, tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(loss_type="bco"), "loss_type: unknown name 'bco'; known: kto, apo_zero_unpaired"),
        (dict(beta=-1.0), "beta: expected a finite number > 0, got -1.0"),
        (dict(undesirable_weight=float("nan")), "undesirable_weight: expected a finite number > 0, got nan"),
        (dict(mode="lora", sync_ref_model=True), "sync_ref_model=True` while using a PEFT model"),
    ],
)
def test_options_of_kto(options, words, tokenizer, tmp_path):
    with pytest.raises((ValueError, NotImplementedError), match=words):
        build(ours.KTOTrainer, trl.KTOConfig, tokenizer, tmp_path, data=rows("unpaired"), **options)


@pytest.mark.parametrize("kind", ["gkd", "distillation"])
def test_options_of_distillation(kind, tokenizer, tmp_path):
    from trl.experimental.gkd import GKDConfig

    cls, config = (ours.GKDTrainer, GKDConfig) if kind == "gkd" else (ours.DistillationTrainer, trl.DistillationConfig)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    data = messages() if kind == "gkd" else rows().select_columns(["prompt"])

    def made(student, **options):
        args = config(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, bf16=False, **options)
        return cls(student, tiny(tokenizer, seed=7), args=args, train_dataset=data, processing_class=tokenizer)

    experts = dict(num_local_experts=4, num_experts_per_tok=2)
    mixture = tiny(tokenizer, cls=MixtralForCausalLM, **experts, output_router_logits=True)
    with pytest.raises(ValueError, match="^output_router_logits: expected False in the student's config"):
        made(mixture)
    none = {"router_aux_loss_coef": 0.0} if kind == "gkd" else {}
    made(tiny(tokenizer, cls=MixtralForCausalLM, **experts), **none)
    with pytest.raises(ValueError, match="beta must be in"):
        made(tiny(tokenizer), beta=1.5)


def test_no_auxiliary_loss_where_one_is_weighted():
    trainer = ours.DPOTrainer.__new__(ours.DPOTrainer)
    trainer.aux_loss_enabled, trainer.router_aux_loss_coef = True, 0.1
    with pytest.raises(ValueError, match="router_aux_loss_coef: the model returned no auxiliary loss; set it to 0.0"):
        trainer._add_aux(torch.zeros(()), None, {})


def test_a_callback_that_moves_a_precomputed_reference_is_refused(tokenizer, tmp_path):
    made = build(ours.DPOTrainer, trl.DPOConfig, tokenizer, tmp_path, mode="precomputed")
    made.add_callback(TrustRegionCallback(made.ref_model, every=1))
    with pytest.raises(ValueError, match="^precompute_ref_log_probs: expected False"):
        made.train()


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_models_compiled_as_a_whole(kind, tokenizer, tmp_path):
    cls, config, data = {
        "dpo": (ours.DPOTrainer, trl.DPOConfig, rows()),
        "kto": (ours.KTOTrainer, trl.KTOConfig, rows("unpaired")),
    }[kind]
    made = build(cls, config, tokenizer, tmp_path, data=data, torch_compile=True)
    with pytest.raises(NotImplementedError, match="compiled as a whole; compile its backbone alone"):
        made.train()


def test_refusals(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="label_smoothing: TRL's loss_type 'sigmoid' does not read it"):
        build(ours.DPOTrainer, trl.DPOConfig, tokenizer, tmp_path, label_smoothing=0.1)
    for coefficient in (2.0, -0.5):
        alpha = dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=coefficient)
        with pytest.raises(ValueError, match=r"f_alpha_divergence_coef: expected a number in \[0, 1\], got"):
            _ = build(ours.DPOTrainer, trl.DPOConfig, tokenizer, tmp_path, **alpha).fused_options
    peft = pytest.importorskip("peft")
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    args = trl.DPOConfig(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, bf16=False)
    made = ours.DPOTrainer(
        tiny(tokenizer), args=args, train_dataset=rows(), processing_class=tokenizer, peft_config=prompts
    )
    with pytest.raises(NotImplementedError, match="prompt learning adds tokens that labels do not have"):
        made.train()
