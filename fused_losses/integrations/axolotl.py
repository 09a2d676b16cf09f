"""Provide Axolotl with a plugin: the cross entropy of supervised fine-tuning from hidden states, without the logits.

    fused_losses_cross_entropy: true

Axolotl finds the plugin by its entry point, in every run, and it does nothing without this line. With it, the forward of the
model's class computes the loss in place of the head while the model trains and is given labels. It returns the loss alone, and
is what it was after the training. Value and gradients are, to rounding, those of transformers' ForCausalLMLoss, for every model
that fl.find_head takes, also with LoRA on the head, sample packing, and the auxiliary loss of a mixture. These differences
exist:

  * A mean over no tokens is 0. Theirs is NaN.
  * These raise an error that explains why: another cross entropy in the same config, a loss function that is not
    ForCausalLMLoss, `rl`, a model that is compiled as a whole, Multi-LoRA.

In evaluation, the model makes its logits as before. Tested with 0.21.0.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, model_validator
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from ..core.inputs import Hidden
from ..losses import LossOutput, cross_entropy_loss
from ..nn.at_head import at_head
from .patching import MISSING

__all__ = ["FusedLossesArgs", "FusedLossesPlugin", "patch", "unpatch"]

OTHERS = {  # what it does not go with, and why
    "cut_cross_entropy": "is another cross entropy",
    "liger_cross_entropy": "is another cross entropy",
    "liger_fused_linear_cross_entropy": "is another cross entropy",
    "chunked_cross_entropy": "is another cross entropy",
    "use_eaft": "is another loss, from logits",
    "orpo_alpha": "is another loss, from logits",
    "torch_compile": "compiles the model with its head",
    "rl": "trains with losses of TRL, which has no labels for a model",
}


class FusedLossesArgs(BaseModel):
    """The line of the config."""

    fused_losses_cross_entropy: bool = False

    @model_validator(mode="before")
    @classmethod
    def check_nothing_else_makes_the_loss(cls, data: Any) -> Any:
        """Raise for options that the loss does not go with."""
        if data.get("fused_losses_cross_entropy"):
            for name, why in OTHERS.items():
                if data.get(name):
                    raise ValueError(f"fused_losses_cross_entropy: expected no {name}, which {why}, got {data[name]!r}")
            if data.get("adapter") == "multilora":
                raise ValueError(
                    "fused_losses_cross_entropy: expected another adapter than multilora, with several heads"
                )
        return data


class FusedLossesPlugin(BasePlugin):
    """Exchange the forward of the model's class between the building of the model and the end of the training."""

    def get_input_args(self) -> str:
        """Return the path of the arguments."""
        return f"{__name__}.FusedLossesArgs"

    def post_model_build(self, cfg: Any, model: nn.Module) -> None:
        """Exchange the forward, where the config says so."""
        if cfg.fused_losses_cross_entropy:
            loss = getattr(model, "loss_function", None)
            if loss is not ForCausalLMLoss:
                raise NotImplementedError(
                    f"fused_losses_cross_entropy: {type(model).__name__}.loss_function is {getattr(loss, '__name__', loss)}, "
                    "expected ForCausalLMLoss"
                )
            patch(type(model))

    def post_train_unload(self, cfg: Any) -> None:
        """Give back every forward."""
        unpatch()


_forwards: dict[type[nn.Module], Any] = {}  # classes, and their own `forward`, or MISSING


def patch(model_class: type[nn.Module]) -> None:
    """Compute the loss of models of this class from hidden states, until unpatch()."""
    if model_class not in _forwards:
        _forwards[model_class] = vars(model_class).get("forward", MISSING)
        model_class.forward = _fused(model_class.forward)


def unpatch() -> None:
    """Give back the forwards of all classes."""
    for model_class, before in _forwards.items():
        if before is MISSING:
            del model_class.forward
        else:
            model_class.forward = before
    _forwards.clear()


class _Inside:
    """A model whose forward is running: a call of it does not run its hooks again."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, **inputs: Any) -> Any:
        return self.module.forward(**inputs)


def _fused(before: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that computes the loss in place of the head in training, and else what it did before."""
    names = list(inspect.signature(before).parameters)[1:]

    @functools.wraps(before)
    def forward(self: nn.Module, *args: Any, **inputs: Any) -> Any:
        inputs |= dict(zip(names, args, strict=False))
        if inputs.get("labels") is None or not self.training:
            return before(self, **inputs)
        labels, following = inputs.pop("labels"), inputs.pop("shift_labels", None)
        options = {
            "num_items": inputs.pop("num_items_in_batch", None),
            "ignore_index": inputs.pop("ignore_index", -100),
        }

        def loss(source: Hidden) -> LossOutput:
            if following is not None:
                return cross_entropy_loss(source, following, shift=False, **options)
            return cross_entropy_loss(source, labels, shift=True, **options)

        out, aux = at_head(_Inside(self), loss, **inputs)  # type: ignore[arg-type]
        total = out.loss
        if aux is not None:
            total = total + aux.to(total.device) * self.router_aux_loss_coef  # type: ignore[operator]
        return MoeCausalLMOutputWithPast(loss=total, aux_loss=aux)

    return forward
