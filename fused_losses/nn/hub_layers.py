"""Layers without a state for the `kernels` package, whose kernelize() puts them in place of a model's own.

They are `layers` of the folder that `python -m fused_losses hub` writes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..core.inputs import Hidden
from ..core.validation import Count
from ..losses import cross_entropy_loss

__all__ = ["ForCausalLMLoss"]


class ForCausalLMLoss(nn.Module):
    """Compute the loss of a causal language model from its hidden states and its head, with the arguments of Liger's."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        hidden_states: Tensor,
        lm_head_weight: Tensor,
        labels: Tensor | None,
        hidden_size: int,
        num_items_in_batch: Count | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        final_logit_softcapping: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the cross entropy of hidden states [..., T, H] and labels [..., T], or of shift_labels, which are shifted.

        Raises a TypeError for return_token_accuracy and return_predicted_tokens, which are not computed here.
        """
        if asked := sorted(name for name in kwargs if name.startswith("return_") and kwargs[name]):
            raise TypeError(f"{asked[0]}: is not computed by this layer")
        shifted = shift_labels is not None
        out = cross_entropy_loss(
            Hidden(hidden_states, lm_head_weight, softcap=final_logit_softcapping),
            (shift_labels if shifted else labels).view(hidden_states.shape[:-1]),  # type: ignore[union-attr]
            num_items=num_items_in_batch,
            ignore_index=ignore_index,
            shift=not shifted,
        )
        return out.loss
