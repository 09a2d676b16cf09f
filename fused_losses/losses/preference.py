"""Preference losses of (chosen, rejected) pairs: all of preference_loss except the formulas (pair_losses.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from torch import Tensor

from ..core.batch import read_batch, read_options
from ..core.divergences import Divergence
from ..core.dynamic_beta import DynamicBeta
from ..core.inputs import LogProbs, Source, as_source
from ..core.options import PairLossConfig, PreferenceOptions, SequenceOptions, pair_loss_config, pair_numbers
from ..core.outputs import LossOutput, Part
from ..core.validation import Count, read_count
from ..engine.evaluate import FormulaInputs
from ..engine.tokens import Tokens
from .pair_losses import LOSSES, Pairs, apply_ld_alpha, betas, weighted_sum, wpo_weights
from .registry import register, takes
from .shared import Fused, fused, loss_and_nll, output, pair_metrics

__all__ = ["LOSSES", "dpo_loss", "ipo_loss", "preference_loss"]


@register(
    PreferenceOptions,
    batch="pairs",
    source="2305.18290, 2309.16240",
    ref="optional",
    variants={
        **{name: {"loss_type": name} for name in LOSSES},
        **{
            f"{name}, smoothed": {"loss_type": name, "label_smoothing": 0.1}
            for name in ("cdpo", "robust", "exo_pair", "aot")
        },
        "discopop, tau 1": {"loss_type": "discopop", "discopop_tau": 1.0},
        "LD-DPO": {"ld_alpha": 0.3},
        "MPO": {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)},
        "many": {"loss_type": ("hinge", "discopop", "exo_pair", "ipo", "aot"), "ld_alpha": 0.5, "beta": 0.5},
    },
)
def preference_loss(
    policy: Source,
    labels: Tensor,
    ref: Source | None,
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    divergence: str | Divergence = "reverse_kl",
    beta: float | Tensor | DynamicBeta = 0.1,
    margins: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float | Tensor | None = None,
    discopop_tau: float = 0.05,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    num_nll_tokens: Count | None = None,
    **options: Unpack[SequenceOptions],
) -> LossOutput:
    """Compute a preference loss of (chosen, rejected) pairs without a temporary tensor of vocabulary size.

    The gradient needs no such temporary tensor either. With

        h = sum_t log p(y_t) - log q(y_t)        m = beta (s_w - s_l)        lsg = log sigmoid        eps = label_smoothing

    for p the policy, q the reference, w chosen and l rejected, and with s = s(h), which is h except in f-DPO, the losses are
    those of TRL under TRL's names:

        sigmoid       -(1 - eps) lsg(m) - eps lsg(-m)                               DPO 2305.18290; cdpo is another name of it
        robust        [-(1 - eps) lsg(m) + eps lsg(-m)] / (1 - 2 eps)               2403.00409
        hinge         max(0, 1 - m)                                                 SLiC-HF 2305.10425, RSO 2309.06657
        exo_pair      KL((sigmoid(m), sigmoid(-m)) || (1 - eps, eps))               2402.00856 eq. 16, eps = 1e-3 unless given
        discopop      -(1 - c) lsg(m) + c e^-m,  c = sigmoid(m / discopop_tau)      2406.08414 eq. 5
        ipo           (s_w / |y_w| - s_l / |y_l| - 1 / (2 beta))^2                  2310.12036; its eq. 17 has no lengths
        sigmoid_norm  -lsg(beta (s_w / |y_w| - s_l / |y_l|))                        Tulu 3 2411.15124
        nca_pair      -lsg(beta s_w) - lsg(-beta s_w) / 2 - lsg(-beta s_l) / 2      2402.05369
        bco_pair      -lsg(beta s_w) - lsg(-beta s_l)                               2404.04656, without the moving baseline
        sppo_hard     (s_w - 1 / (2 beta))^2 + (s_l + 1 / (2 beta))^2               2405.00675 eq. 4.7
        apo_zero      sigmoid(-beta h_w) + sigmoid(beta h_l)                        2408.06266 eq. 7
        apo_down      sigmoid(beta h_w) + sigmoid(-m)                               2408.06266 eq. 8
        aot           sigmoid of beta d, d = sort(log p_w - log p_l) - sort(log q_w - log q_l) over the batch    2406.05882
        aot_unpaired  the same, d = sort(h_w) - sort(h_l)
        sft           -log p(y_w), the mean over all chosen tokens of the batch     RPO 2404.19733 is sigmoid + sft

    Each pair has one loss, and the loss of the batch is their mean. For aot and aot_unpaired, pair i is the i-th of the
    sorted values. For sft, the loss of a pair is B / (chosen tokens of the batch) times the sum over its own tokens, so that
    the mean over pairs is the mean over tokens. Several losses are added as sum_i loss_weights[i] loss_i.

    Scores are reduced by their value at h = 0: a policy that is equal to its reference has the score 0, and the constant of
    f' matters only where the scores do not enter as s_w - s_l. TRL 1.16 does the same; some older versions kept the
    constants.

    TRL 1.16 differs in these points: alpha(a) here is that of f-DPO, and TRL's f_alpha_divergence_coef is 1 - a. TRL's
    `sigmoid` ignores label_smoothing, and its exo_pair has no default for it. TRL does not accept f-divergences for apo_zero,
    aot and aot_unpaired, nor for nca_pair, bco_pair, sppo_hard and apo_down. For the last four, older versions of TRL
    accepted them, and they use the scores here.

    Args:
        policy: as in token_stats, with hidden states [2B, T, H] or logits [2B, T, V], the B chosen rows first and the B
            rejected rows second; or packed, [total, H] or [total, V], with cu_seqlens.
        labels: token ids [2B, T], or packed [total].
        ref: as policy; or fl.LogProbs per token or per sequence [2B]; or None: h is then the policy's log-prob alone.
        loss_type: a name in fused_losses.losses.LOSSES, or several.
        loss_weights: a number for each loss. None: 1 each.
        divergence: s is the f-DPO link (2309.16240) of this divergence: s(h) = f'(e^h). apo_zero, aot and aot_unpaired have
            none.
        beta: > 0; a number, or a tensor with one for each pair [B], or one of the batch [], without a gradient. Or a
            fl.DynamicBeta, which is updated with the margins of the batch and then used; "row_blocks" is then not possible.
        margins: [B], a number that each pair's m must exceed: m - margins takes the place of m (ODPO, 2402.10571). For losses
            that are functions of m alone, and sigmoid_norm. None: 0.
        weights: [B], >= 0, without a gradient: the losses are multiplied by them, and the mean is divided by their sum;
            num_items divides by any other number. Metrics are not weighted. Not beside sft. None: 1.
        label_smoothing: eps, in [0, 0.5), not 0 for exo_pair. aot and aot_unpaired also use it, as cDPO does. For sigmoid and
            cdpo it may be a tensor [B] in [0, 1]: soft labels, the probability that the rejected response is the better one.
        discopop_tau: > 0.
        ld_alpha: a number in [0, 1] for LD-DPO (2409.06411), or None: on both sides, log-probs of tokens beyond the length of
            the pair's shorter response are multiplied by it. Lengths and sft do not change.
        use_weighting: WPO (2406.11827 eq. 2): each pair is weighted with the product over both responses of
            exp(mean_t(log p(y_t) - log sum_v p_v^2)), without a gradient and, as in TRL, without a bound. Not for aot and
            aot_unpaired; sft is weighted after its mean.
        reduction: "mean" over pairs, "sum", or "none" ([B]).
        num_items: with "mean", divide the sum by this number instead of B: the number of pairs of the whole batch, when
            gradients accumulate. A number >= 0, or a tensor of one element on the CPU or on the device of the loss, whose
            value is not checked. 0 means that nothing counts in the whole batch: the loss and all gradients are 0, whatever
            the sum is.
        num_nll_tokens: the same for sft: the number of chosen tokens of the whole batch. None: each micro-batch has its own
            mean.
        cu_seqlens: int offsets [2B + 1] of the packed sequences, chosen first. On a GPU they are not read on the host.
        shift: required. True: labels are the input ids, as for Hugging Face models, and position t is scored on label t + 1.
            False: labels hold the token that each position predicts.
        ignore_index: tokens with this label are ignored and get zero gradient. -100 unless given.
        sequence_group: a torch.distributed.ProcessGroup. The time axis is split over its ranks (sequence or context
            parallel), in their order: labels are [2B, T_rank], slices of any length; or packed, this rank's run of the
            tokens, with the cu_seqlens of all tokens. Shift the labels before you split them (shift=True raises). Inputs per
            token, also fl.LogProbs, are this rank's. Inputs per sequence are complete on every rank, and so are loss and
            metrics. stats, and with reduction="none" losses of tokens, are this rank's. A rank gets the gradient at its own
            hidden states. Gradients of weights are partial and must be summed over the group: for engines that average them
            (DDP, FSDP), multiply the loss by the size of the group. The ranks exchange a few numbers for each token.
            static_shapes=True assumes slices of equal length and does not check it; torch.compile(fullgraph=True) needs it.
        entropy: also report the policy's mean entropy per token.
        inplace_backward: as in token_stats.
        plan: for hidden states: as in token_stats, and "row_blocks": blocks of pairs, with the gradient in the forward.
            This reads cu_seqlens on the host, so "auto" chooses it for packed sequences only on a CPU. aot, aot_unpaired and
            weighted sft need all pairs at once, so "row_blocks" is not possible for them, nor with sequence_group.
        workspace: as in token_stats.
        static_shapes: as in token_stats.

    The metrics are rewards/chosen and rewards/rejected (beta h, as TRL logs them for every divergence), rewards/margins,
    rewards/accuracies, logps/chosen, logps/rejected, beta where it is a DynamicBeta, and entropy if it is requested.
    """
    batch, call = read_batch(labels, "pairs", options), read_options(options)
    numbers = pair_numbers(batch, beta=beta, margins=margins, weights=weights, label_smoothing=label_smoothing)
    o = pair_loss_config(
        ref is not None,
        loss_type,
        loss_weights,
        divergence,
        beta,
        label_smoothing,
        discopop_tau,
        ld_alpha,
        use_weighting,
        known=LOSSES,
        per_pair=numbers,
    )
    pairs, chosen = batch.sequences // 2, read_count("num_nll_tokens", num_nll_tokens)
    if chosen is None:
        chosen = batch.count(batch.among_first(pairs)) if "sft" in o.names else 1
    times = pairs if num_nll_tokens is None or call.num_items is None else call.num_items
    if o.weighting and isinstance(as_source("policy", policy), LogProbs):
        raise ValueError("use_weighting: needs the policy's logits or hidden states, got fl.LogProbs")

    def formula(tokens: Tokens) -> Tensor:
        total = weighted_sum(Pairs(tokens, o, chosen, times))
        return total * wpo_weights(tokens) if o.weighting else total

    inputs = FormulaInputs(o.unit, per_sequence=numbers, collision=o.weighting)
    result = fused(formula, policy, batch, ref, inputs, call)
    return output(result, _parts(result, o, times, chosen))


def _parts(result: Fused, o: PairLossConfig, times: Count, chosen: Count) -> dict[str, Any]:
    """Return the parts of the metrics, and of a loss with sft, whose mean is over tokens."""
    t = result.tokens if o.ld_alpha is None else apply_ld_alpha(result.tokens, o.ld_alpha)
    parts: dict[str, Any] = {**pair_metrics(t, betas(t, o) * t.log_ratios(), t.sums(t.logps))}
    if o.dynamic:
        parts["beta"] = Part(o.dynamic.beta.expand(t.sequences // 2))
    if "sft" not in o.names or o.weighting:
        return parts
    sums, lengths = result.tokens.sums(result.tokens.logps), result.tokens.lengths
    nll = Part(-sums.tensor_split(2)[0], lengths.tensor_split(2)[0])
    return parts | loss_and_nll(result, nll, sum(weight for name, weight in o.losses if name == "sft"), times, chosen)


@takes(PreferenceOptions, "loss_type")
def dpo_loss(policy: Source, labels: Tensor, ref: Source | None, **options: Unpack[PreferenceOptions]) -> LossOutput:
    """Compute preference_loss(loss_type="sigmoid"): DPO, cDPO (label_smoothing) and f-DPO (divergence).

    The options and the metrics are those of preference_loss.
    """
    return _fixed("dpo_loss", "sigmoid", policy, labels, ref, options)


@register(PreferenceOptions, "loss_type", batch="pairs", source="2310.12036", variants={"ipo": {}}, ref="optional")
def ipo_loss(policy: Source, labels: Tensor, ref: Source | None, **options: Unpack[PreferenceOptions]) -> LossOutput:
    """Compute preference_loss(loss_type="ipo"): IPO (arXiv 2310.12036) with means over tokens, as its authors and TRL do.

    The options and the metrics are those of preference_loss; beta is the tau of the paper.
    """
    return _fixed("ipo_loss", "ipo", policy, labels, ref, options)


def _fixed(
    name: str, loss_type: str, policy: Source, labels: Tensor, ref: Source | None, options: PreferenceOptions
) -> LossOutput:
    if "loss_type" in options:
        raise TypeError(f"{name}: `loss_type` is fixed to {loss_type!r}; use preference_loss to choose another")
    return preference_loss(policy, labels, ref, loss_type=loss_type, **options)
