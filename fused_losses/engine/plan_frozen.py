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

import torch
from torch import Tensor

from ..core.divergences import Divergence, from_key
from ..core.layout import StatsSpec
from ..core.moments import fields, log_ratio
from .plan_chunks import Call, Grads, Outputs, Tiles, allocate, powers, second_sweep
from .projection import HiddenSide


def bases(problem: StatsSpec) -> list[Divergence]:
    """Return the problem's divergences, each once, where a sum of others is replaced by its parts."""
    return [from_key(k) for k in dict.fromkeys(k for d in problem.divergences for k in (d.parts or (d.key,)))]


class _Frozen:
    """The sums keep[i] of a call: keep[0] for p, then one for the entropy, then one for each base."""

    def __init__(self, call: Call, keep: Tensor, tiles: Tiles):
        assert isinstance(call.policy, HiddenSide)
        self.call, self.keep, self.policy = call, keep, call.policy
        self.bases = bases(call.problem)
        self.at = 1 + call.problem.entropy  # of the first base
        self.dz = torch.empty_like(tiles.z, dtype=call.policy.dtype)
        self.one = torch.ones((1, tiles.rows), dtype=call.dtype, device=call.labels.device)

    def _add(
        self, i: int, r: slice, c: slice, part: StatsSpec, z: Tensor, w: Tensor | None, frame: Tensor, g: int
    ) -> None:
        """Add sum_v h_v s_v W_v to keep[i].

        h_v s_v is the dz that backward writes when only output g has a gradient, of 1 (entropy: -1).
        """
        dz = self.dz[: z.shape[0], : z.shape[1]]
        grads: list[Tensor | None] = [None] * 5
        one = self.one[:, : z.shape[0]]
        grads[g] = {2: one[0], 3: -one[0], 4: one}[g]
        self.call.backend.backward(part, z, self.call.labels[r], w, frame, tuple(grads), dz, None)
        self.policy.pull(self.keep[i, r], c, dz)

    def add_slice(self, r: slice, c: slice, part: StatsSpec, z: Tensor, w: Tensor | None, frame: Tensor) -> None:
        alone = part._replace(divergences=())
        self._add(0, r, c, alone, z, None, frame[:7].contiguous(), 2)
        if part.entropy:
            self._add(1, r, c, alone, z, None, frame[:7].contiguous(), 3)
        self.add_bases(r, c, part, z, w, frame, second=False)

    def add_bases(
        self, r: slice, c: slice, part: StatsSpec, z: Tensor, w: Tensor | None, frame: Tensor, second: bool
    ) -> None:
        for i, d in enumerate(self.bases, self.at):
            if (d.scaling is None) == second:
                self._add(i, r, c, part._replace(divergences=(d,)), z, w, frame, 4)

    def rescale(self, r: slice, x: Tensor, y: Tensor) -> None:
        """Update the sums where p and q become e^x p and e^y q."""
        keep = self.keep[:, r]
        if self.call.problem.entropy:
            keep[1].mul_(x.exp()[:, None]).addcmul_(keep[0], (x.exp() * x)[:, None])
        for i, d in enumerate(self.bases, self.at):
            if d.scaling is not None:
                a, b = d.scaling(x, y, *d.params)
                keep[i].mul_(a[:, None]).addcmul_(keep[0], b[:, None])
        keep[0].mul_(x.exp()[:, None])


def frozen_forward(call: Call, keep: Tensor) -> Outputs:
    """Compute the outputs as plan_chunks.forward() does, and fill keep for frozen_backward()."""
    out, problem, backend = allocate(call), call.problem, call.backend
    n = len(call.labels)
    if not n:
        return out
    state = call.labels.new_zeros((fields(powers(problem)), n), dtype=call.dtype)
    tiles = Tiles(call)
    sums = _Frozen(call, keep, tiles)
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
    backend.close(problem, state, call.labels, *out)
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


def frozen_backward(call: Call, keep: Tensor, logps: Tensor, saved: Tensor, grads: Grads) -> Tensor:
    """Compute the gradient at the policy's hidden states from the kept rows, which are scaled and added."""
    problem, policy = call.problem, call.policy
    assert isinstance(policy, HiddenSide)
    n, here = len(call.labels), call.labels != problem.ignore_index
    g = [None if x is None else x.masked_fill(~here, 0) for x in grads]  # with static shapes some rows do not count
    coef = torch.zeros(n, dtype=call.dtype, device=call.labels.device)
    for x, sign in ((g[0], -1), (g[2], 1)):
        if x is not None:
            coef.add_(x, alpha=sign)
    if g[3] is not None:
        coef.sub_(g[3] * saved[6])
    at = 1 + problem.entropy
    weights = [torch.zeros_like(coef) for _ in keep[at:]]
    every = [d.key for d in bases(problem)]
    for i, d in enumerate(problem.divergences):
        if g[4] is not None:
            coef.sub_(g[4][i] * saved[7 + 2 * i])
            for part in d.parts or (d.key,):
                weights[every.index(part)].add_(g[4][i])
    dx = keep[0] * coef[:, None]
    if g[3] is not None:
        dx.addcmul_(keep[1], -g[3][:, None])
    for row, weight in zip(keep[at:], weights, strict=True):
        dx.addcmul_(row, weight[:, None])
    if g[0] is not None:
        slope = torch.full_like(coef, problem.multiplier)
        if problem.softcap:
            y = logps + call.backend.in_nats(saved[0] + saved[1])  # the label's logit with the head's options
            slope *= 1 - (y / (problem.multiplier * problem.softcap)).clamp(-1, 1).square()
        slope *= g[0]
        ids = call.labels.long().clamp(0, problem.vocab - 1)
        for r in range(0, n, max(1, call.plan.tile[0] // 8)):
            block = slice(r, r + max(1, call.plan.tile[0] // 8))
            dx[block].addcmul_(policy.rows_of_head(ids[block]), slope[block, None])
    return policy.pulled(dx)
