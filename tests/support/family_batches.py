"""Batches of the registry of losses: random inputs of an entry, and its output and gradients beside those of its reference."""

from __future__ import annotations

import zlib

import torch
from helpers import generator_of, relative

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
