"""TRL's DPOTrainer, and the one line that puts it on this library: the same log, from hidden states.

python examples/trl_dpo.py
"""

import tempfile

import tiny
import trl
from datasets import Dataset

from fused_losses.integrations import trl_trainers

tokenizer = tiny.tokenizer()
dataset = Dataset.from_list(tiny.rows(16))


def log_of(trainer_class):
    args = trl.DPOConfig(
        tempfile.mkdtemp(),
        max_steps=4,
        per_device_train_batch_size=4,
        max_length=64,
        learning_rate=1e-3,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trainer_class(
        model=tiny.model(), ref_model=tiny.model(), args=args, train_dataset=dataset, processing_class=tokenizer
    )
    trainer.train()
    return trainer.state.log_history[:-1]  # the last entry sums up


theirs = log_of(trl.DPOTrainer)
ours = log_of(trl_trainers.DPOTrainer)  # in a script: from fused_losses.integrations.trl_trainers import DPOTrainer

assert theirs[0].keys() == ours[0].keys()
for name in theirs[0]:
    values = [(a[name], b[name]) for a, b in zip(theirs, ours, strict=True)]
    if not name.endswith("time"):
        print(f"{name:20} TRL {values[-1][0]:.6f}   ours {values[-1][1]:.6f}")
        assert all(abs(a - b) <= 1e-3 * max(1, abs(a)) for a, b in values), name
assert ours[-1]["loss"] < ours[0]["loss"]
