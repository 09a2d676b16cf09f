"""Compute statistics of a part of the vocabulary, and merge those of disjoint parts.

Slices of the vocabulary are merged in the same way, and so are ranks that share a vocabulary. The arithmetic is moments.merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backends import backend_module
from ..core.divergences import Asked, Divergence, parse
from ..core.inputs import Hidden, Logits, Source, TokenStats, as_source, check_aligned, check_labels, check_pair
from . import plan_chunks
from .hidden_ops import sides_of
from .prepare import How, request


@dataclass(frozen=True)
class PartialStats:
    """The sums of rows over some tokens of the vocabulary. They have no gradient.

    state: [moments.fields(powers), rows], the fields of moments.RowMoments: shift, sum of exponentials, largest logit, label's
    logit (-inf if it is elsewhere) of the policy, the same of the reference, the moments of their difference, and the policy's
    sum of squares; then those of moments.PowerMoments for each power that a divergence needs. It is one tensor, so that ranks
    can exchange it.
    Shifts are in nats on the torch backend, in bits on Triton: only parts of the same backend can be merged.
    """

    state: Tensor
    labels: Tensor
    end: int  # one past the last token seen
    divergences: tuple[Divergence, ...]
    entropy: bool
    collision: bool
    ref: bool
    ignore_index: int
    backend: str

    def close(self) -> TokenStats:
        """Return what token_stats returns. The merged parts must make up the whole vocabulary."""
        problem = plan_chunks.plain_problem(self.divergences, self.entropy, self.collision, self.ignore_index, self.end)
        labels = self.labels.reshape(-1)
        out = plan_chunks.blank(problem, labels, self.ref, self.state.dtype)
        if len(labels):
            backend_module(self.backend).close(problem, self.state, labels, out)
        shape = self.labels.shape
        div = {} if out.div is None else {d.key: x.view(shape) for d, x in zip(self.divergences, out.div, strict=True)}
        one = (None if x is None else x.view(shape) for x in (out.ref_logps, out.entropy, out.collision))
        ref_logps, entropy, collision = one
        return TokenStats(
            out.logps.view(shape), ref_logps, div, entropy, out.lse.view(shape), self.labels != self.ignore_index,
            out.hit.view(shape), collision,
        )  # fmt: skip


def partial_stats(
    policy: Source, labels: Tensor, ref: Source | None = None, *, first: int = 0, divergence: Asked = None,
    entropy: bool = False, collision: bool = False, ignore_index: int = -100, workspace: int | None = None,
) -> PartialStats:  # fmt: skip
    """Compute token_stats over a part of the vocabulary: the tokens from `first` onwards.

    The sources hold only the columns of the logits, or the rows of the head, of these tokens.

        logits = torch.cat(columns, -1):   merge_stats([partial_stats(c, labels, first=at) for c, at in ...]).close()
                                           equals token_stats(logits, labels)

    The other arguments are those of token_stats; labels hold ids of the whole vocabulary. Divergences that need a second
    sweep over normalised probabilities (js, total_variation, the skewed KLs, alpha_beta) raise ValueError.
    """
    labels, asked = check_labels(labels), parse(divergence)
    if second := [d.key for d in asked if d.row is None]:
        raise ValueError(f"divergence: {second[0]!r} takes a second sweep, which partial statistics do not carry")
    sources = [None if s is None else as_source(name, s) for name, s in (("policy", policy), ("ref", ref))]
    for name, source in zip(("policy", "ref"), sources, strict=True):
        if isinstance(source, Logits | Hidden):
            check_aligned(name, source, labels)
            if source.process_group is not None:
                raise ValueError(f"{name}: partial statistics are of one rank's columns: leave process_group out")
        elif source is not None:
            raise TypeError(f"{name}: expected logits, fl.Logits or fl.Hidden, got fl.{type(source).__name__}")
    z, w = sources
    if w is not None:
        check_pair(z, w)  # type: ignore[arg-type]
    elif asked:
        raise ValueError(f"divergence: {asked[0].key!r} needs ref, got None")
    with torch.no_grad():
        how = How("slices", workspace, True)
        call = request(z, labels, w, asked, entropy, collision, ignore_index, how)  # type: ignore[arg-type]
        problem = call.options.problem()._replace(first=first)
        backend = call.options.backend
        opened = plan_chunks.open_call(problem, backend_module(backend), call.plan, labels, *sides_of(call), True)
        state = plan_chunks.states(opened, plan_chunks.Tiles(opened))
    end = first + problem.vocab
    return PartialStats(state, labels, end, asked, entropy, collision, w is not None, ignore_index, backend)


def merge_stats(parts: Sequence[PartialStats]) -> PartialStats:
    """Merge the sums over disjoint parts of the vocabulary, in any order and any grouping."""
    if not parts:
        raise ValueError("parts: expected at least one PartialStats, got none")
    first, *others = parts
    same = ("divergences", "entropy", "collision", "ref", "ignore_index", "backend")
    state = first.state.clone()
    for part in others:
        for name in same:
            if getattr(part, name) != getattr(first, name):
                raise ValueError(
                    f"parts: expected the same {name}, got {getattr(first, name)} and {getattr(part, name)}"
                )
        if part.state.shape != state.shape:
            raise ValueError(f"parts: expected states {list(state.shape)}, got {list(part.state.shape)}")
        problem = plan_chunks.plain_problem(
            first.divergences, first.entropy, first.collision, first.ignore_index, part.end
        )
        if state.shape[1]:
            backend_module(first.backend).merge_states(problem, state, part.state)
    return replace(first, state=state, end=max(p.end for p in parts))
