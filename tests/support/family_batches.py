"""Batches of the registry of losses: random inputs of an entry, and its output and gradients beside those of its reference."""

from __future__ import annotations

import inspect
import zlib

import torch
from helpers import generator_of, relative

import fused_losses as fl
from fused_losses.losses import FAMILY

CASES = [(name, variant) for name, entry in FAMILY.items() for variant in entry.variants]


V, H, REF_H, T = 37, 8, 6, 6


class Batch:
    """Random inputs of an entry: labels with ignored tokens, a sequence that has none left but one, and what else it takes."""

    def __init__(self, name, variant, packed=False, seed=0, device="cpu"):
        self.entry = FAMILY[name]
        self.options = dict(self.entry.variants[variant])
        self.name, self.head = name, {}  # head: more of fl.Hidden's and fl.Logits' options
        g = generator_of(zlib.crc32(f"{name} {variant} {seed}".encode()))
        sequences = 6 if self.entry.batch == "pairs" else 4
        self.x, self.ref_x = (torch.randn(sequences, T, width, generator=g) for width in (H, REF_H))
        self.weight, self.ref_weight = (torch.randn(V, width, generator=g) * 0.5 for width in (H, REF_H))
        self.y = torch.randint(0, V, (sequences, T), generator=g)
        self.y[:, :2] = -100
        self.y[1, 4:] = -100
        self.y[2, 3:] = -100
        self.lead = (sequences, T)
        kinds = {
            "per sequence": lambda: torch.randn(sequences, generator=g),
            "per token": lambda: torch.randn(sequences, T, generator=g) * 0.1 - 3,
            "bool per sequence": lambda: torch.arange(sequences) % 3 != 1,
            "vector per sequence": lambda: torch.randn(sequences, 5, generator=g),
            "vectors per sequence": lambda: torch.randn(sequences, 3, 5, generator=g),
            "top-k log-probs per token": lambda: torch.randn(sequences, T, 5, generator=g).log_softmax(-1)[..., :4],
            "top-k ids per token": lambda: torch.rand(sequences, T, V, generator=g).argsort(-1)[..., :4],
        }
        self.extra = {n: kinds[kind]() for n, kind in self.entry.inputs.items()}
        if packed:
            lengths = [6, 5, 4, 6, 3, 6][:sequences]
            keep = torch.cat([i * T + torch.arange(n) for i, n in enumerate(lengths)])
            self.lead = (len(keep),)
            self.x, self.ref_x, self.y = (t.flatten(0, 1)[keep] for t in (self.x, self.ref_x, self.y))
            for n, kind in self.entry.inputs.items():
                if "per token" in kind:
                    self.extra[n] = self.extra[n].flatten(0, 1)[keep]
            self.options["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
        for n in ("x", "ref_x", "weight", "ref_weight", "y"):
            setattr(self, n, getattr(self, n).to(device))
        self.extra = {n: x.to(device) for n, x in self.extra.items()}

    def call(self, library, dtype, source, ref, how=None):
        """The output and the gradients at what `source` is made of."""
        made = {}

        def build(kind, x, weight):
            x, weight = x.to(dtype), weight.to(dtype)
            if kind == "hidden":
                return [x, weight], lambda a, b: fl.Hidden(a, b, **self.head)
            if kind == "logits":
                return [x @ weight.T], lambda a: fl.Logits(a, **self.head) if self.head else a
            logps = fl.reference.token_stats(fl.Hidden(x, weight), self.y, shift=False).logps
            return [logps], lambda a: fl.LogProbs(a)

        leaves, make = build(source, self.x, self.weight)
        made = [leaf.clone().requires_grad_() for leaf in leaves]
        other = None
        if ref is not None:
            other, make_ref = build(ref, self.ref_x, self.ref_weight)
            other = make_ref(*other)
        out = self.loss(library, dtype, make(*made), other, **(how or {}))
        return out, torch.autograd.grad(out.loss.sum() * 1.5, made)

    def loss(self, library, dtype, policy, other, **how):
        """The output, of sources."""
        extra = {n: x.to(dtype) if x.is_floating_point() else x for n, x in self.extra.items()}
        how = {"shift": False, **how}
        given = () if self.entry.ref == "unused" else (other,)
        if "ref" in inspect.signature(self.entry.call).parameters:  # not always the third
            given, extra = (), extra | {"ref": other}
        return getattr(library, self.name)(policy, self.y, *given, **extra, **self.options, **how)

    def compare(self, source, ref, tolerance=1e-5, **how):
        mine, grads = self.call(fl, torch.float32, source, ref, how)
        plain = {k: v for k, v in how.items() if k in ("reduction", "num_items", "shift", "entropy")}
        truth, exact = self.call(fl.reference, torch.float64, source, ref, plain)
        assert mine.loss.shape == truth.loss.shape
        assert relative(mine.loss, truth.loss) <= tolerance
        for g, e in zip(grads, exact, strict=True):
            assert relative(g, e) <= tolerance, (g, e)
        assert mine.metrics.keys() == truth.metrics.keys()
        for n, x in truth.metrics.items():
            torch.testing.assert_close(mine.metrics[n].double(), x.double(), rtol=1e-4, atol=1e-5, msg=n)


def sources_of(entry):
    """Pairs (policy, reference) that mean something."""
    kinds = ("hidden", "logits") if entry.distribution else ("hidden", "logits", "log-probs")
    refs = [None] if entry.ref == "unused" else list(kinds)
    found = [(kind, refs[i % len(refs)]) for i, kind in enumerate(kinds)]
    return found + ([("hidden", None)] if entry.ref == "optional" else [])


def family_call(library, name, flat=False):
    """call(**options) of a loss, or of token_stats, on random logits and labels [4, 6] (6 pairs of sequences of pairs)."""
    known = {"dpo_loss": "preference_loss", "kto_baseline": "kto_loss", "token_stats": "distillation_loss"}.get(
        name, name
    )
    batch = Batch(known, next(iter(FAMILY[known].variants)))
    policy, ref, y = batch.x @ batch.weight.T, batch.ref_x @ batch.ref_weight.T, batch.y
    extra, options = dict(batch.extra), dict(batch.options)
    if flat:
        policy, ref, y = policy[0], ref[0], y[0]
        extra = {n: x[0] for n, x in extra.items()}
    if name in ("dpo_loss", "kto_baseline"):
        extra, options = {}, {}
    if name == "token_stats":
        return lambda **more: library.token_stats(policy, y, ref, **more)
    given = {} if FAMILY[known].ref == "unused" else {"teacher" if "distillation" in known else "ref": ref}
    return lambda **more: getattr(library, name)(policy, y, **given, **extra, **options, **more)
