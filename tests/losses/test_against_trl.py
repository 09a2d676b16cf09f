"""The twins against TRL 1.16: its helpers, its chunked kernels, and the losses of its trainers with what they log.

A trainer here is TRL's own class around a tiny random model, without __init__ (no dataset, no tokenizer): the method that
computes its loss runs unchanged. The twin gets the logits of the same model; gradients are compared at its parameters.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from inspect import signature
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers import generator_of, relative, seeded
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.sdft.loss_utils import (
    compute_full_logit_self_distillation_loss,
    compute_topk_self_distillation_loss,
)
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer import utils
from trl.trainer.callbacks import SyncRefModelCallback

import fused_losses as fl

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]

VOCAB, HIDDEN, PAD = 64, 16, 0
ONLY_TRL = {"num_tokens", "logits/chosen", "logits/rejected", "mean_token_accuracy"}  # no numbers of the labels' tokens


def tiny(seed):
    seeded(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.3,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def models():
    """A policy and a reference near it, neither patched by TRL yet."""
    policy = tiny(1)
    ref = copy.deepcopy(policy)
    with torch.no_grad():
        for p in ref.parameters():
            p.add_(torch.randn_like(p) * 0.03)
    return policy, ref.requires_grad_(False)


def trainer(cls, config, policy, ref, *, temperature=1.0, **given):
    """TRL's object with the defaults of its configuration, except for what is given."""
    fields = {f.name: f.default for f in dataclasses.fields(config)} | given
    policy, ref = copy.deepcopy(policy), copy.deepcopy(ref)
    utils.add_fused_lm_head(
        policy, temperature, outputs=("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    )
    utils.add_fused_lm_head(ref, temperature)
    made = object.__new__(cls)
    vars(made).update(fields)
    vars(made).update(
        model=policy,
        ref_model=ref,
        args=SimpleNamespace(**fields),
        accelerator=Accelerator(cpu=True),
        _tp_size=1,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        aux_loss_enabled=False,
    )
    return made


def logged(made):
    """What a trainer logged last."""
    (found,) = (m for m in made._metrics.values() if m)
    return {name: torch.as_tensor(x[-1], dtype=torch.float64) for name, x in found.items()}


def tokens(sequences, seed=0, length=10):
    """Prompts of 2 to 4 tokens, completions of 1 to 6, padded: a batch as TRL's collators make it."""
    g = generator_of(seed)
    ids = torch.randint(1, VOCAB, (sequences, length), generator=g)
    prompt = torch.randint(2, 5, (sequences, 1), generator=g)
    end = prompt + torch.randint(1, 7, (sequences, 1), generator=g)
    at = torch.arange(length)
    attention, completion = (at < end).long(), ((at >= prompt) & (at < end)).long()
    return {"input_ids": ids.where(attention == 1, PAD), "attention_mask": attention, "completion_mask": completion}


def labels_of(batch):
    return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)


def logits_of(model, batch):
    """Of a float32 model, and the twin goes on in float64."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()


def close(mine, theirs, what="", tolerance=2e-5):
    torch.testing.assert_close(
        mine.detach().double(), theirs.detach().double(), rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}"
    )


def compare(made, loss, twin, policy, theirs=None, more=frozenset(), fewer=frozenset()):
    """Loss, gradient at the parameters, and metrics: the twin has TRL's names, but for `more` and `fewer`."""
    close(twin.loss, loss, "loss")
    mine, other = (
        torch.cat([g.flatten() for g in torch.autograd.grad(x, model.parameters())])
        for x, model in ((twin.loss, policy), (loss, made.model))
    )
    assert relative(mine, other) <= 5e-5
    theirs = logged(made) if theirs is None else theirs
    assert twin.metrics.keys() - more == theirs.keys() - ONLY_TRL - fewer
    for name in twin.metrics.keys() - more:
        close(twin.metrics[name], theirs[name], name)


# ---- pairs -------------------------------------------------------------------------------------------------------------

LINKED = {  # losses that TRL allows an f-divergence, for the others have a log Z left: their options
    "sigmoid": {}, "sigmoid_norm": {}, "hinge": {}, "ipo": {}, "exo_pair": {"label_smoothing": 0.05},
    "robust": {"label_smoothing": 0.1}, "discopop": {}, "sft": {},
}  # fmt: skip
PLAIN = {
    "nca_pair": {}, "bco_pair": {}, "sppo_hard": {}, "apo_zero": {}, "apo_down": {}, "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {},
}  # fmt: skip
LINKS = {  # TRL's divergences, as ours: its alpha is 1 - the paper's
    "forward_kl": ("forward_kl", 0.5), "js": ("js_divergence", 0.5), "alpha(a=0.3)": ("alpha_divergence", 0.7),
    "alpha(a=0.8)": ("alpha_divergence", 0.2),
}  # fmt: skip
DPO = [(loss, "reverse_kl", o) for loss, o in (LINKED | PLAIN).items()]
DPO += [(loss, link, o) for link in LINKS for loss, o in LINKED.items()]


def dpo_trainer(models, losses, link="reverse_kl", coefficient=0.5, weights=None, **options):
    return trainer(
        DPOTrainer,
        DPOConfig,
        *models,
        beta=0.3,
        loss_types=losses,
        loss_weights=weights or [1.0] * len(losses),
        f_divergence_type=link,
        f_alpha_divergence_coef=coefficient,
        precompute_ref_logps=False,
        **options,
    )


def compare_dpo(models, losses, link="reverse_kl", weights=None, **options):
    policy, ref = models
    made = dpo_trainer(models, losses, *LINKS.get(link, (link,)), weights=weights, **options)
    batch = tokens(6)
    with torch.no_grad():
        w = logits_of(ref, batch)
    twin = fl.reference.preference_loss(
        logits_of(policy, batch),
        labels_of(batch),
        w,
        loss_type=losses[0] if len(losses) == 1 else losses,
        divergence=link,
        beta=0.3,
        loss_weights=weights,
        shift=True,
        entropy=True,
        **options,
    )
    compare(made, made._compute_loss(made.model, batch, return_outputs=False), twin, policy)


@pytest.mark.parametrize(("loss", "link", "options"), DPO)
def test_dpo_trainer(models, loss, link, options):
    compare_dpo(models, [loss], link, **options)


@pytest.mark.parametrize("link", ["reverse_kl", "js"])
def test_dpo_trainer_with_several_losses(models, link):
    compare_dpo(models, ["sigmoid", "hinge", "sft"], link, weights=[0.8, 0.2, 1.0])  # MPO's weights


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "sft"])
def test_dpo_trainer_with_ld_alpha(models, loss):
    compare_dpo(models, [loss], ld_alpha=0.4)


@pytest.mark.parametrize("losses", [["sigmoid"], ["ipo"], ["sigmoid", "apo_zero"]])  # TRL's fails for hinge and sft
def test_dpo_trainer_with_wpo_weights(models, losses):
    compare_dpo(models, losses, use_weighting=True)


def test_alpha_of_trl_is_one_minus_the_papers(models):
    """TRL's alpha 0 is the forward KL and 1 the reverse; f-DPO's paper has them the other way round."""
    policy, ref = models
    batch = tokens(6)
    for coefficient, link in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        made = dpo_trainer(models, ["sigmoid"], "alpha_divergence", coefficient)
        twin = fl.reference.dpo_loss(
            logits_of(policy, batch), labels_of(batch), logits_of(ref, batch), divergence=link, beta=0.3, shift=True
        )
        close(twin.loss, made._compute_loss(made.model, batch, return_outputs=False))


# ---- pairs without a reference --------------------------------------------------------------------------------------------


def paired(made, batch):
    """The batch as TRL's older collator names it, and the trainer's loss and metrics."""
    names = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels_of(batch)}
    sides = {f"{side}_{n}": x.chunk(2)[i] for n, x in names.items() for i, side in enumerate(("chosen", "rejected"))}
    vars(made).update(is_encoder_decoder=False, pad_token_id=PAD, padding_value=PAD)
    loss, metrics = made.get_batch_loss_metrics(made.model, sides)
    return loss, {n: torch.tensor(x, dtype=torch.float64) for n, x in metrics.items()}


CPO = {
    "CPO": ("cpo_loss", {"loss_type": "sigmoid"}), "smoothed": ("cpo_loss", {"loss_type": "sigmoid", "label_smoothing": 0.1}),
    "hinge": ("cpo_loss", {"loss_type": "hinge", "cpo_alpha": 0.5}), "IPO": ("cpo_loss", {"loss_type": "ipo"}),
    "SimPO": ("simpo_loss", {"beta": 2.0, "gamma": 0.7}),
    "CPO-SimPO": ("simpo_loss", {"beta": 2.0, "gamma": 0.7, "cpo_alpha": 0.5, "label_smoothing": 0.1}),
    "AlphaPO": ("simpo_loss", {"beta": 2.5, "gamma": 0.1, "alpha": 0.25}),
    "AlphaPO, alpha < 0": ("simpo_loss", {"beta": 2.5, "gamma": 0.1, "alpha": -0.5}),
}  # fmt: skip


@pytest.mark.parametrize("name", CPO)
def test_cpo_trainer(models, name):
    twin, options = CPO[name]
    o = {"beta": 0.3, "cpo_alpha": 1.0 if twin == "cpo_loss" else 0.0, "loss_type": "simpo"} | options
    theirs = {"gamma": "simpo_gamma"}
    made = trainer(CPOTrainer, CPOConfig, *models, **{theirs.get(n, n): x for n, x in o.items()})
    batch = tokens(6, seed=1)
    if twin == "simpo_loss":
        o.pop("loss_type")
    out = getattr(fl.reference, twin)(logits_of(models[0], batch), labels_of(batch), shift=True, **o)
    loss, metrics = paired(made, batch)
    if not o["cpo_alpha"]:  # then TRL logs 0
        assert metrics.pop("nll_loss") == 0
        out.metrics.pop("nll_loss")
    compare(made, loss, out, models[0], metrics)


def test_orpo_trainer(models):
    made = trainer(ORPOTrainer, ORPOConfig, *models, beta=0.3)
    batch = tokens(6, seed=2)
    everything = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)  # TRL's NLL is over the prompt too
    out = fl.reference.orpo_loss(
        logits_of(models[0], batch), labels_of(batch), beta=0.3, nll_labels=everything, shift=True
    )
    loss, metrics = paired(made, batch)
    compare(made, loss, out, models[0], metrics)


# ---- single responses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("desirable", [[1, 0, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], ids=["both", "good", "bad"])
@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_kto_trainer(models, loss, desirable):
    policy, ref = models

    def baseline(x):
        return fl.reference.kto_baseline(logits_of(policy, x), labels_of(x), logits_of(ref, x), shift=True)

    # Prompts with another's completion, drawn until the baseline is not 0.
    other = next(x for x in (tokens(5, seed=k) for k in range(4, 100)) if baseline(x) > 0)
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    made = trainer(
        KTOTrainer,
        KTOConfig,
        policy,
        ref,
        loss_type=loss,
        beta=0.3,
        calculate_KL=loss == "kto",
        precompute_ref_logps=False,
        **weights,
    )
    batch, z0 = tokens(5, seed=3), baseline(other)
    label = torch.tensor(desirable, dtype=torch.bool)
    out = fl.reference.kto_loss(
        logits_of(policy, batch),
        labels_of(batch),
        logits_of(ref, batch),
        label,
        loss_type=loss,
        beta=0.3,
        shift=True,
        entropy=True,
        baseline=z0.detach() if loss == "kto" else None,
        **weights,
    )
    batch |= {"label": label} | {f"KL_{n}": x for n, x in other.items()}
    theirs = made._compute_loss(made.model, batch, return_outputs=False)
    assert z0 > 0
    absent = {n for n, x in out.metrics.items() if x.isnan()}  # TRL logs nothing where the batch has no such response
    compare(made, theirs, out, policy, more=absent | {"count/chosen", "count/rejected"})


def test_bco_is_trls_pair_loss_taken_apart(models):
    """TRL 1.16 has BCO for pairs alone, without a shift: two sequences a pair."""
    policy, ref = models
    made = dpo_trainer(models, ["bco_pair"])
    batch = tokens(6)
    out = fl.reference.bco_loss(
        logits_of(policy, batch), labels_of(batch), logits_of(ref, batch), torch.arange(6) < 3, beta=0.3, shift=True
    )
    close(2 * out.loss, made._compute_loss(made.model, batch, return_outputs=False))


# ---- policy gradients -----------------------------------------------------------------------------------------------------

GRPO = {
    "grpo": {}, "beta": {"beta": 0.2}, "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 8},
    "bnpo": {"loss_type": "bnpo", "beta": 0.2}, "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "delta": {"loss_type": "dapo", "delta": 1.5}, "GSPO": {"importance": "sequence", "epsilon": 0.03, "beta": 0.2},
    "dapo, sequence": {"loss_type": "dapo", "importance": "sequence", "epsilon": 0.03, "delta": 1.2},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1, "beta": 0.2},
    "cispo, sequence": {"loss_type": "cispo", "epsilon_high": 1.02, "importance": "sequence"},
    "luspo": {"loss_type": "luspo", "importance": "sequence", "epsilon": 0.03, "beta": 0.2},
    "luspo, token": {"loss_type": "luspo", "delta": 1.5}, "sapo": {"loss_type": "sapo", "beta": 0.2},
    "sapo, sequence": {"loss_type": "sapo", "importance": "sequence", "sapo_temperature_pos": 1.4},
    "vespo": {"loss_type": "vespo", "beta": 0.2}, "vespo, others": {"loss_type": "vespo", "vespo_k_neg": 1.5},
    "off-policy mask": {"off_policy_mask_threshold": 0.01, "epsilon": 0.1},
    "entropy bonus": {"loss_type": "bnpo", "entropy_coef": 0.1, "epsilon": 0.1},
}  # fmt: skip


def completions(sequences=5, prompt=4, length=6):
    """Prompts padded on the left and completions on the right, some of whose tokens a tool wrote."""
    g = generator_of(5)
    ids = torch.randint(1, VOCAB, (sequences, prompt + length), generator=g)
    before, after = torch.arange(prompt), torch.arange(length)
    prompt_mask = (before >= torch.randint(0, 3, (sequences, 1), generator=g)).long()
    mask = (after < torch.randint(1, length + 1, (sequences, 1), generator=g)).long()
    tool = torch.ones_like(mask)
    tool[0, 1] = 0
    ids = ids.where(torch.cat([prompt_mask, mask], 1) == 1, PAD)
    return {
        "prompt_ids": ids[:, :prompt],
        "prompt_mask": prompt_mask,
        "completion_ids": ids[:, prompt:],
        "completion_mask": mask,
        "tool_mask": tool,
    }


def compare_grpo(models, options, advantages, *, train=False, temperature=0.8, on_policy=False):
    policy, ref = models
    o = {"loss_type": "grpo", "importance": "token", "beta": 0.0, "delta": None, "entropy_coef": 0.0} | options
    low = o.get("epsilon", 0.2)
    high = o.get("epsilon_high", low)
    own = {f.name: f.default for f in dataclasses.fields(GRPOConfig) if f.name.startswith(("sapo_", "vespo_"))}
    made = trainer(
        GRPOTrainer,
        GRPOConfig,
        policy,
        ref,
        temperature=temperature,
        loss_type=o["loss_type"],
        delta=o["delta"],
        beta=o["beta"],
        importance_sampling_level=o["importance"],
        epsilon_low=low,
        epsilon_high=high,
        off_policy_mask_threshold=o.get("off_policy_mask_threshold"),
        steps_per_generation=2,
        max_completion_length=o.get("max_completion_length"),
        current_gradient_accumulation_steps=2,
        use_vllm=False,
        _entropy_bonus_enabled=o["entropy_coef"] > 0,
        _entropy_window_stats=None,
        entropy_coef=o["entropy_coef"],
        **own | {name: x for name, x in o.items() if name in own},
        use_bias_correction_kl=False,
    )
    made.model.train(train)  # without dropout
    x = completions()
    mask = x["completion_mask"] * x["tool_mask"]
    ids = torch.cat([x["prompt_ids"], x["completion_ids"]], 1)
    attention = torch.cat([x["prompt_mask"], x["completion_mask"]], 1)
    labels = ids.masked_fill(torch.cat([torch.zeros_like(x["prompt_ids"]), mask], 1) == 0, -100)
    z, w = (
        fl.Logits(model(input_ids=ids, attention_mask=attention).logits.double(), temperature=temperature)
        for model in models
    )
    known = [fl.reference.token_stats(s, labels, shift=True).logps.detach() for s in (z, w)]
    # The first response with an advantage > 0 and the first with one < 0 are clipped and the third is not, whatever is drawn.
    apart, noise = (
        torch.tensor([-0.9, 0.9, 0.0, 0.0, 0.0])[:, None],
        torch.tensor([0.06, 0.06, 0.0, 0.06, 0.06])[:, None],
    )
    old = known[0] + apart + torch.randn(known[0].shape, generator=generator_of(6)) * noise

    def theirs(t):  # of the completion alone
        return t[:, x["prompt_ids"].shape[1] - 1 :].float()

    items = mask.sum()
    inputs = x | {"advantages": advantages, "ref_per_token_logps": theirs(known[1]), "num_items_in_batch": items + 7}
    if not on_policy:
        inputs["old_per_token_logps"] = theirs(old)
    per_token = advantages.dim() == 2
    own = torch.nn.functional.pad(advantages, (x["prompt_ids"].shape[1] - 1, 0)) if per_token else advantages
    # In training TRL divides by the steps that it accumulates over, or by the tokens of all of them.
    by_tokens, half = (
        o["loss_type"] in ("dapo", "cispo", "vespo"),
        2 * {"bnpo": int(items)}.get(o["loss_type"], len(ids)),
    )
    out = fl.reference.grpo_loss(
        z,
        labels,
        own,
        old_logps=None if on_policy else old,
        ref=fl.LogProbs(known[1]) if o["beta"] else None,
        shift=True,
        entropy=True,
        num_items=items + 7 if by_tokens else half if train else None,
        **o,
    )
    loss = made._compute_loss(made.model, inputs)
    compare(made, loss, out, policy, fewer={"clip_ratio/low_min", "clip_ratio/high_max", "policy_loss", "entropy_coef"})
    return out


ADVANTAGES = torch.tensor([1.0, -0.7, 0.4, -1.2, 0.3])


@pytest.mark.parametrize("train", [False, True], ids=["evaluating", "training"])
@pytest.mark.parametrize("name", GRPO)
def test_grpo_trainer(models, name, train):
    out = compare_grpo(models, GRPO[name], ADVANTAGES, train=train)
    clips = {n: x for n, x in out.metrics.items() if "clip" in n}
    assert GRPO[name].get("loss_type") in ("sapo", "vespo") or clips
    assert all(0 < x < 1 for x in clips.values())  # the batch has something to clip


@pytest.mark.parametrize("name", ["grpo", "GSPO", "cispo"])
def test_grpo_trainer_on_policy(models, name):
    compare_grpo(models, GRPO[name], ADVANTAGES, on_policy=True, temperature=1.0)


@pytest.mark.parametrize("name", ["grpo", "delta", "cispo"])
def test_grpo_trainer_with_advantages_per_token(models, name):
    advantages = torch.randn(5, 6, generator=generator_of(7))
    compare_grpo(models, GRPO[name], advantages)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages(models, scale):
    """As the trainer finds them after it has sampled: here it is told what it sampled, and the rewards."""
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0, 2.0, 2.0, 0.3, torch.nan, 0.7, torch.nan, 0.1, torch.nan])
    count = len(rewards)
    made = trainer(
        GRPOTrainer,
        GRPOConfig,
        *models,
        scale_rewards=scale,
        num_generations=3,
        num_generations_eval=3,
        multi_objective_aggregation="sum_then_normalize",
        reward_weights=torch.ones(1),
        reward_func_names=["given"],
        environment_factories=None,
        environments=None,
        tools=None,
        pad_to_multiple_of=None,
        use_vllm=False,
        mask_truncated_completions=False,
        _tokenizer=SimpleNamespace(pad_token_id=PAD),
        steps_per_generation=1,
        num_iterations=1,
        _logs=defaultdict(list) | {"rewards": defaultdict(list)},
        _pending_extra_logs={},
        _pending_metrics={},
    )
    made._generate = lambda prompts: ([[1, 2]] * count, [[3, 4]] * count, None, [""] * count, None, {}, None, None)
    made._calculate_rewards = lambda *_: rewards[:, None]
    found = made._generate_and_score_completions([{"prompt": ""}] * count)
    close(fl.reference.group_advantages(rewards.double(), 3, scale), found["advantages"])


# ---- helpers and kernels --------------------------------------------------------------------------------------------------


@pytest.fixture
def logits():
    """Of a student and a teacher, and labels, a third of them ignored."""
    student, teacher = torch.randn(2, 3, 5, VOCAB, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (3, 5))
    labels.view(-1)[::3] = -100
    return student.requires_grad_(), teacher, labels


def test_statistics_of_logits(logits):
    z, _, labels = logits
    stats = fl.reference.token_stats(fl.Logits(z, temperature=0.7), labels, entropy=True, shift=False)
    logps, entropy = utils.selective_log_softmax_and_entropy(
        z, labels.clamp(min=0), temperature=0.7, row_mask=labels != -100
    )
    for mine, theirs in ((stats.logps, logps), (stats.entropy, entropy)):
        close(mine, theirs, tolerance=1e-12)
        g = torch.randn_like(mine)
        close(*(torch.autograd.grad(x, z, g, retain_graph=True)[0] for x in (mine, theirs)), tolerance=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_generalised_jsd(logits, beta):
    z, w, labels = logits
    out = fl.reference.distillation_loss(
        fl.Logits(z, temperature=0.9), labels, fl.Logits(w, temperature=0.9), beta=beta, shift=False
    )
    theirs = GKDTrainer.generalized_jsd_loss(z, w, labels, beta=beta, temperature=0.9)
    close(out.loss, theirs, tolerance=1e-12)
    close(*(torch.autograd.grad(x, z)[0] for x in (out.loss, theirs)), tolerance=1e-12)
    close(
        fl.reference.distillation_loss(z, labels, w, beta=beta, num_items=4, shift=False).loss,
        GKDTrainer.generalized_jsd_loss(z, w, labels, beta=beta, num_items_in_batch=4),
        tolerance=1e-12,
    )
    each = compute_full_logit_self_distillation_loss(z, w, distillation_alpha=beta)
    close(
        fl.reference.distillation_loss(z, labels, w, beta=beta, reduction="none", shift=False).loss,
        each.masked_fill(labels == -100, 0),
        tolerance=1e-12,
    )


DROP_INS = {name: getattr(utils, name, None) for name in fl.reference.trl_functions.__all__}
DROP_INS["generalized_jsd_loss"] = GKDTrainer.generalized_jsd_loss


@pytest.mark.parametrize("name", DROP_INS)
def test_drop_ins_take_trls_arguments(name):
    theirs = [(p.name, p.default) for p in signature(DROP_INS[name]).parameters.values()]
    for library in (fl, fl.reference):
        assert [(p.name, p.default) for p in signature(getattr(library, name)).parameters.values()] == theirs


def calls(name, logits):
    """Arguments of a drop-in."""
    z, w, labels = logits
    one, several, keep = labels.clamp(min=0), z.detach().topk(4).indices, labels != -100
    return {
        "selective_log_softmax": [
            ((z, one), {}),
            ((z, several, 0.7), {}),
            ((z, one), {"temperature": 0.7, "row_mask": keep}),
            ((z, several), {"row_mask": keep.unsqueeze(-1).expand_as(several).long()}),
        ],
        "selective_log_softmax_and_entropy": [((z, one), {}), ((z, one, True, 0.7, keep), {})],
        "entropy_from_logits": [((z,), {}), ((z, 2), {})],
        "generalized_jsd_loss": [
            ((z, w), {"beta": b, "reduction": r, **more})
            for b in (0, 0.3, 1)
            for r in ("batchmean", "sum", "mean")
            for more in ({}, {"labels": labels}, {"labels": labels, "temperature": 0.9, "num_items_in_batch": 5})
        ],
    }[name]


@pytest.mark.parametrize("library", [fl, fl.reference], ids=["fused", "twin"])
@pytest.mark.parametrize("name", DROP_INS)
def test_drop_ins(monkeypatch, logits, name, library):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    for args, options in calls(name, logits):
        mine, theirs = (f(*args, **options) for f in (getattr(library, name), DROP_INS[name]))
        pairs = zip(mine, theirs, strict=True) if isinstance(mine, tuple) else [(mine, theirs)]
        for a, b in pairs:
            assert a.shape == b.shape
            close(a, b, tolerance=1e-10)
            g = torch.randn_like(b)
            close(*(torch.autograd.grad(x, logits[0], g, retain_graph=True)[0] for x in (a, b)), tolerance=1e-10)


def head(hidden, seed):
    """float32 hidden states [13, H], weight and bias, leaves."""
    g = generator_of(seed)
    return [torch.randn(s, generator=g).requires_grad_() for s in ((13, hidden), (VOCAB, hidden), (VOCAB,))]


SAME = 1e-3  # of TRL's float32, which rounds where terms cancel: another formula would be off by far more
HEADS = {"plain": {}, "scale": {"scale": 0.3}, "softcap": {"softcap": 2.0}}  # with both, TRL scales first and we last


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_chunked_log_probs(options):
    leaves, labels = head(HIDDEN, 8), torch.randint(0, VOCAB, (13,))
    width = 24  # of the vocabulary at a time
    found = ChunkedLogProbFunction.apply(*leaves, labels, 0.7, width, options.get("softcap"), options.get("scale", 1.0))
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    stats = fl.reference.token_stats(fl.Hidden(*doubles, temperature=0.7, **options), labels, entropy=True, shift=False)
    assert torch.equal(stats.correct, found[4])
    for mine, theirs in ((stats.logps, found[0]), (stats.entropy, found[1])):
        close(mine, theirs)
        g = torch.randn(13)
        exact = torch.autograd.grad(mine, doubles, g.double(), retain_graph=True)
        for a, b in zip(exact, torch.autograd.grad(theirs, leaves, g, retain_graph=True), strict=True):
            assert relative(b, a) <= SAME


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_chunked_divergence(beta, options):
    leaves, teacher, labels = head(HIDDEN, 9), head(12, 10), torch.randint(0, VOCAB, (13,))
    given = (options.get("scale", 1.0), options.get("softcap"))
    divergence, entropy = ChunkedDivergenceFunction.apply(*leaves, *teacher, beta, 0.7, *given, *given)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    out = fl.reference.distillation_loss(
        fl.Hidden(*doubles, temperature=0.7, **options),
        labels,
        fl.Hidden(*(x.detach().double() for x in teacher), temperature=0.7, **options),
        beta=beta,
        reduction="none",
        entropy=True,
        shift=False,
    )
    close(out.loss, divergence)
    close(out.stats.entropy, entropy)
    g = torch.randn(13)
    exact = torch.autograd.grad(out.loss, doubles, g.double())
    for a, b in zip(exact, torch.autograd.grad(divergence, leaves, g), strict=True):
        assert relative(b, a) <= SAME


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize(("alpha", "divergence"), [(0.0, "forward_kl"), (0.3, "js(beta=0.3)"), (1.0, "reverse_kl")])
def test_distillation_from_the_best_tokens(logits, alpha, divergence, tail):
    """TRL's are the student's best; ours are whichever the teacher is known at."""
    z, w, labels = logits
    each = compute_topk_self_distillation_loss(
        z, w, distillation_topk=5, distillation_alpha=alpha, distillation_add_tail=tail == "bucket"
    )
    ids = z.detach().topk(5).indices
    out = fl.reference.topk_distillation_loss(
        z, labels, w.log_softmax(-1).gather(-1, ids), ids, tail=tail, divergence=divergence, shift=False
    )
    theirs = each[labels != -100].mean()
    close(out.loss, theirs, tolerance=1e-10)
    close(*(torch.autograd.grad(x, z)[0] for x in (out.loss, theirs)), tolerance=1e-10)


# ---- trust region ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "every"), [(0.6, 2), (1.0, 3)])
def test_trust_region(models, alpha, every):
    policy, mine, theirs = (copy.deepcopy(models[i]) for i in (0, 1, 1))
    region = fl.TrustRegion(mine, policy, alpha=alpha, every=every)
    callback = SyncRefModelCallback(theirs, Accelerator(cpu=True))
    given = SimpleNamespace(ref_model_sync_steps=every, ref_model_mixup_alpha=alpha)
    for step in range(1, 8):
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(torch.randn_like(p) * 0.01)
        region.step()
        callback.on_step_end(given, SimpleNamespace(global_step=step), None, model=policy)
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b)
    assert region.updates == 7 // every


# ---- defaults -------------------------------------------------------------------------------------------------------------

DEFAULTS = {  # our function: TRL's configuration, and our options with the names of its fields
    "preference_loss": (DPOConfig, "beta discopop_tau ld_alpha use_weighting"),
    "kto_loss": (KTOConfig, "beta desirable_weight undesirable_weight"),
    "grpo_loss": (
        GRPOConfig,
        "beta epsilon_high delta importance=importance_sampling_level entropy_coef off_policy_mask_threshold",
    ),
    "group_advantages": (GRPOConfig, "scale=scale_rewards"),
    "cpo_loss": (CPOConfig, "beta cpo_alpha label_smoothing loss_type"),
    "simpo_loss": (CPOConfig, "gamma=simpo_gamma alpha label_smoothing"),
    "orpo_loss": (ORPOConfig, "beta"),
    "distillation_loss": (GKDConfig, "beta"),
}


@pytest.mark.parametrize("loss", DEFAULTS)
def test_defaults_are_trls(loss):
    config, options = DEFAULTS[loss]
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    for library in (fl, fl.reference):
        ours = signature(getattr(library, loss)).parameters
        for names in options.split():
            name, _, theirs = names.partition("=")
            assert ours[name].default == defaults[theirs or name], name
