"""Provide the cross entropy of NeMo-Automodel's recipes from hidden states, for the `_target_` of a YAML file.

    loss_fn:
      _target_: fused_losses.integrations.nemo_automodel.FusedLinearCE

The recipes hand hidden states and the weight of the head to any loss that is a LinearCrossEntropy, whose gathering of a sharded
head (FSDP2) this one inherits. The arguments and values are those of their FusedLinearCrossEntropy; it needs no
cut-cross-entropy. These differences exist:

  * A mean over no tokens is 0. Theirs is NaN.
  * The loss is float32 (float64 where the hidden states are), and so are the sums of its gradients.
  * Weights below 0 raise an error on a CPU.

As for theirs, a bias of the head is not read, and a softcap is an option of the loss: logit_softcapping must be the model's
final_logit_softcapping. A vocabulary split by tensor parallelism is refused by LinearCrossEntropy. Tested with 0.7.0.
"""

from __future__ import annotations

from typing import Any

from nemo_automodel.components.loss.linear_ce_base import LinearCrossEntropy
from torch import Tensor

from ..core.inputs import Hidden
from ..core.names import not_one_of
from ..core.validation import REDUCTIONS
from ..losses import cross_entropy_loss

__all__ = ["FusedLinearCE"]


class FusedLinearCE(LinearCrossEntropy):
    """Compute the cross entropy from hidden states and the weight of the head.

    Args:
        ignore_index: The label of tokens that do not count.
        logit_softcapping: The softcap of the logits; 0 means none.
        reduction: "sum", "mean" or "none". The recipes divide a sum by the number of label tokens of all ranks.
    """

    def __init__(self, ignore_index: int = -100, logit_softcapping: float = 0.0, reduction: str = "sum") -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise not_one_of("reduction", reduction, REDUCTIONS)
        self.ignore_index, self.logit_softcapping, self.reduction = ignore_index, logit_softcapping, reduction

    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        lm_weight: Tensor,
        num_label_tokens: int | None = None,
        grad_reduce_group: Any = None,
        loss_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, a number, or one for each token if the reduction is "none".

        Args:
            hidden_states: [..., H], or [1, tokens, H] beside packed labels [tokens].
            labels: The next tokens [...], not to be shifted.
            lm_weight: [V, H], which may be a DTensor that FSDP has sharded.
            num_label_tokens: The divisor of a sum; with 0 the loss is 0.
            grad_reduce_group: The ranks that have tokens of their own, if lm_weight is sharded.
            loss_weights: A factor >= 0 for each token [...], of a sum.
        """
        for name, x in (("num_label_tokens", num_label_tokens), ("loss_weights", loss_weights)):
            if x is not None and self.reduction != "sum":
                raise ValueError(f"{name}: only goes with reduction='sum', got reduction={self.reduction!r}")
        if loss_weights is not None and loss_weights.shape != labels.shape:
            raise ValueError(
                f"loss_weights: expected the shape of labels, {list(labels.shape)}, got {list(loss_weights.shape)}"
            )
        weight = self.materialize_lm_weight(lm_weight, grad_reduce_group=grad_reduce_group)
        loss = cross_entropy_loss(
            Hidden(hidden_states.flatten(0, -2), weight, softcap=self.logit_softcapping or None),
            labels.flatten(),
            weights=None if loss_weights is None else loss_weights.flatten().to(hidden_states.device),
            reduction="mean" if num_label_tokens else self.reduction,
            num_items=num_label_tokens or None,
            ignore_index=self.ignore_index,
        ).loss
        if num_label_tokens == 0:
            return loss * 0.0
        return loss.view(labels.shape) if self.reduction == "none" else loss
