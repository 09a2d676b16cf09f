"""Compute a loss from hidden states in the plan "row_blocks", with the gradient in the forward (plan_rows.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import backend_module
from ..core.layout import Grads, Outputs, StatsSpec
from . import hidden_ops
from .hidden_ops import HiddenStatsArgs
from .operator_args import Layout
from .operators import once
from .plan_chunks import dtype_of
from .plan_rows import Block, Units, row_blocks
from .planner import Plan
from .sides import BothGradients, InputFlags, InputGradients, Inputs, Wanted
from .stats_outputs import StatsTensors
from .tokens import REF, Formula, Tokens


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


class LossGradients(NamedTuple):
    """The losses of some units, and the gradients that their formula gives."""

    losses: Tensor
    stats: Grads
    extras: dict[str, Tensor | None]  # of those that require a gradient


@dataclass(frozen=True)
class FusedLossSpec:
    """What is computed: a formula, and the units that it is computed for."""

    formula: Formula
    plan: Plan
    units: Units
    sequences: int
    tokenwise: tuple[str, ...]  # extras that have a number per row; the others have one per sequence
    names: tuple[str, ...]  # the names of all extras, in order
    summed: bool

    def tokens(
        self,
        out: Outputs,
        spec: StatsSpec,
        extra: dict[str, Tensor],
        mask: Tensor,
        cu_seqlens: Tensor | None,
        sequences: int,
    ) -> Tokens:
        """Return the numbers of some sequences as the formula takes them."""
        values = [] if out.divergence is None else out.divergence.unbind(0)
        return Tokens(
            logps=out.logps,
            ref_logps=extra.get(REF, out.ref_logps),
            lse=out.lse,
            entropy=out.entropy,
            divergence={d.key: x for d, x in zip(spec.divergences, values, strict=True)},
            mask=mask,
            cu_seqlens=cu_seqlens,
            sequences=sequences,
            ref_summed=self.summed,
            extra=extra,
            collision=out.collision,
            correct=out.hit,
        )

    def gradients(
        self,
        out: Outputs,
        spec: StatsSpec,
        extra: dict[str, Tensor],
        mask: Tensor,
        cu_seqlens: Tensor | None,
        sequences: int,
        g: Tensor | None = None,
    ) -> LossGradients:
        """Return the losses, and the gradients at the statistics and at the extras that require one.

        The gradients are those of the sum of g * losses, or of the sum of the losses where g is None.
        """
        with _graph_of_our_own():
            numbers = {name: getattr(out, name) for name in ("logps", "lse", "entropy", "divergence")}
            leaves = {name: x.detach().requires_grad_() for name, x in numbers.items() if x is not None}
            losses = self.formula(self.tokens(out._replace(**leaves), spec, extra, mask, cu_seqlens, sequences))
            learned = {name: x for name, x in extra.items() if x.requires_grad}
            gradients: Any = [None] * (len(leaves) + len(learned))
            if losses.requires_grad:
                g = torch.ones_like(losses) if g is None else g
                gradients = torch.autograd.grad(losses, [*leaves.values(), *learned.values()], g, allow_unused=True)
        left = iter(gradients)
        stats = Grads(**{name: next(left) for name in leaves})
        return LossGradients(losses.detach(), stats, {name: next(left) for name in learned})


class GradientScale(NamedTuple):
    """The factors that turn gradients for an incoming gradient of 1 into gradients for another incoming gradient g.

    The results are finite, or not finite, at the same places as those of hidden_stats_backward. Zeros of what does not count
    stay zeros. The methods return x scaled, in the memory of x where x has the dtype asked for.
    """

    rows: Tensor  # [rows], for gradients that have one row for each
    head: Tensor  # 0-d, for gradients that are sums over all rows
    vocab: int

    @classmethod
    def of(cls, g: Tensor, stats: Grads, counts: Tensor, vocab: int) -> GradientScale:
        """Return the factors for g. stats: the gradients [..., rows] that the formula computes from g."""
        known = [x.isfinite().view(-1, len(counts)).all(0) for x in stats if x is not None and x.numel()]
        lost = counts & ~torch.stack(known).all(0) if known else torch.zeros_like(counts)
        g = g.masked_fill(~g.isfinite(), 0)  # rows that such a g reaches are in lost
        return cls(g.masked_fill(lost, float("nan")), g.masked_fill(lost.any(), float("nan")), vocab)

    def of_inputs(self, gradients: InputGradients, inputs: Inputs, wanted: InputFlags) -> InputGradients:
        """Return the gradients that are wanted, scaled, each in the dtype of its tensor."""

        def one(flag: bool, x: Tensor | None, like: Tensor | None, scaled: Callable) -> Tensor | None:
            return scaled(x, like.dtype) if flag and x is not None and like is not None else None

        return InputGradients(
            x=one(wanted.x, gradients.x, inputs.x, self._over_rows),
            weight=one(wanted.weight, gradients.weight, inputs.weight, self._over_tokens),
            bias=one(wanted.bias, gradients.bias, inputs.bias, self._over_tokens),
            a=one(wanted.a, gradients.a, inputs.a, self._over_all),
            b=one(wanted.b, gradients.b, inputs.b, self._over_tokens),
        )

    def _over_rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Scale x, of which all dimensions but the last are the rows."""
        out, n, width = _place(x, dtype), len(self.rows), x.shape[-1]
        torch.mul(x.view(n, width), self.rows[:, None], out=out.view(n, width))
        return out

    def _over_tokens(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Scale x, whose first dimension is the vocabulary with padding at the end, which becomes 0."""
        out = _place(x, dtype)
        torch.mul(x[: self.vocab], self.head, out=out[: self.vocab])
        out[self.vocab :] = 0
        return out

    def _over_all(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Scale all of x."""
        return torch.mul(x, self.head, out=_place(x, dtype))


def _place(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)


class LossArgs(NamedTuple):
    """The arguments of LossWithGradInForward."""

    loss: FusedLossSpec
    cu_seqlens: Tensor | None
    call: HiddenStatsArgs
    extras: tuple[Tensor, ...]


class LossResult(NamedTuple):
    """What LossWithGradInForward returns."""

    losses: Tensor
    stats: StatsTensors


class _Saved(NamedTuple):
    """What the forward saves for backward."""

    loss: FusedLossSpec
    cu_seqlens: Tensor | None
    call: HiddenStatsArgs
    stats: StatsTensors
    extras: tuple[Tensor, ...]


ARGS = Layout(LossArgs)
RESULT = Layout(LossResult)
_SAVED = Layout(_Saved)


def fused_loss(
    loss: FusedLossSpec, call: HiddenStatsArgs, cu_seqlens: Tensor | None, extra: dict[str, Tensor]
) -> tuple[Tensor, Outputs]:
    """Return the losses of the units, and the statistics of all rows."""
    args = LossArgs(loss, cu_seqlens, call, tuple(extra.values()))
    result = RESULT.named(LossWithGradInForward.apply(*ARGS.flat(args)))
    return result.losses, result.stats.asked(call.options.spec, call.ref is not None)


class LossWithGradInForward(torch.autograd.Function):
    """Compute the losses of the units and the statistics of all rows.

    The forward also computes the gradient of the sum of the losses.
    """

    @staticmethod
    def forward(ctx: Any, *values: Any) -> tuple[Tensor, ...]:
        args: LossArgs = ARGS.named(values)
        loss, call, labels, options = args.loss, args.call, args.call.labels, args.call.options
        spec, wanted = options.spec, InputFlags.of(ARGS.named(ctx.needs_input_grad).call.policy)
        backend = backend_module(options.backend)
        hidden_ops.check_gathered(call.policy, call.ref)
        backend.check_labels(spec, labels)
        extra = dict(zip(loss.names, args.extras, strict=True))
        tokenwise, ref, ref_logps = loss.tokenwise, call.ref, None
        if ref is not None and not spec.divergences:  # only its log-probs are needed
            ref_logps = extra[REF] = hidden_ops.log_probs(labels, ref, options)
            tokenwise, ref = (*tokenwise, REF), None

        def of_block(block: Block, part: Outputs) -> tuple[Tensor, Grads]:
            sequence_ids = torch.tensor(block.sequences, dtype=torch.int64, device=labels.device)
            part_of_extra = {n: x.detach()[block.rows if n in tokenwise else sequence_ids] for n, x in extra.items()}
            mask = torch.ones_like(block.rows, dtype=torch.bool)
            gradients = loss.gradients(part, spec, part_of_extra, mask, block.cu_seqlens, len(block.sequences))
            return gradients.losses, gradients.stats

        with torch.autocast(labels.device.type, enabled=False):
            blocks = row_blocks(
                spec,
                backend,
                loss.plan,
                labels,
                call.policy.hidden_operand(),
                None if ref is None else ref.operand(),
                loss.units,
                wanted,
                dtype_of(call.policy, call.ref),
                of_block,
            )
        stats = blocks.stats if ref_logps is None else blocks.stats._replace(ref_logps=ref_logps)
        ctx.gradients = blocks.gradients
        _SAVED.save(ctx, _Saved(loss, args.cu_seqlens, call, stats, args.extras))
        ctx.mark_non_differentiable(stats.hit, stats.collision, stats.saved)
        ctx.set_materialize_grads(False)
        return tuple(RESULT.flat(LossResult(blocks.losses, stats)))

    @staticmethod
    @once("token_stats")
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        """Return the gradients that the forward computed, scaled, or compute them again.

        Those of the forward are correct where the incoming gradients of all losses are equal. They are scaled in place and
        returned once. In all other cases, and in a second backward, hidden_stats_backward computes them again. The formula is
        differentiated in both cases: it is small, and shows which rows a gradient that is not finite reaches.
        """
        saved, needs, grad_outputs = _SAVED.saved(ctx), ARGS.named(ctx.needs_input_grad), RESULT.named(grads)
        loss, call, spec, g = saved.loss, saved.call, saved.call.options.spec, grad_outputs.losses
        wanted = Wanted(InputFlags.of(needs.call.policy), InputFlags.of(needs.call.ref))
        at = grad_outputs.stats
        incoming = total = Grads(at.logps, at.ref_logps, at.lse, at.entropy, at.divergence)
        learned: dict[str, Tensor | None] = {}
        if g is not None:
            flags = zip(loss.names, saved.extras, needs.extras, strict=True)
            extra = {n: x.detach().requires_grad_(flag) for n, x, flag in flags}
            if call.ref is not None:
                extra[REF] = saved.stats.ref_logps.detach()
            out = saved.stats.asked(spec, call.ref is not None)
            formula = loss.gradients(out, spec, extra, call.mask, saved.cu_seqlens, loss.sequences, g)
            learned = formula.extras
            both = zip(incoming, formula.stats, strict=True)
            total = Grads(*[b if a is None else a if b is None else a + b for a, b in both])
        uniform = g is not None and (g.numel() == 1 or (g.numel() > 1 and g.stride(0) == 0))
        if uniform and all(x is None for x in incoming) and ctx.gradients is not None:
            kept, ctx.gradients = ctx.gradients, None
            scale = GradientScale.of(g[0], total, call.mask, spec.vocab)
            back = BothGradients(policy=scale.of_inputs(kept, call.policy, wanted.policy))
        else:
            args = hidden_ops.HiddenStatsBackwardArgs(
                grads=total,
                logps=saved.stats.logps,
                saved=saved.stats.saved,
                keep=saved.stats.logps.new_zeros((0, 0, 0)),
                call=call._replace(wanted=wanted),
            )
            back = hidden_ops.gradients(args)
        extras = [learned.get(name) for name in loss.names]
        return tuple(ARGS.gradients(call=back._asdict(), extras=extras))
