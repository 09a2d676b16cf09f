"""The twins against Liger-Kernel 0.8.5: its chunked losses of hidden states, on the CPU."""

from __future__ import annotations

import pytest
import torch
from helpers import generator_of, relative
from liger_kernel.chunked_loss import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearGRPOLoss,
    LigerFusedLinearJSDLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")

S, T, H, REF_H, V = 6, 5, 8, 6, 37


class Batch:
    """Hidden states, weight and bias of both sides in float32; labels with ignored tokens, aligned; another set for an NLL."""

    def __init__(self, seed=0):
        g = generator_of(seed)

        def side(width):
            return [torch.randn(s, generator=g) * 0.6 for s in ((S, T, width), (V, width), (V,))]

        self.leaves, self.ref = [x.requires_grad_() for x in side(H)], side(REF_H)
        self.doubles = [x.detach().double().requires_grad_() for x in self.leaves]
        self.policy, self.reference = fl.Hidden(*self.doubles), fl.Hidden(*(x.double() for x in self.ref))
        self.ids = torch.randint(0, V, (S, T), generator=g)
        self.mask = torch.arange(T) < torch.tensor([[5], [3], [4], [2], [5], [1]])
        self.labels = self.ids.masked_fill(~self.mask, -100)
        self.labels[0, 0] = self.labels[4, 2] = -100

    def compare(self, loss, out, numbers=None):
        """Loss and gradients; and numbers of theirs, against the metrics of the twin."""
        torch.testing.assert_close(loss.double(), out.loss, rtol=1e-5, atol=1e-6)
        mine = torch.autograd.grad(out.loss * 1.5, self.doubles)
        for a, b in zip(mine, torch.autograd.grad(loss * 1.5, self.leaves), strict=True):
            assert relative(b, a) <= 2e-5
        for name, x in (numbers or {}).items():
            torch.testing.assert_close(x.double(), out.metrics[name], rtol=1e-5, atol=1e-6, msg=name)


def pair_numbers(found):
    """Of Liger's outputs: two log-probs, two mean logits, an NLL, two rewards."""
    names = {"logps/chosen": 0, "logps/rejected": 1, "rewards/chosen": 5, "rewards/rejected": 6}
    return {name: found[i].detach().mean() for name, i in names.items()}


DPO = {name: {} for name in ("sigmoid", "hinge", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")}
DPO |= {"exo_pair": {"label_smoothing": 0.05}, "robust": {"label_smoothing": 0.1}, "discopop": {"discopop_tau": 0.2}}


def test_all_losses_of_pairs_are_here():
    assert set(DPO) == LigerFusedLinearDPOLoss._SUPPORTED_LOSS_TYPES


@pytest.mark.parametrize("loss", DPO)
def test_dpo(loss):
    b = Batch()
    theirs = LigerFusedLinearDPOLoss(beta=0.3, loss_type=loss, compiled=False, **DPO[loss])
    x, weight, bias = b.leaves
    found, numbers = theirs(weight, x, b.labels, bias, *b.ref)
    out = fl.reference.preference_loss(
        b.policy, b.labels, b.reference, loss_type=loss, beta=0.3, **DPO[loss], shift=False
    )
    b.compare(found, out, pair_numbers(numbers))


def test_dpo_with_nll():
    """Liger adds alpha NLL(chosen) to DPO; here that is the loss `sft`."""
    b = Batch()
    theirs = LigerFusedLinearDPOLoss(beta=0.3, alpha=0.7, compute_nll_loss=True, compiled=False)
    x, weight, bias = b.leaves
    found, _ = theirs(weight, x, b.labels, bias, *b.ref)
    out = fl.reference.preference_loss(
        b.policy, b.labels, b.reference, loss_type=["sigmoid", "sft"], loss_weights=[1, 0.7], beta=0.3, shift=False
    )
    b.compare(found, out)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_cpo_and_simpo(alpha, smoothing):
    common = {"beta": 0.8, "label_smoothing": smoothing}
    given = {"alpha": alpha, "compute_nll_loss": alpha != 0, "compiled": False}
    for theirs, twin, own in (
        (LigerFusedLinearCPOLoss(**common, **given), fl.reference.cpo_loss, {}),
        (LigerFusedLinearSimPOLoss(gamma=0.4, **common, **given), fl.reference.simpo_loss, {"gamma": 0.4}),
    ):
        b = Batch()
        x, weight, bias = b.leaves
        found, numbers = theirs(weight, x, b.labels, bias)
        out = twin(b.policy, b.labels, cpo_alpha=alpha, shift=False, **common, **own)
        more = {"nll_loss": numbers[4]} if alpha else {}
        b.compare(found, out, pair_numbers(numbers) | more)


@pytest.mark.parametrize("everything", [False, True], ids=["completion", "prompt too"])
def test_orpo(everything):
    b = Batch()
    nll_labels = b.ids.masked_fill(~b.mask, -100) if everything else None
    x, weight, bias = b.leaves
    found, numbers = LigerFusedLinearORPOLoss(beta=0.3, compiled=False)(weight, x, b.labels, bias, nll_labels)
    out = fl.reference.orpo_loss(b.policy, b.labels, beta=0.3, nll_labels=nll_labels, shift=False)
    named = dict(zip(("nll_loss", "log_odds_ratio", "log_odds_chosen"), (numbers[4], *numbers[7:]), strict=True))
    b.compare(found, out, pair_numbers(numbers) | named)


@pytest.mark.parametrize("ref", [True, False])
def test_kto(ref):
    b = Batch()
    good, z0 = torch.tensor([True, False, False, True, True, False]), torch.tensor(0.2)
    x, weight, bias = b.leaves
    theirs = LigerFusedLinearKTOLoss(beta=0.3, use_ref_model=ref, compiled=False)
    found, numbers = theirs(x, weight, b.labels, bias, good, *(b.ref if ref else (None,) * 3), z0)
    out = fl.reference.kto_loss(
        b.policy, b.labels, b.reference if ref else None, good, beta=0.3, baseline=z0.double(), shift=False
    )
    names = ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected")
    sums = dict(zip(names, numbers[:2] + numbers[4:], strict=True))
    b.compare(found, out, {name: total / 3 for name, total in sums.items()})


GRPO = {
    "grpo": {}, "k3": {"beta": 0.2}, "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 7},
    "bnpo": {"loss_type": "bnpo", "beta": 0.2}, "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "delta": {"loss_type": "dapo", "delta": 1.5}, "cispo": {"loss_type": "cispo", "epsilon_high": 1.1, "beta": 0.2},
    "GSPO": {"importance": "sequence", "epsilon": 0.03, "beta": 0.2},
    "dapo, sequence": {"loss_type": "dapo", "importance": "sequence", "epsilon": 0.03},
    "sapo": {"loss_type": "sapo", "beta": 0.2}, "luspo": {"loss_type": "luspo", "importance": "sequence", "epsilon": 0.03},
    "vespo": {"loss_type": "vespo"},
}  # fmt: skip


@pytest.mark.parametrize("name", GRPO)
def test_grpo(name):
    b = Batch()
    o = {"loss_type": "grpo", "importance": "token", "beta": 0.0} | GRPO[name]
    low = o.get("epsilon", 0.2)
    high = o.get("epsilon_high", low)
    theirs = LigerFusedLinearGRPOLoss(
        beta=o["beta"],
        compiled=False,
        epsilon_low=low,
        epsilon_high=high,
        loss_type=o["loss_type"],
        max_completion_length=o.get("max_completion_length"),
        importance_sampling_level=o["importance"],
        temperature=0.8,
        delta=o.get("delta"),
        use_ref_model=o["beta"] != 0,
    )
    policy = fl.Hidden(*b.doubles, temperature=0.8)
    logps = fl.reference.token_stats(policy, b.labels, shift=False).logps.detach()
    old, ref = (logps + torch.randn_like(logps) * 0.3 for _ in range(2))
    advantages = torch.tensor([1.0, -0.7, 0.4, -1.2, 0.3, 0.9])
    x, weight, bias = b.leaves
    counts = b.labels != -100
    found, numbers = theirs(
        x, weight, b.ids, counts.long(), advantages, bias, ref.float() if o["beta"] else None, old.float()
    )
    out = fl.reference.grpo_loss(
        policy, b.labels, advantages, old_logps=old, ref=fl.LogProbs(ref) if o["beta"] else None, **o, shift=False
    )
    named = dict(zip(["kl"] * (o["beta"] != 0) + ["clip_ratio/region_mean"], numbers, strict=True))
    clipped = named.pop("clip_ratio/region_mean")
    clips = o["loss_type"] not in ("sapo", "vespo")
    assert 0 < clipped < 1 or not clips
    if clips and o["importance"] == "token":  # of sequences ours, as TRL's, is over these, Liger's over their tokens
        named["cispo_clip_ratio" if o["loss_type"] == "cispo" else "clip_ratio/region_mean"] = clipped
    b.compare(found, out, named)


@pytest.mark.parametrize(("temperature", "hard"), [(0.7, 0.0), (1.0, 0.4)])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_jsd(beta, temperature, hard):
    """Liger's temperature is not that of the hard part, ours is that of both: asked for together, they differ."""
    b = Batch()
    theirs = LigerFusedLinearJSDLoss(
        weight_hard_loss=hard, weight_soft_loss=0.6, beta=beta, temperature=temperature, compiled=False, chunk_size=7
    )
    x, weight, bias = b.leaves
    ref_x, ref_weight, ref_bias = b.ref
    found = theirs(x.flatten(0, 1), weight, ref_x.flatten(0, 1), ref_weight, b.labels.flatten(), bias, ref_bias)
    student, teacher = (fl.Hidden(*side, temperature=temperature) for side in (b.doubles, [t.double() for t in b.ref]))
    b.compare(
        found, fl.reference.distillation_loss(student, b.labels, teacher, beta=beta, soft=0.6, hard=hard, shift=False)
    )
