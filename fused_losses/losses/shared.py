"""What the losses share: their result, reductions, and checks of options and batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.divergences import Divergence
from ..core.inputs import Source, TokenStats, ordinary
from ..core.layout import shift_packed
from ..engine.evaluate import Formula, Tokens, evaluate
from ..engine.prepare import How
from ..engine.shards import Span
from ..engine.token_stats import labels_mask


class Part(NamedTuple):
    """What a metric is made of, unit by unit: a unit is a pair, a sequence, or a row of tokens.

    Metrics of several batches (micro-batches, ranks, an evaluation) cannot be averaged, for batches hold different numbers of
    pairs and tokens. Amounts and counts can be added up, and units that count twice can be left out.
    """

    amounts: Tensor  # [units, ...], no graph, 0 where nothing counts
    # [units, ...]: what the sum of the amounts is divided by the sum of; None: 1 for each unit
    counts: Tensor | None = None
    kind: str = "mean"  # 0 where the counts are 0; "mean or nan": NaN there; "sum": it is not divided

    def value(self) -> Tensor:
        total = self.amounts.sum()
        if self.kind == "sum":
            return total
        if self.counts is None:
            return total / max(len(self.amounts), 1)
        count = self.counts.sum()
        return total / (count if self.kind == "mean or nan" else count.clamp(min=1))

    def sums(self, dtype: torch.dtype) -> Tensor:
        """[2]: of the amounts and of the counts."""
        total = self.amounts.sum()
        count = torch.full_like(total, len(self.amounts)) if self.counts is None else self.counts.sum()
        return torch.stack([total.to(dtype), count.to(dtype)])

    def first(self, kept: int, of: int) -> Part:
        """Without the units of the last rows of a batch, of which the first `kept` of `of` rows remain."""
        units = len(self.amounts) * kept // of
        return self._replace(amounts=self.amounts[:units], counts=None if self.counts is None else self.counts[:units])


Parts = dict[str, tuple[Part, ...]]


@dataclass(frozen=True)
class LossOutput:
    """loss: scalar ([B] with reduction="none"). metrics: detached 0-d tensors under TRL's keys, means over the batch.
    stats: the TokenStats behind it. parts: of each metric, and of "loss", the terms whose values it is the sum of."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(repr=False)
    stats: TokenStats = field(repr=False)
    parts: Parts = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Entry:
    """A public loss, and what tests and the table of the README need to call it."""

    call: Callable[..., LossOutput]  # its twin is fused_losses.reference's of the same name
    batch: str  # "pairs": labels [2B, T], chosen first; "sequences": [S, T]; "tokens": [..., T]. All may be packed but the last
    source: str  # papers, or whose code
    variants: Mapping[str, Mapping[str, Any]]  # names of special cases -> options
    ref: str = "needed"  # or "optional", or "unused"
    distribution: bool = False  # of both sides: log-probs of labels are not enough
    inputs: Mapping[str, str] = field(default_factory=dict)  # more tensors: name -> a kind of INPUTS
    tokens_for: Mapping[str, Sequence[str]] = field(default_factory=dict)  # options with which num_items counts tokens


# A number, and what is true or false; hidden states [S, H] and several of them [S, J, H].
INPUTS = (
    "per sequence", "per token", "bool per sequence", "vector per sequence", "vectors per sequence",
    "top-k log-probs per token", "top-k ids per token",
)  # fmt: skip


REDUCTIONS = ("mean", "sum", "none")
Count = int | float | Tensor  # num_items, num_nll_tokens: of the whole batch


def check_positive(**numbers: float) -> None:
    for name, x in numbers.items():
        if not isinstance(x, int | float) or not 0 < x < float("inf"):
            raise ValueError(f"{name}: expected a finite number > 0, got {x!r}")


def check_weights(**weights: float) -> None:
    for name, x in weights.items():
        if not isinstance(x, int | float) or not 0 <= x < float("inf"):
            raise ValueError(f"{name}: expected a finite number >= 0, got {x!r}")


def counting_mask(
    labels: Tensor, *, cu_seqlens: Tensor | None = None, shift: bool = False, ignore_index: int = -100, **_: Any
) -> Tensor:
    """The mask of evaluate(), before it runs; of this rank's tokens."""
    if shift and cu_seqlens is not None:
        labels, shift = shift_packed(labels, cu_seqlens, ignore_index), False
    return labels_mask(labels, shift, ignore_index)


def check_per_sequence(name: str, x: object, count: int, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    """That x is a tensor [count] with one of these dtypes."""
    if not isinstance(x, Tensor) or x.dtype not in dtypes:
        kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: expected a {kinds} tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.shape != (count,) or x.device != device:
        raise ValueError(
            f"{name}: expected [{count}] on {device}, one for each sequence, got {list(x.shape)} on {x.device}"
        )


def check_reduction(reduction: str, num_items: Count | None) -> Count | None:
    """num_items, as read_count() gives it."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items: only goes with reduction='mean', got reduction={reduction!r}")
    return read_count("num_items", num_items)


def read_count(name: str, x: Any) -> Count | None:
    """A number, or a tensor of one element made 0-d. The value of a tensor is not looked at."""
    if x is None or isinstance(x, int | float | Tensor):
        count = x
    elif isinstance(x, Real):
        count = float(x)  # of numpy
    else:
        count = torch.as_tensor(x) if hasattr(x, "__array__") else x
    if isinstance(count, Tensor) and count.numel() == 1:
        return ordinary(count).reshape(())
    if count is not None and (not isinstance(count, int | float) or not 0 <= count < float("inf")):
        got = list(count.shape) if isinstance(count, Tensor) else repr(x)
        raise ValueError(f"{name}: expected a finite number >= 0 or a tensor of one element, got {got}")
    return count


def divided(x: Tensor, count: Count) -> Tensor:
    """x / count. Where count is 0, an empty window of gradient accumulation, both this and the gradient of x are 0, whatever
    x is and whatever gradient comes in. A tensor on another device is read by the host."""
    if isinstance(count, Tensor) and count.device != x.device and not torch.compiler.is_compiling():
        count = count.item()
    if isinstance(count, Tensor):
        count = count.to(x.device, x.dtype)
        empty = count == 0
        return x.masked_fill(empty, 0) / count.masked_fill(empty, 1)
    return x / count if count else x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0)


def check_pairs(labels: Tensor, cu_seqlens: Tensor | None, sequence_group: object = None) -> int:
    """The number of sequences. With sequence_group labels are this rank's, and offsets those of all."""
    if cu_seqlens is None:
        if labels.dim() != 2 or labels.shape[0] % 2:
            raise ValueError(
                f"labels: expected [2B, T], chosen rows then rejected rows (or cu_seqlens for packed), got {list(labels.shape)}"
            )
        return labels.shape[0]
    return _check_offsets(labels, cu_seqlens, sequence_group, "[2B + 1]", 2)


def check_sequences(labels: Tensor, cu_seqlens: Tensor | None, sequence_group: object = None) -> int:
    """The number of sequences. As check_pairs."""
    if cu_seqlens is not None:
        return _check_offsets(labels, cu_seqlens, sequence_group, "[S + 1]", 1)
    if labels.dim() != 2:
        raise ValueError(f"labels: expected [S, T] (or cu_seqlens for packed), got {list(labels.shape)}")
    return labels.shape[0]


def _check_offsets(labels: Tensor, cu_seqlens: Tensor, sequence_group: object, shape: str, each: int) -> int:
    if labels.dim() != 1:
        raise ValueError(f"labels: expected packed labels [total] with cu_seqlens, got {list(labels.shape)}")
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"cu_seqlens: expected an int32 or int64 tensor, got {getattr(cu_seqlens, 'dtype', type(cu_seqlens))}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0 or (cu_seqlens.numel() - 1) % each:
        raise ValueError(f"cu_seqlens: expected {shape} offsets, got {list(cu_seqlens.shape)}")
    if cu_seqlens.device != labels.device:
        raise ValueError(f"cu_seqlens: expected on {labels.device} as the labels are, got {cu_seqlens.device}")
    if cu_seqlens.is_cpu and not torch.compiler.is_compiling():
        end = labels.numel() if sequence_group is None else int(cu_seqlens[-1])  # which span_of looks at
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != end or (cu_seqlens.diff() < 0).any():
            raise ValueError(f"cu_seqlens: expected offsets rising from 0 to {end}, got {cu_seqlens.tolist()}")
    return cu_seqlens.numel() - 1


class Fused(NamedTuple):
    loss: Tensor  # reduced as asked
    stats: TokenStats
    tokens: Tokens  # without a graph, for metrics
    losses: Tensor | None  # of the units, without a graph, where they are reduced
    unit: str


class Needs(NamedTuple):
    """What a formula wants of objective.evaluate, where each is described. Not a keyword that a user's options could hold."""

    unit: str
    divergences: tuple[Divergence, ...] = ()
    per_token: Mapping[str, Tensor] = {}
    per_sequence: Mapping[str, Tensor] = {}
    collision: bool = False


def fused(
    formula: Formula, policy: Source, labels: Tensor, ref: Source | None, needs: Needs, *, reduction: str = "mean",
    num_items: Count | None = None, plan: str = "auto", workspace: int | None = None, static_shapes: bool = False,
    **batch: Any,
) -> Fused:  # fmt: skip
    """evaluate(), reduced: the mean is over units, or over tokens that count where those are the units. This is where the
    options that all losses share are handled."""
    num_items = check_reduction(reduction, num_items)
    if needs.unit == "token" and batch.get("cu_seqlens") is not None:  # those of sequences have been looked at
        check_sequences(labels, batch["cu_seqlens"], batch.get("sequence_group"))
    reduced = reduction != "none"
    losses, stats, tokens = evaluate(
        formula,
        policy,
        labels,
        ref,
        **needs._asdict(),
        reduced=reduced,
        how=How(plan, workspace, static_shapes),
        **batch,
    )
    each = losses.detach() if reduced else None
    if reduction == "mean":
        count = tokens.mask.sum().clamp(min=1) if needs.unit == "token" else max(losses.numel(), 1)
        losses = losses.sum() / count if num_items is None else divided(losses.sum(), num_items)
    return Fused(losses.sum() if reduction == "sum" else losses, stats, tokens, each, needs.unit)


def output(found: Fused, parts: Mapping[str, Part | tuple[Part, ...]]) -> LossOutput:
    """The result of a loss, whose metrics are the sums of the values of their parts. "loss" is among these where its mean is
    not over the units, or over tokens where those are the units."""
    if "loss" not in parts and found.losses is not None:
        loss = token_part(found, found.losses) if found.unit == "token" else Part(found.losses)
        parts = {"loss": loss, **parts}
    return with_parts(found.loss, found.stats, parts)


def loss_and_nll(found: Fused, nll: Part, weight: float, times: Count, by: Count) -> dict[str, tuple[Part, ...]]:
    """The parts of losses to which each unit's share of a negative log-likelihood, times / by, has been added: its mean is over
    tokens."""
    if found.losses is None or not weight:
        return {}
    rest = Part(found.losses - weight * divided(nll.amounts * times, by))
    return {"loss": (rest, Part(weight * nll.amounts, nll.counts))}


def with_parts(loss: Tensor, stats: TokenStats, parts: Mapping[str, Part | tuple[Part, ...]]) -> LossOutput:
    every: Parts = {name: (x,) if isinstance(x, Part) else x for name, x in parts.items()}
    metrics = {name: sum_of([x.value() for x in terms]) for name, terms in every.items() if name != "loss"}
    return LossOutput(loss, metrics, stats, every)


def sum_of(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).sum(0)


def token_part(found: Fused, x: Tensor) -> Part:
    """Of a number of each token, 0 where the mask is False; rows of tokens are the units, or packed sequences."""
    tokens, mask = found.tokens, found.tokens.mask
    if tokens.cu_seqlens is not None:
        return Part(tokens.sums(x.reshape(-1)), tokens.lengths)
    rows = found.stats.mask.shape[0] if found.stats.mask.dim() else 1
    x, mask = (y.reshape(rows, y.numel() // max(rows, 1)) for y in (x, mask))
    # A tensor of its own: torch.compile returns wrong shapes of a graph's outputs that are views of views of one tensor.
    return Part(x.masked_fill(~mask, 0), mask)


def sequence_part(tokens: Tokens, x: Tensor, pairs: bool = False) -> Part:
    """Of a number of each token, where sequences are the units, or pairs of them."""
    count, mask = tokens.sequences, tokens.mask
    counts = tokens.lengths if tokens.cu_seqlens is not None else mask.view(count, len(mask) // max(count, 1))
    amounts = tokens.sums(x)
    if pairs:
        amounts, counts = (y.view(2, count // 2, *y.shape[1:]).transpose(0, 1) for y in (amounts, counts))
    return Part(amounts, counts)


def pair_metrics(tokens: Tokens, rewards: Tensor, logps: Tensor) -> dict[str, Part]:
    """TRL's, from a reward and a log-prob of each of the 2B sequences: means over the pairs; and the entropy, if asked for."""
    chosen, rejected = rewards.tensor_split(2)
    found = {
        "rewards/chosen": Part(chosen),
        "rewards/rejected": Part(rejected),
        "rewards/margins": Part(chosen - rejected),
        "rewards/accuracies": Part((chosen > rejected).to(rewards.dtype)),
        "logps/chosen": Part(logps.tensor_split(2)[0]),
        "logps/rejected": Part(logps.tensor_split(2)[1]),
    }
    if tokens.entropy is not None:
        found["entropy"] = sequence_part(tokens, tokens.entropy, pairs=True)
    return found


def reduced(losses: Tensor, reduction: str = "mean", num_items: Count | None = None) -> Tensor:
    """Losses of units that did not come from fused(), reduced as it does."""
    num_items = check_reduction(reduction, num_items)
    if reduction == "none":
        return losses
    count = 1 if reduction == "sum" else max(losses.numel(), 1) if num_items is None else num_items
    return divided(losses.sum(), count)


def sequences_of(stats: TokenStats, cu_seqlens: Tensor | None = None, span: Span = Span()) -> Tokens:  # noqa: B008
    """The log-probs of stats [S, T], or packed, with their graph: for sums over sequences."""
    count = stats.logps.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    tokens = Tokens(stats.logps.reshape(-1), None, None, None, {}, stats.mask.reshape(-1), cu_seqlens, count)
    return tokens.whole(span, ())
