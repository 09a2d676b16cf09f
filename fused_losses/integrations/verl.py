"""Put our operators behind verl 0.9's fused log-probs, its top-k distillation loss, and VESPO into its registry.

    FUSED_LOSSES_VERL=1 python -m verl.trainer.main_ppo \\
        actor_rollout_ref.model.use_fused_kernels=True \\
        actor_rollout_ref.model.fused_kernel_options.impl_backend=torch ...

verl loads this module by its entry point (group verl.plugins). It changes nothing unless the environment variable
FUSED_LOSSES_VERL is 1, in every process: actors on other machines get it from +ray_kwargs.ray_init.runtime_env.env_vars. In a
script of one's own, `with verl.patched():` does the same for a block, and gives everything back. These are replaced:

    FusedLinearForPPOFunction.apply     which FusedLinearForPPO.forward calls under impl_backend=torch
    linear_cross_entropy                which the models call under impl_backend=triton, and Megatron's with a process_group
    fsdp.losses.compute_forward_kl_topk the loss, masses and overlap of distillation_loss.loss_mode=forward_kl_topk
    policy_loss.loss_mode=fl_vespo      VESPO, which verl has not (token-mean alone)

Arguments and outputs are those of verl, with the same shapes and dtypes of the first two. These differences exist:

  * temperature may also be a tensor: one number for each token or sample. verl's FSDP engine still asserts that it is none.
  * A label of -100 gives the log-prob and entropy 0.
  * Logits are computed in float32, where verl rounds them to the dtype of the states. chunk_size is ignored.
  * With a process_group, the gradient of the states on each rank is the whole one divided by the number of ranks, where verl's
    is that of this rank's rows. Their sums are the same, and Megatron's sequence parallelism takes the sum.
  * The top-k loss is float32, and takes at most 128 ids. That of Megatron is verl's own.

impl_backend=liger is not changed: see liger_kernels. Tested with 0.9.1 on a CPU: the functions and a
model's forward, not a training run.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.inputs import Hidden, LogProbs, Source
from ..core.names import not_one_of, present
from ..engine.support import logits_at
from ..engine.token_stats import token_stats
from ..engine.topk import topk
from ..losses import grpo_loss
from .patching import EntryPoints, Patch, check_version

__all__ = ["forward_kl_topk", "patch", "patched", "plugin", "unpatch", "vespo"]

TESTED = "0.9.1"
SWITCH = "FUSED_LOSSES_VERL"
REDUCTIONS = ("none", "sum", "mean")
LOSS = "fl_vespo"


def _entry_points() -> EntryPoints:
    """Return verl's callables with ours."""
    check_version("verl", "verl", TESTED)
    ppo = importlib.import_module("verl.utils.experimental.torch_functional")
    kernel = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    distillation = importlib.import_module("verl.trainer.distillation.fsdp.losses")
    _registry()
    return EntryPoints(
        classes=[(ppo.FusedLinearForPPOFunction, _for_ppo)],
        functions=[
            (kernel.linear_cross_entropy, _linear_cross_entropy),
            (distillation.compute_forward_kl_topk, _compute_forward_kl_topk),
        ],
    )


_PATCH = Patch("verl", __name__, _entry_points)


@contextmanager
def patched() -> Iterator[None]:
    """Run verl on our operators inside the block, and restore it afterwards, also after an error.

    Blocks may be nested. Raises ImportError where verl is not installed, or has another version than 0.9.x.
    """
    patch()
    try:
        yield
    finally:
        unpatch()


def patch() -> None:
    """Start what patched() does; each call needs an unpatch()."""
    _PATCH.start()
    _registry().register_policy_loss(LOSS)(vespo)


def unpatch() -> None:
    """End what patched() does."""
    _PATCH.end()
    if _PATCH.depth == 0:
        _registry().POLICY_LOSS_REGISTRY.pop(LOSS, None)


def plugin() -> None:
    """Patch verl for the whole process if the environment variable FUSED_LOSSES_VERL is 1.

    verl keeps silent about errors of plugins, so they are logged too.

    Raises:
        ValueError: If the variable is neither 0 nor 1.
        ImportError: If verl has another version.
    """
    asked = os.environ.get(SWITCH, "0")
    try:
        if asked not in ("0", "1"):
            raise ValueError(f"{SWITCH}: expected 0 or 1, got {asked!r}")
        if asked == "1":
            patch()
    except (AttributeError, ImportError, ValueError) as e:
        logging.getLogger(__name__).error("verl runs on its own kernels: %s", e)
        raise


def _registry() -> Any:
    """Return the module with verl's policy losses."""
    return importlib.import_module("verl.trainer.ppo.core_algos")


def _for_ppo(
    hidden_states: Tensor,
    vocab_weights: Tensor,
    input_ids: Tensor,
    temperature: float | Tensor = 1.0,
    chunk_size: int = 512,
) -> tuple[Tensor, Tensor]:
    """Return log-probs (float32) and entropy (dtype of the states) of each token, in the shape of input_ids."""
    source = Hidden(hidden_states, vocab_weights, temperature=_by_row(temperature, input_ids))
    stats = token_stats(source, input_ids, entropy=True, shift=False)
    return stats.logps.float(), present("entropy", stats.entropy).to(hidden_states.dtype)


def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Return log-probs [tokens], their sum or their mean, and the entropy [tokens], in float32; weight: this rank's rows."""
    if reduction.lower() not in REDUCTIONS:
        raise not_one_of("reduction", reduction, REDUCTIONS)
    ranks = 1 if dist_process_group is None else dist.get_world_size(dist_process_group)
    labels = labels.reshape(hidden.shape[:-1])
    source = Hidden(
        hidden if ranks == 1 else _Part.apply(hidden, ranks),
        weight,
        temperature=_by_row(temperature, labels),
        process_group=None if ranks == 1 else dist_process_group,
    )
    stats = token_stats(source, labels, entropy=True, shift=False)
    logps, entropy = (x.float().flatten() for x in (stats.logps, present("entropy", stats.entropy)))
    return {"none": logps, "sum": logps.sum(), "mean": logps.mean()}[reduction.lower()], entropy


def _by_row(temperature: float | Tensor, ids: Tensor) -> float | Tensor:
    """Return the temperature; packed, one for each token [total], in the shape [1, total] of the ids."""
    packed = isinstance(temperature, Tensor) and temperature.dim() == 1 and temperature.numel() == ids.numel()
    return temperature.view(ids.shape) if packed else temperature  # type: ignore[union-attr]


class _Part(torch.autograd.Function):
    """The states unchanged, with one part in `ranks` of their gradient: what calls linear_cross_entropy sums over ranks."""

    @staticmethod
    def forward(ctx, x, ranks):  # type: ignore[no-untyped-def]
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return g / ctx.ranks, None


def _compute_forward_kl_topk(
    student_logits: Tensor, teacher_topk_log_probs: Tensor, teacher_topk_ids: Tensor, config: Any, data_format: str
) -> dict[str, Tensor]:
    """Return what verl's function of this name does, for its FSDP engine: teacher tensors are nested [batch, (tokens), K]."""
    if not (teacher_topk_log_probs.is_nested and teacher_topk_ids.is_nested):
        raise ValueError("teacher_topk_log_probs, teacher_topk_ids: expected nested tensors [batch, (tokens), K]")
    ulysses = importlib.import_module("verl.utils.ulysses")
    logps, ids = (x.values().unsqueeze(0) for x in (teacher_topk_log_probs, teacher_topk_ids))
    if ulysses.get_ulysses_sequence_parallel_world_size() > 1:
        logps, ids = (ulysses.slice_input_tensor(x, dim=1) for x in (logps, ids))
    return forward_kl_topk(student_logits, logps, ids, config.distillation_loss.log_prob_min_clamp)


def forward_kl_topk(
    student: Source, teacher_logps: Tensor, teacher_ids: Tensor, log_prob_min_clamp: float | None = None
) -> dict[str, Tensor]:
    """Compute verl's forward KL over the teacher's K best tokens, for each token, with its metrics.

    With a fl.Hidden student no logits exist: this is what a forward of one's own may call.

    Args:
        student: logits [..., V] or fl.Hidden.
        teacher_logps: [..., K], natural logarithms.
        teacher_ids: [..., K], at most 128 for each token.
        log_prob_min_clamp: The lower bound of both log-probs in the loss, or None. Masses are those without it.

    Returns:
        distillation_losses, with a gradient, student_mass, teacher_mass, overlap_count and overlap_token_advantage, all [...].
    """
    teacher_ids = teacher_ids.long()
    labels = torch.zeros_like(teacher_ids[..., 0])
    lse = present("lse", token_stats(student, labels, shift=False).lse)
    logp = logits_at(student, teacher_ids) - lse.unsqueeze(-1)
    logq = teacher_logps.detach().to(logp.dtype)
    masses = [x.detach().exp().sum(-1) for x in (logp, logq)]
    if log_prob_min_clamp is not None:
        logp, logq = logp.clamp(min=log_prob_min_clamp), logq.clamp(min=log_prob_min_clamp)
    each = logq.exp() * (logq - logp)
    own = topk(student, teacher_ids.shape[-1]).ids
    common = (teacher_ids.unsqueeze(-1) == own.unsqueeze(-2)).any(-1)
    count = common.sum(-1)
    return {
        "distillation_losses": each.sum(-1),
        "student_mass": masses[0],
        "teacher_mass": masses[1],
        "overlap_count": count,
        "overlap_token_advantage": -(each.detach() * common).sum(-1) / count.clamp(min=1),
    }


def vespo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of VESPO (arXiv 2602.10693) and its metrics, a policy loss of verl: policy_loss.loss_mode=fl_vespo.

    Its k and lambda are those of fl.grpo_loss. It divides by the tokens of the global batch, as verl's token-mean does.

    Args:
        old_log_prob: [B, T].
        log_prob: [B, T], with a gradient.
        advantages: [B, T], the same at all tokens of a sequence or not.
        response_mask: [B, T], the tokens that count.
        loss_agg_mode: "token-mean"; others raise an error.
        config: verl's ActorConfig, whose global_batch_info holds dp_size and batch_num_tokens, or None for one batch in all.
        rollout_is_weights: [B, T] or None; they multiply the losses, as in verl's other policy losses.
    """
    if loss_agg_mode != "token-mean":
        raise not_one_of(f"loss_agg_mode of {LOSS}", loss_agg_mode, ("token-mean",))
    info = getattr(config, "global_batch_info", None) or {}
    count, ranks = info.get("batch_num_tokens"), info.get("dp_size", 1)
    if count is None and ranks > 1:
        raise ValueError(f"batch_num_tokens: expected a number in config.global_batch_info, where dp_size is {ranks}")
    labels = torch.zeros_like(response_mask, dtype=torch.long).masked_fill(~response_mask.bool(), -100)
    out = grpo_loss(
        LogProbs(log_prob),
        labels,
        advantages,
        old_logps=old_log_prob,
        loss_type="vespo",
        weights=rollout_is_weights,
        num_items=None if count is None else float(count),
        shift=False,
    )
    shift = ((old_log_prob - log_prob.detach()) * response_mask).sum() / response_mask.sum().clamp(min=1)
    metrics = {f"actor/{key}": x.item() for key, x in out.metrics.items() if "phi" in key}
    return out.loss * ranks, {"actor/ppo_kl": shift.item(), **metrics}


# verl loads its entry points without calling them.
plugin()
