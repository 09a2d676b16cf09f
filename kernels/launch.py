"""Launch the kernels: compute their strides, flags and grids.

Arguments are not checked here, because the public functions check them. Nothing of vocabulary size is allocated here; the
caller passes the tensors for the gradients.
"""

import contextlib
import math

import torch
from triton.runtime import driver

from ..core.divergences import Divergence
from ..core.layout import PairLossSpec, StatsSpec, row_layout
from . import configs, fused_linear, pair_loss, token_stats, vocab_chunks
from .elementwise import INTERPRET, LN2_HI, LN2_LO, jit


def on(device: torch.device):
    """Return a context in which the given device is current, because Triton launches on the current device."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _side(x, softcap, multiplier):
    """Return (tensor, row layout, vocabulary stride, head) of one side.

    Absent parts are None. A stride of 1 is also given as None.
    """
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


def forward_config(problem: StatsSpec, dtype: torch.dtype) -> configs.Config:
    two_pass = any(d.term is not None for d in problem.divergences)
    return configs.FORWARD_TWO_PASS if two_pass else fold_config(problem, dtype)


def fold_config(problem: StatsSpec, dtype: torch.dtype) -> configs.Config:
    """Return the launch configuration of one sweep over logits."""
    wide = problem.entropy or problem.collision or dtype == torch.float32
    more = any(d.power is not None for d in problem.divergences) or (wide and problem.divergences)
    return configs.FORWARD_MORE if more else configs.FORWARD


def forward(
    problem: StatsSpec, policy, labels, ref, logps, ref_logps, lse, entropy, div, hit, collision, saved
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


def backward(problem: StatsSpec, policy, labels, ref, saved, grads, dz, dw) -> None:
    """Launch the kernel that writes dz and dw.

    grads: the gradients of logps, ref_logps, lse, entropy [rows] and divergences [n, rows], each contiguous or None.
    """
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


def _sides(problem: StatsSpec, z, w):
    return *_side(z, problem.softcap, problem.multiplier), *_side(w, problem.ref_softcap, problem.ref_multiplier)


def fold(problem: StatsSpec, z, labels, w, state, fresh: bool) -> None:
    """Add logits [rows, columns] to the running sums in state [fields, rows].

    Column 0 is the token problem.first of the vocabulary. fresh: the state holds no sums yet and is overwritten.
    """
    config = fold_config(problem, z.dtype)
    formulas = _formulas(problem.divergences)
    with on(z.device):
        vocab_chunks.fold_slice[(z.shape[0],)](
            *_sides(problem, z, w), labels, problem.ignore_index, state, state.stride(0), problem.vocab, problem.first,
            formulas["powers"], FRESH=fresh, ENTROPY=problem.entropy, COLLISION=problem.collision,
            MOMENTS=bool(problem.divergences), UNROLL=config.unroll, LANES=config.lanes, STAGES=config.stages,
            num_warps=config.warps,
        )  # fmt: skip


def terms(problem: StatsSpec, z, labels, w, saved, sums) -> None:
    """Add sum_v c and sum_v h of the term divergences of logits [rows, columns] to sums [2 n, rows]."""
    config = configs.FORWARD_TWO_PASS
    with on(z.device):
        vocab_chunks.add_terms[(z.shape[0],)](
            *_sides(problem, z, w), labels, problem.ignore_index, saved, saved.stride(0), sums, sums.stride(0),
            problem.vocab, **_take(_formulas(problem.divergences), "numbers", "TERMS", "GRADS"),
            UNROLL=config.unroll, LANES=config.lanes, STAGES=config.stages, num_warps=config.warps,
        )  # fmt: skip


def saved_log(x: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of a total in the unit in which it is saved: here in bits."""
    return x.log2()


def in_nats(x: torch.Tensor) -> torch.Tensor:
    """Convert a saved shift, or a saved logarithm of a total, to nats: here it is in bits."""
    return x * math.log(2.0)


def frame(c: torch.Tensor, mp: torch.Tensor, mq: torch.Tensor) -> torch.Tensor:
    """Compute the same as frame() of kernels/elementwise.py, for torch tensors."""
    apart = mp - mq
    return (c - apart * LN2_HI.value) - apart * LN2_LO.value


def merge_states(problem: StatsSpec, state, other) -> None:
    """Merge other into state in place, both [fields, rows]."""
    with on(state.device):
        vocab_chunks.merge_states[(state.shape[1],)](
            state, state.stride(0), other, other.stride(0), _formulas(problem.divergences)["powers"], num_warps=1
        )  # fmt: skip


def close(problem: StatsSpec, state, labels, logps, ref_logps, lse, entropy, div, hit, collision, saved) -> None:
    """Write the outputs of all rows, computed from the sums over the whole vocabulary.

    Term divergences are not written here; terms() computes them.
    """
    with on(state.device):
        vocab_chunks.close_states[(state.shape[1],)](
            state, state.stride(0), labels, problem.ignore_index, logps, ref_logps, lse, entropy, div, hit, collision,
            saved, problem.vocab, num_warps=1,
            **_take(_formulas(problem.divergences), "numbers", "powers", "degrees", "ROWS", "POWER", "MOMENTS"),
        )  # fmt: skip


def pair_forward(problem: PairLossSpec, logps, ref, mask, cu_seqlens, losses, seq_logps, seq_ref, coef) -> None:
    with on(logps.device):
        pair_loss.pair_forward[(losses.numel(),)](
            logps, ref, mask, cu_seqlens, losses, seq_logps, seq_ref, coef,
            mask.numel(), mask.numel() // problem.sequences, problem.beta, problem.divergence.params, problem.term_params,
            LINK=jit(problem.divergence.f_dpo_link()), TERM=jit(problem.term),
            REF_TOKENS=ref is not None and not problem.ref_summed,
            BLOCK=configs.PAIRS.lanes, num_warps=configs.PAIRS.warps,
        )  # fmt: skip


def pair_backward(problem: PairLossSpec, grads, coef, mask, cu_seqlens, d_logps, d_ref) -> None:
    """Launch the kernel that writes d_logps and d_ref.

    grads: the gradients of losses [B], seq_logps [2B] and seq_ref [2B], each contiguous or None.
    """
    with on(coef.device):
        pair_loss.pair_backward[(coef.numel(),)](
            *grads, coef, mask, cu_seqlens, d_logps, d_ref, coef.numel() // 2,
            mask.numel(), mask.numel() // problem.sequences,
            REF_TOKENS=not problem.ref_summed, BLOCK=configs.PAIRS.lanes, num_warps=configs.PAIRS.warps,
        )  # fmt: skip


def _hidden(side, softcap, multiplier):
    """Return one side for fused_linear.py: (X, row stride, W, row stride, H, bias, LoRA, head).

    Absent parts are None.
    """
    if side is None:
        return None
    x, weight, bias, lora = side
    if lora is not None:
        a, b, scaling = lora
        lora = a, a.stride(0), b, b.stride(0), b.shape[1], float(scaling)
    return x, x.stride(0), weight, weight.stride(0), x.shape[1], bias, lora, _side(x, softcap, multiplier)[3]


def tile_config(problem: StatsSpec, dtype: torch.dtype, ref: bool, second: bool) -> configs.Tile:
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
    """Return the number of ranges into which the vocabulary is split.

    With it, one group of row blocks fills the device; among such numbers it gives the fewest steps in sequence.
    """
    low = min(columns, max(1, processors // max(1, min(group, blocks))))
    steps = lambda n: -(-blocks * n // processors) * -(-columns // n)  # noqa: E731
    best = min(range(low, min(columns, 2 * low) + 1), key=steps)
    return -(-columns // -(-columns // best))  # so no range is empty


def _tiles(problem: StatsSpec, policy, labels, ref, saved, out, splits, **formulas) -> torch.Tensor:
    """Launch tile_sums and return the tensor that it writes, [fields, splits, rows].

    In the first sweep with one split it is a view of out [fields, rows]; otherwise it is a new tensor.
    """
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


def tile_states(problem: StatsSpec, policy, labels, ref, state, splits: int | None = None) -> None:
    """Write the state [fields, rows] of a part of the vocabulary; rows that are ignored keep their values.

    Row 0 of the weights is the token problem.first. policy, ref: (x [rows, H], weight [V, H], bias [V] or None,
    (x a^T [rows, r], b [V, r], scaling) or None), the last dimension of each contiguous; ref may be None. splits: the number
    of ranges into which the vocabulary is split; None: chosen for the device.
    """
    formulas = _take(_formulas(problem.divergences), "numbers", "powers")
    parts = _tiles(problem, policy, labels, ref, None, state, splits, **formulas)
    n = parts.shape[1]
    if n == 1:
        return
    while n > 1:  # merge the last half into the first
        half = n // 2
        merge_states(problem, parts[:, :half].flatten(1), parts[:, n - half : n].flatten(1))
        n -= half
    torch.where(labels == problem.ignore_index, state, parts[:, 0], out=state)


def tile_terms(problem: StatsSpec, policy, labels, ref, saved, sums, splits: int | None = None) -> None:
    """Add sum_v c and sum_v h of the term divergences to sums [2 n, rows], from the numbers that close() saved.

    The arguments are those of tile_states.
    """
    formulas = _take(_formulas(problem.divergences), "numbers", "TERMS", "GRADS")
    sums += _tiles(problem, policy, labels, ref, saved, sums, splits, **formulas).sum(1)
