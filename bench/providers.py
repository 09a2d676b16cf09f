"""Who is measured: eager code, compiled eager code, torch, Liger-Kernel, TRL, cut-cross-entropy, QuACK, and fused_losses.

A provider gives per-token numbers, from which Workload.formula makes the loss, or whole losses of its own, or both. One that
is not installed, cannot run here or does not do a work says why: why_not(). Whether it is right is found out by measure.py.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_losses as fl
from bench.workloads import ALONE, BETA, JSD, KTO_BASELINE, TOP, Problem, Workload
from fused_losses import divergences

Loss = Callable[[Problem], Tensor]
# What each package is asked for, by name: importing it is no part of a first call.
MODULES = {
    "torch": ("torch._dynamo", "torch._inductor.compile_fx"),
    "liger-kernel": ("liger_kernel.chunked_loss", "liger_kernel.transformers"),
    "trl": ("trl.kernels.chunked_divergence", "trl.kernels.chunked_logprob", "trl.trainer.utils"),
    "cut-cross-entropy": ("cut_cross_entropy",),
    "quack-kernels": ("quack.linear_cross_entropy",),
}


class Provider(NamedTuple):
    """numbers(problem, names) -> {name: [S, T]}, of the names that `offers` says; losses: whole ones, by workload."""

    name: str
    package: str = "torch"
    numbers: Callable[[Problem, Sequence[str]], dict[str, Tensor]] | None = None
    offers: frozenset[str] = frozenset()
    losses: Mapping[str, Loss] | Callable[[Workload], Loss | None] = {}
    source: str = "hidden logits"
    device: str = ""  # the only one it runs on
    compiled: bool = False  # torch.compile around all of it
    compiling_s: float = 1.0  # what its first call takes on two cores, about; 0: it compiles nothing, on any device
    exact: bool = True
    ours: bool = False
    remarks: Mapping[str, str] = {}

    def why_not(self, w: Workload, device: torch.device) -> str:
        """The reason not to run it, or nothing."""
        try:
            importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"
        if ("hidden" if w.hidden else "logits") not in self.source or self._loss(w) is None:
            return "does not do it"
        if self.device not in ("", device.type):
            return f"needs {self.device}"
        return ""

    def _loss(self, w: Workload) -> Loss | None:
        if callable(self.losses):
            return self.losses(w)
        if w.name.removeprefix("logits: ") in self.losses:
            return self.losses[w.name.removeprefix("logits: ")]
        if self.numbers is None or not set(w.needs) <= self.offers:
            return None
        numbers = self.numbers
        return lambda p: w.formula(numbers(p, w.needs), p)

    def prepare(self) -> None:
        """Import what its calls would import; whatever goes wrong there will go wrong again, where it is reported."""
        for name in MODULES[self.package]:
            with contextlib.suppress(Exception):
                importlib.import_module(name)

    def loss(self, w: Workload) -> Loss:
        """As a step runs it."""
        loss = self._loss(w)
        assert loss is not None
        return torch.compile(loss, dynamic=False) if self.compiled else loss


# ---- eager code --------------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _at(x: Tensor, p: Problem) -> Tensor:
    return x.gather(-1, p.safe.unsqueeze(-1)).squeeze(-1)


def naive(p: Problem, names: Sequence[str]) -> dict[str, Tensor]:
    """What people write: log-softmaxes of both models, kept for the backward; half precision is upcast before them."""
    numbers: dict[str, Tensor] = {}
    z = p.logits()
    if "support_logps" in names:
        z = z + torch.full_like(z, -torch.inf).scatter_(-1, p.kept, 0)
    if "tempered_logps" in names:
        z = z / p.temperatures.to(z.dtype)[:, None, None]
    log_p = z.log_softmax(-1, dtype=_wide(z))
    log_q = None
    if not ALONE.issuperset(names):
        w = p.logits(ref=True)
        log_q = w.log_softmax(-1, dtype=_wide(w))
    kl_div = partial(F.kl_div, reduction="none", log_target=True)
    for name in names:
        if name.endswith("logps") and name in ALONE:
            numbers[name] = _at(log_p, p)
        elif name == "entropy":
            numbers[name] = -(log_p.exp() * log_p).sum(-1)
        elif name == "top_mass":
            numbers[name] = log_p.topk(TOP).values.logsumexp(-1)
        elif log_q is None:
            raise AssertionError(name)
        elif name == "ref_logps":
            numbers[name] = _at(log_q, p)
        elif name == "forward_kl":
            numbers[name] = kl_div(log_p, log_q).sum(-1)
        elif name == "reverse_kl":
            numbers[name] = kl_div(log_q, log_p).sum(-1)
        elif name == "js":
            half = math.log(JSD)
            log_m = torch.logaddexp(log_q + half, log_p + half)
            numbers[name] = JSD * kl_div(log_m, log_q).sum(-1) + (1 - JSD) * kl_div(log_m, log_p).sum(-1)
        else:
            numbers[name] = divergences.get(name).define(log_p, log_q)
    return numbers


def careful(p: Problem, names: Sequence[str]) -> dict[str, Tensor]:
    """Logits and a logsumexp in place of log-softmaxes; einsum keeps no product of vocabulary size."""
    z = p.logits()
    z = z.to(_wide(z))
    lse = z.logsumexp(-1)
    numbers = {"logps": _at(z, p) - lse}
    if "entropy" in names:
        numbers["entropy"] = lse - torch.einsum("...v,...v->...", (z - lse.unsqueeze(-1)).exp(), z)
    if {"ref_logps", "forward_kl"} & set(names):
        w = p.logits(ref=True)
        w = w.to(_wide(w))
        ref_lse = w.logsumexp(-1)
        numbers["ref_logps"] = _at(w, p) - ref_lse
        if "forward_kl" in names:
            q = (w - ref_lse.unsqueeze(-1)).exp_()
            numbers["forward_kl"] = torch.linalg.vecdot(q, w) - ref_lse - torch.einsum("...v,...v->...", q, z) + lse
    return numbers


# ---- TRL ---------------------------------------------------------------------------------------------------------------


def trl_hidden(p: Problem, names: Sequence[str]) -> dict[str, Tensor]:
    """The kernels that TRL's trainers call, without their optional outputs; a call for each number."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def logps(x: Tensor, weight: Tensor) -> Tensor:
        x = x.flatten(0, 1)[p.mask.flatten()]  # TRL's own caller drops rows likewise
        counted = ChunkedLogProbFunction.apply(x, weight, None, p.labels[p.mask], 1.0, 32768, None, 1.0, ())[0]
        return torch.zeros(p.mask.shape, dtype=counted.dtype, device=counted.device).masked_scatter(p.mask, counted)

    def divergence(beta: float) -> Tensor:
        (x, weight), (y, ref_weight) = p.policy_tensors, p.ref_tensors
        rows = p.mask.flatten()
        x, y = x.flatten(0, 1)[rows], y.flatten(0, 1)[rows]
        counted = ChunkedDivergenceFunction.apply(x, weight, None, y, ref_weight, None, beta)[0]
        return torch.zeros(p.mask.shape, dtype=counted.dtype, device=counted.device).masked_scatter(p.mask, counted)

    betas = {"forward_kl": 0.0, "reverse_kl": 1.0, "js": JSD}
    numbers = {name: divergence(betas[name]) for name in names if name in betas}
    if "logps" in names:
        numbers["logps"] = logps(*p.policy_tensors)
    if "ref_logps" in names:
        with torch.no_grad():
            numbers["ref_logps"] = logps(*p.ref_tensors)
    return numbers


def trl_logits(p: Problem, names: Sequence[str]) -> dict[str, Tensor]:
    """The helpers of its trainers: a Triton kernel on GPUs, rows in turn elsewhere."""
    from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy

    numbers = {}
    if "entropy" in names:
        numbers["logps"], numbers["entropy"] = selective_log_softmax_and_entropy(p.logits(), p.safe)
    elif "logps" in names:
        numbers["logps"] = selective_log_softmax(p.logits(), p.safe)
    if "ref_logps" in names:
        with torch.no_grad():
            numbers["ref_logps"] = selective_log_softmax(p.logits(ref=True), p.safe)
    return numbers


# ---- Liger-Kernel ------------------------------------------------------------------------------------------------------


def _liger_chunked(compiled: bool) -> dict[str, Loss]:
    """The chunked losses, plain torch; a chunk is a pair or a sequence, or 1024 tokens of a distillation."""

    def module(name: str, **options: Any) -> Any:
        from liger_kernel import chunked_loss

        return getattr(chunked_loss, name)(compiled=compiled, **options)

    def dpo(p: Problem) -> Tensor:
        (x, weight), (y, ref_weight) = p.policy_tensors, p.ref_tensors
        return module("LigerFusedLinearDPOLoss", beta=BETA)(weight, x, p.labels, ref_input=y, ref_weight=ref_weight)[0]

    def kto(p: Problem) -> Tensor:
        (x, weight), (y, ref_weight) = p.policy_tensors, p.ref_tensors
        kl = torch.full((1,), KTO_BASELINE, dtype=torch.float32, device=x.device)
        loss = module("LigerFusedLinearKTOLoss", beta=BETA, use_ref_model=True)
        return loss(x, weight, p.labels, None, p.desirable, y, ref_weight, None, kl)[0]

    def grpo(p: Problem) -> Tensor:
        (x, weight), (y, ref_weight) = p.policy_tensors, p.ref_tensors
        loss = module("LigerFusedLinearGRPOLoss", beta=0.04, loss_type="grpo")
        batch = (p.safe, p.mask.to(torch.int64), p.advantages)
        return loss(x, weight, *batch, old_per_token_logps=p.old, ref_input=y, ref_weight=ref_weight)[0]

    def distillation(p: Problem, beta: float, hard: float) -> Tensor:
        (x, weight), (y, ref_weight) = p.policy_tensors, p.ref_tensors
        loss = module("LigerFusedLinearJSDLoss", weight_hard_loss=hard, weight_soft_loss=1.0, beta=beta)
        return loss(x.flatten(0, 1), weight, y.flatten(0, 1), ref_weight, p.labels.flatten())

    kl = partial(distillation, beta=0.0, hard=1.0)
    frozen = {"dpo frozen": dpo, "sft + kl frozen": kl}
    return frozen | {
        "dpo": dpo,
        "kto": kto,
        "grpo k3": grpo,
        "sft + kl": kl,
        "fkl": partial(distillation, beta=0.0, hard=0.0),
        "jsd": partial(distillation, beta=JSD, hard=0.0),
    }


def _liger_triton() -> dict[str, Loss]:
    def ce(p: Problem) -> Tensor:
        from liger_kernel.transformers import LigerCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss

        x, *weight = p.policy_tensors
        labels = p.labels.flatten()
        if weight:
            return LigerFusedLinearCrossEntropyLoss()(weight[0], x.flatten(0, 1), labels)
        return LigerCrossEntropyLoss()(x.flatten(0, 1), labels)

    def jsd(p: Problem, beta: float) -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearJSD

        (x, weight), (y, ref_weight) = p.policy_tensors, p.ref_tensors
        return LigerFusedLinearJSD(beta)(x.flatten(0, 1), weight, y.flatten(0, 1), ref_weight, p.labels.flatten())

    return {"ce": ce, "logp": ce, "fkl": partial(jsd, beta=0.0), "jsd": partial(jsd, beta=JSD)}


# ---- cross entropies from hidden states: as numbers, a log-prob ---------------------------------------------------------


def _native(policy: str) -> dict[str, Loss]:
    def ce(p: Problem) -> Tensor:
        x, weight = p.policy_tensors
        how = torch.nn.LinearCrossEntropyOptions(acc_policy=policy)
        return F.linear_cross_entropy(x.flatten(0, 1), weight, p.labels.flatten(), options=how)

    return {"ce": ce}


def _cce(p: Problem, names: Sequence[str], **options: Any) -> dict[str, Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    def logps(tensors: tuple[Tensor, ...]) -> Tensor:
        return -linear_cross_entropy(*tensors, p.labels, reduction="none", **options)

    numbers = {"logps": logps(p.policy_tensors)}
    if "ref_logps" in names:
        with torch.no_grad():
            numbers["ref_logps"] = logps(p.ref_tensors)
    return numbers


def _quack(p: Problem) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    x, weight = p.policy_tensors
    return chunked_linear_cross_entropy(x.flatten(0, 1), weight, p.labels.flatten(), reduction="mean")


COMPILING_S = 15.0  # forward and backward by Inductor, and a C++ compiler where there is no GPU


# ---- ours --------------------------------------------------------------------------------------------------------------


def _ours(w: Workload, backend: str = "", **options: Any) -> Loss:
    @contextlib.contextmanager
    def chosen() -> Iterator[None]:
        before = os.environ.get("FUSED_LOSSES_BACKEND")
        if backend:
            os.environ["FUSED_LOSSES_BACKEND"] = backend
        try:
            yield
        finally:
            if backend:
                os.environ.pop("FUSED_LOSSES_BACKEND") if before is None else os.environ.update(
                    FUSED_LOSSES_BACKEND=before
                )

    def loss(p: Problem) -> Tensor:
        with chosen():
            return w.ours(fl, p, options)

    return loss


def ours(name: str, **options: Any) -> Provider:
    from_hidden = {"plan", "workspace"} & set(options) != set()
    return Provider(
        name,
        losses=lambda w: None if from_hidden and w.kept else _ours(w, **options),  # plans are for a whole vocabulary
        ours=True,
        source="hidden" if from_hidden else "hidden logits",
        device="cuda" if "backend" in options else "",
    )


@cache
def providers() -> list[Provider]:
    """All of them; the first is what the others are compared with."""
    both, careful_offers = frozenset({"logps", "ref_logps"}), frozenset({"logps", "ref_logps", "entropy", "forward_kl"})
    all_numbers = careful_offers | ALONE | set(divergences.names())
    kl = {"remarks": {"sft + kl": "no reference log-prob", "tdpo": "three calls", "grpo kl": "two calls"}}
    cce = {"package": "cut-cross-entropy", "offers": both, "source": "hidden"}
    liger = {"package": "liger-kernel", "source": "hidden", **kl}
    plain, slow = {"compiling_s": 0.0}, {"compiling_s": COMPILING_S}
    native = {"source": "hidden", **plain}
    return [
        Provider("eager", numbers=naive, offers=all_numbers, **plain),
        Provider("eager, logsumexp", numbers=careful, offers=careful_offers, **plain),
        Provider("torch.compile", numbers=naive, offers=all_numbers, compiled=True, **slow),
        Provider("torch linear_cross_entropy", losses=_native("auto"), **native),
        Provider("torch linear_cross_entropy, compact", losses=_native("compact"), **native),
        Provider("Liger chunked", losses=_liger_chunked(False), **liger, **plain),
        Provider("Liger chunked, compiled", losses=_liger_chunked(True), **liger, **slow),
        Provider("Liger Triton", "liger-kernel", losses=_liger_triton(), device="cuda"),
        Provider("TRL kernels", "trl", trl_hidden, both | {"forward_kl", "reverse_kl", "js"}, source="hidden", **kl),
        Provider("TRL helpers", "trl", trl_logits, both | {"entropy"}, source="logits"),
        Provider("cut-cross-entropy", numbers=partial(_cce, impl="cce", filter_eps=None), device="cuda", **cce),
        Provider("cut-cross-entropy, filtered", numbers=partial(_cce, impl="cce"), device="cuda", exact=False, **cce),
        Provider("cut-cross-entropy, torch.compile", numbers=partial(_cce, impl="torch_compile"), **cce, **slow),
        Provider("QuACK chunked", "quack-kernels", losses={"ce": _quack}, source="hidden", device="cuda"),
        ours("fused_losses"),
        ours("fused_losses, 16 MiB", workspace=16 << 20),
        ours("fused_losses, slices", plan="vocab_chunks"),
        ours("fused_losses, torch backend", backend="torch"),
    ]
