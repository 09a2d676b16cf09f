"""What is measured: losses on random hidden states or logits, each written twice.

    Workload.ours      a call of fused_losses. With fused_losses.reference in its place, in float64, it is what correct means
    Workload.formula   the same from per-token numbers (log-probs, divergences), as people write it: for every provider
                       that gives such numbers (providers.py)

All losses are means over sequences, pairs or tokens: some peers find their gradient in the forward, and go over it once more
under any other incoming gradient than 1. A new workload is one entry of WORKLOADS; a new divergence has one by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_losses as fl
from fused_losses import divergences

BETA, JSD, ETA = 0.1, 0.5, 3.0
KEPT = 64  # ids that a sampler kept at each token
TOP = 16  # ids that the policy itself prefers
Numbers = Mapping[str, Tensor]  # per token [S, T]: those of ALONE, ref_logps, and divergences by name; 0 where masked
# Numbers of the policy alone: support_logps over the ids kept, tempered_logps with a temperature for each sequence, top_mass:
# the log of the mass of its TOP largest.
ALONE = frozenset({"logps", "entropy", "support_logps", "tempered_logps", "top_mass"})


class Shape(NamedTuple):
    """Tokens in sequences of `length`, of which the first `prompt` (a share) carries no label. hidden 0: from logits."""

    rows: int
    length: int
    hidden: int
    vocab: int
    dtype: str = "float32"
    logits: str = "random"  # or "peaked", as a trained model's: most of the mass on the label and a few others
    prompt: float = 0.0

    def __str__(self) -> str:
        return "x".join(str(n) for n in (self.rows, self.hidden, self.vocab) if n)

    @property
    def counted(self) -> int:
        """Tokens with a label."""
        return self.rows // self.length * (self.length - int(self.prompt * self.length))


class Problem:
    """Policy and reference on [S, T] tokens: either hidden states and heads, or logits; for pairs, chosen sequences first.

    leaves: what asks for a gradient. saved: the reference's log-probs, computed before; the rest is for losses that want it.
    """

    def __init__(self, policy: tuple[Tensor, ...], ref: tuple[Tensor, ...], labels: Tensor, frozen: bool = False):
        self.policy_tensors, self.ref_tensors, self.labels, self.frozen = policy, ref, labels, frozen
        self.mask = labels != -100
        self.safe = labels.clamp(min=0)  # ids where code without an ignore_index looks
        self.leaves = policy[:1] if frozen else policy
        for x in policy:
            x.requires_grad_(False)
        for x in self.leaves:
            x.requires_grad_()
        # neither 0 nor the reference's own: fixed by the labels alone, so that slices of a problem have the same
        wave = (labels.double() * 0.37).sin().to(torch.float64 if policy[0].dtype == torch.float64 else torch.float32)
        self.saved = (-8 + wave).masked_fill(~self.mask, 0)
        self.old = (-8 - wave).masked_fill(~self.mask, 0)
        self.advantages = wave.sum(1).sin()
        self.desirable = torch.arange(len(labels), device=labels.device) % 2 == 0

    @classmethod
    def random(cls, shape: Shape, device: torch.device, frozen: bool = False, seed: int = 0) -> Problem:
        """Logits of standard deviation 2; the reference's differ by half of that."""
        torch.manual_seed(seed)
        sequences, dtype = shape.rows // shape.length, getattr(torch, shape.dtype)
        labels = torch.randint(shape.vocab, (sequences, shape.length), device=device)
        size = (*labels.shape, shape.hidden or shape.vocab)
        x = torch.randn(size, device=device)
        if not shape.hidden:
            x.mul_(2)
            if shape.logits == "peaked":
                x.scatter_add_(-1, labels[..., None], torch.full((*labels.shape, 1), 10.0, device=device))
            ref = (x + torch.randn_like(x)).to(dtype)
            policy: tuple[Tensor, ...] = (x.to(dtype),)
            refs: tuple[Tensor, ...] = (ref,)
        else:
            weight = 2 * torch.randn(shape.vocab, shape.hidden, device=device) / shape.hidden**0.5
            if shape.logits == "peaked":  # along the label's row of the head: its logit is 10 more
                x += 2.5 * weight[labels]
            ref_weight = weight + 0.35 * weight.std() * torch.randn_like(weight)
            refs = ((x + 0.35 * torch.randn_like(x)).to(dtype), ref_weight.to(dtype))
            policy = (x.to(dtype), weight.to(dtype))
        labels[:, : int(shape.prompt * shape.length)] = -100
        return cls(policy, refs, labels, frozen)

    def part(self, sequences: int) -> Problem:
        """The first sequences of both halves, tensors of their own."""
        half = len(self.labels) // 2
        some = torch.cat([torch.arange(sequences // 2), half + torch.arange(sequences // 2)]).to(self.labels.device)
        (x, *head), (w, *ref_head) = (tuple(t.detach() for t in s) for s in (self.policy_tensors, self.ref_tensors))
        return Problem(
            (x[some].clone(), *(t.clone() for t in head)), (w[some], *ref_head), self.labels[some], self.frozen
        )

    def double(self) -> Problem:
        policy, ref = (tuple(t.detach().double() for t in s) for s in (self.policy_tensors, self.ref_tensors))
        return Problem(policy, ref, self.labels, self.frozen)

    @property
    def kept(self) -> Tensor:
        """Ids [S, T, KEPT] all over the vocabulary, the label among them."""
        vocab = self.policy_tensors[-1].shape[0 if self.from_hidden else -1]
        steps = torch.arange(min(KEPT, vocab), device=self.labels.device) * max(1, vocab // KEPT)
        return (self.safe.unsqueeze(-1) + steps) % vocab

    @property
    def weights(self) -> Tensor:
        """One for each token, in (0, 2)."""
        return 1 + 0.9 * (self.safe * 0.7).cos()

    @property
    def temperatures(self) -> Tensor:
        """One for each sequence [S], in (0.5, 1.5)."""
        return 1 + 0.4 * torch.arange(len(self.labels), device=self.labels.device).sin()

    @property
    def from_hidden(self) -> bool:
        return len(self.policy_tensors) == 2

    @property
    def policy(self) -> fl.Hidden | fl.Logits:
        return fl.Hidden(*self.policy_tensors) if self.from_hidden else fl.Logits(*self.policy_tensors)

    @property
    def ref(self) -> fl.Hidden | fl.Logits:
        return fl.Hidden(*self.ref_tensors) if self.from_hidden else fl.Logits(*self.ref_tensors)

    def logits(self, ref: bool = False) -> Tensor:
        """What eager code starts from."""
        x, *head = self.ref_tensors if ref else self.policy_tensors
        return x @ head[0].T if head else x

    def mean(self, x: Tensor) -> Tensor:
        """Over the tokens that count."""
        return x.masked_fill(~self.mask, 0).sum() / self.mask.sum()

    def sums(self, x: Tensor) -> Tensor:
        return x.masked_fill(~self.mask, 0).sum(-1)


class Workload(NamedTuple):
    name: str
    text: str
    ours: Callable[[Any, Problem, dict[str, Any]], Tensor]  # (fused_losses or its reference, problem, options)
    needs: tuple[str, ...]
    formula: Callable[[Numbers, Problem], Tensor]
    hidden: bool = True
    frozen: bool = False  # no gradient to the head
    kept: int = 0  # ids of each token that are read; 0: the whole vocabulary

    @property
    def ref(self) -> bool:
        """Whether the reference is a model here: not where its log-probs were saved."""
        return not ALONE.issuperset(self.needs)

    @property
    def divergence(self) -> bool:
        return not (ALONE | {"ref_logps"}).issuperset(self.needs)


# ---- formulas, as people write them ------------------------------------------------------------------------------------


def _margin(h: Tensor) -> Tensor:
    chosen, rejected = h.tensor_split(2)
    return chosen - rejected


def _dpo(n: Numbers, p: Problem) -> Tensor:
    return -F.logsigmoid(BETA * _margin(p.sums(n["logps"] - n["ref_logps"]))).mean()


def _dpo_saved(n: Numbers, p: Problem) -> Tensor:
    return -F.logsigmoid(BETA * _margin(p.sums(n["logps"] - p.saved))).mean()


def _f_dpo(n: Numbers, p: Problem) -> Tensor:
    """js: f'(u) = log(2u / (1 + u)), where h - softplus(h) would lose its slope beyond 20."""
    h = p.sums(n["logps"] - n["ref_logps"])
    return -F.logsigmoid(BETA * _margin(F.logsigmoid(h))).mean()


def _tdpo(n: Numbers, p: Problem) -> Tensor:
    h, kl = p.sums(n["logps"] - n["ref_logps"]), p.sums(n["forward_kl"])
    kl_chosen, kl_rejected = kl.tensor_split(2)
    return -F.logsigmoid(BETA * (_margin(h) - 0.5 * (kl_rejected - kl_chosen.detach()))).mean()


def _kto(n: Numbers, p: Problem) -> Tensor:
    h = BETA * (p.sums(n["logps"] - n["ref_logps"]) - KTO_BASELINE)
    return (1 - torch.sigmoid(torch.where(p.desirable, h, -h))).mean()


def _grpo(n: Numbers, p: Problem, kl: str) -> Tensor:
    ratio, a = (n["logps"] - p.old).exp(), p.advantages[:, None]
    per_token = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    if kl == "k3":
        d = n["ref_logps"] - n["logps"]
        per_token = per_token + 0.04 * (d.exp() - 1 - d)
    else:
        per_token = per_token + 0.04 * n[kl]
    return (p.sums(per_token) / p.mask.sum(-1)).mean()


def _mean_of(n: Numbers, p: Problem, name: str) -> Tensor:
    return p.mean(n[name])


def _nll(n: Numbers, p: Problem) -> Tensor:
    return -p.mean(n["logps"])


def _sft_kl(n: Numbers, p: Problem) -> Tensor:
    return p.mean(n["forward_kl"] - n["logps"])


def _nll_entropy(n: Numbers, p: Problem) -> Tensor:
    return -p.mean(n["logps"] + 0.01 * n["entropy"])


def _dft(n: Numbers, p: Problem) -> Tensor:
    return -p.mean(n["logps"].detach().exp() * n["logps"])


def _weighted(n: Numbers, p: Problem) -> Tensor:
    w = p.weights.to(n["logps"].dtype).masked_fill(~p.mask, 0)
    return -(w * n["logps"].masked_fill(~p.mask, 0)).sum() / w.sum()


def _lk_hybrid(n: Numbers, p: Problem) -> Tensor:
    tv = n["total_variation"]
    weight = (-ETA * (1 - tv.detach())).exp()
    return p.mean(weight * n["forward_kl"] + (1 - weight) * tv)


# ---- the same in our words ---------------------------------------------------------------------------------------------

KTO_BASELINE = 0.3


def _ours(name: str, *args: Callable[[Problem], Any], **fixed: Any) -> Callable[[Any, Problem, dict[str, Any]], Tensor]:
    """lib.name(policy, labels, *args of the problem, **fixed).loss"""

    def call(lib: Any, p: Problem, options: dict[str, Any]) -> Tensor:
        arguments = {k: v(p) if callable(v) else v for k, v in fixed.items()}
        return getattr(lib, name)(p.policy, p.labels, *(a(p) for a in args), shift=False, **arguments, **options).loss

    return call


def _stats(lib: Any, p: Problem, options: dict[str, Any], entropy: bool = False, divergence: str = "") -> Tensor:
    stats = lib.token_stats(
        p.policy,
        p.labels,
        p.ref if divergence else None,
        entropy=entropy,
        divergence=divergence or None,
        shift=False,
        **options,
    )
    numbers = {"logps": stats.logps, "entropy": stats.entropy} | stats.divergence
    formula = partial(_mean_of, name=divergence) if divergence else _nll_entropy if entropy else _nll
    return formula(numbers, p)


def _stats_and_kl(lib: Any, p: Problem, options: dict[str, Any]) -> Tensor:
    stats = lib.token_stats(p.policy, p.labels, p.ref, divergence="forward_kl", shift=False, **options)
    return _sft_kl({"logps": stats.logps} | stats.divergence, p)


def _support(lib: Any, p: Problem, options: dict[str, Any]) -> Tensor:
    stats = lib.token_stats(p.policy, p.labels, support=fl.Support(p.kept), shift=False, **options)
    return -p.mean(stats.logps)


def _tempered(lib: Any, p: Problem, options: dict[str, Any]) -> Tensor:
    policy = fl.Hidden(*p.policy_tensors, temperature=p.temperatures)
    return -p.mean(lib.token_stats(policy, p.labels, shift=False, **options).logps)


def _top(lib: Any, p: Problem, options: dict[str, Any]) -> Tensor:
    """The ids, their logits, which have gradients, and the lse of all logits."""
    ids = lib.topk(p.policy, TOP, **{k: v for k, v in options.items() if k == "workspace"}).ids
    first = ids[..., 0].masked_fill(~p.mask, -100)
    top = lib.token_stats(p.policy, first, support=fl.Support(ids), shift=False)
    return -p.mean(top.lse - lib.token_stats(p.policy, p.labels, shift=False, **options).lse)


def _negative(n: Numbers, p: Problem, name: str) -> Tensor:
    return -p.mean(n[name])


def _ref(p: Problem) -> fl.Hidden | fl.Logits:
    return p.ref


def _saved(p: Problem) -> fl.LogProbs:
    return fl.LogProbs(p.saved)


_GRPO = {"old_logps": lambda p: p.old, "ref": _ref, "beta": 0.04}
_dpo_call, _both = _ours("dpo_loss", _ref, beta=BETA), ("logps", "ref_logps")
_tdpo_call = _ours("tdpo_loss", _ref, beta=BETA, alpha=0.5)
_f_dpo_call = _ours("dpo_loss", _ref, beta=BETA, divergence="js(beta=0.5)")
_jsd_call = _ours("distillation_loss", _ref, beta=JSD)
_kept = partial(_negative, name="support_logps")
_PER_TOKEN, _FOR_KL = "log-prob and forward KL of every token, for a loss of the caller's", ("logps", "forward_kl")

WORKLOADS = [
    Workload("ce", "cross entropy, one model", _ours("cross_entropy_loss"), ("logps",), _nll),
    Workload("dpo", "DPO, log-probs of both models", _dpo_call, _both, _dpo),
    Workload("dpo saved", "DPO, reference log-probs computed before", _ours("dpo_loss", _saved, beta=BETA), ("logps",),
             _dpo_saved),
    Workload("dpo frozen", "DPO, no gradient to the head", _dpo_call, _both, _dpo, frozen=True),
    Workload("f-dpo", "f-DPO with the Jensen-Shannon link", _f_dpo_call, _both, _f_dpo),
    Workload("tdpo", "TDPO2: log-probs and forward KL of both models", _tdpo_call, (*_both, "forward_kl"), _tdpo),
    Workload("kto", "KTO with a given baseline", _ours(
        "kto_loss", _ref, lambda p: p.desirable, beta=BETA, baseline=KTO_BASELINE), _both, _kto),
    Workload("grpo k3", "GRPO with the k3 estimate of the KL", _ours(
        "grpo_loss", lambda p: p.advantages, kl="k3", **_GRPO), _both, partial(_grpo, kl="k3")),
    Workload("grpo kl", "GRPO with the exact reverse KL", _ours(
        "grpo_loss", lambda p: p.advantages, kl="reverse_kl", **_GRPO), ("logps", "reverse_kl"),
             partial(_grpo, kl="reverse_kl")),
    Workload("fkl", "distillation, forward KL", _ours("distillation_loss", _ref, divergence="forward_kl"), ("forward_kl",),
             partial(_mean_of, name="forward_kl")),
    Workload("jsd", "distillation, Jensen-Shannon (GKD, beta 0.5)", _jsd_call, ("js",), partial(_mean_of, name="js")),
    Workload("sft + kl", "log-prob and forward KL: SFT beside distillation", _ours(
        "distillation_loss", _ref, divergence="forward_kl", hard=1.0), ("logps", "forward_kl"), _sft_kl),
    Workload("sft + kl frozen", "the same, no gradient to the head", _ours(
        "distillation_loss", _ref, divergence="forward_kl", hard=1.0), ("logps", "forward_kl"), _sft_kl, frozen=True),
    Workload("token_stats", _PER_TOKEN, _stats_and_kl, _FOR_KL, _sft_kl),
    Workload("dft", "cross entropy weighted by the probability of the token", _ours("cross_entropy_loss", loss_type="dft"),
             ("logps",), _dft),
    Workload("ce weights", "cross entropy with a weight for each token", _ours(
        "cross_entropy_loss", weights=lambda p: p.weights), ("logps",), _weighted),
    Workload("logp temperatures", "log-prob with a temperature for each sequence", _tempered, ("tempered_logps",),
             partial(_negative, name="tempered_logps")),
    Workload("lk_hybrid", "a draft model for speculative decoding", _ours("speculative_loss", _ref, loss_type="lk_hybrid"),
             ("total_variation", "forward_kl"), _lk_hybrid),
    Workload("topk", f"mass of the {TOP} tokens that the model itself prefers", _top, ("top_mass",),
             partial(_negative, name="top_mass")),
    Workload("support", f"log-prob over {KEPT} ids that a sampler kept", _support, ("support_logps",), _kept, kept=KEPT),
    Workload("support frozen", "the same, no gradient to the head", _support, ("support_logps",), _kept, frozen=True,
             kept=KEPT),
    Workload("logits: token_stats", _PER_TOKEN, _stats_and_kl, _FOR_KL, _sft_kl, hidden=False),
    Workload("logits: logp", "log-prob", _stats, ("logps",), _nll, hidden=False),
    Workload("logits: logp + entropy", "log-prob and entropy", partial(_stats, entropy=True), ("logps", "entropy"),
             _nll_entropy, hidden=False),
    *(Workload(f"logits: {name}", f"{name}, default parameters", partial(_stats, divergence=divergences.get(name).key), (name,),
               partial(_mean_of, name=name), hidden=False) for name in divergences.names()),
    Workload("logits: dpo", "DPO, log-probs of both models", _dpo_call, _both, _dpo, hidden=False),
    Workload("logits: f-dpo", "f-DPO with the Jensen-Shannon link", _f_dpo_call, _both, _f_dpo, hidden=False),
    Workload("logits: tdpo", "TDPO2: log-probs and forward KL", _tdpo_call, (*_both, "forward_kl"), _tdpo, hidden=False),
]  # fmt: skip
BY_NAME = {w.name: w for w in WORKLOADS}


# ---- what they cannot do without ---------------------------------------------------------------------------------------


def compulsory(w: Workload, shape: Shape) -> tuple[int, int, int]:
    """Bytes of the forward and of the backward, and floating-point operations of both (not counted from logits).

    `kept` ids of each token are all that is read of the head or of the logits, where that is less.

    From logits every logit of a row that counts is read once in each direction (the reference's in the backward only for a
    divergence), and every gradient written once. From hidden states: operands read once, gradients written once; and a
    product of rows, H and V for each model's logits, for dX, and for dW where the head learns.
    """
    size, n = getattr(torch, shape.dtype).itemsize, shape.counted
    if not w.hidden:
        row = shape.vocab * size
        return n * (1 + w.ref) * row, (n * (1 + w.divergence) + shape.rows) * row, 0
    kept = w.kept or shape.vocab
    states, head = n * shape.hidden * size, shape.vocab * shape.hidden * size
    read = min(n * kept, shape.vocab) * shape.hidden * size
    written = shape.rows * shape.hidden * size + (0 if w.frozen else head)
    products = 2 + w.ref + (not w.frozen)
    return (states + read) * (1 + w.ref), written, 2 * products * n * shape.hidden * kept
