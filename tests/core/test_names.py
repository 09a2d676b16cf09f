"""Errors for unknown names say which name is nearest, and a result shows its metrics."""

import pytest
import torch

import fused_losses as fl

Z, Y = torch.randn(4, 3, 5), torch.ones(4, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fl.dpo_loss(Z, Y, Z, divergence="kl", shift=False), "did you mean 'reverse_kl' or 'forward_kl'"),
        (lambda: fl.token_stats(Z, Y, Z, divergence="foward_kl", shift=False), "did you mean 'forward_kl'"),
        (lambda: fl.preference_loss(Z, Y, Z, loss_type="sigmod", shift=False), "did you mean 'sigmoid'"),
        (lambda: fl.reference.preference_loss(Z, Y, Z, loss_type="sigmod", shift=False), "did you mean 'sigmoid'"),
        (lambda: fl.grpo_loss(Z, Y, Z[:, 0, 0], loss_type="drgrpo", shift=False), "did you mean 'dr_grpo'"),
        (lambda: fl.grpo_loss(Z, Y, Z[:, 0, 0], loss_type="gspo", shift=False), "GSPO is importance='sequence'"),
        (lambda: fl.dpo_loss(Z, Y, Z, reduction="avg", shift=False), "expected one of mean, sum, none, got 'avg'$"),
        (lambda: fl.dpo_loss(fl.Hidden(Z, Z[0]), Y, None, plan="chunks", shift=False), "did you mean 'vocab_chunks'"),
        (lambda: fl.dpo_loss(Z, Y, Z, divergence="forward-kl", shift=False), "did you mean 'forward_kl'"),
        (lambda: fl.token_stats(Z, Y, Z, divergence="tv", shift=False), "did you mean 'total_variation'"),
        (lambda: fl.token_stats(Z, Y, Z, divergence="jsd(beta=0.3)", shift=False), "did you mean 'js'"),
        (
            lambda: fl.dpo_loss(Z, Y, Z, divergence="qqq", shift=False),
            "unknown name 'qqq'; known: reverse_kl, .*alpha_beta$",
        ),
    ],
)
def test_the_nearest_name(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: fl.token_stats(Z, Y[:, 1:], shift=False),
            r"expected logits \[4, 2, V\] .* got \[4, 3, 5\]; .*shift=True$",
        ),
        (
            lambda: fl.token_stats(fl.Hidden(Z, Z[0]), Y[:, 1:], shift=False),
            r"expected hidden \[4, 2, H\] .*; .*hidden\[..., :-1, :\]",
        ),
        (
            lambda: fl.dpo_loss(Z, Y, fl.LogProbs(Z[..., 0]), shift=True),
            r"ref: expected fl.LogProbs \[4, 2\].*x\[..., 1:\]",
        ),
        (
            lambda: fl.grpo_loss(Z, Y, Z[:, 0, 0], old_logps=Z[..., 0], shift=True),
            r"old_logps: expected \[4, 2\].*\[..., 1:\]",
        ),
        (lambda: fl.token_stats(Z, Y[:2], shift=False), r"got \[4, 3, 5\]$"),
    ],
)
def test_shapes_that_shift_explains(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("ppo_loss", "grpo_loss"),
        ("sft_loss", "cross_entropy_loss"),
        ("gkd_loss", "distillation_loss"),
        ("dopo_loss", "dpo_loss"),
    ],
)
def test_names_that_others_use(name, ours):
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'; did you mean '{ours}'"):
        getattr(fl, name)


def test_a_result_shows_its_metrics():
    shown = repr(fl.dpo_loss(Z.requires_grad_(), Y, Z.detach(), shift=True))
    assert shown.startswith("LossOutput(loss=") and "rewards/margins=" in shown and len(shown) < 400
    assert "metrics: none" in repr(fl.LossOutput(Z.sum(), {}, fl.token_stats(Z, Y, shift=False)))


def test_sources_and_statistics_show_shapes():
    z, weight = torch.randn(4, 3, 5), torch.zeros(9, 5, dtype=torch.bfloat16, requires_grad=True)
    hidden = fl.Hidden(z, weight, softcap=30.0, lora=fl.Lora(z[0, :2], torch.zeros(9, 2), 0.5))
    assert repr(hidden) == (
        "Hidden(hidden=[4, 3, 5] (float32), weight=[9, 5] (bfloat16, requires grad), softcap=30.0, "
        "lora=Lora(a=[2, 5] (float32), b=[9, 2] (float32), scaling=0.5))"
    )
    assert repr(fl.Logits(z, temperature=0.7)) == "Logits(logits=[4, 3, 5] (float32), temperature=0.7)"
    assert repr(fl.LogProbs(z[..., 0].double())) == "LogProbs(logps=[4, 3] (float64))"
    assert repr(fl.token_stats(z, Y, z, divergence="js", shift=False)) == (
        "TokenStats(logps=[4, 3] (float32), ref_logps=[4, 3] (float32), divergence={'js': [4, 3] (float32)}, entropy=None, "
        "lse=[4, 3] (float32), mask=[4, 3] (bool), correct=[4, 3] (bool))"
    )
