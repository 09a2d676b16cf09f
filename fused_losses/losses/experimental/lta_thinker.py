"""LTA-Thinker: semantic alignment and reasoning focus of latent thoughts."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from ...core.batch import read_batch, read_options
from ...core.elementwise import FAR
from ...core.inputs import FLOATS, Source
from ...core.layout import stats_dtype
from ...core.options import SequenceOptions, check_lta_weights
from ...core.outputs import LossOutput, Part
from ...core.validation import Count, check_positive, divided, read_count
from ...engine.evaluate import FormulaInputs
from ...engine.token_stats import token_stats
from ...engine.tokens import Tokens
from ..registry import register
from ..shared import fused, loss_and_nll, output, reduced, sequence_part

__all__ = ["lta_thinker_loss", "reasoning_focus_loss", "semantic_alignment_loss"]

NEVER = -FAR  # the logit of a step that does not exist: finite, so that rows without steps are not NaN


def semantic_alignment_loss(
    question: Tensor,
    thoughts: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: Count | None = None,
) -> Tensor:
    """Compute the semantic alignment loss of LTA-Thinker (arXiv 2509.12875).

    It makes latent thoughts similar in meaning to the question. For each example it is the mean over thoughts of

        KL(P || Q_j),    P = softmax(question), Q_j = softmax(thoughts_j)

    The softmax is over the H hidden dimensions, without temperature, and both sides get their gradient, as in the released
    code. An example without thoughts has the loss 0. The result is a tensor, float32 or wider.

    Args:
        question: hidden states [B, H].
        thoughts: hidden states [B, J, H], of the same dtype.
        mask: bool [B, J], the thoughts that count. None: all count.
        reduction: as in preference_loss, over examples.
        num_items: as in preference_loss, the number of examples.
    """
    _check_states(question, {"thoughts": thoughts}, {"thoughts": mask})
    count = thoughts.shape[1]
    labels = torch.zeros(thoughts.shape[:2], dtype=torch.int64, device=thoughts.device)
    labels = labels if mask is None else labels.masked_fill(~mask, -100)
    p = question[:, None].expand(-1, count, -1)  # it is not copied: strides may be 0
    kl = token_stats(thoughts, labels, p, divergence="forward_kl", shift=False).divergence["forward_kl"]
    counts = max(count, 1) if mask is None else mask.sum(1).clamp(min=1)
    return reduced(kl.sum(1) / counts, reduction, num_items)


def reasoning_focus_loss(
    question: Tensor,
    steps: Tensor,
    answers: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 0.1,
    reduction: str = "mean",
    num_items: Count | None = None,
) -> Tensor:
    """Compute the reasoning focus loss of LTA-Thinker (arXiv 2509.12875).

    It makes the question similar to the reasoning step that is closest to its answer. For each example it is

        -log softmax_s( cos(steps_s, question) / temperature )[k],    k = argmax_s cos(steps_s, answers), a constant

    which is InfoNCE with the other steps of the same example as negatives. An example without steps has the loss 0 (the
    released code adds log S, a constant). The result is a tensor, float32 or wider.

    Args:
        question: hidden states [B, H].
        steps: hidden states [B, S, H].
        answers: [B, H], the mean of the input embeddings of the answer's tokens. Only its direction matters, and it gets no
            gradient.
        mask: bool [B, S], the steps that exist. None: all exist.
        temperature: > 0.
        reduction: as in preference_loss, over examples.
        num_items: as in preference_loss, the number of examples.
    """
    _check_states(question, {"steps": steps, "answers": answers}, {"steps": mask})
    check_positive(temperature=temperature)
    wide = stats_dtype(steps)
    there = torch.ones(steps.shape[:2], dtype=torch.bool, device=steps.device) if mask is None else mask
    if steps.shape[1] == 0:
        return reduced(steps.to(wide).sum((1, 2)) + question[:, :0].to(wide).sum(1), reduction, num_items)
    c = normalize(steps.to(wide).masked_fill(~there[..., None], 0), dim=-1)  # steps that do not exist may be NaN

    def cosines(x: Tensor) -> Tensor:
        return (c * normalize(x.to(wide), dim=-1)[:, None]).sum(-1)

    to_answer = cosines(answers).detach().masked_fill(~there, NEVER)
    scores = (cosines(question) / temperature).masked_fill(~there, NEVER)
    losses = cross_entropy(scores, to_answer.argmax(-1), reduction="none")
    losses = losses + 0 * to_answer.amax(-1)  # keep a NaN, which argmax hides
    return reduced(losses.where(there.any(-1), 0), reduction, num_items)


@register(
    SequenceOptions,
    batch="sequences",
    source="2509.12875",
    variants={"": {}, "weights": {"weights": (1.0, 0.5, 0.2), "temperature": 0.3}},
    ref="unused",
    inputs={
        "question": "vector per sequence",
        "thoughts": "vectors per sequence",
        "steps": "vectors per sequence",
        "answers": "vector per sequence",
    },
)
def lta_thinker_loss(
    policy: Source,
    labels: Tensor,
    question: Tensor,
    thoughts: Tensor,
    steps: Tensor,
    answers: Tensor,
    *,
    weights: tuple[float, float, float] = (0.33, 0.33, 0.33),
    temperature: float = 0.1,
    thought_mask: Tensor | None = None,
    step_mask: Tensor | None = None,
    num_nll_tokens: Count | None = None,
    **options: Unpack[SequenceOptions],
) -> LossOutput:
    """Compute the loss of LTA-Thinker (arXiv 2509.12875).

    With the weights of the released code it is

        0.33 cross entropy + 0.33 reasoning_focus_loss + 0.33 semantic_alignment_loss

    The cross entropy is the mean over all tokens of the batch, the others are means over its sequences. Each sequence has one
    loss, with its share of the cross entropy: S / tokens times its own sum. The released code leaves out the last two terms
    in eval mode; here they are always computed.

    With sequence_group, question, thoughts and steps are those of all sequences on every rank, and get all of their gradient
    on every rank: if gradients are summed over the group, let these tensors require a gradient on one rank only.

    Args:
        policy: the language model, as in preference_loss.
        labels: token ids [S, T], or packed.
        question: as in reasoning_focus_loss, for the S sequences.
        thoughts: as in semantic_alignment_loss.
        steps: as in reasoning_focus_loss.
        answers: as in reasoning_focus_loss.
        weights: three numbers >= 0, the weights of cross entropy, reasoning focus and semantic alignment.
        temperature: as in reasoning_focus_loss.
        thought_mask: the mask of semantic_alignment_loss.
        step_mask: the mask of reasoning_focus_loss.
        num_nll_tokens: when gradients accumulate, the number of tokens that count in the whole batch.
        **options: the options of a batch, as in preference_loss; num_items is the number of sequences of the whole batch.

    The metrics are sft, reasoning_focus and semantic_alignment, before they are weighted, and entropy if it is requested.
    """
    batch, call = read_batch(labels, "sequences", options), read_options(options)
    sequences = batch.sequences
    check_lta_weights(weights)
    if isinstance(question, Tensor) and question.dim() and question.shape[0] != sequences:
        raise ValueError(f"question: expected [{sequences}, H], one for each sequence, got {list(question.shape)}")
    by, times = read_count("num_nll_tokens", num_nll_tokens), call.num_items
    by, times = (batch.count(), sequences) if by is None else (by, sequences if times is None else times)

    def formula(tokens: Tokens) -> Tensor:
        return -weights[0] * divided(tokens.sums(tokens.logps) * times, by)

    result = fused(formula, policy, batch, None, FormulaInputs("sequence"), call)
    focus = reasoning_focus_loss(question, steps, answers, mask=step_mask, temperature=temperature, reduction="none")
    alignment = semantic_alignment_loss(question, thoughts, mask=thought_mask, reduction="none")
    thought_losses, tokens = weights[1] * focus + weights[2] * alignment, result.tokens
    parts: dict[str, Any] = {"reasoning_focus": Part(focus.detach()), "semantic_alignment": Part(alignment.detach())}
    parts["sft"] = sequence_part(tokens, -tokens.logps)
    if tokens.entropy is not None:
        parts["entropy"] = sequence_part(tokens, tokens.entropy)
    losses = None if result.losses is None else result.losses + thought_losses.detach()
    result = result._replace(loss=result.loss + reduced(thought_losses, call.reduction, call.num_items), losses=losses)
    return output(result, parts | loss_and_nll(result, parts["sft"], weights[0], times, by))


def _check_states(question: Tensor, others: dict[str, Tensor], masks: dict[str, Tensor | None]) -> None:
    for name, x in ({"question": question} | others).items():
        if not isinstance(x, Tensor) or x.dtype not in FLOATS:
            raise TypeError(f"{name}: expected a float tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if question.dim() != 2:
        raise ValueError(f"question: expected [B, H], got {list(question.shape)}")
    b, h = question.shape
    for name, x in others.items():
        middle = () if name == "answers" else x.shape[1:2]
        if x.shape != (b, *middle, h) or (name != "answers" and x.dim() != 3):
            words = f"[{b}, {h}]" if name == "answers" else f"[{b}, any, {h}]"
            raise ValueError(f"{name}: expected {words} for question {[b, h]}, got {list(x.shape)}")
        if x.dtype != question.dtype or x.device != question.device:
            raise TypeError(
                f"{name}: expected {question.dtype} on {question.device} as question, got {x.dtype} on {x.device}"
            )
    for name, mask in masks.items():
        want = others[name].shape[:2]
        if mask is not None and (mask.shape != want or mask.dtype != torch.bool):
            raise ValueError(f"mask: expected bool {list(want)} as {name}, got {mask.dtype} {list(mask.shape)}")
