"""transformers' Trainer on our losses.

    compute_loss_func(loss)    for Trainer(compute_loss_func=...): from logits, which the model has made by then
    FusedLossMixin             class MyTrainer(FusedLossMixin, Trainer): hidden states go to the loss, the head never runs
    TrustRegionCallback        a reference that follows the policy (TR-DPO)

Tested with transformers 5.23.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from transformers import TrainerCallback

from ..at_head import AtHead, at_head
from ..losses import FAMILY, Entry, LossOutput, cross_entropy_loss
from ..sources import Hidden, LogProbs, Source
from ..trust_region import TrustRegion

__all__ = ["FusedLossMixin", "TrustRegionCallback", "compute_loss_func"]

NOT_THE_MODELS = ("labels", "shift_labels", "completion_mask", "ref_logps", "num_items_in_batch", "skip_logits")
CHECKPOINT = "trust_region"


def compute_loss_func(
    loss: Callable[..., LossOutput] = cross_entropy_loss, *, aux_loss_coef: float | None = None, **options: Any
) -> Callable[..., Tensor]:
    """A function for Trainer(compute_loss_func=...): loss(logits, labels, shift=True, num_items=..., **options).

    loss: one whose units are tokens, such as fl.cross_entropy_loss: the Trainer counts label tokens, over all micro-batches and
        ranks, and divides by nothing itself. For losses of pairs or sequences use FusedLossMixin.
    aux_loss_coef: what a mixture's auxiliary loss is weighted with; needed where the model returns one.
    """
    if not _counts_tokens(loss, None):
        raise ValueError(f"loss: expected one whose units are tokens, got {_name(loss)}; use FusedLossMixin")

    def compute(outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if labels is None:
            raise ValueError("labels: expected them in the batch, got none")
        if "encoder_last_hidden_state" in outputs:
            raise NotImplementedError("model: is an encoder-decoder, whose labels are not shifted")
        found = loss(outputs["logits"], labels, shift=True, num_items=num_items_in_batch, **options).loss
        return _with_aux(found, outputs.get("aux_loss"), aux_loss_coef)

    return compute


class FusedLossMixin:
    """compute_loss from hidden states, for a subclass of transformers' Trainer:

        class MyTrainer(FusedLossMixin, Trainer): pass

        MyTrainer(model, args, ..., fused_loss=fl.cross_entropy_loss)
        MyTrainer(model, args, ..., fused_loss=partial(fl.dpo_loss, beta=0.1), reference=reference)

    fused_loss: f(source, labels, ref, shift=True, ...) -> LossOutput, or f(source, labels, shift=True, ...) without a
        reference: any loss of this library that needs no more than that, or a function of your own.
    reference: a model; or "adapter off" for the base model of a PEFT policy; or None, and then saved log-probs: batches hold
        "ref_logps" ([rows, T - 1] per token, or [rows]). A loss of this library that can do without says so itself:
        partial(fl.dpo_loss, ref=None).
    per_token: whether fused_loss takes the number of label tokens of the whole batch as num_items. Known for the losses of
        this library, needed for functions of your own. Where it does not, micro-batches are averaged.
    aux_loss_coef: what a mixture's auxiliary loss is weighted with; needed where the model returns one.

    Batches hold the model's inputs and labels (not shifted, -100 where nothing counts), pairs as [2B, T] with the chosen rows
    first. The metrics of a LossOutput are averaged between logs and logged under their names. Evaluation returns per-token
    log-probs and hits ("logps", "correct" [rows, T - 1]) where a Trainer returns logits; they are of the tokens whose
    label_ids[:, 1:] is not -100, the rest is padding.

    The reference is in eval mode, whichever it is. Context and sequence parallelism are refused, encoder-decoders too.
    """

    args: Any
    accelerator: Any
    loss_is_scaled_for_ga: bool | None
    model: nn.Module
    callback_handler: Any
    _signature_columns: list[str]

    def __init__(
        self, *args: Any, fused_loss: Callable[..., Any] = cross_entropy_loss, reference: nn.Module | str | None = None,
        per_token: bool | None = None, aux_loss_coef: float | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **options)
        if reference is self.model:
            raise ValueError(
                "reference: is the model that is trained; expected one with weights of its own, such as a copy"
            )
        refuse_split_sequences(self.accelerator)
        if isinstance(reference, str) and reference != "adapter off":
            raise ValueError(f'reference: expected a model, "adapter off" or None, got {reference!r}')
        if reference == "adapter off" and not hasattr(self.accelerator.unwrap_model(self.model), "disable_adapter"):
            raise ValueError('reference: "adapter off" is of PEFT models, got a model without adapters')
        self.fused_loss, self.per_token, self.aux_loss_coef = (
            fused_loss,
            _counts_tokens(fused_loss, per_token),
            aux_loss_coef,
        )
        self.loss_is_scaled_for_ga = self.per_token
        # whatever the model's own loss takes, the Trainer is to count label tokens, and those that are left when shifted
        self.model_accepts_loss_kwargs, self._loss_shifts_labels = self.per_token, True
        self._refuse_other_losses(reference)
        if isinstance(reference, nn.Module):
            reference.requires_grad_(False).eval()
            reference = self.accelerator.prepare_model(reference, evaluation_mode=True)
        self.reference = reference
        self.fused_metrics: dict[str, dict[str, list[Tensor]]] = {"train": defaultdict(list), "eval": defaultdict(list)}

    def _refuse_other_losses(self, reference: object) -> None:
        """What transformers' own compute_loss reads, and this one does not; and a reference that the loss has no use for."""
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor: expected 0, got {self.args.label_smoothing_factor}: fused_loss is the loss, such as "
                "partial(fl.cross_entropy_loss, label_smoothing=...)"
            )
        if getattr(self, "compute_loss_func", None) is not None:
            raise ValueError("compute_loss_func: is for a Trainer without FusedLossMixin, whose loss is fused_loss")
        entry = _entry(self.fused_loss)
        if reference is not None and entry is not None and entry.ref == "unused":
            raise ValueError(f"reference: {_name(self.fused_loss)} has none, got {type(reference).__name__}")

    def _set_signature_columns_if_needed(self) -> None:
        """Saved log-probs are no input of the model, but no unused column either."""
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if "ref_logps" not in self._signature_columns:
            self._signature_columns.append("ref_logps")

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.get("labels")
        if labels is None:
            raise ValueError(f"labels: expected them in the batch, got {', '.join(inputs)}")
        own = {k: x for k, x in inputs.items() if k not in NOT_THE_MODELS} | {"use_cache": False}
        saved = self._saved(inputs)
        options: dict[str, Any] = {"shift": True}
        if self.per_token and num_items_in_batch is not None:
            options["num_items"] = num_items_in_batch

        def loss(policy: Hidden, ref: Source | None) -> Any:
            ref = saved if ref is None else ref
            return self.fused_loss(policy, labels, *(() if ref is None else (ref,)), **options)

        found, aux = self._at_heads(model, own, loss)
        total = _with_aux(found.loss, aux, self.aux_loss_coef)
        for name, x in (found.metrics | ({} if aux is None else {"aux_loss": aux.detach()})).items():
            self.fused_metrics["train" if self.model.training else "eval"][name].append(x)
        if self.per_token and num_items_in_batch is not None and self.args.average_tokens_across_devices:
            ranks = self.accelerator.num_processes // self.get_tp_size()  # type: ignore[attr-defined]
            total = total * ranks  # engines average over ranks what num_items has divided
        outputs = {"loss": total, "logps": found.stats.logps, "correct": found.stats.correct}
        return (total, outputs) if return_outputs else total

    def _saved(self, inputs: dict[str, Any]) -> LogProbs | None:
        """Of a batch; raises where there is no reference at all, or two, or one that is stale."""
        logps, entry = inputs.get("ref_logps"), _entry(self.fused_loss)
        if logps is None:
            given = {"ref", "teacher"} & getattr(self.fused_loss, "keywords", {}).keys()
            if self.reference is None and entry is not None and entry.ref != "unused" and not given:
                without = f"; to do without: partial(fl.{_name(self.fused_loss)}, ref=None)" * (entry.ref == "optional")
                raise ValueError(
                    f'reference: expected one for {_name(self.fused_loss)}, or "ref_logps" in the batch, got '
                    f"{', '.join(inputs)}{without}"
                )
            return None
        if self.reference is not None:
            raise ValueError('reference: expected None beside "ref_logps" in the batch: which one is it?')
        if any(isinstance(c, TrustRegionCallback) for c in self.callback_handler.callbacks):
            raise ValueError(
                "ref_logps: go stale where TrustRegionCallback moves the reference; give that as `reference`"
            )
        return LogProbs(logps)

    def _at_heads(self, model: nn.Module, inputs: dict[str, Any], loss: Callable[..., Any]) -> AtHead:
        """loss(policy, reference or None) inside the forward of both."""
        if self.reference is None:
            return at_head(model, lambda p: loss(p, None), **inputs)
        if isinstance(self.reference, str):
            base: Any = self.accelerator.unwrap_model(model)
            if hasattr(base.get_output_embeddings(), "modules_to_save"):
                raise NotImplementedError(
                    'reference: "adapter off" with a head that the adapter trains in full; give a model'
                )
            with torch.no_grad(), base.disable_adapter(), _evaluating(base):
                hidden = at_head(model, lambda q: q.hidden, **inputs).out
            return at_head(model, lambda p: loss(p, _without_adapter(p, hidden)), **inputs)
        learns = torch.is_grad_enabled()

        def inside(q: Hidden) -> AtHead:
            with torch.set_grad_enabled(learns):
                return at_head(model, lambda p: loss(p, q), **inputs)

        with torch.no_grad():
            return at_head(self.reference, inside, **inputs).out

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        own = self.fused_metrics["train" if self.model.training else "eval"]
        runtime = "" if self.model.training else next((name for name in logs if name.endswith("_runtime")), "eval_")
        for name, seen in own.items():
            mean = self.accelerator.gather(torch.stack(seen).mean().reshape(1)).mean()
            logs[runtime.removesuffix("runtime") + name] = mean.item()
        own.clear()
        super().log(logs, *args, **options)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        self.fused_metrics["eval"].clear()  # predict() logs nothing
        return super().evaluation_loop(*args, **options)  # type: ignore[misc]


class TrustRegionCallback(TrainerCallback):
    """fl.TrustRegion in a Trainer, transformers' or TRL's: reference <- alpha policy + (1 - alpha) reference after every
    `every`th step of the optimizer.

        trainer.add_callback(TrustRegionCallback(reference, alpha=0.6, every=512))

    reference: the model as the trainer runs it (prepared, sharded). FSDP2's shards are mixed where they lie.

    Checkpoints hold the reference and the schedule too, in a folder of their own, sharded as the reference is; a run that goes
    on from a checkpoint loads them from there, and raises where they are missing. Log-probs of a reference computed ahead go
    stale: do not use them with this.
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
        assert self.region is not None
        self.region.step()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        dcp.save(self._state(), checkpoint_id=self._folder(args, state), no_dist=not _distributed())

    def _state(self) -> dict[str, Any]:
        assert self.region is not None
        return {"reference": self.reference.state_dict(), "region": self.region.state_dict()}

    def _folder(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / CHECKPOINT


def refuse_split_sequences(accelerator: Any) -> None:
    """Context and sequence parallelism."""
    parallel = getattr(accelerator, "parallelism_config", None)
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
        raise NotImplementedError(
            "parallelism_config: the Trainer splits sequences before labels are shifted; in a loop of your own a loss "
            "takes sequence_group"
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    trains = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(trains)


def _without_adapter(policy: Hidden, hidden: Tensor) -> Hidden:
    """The base model's distribution: other states, the same head."""
    bias = None if policy.bias is None else policy.bias.detach()
    return replace(policy, hidden=hidden, weight=policy.weight.detach(), bias=bias, lora=None)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _with_aux(loss: Tensor, aux: Tensor | None, coefficient: float | None) -> Tensor:
    if aux is None:
        if coefficient:
            raise ValueError(
                f"aux_loss_coef: got {coefficient}, but the model returned no auxiliary loss; set "
                "model.config.output_router_logits = True, or aux_loss_coef=None"
            )
        return loss
    if coefficient is None:
        raise ValueError(
            "aux_loss_coef: the model returns an auxiliary loss (a mixture's load balance); give its weight, such as "
            "model.config.router_aux_loss_coef, or 0.0"
        )
    return loss + coefficient * aux


def _name(loss: Callable[..., Any]) -> str:
    while isinstance(loss, partial):
        loss = loss.func
    return getattr(loss, "__name__", repr(loss))


def _entry(loss: Callable[..., Any]) -> Entry | None:
    """What this library says of a loss of its own."""
    return FAMILY.get("preference_loss" if _name(loss) == "dpo_loss" else _name(loss))


def _counts_tokens(loss: Callable[..., Any], per_token: bool | None) -> bool:
    """Whether num_items of a loss counts tokens."""
    entry = _entry(loss)
    if per_token is None and entry is None:
        raise ValueError(
            f"per_token: expected True or False for {_name(loss)}, which is no loss of this library, got None"
        )
    if entry is not None and per_token not in (None, entry.batch == "tokens"):
        raise ValueError(f"per_token: {_name(loss)} is a loss of {entry.batch}, got {per_token}")
    return entry.batch == "tokens" if per_token is None and entry is not None else bool(per_token)
