"""DPO with LoRA, on the head too. The reference is the same model with its adapter off: no second model in memory.

python examples/lora.py
"""

import peft
import tiny
import torch

import fused_losses as fl
from fused_losses.integrations import data

tokenizer = tiny.tokenizer()
config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"])
policy = peft.get_peft_model(tiny.model(), config)
policy.print_trainable_parameters()

collator = data.PreferenceCollator(tokenizer.pad_token_id, max_length=64)
batch = collator(data.tokenize_preferences(tiny.rows(4), tokenizer))
inputs, labels = {k: batch[k] for k in ("input_ids", "attention_mask")}, batch["labels"]


@torch.no_grad()
def logps(model):
    return fl.at_head(model, lambda p: fl.token_stats(p, labels, shift=True).logps, **inputs).out


def dpo():
    with policy.disable_adapter():
        ref = logps(policy)
    return fl.at_head(policy, lambda p: fl.dpo_loss(p, labels, fl.LogProbs(ref), shift=True), **inputs).out


optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
seen = []
for i in range(6):
    out = dpo()
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    seen.append(out.loss.item())
    print(f"step {i}: loss {seen[-1]:.4f}, margin {out.metrics['rewards/margins']:.4f}")

with policy.disable_adapter():
    torch.testing.assert_close(logps(policy), logps(tiny.model()))  # the reference is the model as it was
assert policy.get_output_embeddings().base_layer.weight.grad is None  # only the adapter learns
assert seen[-1] < seen[0]
print("the adapter has learnt, the reference has stayed")
