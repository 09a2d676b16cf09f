"""Compute the plan "frozen_head", for a head without gradients: keep expectations of the head's rows for backward.

They are updated together with the running sums, as flash attention updates its output. For each row of logits these are
E[h W] = sum_v h_v s_v W_v (s_v is the slope of the head) for h = p, for h = p log p where the entropy has a gradient, and
for h = dD/dlog p of each divergence.

During the first sweep p and q are normalised by the totals so far. When these totals grow by the factors e^-x and e^-y,
Divergence.scaling returns a and b, two numbers per row, such that h = a h' + b p'; with them a sum is updated. (Sums of
numbers that are not normalised would be enough in exact arithmetic, but p' may be huge compared with h.) The sums of
divergences without a scaling come from a second sweep, over tiles with their final normalisation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.interface import Backend
from ..core.divergences import Divergence, from_key
from ..core.layout import Grads, Outputs, SavedRow, StatsSpec, saved_row, slope_rows
from ..core.moments import fields, log_ratio, unpack
from .plan_chunks import CompactCall, Tiles, allocate, powers, second_sweep
from .projection import HiddenSide, hidden_side


def bases(spec: StatsSpec) -> list[Divergence]:
    """Return the divergences asked for, each once, where a sum of others is replaced by its parts."""
    return [from_key(k) for k in dict.fromkeys(k for d in spec.divergences for k in (d.parts or (d.key,)))]


def kept_sums(spec: StatsSpec) -> int:
    """Return how many sums are kept for each row."""
    return 1 + spec.entropy + len(bases(spec))


class _Kept(NamedTuple):
    """The sums that are kept, each [rows, H + rank]."""

    prob: Tensor  # of h = p
    entropy: Tensor | None  # of h = p log p
    bases: list[tuple[Divergence, Tensor]]  # of h = dD/dlog p

    @classmethod
    def of(cls, keep: Tensor, spec: StatsSpec) -> _Kept:
        """Return the parts of a tensor [kept_sums(spec), rows, H + rank]."""
        sums = iter(keep)
        prob, entropy = next(sums), next(sums) if spec.entropy else None
        return cls(prob, entropy, list(zip(bases(spec), sums, strict=True)))


class _Frozen:
    """The sums of a call, while they are computed."""

    def __init__(self, call: CompactCall, policy: HiddenSide, keep: Tensor, tiles: Tiles):
        self.call, self.policy, self.kept = call, policy, _Kept.of(keep, call.spec)
        self.d_policy = torch.empty_like(tiles.logits, dtype=policy.dtype)
        self.one = torch.ones((1, tiles.rows), dtype=call.dtype, device=call.labels.device)

    def _add(
        self,
        out: Tensor,
        r: slice,
        c: slice,
        part: StatsSpec,
        logits: Tensor,
        ref_logits: Tensor | None,
        saved: Tensor,
        grads: Grads,
    ) -> None:
        """Add sum_v h_v s_v W_v to a sum `out`; h_v s_v is the dz that backward writes for these gradients."""
        d_policy = self.d_policy[: logits.shape[0], : logits.shape[1]]
        self.call.backend.backward(part, logits, self.call.labels[r], ref_logits, saved, grads, d_policy, None)
        self.policy.pull(out[r], c, d_policy)

    def add_slice(
        self, r: slice, c: slice, part: StatsSpec, logits: Tensor, ref_logits: Tensor | None, row: SavedRow
    ) -> None:
        """Add what follows from the first sweep over a tile, with p and q normalised as `row` says."""
        alone, saved = part._replace(divergences=()), torch.stack(row)
        one = self.one[0, : len(logits)]
        self._add(self.kept.prob, r, c, alone, logits, None, saved, Grads(lse=one))
        if self.kept.entropy is not None:
            self._add(self.kept.entropy, r, c, alone, logits, None, saved, Grads(entropy=-one))
        self.add_bases(r, c, part, logits, ref_logits, row, second=False)

    def add_bases(
        self,
        r: slice,
        c: slice,
        part: StatsSpec,
        logits: Tensor,
        ref_logits: Tensor | None,
        row: SavedRow,
        second: bool,
    ) -> None:
        """Add the sums of the divergences that are computed in this sweep, the first or the second."""
        zero = torch.zeros_like(row.shift_p)
        # the sums of slopes, sum_v h and sum_v k, are not subtracted here
        saved, grads = torch.stack([*row, zero, zero]), Grads(divergence=self.one[:, : len(logits)])
        for d, out in self.kept.bases:
            if (d.scaling is None) == second:
                self._add(out, r, c, part._replace(divergences=(d,)), logits, ref_logits, saved, grads)

    def rescale(self, r: slice, x: Tensor, y: Tensor) -> None:
        """Update the sums where p and q become e^x p and e^y q."""
        prob = self.kept.prob[r]
        if self.kept.entropy is not None:
            self.kept.entropy[r].mul_(x.exp()[:, None]).addcmul_(prob, (x.exp() * x)[:, None])
        for d, out in self.kept.bases:
            if d.scaling is not None:
                a, b = d.scaling(x, y, *d.params)
                out[r].mul_(a[:, None]).addcmul_(prob, b[:, None])
        prob.mul_(x.exp()[:, None])


def frozen_forward(call: CompactCall, keep: Tensor) -> Outputs:
    """Compute the outputs as plan_chunks.forward() does, and fill keep for frozen_backward()."""
    out, spec, backend = allocate(call), call.spec, call.backend
    n = len(call.labels)
    if not n:
        return out
    state = call.labels.new_zeros((fields(powers(spec)), n), dtype=call.dtype)
    tiles = Tiles(call)
    sums = _Frozen(call, hidden_side(call.policy), keep, tiles)
    so_far = SavedRow(*state.new_zeros((len(SavedRow._fields), n)))  # of the vocabulary so far
    for c in tiles.columns_of():
        for r in tiles.rows_of():
            part, logits, ref_logits = tiles.load(r, c)
            backend.fold(part, logits, call.labels[r], ref_logits, state[:, r], c.start == 0)
            old = SavedRow(*(number[r] for number in so_far))
            new = _normalisers(backend, state[:, r], call.ref is not None)
            if c.start:
                x = backend.in_nats((old.shift_p - new.shift_p) + (old.log_sum_p - new.log_sum_p))
                y = backend.in_nats((old.shift_q - new.shift_q) + (old.log_sum_q - new.log_sum_q))
                # y again, with the digits that x - y needs
                near = x - ((old.center - new.center) + (old.log_mean - new.log_mean))
                sums.rescale(r, x, torch.where((near - y).abs() < 1e-3, near, y))
            for place, number in zip(old, new, strict=True):
                place.copy_(number)
            sums.add_slice(r, c, part, logits, ref_logits, new)
    backend.close(spec, state, call.labels, out)
    if any(d.scaling is None for d, _ in sums.kept.bases):

        def visit(r: slice, c: slice, part: StatsSpec, logits: Tensor, ref_logits: Tensor) -> None:
            sums.add_bases(r, c, part, logits, ref_logits, saved_row(out.saved[:, r]), second=True)

        second_sweep(call, out, tiles, visit)
    return out


def _normalisers(backend: Backend, state: Tensor, ref: bool) -> SavedRow:
    """Compute from running sums what close() saves of them, without the entropy."""
    sums, _ = unpack(state)
    zero = torch.zeros_like(sums.shift_p)
    sum_p, sum_q = (x.masked_fill(x == 0, 1) for x in (sums.sum_p, sums.sum_q))
    row = SavedRow(sums.shift_p, backend.saved_log(sum_p), zero, zero, zero, zero, zero)
    if not ref:
        return row
    log_mean = log_ratio(sums.excess, sum_p, sum_q) - backend.frame(sums.center, sums.shift_p, sums.shift_q)
    return row._replace(shift_q=sums.shift_q, log_sum_q=backend.saved_log(sum_q), center=sums.center, log_mean=log_mean)


def frozen_backward(call: CompactCall, keep: Tensor, logps: Tensor, saved: Tensor, grads: Grads) -> Tensor:
    """Compute the gradient at the policy's hidden states from the kept rows, which are scaled and added."""
    spec, policy = call.spec, hidden_side(call.policy)
    n, counts = len(call.labels), call.labels != spec.ignore_index
    # with static shapes some rows do not count
    g = Grads(*[None if x is None else x.masked_fill(~counts, 0) for x in grads])
    kept, row = _Kept.of(keep, spec), saved_row(saved)
    coef = torch.zeros(n, dtype=call.dtype, device=call.labels.device)
    if g.logps is not None:
        coef.sub_(g.logps)
    if g.lse is not None:
        coef.add_(g.lse)
    if g.entropy is not None:
        coef.sub_(g.entropy * row.entropy)
    weights = {d.key: torch.zeros_like(coef) for d in bases(spec)}
    if g.divergence is not None:
        for i, (d, g_d) in enumerate(zip(spec.divergences, g.divergence, strict=True)):
            to_p, _ = slope_rows(i)
            coef.sub_(g_d * saved[to_p])
            for part in d.parts or (d.key,):
                weights[part].add_(g_d)
    dx = kept.prob * coef[:, None]
    if g.entropy is not None and kept.entropy is not None:
        dx.addcmul_(kept.entropy, -g.entropy[:, None])
    for d, sums in kept.bases:
        dx.addcmul_(sums, weights[d.key][:, None])
    if g.logps is not None:
        slope = torch.full_like(coef, spec.multiplier)
        if spec.softcap:
            y = logps + call.backend.in_nats(row.shift_p + row.log_sum_p)  # the label's logit with the head's options
            slope *= 1 - (y / (spec.multiplier * spec.softcap)).clamp(-1, 1).square()
        slope *= g.logps
        ids = call.labels.long().clamp(0, spec.vocab - 1)
        step = max(1, call.plan.tile.rows // 8)
        for r in range(0, n, step):
            block = slice(r, r + step)
            dx[block].addcmul_(policy.rows_of_head(ids[block]), slope[block, None])
    return policy.pulled(dx)
