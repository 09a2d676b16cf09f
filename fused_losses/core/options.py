"""The options of the losses: their names, and the checks that the losses and their reference implementations share.

fused_losses.losses and fused_losses.reference both use this module; they import nothing from each other.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Required, TypedDict

import torch
from torch import Tensor

from .batch import Batch
from .divergences import Divergence, from_key
from .dynamic_beta import DynamicBeta
from .inputs import FLOATS, LogProbs, Source, check_labels
from .names import not_one_of, shape_of, unknown
from .running_delta import RunningDelta
from .validation import Count, check_constant, check_positive, check_weights, shift_hint


class LabelOptions(TypedDict, total=False):
    """Options that say how labels are arranged, and how a call is executed; the docstring of preference_loss describes them."""

    cu_seqlens: Tensor | None
    ignore_index: int
    sequence_group: object
    plan: str
    workspace: int | None
    static_shapes: bool


class CommonOptions(LabelOptions, total=False):
    """The options that every loss takes."""

    reduction: str
    num_items: Count | None
    entropy: bool
    inplace_backward: bool


class TokenOptions(CommonOptions, total=False):
    """The options of a loss of tokens: flat labels [N] need no `shift`, all other labels do."""

    shift: bool | None
    weights: Tensor | None


class SequenceOptions(CommonOptions, total=False):
    """The options of a loss of sequences or pairs."""

    shift: Required[bool]


class BaselineOptions(LabelOptions, total=False):
    """The options of kto_baseline."""

    shift: Required[bool]


class PreferenceOptions(SequenceOptions, total=False):
    """The options of preference_loss, except its loss_type."""

    loss_weights: Sequence[float] | None
    divergence: str | Divergence
    beta: float | Tensor | DynamicBeta
    margins: Tensor | None
    weights: Tensor | None
    label_smoothing: float | Tensor | None
    discopop_tau: float
    ld_alpha: float | None
    use_weighting: bool
    num_nll_tokens: Count | None


class UPOOptions(PreferenceOptions, total=False):
    """The options of upo_loss: those of preference_loss, and those of kto_loss, bco_loss and tdpo_loss as its base."""

    desirable: Tensor
    desirable_weight: float
    undesirable_weight: float
    baseline: Tensor | float | None
    delta: RunningDelta | Tensor | float
    alpha: float


def check_per_sequence(name: str, x: object, batch: Batch, dtypes: tuple[torch.dtype, ...]) -> None:
    """Check that x is a tensor [sequences], on the device of the labels, with one of these dtypes."""
    count, device = batch.sequences, batch.labels.device
    if not isinstance(x, Tensor) or x.dtype not in dtypes:
        kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        hint = f"; pass {'x.bool()' if isinstance(x, Tensor) else f'torch.tensor({name})'}"
        raise TypeError(f"{name}: expected a {kinds} tensor, got {got}{hint if dtypes == (torch.bool,) else ''}")
    if x.shape != (count,) or x.device != device:
        raise ValueError(
            f"{name}: expected [{count}] on {device}, one for each sequence, got {list(x.shape)} on {x.device}"
        )


def token_numbers(name: str, x: object, batch: Batch, *shapes: tuple[int, ...], flags: bool = False) -> Tensor:
    """Return numbers of output tokens without a graph; raise if x is no tensor of numbers in the shape of the mask.

    shapes: others that are allowed, too. flags: bools are allowed, too, as 0 and 1.
    """
    device, shape = batch.labels.device, tuple(batch.mask.shape)
    if not isinstance(x, Tensor) or not (x.dtype in FLOATS or (flags and x.dtype == torch.bool)):
        got = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"{name}: expected a {'float or bool' if flags else 'float'} tensor, got {got}")
    if tuple(x.shape) not in (*shapes, shape) or x.device != device:
        wanted = " or ".join(str(list(s)) for s in (*shapes, shape))
        hint = shift_hint(x, shape)
        raise ValueError(f"{name}: expected {wanted} on {device}, got {list(x.shape)} on {x.device}{hint}")
    return x.detach().float() if x.dtype == torch.bool else x.detach()


# smoothing


def check_smoothing(eps: float) -> None:
    if not isinstance(eps, int | float) or not 0 <= eps < 0.5:
        raise ValueError(f"label_smoothing: expected a number in [0, 0.5), got {eps!r}")


# preference_loss

EXO_EPSILON = 1e-3  # the value that the paper of EXO recommends
SORTED = {"aot", "aot_unpaired"}  # losses that sort over the batch
UNLINKED = {"apo_zero", *SORTED}  # losses that use h itself, without a link; sft has no h
SMOOTHED = {"sigmoid", "cdpo", "robust", "exo_pair", *SORTED}  # losses that use label_smoothing
OFFSET = {"sigmoid", "cdpo", "robust", "hinge", "exo_pair", "discopop", "sigmoid_norm"}  # losses of the margin alone
SOFT = {"sigmoid", "cdpo"}  # losses that take any probability of a label, one for each pair
PER_PAIR = ("beta", "margins", "weights", "label_smoothing")  # options that may be one number for each pair


@dataclass(frozen=True)
class PairLossConfig:
    """The options of preference_loss, checked."""

    losses: tuple[tuple[str, float], ...]  # names and weights
    link: Divergence  # of f-DPO
    beta: float
    smoothing: float | None
    tau: float  # of DiscoPOP
    ld_alpha: float | None
    weighting: bool  # WPO
    per_pair: frozenset[str] = frozenset()  # which of PER_PAIR are given as tensors; beta is then 1 and smoothing None
    dynamic: DynamicBeta | None = None  # beta is then 1

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.losses}

    @property
    def unit(self) -> str:
        whole = self.names & SORTED or (self.weighting and "sft" in self.names) or self.dynamic
        return "batch" if whole else "pair"

    def epsilon(self, default: float = 0.0) -> float:
        return default if self.smoothing is None else float(self.smoothing)


def pair_loss_config(
    ref: bool,
    loss_type: str | Sequence[str],
    loss_weights: Sequence[float] | None,
    divergence: str | Divergence,
    beta: float | Tensor | DynamicBeta,
    label_smoothing: float | Tensor | None,
    discopop_tau: float,
    ld_alpha: float | None,
    use_weighting: bool,
    known: Collection[str],
    per_pair: Collection[str] = (),
) -> PairLossConfig:
    """Check the options of preference_loss and return them.

    ref: whether there is a reference. known: the names of the losses. per_pair: the options that are tensors (pair_numbers).
    """
    dynamic = beta if isinstance(beta, DynamicBeta) else None
    beta = 1.0 if isinstance(beta, Tensor | DynamicBeta) else beta
    label_smoothing = None if isinstance(label_smoothing, Tensor) else label_smoothing
    check_positive(beta=beta, discopop_tau=discopop_tau)
    link = from_key(divergence)
    link.f_dpo_link()
    if not ref and link.name != "reverse_kl":
        raise ValueError(f"divergence: {link.key!r} needs a reference, got ref=None")
    if ld_alpha is not None and not _within(ld_alpha, 0, 1):
        raise ValueError(f"ld_alpha: expected a number in [0, 1] or None, got {ld_alpha!r}")
    if not isinstance(use_weighting, bool):
        raise TypeError(f"use_weighting: expected a bool, got {use_weighting!r}")
    losses = _weighed(loss_type, loss_weights, known)
    o = PairLossConfig(
        losses=losses,
        link=link,
        beta=float(beta),
        smoothing=label_smoothing,
        tau=float(discopop_tau),
        ld_alpha=ld_alpha,
        weighting=use_weighting,
        per_pair=frozenset(per_pair),
        dynamic=dynamic,
    )
    _check_pair_smoothing(label_smoothing, o.names)
    _check_per_pair(o)
    if link.name != "reverse_kl" and (without := sorted(o.names & UNLINKED)):
        raise ValueError(f"divergence: loss_type {without[0]!r} has no f-DPO form, got {link.key!r}")
    if use_weighting and (without := sorted(o.names & SORTED)):
        raise ValueError(f"use_weighting: loss_type {without[0]!r} sorts over the batch, its pairs cannot be weighted")
    return o


def pair_numbers(batch: Batch, **given: object) -> dict[str, Tensor]:
    """Return those options of preference_loss that are tensors, one number for each of the 2B sequences, without a graph.

    The numbers are repeated: those of the pairs for the chosen sequences, and again for the rejected ones.
    """
    pairs, device, found = batch.sequences // 2, batch.labels.device, {}
    for name, x in given.items():
        if isinstance(x, Tensor):
            one = name == "beta" and x.dim() == 0
            if x.dtype not in FLOATS or not (one or tuple(x.shape) == (pairs,)) or x.device != device:
                wanted = (
                    f"a number or a float tensor [{pairs}]" if name in ("beta", "label_smoothing") else f"[{pairs}]"
                )
                got = f"{x.dtype} {list(x.shape)} on {x.device}"
                raise ValueError(f"{name}: expected {wanted} on {device}, one for each pair, got {got}")
            found[name] = x.detach().expand(pairs).repeat(2)
        elif name in ("margins", "weights") and x is not None:
            raise TypeError(f"{name}: expected a float tensor [{pairs}], one for each pair, got {type(x).__name__}")
    bounds = {"beta": lambda x: x > 0, "weights": lambda x: x >= 0, "label_smoothing": lambda x: (x >= 0) & (x <= 1)}
    words = {"beta": "> 0", "weights": ">= 0", "label_smoothing": "in [0, 1]"}
    if device.type == "cpu" and not torch.compiler.is_compiling():
        for name, inside in bounds.items():
            if name in found and not inside(found[name]).all():
                raise ValueError(f"{name}: expected numbers {words[name]}, got {found[name].tolist()[:9]}")
    return found


def _check_per_pair(o: PairLossConfig) -> None:
    """Raise for options with a number for each pair beside a loss that cannot read them."""
    names = o.names - {"sft"}
    if o.dynamic and (without := sorted(names & SORTED)):
        raise ValueError(f"beta: loss_type {without[0]!r} sorts over the batch, and takes no fl.DynamicBeta")
    if o.dynamic and "weights" in o.per_pair:
        raise ValueError("weights: beside fl.DynamicBeta expected None, for the margins of the batch are not weighted")
    if o.per_pair and (without := sorted(names & SORTED)):
        raise ValueError(
            f"{min(o.per_pair)}: loss_type {without[0]!r} sorts over the batch, and takes no tensor of pairs"
        )
    if "margins" in o.per_pair and (without := sorted(names - OFFSET)):
        raise ValueError(f"margins: read by {', '.join(sorted(OFFSET))}; got loss_type {without[0]}")
    if "label_smoothing" in o.per_pair and not names & SMOOTHED <= SOFT:
        without = sorted(names & SMOOTHED - SOFT)
        raise ValueError(f"label_smoothing: loss_type {without[0]!r} takes one number, got a tensor")
    if "label_smoothing" in o.per_pair and not names & SOFT:
        raise ValueError(
            f"label_smoothing: a tensor is read by {', '.join(sorted(SOFT))}; got loss_type {', '.join(sorted(names))}"
        )
    if "weights" in o.per_pair and "sft" in o.names:
        raise ValueError("weights: loss_type 'sft' is a mean over tokens; its pairs cannot be weighted")


def _weighed(
    loss_type: str | Sequence[str], weights: Sequence[float] | None, known: Collection[str]
) -> tuple[tuple[str, float], ...]:
    names = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
    for name in names:
        if name == "dpo":
            raise ValueError("loss_type: unknown name 'dpo'; the loss of DPO is 'sigmoid', as in TRL")
        if name not in known:
            raise unknown("loss_type", name, known)
    if not names:
        raise ValueError("loss_type: expected a name or a sequence of names, got none")
    weights = [1.0] * len(names) if weights is None else weights
    if not isinstance(weights, Sequence) or not all(_within(w, -math.inf, math.inf) for w in weights):
        raise TypeError(f"loss_weights: expected a sequence of numbers, got {weights!r}")
    if len(weights) != len(names) or not all(map(math.isfinite, weights)):
        raise ValueError(f"loss_weights: expected {len(names)} finite numbers, one for each loss, got {list(weights)}")
    return tuple(zip(names, map(float, weights), strict=True))


def _within(x: object, low: float, high: float) -> bool:
    return isinstance(x, int | float) and low <= x <= high


def _check_pair_smoothing(eps: float | None, names: set[str]) -> None:
    if eps is None:
        return
    check_smoothing(eps)
    if eps == 0 and "exo_pair" in names:
        raise ValueError("label_smoothing: loss_type 'exo_pair' needs a number in (0, 0.5), got 0: its paper has 1e-3")
    if eps > 0 and not names & SMOOTHED:
        raise ValueError(
            f"label_smoothing: read by {', '.join(sorted(SMOOTHED))}; got loss_type {', '.join(sorted(names))}"
        )


# tdpo_loss

TDPO_LOSSES = ("tdpo1", "tdpo2")


def check_tdpo(
    policy: Source, ref: Source, loss_type: str, alpha: float, beta: float, divergence: str | Divergence
) -> Divergence:
    for name, x in (("policy", policy), ("ref", ref)):
        if x is None or isinstance(x, LogProbs):
            got = "None" if x is None else "fl.LogProbs"
            raise ValueError(f"{name}: expected fl.Hidden or logits, for TDPO's divergence needs all tokens, got {got}")
    if loss_type not in TDPO_LOSSES:
        raise not_one_of("loss_type", loss_type, TDPO_LOSSES)
    check_weights(alpha=alpha)
    check_positive(beta=beta)
    return from_key(divergence)


# simpo_loss, cpo_loss, orpo_loss, tpo_loss

CPO = ("sigmoid", "hinge", "ipo")
TPO = (*CPO, "tpo-l")
SURE = -1e-12  # the largest mean log-prob whose odds ORPO does not treat as infinite


def check_simpo(beta: float, gamma: float, alpha: float, label_smoothing: float, cpo_alpha: float) -> None:
    check_positive(beta=beta)
    check_weights(gamma=gamma, cpo_alpha=cpo_alpha)
    check_smoothing(label_smoothing)
    if not isinstance(alpha, int | float) or not abs(alpha) < float("inf"):
        raise ValueError(f"alpha: expected a finite number, got {alpha!r}")


def check_cpo(loss_type: str, beta: float, cpo_alpha: float, label_smoothing: float) -> None:
    if loss_type not in CPO:
        if loss_type == "simpo":
            raise ValueError("loss_type: for 'simpo' call fl.simpo_loss")
        raise unknown("loss_type", loss_type, CPO)
    check_positive(beta=beta)
    check_weights(cpo_alpha=cpo_alpha)
    check_smoothing(label_smoothing)
    if label_smoothing and loss_type != "sigmoid":
        raise ValueError(
            f"label_smoothing: only goes with loss_type='sigmoid', got {label_smoothing!r} with {loss_type!r}"
        )


def check_tpo(loss_type: str, beta: float, tpo_alpha: float, gamma: float | None, label_smoothing: float) -> None:
    if loss_type not in TPO:
        raise unknown("loss_type", loss_type, TPO)
    check_positive(beta=beta)
    check_weights(tpo_alpha=tpo_alpha)
    check_smoothing(label_smoothing)
    if label_smoothing and loss_type not in ("sigmoid", "tpo-l"):
        raise ValueError(
            f"label_smoothing: only goes with loss_type='sigmoid' and 'tpo-l', got {label_smoothing!r} with {loss_type!r}"
        )
    if (gamma is None) == (loss_type == "tpo-l"):
        expected = "a number with loss_type='tpo-l'" if gamma is None else f"none with loss_type={loss_type!r}"
        raise ValueError(f"gamma: expected {expected}, got {gamma!r}")
    if gamma is not None:
        check_weights(gamma=gamma)


def check_nll_labels(nll_labels: Tensor, labels: Tensor) -> Tensor:
    if not isinstance(nll_labels, Tensor) or nll_labels.shape != labels.shape:
        got = list(nll_labels.shape) if isinstance(nll_labels, Tensor) else type(nll_labels).__name__
        raise ValueError(f"nll_labels: expected token ids {list(labels.shape)} as the labels, got {got}")
    return check_labels(nll_labels)


# kto_loss, bco_loss

UNPAIRED_LOSSES = ("kto", "apo_zero_unpaired")


def check_kto(
    batch: Batch,
    desirable: Tensor,
    loss_type: str,
    baseline: Tensor | float | None,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor | float:
    """Check the options of kto_loss and return the baseline z0, which is 0.0 for baseline=None."""
    check_kto_options(loss_type, beta, desirable_weight, undesirable_weight)
    check_per_sequence("desirable", desirable, batch, (torch.bool,))
    if baseline is not None and loss_type != "kto":
        raise ValueError(f"baseline: is for loss_type='kto', got loss_type={loss_type!r}")
    return check_constant("baseline", 0.0 if baseline is None else baseline)


def check_kto_options(loss_type: str, beta: float, desirable_weight: float, undesirable_weight: float) -> None:
    """Check the options of kto_loss that can be checked without a batch."""
    if loss_type not in UNPAIRED_LOSSES:
        raise unknown("loss_type", loss_type, UNPAIRED_LOSSES)
    check_positive(beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)


def check_bco(batch: Batch, desirable: Tensor, weights: Tensor | None, beta: float) -> dict[str, Tensor]:
    """Check the options of bco_loss and return the inputs that have one entry for each sequence."""
    check_positive(beta=beta)
    check_per_sequence("desirable", desirable, batch, (torch.bool,))
    if weights is None:
        return {"desirable": desirable}
    check_per_sequence("weights", weights, batch, FLOATS)
    return {"desirable": desirable, "weights": weights.detach()}


# eaft_loss


def check_eaft(k: int, alpha: float) -> None:
    if type(k) is not int or not 2 <= k <= 128:
        raise ValueError(f"k: expected an int from 2 to 128, got {k!r}")
    check_weights(alpha=alpha)


# rebel_loss, a2po_loss


def check_regression(name: str, x: Tensor, batch: Batch, beta: float) -> Tensor:
    """Check the options of a loss that fits implied rewards to numbers of the sequences, and return these numbers."""
    check_positive(beta=beta)
    check_per_sequence(name, x, batch, FLOATS)
    return x.detach()


# cross_entropy_loss

CROSS_ENTROPY_LOSSES = ("nll", "dft")


def check_cross_entropy(loss_type: str, label_smoothing: float, z_loss: float) -> None:
    if loss_type not in CROSS_ENTROPY_LOSSES:
        raise not_one_of("loss_type", loss_type, CROSS_ENTROPY_LOSSES)
    if not isinstance(label_smoothing, int | float) or not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing!r}")
    check_weights(z_loss=z_loss)
    if loss_type == "dft" and (label_smoothing or z_loss):
        given = f"label_smoothing={label_smoothing!r}, z_loss={z_loss!r}"
        raise ValueError(f"loss_type: 'dft' has neither label_smoothing nor z_loss, got {given}")


# speculative_loss

SPECULATIVE_LOSSES = ("tv", "neg_log_acceptance", "lk_hybrid")
LEAST_ACCEPTANCE = 1e-5  # as in speculators
ETA = 3.0  # the best of the paper


def check_speculative(loss_type: str, eta: float) -> None:
    if loss_type not in SPECULATIVE_LOSSES:
        raise not_one_of("loss_type", loss_type, SPECULATIVE_LOSSES)
    check_positive(eta=eta)
    if loss_type != "lk_hybrid" and eta != ETA:
        raise ValueError(f"eta: is for loss_type='lk_hybrid', got {eta!r} beside {loss_type!r}")


# topk_distillation_loss

TAILS = ("bucket", "renormalise", "ignore")
PARTIAL = ("forward_kl", "reverse_kl", "js")  # divergences that are meaningful on a part of the tokens


def check_topk(tail: str, d: Divergence) -> None:
    if tail not in TAILS:
        raise not_one_of("tail", tail, TAILS)
    if tail == "ignore" and d.name not in PARTIAL:
        raise ValueError(f"divergence: with tail='ignore' expected one of {', '.join(PARTIAL)}, got {d.key!r}")


def check_teacher(logps: Tensor, ids: Tensor, mask: Tensor) -> None:
    for name, x, is_kind, kind in (
        ("topk_logps", logps, torch.is_floating_point, "float"),
        ("topk_ids", ids, lambda x: x.dtype in (torch.int32, torch.int64), "int32 or int64"),
    ):
        if not isinstance(x, Tensor) or not is_kind(x):
            raise TypeError(f"{name}: expected a {kind} tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.shape[:-1] != mask.shape or x.dim() != mask.dim() + 1 or x.shape[-1] < 1 or x.shape != ids.shape:
            raise ValueError(
                f"{name}: expected {shape_of(*mask.shape, 'K')} for {list(mask.shape)} tokens, got {list(x.shape)}"
            )
        if x.device != mask.device:
            raise ValueError(f"{name}: expected on {mask.device} as the labels are, got {x.device}")


# preference_matching_loss

MATCHING_LOSSES = ("entropy", "sampled")


def check_matching(batch: Batch, loss_type: str, beta: float, baseline: Tensor | None) -> dict[str, Tensor]:
    """Check the options of preference_matching_loss and return its inputs that have one entry for each sequence."""
    if loss_type not in MATCHING_LOSSES:
        raise not_one_of("loss_type", loss_type, MATCHING_LOSSES)
    check_positive(beta=beta)
    if baseline is None:
        return {}
    if loss_type == "entropy":
        raise ValueError("baseline: is for loss_type='sampled'; the entropy is not sampled")
    check_per_sequence("baseline", baseline, batch, FLOATS)
    return {"baseline": baseline.detach()}


def check_threshold(threshold: float) -> float:
    """Check that threshold is in (0, 1] and return its logarithm."""
    if not isinstance(threshold, int | float) or not 0 < threshold <= 1:
        raise ValueError(f"threshold: expected a probability in (0, 1], got {threshold!r}")
    return math.log(threshold)


# upo_loss, lta_thinker_loss


def check_advantages(advantages: Tensor | tuple[Tensor, Tensor], batch: Batch) -> Tensor:
    if isinstance(advantages, Tensor):
        check_per_sequence("advantages", advantages, batch, FLOATS)
        return advantages.detach()
    if not isinstance(advantages, tuple) or len(advantages) != 2:
        raise TypeError(f"advantages: expected a tensor or (rewards, values), got {type(advantages).__name__}")
    rewards, values = advantages
    check_per_sequence("rewards", rewards, batch, FLOATS)
    check_per_sequence("values", values, batch, FLOATS)
    return rewards.detach() - values.detach()


def check_lta_weights(weights: tuple[float, float, float]) -> None:
    if len(weights) != 3 or not all(isinstance(x, int | float) and 0 <= x < float("inf") for x in weights):
        raise ValueError(f"weights: expected three finite numbers >= 0, got {weights!r}")
