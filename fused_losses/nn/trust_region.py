"""Define TrustRegion, a reference that follows the policy (TR-DPO, TR-IPO, TR-KTO)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..core.inputs import FLOATS

__all__ = ["TrustRegion"]

WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}  # in names of what torch wraps


class TrustRegion:
    """Move the weights of a frozen reference towards the policy's at every `every`th step (2404.09656).

        reference <- alpha policy + (1 - alpha) reference

    alpha < 1 is the paper's soft update, alpha = 1 its hard update; the paper uses either of them. The defaults are those
    of TRL, a soft update every 512 steps. It works with any loss that has a reference. Right after a hard update every
    log-ratio is 0. Paper: https://arxiv.org/abs/2404.09656

        region = fl.TrustRegion(reference, policy, alpha=1.0, every=512)
        for batch in batches:
            fl.dpo_loss(...).loss.backward(); optimizer.step(); region.step()

    Parameters and persistent buffers are mixed, tied ones once. They are mixed in the wider dtype of the two models and
    rounded to the reference's dtype. Buffers of integers are copied; buffers that are not persistent are not changed. The
    models may differ in dtype and device, and may be in DDP or torch.compile. FSDP2's shards are mixed without being
    gathered.

    Log-probs computed ahead are stale after an update. Store region.stamp() with them, and call region.check(stamp) where
    they are used.

    Args:
        reference: The frozen model. From here on its parameters do not require gradients; setting eval mode is left to
            the caller.
        policy: The model that is trained, with parameters and buffers of the same names.
        alpha: The weight of the policy in an update, in (0, 1].
        every: The number of steps between two updates, at least 1.
    """

    def __init__(self, reference: nn.Module, policy: nn.Module, alpha: float = 0.6, every: int = 512) -> None:
        for name, module in (("reference", reference), ("policy", policy)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name}: expected a torch.nn.Module, got {type(module).__name__}")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= 1:
            raise ValueError(f"alpha: expected a number in (0, 1], got {alpha!r}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every: expected an int >= 1, got {every!r}")
        self.reference, self.policy = reference, policy
        self.alpha, self.every = float(alpha), every
        self.steps = self.updates = 0
        self._pairs()  # raises now what an update would raise
        reference.requires_grad_(False)

    def step(self) -> bool:
        """Count a step of the optimizer, update the reference if it is due, and return whether it was updated.

        Call this once after each step of the optimizer.
        """
        self.steps += 1
        due = self.steps % self.every == 0
        if due:
            self.update()
        return due

    @torch.no_grad()
    def update(self) -> None:
        """Update the reference now, whatever the number of steps."""
        groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for r, p in self._pairs():
            mix = self.alpha < 1 and r.dtype in FLOATS
            refs, policies = groups[mix, r.dtype, p.dtype, r.device, p.device]
            refs.append(r)
            policies.append(p)
        for (mix, *kinds), (refs, policies) in groups.items():
            if not mix:
                torch._foreach_copy_(refs, policies)
            elif kinds[0] == kinds[1] and kinds[2] == kinds[3]:
                torch._foreach_lerp_(refs, policies, self.alpha)
            else:  # one after another: the wider copies are as large as the tensors
                wide = torch.promote_types(kinds[0], kinds[1])
                for r, p in zip(refs, policies, strict=True):
                    r.copy_(torch.lerp(r.to(wide), p.to(r.device, wide), self.alpha))
        self.updates += 1

    def stamp(self) -> int:
        """Return the number of updates so far, to be stored with log-probs of the present reference."""
        return self.updates

    def check(self, stamp: int) -> None:
        """Raise RuntimeError where the reference has been updated since stamp()."""
        if isinstance(stamp, bool) or not isinstance(stamp, int):
            raise TypeError(f"stamp: expected an int from TrustRegion.stamp(), got {type(stamp).__name__}")
        if stamp != self.updates:
            raise RuntimeError(
                f"stamp: the log-probs are of the reference after {stamp} updates, but it has had {self.updates}: they are "
                "stale; compute them again after every update"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers of steps and updates, and the settings.

        The reference's weights are not included. Save them too, because no other model has them.
        """
        return {"steps": self.steps, "updates": self.updates, "alpha": self.alpha, "every": self.every}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what state_dict returned, or raise ValueError where the settings differ."""
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"state: expected the keys {list(self.state_dict())}, got {list(state)}")
        for name in ("alpha", "every"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"state: was saved with {name}={state[name]!r}, and this has {getattr(self, name)!r}; to change it on "
                    f"purpose, change state[{name!r}]"
                )
        self.steps, self.updates = state["steps"], state["updates"]

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return the pairs (reference's, policy's) of tensors to mix.

        They are read again at each call, because .to() and loading may replace them.
        """
        refs, policies = _tensors(self.reference), _tensors(self.policy)
        if lone := sorted(refs.keys() ^ policies.keys()):
            raise ValueError(
                f"policy: expected parameters and buffers of the reference's names, but {len(lone)} are in one of them only, "
                f"such as {', '.join(lone[:3])}; adapters have to be merged into the policy first"
            )
        seen: dict[int, tuple[str, Tensor]] = {}
        pairs = []
        for name, r in refs.items():
            p = policies[name]
            first, tied = seen.setdefault(id(r), (name, p))
            if tied is not p:
                raise ValueError(f"reference: {name} is tied to {first}, which it is not in the policy")
            if first != name:
                continue
            parameter = isinstance(r, nn.Parameter) or isinstance(p, nn.Parameter)
            for side, x in (("reference", r), ("policy", p)):
                _refuse(side, name, x, parameter)
            if r.shape != p.shape or r.is_floating_point() != p.is_floating_point():
                words = [f"{x.dtype} {list(x.shape)}" for x in (r, p)]
                raise ValueError(f"policy: expected {name} like the reference's, {words[0]}, got {words[1]}")
            trained = parameter and p.requires_grad
            r, p = _local(name, r, p)
            if not _same_memory(r, p):
                pairs.append((r, p))
            elif trained:
                raise ValueError(
                    f"policy: shares {name} with the reference; a reference needs weights of its own, such as "
                    "copy.deepcopy(policy) has"
                )
        return pairs


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, tied ones under each of their names."""
    while isinstance(module, DistributedDataParallel) or hasattr(module, "_orig_mod"):
        module = module.module if isinstance(module, DistributedDataParallel) else module._orig_mod  # type: ignore[assignment]
    tensors = dict(module.named_parameters(remove_duplicate=False))
    for prefix, part in module.named_modules(remove_duplicate=False):
        for name, x in part._buffers.items():
            if x is not None and name not in part._non_persistent_buffers_set:
                tensors[f"{prefix}.{name}" if prefix else name] = x
    return {".".join(word for word in name.split(".") if word not in WRAPPERS): x for name, x in tensors.items()}


def _refuse(side: str, name: str, x: Tensor, parameter: bool) -> None:
    """Raise an error for a tensor that cannot be mixed in place."""
    if x.is_meta:
        raise ValueError(f"{side}: {name} is on the meta device; load its weights first")
    if not parameter:
        return
    if x.numel() == 0:
        raise ValueError(
            f"{side}: {name} has no elements, shape {list(x.shape)}: its sharding engine holds it elsewhere. Update inside "
            "deepspeed.zero.GatheredParameters or FSDP.summon_full_params of both models"
        )
    wrapped = not _is_dtensor(x) and is_traceable_wrapper_subclass(x)
    if x.dtype not in FLOATS or x.is_quantized or wrapped:
        what = type(x).__name__ if wrapped else x.dtype
        raise TypeError(
            f"{side}: {name} is quantised or not of floating point, {what}; weights like that cannot be mixed"
        )


def _is_dtensor(x: Tensor) -> bool:
    """Return whether x is a DTensor, by the name of its class."""
    return type(x).__name__ == "DTensor"  # importing torch.distributed.tensor takes longer than all the rest


def _local(name: str, r: Any, p: Any) -> tuple[Tensor, Tensor]:
    """Return the local shards of both tensors, where both are split in the same way, or the plain tensors."""
    if not _is_dtensor(r) and not _is_dtensor(p):
        return r, p
    alike = _is_dtensor(r) and _is_dtensor(p) and r.device_mesh == p.device_mesh and r.placements == p.placements
    if not alike or any(placement.is_partial() for placement in r.placements):
        words = [f"DTensor {x.placements}" if _is_dtensor(x) else "a plain tensor" for x in (r, p)]
        raise ValueError(
            f"policy: expected {name} split over the same devices as the reference's, {words[0]}, got {words[1]}; shard both "
            "alike, and call .reshard() on what a forward has left gathered"
        )
    return r.to_local(), p.to_local()


def _same_memory(r: Tensor, p: Tensor) -> bool:
    """Return whether both tensors start at the same memory address."""
    return r.numel() > 0 and r.device == p.device and r.data_ptr() == p.data_ptr()
