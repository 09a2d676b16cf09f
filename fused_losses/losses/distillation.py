"""Distillation from a teacher, token by token."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from ..core.batch import read_batch, read_options
from ..core.divergences import Divergence, from_key, get
from ..core.inputs import LogProbs, Source, as_source
from ..core.names import present
from ..core.options import TokenOptions
from ..core.outputs import LossOutput, Part
from ..core.validation import check_weights
from ..engine.evaluate import FormulaInputs
from ..engine.tokens import Tokens
from .registry import register
from .shared import Fused, fused, output, token_part

__all__ = ["distillation_loss", "sampled_distillation_loss"]


@register(
    TokenOptions,
    batch="tokens",
    source="2306.13649, 2402.03898",
    distribution=True,
    variants={
        "gkd": {},
        "gkd, beta 0": {"beta": 0.0},
        "gkd, beta 1": {"beta": 1.0},
        "with labels": {"hard": 0.5},
        "DistiLLM": {"divergence": "skew_forward_kl"},
        "ABKD": {"divergence": "alpha_beta(a=0.2, b=0.7)"},
    },
)
def distillation_loss(
    student: Source,
    labels: Tensor,
    teacher: Source,
    *,
    divergence: str | Divergence | None = None,
    beta: float = 0.5,
    soft: float = 1.0,
    hard: float = 0.0,
    **options: Unpack[TokenOptions],
) -> LossOutput:
    """Compute a knowledge distillation loss, token by token over the whole vocabulary.

    For p the student and q the teacher, it is the mean over the tokens that count (label != ignore_index) of

        soft D(p, q) - hard log p(label)

    The temperatures are those of the sources. TRL's GKD uses 0.9 for both and, as here, does not multiply by T^2.

    Args:
        student: fl.Hidden or logits [..., V].
        labels: token ids [...]. They mark the tokens that count, and are the targets of the hard part.
        teacher: fl.Hidden or logits [..., V]; its hidden size may differ from the student's.
        divergence: D, any of fl.divergences.names(). None: the generalised JSD of GKD (arXiv 2306.13649 eq. 1) with `beta`.
            Other choices are "skew_forward_kl(lam=0.1)" and "skew_reverse_kl(lam=0.1)" (DistiLLM, 2402.03898: its code leaves
            out the constant of the former, the teacher's entropy, and its js_distance(lam=0.9) is "js(beta=0.1)"), and
            "alpha_beta(a=0.2, b=0.7)" (ABKD: its ends a=1, b=0 and a=0, b=1 are "forward_kl" and "reverse_kl").
        beta: TRL's beta of the generalised JSD, in [0, 1]; only without `divergence`. 0 gives KL(teacher || student) and 1
            gives KL(student || teacher), which are not the limits of the values between. These give js(beta) =
            beta KL(teacher || m) + (1 - beta) KL(student || m), with m = beta teacher + (1 - beta) student.
        soft: the weight of the divergence.
        hard: the weight of the negative log-likelihood of the labels.
        weights: one for each output token, numbers or bools >= 0, without a gradient ([..., T - 1] with shift). The losses are
            multiplied by them, and the mean is divided by their sum instead of the number of tokens; num_items divides by any
            other number. Metrics are not weighted. None: 1.
        **options: the options of a batch, as in preference_loss.

    The metrics are means over the tokens: kl (the divergence), logps, and entropy if it is requested.
    """
    if divergence is not None and beta != 0.5:
        raise ValueError(f"beta: is of GKD's divergence, got {beta!r} beside divergence={divergence!r}")
    d = _gkd(beta) if divergence is None else from_key(divergence)
    check_weights(soft=soft, hard=hard)
    if teacher is None or isinstance(teacher, LogProbs):
        got = "None" if teacher is None else "fl.LogProbs"
        raise ValueError(
            f"teacher: expected fl.Hidden or logits, whose whole distribution the divergence needs, got {got}"
        )

    def formula(tokens: Tokens) -> Tensor:
        return soft * tokens.divergence[d.key] - hard * tokens.logps

    batch = read_batch(labels, "tokens", options)
    result = fused(
        formula, student, batch, teacher, FormulaInputs("token", (d,)), read_options(options), options.get("weights")
    )
    return output(result, token_means(result, kl=result.tokens.divergence[d.key]))


@register(TokenOptions, batch="tokens", source="TRL", variants={"reverse": {}})
def sampled_distillation_loss(
    student: Source, labels: Tensor, teacher: Source, **options: Unpack[TokenOptions]
) -> LossOutput:
    """Compute the reverse KL of tokens that the student sampled, from the log-probs of these tokens alone.

    For p the student and q the teacher, it is the mean over the tokens that count (label != ignore_index) of

        sg(log p(label) - log q(label)) log p(label)

    sg(x) is x without a gradient. The expectation of the gradient over samples of p is the gradient of KL(p || q) (TRL's SDPO
    and SDFT with distillation_mode "sampled_token"; on-policy distillation). The value of the loss has no meaning by itself:
    read the metric kl.

    Args:
        student: fl.Hidden, logits [..., V] or fl.LogProbs [...].
        labels: the sampled tokens [...].
        teacher: as student. It gets no gradient.
        weights: one for each output token, numbers or bools >= 0, without a gradient ([..., T - 1] with shift). The losses are
            multiplied by them, and the mean is divided by their sum instead of the number of tokens; num_items divides by any
            other number. Metrics are not weighted. None: 1.
        **options: the options of a batch, as in preference_loss.

    The metrics are means over the tokens: kl (log p - log q, an estimate of KL(p || q)), logps, and entropy if it is
    requested.
    """
    as_source("teacher", teacher)

    def formula(tokens: Tokens) -> Tensor:
        return _ratio(tokens).detach() * tokens.logps

    batch = read_batch(labels, "tokens", options)
    result = fused(
        formula, student, batch, teacher, FormulaInputs("token"), read_options(options), options.get("weights")
    )
    return output(result, token_means(result, kl=_ratio(result.tokens)))


def _ratio(tokens: Tokens) -> Tensor:
    return tokens.logps - present("teacher", tokens.ref_logps).to(tokens.logps.dtype)


def _gkd(beta: float) -> Divergence:
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected a number in [0, 1], got {beta!r}")
    return get("forward_kl") if beta == 0 else get("reverse_kl") if beta == 1 else get("js", beta=beta)


def token_means(result: Fused, **numbers: Tensor) -> dict[str, Part]:
    """Return parts of `numbers`, log-probs and, if there is one, entropy: means over the tokens that count."""
    tokens = result.tokens
    numbers |= {"logps": tokens.logps} | ({} if tokens.entropy is None else {"entropy": tokens.entropy})
    return {name: token_part(result, x) for name, x in numbers.items()}
