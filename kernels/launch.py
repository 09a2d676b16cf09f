"""Launchers: strides, flags and grids for the kernels. No checks here (the public functions did them), no allocation
of vocabulary size beyond the gradients handed in."""

import contextlib
import math

import torch

from ..divergences import Divergence
from ..layout import PairProblem, Problem, row_layout
from . import configs, pairs, slices, token_stats
from .device import LN2_HI, LN2_LO, jit


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
            *grads, saved, problem.vocab, problem.first, policy.shape[-1], ref.shape[-1] if ref is not None else 0,
            tuple(d.params for d in divergences),
            GRADS_P=tuple(jit(d.grad_p) for d in divergences), GRADS_Q=tuple(jit(d.grad_q) for d in divergences),
            SHIFT=problem.shift, BLOCK=configs.BACKWARD.lanes * configs.BACKWARD.unroll, STAGES=configs.BACKWARD.stages,
            num_warps=configs.BACKWARD.warps,
        )  # fmt: skip


def _take(formulas: dict, *names: str) -> dict:
    return {name: formulas[name] for name in names}


def _sides(problem: Problem, z, w):
    return *_side(z, problem.softcap, problem.multiplier), *_side(w, problem.ref_softcap, problem.ref_multiplier)


def fold(problem: Problem, z, labels, w, state, fresh: bool) -> None:
    """Folds logits [rows, columns] of the vocabulary from problem.first on into state [fields, rows]."""
    one_pass = tuple(d for d in problem.divergences if d.row is not None)
    config = forward_config(one_pass, problem.entropy)
    formulas = _formulas(problem.divergences)
    with on(z.device):
        slices.fold_slice[(z.shape[0],)](
            *_sides(problem, z, w), labels, problem.ignore_index, state, state.stride(0), problem.vocab, problem.first,
            formulas["powers"], FRESH=fresh, ENTROPY=problem.entropy, MOMENTS=bool(problem.divergences),
            UNROLL=config.unroll, LANES=config.lanes, STAGES=config.stages, num_warps=config.warps,
        )  # fmt: skip


def terms(problem: Problem, z, labels, w, saved, sums) -> None:
    """Adds sum_v c and sum_v h of logits [rows, columns] to sums [2 n, rows], for term divergences."""
    config = configs.FORWARD_TWO_PASS
    with on(z.device):
        slices.add_terms[(z.shape[0],)](
            *_sides(problem, z, w), labels, problem.ignore_index, saved, saved.stride(0), sums, sums.stride(0),
            problem.vocab, **_take(_formulas(problem.divergences), "numbers", "TERMS", "GRADS"),
            UNROLL=config.unroll, LANES=config.lanes, STAGES=config.stages, num_warps=config.warps,
        )  # fmt: skip


def in_nats(x: torch.Tensor) -> torch.Tensor:
    """A shift, or the logarithm of a total, as it is saved: here in bits."""
    return x * math.log(2.0)


def frame(c: torch.Tensor, mp: torch.Tensor, mq: torch.Tensor) -> torch.Tensor:
    """As device.frame, of tensors."""
    apart = mp - mq
    return (c - apart * LN2_HI.value) - apart * LN2_LO.value


def merge_states(problem: Problem, state, other) -> None:
    """state <- state merged with other, both [fields, rows]."""
    with on(state.device):
        slices.merge_states[(state.shape[1],)](
            state, state.stride(0), other, other.stride(0), _formulas(problem.divergences)["powers"], num_warps=1
        )  # fmt: skip


def close(problem: Problem, state, labels, logps, ref_logps, lse, entropy, div, hit, saved) -> None:
    """The outputs of all rows from the sums over the whole vocabulary; term divergences come from terms()."""
    with on(state.device):
        slices.close_states[(state.shape[1],)](
            state, state.stride(0), labels, problem.ignore_index, logps, ref_logps, lse, entropy, div, hit, saved,
            problem.vocab, num_warps=1,
            **_take(_formulas(problem.divergences), "numbers", "powers", "degrees", "ROWS", "POWER"),
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
