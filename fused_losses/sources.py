"""Where distributions come from, and what token_stats returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _positive(name: str, value: float | None, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number > 0{' or None' if optional else ''}, got {value!r}")


def _float_tensor(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {x.dtype}")
    return x


@dataclass(frozen=True)
class Logits:
    """Logits [..., V] with the head's options: softmax of  softcap tanh(z / softcap) * scale / temperature.

    softcap: as Gemma's final_logit_softcapping; None is none.  scale: as Cohere's logit_scale (Granite's logits_scaling
    divides: pass its inverse).  valid_vocab: only the first so many columns are tokens, the rest is padding, left out of
    the softmax and given zero gradient.
    """

    logits: Tensor
    softcap: float | None = field(default=None, kw_only=True)
    scale: float = field(default=1.0, kw_only=True)
    temperature: float = field(default=1.0, kw_only=True)
    valid_vocab: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if _float_tensor("logits", self.logits).dim() < 1 or self.logits.shape[-1] < 1:
            raise ValueError(f"logits: expected shape [..., V] with V >= 1, got {tuple(self.logits.shape)}")
        _positive("softcap", self.softcap, optional=True)
        _positive("scale", self.scale)
        _positive("temperature", self.temperature)
        v = self.logits.shape[-1]
        if self.valid_vocab is not None and (type(self.valid_vocab) is not int or not 1 <= self.valid_vocab <= v):
            raise ValueError(
                f"valid_vocab: expected an int in [1, {v}] for logits with V={v}, got {self.valid_vocab!r}"
            )

    @property
    def vocab(self) -> int:
        return self.valid_vocab or self.logits.shape[-1]

    @property
    def multiplier(self) -> float:
        return self.scale / self.temperature


@dataclass(frozen=True)
class LogProbs:
    """Precomputed log-probs of the labels: one per token, aligned with the outputs of token_stats, or (reference side of
    a preference loss) one per sequence [S], already summed."""

    logps: Tensor

    def __post_init__(self) -> None:
        _float_tensor("logps", self.logps)


Source = Tensor | Logits | LogProbs


@dataclass(frozen=True)
class TokenStats:
    """Numbers per token, float32 (float64 for float64 logits), zero where mask is False. Natural units (nats).

    logps       log p(label)                         differentiable to the policy
    ref_logps   log q(label), None without ref       differentiable to the reference if that requires grad
    divergence  {name: D(p, q)} as asked for         both
    entropy     H(p) if asked for, else None         policy
    lse         log sum_v exp z_v                    policy; None for LogProbs
    mask        label != ignore_index
    correct     the label has the highest policy logit (ties count)
    """

    logps: Tensor
    ref_logps: Tensor | None
    divergence: dict[str, Tensor]
    entropy: Tensor | None
    lse: Tensor | None
    mask: Tensor
    correct: Tensor | None


def as_source(name: str, x: Source) -> Logits | LogProbs:
    """A bare tensor means Logits."""
    if isinstance(x, Logits | LogProbs):
        return x
    if isinstance(x, Tensor):
        return Logits(x)
    raise TypeError(f"{name}: expected a tensor of logits, fl.Logits or fl.LogProbs, got {type(x).__name__}")


def check_labels(labels: object) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected an integer tensor, got {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"labels: expected integer token ids, got {labels.dtype}")
    return labels if labels.dtype in (torch.int64, torch.int32) else labels.long()  # ignore_index must not wrap around


def check_aligned(name: str, x: Logits, labels: Tensor) -> None:
    if x.logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"{name}: expected logits {[*labels.shape, 'V']} for labels {list(labels.shape)}, got {list(x.logits.shape)}"
        )
    if x.logits.device != labels.device:
        raise ValueError(f"{name}: expected logits on {labels.device} as the labels are, got {x.logits.device}")


def check_pair(policy: Logits, ref: Logits) -> None:
    if policy.logits.dtype != ref.logits.dtype:
        raise TypeError(f"ref: expected {policy.logits.dtype} as the policy has, got {ref.logits.dtype}")
    if policy.vocab != ref.vocab:
        raise ValueError(
            f"ref: expected the policy's vocabulary of {policy.vocab}, got {ref.vocab}; if one side is padded, give "
            "fl.Logits(..., valid_vocab=the number of real tokens) on that side"
        )
