"""Batches of the registry of losses: random inputs of an entry, and its output and gradients beside those of its reference."""

from __future__ import annotations

import copy
import zlib

import torch
from helpers import Judge, generator_of, relative

import fused_losses as fl
from fused_losses.cli.loss_batches import REF_H, H, LossBatch, T, V, sources_of
from fused_losses.losses import FAMILY

__all__ = ["CASES", "FAMILY", "REF_H", "Batch", "H", "T", "V", "family_call", "sources_of"]

CASES = [(name, variant) for name, entry in FAMILY.items() for variant in entry.variants]


class Batch(LossBatch):
    """The same for a seed of the run; its functions are those of a library with the name of the loss."""

    def __init__(self, name, variant, packed=False, seed=0, device="cpu"):
        self.name = name
        g = generator_of(zlib.crc32(f"{name} {variant} {seed}".encode()))
        super().__init__(FAMILY[name], variant, g, packed, device)

    def loss(self, library, dtype, policy, other, **how):
        return super().loss(getattr(library, self.name), dtype, policy, other, **how)

    def numbers(self):
        """Return the float tensors that a call reads, by name."""
        extra = {n: x for n, x in self.extra.items() if x.is_floating_point()}
        return {n: getattr(self, n) for n in ("x", "weight", "ref_x", "ref_weight")} | extra

    def of(self, tensors):
        """Return a batch with these in place of numbers()."""
        other, named = copy.copy(self), dict(zip(self.numbers(), tensors, strict=True))
        other.extra = {n: named.pop(n, x) for n, x in self.extra.items()}
        vars(other).update(named)
        return other

    def compare(self, source, ref, tolerance=1e-5, **how):
        """Loss, gradients and metrics beside those of the reference, as a Judge: terms of a loss may cancel."""
        plain = {k: v for k, v in how.items() if k in ("reduction", "num_items", "shift", "entropy")}

        def mine(tensors):
            return self.of(tensors).call(fl, torch.float32, source, ref, how)

        def twin(tensors):
            return self.of(tensors).call(fl.reference, tensors[0].dtype, source, ref, plain)

        judge = Judge(mine, twin, list(self.numbers().values()), tolerance)
        (out, grads), (truth, exact) = judge.mine, judge.truth
        judge.value("loss", lambda output: output[0].loss)
        for i, (g, e) in enumerate(zip(grads, exact, strict=True)):
            assert g.shape == e.shape and g.isfinite().all(), f"gradient {i}"
            judge.check(f"gradient {i}", relative(g, e), lambda _, output, i=i, e=e: relative(output[1][i], e))
        assert out.metrics.keys() == truth.metrics.keys()
        for n, x in truth.metrics.items():
            if not torch.allclose(out.metrics[n].double(), x.double(), rtol=1e-4, atol=1e-5):
                judge.check(
                    n, relative(out.metrics[n], x), lambda _, output, n=n, x=x: relative(output[0].metrics[n], x)
                )


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
