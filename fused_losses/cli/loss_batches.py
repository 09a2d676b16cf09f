"""Small random batches for the losses of the registry: everything that an Entry says its loss takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.batch import EACH
from ..core.inputs import Hidden, Logits, LogProbs, Source
from ..losses import Entry
from ..reference.stats import token_stats

V, H, REF_H, T = 37, 8, 6, 6
LENGTHS = (6, 5, 4, 6, 3, 6)  # of packed sequences


class LossBatch:
    """Random inputs of an entry: labels with ignored tokens, one sequence with a single token left, and what else it takes."""

    def __init__(
        self, entry: Entry, variant: str, generator: torch.Generator, packed: bool = False, device: Any = "cpu"
    ) -> None:
        self.entry = entry
        self.options: dict[str, Any] = dict(entry.variants[variant])
        self.head: Mapping[str, Any] = {}  # more of fl.Hidden's and fl.Logits' options
        g = generator
        sequences = 4 if EACH[entry.batch] == 1 else 6
        self.x, self.ref_x = (torch.randn(sequences, T, width, generator=g) for width in (H, REF_H))
        self.weight, self.ref_weight = (torch.randn(V, width, generator=g) * 0.5 for width in (H, REF_H))
        self.y = torch.randint(0, V, (sequences, T), generator=g)
        self.y[:, :2] = -100
        self.y[1, 4:] = -100
        self.y[2, 3:] = -100
        self.lead: tuple[int, ...] = (sequences, T)
        kinds: dict[str, Callable[[], Tensor]] = {
            "per sequence": lambda: torch.randn(sequences, generator=g),
            "per token": lambda: torch.randn(sequences, T, generator=g) * 0.1 - 3,
            "bool per sequence": lambda: torch.arange(sequences) % 3 != 1,
            "vector per sequence": lambda: torch.randn(sequences, 5, generator=g),
            "vectors per sequence": lambda: torch.randn(sequences, 3, 5, generator=g),
            "top-k log-probs per token": lambda: torch.randn(sequences, T, 5, generator=g).log_softmax(-1)[..., :4],
            "top-k ids per token": lambda: torch.rand(sequences, T, V, generator=g).argsort(-1)[..., :4],
        }
        self.extra = {n: kinds[kind]() for n, kind in entry.inputs.items()}
        if packed:
            self._pack(LENGTHS[:sequences])
        for n in ("x", "ref_x", "weight", "ref_weight", "y"):
            setattr(self, n, getattr(self, n).to(device))
        self.extra = {n: x.to(device) for n, x in self.extra.items()}

    def _pack(self, lengths: tuple[int, ...]) -> None:
        keep = torch.cat([i * T + torch.arange(n) for i, n in enumerate(lengths)])
        self.lead = (len(keep),)
        self.x, self.ref_x, self.y = (t.flatten(0, 1)[keep] for t in (self.x, self.ref_x, self.y))
        for n, kind in self.entry.inputs.items():
            if "per token" in kind:
                self.extra[n] = self.extra[n].flatten(0, 1)[keep]
        self.options["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)

    def call(
        self, function: Any, dtype: torch.dtype, source: str, ref: str | None, how: Mapping[str, Any] | None = None
    ) -> tuple[Any, tuple[Tensor, ...]]:
        """Return the output, and the gradients at what `source` is made of."""

        def build(kind: str, x: Tensor, weight: Tensor) -> tuple[list[Tensor], Callable[..., Source]]:
            x, weight = x.to(dtype), weight.to(dtype)
            if kind == "hidden":
                return [x, weight], lambda a, b: Hidden(a, b, **self.head)
            if kind == "logits":
                return [x @ weight.T], lambda a: Logits(a, **self.head) if self.head else a
            logps = token_stats(Hidden(x, weight), self.y, shift=False).logps
            return [logps], lambda a: LogProbs(a)

        leaves, make = build(source, self.x, self.weight)
        made = [leaf.clone().requires_grad_() for leaf in leaves]
        reference = None
        if ref is not None:
            ref_leaves, make_ref = build(ref, self.ref_x, self.ref_weight)
            reference = make_ref(*ref_leaves)
        out = self.loss(function, dtype, make(*made), reference, **(how or {}))
        return out, torch.autograd.grad(out.loss.sum() * 1.5, made)

    def loss(self, function: Any, dtype: torch.dtype, policy: Source, ref: Source | None, **how: Any) -> Any:
        """Return the output of a function with the arguments of the entry's loss, for these sources."""
        how = {"shift": False, **how}
        extra: dict[str, Any] = {n: x.to(dtype) if x.is_floating_point() else x for n, x in self.extra.items()}
        positional: tuple[Source | None, ...] = () if self.entry.ref == "unused" else (ref,)
        if "ref" in inspect.signature(self.entry.call).parameters:  # not always the third
            positional, extra = (), extra | {"ref": ref}
        return function(policy, self.y, *positional, **extra, **self.options, **how)


def sources_of(entry: Entry) -> list[tuple[str, str | None]]:
    """Return the pairs of sources (policy, reference) that mean something for a loss."""
    kinds = ("hidden", "logits") if entry.distribution else ("hidden", "logits", "log-probs")
    refs: list[str | None] = [None] if entry.ref == "unused" else list(kinds)
    sources = [(kind, refs[i % len(refs)]) for i, kind in enumerate(kinds)]
    return sources + ([("hidden", None)] if entry.ref == "optional" else [])
