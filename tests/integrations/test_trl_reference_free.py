"""Our CPO and ORPO trainers beside TRL's own: the same data and model give the same losses, gradients and logged metrics."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")
from helpers import relative, seed_of, seeded  # noqa: E402
from transformers import MixtralForCausalLM  # noqa: E402
from trl.experimental.cpo import CPOConfig  # noqa: E402
from trl.experimental.cpo import CPOTrainer as TheirCPO  # noqa: E402
from trl.experimental.orpo import ORPOConfig  # noqa: E402
from trl.experimental.orpo import ORPOTrainer as TheirORPO  # noqa: E402
from trl_setup import STEPS, new_tokenizer, rows, run, same, tiny  # noqa: E402

from fused_losses.integrations import trl_reference_free as ours  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

CPO = {
    "sigmoid": {"label_smoothing": 0.1},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo", "cpo_alpha": 0.5},
    "SimPO": {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.7},
    "CPO-SimPO": {"loss_type": "simpo", "cpo_alpha": 0.3, "label_smoothing": 0.2},
    "AlphaPO": {"loss_type": "simpo", "cpo_alpha": 0.0, "alpha": 0.2},
}
CASES = {name: (ours.CPOTrainer, TheirCPO, CPOConfig, options) for name, options in CPO.items()}
CASES["ORPO"] = (ours.ORPOTrainer, TheirORPO, ORPOConfig, {"beta": 0.3})


@pytest.fixture(scope="module")
def tokenizer():
    return new_tokenizer()


def build(cls, config, tokenizer, path, **options):
    model = options.pop("model", None) or tiny(tokenizer)
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
        eval_strategy="steps",
        eval_steps=STEPS,
    )
    args = config(**arguments | options)
    return cls(model, args=args, train_dataset=rows(), eval_dataset=rows(), processing_class=tokenizer)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_logs_are_trls(name, tokenizer, tmp_path):
    mine, theirs, config, options = CASES[name]
    logs = []
    for cls in (mine, theirs):
        made = build(cls, config, tokenizer, tmp_path, **options)
        logs.append(run(made, tiny(tokenizer).state_dict()))
    assert len(logs[0]) > STEPS
    same(*logs)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_trls(name, tokenizer, tmp_path):
    mine, theirs, config, options = CASES[name]
    found = []
    for cls in (mine, theirs):
        made = build(cls, config, tokenizer, tmp_path, **options)
        batch = made._prepare_inputs(next(iter(made.get_train_dataloader())))
        seeded(0)
        made.model.zero_grad()
        loss, _ = made.get_batch_loss_metrics(made.model, batch)
        loss.backward()
        found.append((loss.item(), [p.grad.clone() for p in made.model.parameters()]))
    (a, gradients), (b, exact) = found
    assert a == pytest.approx(b, rel=1e-5)
    assert max(relative(g, t) for g, t in zip(gradients, exact, strict=True)) < 1e-4


def test_mixtures(tokenizer, tmp_path):
    """The auxiliary loss is added as TRL adds it."""
    sizes = dict(cls=MixtralForCausalLM, num_local_experts=2, output_router_logits=True, router_aux_loss_coef=0.3)
    logs = []
    for cls in (ours.CPOTrainer, TheirCPO):
        made = build(cls, CPOConfig, tokenizer, tmp_path, model=tiny(tokenizer, **sizes))
        logs.append(run(made, tiny(tokenizer, **sizes).state_dict()))
    same(*logs)


BAD = [
    ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing: loss_type 'hinge' does not read it"),
    ({"loss_type": "sigmoid", "alpha": 0.1}, "alpha: AlphaPO is beside loss_type 'simpo'"),
]


@pytest.mark.parametrize(("options", "words"), BAD)
def test_refusals(options, words, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=words):
        build(ours.CPOTrainer, CPOConfig, tokenizer, tmp_path, **options)
