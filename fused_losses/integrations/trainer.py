"""Provide our losses for transformers' Trainer.

    compute_loss_func(loss)    for Trainer(compute_loss_func=...): from logits, which the model has already made
    FusedLossMixin             class MyTrainer(FusedLossMixin, Trainer): hidden states go to the loss, the head never runs
    TrustRegionCallback        a reference that follows the policy (TR-DPO)

Tested with transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher  # type: ignore[import-untyped]
from torch import Tensor, nn

from ..core.inputs import Hidden, LogProbs, Source
from ..core.names import present
from ..core.outputs import Parts
from ..losses import LossOutput, cross_entropy_loss, kto_baseline
from .batches import Counts, Loss, ModelInputs, check_columns, collator_columns, labels_of, model_inputs
from .trainer_metrics import Rows, Sums, weighted
from .trainer_reference import TrustRegionCallback, at_heads, flattened, freeze_adapter, saved_log_probs

__all__ = ["FusedLossMixin", "TrustRegionCallback", "compute_loss_func"]

IGNORED = -100


def compute_loss_func(
    loss: Callable[..., LossOutput] = cross_entropy_loss, *, aux_loss_coef: float | None = None, **options: Any
) -> Callable[..., Tensor]:
    """Return a function for Trainer(compute_loss_func=...).

    It computes loss(logits, labels, shift=True, num_items=..., **options).

    Args:
        loss: A loss whose units are tokens, such as fl.cross_entropy_loss. The Trainer counts label tokens over all
            micro-batches and ranks, and divides by nothing itself. For losses of pairs or sequences use FusedLossMixin.
        aux_loss_coef: The weight of a mixture's auxiliary loss; needed where the model returns one.
        **options: The options of the loss.
    """
    known = Loss(loss)
    if not _counts_tokens(known, None):
        raise ValueError(f"loss: expected one whose units are tokens, got {known.name}; use FusedLossMixin")
    if options.get("ignore_index", IGNORED) != IGNORED:
        raise ValueError(
            f"ignore_index: expected {IGNORED}, which the Trainer does not count, got {options['ignore_index']}"
        )

    def compute(outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if labels is None:
            raise ValueError("labels: expected them in the batch, got none")
        if "encoder_last_hidden_state" in outputs:
            raise NotImplementedError("model: is an encoder-decoder, whose labels are not shifted")
        value = loss(outputs["logits"], labels, shift=True, num_items=num_items_in_batch, **options).loss
        share: Tensor | float = 1.0
        if num_items_in_batch is not None:
            share = share_of((labels[..., 1:] != IGNORED).sum(), num_items_in_batch)
        return _with_aux(value, outputs.get("aux_loss"), aux_loss_coef, share)

    return compute


class FusedLossMixin:
    """Compute the loss from hidden states, in a subclass of transformers' Trainer.

        class MyTrainer(FusedLossMixin, Trainer): pass

        MyTrainer(model, args, ..., fused_loss=fl.cross_entropy_loss)
        MyTrainer(model, args, ..., fused_loss=partial(fl.dpo_loss, beta=0.1), reference=reference)

    Batches contain the model's inputs and labels (not shifted, -100 where nothing counts), pairs as [2B, T] with the
    chosen rows first. If they contain shift_labels, these are used instead of labels. Packed batches are those of
    integrations.data. "kl" of its UnpairedCollator is for fl.kto_loss, which computes its baseline from it.

    A loss of this library is divided by the number of its units (tokens, pairs or sequences) in all micro-batches and
    ranks; without average_tokens_across_devices, in all micro-batches of this rank. It is also given num_nll_tokens where
    it takes that. So the step equals that of one batch. The auxiliary loss of each micro-batch is weighted with its share
    of the units.

    The metrics of a LossOutput, and eval_loss, are means over all pairs, sequences or tokens since the last log, or of an
    evaluation. They leave out the rows that a distributed sampler repeats to fill its last batch (for a stream without a
    length the sampler does not say which rows these are). Metrics without parts are weighted with the number of rows of
    their batches.

    Evaluation returns per-token log-probs and hits ("logps", "correct" [rows, T - 1]) where a Trainer returns logits.
    They are valid for tokens whose label_ids[:, 1:] is not -100; the rest is padding. For packed batches it returns none.

    The reference is always in eval mode. Context and sequence parallelism are refused, and encoder-decoders too.

    Args:
        fused_loss: f(source, labels, ref, shift=True, ...) -> LossOutput, or f(source, labels, shift=True, ...) without a
            reference: any loss of this library, or your own function. If the batch has an entry with the name of another
            parameter of the loss (desirable, advantages, cu_seqlens, ...), the entry is passed to the loss. Entries that
            the model's forward takes are passed to the model. Raises ValueError for entries that neither takes; and, when
            the trainer is made, for a misspelt option, and for a missing entry that the loss needs, where the columns are
            known.
        reference: A model; or "adapter off" for the base model of a PEFT policy, or the name of another of its adapters.
            With None, a loss with a reference uses saved log-probs: batches contain "ref_logps" ([rows, T - 1] per token,
            or [rows]). A loss of this library for which the reference is optional needs an explicit partial(fl.dpo_loss,
            ref=None) to run without one.
        per_token: Whether fused_loss takes the number of label tokens of the whole batch as num_items. It is known for
            the losses of this library, and required for your own functions. If False, micro-batches are averaged.
        aux_loss_coef: The weight of a mixture's auxiliary loss; needed where the model returns one.
    """

    args: Any
    accelerator: Any
    loss_is_scaled_for_ga: bool | None
    model: nn.Module
    callback_handler: Any
    data_collator: Any
    gather_function: Callable[..., Any]
    get_tp_size: Callable[[], int]
    _signature_columns: list[str]

    def __init__(
        self,
        *args: Any,
        fused_loss: Callable[..., Any] = cross_entropy_loss,
        reference: nn.Module | str | None = None,
        per_token: bool | None = None,
        aux_loss_coef: float | None = None,
        **options: Any,
    ) -> None:
        self._loss = Loss(fused_loss)
        self.per_token = _counts_tokens(self._loss, per_token)
        super().__init__(*args, **options)
        if reference is self.model:
            raise ValueError(
                "reference: is the model that is trained; expected one with weights of its own, such as a copy"
            )
        refuse_split_sequences(self.accelerator)
        if isinstance(reference, str):
            freeze_adapter(self.accelerator.unwrap_model(self.model), reference)
        self.fused_loss, self.aux_loss_coef = fused_loss, aux_loss_coef
        # whatever the model's own loss takes, the Trainer must count the label tokens that remain after the shift
        self.model_accepts_loss_kwargs, self._loss_shifts_labels = self.per_token, True
        self._refuse_other_losses(reference)
        for name in ("train_dataset", "eval_dataset"):
            datasets = getattr(self, name, None)
            for dataset in datasets.values() if isinstance(datasets, dict) else [datasets]:
                check_columns(self._loss, dataset, self.data_collator, name)
        if isinstance(reference, nn.Module):
            reference.requires_grad_(False).eval()
            reference = self.accelerator.prepare_model(reference, evaluation_mode=True)
        self.reference = reference
        self.fused_metrics = {"train": Sums(), "eval": Sums()}
        self._model_inputs: ModelInputs | None = None
        self._predicting = False

    def _refuse_other_losses(self, reference: object) -> None:
        """Raise ValueError for options of transformers' own compute_loss, and for a reference that is not used."""
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor: expected 0, got {self.args.label_smoothing_factor}: fused_loss is the loss, such as "
                "partial(fl.cross_entropy_loss, label_smoothing=...)"
            )
        if getattr(self, "compute_loss_func", None) is not None:
            raise ValueError("compute_loss_func: is for a Trainer without FusedLossMixin, whose loss is fused_loss")
        if reference is None:
            return
        kind, loss = type(reference).__name__, self._loss
        if bound := {"ref", "teacher"} & loss.bound.keys():
            raise ValueError(f"reference: expected None, for {bound.pop()} is bound in fused_loss, got {kind}")
        if loss.reference is None and loss.third is None:
            raise ValueError(f"reference: {loss.name} has none, got {kind}")

    def _set_signature_columns_if_needed(self) -> None:
        """Add the columns that the loss and the collator read, so that the Trainer does not remove them as unused."""
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        wanted = {"ref_logps", "shift_labels", "kl", *self._loss.takes, *collator_columns(self.data_collator)}
        self._signature_columns += sorted(wanted - set(self._signature_columns))

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Return the number by which the losses of these batches are divided.

        It is Counts for a loss of this library, and else the Trainer's own count. It is None in evaluation, which adds up
        the parts of the loss.
        """
        if self._loss.entry is None:
            return super()._get_num_items_in_batch(batch_samples, device)  # type: ignore[misc]
        if self._predicting or not batch_samples:
            return None
        each = [self._loss.counts(batch) for batch in batch_samples]
        totals: list[Any] = [sum(x.items for x in each)]
        if each[0].nll_tokens is not None:
            totals.append(sum(x.nll_tokens for x in each))
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            local = torch.stack([torch.as_tensor(x, device=device) for x in totals])
            totals = list(self.accelerator.gather(local[None]).sum(0) / self.get_tp_size())
        items, *nll = (x.to(device) if isinstance(x, Tensor) else x for x in totals)
        # a sum over no tokens is 0, whatever it is divided by
        return Counts(items, nll[0].clamp(min=1) if nll else None)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch, and with return_outputs=True also its log-probs and hits."""
        labels, shift = labels_of(inputs)
        saved = saved_log_probs(self._loss, inputs, self.reference, self.callback_handler.callbacks)
        packed = inputs.get("cu_seqlens") is not None
        if self._model_inputs is None:
            self._model_inputs = model_inputs(model)
        entries = {k: x for k, x in inputs.items() if k not in ("ref_logps", "kl")}
        if inputs.get("kl") is not None and self._loss.baseline:
            entries["baseline"] = self._kto_baseline(model, inputs["kl"], saved)
        elif "kl" in inputs:
            entries["kl"] = inputs["kl"]
        to_model, to_loss = self._loss.split(entries, self._model_inputs)
        to_model["use_cache"] = False
        units, options = self._units(inputs), {"shift": shift, **to_loss}
        share: Tensor | float = 1.0
        counted = isinstance(num_items_in_batch, Counts) or (self.per_token and num_items_in_batch is not None)
        if isinstance(num_items_in_batch, Counts):
            options["num_items"], nll = num_items_in_batch
            options |= {} if nll is None else {"num_nll_tokens": nll}
        elif counted:
            options["num_items"] = num_items_in_batch
        if counted:
            share = share_of(units, options["num_items"])

        def loss(policy: Hidden, ref: Source | None) -> Any:
            ref = saved if ref is None else ref
            if packed:
                policy, ref = flattened(policy), flattened(ref)
            if ref is None:
                return self.fused_loss(policy, labels, **options)
            if self._loss.reference is None:
                return self.fused_loss(policy, labels, ref, **options)
            return self.fused_loss(policy, labels, **{self._loss.reference: ref}, **options)

        out, aux = at_heads(model, self.reference, to_model, loss, self.accelerator)
        if not isinstance(out, LossOutput):
            name, got = getattr(self.fused_loss, "__name__", "the function"), type(out).__name__
            raise TypeError(
                f"fused_loss: expected fl.LossOutput from {name}, got {got}; return fl.LossOutput(loss, metrics, stats)"
            )
        total = _with_aux(out.loss, aux, self.aux_loss_coef, share)
        self._record(out, aux, units, len(labels))
        self.loss_is_scaled_for_ga = counted
        if counted and self.args.average_tokens_across_devices:
            total = total * self._data_ranks()  # engines average over ranks, but num_items has already divided
        outputs = {"loss": total, "logps": out.stats.logps, "correct": out.stats.correct}
        return (total, outputs) if return_outputs else total

    def _units(self, inputs: dict[str, Any]) -> Tensor | int:
        """Return what this batch adds to num_items; for a user's loss without num_items, the number of its rows."""
        if self._loss.entry is not None:
            return self._loss.counts(inputs).items
        labels, shift = labels_of(inputs)
        return (labels[..., int(shift) :] != IGNORED).sum() if self.per_token else len(labels)

    def _kto_baseline(self, model: nn.Module, batch: dict[str, Any], saved: LogProbs | None) -> Tensor:
        """Return the baseline of KTO from a separate batch of mismatched completions."""
        if saved is not None:
            raise ValueError(
                'kl: expected a reference beside it, for its completions have no saved log-probs ("ref_logps")'
            )
        labels, shift = labels_of(batch)
        names, cu = present("model", self._model_inputs), batch.get("cu_seqlens")
        to_model = {k: x for k, x in batch.items() if k in names.forward_names and k != "labels"} | {"use_cache": False}
        everybody = torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None
        options: dict[str, Any] = {"shift": shift, "cu_seqlens": cu, "process_group": everybody}
        options |= {"ignore_index": self._loss.bound["ignore_index"]} if "ignore_index" in self._loss.bound else {}

        def baseline(policy: Hidden, ref: Source | None) -> Tensor:
            if cu is not None:
                policy, ref = flattened(policy), flattened(ref)
            return kto_baseline(policy, labels, ref, **options)

        with torch.no_grad():
            return at_heads(model, self.reference, to_model, baseline, self.accelerator).out

    # ---- metrics: sums and counts, for means of batches are not the mean of all -------------------------------------------

    def _data_ranks(self) -> int:
        """Return the number of ranks with batches of their own; ranks of tensor parallelism share their batches."""
        return self.accelerator.num_processes // self.get_tp_size()

    def _rows(self) -> Rows | None:
        """Return the rows of an evaluation's last batch, if the sampler has filled it with repeated rows, else None."""
        state, ranks = self.accelerator.gradient_state, self._data_ranks()
        if (
            self.model.training
            or not state.end_of_dataloader
            or state.remainder <= 0
            or not self.accelerator.even_batches
        ):
            return None
        loader, left = state.active_dataloader, state.remainder
        if ranks == 1:
            return Rows(0, 1, left, left)
        dispatched = isinstance(loader, DataLoaderDispatcher)
        each = -(-left // ranks) if dispatched else loader.total_batch_size // ranks
        return Rows(self.accelerator.process_index // self.get_tp_size(), ranks, each, left)

    def _record(self, out: Any, aux: Tensor | None, units: Tensor | int, rows: int) -> None:
        """Add the metrics of a batch to the running sums."""
        sums, filled = self.fused_metrics["train" if self.model.training else "eval"], self._rows()
        kept, of = (1, 1) if filled is None else (filled.kept(filled.rank), filled.each)
        parts: Parts = getattr(out, "parts", {})
        for name, terms in parts.items():
            sums.add(name, [x if kept == of else x.first(kept, of) for x in terms])
        weight = units if self.per_token else rows  # for a number that is known only as a mean
        for name, x in out.metrics.items():
            if name not in parts:
                sums.add(name, [weighted(x, rows if weight is None else weight, kept / of)])
        if aux is not None:
            sums.add("aux_loss", [weighted(aux, units, kept / of)])

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        if self.model.training:
            metrics = self.fused_metrics["train"].values(self.accelerator, self._data_ranks())
            metrics.pop("loss", None)  # the Trainer logs its own loss, the mean over steps
            logs.update(metrics)
        super().log(logs, *args, **options)  # type: ignore[misc]

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        if inputs.get("cu_seqlens") is not None and not prediction_loss_only:
            if getattr(self, "compute_metrics", None) is not None:
                raise ValueError("compute_metrics: expected padded batches, for packed ones have no rows to gather")
            prediction_loss_only = True
        self._predicting = True
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)  # type: ignore[misc]
        finally:
            self._predicting = False

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        sums = self.fused_metrics["eval"]
        sums.clear()
        if not getattr(self.args, "eval_use_gather_object", False):
            self.gather_function = self._gathered
        out = super().evaluation_loop(  # type: ignore[misc]
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        metrics = sums.values(self.accelerator, self._data_ranks())
        loss = metrics.pop("loss", None)
        for name, x in metrics.items():
            out.metrics.setdefault(f"{metric_key_prefix}_{name}", x)
        # for a user's loss it is not known what is added to the parts
        if loss is not None and self._loss.entry is not None:
            out.metrics[f"{metric_key_prefix}_loss"] = loss + (self.aux_loss_coef or 0.0) * metrics.get("aux_loss", 0.0)
        return out

    def _gathered(self, x: Any) -> Any:
        """Gather a tensor from all ranks, without the rows that the sampler has repeated.

        accelerate's own function assumes that the rows of a batch are rows of the dataset, but a pair has two.
        """
        if isinstance(x, list | tuple):
            return type(x)(self._gathered(y) for y in x)
        filled = self._rows()
        if filled is None or x.dim() < 2:
            return self.accelerator.gather_for_metrics(x)
        times = max(len(x) // filled.each, 1)
        gathered = self.accelerator.gather(x)[: filled.ranks * len(x)].unflatten(
            0, (filled.ranks, times, len(x) // times)
        )
        return torch.cat([part[:, : filled.kept(rank)].flatten(0, 1) for rank, part in enumerate(gathered)])


def refuse_split_sequences(accelerator: Any) -> None:
    """Raise NotImplementedError for context and sequence parallelism."""
    parallel = getattr(accelerator, "parallelism_config", None)
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
        raise NotImplementedError(
            "parallelism_config: the Trainer splits sequences before labels are shifted; in a loop of your own a loss "
            "takes sequence_group"
        )


def share_of(units: Tensor | int, items: Tensor | int) -> Tensor | float:
    """Return the share of a micro-batch in the units of a step; 0 where nothing counts."""
    if isinstance(items, Tensor):
        return units / items.clamp(min=1)
    return units / max(items, 1)


def _with_aux(loss: Tensor, aux: Tensor | None, coefficient: float | None, share: Tensor | float = 1.0) -> Tensor:
    """Add the weighted auxiliary loss of a mixture to the loss.

    share is the share of the micro-batch in the number by which the loss is divided. An auxiliary loss is a mean already,
    so those of all micro-batches and ranks must form one mean, while the losses form one sum.
    """
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
    return loss + coefficient * share * aux


def _counts_tokens(loss: Loss, per_token: bool | None) -> bool:
    """Return whether num_items of a loss counts tokens."""
    if loss.entry is None:
        if per_token is None:
            raise ValueError(
                f"per_token: expected True or False for {loss.name}, which is no loss of this library, got None"
            )
        return bool(per_token)
    if per_token not in (None, loss.unit == "tokens"):
        raise ValueError(f"per_token: {loss.name} is a loss of {loss.unit}, got {per_token}")
    return loss.unit == "tokens"
