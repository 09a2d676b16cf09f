"""The same losses from hidden states and head weights, as eager code, TRL, Liger-Kernel, torch and fused_losses do them.

WORKS says what the losses are, providers() who does them. All are means over tokens (dpo: over pairs), because Liger and
torch compute their gradients in the forward and would go over them once more under any other incoming gradient than 1.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WORKS = {
    "kl": "log-prob, reference log-prob and forward KL, mean(KL - log-prob)",
    "dpo": "DPO, beta 0.1, log-probs of both models",
    "fkl": "forward KL alone",
    "jsd": "Jensen-Shannon divergence, beta 0.5",
    "ce": "cross entropy, one model",
}
DPO_BETA, JSD_BETA = 0.1, 0.5

# "loss", and for kl "ref log-prob", its mean, where a provider has it.
Values = dict[str, Tensor]


class Problem:
    """Hidden states [2B, T, H] and labels [2B, T], chosen before rejected, and head weights [V, H] of two models."""

    def __init__(self, hidden: Tensor, weight: Tensor, labels: Tensor, ref_hidden: Tensor, ref_weight: Tensor):
        self.hidden, self.weight, self.labels = hidden, weight, labels
        self.ref_hidden, self.ref_weight = ref_hidden, ref_weight

    @classmethod
    def random(cls, sequences: int, length: int, width: int, vocab: int, dtype: torch.dtype, device: Any) -> Problem:
        """Logits of standard deviation 2; the reference's differ by half of that."""
        torch.manual_seed(0)
        hidden = torch.randn(sequences, length, width, device=device)
        weight = 2 * torch.randn(vocab, width, device=device) / width**0.5
        ref_hidden = (hidden + 0.35 * torch.randn_like(hidden)).to(dtype)
        ref_weight = (weight + 0.35 * weight.std() * torch.randn_like(weight)).to(dtype)
        labels = torch.randint(vocab, (sequences, length), device=device)
        return cls(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, ref_hidden, ref_weight)

    def clear_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None

    @property
    def rows(self) -> Problem:
        """Without the dimension of sequences. The hidden states are a view: their gradient goes to self.hidden."""
        return Problem(self.hidden.flatten(0, 1), self.weight, self.labels.flatten(), self.ref_hidden.flatten(0, 1),
                       self.ref_weight)  # fmt: skip


def _dpo(logps: Tensor, ref_logps: Tensor, p: Problem) -> Values:
    h_chosen, h_rejected = (logps - ref_logps).view_as(p.labels).sum(-1).tensor_split(2)
    return {"loss": -F.logsigmoid(DPO_BETA * (h_chosen - h_rejected)).mean()}


def _kl(kl: Tensor, logps: Tensor, ref_logps: Tensor) -> Values:
    return {"loss": (kl - logps).mean(), "ref log-prob": ref_logps.mean()}


def _at(x: Tensor, labels: Tensor) -> Tensor:
    return x.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def eager(work: str, p: Problem) -> Values:
    """What people write: log-softmaxes of both models, kept for the backward; half precision is upcast before them."""
    wide = torch.promote_types(p.hidden.dtype, torch.float32)
    log_p = (p.hidden @ p.weight.T).log_softmax(-1, dtype=wide)
    logps = _at(log_p, p.labels)
    if work == "ce":
        return {"loss": -logps.mean()}
    log_q = (p.ref_hidden @ p.ref_weight.T).log_softmax(-1, dtype=wide)
    if work == "dpo":
        return _dpo(logps, _at(log_q, p.labels), p)
    kl_div = partial(F.kl_div, reduction="none", log_target=True)
    if work == "jsd":
        log_m = torch.logaddexp(log_q, log_p) + torch.tensor(0.5).log()
        per_token = JSD_BETA * kl_div(log_m, log_q).sum(-1) + (1 - JSD_BETA) * kl_div(log_m, log_p).sum(-1)
        return {"loss": per_token.mean()}
    kl = kl_div(log_p, log_q).sum(-1)
    return {"loss": kl.mean()} if work == "fkl" else _kl(kl, logps, _at(log_q, p.labels))


def eager_lse(work: str, p: Problem) -> Values:
    """Careful eager code: the logits and a logsumexp in place of log-softmaxes, one softmax of the reference for the KL."""
    wide = torch.promote_types(p.hidden.dtype, torch.float32)
    z = (p.hidden @ p.weight.T).to(wide)
    lse = z.logsumexp(-1)
    logps = _at(z, p.labels) - lse
    if work == "ce":
        return {"loss": -logps.mean()}
    w = (p.ref_hidden @ p.ref_weight.T).to(wide)
    ref_lse = w.logsumexp(-1)
    ref_logps = _at(w, p.labels) - ref_lse
    if work == "dpo":
        return _dpo(logps, ref_logps, p)
    q = (w - ref_lse.unsqueeze(-1)).exp_()
    # KL(q, p) = sum q w - lse_w - sum q z + lse_z; einsum keeps no product of vocabulary size
    kl = torch.linalg.vecdot(q, w) - ref_lse - torch.einsum("...v,...v->...", q, z) + lse
    return {"loss": kl.mean()} if work == "fkl" else _kl(kl, logps, ref_logps)


def trl(work: str, p: Problem) -> Values:
    """The kernels that TRL's trainers call, without their optional outputs, each as often as the work needs one."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(hidden, weight, None, r.labels, 1.0, 32768, None, 1.0, ())[0]

    def divergence(beta: float) -> Tensor:
        return ChunkedDivergenceFunction.apply(r.hidden, r.weight, None, r.ref_hidden, r.ref_weight, None, beta)[0]

    r = p.rows
    if work in ("fkl", "jsd"):
        return {"loss": divergence(0.0 if work == "fkl" else JSD_BETA).mean()}
    policy = logps(r.hidden, r.weight)
    if work == "ce":
        return {"loss": -policy.mean()}
    with torch.no_grad():
        ref = logps(r.ref_hidden, r.ref_weight)
    return _dpo(policy, ref, p) if work == "dpo" else _kl(divergence(0.0), policy, ref)


def liger_chunked(work: str, p: Problem, compiled: bool) -> Values:
    """The chunked losses, plain torch. kl: its soft and hard loss, one scalar without the reference log-prob."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearJSDLoss

    if work == "dpo":
        dpo = LigerFusedLinearDPOLoss(beta=DPO_BETA, compiled=compiled)
        return {"loss": dpo(p.weight, p.hidden, p.labels, ref_input=p.ref_hidden, ref_weight=p.ref_weight)[0]}
    r = p.rows
    beta = JSD_BETA if work == "jsd" else 0.0
    loss = LigerFusedLinearJSDLoss(float(work == "kl"), 1.0, beta, compiled=compiled)
    return {"loss": loss(r.hidden, r.weight, r.ref_hidden, r.ref_weight, r.labels)}


def liger_triton(work: str, p: Problem) -> Values:
    """The Triton losses."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    r = p.rows
    if work == "ce":
        return {"loss": LigerFusedLinearCrossEntropyLoss()(r.weight, r.hidden, r.labels)}
    jsd = LigerFusedLinearJSD(JSD_BETA if work == "jsd" else 0.0)
    return {"loss": jsd(r.hidden, r.weight, r.ref_hidden, r.ref_weight, r.labels)}


def native(work: str, p: Problem) -> Values:
    """torch.nn.functional.linear_cross_entropy; without options it is the eager code."""
    r = p.rows
    options = torch.nn.LinearCrossEntropyOptions()
    return {"loss": F.linear_cross_entropy(r.hidden, r.weight, r.labels, options=options)}


def ours(work: str, p: Problem, plan: str) -> Values:
    import fused_losses as fl

    policy, ref = fl.Hidden(p.hidden, p.weight), fl.Hidden(p.ref_hidden, p.ref_weight)
    options: Any = {} if plan == "auto" else {"plan": plan}
    if work == "dpo":
        return {"loss": fl.dpo_loss(policy, p.labels, ref, beta=DPO_BETA, **options).loss}
    if work == "ce":
        return {"loss": -fl.token_stats(policy, p.labels, **options).logps.mean()}
    name, hard = "js" if work == "jsd" else "forward_kl", float(work == "kl")
    out = fl.distillation_loss(policy, p.labels, ref, divergence=name, hard=hard, **options)
    assert out.stats.ref_logps is not None
    return {"loss": out.loss} | ({"ref log-prob": out.stats.ref_logps.mean()} if work == "kl" else {})


class Provider(NamedTuple):
    name: str
    values: Callable[[str, Problem], Values]
    works: str = "kl dpo fkl jsd ce"
    package: str = ""
    device: str = ""
    remarks: dict[str, str] = {}  # of a work; read only

    def why_not(self, work: str, device: torch.device) -> str:
        """The reason not to run it, or nothing."""
        try:
            importlib.metadata.version(self.package or "torch")
        except importlib.metadata.PackageNotFoundError:
            return "not installed"
        if work not in self.works.split():
            return "does not do it"
        if self.device not in ("", device.type):
            return f"needs {self.device}"
        if self.values is native and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            return "not in this torch"
        return ""


def _versioned(name: str, package: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return name


def providers(plans: list[str]) -> list[Provider]:
    """The first is what the others are compared with."""
    liger = _versioned("Liger", "liger-kernel")
    chunked = "kl dpo fkl jsd", "liger-kernel", "", {"kl": "no reference log-prob"}
    return [
        Provider("eager", eager),
        Provider("eager, logsumexp", eager_lse, "kl dpo fkl ce"),
        Provider(f"{_versioned('TRL', 'trl')} kernels", trl, package="trl", remarks={"kl": "three calls"}),
        Provider(f"{liger} chunked", partial(liger_chunked, compiled=False), *chunked),
        Provider(f"{liger} chunked, compiled", partial(liger_chunked, compiled=True), *chunked),
        Provider(f"{liger} Triton", liger_triton, "fkl jsd ce", "liger-kernel", "cuda"),
        Provider("torch linear_cross_entropy", native, "ce"),
        *(Provider(f"fused_losses, {plan}", partial(ours, plan=plan)) for plan in plans),
    ]
