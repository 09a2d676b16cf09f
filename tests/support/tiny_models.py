"""Small models with random weights: of transformers, and one written by hand."""

import pytest
import torch
from torch import nn

import fused_losses as fl

V, H = 97, 32


SMALL = dict(
    vocab_size=V,
    hidden_size=H,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


GPT = dict(vocab_size=V, n_embd=H, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)


OPT = dict(word_embed_proj_dim=16, ffn_dim=48, do_layer_norm_before=False)


MLA = dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, num_key_value_heads=2)


HYBRID = dict(mamba_d_ssm=H, mamba_n_heads=2, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8)


FAMILIES = {  # class: its config beside SMALL; softcap, scale
    "LlamaForCausalLM": ({}, None, 1.0),
    "Qwen2ForCausalLM": (dict(tie_word_embeddings=True), None, 1.0),
    "Olmo2ForCausalLM": ({}, None, 1.0),
    "GPT2LMHeadModel": (GPT, None, 1.0),
    "PhiForCausalLM": ({}, None, 1.0),  # a head with bias
    "OPTForCausalLM": (OPT, None, 1.0),  # a projection inside the backbone
    "Gemma2ForCausalLM": (dict(final_logit_softcapping=20.0), 20.0, 1.0),
    "Gemma3ForCausalLM": (dict(final_logit_softcapping=25.0), 25.0, 1.0),
    "CohereForCausalLM": (dict(logit_scale=0.125), None, 0.125),
    "GraniteForCausalLM": (dict(logits_scaling=8.0), None, 0.125),
    "HyperCLOVAXForCausalLM": (dict(logits_scaling=0.5), None, 0.5),  # Granite's name, but it multiplies
    "MiniCPM3ForCausalLM": (dict(MLA, dim_model_base=8), None, 0.25),  # divides the hidden states
    "FalconH1ForCausalLM": (dict(HYBRID, lm_head_multiplier=0.3), None, 0.3),
}


def make(name, **options):
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**(GPT if name.startswith("GPT2") else SMALL | options))).double().eval()
    with torch.no_grad():  # logits large enough for a softcap to matter
        for p in model.get_output_embeddings().parameters():
            p.normal_()
    return model


def batch(rows=4, length=6):
    ids = torch.randint(3, V, (rows, length))
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids)), ids


def assert_same(source, logits, labels):
    """The distribution of a source is the softmax of these logits."""
    ours, truth = (fl.token_stats(x, labels, entropy=True, shift=False) for x in (source, logits))
    for name in ("logps", "entropy", "lse"):
        torch.testing.assert_close(getattr(ours, name), getattr(truth, name), rtol=1e-9, atol=1e-9)


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, H)

    def forward(self, input_ids, **_):
        return Output(last_hidden_state=self.embed(input_ids))


class Output(dict):
    __getattr__ = dict.__getitem__


class Tiny(nn.Module):
    """As transformers would have it, tied; what lies around the head is an argument."""

    base_model_prefix = "body"

    def __init__(self, head=None, before=lambda h: h, after=lambda z: z):
        super().__init__()
        self.body, self.before, self.after = Body(), before, after
        self.lm_head = nn.Linear(H, V, bias=False) if head is None else head
        if head is None:
            self.lm_head.weight = self.body.embed.weight

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, **_):
        return Output(logits=self.after(self.lm_head(self.before(self.body(input_ids).last_hidden_state))))
