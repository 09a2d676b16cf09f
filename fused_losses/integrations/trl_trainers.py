"""Provide TRL's trainers on our losses: the same classes, arguments, batches, logged names and values.

    from fused_losses.integrations.trl_trainers import DPOTrainer    # was: from trl import DPOTrainer

The classes are DPOTrainer, KTOTrainer, DistillationTrainer and GKDTrainer. They replace _compute_loss; GKDTrainer
replaces compute_loss. Loss and gradient come from the hidden states in one pass, inside the model's forward (fl.at_head).
The reference's log-probs are computed in the same way, from its own model or with the adapter off, or come from TRL's
precomputed columns. sync_ref_model uses fl.TrustRegion. The metrics of a step are gathered in one collective and read
once.

Everything that TRL refuses is refused by TRL. These are refused too: prompt learning (virtual tokens have no labels),
ZeRO-3, a model that is compiled as a whole, a label_smoothing that no loss reads (TRL's 'sigmoid' does not), and for
distillation a student whose auxiliary loss TRL leaves out (for mixtures, GKDTrainer needs router_aux_loss_coef=0.0).
Context and sequence parallelism are refused. Options are checked when a trainer is made.

This module overrides private methods of TRL 1.16.x, so importing it with another version raises ImportError.
`trl_kernels` works for the other trainers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import trl
from torch import Tensor, nn
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import use_adapter

from ..core.divergences import Divergence, get
from ..core.inputs import Hidden, LogProbs
from ..core.options import check_kto_options, pair_loss_config
from ..engine.token_stats import token_stats
from ..losses import LOSSES, distillation_loss, kto_loss, preference_loss
from ..nn.at_head import AtHead, at_head
from .trainer import TrustRegionCallback, refuse_split_sequences
from .trl_kernels import TESTED, mean_logits

if trl.__version__.split(".")[:2] != TESTED.split(".")[:2]:
    raise ImportError(f"trl: expected version 1.16.x, tested with {TESTED}, got {trl.__version__}")

from trl.experimental.gkd import GKDTrainer as _GKDTrainer  # noqa: E402

__all__ = ["DPOTrainer", "DistillationTrainer", "GKDTrainer", "KTOTrainer"]

IGNORED = -100
Sums = dict[str, tuple[Tensor, Tensor]]  # of each metric: a sum, and the number to divide it by


class _Trainer:
    """Share the code of DPO and KTO: models with a reference, and metrics."""

    NOT_THE_MODELS: frozenset[str] = frozenset({
        "completion_mask", "ref_chosen_logps", "ref_rejected_logps", "KL_input_ids", "KL_attention_mask", "KL_completion_mask",
        "KL_token_type_ids", "KL_mm_token_type_ids", "label", "ref_logps", "ref_KL_logps",
    })  # fmt: skip
    args: Any
    accelerator: Any
    model: Any
    ref_model: Any
    aux_loss_enabled: bool
    router_aux_loss_coef: float
    _metrics: dict[str, Any]
    _total_train_tokens: int
    _tp_size: int
    add_callback: Callable[..., None]
    remove_callback: Callable[..., Any]

    def _follow(self) -> None:
        """Replace TRL's callback for sync_ref_model by TrustRegionCallback."""
        if self.args.sync_ref_model:
            self.remove_callback(SyncRefModelCallback)
            options = {"alpha": self.args.ref_model_mixup_alpha, "every": self.args.ref_model_sync_steps}
            self.add_callback(TrustRegionCallback(self.ref_model, **options))

    def _model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs of the model in a batch."""
        return {k: x for k, x in inputs.items() if k not in self.NOT_THE_MODELS} | {"use_cache": False}

    def _logps(self, model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> Tensor:
        """Return the log-probs [S, T - 1] of the labels, without a graph."""
        to_model = self._model_inputs(inputs)
        with torch.no_grad():
            return at_head(model, lambda q: token_stats(q, labels, shift=True).logps, **to_model).out

    def _reference_logps(self, model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> Tensor:
        """Return the log-probs [S, T - 1] of the reference.

        The reference is its own model, or the policy with its adapter off, or with the adapter "ref", where TRL keeps the
        copy from the start of training.
        """
        with self._as_reference():
            return self._logps(model, inputs, labels)

    def _as_reference(self) -> Any:
        """Return a context in which the policy's adapter is off or "ref", if there is no reference model."""
        base = self.accelerator.unwrap_model(self.model)
        if self.ref_model is not None or not hasattr(base, "peft_config"):
            return nullcontext()
        return use_adapter(base, adapter_name="ref" if "ref" in base.peft_config else None)

    def _reference_model(self) -> nn.Module:
        return self.model if self.ref_model is None else self.ref_model

    def _without_checkpoints(self) -> Any:
        return disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)

    def _policy(self, model: nn.Module, inputs: dict[str, Any], loss: Callable[[Hidden], dict[str, Any]]) -> AtHead:
        """Return the result of the loss inside the policy's forward, and the auxiliary loss."""
        to_model = self._model_inputs(inputs)
        if self.aux_loss_enabled:
            to_model["output_router_logits"] = True
        return at_head(model, loss, **to_model)

    def _add_aux(self, loss: Tensor, aux: Tensor | None, sums: Sums) -> Tensor:
        """Add the weighted auxiliary loss to the loss, if it is enabled."""
        if not self.aux_loss_enabled:
            return loss
        if aux is None:
            raise ValueError("router_aux_loss_coef: the model returned no auxiliary loss; set it to 0.0")
        sums["aux_loss"] = aux.detach(), torch.ones_like(aux)
        return loss + self.router_aux_loss_coef * aux

    def _record(self, inputs: dict[str, Any], sums: Sums, absent: float | None = 0.0) -> dict[str, float]:
        """Append means over all ranks to the metrics, with one collective and one synchronisation, and return them.

        absent: the value where there is nothing to divide by; None leaves the metric out.
        """
        mode = "train" if self.model.training else "eval"
        tokens = inputs["attention_mask"].sum()
        both = [torch.stack([x.detach().float(), n.float()]) for x, n in sums.values()]
        both.append(torch.stack([tokens.float(), tokens.float()]))
        *totals, (tokens_seen, _) = self.accelerator.gather(torch.stack(both)[None]).sum(0).tolist()
        metrics = {name: x / n if n else absent for name, (x, n) in zip(sums, totals, strict=True)}
        metrics = {name: x for name, x in metrics.items() if x is not None}
        for name, x in metrics.items():
            self._metrics[mode][name].append(x)
        if mode == "train":
            self._total_train_tokens += int(tokens_seen) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        return metrics  # type: ignore[return-value]

    def _with_outputs(self, loss: Tensor, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """Return the loss, and with return_outputs=True also the model's outputs from one more forward."""
        if not return_outputs:
            return loss
        warnings.warn(
            "return_outputs=True: logits for compute_metrics come from one more forward, with a vocabulary-size tensor; TRL "
            "removes them in 2.0.0",
            FutureWarning,
            stacklevel=3,
        )
        to_model = self._model_inputs(inputs)
        with torch.no_grad():
            return loss, model(**to_model)


def _labels(inputs: dict[str, Any], prefix: str = "") -> Tensor:
    """Return the token ids with -100 outside of completions."""
    return inputs[prefix + "input_ids"].masked_fill(inputs[prefix + "completion_mask"] == 0, IGNORED)


def _mean_logits(source: Hidden, mask: Tensor) -> Tensor:
    """Return the mean logits [S, T - 1], which are zero where the mask is zero."""
    means = mean_logits(source, torch.nn.functional.pad(mask, (0, 1)).flatten().nonzero().flatten())
    return means.new_zeros(mask.shape).masked_scatter(mask, means)


class DPOTrainer(_Trainer, trl.DPOTrainer):
    """Run trl.DPOTrainer on fl.preference_loss, with all of its loss types, f-divergences, LD-DPO, WPO and mixtures.

    There is one difference: 'ipo' and 'sigmoid_norm' divide by the number of tokens that have a log-prob. TRL counts one
    more where truncation_mode="keep_end" has cut off the whole prompt. Also, f_alpha_divergence_coef must be in [0, 1].
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        refuse_split_sequences(self.accelerator)
        if self.label_smoothing and "sigmoid" in self.loss_types:
            raise ValueError(
                f"label_smoothing: TRL's loss_type 'sigmoid' does not read it, expected 0, got {self.label_smoothing}; "
                "'robust' does"
            )
        pair_loss_config(True, **self.fused_options, known=LOSSES)
        self._follow()

    @property
    def fused_options(self) -> dict[str, Any]:
        """Return the options of preference_loss that correspond to the DPOConfig."""
        alpha = _alpha(self.f_alpha_divergence_coef) if self.f_divergence_type == "alpha_divergence" else None
        names = {
            "reverse_kl": "reverse_kl",
            "forward_kl": "forward_kl",
            "js_divergence": "js",
            "alpha_divergence": alpha,
        }
        if self.f_divergence_type not in names:
            raise ValueError(f"f_divergence_type: expected one of {', '.join(names)}, got {self.f_divergence_type!r}")
        return {
            "loss_type": self.loss_types,
            "loss_weights": self.loss_weights,
            "divergence": names[self.f_divergence_type],
            "beta": self.beta,
            "label_smoothing": self.label_smoothing or None,
            "discopop_tau": self.args.discopop_tau,
            "ld_alpha": self.ld_alpha,
            "use_weighting": self.use_weighting,
        }

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Return the reference's sums [B] over chosen responses, and those over rejected ones.

        They are weighted as in LD-DPO, where it is on.
        """
        labels = _labels(inputs)
        with self._without_checkpoints(), self.accelerator.autocast():
            logps = self._reference_logps(model, inputs, labels)
        if self.ld_alpha is not None:
            logps = preference_weights(labels, self.ld_alpha) * logps
        return logps.sum(1).chunk(2)

    def _reference(self, inputs: dict[str, Any], labels: Tensor) -> LogProbs:
        if not self.precompute_ref_logps:
            with self._without_checkpoints():
                return LogProbs(self._reference_logps(self._reference_model(), inputs, labels))
        sums = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        if self.ld_alpha is None:
            return LogProbs(sums)
        mask = labels[:, 1:] != IGNORED  # they are weighted already: put them at a first token, whose weight is 1
        return LogProbs(sums[:, None] * (mask & (mask.cumsum(1) == 1)))

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        labels = _labels(inputs)
        mask, pairs = labels[:, 1:] != IGNORED, len(labels) // 2
        ref = self._reference(inputs, labels)

        def loss(source: Hidden) -> dict[str, Any]:
            out = preference_loss(source, labels, ref, entropy=True, shift=True, **self.fused_options)
            count = torch.tensor(pairs, device=labels.device)
            sums = {name: (x * pairs, count) for name, x in out.metrics.items()}
            sums["entropy"] = out.metrics["entropy"] * mask.sum(), mask.sum()
            chosen, chosen_mask = out.stats.correct[:pairs], mask[:pairs]  # type: ignore[index]
            sums["mean_token_accuracy"] = (chosen & chosen_mask).sum(), chosen_mask.sum()
            for name, x, m in zip(
                ("chosen", "rejected"), _mean_logits(source, mask).chunk(2), mask.chunk(2), strict=True
            ):
                sums["logits/" + name] = x.sum(), m.sum()
            return {"loss": out.loss, "sums": sums}

        out, aux = self._policy(model, inputs, loss)
        total = self._add_aux(out["loss"], aux, out["sums"])
        self._record(inputs, out["sums"])
        return self._with_outputs(total, model, inputs, return_outputs)


def _alpha(coefficient: float) -> str | Divergence:
    """Return the divergence for TRL's coefficient, which is 1 - the alpha of f-DPO; at its ends are the two KLs."""
    if abs(coefficient - 1) < 1e-6 or coefficient == 0:
        return "reverse_kl" if coefficient else "forward_kl"
    if not 0 < coefficient < 1:
        raise ValueError(f"f_alpha_divergence_coef: expected a number in [0, 1], got {coefficient!r}")
    return get("alpha", a=1 - coefficient)


def preference_weights(labels: Tensor, alpha: float) -> Tensor:
    """Return LD-DPO's weights [2B, T - 1]: 1 up to the length of the pair's shorter response, alpha after it."""
    mask = labels[:, 1:] != IGNORED
    shorter = mask.sum(1).view(2, -1).amin(0).repeat(2)
    return torch.ones_like(mask, dtype=torch.float32).masked_fill(mask.cumsum(1) > shorter[:, None], alpha)


class KTOTrainer(_Trainer, trl.KTOTrainer):
    """Run trl.KTOTrainer on fl.kto_loss.

    It supports "kto", with its baseline from mismatched completions, and "apo_zero_unpaired".
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        refuse_split_sequences(self.accelerator)
        check_kto_options(self.loss_type, self.beta, self.desirable_weight, self.undesirable_weight)
        self._follow()

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return the reference's sums [S] over the completions, and those over the mismatched completions or None."""
        with self._without_checkpoints(), self.accelerator.autocast(), self._as_reference():
            texts = {k: x for k, x in inputs.items() if k in ("input_ids", "attention_mask")}
            return self._logps(model, texts, _labels(inputs)).sum(1), self._compute_kl_logps(model, inputs)

    def _compute_kl_logps(self, model: nn.Module, batch: dict[str, Any]) -> Tensor | None:
        if not self.calculate_KL:
            return None
        kl_batch = {k: x for k, x in batch.items() if k not in ("input_ids", "attention_mask", "completion_mask")}
        kl_batch |= {k.removeprefix("KL_"): x for k, x in batch.items() if k.startswith("KL_")}
        return self._logps(model, kl_batch, _labels(batch, "KL_")).sum(1)

    def _reference(self, batch: dict[str, Any], labels: Tensor) -> tuple[LogProbs, Tensor | None]:
        if self.precompute_ref_logps:
            return LogProbs(batch["ref_logps"]), batch["ref_KL_logps"] if self.calculate_KL else None
        model = self._reference_model()
        with self._without_checkpoints(), self._as_reference():
            return LogProbs(self._logps(model, batch, labels)), self._compute_kl_logps(model, batch)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        device = self.accelerator.device
        batch = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in inputs.items()}
        good = torch.as_tensor(batch["label"], dtype=torch.bool, device=device)
        mismatched, labels = self._compute_kl_logps(model, batch), _labels(batch)
        ref, ref_mismatched = self._reference(batch, labels)
        baseline = None
        if mismatched is not None and ref_mismatched is not None:
            baseline = self.accelerator.gather_for_metrics((mismatched - ref_mismatched).mean()).mean().clamp(min=0)
        mask = labels[:, 1:] != IGNORED

        def loss(source: Hidden) -> dict[str, Any]:
            out = kto_loss(
                source,
                labels,
                ref,
                good,
                loss_type=self.loss_type,
                baseline=baseline,
                beta=self.beta,
                entropy=True,
                shift=True,
                desirable_weight=self.desirable_weight,
                undesirable_weight=self.undesirable_weight,
            )
            count, logits = mask.sum(), _mean_logits(source, mask).sum(1)
            sums = {"kl": (out.metrics["kl"], count.new_ones(())), "entropy": (out.metrics["entropy"] * count, count)}
            for name, selected in (("chosen", good), ("rejected", ~good)):
                sums["logits/" + name] = logits[selected].sum(), mask[selected].sum()
                for metric in ("rewards/", "logps/"):
                    sums[metric + name] = (out.metrics[metric + name] * selected.sum()).nan_to_num(), selected.sum()
            return {"loss": out.loss, "sums": sums}

        out, aux = self._policy(model, batch, loss)
        total = self._add_aux(out["loss"], aux, out["sums"])
        metrics = self._record(batch, out["sums"], absent=None)
        if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["rewards/margins"].append(metrics["rewards/chosen"] - metrics["rewards/rejected"])
        return self._with_outputs(total, model, batch, return_outputs)


def _check_student(trainer: Any) -> None:
    """Raise an error for split sequences, and for a student with an auxiliary loss."""
    refuse_split_sequences(trainer.accelerator)
    config = trainer.accelerator.unwrap_model(trainer.model).config.get_text_config()
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "output_router_logits: expected False in the student's config, got True, and its auxiliary loss has no place here "
            "(TRL's own trainer leaves it out); for GKDTrainer set router_aux_loss_coef=0.0"
        )


def _jsd(student: nn.Module, teacher: nn.Module, inputs: dict[str, Any], loss: Callable[..., Any]) -> Any:
    """Return loss(student source, teacher source), which runs inside the forward of both models.

    The teacher is in eval mode and gets no gradient. If its vocabulary is larger, only as many entries as the student has
    are read, as TRL does.
    """
    learns = torch.is_grad_enabled()
    teacher.eval()

    def inside(q: Hidden) -> Any:
        def both(p: Hidden) -> Any:
            return loss(p, replace(q, valid_vocab=p.vocab) if q.vocab > p.vocab else q)

        with torch.set_grad_enabled(learns):
            return at_head(student, both, **inputs).out

    with torch.no_grad():
        return at_head(teacher, inside, **inputs).out


class DistillationTrainer(trl.DistillationTrainer):
    """Run trl.DistillationTrainer on fl.distillation_loss.

    The loss is the generalised JSD between student and teacher, whose hidden sizes may differ.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _check_student(self)

    def _compute_loss(self, unwrapped_student: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        kept = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        labels = ids.clone()
        labels[:, : inputs["prompt_ids"].shape[1]] = IGNORED
        labels[:, inputs["prompt_ids"].shape[1] :].masked_fill_(kept == 0, IGNORED)
        to_model = {
            "input_ids": ids,
            "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            "use_cache": False,
            **{k: inputs[k] for k in IMAGES if k in inputs},
        }

        def loss(p: Hidden, q: Hidden) -> tuple[Tensor, Tensor, Tensor]:
            p, q = (replace(x, temperature=self.temperature) for x in (p, q))
            out = distillation_loss(
                p, labels, q, beta=self.beta, num_items=num_items_in_batch, entropy=True, shift=True
            )
            count = out.stats.mask.sum()
            return out.loss, out.metrics["entropy"] * count, count

        return _jsd(unwrapped_student, self.teacher_model, to_model, loss)


IMAGES = (
    "pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes", "token_type_ids",
    "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


class GKDTrainer(_GKDTrainer):
    """Run trl.experimental.gkd.GKDTrainer on fl.distillation_loss."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _check_student(self)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        to_model = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
        options = {"beta": self.beta, "num_items": num_items_in_batch, "shift": True}
        loss = _jsd(
            model, self.teacher_model, to_model, lambda p, q: distillation_loss(p, inputs["labels"], q, **options).loss
        )
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**to_model)
