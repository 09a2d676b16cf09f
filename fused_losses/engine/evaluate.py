"""Compute a loss from sources: every loss is a formula of per-token numbers, which evaluate() computes.

    formula     a function from Tokens to the losses of the units, in plain torch on small tensors
    evaluate    calls token_stats, then the formula; for hidden states in the plan "rows", it computes both block by
                block, and the gradient in the forward (plan_rows.py)

A formula gets all units or only some of them. The loss of a unit must not depend on other units, except for unit="batch".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import choose
from ..core.divergences import Divergence
from ..core.inputs import Hidden, Logits, LogProbs, Source, TokenStats, as_source, ordinary
from ..core.layout import PairLossSpec, labels_mask, shift_packed, shifted_labels
from ..core.margin_losses import TERMS
from ..core.validation import given_logps
from . import pair_ops
from .fused_backward import REF, FusedLossSpec, fused_loss
from .operators import check_plain
from .plan_rows import Units
from .prepare import How, PreparedCall, prepare_call
from .shards import Span, span_of
from .token_stats import apart, check_sources, pack_stats, token_stats

EACH = {"sequence": 1, "pair": 2}  # number of sequences in a unit
NUMBERS = ("logps", REF, "lse", "entropy", "collision")  # per token, apart from divergences and extras


@dataclass(frozen=True)
class Tokens:
    """The numbers that a formula gets for some sequences with n tokens, one sequence after another.

    They are 0 where mask is False. For pairs, the chosen sequences come first and the rejected second.

    logps, ref_logps, lse, entropy, collision, correct [n] and divergence {name: [n]}: as in TokenStats. ref_logps is [S] where
    only sums over sequences are known (ref_summed). extra: the caller's per_token [n] and per_sequence [S] tensors, by name.
    """

    logps: Tensor
    ref_logps: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None
    divergence: dict[str, Tensor]
    mask: Tensor
    cu_seqlens: Tensor | None  # None: sequences of equal length
    sequences: int
    ref_summed: bool = False
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    collision: Tensor | None = None
    correct: Tensor | None = None

    def sums(self, x: Tensor) -> Tensor:
        """Return the sums [S] of x [n] over the tokens of each sequence that count."""
        x = x.masked_fill(~self.mask, 0)
        if self.cu_seqlens is None:
            return x.view(self.sequences, len(x) // max(1, self.sequences)).sum(1)
        return torch.segment_reduce(x, "sum", offsets=self.cu_seqlens.long(), initial=0.0, unsafe=True)

    def spread(self, x: Tensor) -> Tensor:
        """Return x [S] repeated [n]: each token gets the number of its sequence."""
        n = len(self.mask)
        if self.cu_seqlens is None:
            return x[:, None].expand(-1, n // max(1, self.sequences)).reshape(-1)
        return x.repeat_interleave(self.cu_seqlens.diff().long(), output_size=n)

    @property
    def lengths(self) -> Tensor:
        """Return the number of tokens that count in each sequence [S]."""
        return self.sums(self.mask.to(self.logps.dtype))

    def log_ratios(self) -> Tensor:
        """Return sum_t (log p - log q) for each sequence [S], or sum_t log p without a reference.

        Where the reference is known per token, the difference is computed per token, because it is small there.
        """
        if self.ref_logps is None:
            return self.sums(self.logps)
        ref = self.ref_logps.to(self.logps.dtype)
        return self.sums(self.logps) - ref if self.ref_summed else self.sums(self.logps - ref)

    def detached(self) -> Tokens:
        """Return the same numbers without a graph."""

        def bare(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach()

        numbers = {n: bare(getattr(self, n)) for n in NUMBERS}
        divergence = {n: x.detach() for n, x in self.divergence.items()}
        return replace(self, divergence=divergence, extra={n: x.detach() for n, x in self.extra.items()}, **numbers)  # type: ignore[arg-type]

    def whole(self, span: Span, tokenwise: Sequence[str]) -> Tokens:
        """Return the tokens of all ranks' parts of the time axis.

        tokenwise: the names of the extras that have one number per token.
        """
        if span.group is None:
            return self
        own = {n: getattr(self, n) for n in (*NUMBERS, "mask", "correct") if n != REF or not self.ref_summed}
        own = {n: x for n, x in own.items() if x is not None}
        extra = {n: self.extra[n] for n in tokenwise}
        found = iter(span.whole([*own.values(), *self.divergence.values(), *extra.values()]))
        numbers: dict[str, Any] = dict(zip(own, found, strict=False))
        divergence = dict(zip(self.divergence, found, strict=False))
        return replace(
            self, divergence=divergence, extra={**self.extra, **dict(zip(extra, found, strict=True))}, **numbers
        )

    def pair_term(self, name: str, link: Divergence, beta: float, *params: float) -> Tensor:
        """Compute a loss of core/margin_losses.py [B], which is a function of the margin, in one kernel."""
        check_plain("preference_loss", self.logps, self.ref_logps)
        dtype = self.logps.dtype if self.logps.dtype == torch.float64 else None
        args = pair_ops.PairLossArgs(
            logps=self.logps,
            ref_logps=self.ref_logps,
            mask=self.mask,
            cu_seqlens=self.cu_seqlens,
            spec=PairLossSpec(link, TERMS[name], params, beta, self.sequences, self.ref_summed),
            backend=choose(self.logps.device, dtype),
        )
        return pair_ops.LOSSES.unpack(pair_ops.pair_loss(*pair_ops.ARGS.pack(args))).losses


Formula = Callable[[Tokens], Tensor]


class Evaluated(NamedTuple):
    """The result of evaluate()."""

    losses: Tensor  # of the units: [S], [B]; for tokens in the shape of the mask, or flat where reduced
    stats: TokenStats
    tokens: Tokens  # of all sequences, without a graph: for metrics


def evaluate(
    formula: Formula,
    policy: Source,
    labels: Tensor,
    ref: Source | None = None,
    *,
    unit: str,
    divergences: tuple[Divergence, ...] = (),
    entropy: bool = False,
    collision: bool = False,
    shift: bool = False,
    ignore_index: int = -100,
    cu_seqlens: Tensor | None = None,
    sequence_group: object = None,
    per_token: Mapping[str, Tensor] | None = None,
    per_sequence: Mapping[str, Tensor] | None = None,
    reduced: bool = True,
    inplace_backward: bool = False,
    how: How = How(),  # noqa: B008
) -> Evaluated:
    """Compute the losses of all units, with their graph.

    unit: "token"; "sequence": row s of labels [S, T], or the packed labels from cu_seqlens[s] to cu_seqlens[s + 1]; "pair":
    sequences s and B + s of 2B; or "batch", for a formula that cannot be split. per_token: tensors in the shape of the mask;
    per_sequence: tensors [S]. reduced: the caller sums or averages the losses, so the gradient may be computed in the forward.

    sequence_group: the time axis is split over its ranks (shards.py). The formula gets all tokens. The returned stats are
    those of this rank, and so are losses of tokens that are not reduced. The inputs per_token are those of this rank, the
    inputs per_sequence those of all ranks.
    """
    policy, source = as_source("policy", policy), None if ref is None else as_source("ref", ref)
    cu_seqlens = None if cu_seqlens is None else ordinary(cu_seqlens)
    span = span_of(labels, sequence_group, cu_seqlens=cu_seqlens, shift=shift, static_shapes=how.static_shapes)
    if span.group is not None and how.plan == "rows":
        raise ValueError("plan: 'rows' is not possible here: sequences are split over the ranks of sequence_group")
    if shift and cu_seqlens is not None:
        labels, shift = shift_packed(labels, cu_seqlens, ignore_index), False
    mask = labels_mask(labels, shift, ignore_index)
    if not isinstance(policy, LogProbs):
        source, how = apart(policy, labels, source, divergences, shift, ignore_index, how)
    sequences = 0 if unit == "token" else labels.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    summed = unit != "token" and isinstance(source, LogProbs) and _summed(source, labels, sequences, span, how)
    if isinstance(source, LogProbs) and source.logps.device != labels.device:
        raise ValueError(f"ref: expected fl.LogProbs on {labels.device} as the labels are, got {source.logps.device}")
    options: dict[str, Any] = {"shift": shift, "ignore_index": ignore_index, "entropy": entropy, "collision": collision}
    tokenwise, extra = ({n: ordinary(x) for n, x in (given or {}).items()} for given in (per_token, per_sequence))
    units, call = None, None
    split = span.group is not None or (isinstance(policy, Hidden) and policy.process_group is not None)  # over ranks
    if isinstance(policy, Hidden) and not split and not inplace_backward and (reduced or how.plan == "rows"):
        units = _units(unit, labels, cu_seqlens, how)
    if units is not None and isinstance(policy, Hidden):
        call = _request(policy, labels, source, divergences, options, how, units)
    if call is None or units is None:
        stats = token_stats(
            policy, labels, None if summed else source, divergence=[d.key for d in divergences],
            inplace_backward=inplace_backward, **how._asdict(), **options,
        )  # fmt: skip
        given = source.logps if summed else stats.ref_logps  # type: ignore[union-attr]
        divergence = {name: x.reshape(-1) for name, x in stats.divergence.items()}
        logps, ref_logps, lse, ent, squares = (
            x if x is None else x.reshape(-1) for x in (stats.logps, given, stats.lse, stats.entropy, stats.collision)
        )
        assert logps is not None
        extra |= {n: x.reshape(-1) for n, x in tokenwise.items()}
        tokens = Tokens(
            logps, ref_logps, lse, ent, divergence, mask.reshape(-1), cu_seqlens, sequences, summed, extra, squares,
            None if stats.correct is None else stats.correct.reshape(-1),
        ).whole(span, tuple(tokenwise))  # fmt: skip
        losses = formula(tokens)
        losses = span.own(losses).reshape(mask.shape) if unit == "token" and not reduced else losses
    else:
        if isinstance(source, LogProbs):
            (extra if summed else tokenwise)[REF] = source.logps if summed else given_logps("ref", source, mask)
        for n, x in tokenwise.items():  # with shift, the last position predicts nothing
            extra[n] = (torch.nn.functional.pad(x, (0, 1)) if shift else x).reshape(-1)
        loss = FusedLossSpec(
            formula=formula,
            make_tokens=Tokens,
            plan=call.plan,
            units=units,
            sequences=sequences,
            tokenwise=tuple(tokenwise),
            names=tuple(extra),
            summed=summed,
        )
        losses, out = fused_loss(loss, call.args, cu_seqlens, extra)
        ref_source = None if summed else source
        stats = pack_stats(out, call.asks, labels, ref_source, divergences, shift, ignore_index)
        tokens = loss.tokens(out, call.args.options.spec, extra, call.args.mask, cu_seqlens, sequences)
        if unit == "token" and not reduced:
            losses = losses.view(labels.shape)[..., : mask.shape[-1]] if mask.dim() else losses.view(())
    return Evaluated(losses, stats, tokens.detached())


def _summed(source: LogProbs, labels: Tensor, sequences: int, span: Span, how: How) -> bool:
    """Return whether the reference's log-probs are one number per sequence.

    On a rank with as many tokens as there are sequences the shape does not show it; the other ranks of the group decide.
    """
    one_each = source.logps.shape == (sequences,)
    own = one_each and labels.shape != (sequences,)
    if labels.dim() > 1 or how.static_shapes or span.group is None:
        return own
    if not span.any(own, labels.device):
        return False
    if span.any(not one_each, labels.device):
        raise ValueError(
            f"ref: expected fl.LogProbs [{sequences}] on all ranks of sequence_group, or per token on all, got "
            f"{list(source.logps.shape)} on this one"
        )
    return True


def _units(unit: str, labels: Tensor, cu_seqlens: Tensor | None, how: How) -> Units | None:
    """Return the units as the plan "rows" needs them, or None where that plan is not possible."""
    if torch.compiler.is_compiling() or unit == "batch":
        if how.plan == "rows":
            why = "this loss looks at the whole batch" if unit == "batch" else "torch.compile does not see through it"
            raise ValueError(f"plan: 'rows' is not possible here: {why}")
        return None
    if unit == "token":
        return Units(None)
    if cu_seqlens is None:
        return Units([s * labels.shape[1] for s in range(labels.shape[0] + 1)], EACH[unit])
    if cu_seqlens.is_cpu or how.plan == "rows":
        return Units(cu_seqlens.tolist(), EACH[unit])
    return None  # the offsets are not read on the host


def _request(
    policy: Hidden, labels: Tensor, source: Logits | Hidden | LogProbs | None, divergences: tuple[Divergence, ...],
    options: dict[str, Any], how: How, units: Units,
) -> PreparedCall | None:  # fmt: skip
    """Return the call in the form that the operators take if its plan is "rows", else None."""
    check_sources(policy, labels, source, divergences)
    y = shifted_labels(labels, options["shift"], options["ignore_index"])
    other = None if isinstance(source, LogProbs) else source
    rest = divergences, options["entropy"], options["collision"], options["ignore_index"], how, max(1, units.longest)
    call = prepare_call(policy, y, other, *rest)
    return call if call.args.options.plan == "rows" else None
