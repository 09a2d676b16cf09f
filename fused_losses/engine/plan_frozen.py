"""Compute the plan "frozen", for a head without gradients: keep expectations of the head's rows for backward.

They are updated together with the running sums, as flash attention updates its output. For each row of logits these are
E[h W] = sum_v h_v s_v W_v (s_v is the slope of the head) for h = p, for h = p log p where the entropy has a gradient, and
for h = dD/dlog p of each divergence.

During the first sweep p and q are normalised by the totals so far. When these totals grow by the factors e^-x and e^-y,
Divergence.scaling returns a and b, two numbers per row, such that h = a h' + b p'; with them a sum is updated. (Sums of
numbers that are not normalised would be enough in exact arithmetic, but p' may be huge compared with h.) The sums of
divergences without a scaling come from a second sweep, over tiles with their final normalisation.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.divergences import Divergence, from_key
from ..core.layout import Grads, StatsSpec
from ..core.moments import fields, log_ratio
from .plan_chunks import CompactCall, Tiles, allocate, powers, second_sweep
from .projection import HiddenSide, hidden_side
from .stats_outputs import Outputs


def bases(spec: StatsSpec) -> list[Divergence]:
    """Return the divergences asked for, each once, where a sum of others is replaced by its parts."""
    return [from_key(k) for k in dict.fromkeys(k for d in spec.divergences for k in (d.parts or (d.key,)))]


def kept_sums(spec: StatsSpec) -> int:
    """Return how many sums are kept for each row."""
    return 1 + spec.entropy + len(bases(spec))


class _Kept(NamedTuple):
    """The sums that are kept, each [rows, H + rank]."""

    p: Tensor
    entropy: Tensor | None
    bases: tuple[Tensor, ...]

    @classmethod
    def of(cls, keep: Tensor, spec: StatsSpec) -> _Kept:
        """Return the parts of a tensor [kept_sums(spec), rows, H + rank]."""
        sums = iter(keep)
        return cls(next(sums), next(sums) if spec.entropy else None, tuple(sums))


class _Frozen:
    """The sums of a call, while they are computed."""

    def __init__(self, call: CompactCall, policy: HiddenSide, keep: Tensor, tiles: Tiles):
        self.call, self.policy = call, policy
        self.kept, self.bases = _Kept.of(keep, call.spec), bases(call.spec)
        self.dz = torch.empty_like(tiles.z, dtype=policy.dtype)
        self.one = torch.ones((1, tiles.rows), dtype=call.dtype, device=call.labels.device)

    def _add(
        self, out: Tensor, r: slice, c: slice, part: StatsSpec, z: Tensor, w: Tensor | None, frame: Tensor, grads: Grads
    ) -> None:
        """Add sum_v h_v s_v W_v to a sum `out`.

        h_v s_v is the dz that backward writes when only one output has a gradient, of 1 (entropy: -1).
        """
        dz = self.dz[: z.shape[0], : z.shape[1]]
        self.call.backend.backward(part, z, self.call.labels[r], w, frame, grads, dz, None)
        self.policy.pull(out[r], c, dz)

    def add_slice(self, r: slice, c: slice, part: StatsSpec, z: Tensor, w: Tensor | None, frame: Tensor) -> None:
        alone = part._replace(divergences=())
        one = self.one[0, : len(z)]
        self._add(self.kept.p, r, c, alone, z, None, frame[:7].contiguous(), Grads(lse=one))
        if self.kept.entropy is not None:
            self._add(self.kept.entropy, r, c, alone, z, None, frame[:7].contiguous(), Grads(entropy=-one))
        self.add_bases(r, c, part, z, w, frame, second=False)

    def add_bases(
        self, r: slice, c: slice, part: StatsSpec, z: Tensor, w: Tensor | None, frame: Tensor, second: bool
    ) -> None:
        grads = Grads(divergence=self.one[:, : len(z)])
        for out, d in zip(self.kept.bases, self.bases, strict=True):
            if (d.scaling is None) == second:
                self._add(out, r, c, part._replace(divergences=(d,)), z, w, frame, grads)

    def rescale(self, r: slice, x: Tensor, y: Tensor) -> None:
        """Update the sums where p and q become e^x p and e^y q."""
        p = self.kept.p[r]
        if self.kept.entropy is not None:
            self.kept.entropy[r].mul_(x.exp()[:, None]).addcmul_(p, (x.exp() * x)[:, None])
        for out, d in zip(self.kept.bases, self.bases, strict=True):
            if d.scaling is not None:
                a, b = d.scaling(x, y, *d.params)
                out[r].mul_(a[:, None]).addcmul_(p, b[:, None])
        p.mul_(x.exp()[:, None])


def frozen_forward(call: CompactCall, keep: Tensor) -> Outputs:
    """Compute the outputs as plan_chunks.forward() does, and fill keep for frozen_backward()."""
    out, spec, backend = allocate(call), call.spec, call.backend
    n = len(call.labels)
    if not n:
        return out
    state = call.labels.new_zeros((fields(powers(spec)), n), dtype=call.dtype)
    tiles = Tiles(call)
    sums = _Frozen(call, hidden_side(call.policy), keep, tiles)
    frames = state.new_zeros((9, n))  # the numbers saved for backward, of the vocabulary so far
    for c in tiles.columns_of():
        for r in tiles.rows_of():
            part, z, w = tiles.load(r, c)
            backend.fold(part, z, call.labels[r], w, state[:, r], c.start == 0)
            old, new = frames[:, r], _frame(backend, state[:, r], call.ref is not None)
            if c.start:
                x, y = (backend.in_nats((old[i] - new[i]) + (old[i + 1] - new[i + 1])) for i in (0, 2))
                near = x - ((old[4] - new[4]) + (old[5] - new[5]))  # y again, with the digits that x - y needs
                sums.rescale(r, x, torch.where((near - y).abs() < 1e-3, near, y))
            old.copy_(new)
            sums.add_slice(r, c, part, z, w, new)
    backend.close(spec, state, call.labels, *out)
    if any(d.scaling is None for d in sums.bases):

        def visit(r: slice, c: slice, part: StatsSpec, z: Tensor, w: Tensor) -> None:
            row = torch.cat([out.saved[:6, r], torch.zeros_like(out.saved[:3, r])])
            sums.add_bases(r, c, part, z, w, row, second=True)

        second_sweep(call, out, tiles, visit)
    return out


def _frame(backend: ModuleType, state: Tensor, ref: bool) -> Tensor:
    """Compute m_p, log A, m_q, log B, c and K from running sums, and add zeros for the sums of slopes."""
    frame = torch.zeros((9, state.shape[1]), dtype=state.dtype, device=state.device)
    a, b = (state[i].masked_fill(state[i] == 0, 1) for i in (1, 6))
    frame[0], frame[1] = state[0], backend.saved_log(a)
    if ref:
        frame[2], frame[3], frame[4] = state[5], backend.saved_log(b), state[8]
        frame[5] = log_ratio(state[9], a, b) - backend.frame(state[8], state[0], state[5])
    return frame


def frozen_backward(call: CompactCall, keep: Tensor, logps: Tensor, saved: Tensor, grads: Grads) -> Tensor:
    """Compute the gradient at the policy's hidden states from the kept rows, which are scaled and added."""
    spec, policy = call.spec, hidden_side(call.policy)
    n, here = len(call.labels), call.labels != spec.ignore_index
    # with static shapes some rows do not count
    g = Grads(*[None if x is None else x.masked_fill(~here, 0) for x in grads])
    coef = torch.zeros(n, dtype=call.dtype, device=call.labels.device)
    if g.logps is not None:
        coef.sub_(g.logps)
    if g.lse is not None:
        coef.add_(g.lse)
    if g.entropy is not None:
        coef.sub_(g.entropy * saved[6])
    kept = _Kept.of(keep, spec)
    weights = {d.key: torch.zeros_like(coef) for d in bases(spec)}
    if g.divergence is not None:
        for i, (d, g_d) in enumerate(zip(spec.divergences, g.divergence, strict=True)):
            coef.sub_(g_d * saved[7 + 2 * i])
            for part in d.parts or (d.key,):
                weights[part].add_(g_d)
    dx = kept.p * coef[:, None]
    if g.entropy is not None and kept.entropy is not None:
        dx.addcmul_(kept.entropy, -g.entropy[:, None])
    for row, weight in zip(kept.bases, weights.values(), strict=True):
        dx.addcmul_(row, weight[:, None])
    if g.logps is not None:
        slope = torch.full_like(coef, spec.multiplier)
        if spec.softcap:
            y = logps + call.backend.in_nats(saved[0] + saved[1])  # the label's logit with the head's options
            slope *= 1 - (y / (spec.multiplier * spec.softcap)).clamp(-1, 1).square()
        slope *= g.logps
        ids = call.labels.long().clamp(0, spec.vocab - 1)
        step = max(1, call.plan.tile.rows // 8)
        for r in range(0, n, step):
            block = slice(r, r + step)
            dx[block].addcmul_(policy.rows_of_head(ids[block]), slope[block, None])
    return policy.pulled(dx)
