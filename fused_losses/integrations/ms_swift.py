"""Provide our losses for ms-swift, from a plugin file that the user writes and gives as --external_plugins fused.py.

    from fused_losses.integrations import ms_swift

    ms_swift.register()    # adds --loss_type fused_cross_entropy and --loss_type fused_dft
    ms_swift.patch()       # and runs SFT, DPO, KTO and GKD on our operators, from the logits that they make

Both loss types take loss_scale as the weights of the tokens. patch() and patched() exchange

    swift.trainers         per_token_loss_func: SFT with a loss_scale, enable_dft_loss or enable_channel_loss
    swift.rlhf_trainers    rlhf_mixin's selective_log_softmax: DPO and KTO    gkd_loss.jsd_loss: GKD, also top-k

With a loss_scale SFT computes its own loss too, whatever --loss_type says: patch() alone is enough then. These differences
exist:

  * Results are float32 for low-precision logits. ms-swift's log-probs and divergences have the dtype of the logits.
  * A loss_scale below 0 raises an error on a CPU, and sequence parallelism one in the loss types. per_token_loss_func is not
    used by it.
  * A divergence with functions of the caller, as Megatron's for a split vocabulary, is computed by ms-swift.
  * GRPO keeps its own functions. It is imported after a plugin.

Tested with 4.6.0.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from swift.loss.base import BaseLoss
from swift.loss.mapping import loss_map
from torch import Tensor

from ..losses import cross_entropy_loss, distillation_loss
from .patching import EntryPoints, Patch, check_version
from .trl_functions import selective_log_softmax

__all__ = ["FusedCrossEntropy", "FusedDFT", "patch", "patched", "register", "unpatch"]

TESTED = "4.6.0"
IGNORED = -100


class FusedCrossEntropy(BaseLoss):
    """The cross entropy of the next tokens, with loss_scale as weights, divided by the number of label tokens."""

    loss_type = "nll"

    def __call__(
        self,
        outputs: Any,
        labels: Tensor,
        *,
        num_items_in_batch: Any = None,
        loss_scale: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Return the loss.

        Args:
            outputs: What the model has returned, with logits [B, T, V].
            labels: [B, T], which are not shifted.
            num_items_in_batch: The divisor. None: the number of label tokens of this batch.
            loss_scale: Weights [B * T] of the next tokens, which ms-swift has shifted and flattened.
            **_: Not read.
        """
        parts = 1 if self.trainer is None else self.trainer.template.sequence_parallel_size
        if parts > 1:
            raise NotImplementedError(
                f"sequence_parallel_size: expected 1, got {parts}; leave --loss_type out, ms-swift's own loss sums over ranks"
            )
        count = (labels[:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return _cross_entropy(outputs, labels, loss_type=self.loss_type, weights=loss_scale, num_items=count)


class FusedDFT(FusedCrossEntropy):
    """The loss of dynamic fine-tuning: the cross entropy of each token times its probability, which is a constant."""

    loss_type = "dft"


LOSSES = {"fused_cross_entropy": FusedCrossEntropy, "fused_dft": FusedDFT}


def register() -> None:
    """Add our losses to ms-swift's loss_map; a second call changes nothing."""
    loss_map.update(LOSSES)


def _entry_points() -> EntryPoints:
    """Return ms-swift's functions with ours."""
    check_version("swift", "ms-swift", TESTED)
    modules = ("trainers.utils", "rlhf_trainers.rlhf_mixin", "rlhf_trainers.gkd_loss")
    utils, mixin, gkd = (importlib.import_module(f"swift.{name}") for name in modules)
    return EntryPoints(
        functions=[
            (utils.per_token_loss_func, _token_losses),
            (mixin.selective_log_softmax, _log_probs),
            (gkd.jsd_loss, _jsd(gkd)),
        ]
    )


_PATCH = Patch("swift", __name__, _entry_points)


def patched() -> AbstractContextManager[None]:
    """Run ms-swift on our operators inside the block, and restore it afterwards, also after an error.

    Blocks may be nested. Raises ImportError where ms-swift has another version than 4.6.x.
    """
    return _PATCH.block()


def patch() -> None:
    """Start what patched() does, for a plugin file; each call needs an unpatch()."""
    _PATCH.start()


def unpatch() -> None:
    """End what patched() does."""
    _PATCH.end()


def _cross_entropy(outputs: Any, labels: Tensor, **options: Any) -> Tensor:
    """Return the cross entropy of labels [B, T], shifted as ms-swift does, and flattened."""
    logits = outputs.logits.flatten(0, -2)
    following = torch.roll(labels, -1, -1).flatten().to(logits.device)
    return cross_entropy_loss(logits, following, ignore_index=IGNORED, **options).loss


def _token_losses(outputs: Any, labels: Tensor, enable_dft_loss: bool = False, **_: Any) -> Tensor:
    """Return the loss of each token [B * T]."""
    return _cross_entropy(outputs, labels, loss_type="dft" if enable_dft_loss else "nll", reduction="none")


def _log_probs(logits: Tensor, index: Tensor) -> Tensor:
    """Return the log-probs of the tokens."""
    return selective_log_softmax(logits, index)


def _jsd(gkd: Any) -> Callable[..., Tensor]:
    """Return our jsd_loss; gkd is the module of theirs."""
    theirs, own = gkd.jsd_loss, (gkd.default_log_softmax, gkd.default_kl_div)

    def jsd_loss(
        s_logits: Tensor,
        t_logits: Tensor,
        beta: float,
        log_softmax_fn: Callable = own[0],
        kl_div_fn: Callable = own[1],
        chunk_size: int = 512,
    ) -> Tensor:
        """Return the sum over rows [N, V] of the generalised Jensen-Shannon divergence."""
        if (log_softmax_fn, kl_div_fn) != own:
            return theirs(s_logits, t_logits, beta, log_softmax_fn, kl_div_fn, chunk_size)
        labels = torch.zeros(len(s_logits), dtype=torch.long, device=s_logits.device)
        return distillation_loss(s_logits, labels, t_logits, beta=beta, reduction="sum").loss

    return jsd_loss
