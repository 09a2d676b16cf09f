"""Compute a loss from sources: every loss is a formula of per-token numbers, which evaluate() computes.

    formula     a function from Tokens to the losses of the units, in plain torch on small tensors
    evaluate    calls token_stats, then the formula; for hidden states in the plan "rows", it computes both block by
                block, and the gradient in the forward (plan_rows.py)

A formula gets all units or only some of them. The loss of a unit must not depend on other units, except for unit="batch".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import backend_module, choose
from ..core.divergences import Divergence
from ..core.inputs import Hidden, Logits, LogProbs, Source, TokenStats, as_source, ordinary
from ..core.layout import labels_mask, shift_packed, shifted_labels
from ..core.validation import given_logps
from . import hidden_ops, logits_ops
from .plan_chunks import Grads, Outputs
from .plan_rows import Block, Units, row_blocks
from .prepare import How, Request, request
from .shards import Span, span_of
from .token_stats import apart, check_sources, pack_stats, token_stats

EACH = {"sequence": 1, "pair": 2}  # number of sequences in a unit
REF = "ref_logps"  # name among the extras, where the reference is given as log-probs
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
        logits_ops.check_plain("preference_loss", self.logps, self.ref_logps)
        dtype = self.logps.dtype if self.logps.dtype == torch.float64 else None
        return logits_ops.pair_loss(
            self.logps, self.ref_logps, self.mask, self.cu_seqlens, name, list(params), link.key, beta, self.sequences,
            self.ref_summed, choose(self.logps.device, dtype),
        )[0]  # fmt: skip


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
        job = _Job(
            formula, call._replace(tensors=()), divergences, units, sequences, tuple(tokenwise), tuple(extra), summed,
            isinstance(source, Logits | Hidden),
        )  # fmt: skip
        losses, *found = _Known.apply(job, cu_seqlens, *call.tensors, *extra.values())
        stats = pack_stats(found, call.asks, labels, None if summed else source, divergences, **options)
        tokens = job.tokens(job.outputs(found), extra, job.mask(call.tensors[0]), cu_seqlens, sequences)
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
) -> Request | None:  # fmt: skip
    """Return the request of the call if its plan is "rows", else None."""
    check_sources(policy, labels, source, divergences)
    y = shifted_labels(labels, options["shift"], options["ignore_index"])
    other = None if isinstance(source, LogProbs) else source
    rest = divergences, options["entropy"], options["collision"], options["ignore_index"], how, max(1, units.longest)
    call = request(policy, y, other, *rest)
    return call if call.options.plan == "rows" else None


@contextmanager
def _graph_of_our_own() -> Iterator[None]:
    """Enable autograd, also inside a forward, without the caller's hooks for saved tensors.

    With these hooks, a checkpoint around model and loss would run the model again when such a tensor is read, and
    offloading would copy the tensor to other memory and back.
    """
    with torch.enable_grad():
        if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None:  # none can be set
            yield
            return
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            yield


class _Job(NamedTuple):
    """Describe a call in the plan "rows", without its tensors."""

    formula: Formula
    call: Request
    divergences: tuple[Divergence, ...]
    units: Units
    sequences: int
    tokenwise: tuple[str, ...]  # extras that have a number per row; the others have one per sequence
    names: tuple[str, ...]  # the names of all extras, in order
    summed: bool
    ref: bool  # the reference is a distribution

    def mask(self, labels: Tensor | None) -> Tensor:
        assert labels is not None
        return labels.reshape(-1) != self.call.options.ignore_index

    def outputs(self, found: list[Tensor]) -> Outputs:
        """Return the operator's tensors as Outputs, with None for those that were not asked for.

        The field saved, which backward needs, is not used here: logps fills its place.
        """
        logps, ref_logps, lse, entropy, div, hit, collision = found[:7]
        options = self.call.options
        return Outputs(
            logps, ref_logps if self.ref else None, lse, entropy if options.entropy else None,
            div if self.divergences else None, hit, collision if options.collision else None, logps,
        )  # fmt: skip

    def tokens(self, out: Outputs, extra: dict[str, Tensor], mask: Tensor, cu: Tensor | None, sequences: int) -> Tokens:
        values: Any = out.div if out.div is not None else []
        divergence = {d.key: x for d, x in zip(self.divergences, values, strict=True)}
        ref = extra.get(REF, out.ref_logps)
        return Tokens(
            out.logps, ref, out.lse, out.entropy, divergence, mask, cu, sequences, self.summed, extra, out.collision, out.hit
        )  # fmt: skip

    def gradients(
        self, out: Outputs, extra: dict[str, Tensor], mask: Tensor, cu: Tensor | None, sequences: int,
        g: Tensor | None = None,
    ) -> tuple[Tensor, Grads, list[Tensor | None]]:  # fmt: skip
        """Return the losses, and the gradients at the statistics and at the extras that require one.

        The gradients are those of the sum of g * losses, or of the sum of the losses where g is None.
        """
        with _graph_of_our_own():
            own = {name: getattr(out, name) for name in ("logps", "lse", "entropy", "div")}
            leaves = {name: x.detach().requires_grad_() for name, x in own.items() if x is not None}
            losses = self.formula(self.tokens(out._replace(**leaves), extra, mask, cu, sequences))
            wanted = [*leaves.values(), *(x for x in extra.values() if x.requires_grad)]
            found: Any = [None] * len(wanted)
            if losses.requires_grad:
                g = torch.ones_like(losses) if g is None else g
                found = torch.autograd.grad(losses, wanted, g, allow_unused=True)
        named = dict(zip(leaves, found, strict=False))
        grads = Grads(named["logps"], None, named.get("lse"), named.get("entropy"), named.get("div"))
        return losses.detach(), grads, list(found[len(leaves) :])


class _Scale(NamedTuple):
    """The factors that turn gradients for an incoming gradient of 1 into gradients for another incoming gradient g.

    The results are finite, or not finite, at the same places as those of hidden_stats_backward. Zeros of what does not count
    stay zeros.
    """

    rows: Tensor  # [rows], for gradients that have one row for each
    head: Tensor  # 0-d, for gradients that are sums over all rows
    vocab: int

    @classmethod
    def of(cls, g: Tensor, to_rows: list[Tensor | None], counts: Tensor, vocab: int) -> _Scale:
        """Return the factors for g. to_rows: the gradients [..., rows] that the formula computes from g."""
        known = [x.isfinite().view(-1, len(counts)).all(0) for x in to_rows if x is not None and x.numel()]
        lost = counts & ~torch.stack(known).all(0) if known else torch.zeros_like(counts)
        g = g.masked_fill(~g.isfinite(), 0)  # rows that such a g reaches are in lost
        return cls(g.masked_fill(lost, float("nan")), g.masked_fill(lost.any(), float("nan")), vocab)

    def __call__(self, x: Tensor, dtype: torch.dtype, over: str) -> Tensor:
        """Return x scaled, in the memory of x where x has this dtype.

        over: "rows" if all dimensions of x but the last are the rows; "tokens" if its first dimension is the vocabulary with
        padding at the end, which becomes 0; "all" if there is no padding.
        """
        out = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
        if over == "rows":
            n, width = len(self.rows), x.shape[-1]
            torch.mul(x.view(n, width), self.rows[:, None], out=out.view(n, width))
            return out
        end = self.vocab if over == "tokens" else len(x)
        torch.mul(x[:end], self.head, out=out[:end])
        out[end:] = 0
        return out


class _Known(torch.autograd.Function):
    """Compute the losses of the units and the outputs of hidden_stats.

    The forward also computes the gradient of the sum of the losses.
    """

    @staticmethod
    def forward(ctx, job, cu_seqlens, labels, *tensors):  # type: ignore[no-untyped-def]
        options, plan, wanted = job.call.options, job.call.plan, list(ctx.needs_input_grad[3:13])
        extra = dict(zip(job.names, tensors[10:], strict=True))
        problem, (policy, ref) = options.problem(), hidden_ops.sides((labels, *tensors[:10]), options)
        backend = backend_module(options.backend)
        backend.check_labels(problem, labels)
        tokenwise, both = job.tokenwise, ref
        if ref is not None and not job.divergences:
            extra[REF], both = hidden_ops.log_probs(labels, ref, options), None
            tokenwise = (*tokenwise, REF)

        def loss(block: Block, part: Outputs) -> tuple[Tensor, Grads]:
            which = torch.tensor(block.sequences, dtype=torch.int64, device=labels.device)
            own = {n: x.detach()[block.rows if n in tokenwise else which] for n, x in extra.items()}
            every = torch.ones_like(block.rows, dtype=torch.bool)
            return job.gradients(part, own, every, block.cu_seqlens, len(block.sequences))[:2]

        dtype = hidden_ops.dtype_of(policy, ref)
        with torch.autocast(labels.device.type, enabled=False):
            out, losses, grads = row_blocks(
                problem, backend, plan, labels, policy, both, job.units, wanted[:5], dtype, loss
            )
        if ref is not None and both is None:
            out[1] = extra[REF]
        ctx.job, ctx.found = job, grads
        ctx.save_for_backward(cu_seqlens, labels, *tensors, *out)
        ctx.mark_non_differentiable(out[5], out[6])
        ctx.set_materialize_grads(False)
        return losses, *out[:7]

    @staticmethod
    @logits_ops.once("token_stats")
    def backward(ctx, g_losses, *grads):  # type: ignore[no-untyped-def]
        """Return the gradients that the forward computed, scaled, or compute them again.

        Those of the forward are correct where the incoming gradients of all losses are equal. They are scaled in place and
        returned once. In all other cases, and in a second backward, hidden_stats_backward computes them again. The formula is
        differentiated in both cases: it is small, and shows which rows a gradient that is not finite reaches.
        """
        job, saved, flags = ctx.job, ctx.saved_tensors, ctx.needs_input_grad[3:]
        end = 12 + len(job.names)
        cu_seqlens, labels, tensors, extras = saved[0], saved[1], saved[2:12], saved[12:end]
        out = saved[end:]
        total, to_extras = list(grads[:5]), iter(())
        if g_losses is not None:
            own = {n: x.detach().requires_grad_(f) for n, x, f in zip(job.names, extras, flags[10:], strict=True)}
            ref = {} if not job.ref else {REF: out[1]}
            _, more, learned = job.gradients(
                job.outputs(list(out)), ref | own, job.mask(labels), cu_seqlens, job.sequences, g_losses
            )
            total = [b if a is None else a if b is None else a + b for a, b in zip(total, more, strict=True)]
            to_extras = iter(learned)
        uniform = g_losses is not None and (g_losses.numel() == 1 or (g_losses.numel() > 1 and g_losses.stride(0) == 0))
        if uniform and all(g is None for g in grads[:5]) and ctx.found is not None:
            found, ctx.found = ctx.found, None
            scale = _Scale.of(g_losses[0], total, job.mask(labels), job.call.options.vocab)
            kept = zip(found, tensors[:5], ("rows", "tokens", "tokens", "all", "tokens"), strict=True)
            every = [scale(x, t.dtype, over) if f else None for f, (x, t, over) in zip(flags, kept, strict=False)]
            back = iter([x for x, f in zip([*every, *[None] * 5], flags, strict=False) if f])
        else:
            keep = out[0].new_zeros((0, 0, 0))
            given = (*total, out[0], out[7], keep, labels, *tensors, *job.call.options, list(flags[:10]))
            back = iter(hidden_ops.hidden_stats_backward(*given))
        return (
            None, None, None, *(next(back) if f else None for f in flags[:10]),
            *(next(to_extras, None) if f else None for f in flags[10:]),
        )  # fmt: skip
