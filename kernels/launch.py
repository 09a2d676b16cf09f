"""Launchers: strides, flags and grids for the kernels. No checks here (the public functions did them), no allocation
of vocabulary size beyond the gradients handed in."""

import contextlib
import math

import torch
from triton.runtime import driver

from ..core.divergences import Divergence
from ..core.layout import PairProblem, Problem, row_layout
from . import configs, fused_linear, pair_loss, token_stats, vocab_chunks
from .elementwise import INTERPRET, LN2_HI, LN2_LO, jit


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


def forward_config(problem: Problem, dtype: torch.dtype) -> configs.Config:
    two_pass = any(d.term is not None for d in problem.divergences)
    return configs.FORWARD_TWO_PASS if two_pass else fold_config(problem, dtype)


def fold_config(problem: Problem, dtype: torch.dtype) -> configs.Config:
    """Of one sweep."""
    wide = problem.entropy or problem.collision or dtype == torch.float32
    more = any(d.power is not None for d in problem.divergences) or (wide and problem.divergences)
    return configs.FORWARD_MORE if more else configs.FORWARD


def forward(
    problem: Problem, policy, labels, ref, logps, ref_logps, lse, entropy, div, hit, collision, saved
) -> None:  # fmt: skip
    config = forward_config(problem, policy.dtype)
    with on(policy.device):
        token_stats.token_stats_forward[(logps.numel(),)](
            *_side(policy, problem.softcap, problem.multiplier),
            *_side(ref, problem.ref_softcap, problem.ref_multiplier),
            labels, row_layout(labels, 0), problem.ignore_index, labels.shape[-1] if problem.shift else 1,
            logps, ref_logps, lse, entropy, div, hit, collision, saved, problem.vocab,
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
    config = fold_config(problem, z.dtype)
    formulas = _formulas(problem.divergences)
    with on(z.device):
        vocab_chunks.fold_slice[(z.shape[0],)](
            *_sides(problem, z, w), labels, problem.ignore_index, state, state.stride(0), problem.vocab, problem.first,
            formulas["powers"], FRESH=fresh, ENTROPY=problem.entropy, COLLISION=problem.collision,
            MOMENTS=bool(problem.divergences), UNROLL=config.unroll, LANES=config.lanes, STAGES=config.stages,
            num_warps=config.warps,
        )  # fmt: skip


def terms(problem: Problem, z, labels, w, saved, sums) -> None:
    """Adds sum_v c and sum_v h of logits [rows, columns] to sums [2 n, rows], for term divergences."""
    config = configs.FORWARD_TWO_PASS
    with on(z.device):
        vocab_chunks.add_terms[(z.shape[0],)](
            *_sides(problem, z, w), labels, problem.ignore_index, saved, saved.stride(0), sums, sums.stride(0),
            problem.vocab, **_take(_formulas(problem.divergences), "numbers", "TERMS", "GRADS"),
            UNROLL=config.unroll, LANES=config.lanes, STAGES=config.stages, num_warps=config.warps,
        )  # fmt: skip


def saved_log(x: torch.Tensor) -> torch.Tensor:
    """The logarithm of a total as it is saved: here in bits."""
    return x.log2()


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
        vocab_chunks.merge_states[(state.shape[1],)](
            state, state.stride(0), other, other.stride(0), _formulas(problem.divergences)["powers"], num_warps=1
        )  # fmt: skip


def close(problem: Problem, state, labels, logps, ref_logps, lse, entropy, div, hit, collision, saved) -> None:
    """The outputs of all rows from the sums over the whole vocabulary; term divergences come from terms()."""
    with on(state.device):
        vocab_chunks.close_states[(state.shape[1],)](
            state, state.stride(0), labels, problem.ignore_index, logps, ref_logps, lse, entropy, div, hit, collision,
            saved, problem.vocab, num_warps=1,
            **_take(_formulas(problem.divergences), "numbers", "powers", "degrees", "ROWS", "POWER", "MOMENTS"),
        )  # fmt: skip


def pair_forward(problem: PairProblem, logps, ref, mask, cu_seqlens, losses, seq_logps, seq_ref, coef) -> None:
    with on(logps.device):
        pair_loss.pair_forward[(losses.numel(),)](
            logps, ref, mask, cu_seqlens, losses, seq_logps, seq_ref, coef,
            mask.numel(), mask.numel() // problem.sequences, problem.beta, problem.divergence.params, problem.term_params,
            LINK=jit(problem.divergence.f_dpo_link()), TERM=jit(problem.term),
            REF_TOKENS=ref is not None and not problem.ref_summed,
            BLOCK=configs.PAIRS.lanes, num_warps=configs.PAIRS.warps,
        )  # fmt: skip


def pair_backward(problem: PairProblem, grads, coef, mask, cu_seqlens, d_logps, d_ref) -> None:
    """grads: of losses [B], seq_logps [2B], seq_ref [2B], each contiguous or None."""
    with on(coef.device):
        pair_loss.pair_backward[(coef.numel(),)](
            *grads, coef, mask, cu_seqlens, d_logps, d_ref, coef.numel() // 2,
            mask.numel(), mask.numel() // problem.sequences,
            REF_TOKENS=not problem.ref_summed, BLOCK=configs.PAIRS.lanes, num_warps=configs.PAIRS.warps,
        )  # fmt: skip


def _hidden(side, softcap, multiplier):
    """One side for fused_linear.py: (X, row stride, W, row stride, H, bias, LoRA, head); absent parts are None."""
    if side is None:
        return None
    x, weight, bias, lora = side
    if lora is not None:
        a, b, scaling = lora
        lora = a, a.stride(0), b, b.stride(0), b.shape[1], float(scaling)
    return x, x.stride(0), weight, weight.stride(0), x.shape[1], bias, lora, _side(x, softcap, multiplier)[3]


def tile_config(problem: Problem, dtype: torch.dtype, ref: bool, second: bool) -> configs.Tile:
    if dtype == torch.float32:
        return configs.TILE_FLOAT32
    family = "sm_80"
    if not INTERPRET.value:
        target = driver.active.get_current_target()
        if target.backend == "cuda":
            family = {9: "sm_90", 10: "sm_100"}.get(target.arch // 10, family)
        elif target.backend == "hip":
            family = "hip"
    own = problem.entropy or problem.collision
    more = second or (own and problem.divergences) or any(d.power is not None for d in problem.divergences)
    return configs.TILES[family][ref + bool(ref and more)]


def tile_splits(blocks: int, columns: int, group: int, processors: int) -> int:
    """Ranges of the vocabulary: so many that one group of row blocks fills the device, and fewest steps in a row."""
    low = min(columns, max(1, processors // max(1, min(group, blocks))))
    steps = lambda n: -(-blocks * n // processors) * -(-columns // n)  # noqa: E731
    best = min(range(low, min(columns, 2 * low) + 1), key=steps)
    return -(-columns // -(-columns // best))  # none is empty


def _tiles(problem: Problem, policy, labels, ref, saved, out, splits, **formulas) -> torch.Tensor:
    """tile_sums into out [fields, rows], or into a new [fields, splits, rows] where there is more than one split."""
    x, second = policy[0], saved is not None
    with on(x.device):
        config = tile_config(problem, x.dtype, ref is not None, second)
        blocks, columns = -(-len(x) // config.rows), -(-problem.vocab // config.columns)
        width = x.shape[1] + (ref[0].shape[1] if ref is not None else 0)
        group = max(1, configs.GROUP_BYTES // (config.rows * width * x.element_size()))
        if splits is None:
            device = (
                None if x.device.type == "cpu" else torch.get_device_module(x.device).get_device_properties(x.device)
            )
            splits = tile_splits(blocks, columns, group, getattr(device, "multi_processor_count", 64))
        per = -(-columns // splits)
        splits = -(-columns // per)
        parts = out[:, None] if splits == 1 and not second else out.new_zeros((len(out), splits, len(x)))
        fused_linear.tile_sums[(blocks * splits,)](
            _hidden(policy, problem.softcap, problem.multiplier),
            _hidden(ref, problem.ref_softcap, problem.ref_multiplier),
            labels, problem.ignore_index, saved, saved.stride(0) if second else 0, formulas["numbers"],
            formulas.get("powers", ()), parts, parts.stride(0), parts.stride(1), len(x), problem.vocab, problem.first,
            per, TERMS=formulas.get("TERMS", ()), GRADS=formulas.get("GRADS", ()), ENTROPY=problem.entropy,
            COLLISION=problem.collision, MOMENTS=bool(problem.divergences), GROUP=group, BLOCK_T=config.rows,
            BLOCK_V=config.columns, BLOCK_H=config.depth, STAGES=config.stages, num_warps=config.warps,
        )  # fmt: skip
    return parts


def tile_states(problem: Problem, policy, labels, ref, state, splits: int | None = None) -> None:
    """Writes state [fields, rows] of the vocabulary from problem.first on; rows that do not count are left alone.

    policy, ref: (x [rows, H], weight [V, H], bias [V] or None, (x a^T [rows, r], b [V, r], scaling) or None), the last
    dimension of each contiguous; ref may be None. splits: into how many ranges the vocabulary is cut; None: by device.
    """
    formulas = _take(_formulas(problem.divergences), "numbers", "powers")
    parts = _tiles(problem, policy, labels, ref, None, state, splits, **formulas)
    n = parts.shape[1]
    if n == 1:
        return
    while n > 1:  # the last half onto the first
        half = n // 2
        merge_states(problem, parts[:, :half].flatten(1), parts[:, n - half : n].flatten(1))
        n -= half
    torch.where(labels == problem.ignore_index, state, parts[:, 0], out=state)


def tile_terms(problem: Problem, policy, labels, ref, saved, sums, splits: int | None = None) -> None:
    """Adds sum_v c and sum_v h to sums [2 n, rows], for term divergences, from what close() saved. See tile_states."""
    formulas = _take(_formulas(problem.divergences), "numbers", "TERMS", "GRADS")
    sums += _tiles(problem, policy, labels, ref, saved, sums, splits, **formulas).sum(1)
