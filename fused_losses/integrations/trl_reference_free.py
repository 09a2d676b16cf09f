"""Provide TRL's CPO and ORPO trainers on our losses: the same classes, arguments, batches, logged names and values.

    from fused_losses.integrations.trl_reference_free import CPOTrainer    # was: from trl.experimental.cpo import CPOTrainer

CPOTrainer has all of TRL's loss types: sigmoid (CPO), hinge, ipo and simpo (SimPO, CPO-SimPO, AlphaPO). Both classes replace
get_batch_loss_metrics: loss and gradient come from the hidden states in one pass, inside the model's forward (fl.at_head), and
the metrics of a step are gathered in one collective and read once, as means of the ranks' means.

Refused when a trainer is made: encoder-decoder models, a label_smoothing that the loss type does not read, an alpha (AlphaPO)
beside another loss type than simpo, and split sequences. Everything that TRL refuses is refused by TRL.

This module overrides methods of TRL 1.16.x, so importing it with another version raises ImportError.
"""

from __future__ import annotations

from typing import Any

import torch
import trl
from torch import Tensor, nn

from ..core.inputs import Hidden
from ..core.outputs import LossOutput
from ..losses import cpo_loss, orpo_loss, simpo_loss
from ..nn.at_head import at_head
from .trainer import refuse_split_sequences
from .trl_kernels import TESTED, mean_logits

if trl.__version__.split(".")[:2] != TESTED.split(".")[:2]:
    raise ImportError(f"trl: expected version 1.16.x, tested with {TESTED}, got {trl.__version__}")

from trl.experimental.cpo import CPOTrainer as _CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer as _ORPOTrainer  # noqa: E402

__all__ = ["CPOTrainer", "ORPOTrainer"]

IGNORED = -100


class _ReferenceFree:
    """Share the step of both trainers: the batch, the model's forward, the metrics."""

    accelerator: Any
    is_encoder_decoder: Any
    aux_loss_enabled: Any
    aux_loss_coef: Any
    concatenated_inputs: Any
    padding: str  # the attribute that has the id of padding
    logits_of: slice  # the positions whose logits TRL averages

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        refuse_split_sequences(self.accelerator)
        if self.is_encoder_decoder:
            raise ValueError("model: expected a decoder, got an encoder-decoder model; TRL's own trainer takes it")

    def _loss(self, policy: Hidden, labels: Tensor, batch: dict[str, Tensor]) -> LossOutput:
        """Return the loss of a batch of pairs, whose metrics have TRL's names."""
        raise NotImplementedError

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: dict[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss and the metrics of a batch."""
        both = self.concatenated_inputs(
            batch, padding_value=getattr(self, self.padding), device=self.accelerator.device
        )
        labels = both["concatenated_labels"]

        def loss(policy: Hidden) -> dict[str, Any]:
            out = self._loss(policy, labels, both)
            with torch.no_grad():
                means = mean_logits(policy).view(labels.shape)[:, self.logits_of]
            chosen, rejected = (half.mean() for half in means.tensor_split(2))
            return {"loss": out.loss, "metrics": out.metrics | {"logits/chosen": chosen, "logits/rejected": rejected}}

        more = {"output_router_logits": True} if self.aux_loss_enabled else {}
        inputs = {name: both[f"concatenated_{name}"] for name in ("input_ids", "attention_mask")}
        result = at_head(model, loss, **inputs, use_cache=False, **more)
        total, metrics = result.out["loss"], result.out["metrics"]
        values = torch.stack([x.detach().float() for x in metrics.values()])
        means = self.accelerator.gather(values[None]).mean(0).tolist()
        if self.aux_loss_enabled:
            total = total + self.aux_loss_coef * result.aux_loss
        prefix = "eval_" if train_eval == "eval" else ""
        return total, {prefix + name: x for name, x in zip(metrics, means, strict=True)}


class CPOTrainer(_ReferenceFree, _CPOTrainer):
    """Run trl.experimental.cpo.CPOTrainer on fl.cpo_loss and fl.simpo_loss."""

    padding, logits_of = "pad_token_id", slice(None)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.label_smoothing and self.loss_type in ("hinge", "ipo"):
            raise ValueError(f"label_smoothing: loss_type {self.loss_type!r} does not read it, expected 0")
        if self.alpha and self.loss_type != "simpo":
            raise ValueError(f"alpha: AlphaPO is beside loss_type 'simpo', got {self.loss_type!r}")

    def _loss(self, policy: Hidden, labels: Tensor, batch: dict[str, Tensor]) -> LossOutput:
        common: dict[str, Any] = {
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            "cpo_alpha": self.cpo_alpha,
        }
        if self.loss_type == "simpo":
            out = simpo_loss(policy, labels, gamma=self.simpo_gamma, alpha=self.alpha, shift=True, **common)
        else:
            out = cpo_loss(policy, labels, loss_type=self.loss_type, shift=True, **common)
        if self.cpo_alpha == 0:  # as TRL logs it
            out.metrics["nll_loss"] = torch.zeros_like(out.loss)
        return out


class ORPOTrainer(_ReferenceFree, _ORPOTrainer):
    """Run trl.experimental.orpo.ORPOTrainer on fl.orpo_loss, with TRL's NLL over prompt and response of the chosen."""

    padding, logits_of = "padding_value", slice(-1)

    def _loss(self, policy: Hidden, labels: Tensor, batch: dict[str, Tensor]) -> LossOutput:
        texts = batch["concatenated_input_ids"].masked_fill(batch["concatenated_attention_mask"] == 0, IGNORED)
        return orpo_loss(policy, labels, beta=self.beta, nll_labels=texts, shift=True)
