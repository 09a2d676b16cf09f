"""Compute statistics of a part of the vocabulary, and merge those of disjoint parts.

Slices of the vocabulary are merged in the same way, and so are ranks that share a vocabulary. The arithmetic is moments.merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backends import backend_module
from ..core.batch import token_batch
from ..core.divergences import Asked, Divergence, parse
from ..core.inputs import Hidden, Logits, Source, TokenStats, as_source, check_aligned, check_pair
from ..core.layout import StatsSpec
from . import plan_chunks
from .prepare import ExecutionOptions, prepare_call
from .stats_outputs import zero_outputs


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

    def spec(self, end: int) -> StatsSpec:
        """Return what is asked of the tokens before `end`. Options of a head were applied when the sums were computed."""
        return StatsSpec(self.divergences, self.entropy, self.collision, False, self.ignore_index, end)

    def close(self) -> TokenStats:
        """Return what token_stats returns. The merged parts must make up the whole vocabulary."""
        spec, labels, shape = self.spec(self.end), self.labels.reshape(-1), self.labels.shape
        out = zero_outputs(spec, labels, len(labels), self.ref, self.state.dtype)
        if len(labels):
            backend_module(self.backend).close(spec, self.state, labels, out)

        def shaped(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.view(shape)

        values = [] if out.divergence is None else out.divergence.unbind(0)
        return TokenStats(
            logps=out.logps.view(shape),
            ref_logps=shaped(out.ref_logps),
            divergence={d.key: x.view(shape) for d, x in zip(self.divergences, values, strict=True)},
            entropy=shaped(out.entropy),
            lse=out.lse.view(shape),
            mask=self.labels != self.ignore_index,
            correct=out.hit.view(shape),
            collision=shaped(out.collision),
        )


def partial_stats(
    policy: Source,
    labels: Tensor,
    ref: Source | None = None,
    *,
    first: int = 0,
    divergence: Asked = None,
    entropy: bool = False,
    collision: bool = False,
    ignore_index: int = -100,
    workspace: int | None = None,
) -> PartialStats:
    """Compute token_stats over a part of the vocabulary: the tokens from `first` onwards.

    The sources hold only the columns of the logits, or the rows of the head, of these tokens.

        logits = torch.cat(columns, -1):   merge_stats([partial_stats(c, labels, first=at) for c, at in ...]).close()
                                           equals token_stats(logits, labels)

    The other arguments are those of token_stats; labels hold ids of the whole vocabulary, the token that each position
    predicts. Divergences that need a second
    sweep over normalised probabilities (js, total_variation, the skewed KLs, alpha_beta) raise ValueError.
    """
    batch, asked = token_batch(labels, shift=False, ignore_index=ignore_index), parse(divergence)
    labels = batch.labels
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
    policy_source, ref_source = sources
    if ref_source is not None:
        check_pair(policy_source, ref_source)  # type: ignore[arg-type]
    elif asked:
        raise ValueError(f"divergence: {asked[0].key!r} needs ref, got None")
    with torch.no_grad():
        how = ExecutionOptions("vocab_chunks", workspace, True)
        call = prepare_call(policy_source, batch, ref_source, asked, entropy, collision, how)  # type: ignore[arg-type]
        args, backend = call.args, call.args.options.backend
        spec = args.options.spec._replace(first=first)
        rows = plan_chunks.drop_ignored_rows(
            spec, backend_module(backend), call.plan, labels, args.policy, args.ref, static_shapes=True
        )
        state = plan_chunks.states(rows, plan_chunks.Tiles(rows))
    end = first + spec.vocab
    return PartialStats(state, labels, end, asked, entropy, collision, ref_source is not None, ignore_index, backend)


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
        if state.shape[1]:
            backend_module(first.backend).merge_states(first.spec(part.end), state, part.state)
    return replace(first, state=state, end=max(p.end for p in parts))
