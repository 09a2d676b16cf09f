"""Run the reference of a transformers Trainer: a model, an adapter of the policy, or saved log-probs.

FusedLossMixin in trainer.py calls these functions. TrustRegionCallback makes a reference model follow the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from transformers import TrainerCallback

from ..core.inputs import Hidden, LogProbs, Lora
from ..core.names import present
from ..nn.at_head import AtHead, at_head
from ..nn.trust_region import TrustRegion
from .adapters import adapter_tensors, as_adapter, check_adapter
from .batches import Loss

__all__ = ["TrustRegionCallback", "at_heads", "flattened", "freeze_adapter", "saved_log_probs"]

ADAPTER_OFF = "adapter off"
CHECKPOINT = "trust_region"


def freeze_adapter(model: Any, reference: str) -> None:
    """Check that the reference is "adapter off" or an adapter that is not trained, and freeze that adapter."""
    if reference == ADAPTER_OFF:
        if not hasattr(model, "disable_adapter"):
            raise ValueError('reference: "adapter off" is of PEFT models, got a model without adapters')
        return
    if not hasattr(model, "disable_adapter"):
        raise ValueError(
            f'reference: expected a model, "adapter off" or the name of an adapter of a PEFT model, got {reference!r}'
        )
    owner = check_adapter("reference", model, reference)
    if reference in owner.active_adapters:
        raise ValueError(f"reference: {reference!r} is the adapter that is trained, expected another one, or a model")
    for _, x in adapter_tensors(owner, reference):
        x.requires_grad_(False)


def saved_log_probs(
    loss: Loss, inputs: dict[str, Any], reference: object, callbacks: Iterable[object]
) -> LogProbs | None:
    """Return the saved log-probs of a reference in a batch, or None.

    Raises ValueError where a required reference is missing, where there are two, or where the saved one becomes
    stale.
    """
    logps = inputs.get("ref_logps")
    if logps is None:
        if reference is None and loss.entry is not None and loss.reference is not None and loss.entry.ref != "unused":
            without = f"; to do without: partial(fl.{loss.name}, ref=None)" * loss.optional_reference
            raise ValueError(
                f'reference: expected one for {loss.name}, or "ref_logps" in the batch, got '
                f"{', '.join(inputs)}{without}"
            )
        return None
    if reference is not None:
        raise ValueError('reference: expected None beside "ref_logps" in the batch: which one is it?')
    if loss.reference is None and loss.third is None:
        raise ValueError(f"ref_logps: in the batch, but {loss.name} reads no reference; leave it out of the batches")
    if any(isinstance(c, TrustRegionCallback) for c in callbacks):
        raise ValueError("ref_logps: go stale where TrustRegionCallback moves the reference; give that as `reference`")
    return LogProbs(logps)


def at_heads(
    model: nn.Module, reference: Any, inputs: dict[str, Any], loss: Callable[..., Any], accelerator: Any
) -> AtHead:
    """Return the result of loss(policy, reference or None), which runs inside the forward of both models.

    reference: A model, "adapter off" or the name of an adapter of the policy, or None.
    """
    if reference is None:
        return at_head(model, lambda p: loss(p, None), **inputs)
    if isinstance(reference, str):
        base: Any = accelerator.unwrap_model(model)
        if hasattr(base.get_output_embeddings(), "modules_to_save"):
            raise NotImplementedError(
                f'reference: "{reference}" with a head that the adapter trains in full; give a model'
            )
        name = None if reference == ADAPTER_OFF else reference
        with torch.no_grad(), as_adapter(base, name), _evaluating(base):
            hidden, *lora = at_head(model, _states_and_lora, **inputs).out
        return at_head(model, lambda p: loss(p, _other_adapter(p, hidden, *lora)), **inputs)
    learns = torch.is_grad_enabled()

    def inside(q: Hidden) -> AtHead:
        with torch.set_grad_enabled(learns):
            return at_head(model, lambda p: loss(p, q), **inputs)

    with torch.no_grad():
        return at_head(reference, inside, **inputs).out


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Set the model to eval mode inside the context."""
    trains = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(trains)


def _states_and_lora(q: Hidden) -> tuple[Any, ...]:
    """Return the states of a reference, and copies of its LoRA on the head, which an engine may remove later."""
    if q.lora is None:
        return (q.hidden,)
    a, b, scaling = q.lora
    return q.hidden, a.detach().clone(), b.detach().clone(), scaling


def _other_adapter(policy: Hidden, hidden: Tensor, *lora: Any) -> Hidden:
    """Return the distribution of the same model under another adapter or none.

    It has other states, and the same head except for LoRA on it.
    """
    bias = None if policy.bias is None else policy.bias.detach()
    return replace(policy, hidden=hidden, weight=policy.weight.detach(), bias=bias, lora=Lora(*lora) if lora else None)


def flattened(source: Any) -> Any:
    """Return the states [1, total, H] of a packed batch as [total, H]."""
    return replace(source, hidden=source.hidden.flatten(0, -2)) if isinstance(source, Hidden) else source


class TrustRegionCallback(TrainerCallback):
    """Run fl.TrustRegion in a Trainer of transformers or TRL.

        trainer.add_callback(TrustRegionCallback(reference, alpha=0.6, every=512))

    The update  reference <- alpha policy + (1 - alpha) reference  is made after every `every`th step of the optimizer.

    Checkpoints also contain the reference and the schedule, in a separate folder, sharded as the reference is. A run that
    continues from a checkpoint loads them from there, and raises FileNotFoundError where they are missing. Do not use
    this with log-probs of a reference that were computed ahead, because they become stale.

    Args:
        reference: The model as the trainer runs it (prepared, sharded). FSDP2's shards are mixed without being gathered.
        alpha: As in fl.TrustRegion.
        every: As in fl.TrustRegion.
    """

    def __init__(self, reference: nn.Module, *, alpha: float = 0.6, every: int = 512) -> None:
        self.reference, self.alpha, self.every = reference, alpha, every
        self.region: TrustRegion | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if getattr(args, "precompute_ref_log_probs", False):  # TRL's
            raise ValueError(
                "precompute_ref_log_probs: expected False, log-probs computed ahead go stale as the reference moves"
            )
        self.region = TrustRegion(self.reference, model, self.alpha, self.every)
        if state.global_step:
            folder = self._folder(args, state)
            if not folder.exists():
                raise FileNotFoundError(
                    f"reference: training goes on at step {state.global_step}, but {folder} does not hold the reference of "
                    "that step, which is no longer the one that training began with; if the checkpoint lies elsewhere, copy "
                    "it to there"
                )
            saved = self._state()
            dcp.load(saved, checkpoint_id=folder, no_dist=not _distributed())
            self.reference.load_state_dict(saved["reference"])
            self.region.load_state_dict(saved["region"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        present("region", self.region).step()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        dcp.save(self._state(), checkpoint_id=self._folder(args, state), no_dist=not _distributed())

    def _state(self) -> dict[str, Any]:
        region = present("region", self.region)
        return {"reference": self.reference.state_dict(), "region": region.state_dict()}

    def _folder(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / CHECKPOINT


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
