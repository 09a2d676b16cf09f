"""Launchers: strides, flags and grids for the kernels. No checks here (the public functions did them), no allocation
of vocabulary size beyond the gradients handed in."""

import contextlib

import torch

from ..divergences import Divergence
from ..layout import PairProblem, Problem, row_layout
from . import configs, pairs, token_stats
from .device import jit


def on(device: torch.device):
    """Makes the tensor's device current: Triton launches on the current one."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _side(x, softcap, multiplier):
    """(pointer, row layout, vocabulary stride, head) of one side; absent parts are None, and so is a stride of 1."""
    if x is None:
        return None, (1, 0, 0), None, (None, None)
    head = (softcap or None, None if multiplier == 1.0 else multiplier)
    return x, row_layout(x, 1), None if x.stride(-1) == 1 else x.stride(-1), head


def _formulas(divergences: tuple[Divergence, ...]):
    twin = lambda fn: None if fn is None else jit(fn)  # noqa: E731
    powers = tuple(dict.fromkeys(d.power for d in divergences if d.power is not None))
    return {
        "numbers": tuple(d.params for d in divergences),
        "powers": powers,
        "degrees": tuple(d.degree for d in divergences),
        "ROWS": tuple(twin(d.row) for d in divergences),
        "TERMS": tuple(twin(d.term) for d in divergences),
        "GRADS": tuple(twin(d.grad_p) for d in divergences),
        "POWER": tuple(powers.index(d.power) if d.power is not None else -1 for d in divergences),
        "MOMENTS": any(d.row is not None for d in divergences),
        "SECOND": any(d.term is not None for d in divergences),
    }


def forward_config(divergences: tuple[Divergence, ...], entropy: bool) -> configs.Config:
    if any(d.term is not None for d in divergences):
        return configs.FORWARD_TWO_PASS
    more = any(d.power is not None for d in divergences) or (entropy and divergences)
    return configs.FORWARD_MORE if more else configs.FORWARD


def forward(problem: Problem, policy, labels, ref, logps, ref_logps, lse, entropy, div, hit, saved) -> None:
    config = forward_config(problem.divergences, problem.entropy)
    with on(policy.device):
        token_stats.token_stats_forward[(logps.numel(),)](
            *_side(policy, problem.softcap, problem.multiplier),
            *_side(ref, problem.ref_softcap, problem.ref_multiplier),
            labels, row_layout(labels, 0), problem.ignore_index, labels.shape[-1] if problem.shift else 1,
            logps, ref_logps, lse, entropy, div, hit, saved, problem.vocab,
            **_formulas(problem.divergences), SHIFT=problem.shift,
            UNROLL=config.unroll, LANES=config.lanes, STAGES=config.stages, num_warps=config.warps,
        )  # fmt: skip


def backward(problem: Problem, policy, labels, ref, saved, grads, dz, dw) -> None:
    """grads: of logps, ref_logps, lse, entropy [rows] and divergences [n, rows], each contiguous or None."""
    d_div = grads[-1]
    divergences = problem.divergences if d_div is not None else ()
    ref = ref if divergences or dw is not None else None
    z, w = _side(policy, problem.softcap, problem.multiplier), _side(ref, problem.ref_softcap, problem.ref_multiplier)
    with on(policy.device):
        token_stats.token_stats_backward[(saved.shape[1],)](
            *z, *_side(dz, None, 1.0)[:3],
            *w, *_side(dw, None, 1.0)[:3],
            labels, row_layout(labels, 0), problem.ignore_index, labels.shape[-1] if problem.shift else 1,
            *grads, saved, problem.vocab, policy.shape[-1], ref.shape[-1] if ref is not None else 0,
            tuple(d.params for d in divergences),
            GRADS_P=tuple(jit(d.grad_p) for d in divergences), GRADS_Q=tuple(jit(d.grad_q) for d in divergences),
            SHIFT=problem.shift, BLOCK=configs.BACKWARD.lanes * configs.BACKWARD.unroll, STAGES=configs.BACKWARD.stages,
            num_warps=configs.BACKWARD.warps,
        )  # fmt: skip


def pair_forward(problem: PairProblem, logps, ref, mask, cu_seqlens, losses, seq_logps, seq_ref, coef) -> None:
    with on(logps.device):
        pairs.pair_forward[(losses.numel(),)](
            logps, ref, mask, cu_seqlens, losses, seq_logps, seq_ref, coef,
            mask.numel(), mask.numel() // problem.sequences, problem.beta, problem.divergence.params, problem.term_params,
            LINK=jit(problem.divergence.f_dpo_link()), TERM=jit(problem.term),
            REF_TOKENS=ref is not None and not problem.ref_summed,
            BLOCK=configs.PAIRS.lanes, num_warps=configs.PAIRS.warps,
        )  # fmt: skip


def pair_backward(problem: PairProblem, grads, coef, mask, cu_seqlens, d_logps, d_ref) -> None:
    """grads: of losses [B], seq_logps [2B], seq_ref [2B], each contiguous or None."""
    with on(coef.device):
        pairs.pair_backward[(coef.numel(),)](
            *grads, coef, mask, cu_seqlens, d_logps, d_ref, coef.numel() // 2,
            mask.numel(), mask.numel() // problem.sequences,
            REF_TOKENS=not problem.ref_summed, BLOCK=configs.PAIRS.lanes, num_warps=configs.PAIRS.warps,
        )  # fmt: skip
