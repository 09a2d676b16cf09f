"""Launch the kernels: build their arguments, compute flags and grids. The functions are those of backends/interface.py.

Arguments are not checked here, because the public functions check them. Nothing of vocabulary size is allocated here; the
caller passes the tensors for the gradients.
"""

import contextlib
import functools
import math
from typing import NamedTuple

import torch
import triton
from triton.runtime import driver

from ..core.divergences import Divergence
from ..core.layout import (
    NO_FACTORS,
    Grads,
    HiddenRows,
    Outputs,
    PairGrads,
    PairLossSpec,
    PairOutputs,
    RowFactors,
    StatsSpec,
    row_layout,
)
from . import arguments, configs, fused_linear, pair_loss, row_stats, token_stats, topk, vocab_chunks
from .arguments import odd
from .elementwise import INTERPRET, LN2_HI, LN2_LO, jit

TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


def on(device: torch.device):
    """Return a context in which the given device is current, because Triton launches on the current device."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


class _Rows(NamedTuple):
    """How the rows of logits lie, as in layout.row_layout; unit: how many elements 16 bytes hold, 1: rows are not aligned."""

    size: int
    stride: int
    inner: int
    unit: int


def _rows(x) -> _Rows:
    size, stride, inner = row_layout(x, 1)
    unit = 16 // x.element_size()
    aligned = x.stride(-1) == 1 and stride % unit == 0 and inner % unit == 0
    return _Rows(size, stride, inner, unit if aligned else 1)


def _phase(x, rows: _Rows) -> tuple[int, ...] | None:
    """Return what the distance of each row from the next aligned address follows from; None: rows are not contiguous."""
    if x.stride(-1) != 1:
        return None
    n = row_stats.PEELED.value
    return rows.size, rows.stride % n, rows.inner % n, x.data_ptr() // x.element_size() % n


def _logits(x, rows: _Rows, peeled, softcap=0.0, multiplier=1.0, factors=None):
    """Return logits, or the place for their gradients, as kernels take them; peeled: the phase where a sweep begins aligned."""
    layout = arguments.RowLayout(
        stride=odd(rows.stride // rows.unit),
        inner_stride=odd(rows.inner // rows.unit),
        size=None if rows.size == 1 else odd(rows.size),
        aligned=1 if rows.unit > 1 else None,
        peeled=1 if peeled is not None and _phase(x, rows) == peeled else None,
    )
    between = None if x.stride(-1) == 1 else odd(x.stride(-1))
    times = None if multiplier == 1.0 and factors is None else multiplier
    return arguments.Logits(x, layout, between, softcap or None, times, factors)


ABSENT = arguments.Logits(None, None, None, None, None)


def _sides(spec: StatsSpec, policy, ref, *gradients, factors: RowFactors = NO_FACTORS):
    """Return the logits of both sides, and the places for their gradients."""
    rows = _rows(policy)
    # where the policy's rows are not aligned, sweeps begin at the first aligned column of each
    peeled = None if rows.unit > 1 or spec.vocab < row_stats.PEELED.value else _phase(policy, rows)
    return (
        _logits(policy, rows, peeled, spec.softcap, spec.multiplier, factors.policy),
        ABSENT if ref is None else _logits(ref, _rows(ref), peeled, spec.ref_softcap, spec.ref_multiplier, factors.ref),
        *(ABSENT if place is None else _logits(place, _rows(place), peeled) for place in gradients),
    )


def _token_labels(spec: StatsSpec, labels):
    """Return the labels of rows, the length of their sequences, and ignore_index."""
    return labels.contiguous(), labels.shape[-1] if spec.shift else 1, spec.ignore_index


def _fields(x):
    """Return a tensor [fields, rows] of numbers of rows, such as a state, and its stride."""
    return (None, 0) if x is None else (x, x.stride(0))


def _powers(divergences: tuple[Divergence, ...]) -> tuple[float, ...]:
    return tuple(dict.fromkeys(d.power for d in divergences if d.power is not None))


def _params(divergences: tuple[Divergence, ...]):
    return tuple(d.params for d in divergences)


def _numbers(divergences: tuple[Divergence, ...]) -> arguments.Numbers:
    return arguments.Numbers(_params(divergences), _powers(divergences), tuple(d.degree for d in divergences))


def _formulas(divergences: tuple[Divergence, ...]) -> arguments.Formulas:
    compiled = lambda formula: None if formula is None else jit(formula)  # noqa: E731
    powers = _powers(divergences)
    return arguments.Formulas(
        row=tuple(compiled(d.row) for d in divergences),
        term=tuple(compiled(d.term) for d in divergences),
        grad_p=tuple(jit(d.grad_p) for d in divergences),
        grad_q=tuple(jit(d.grad_q) for d in divergences),
        power=tuple(powers.index(d.power) if d.power is not None else -1 for d in divergences),
    )


def _moments(spec: StatsSpec) -> bool:
    """Return whether a divergence follows from the sums of the rows."""
    return any(d.row is not None for d in spec.divergences)


def _wanted(spec: StatsSpec) -> arguments.Wanted:
    return arguments.Wanted(spec.entropy, spec.collision, bool(spec.divergences))


def _steps(config: configs.Config) -> arguments.Steps:
    return arguments.Steps(config.unroll, config.lanes, config.stages)


def forward_config(spec: StatsSpec, dtype: torch.dtype) -> configs.Config:
    if any(d.term is not None for d in spec.divergences):
        alone = len(spec.divergences) == 1 and not (spec.entropy or spec.collision)
        return configs.FORWARD_TERM if alone else configs.FORWARD_TWO_PASS
    return configs.FORWARD_MORE if _many_sums(spec, dtype) else configs.FORWARD


def fold_config(spec: StatsSpec, dtype: torch.dtype) -> configs.Config:
    return configs.CHUNK_MORE if _many_sums(spec, dtype) else configs.CHUNK


def _many_sums(spec: StatsSpec, dtype: torch.dtype) -> bool:
    """Return whether one sweep over logits keeps more in registers than the longer steps leave room for."""
    wide = spec.entropy or spec.collision or dtype == torch.float32
    return any(d.power is not None for d in spec.divergences) or bool(wide and spec.divergences)


def check_labels(spec: StatsSpec, labels) -> None:
    """Do nothing: kernels give NaN for the row of a label out of range."""


def forward(spec: StatsSpec, policy, labels, ref, out: Outputs, factors: RowFactors = NO_FACTORS) -> None:
    config = forward_config(spec, policy.dtype)
    with on(policy.device):
        token_stats.token_stats_forward[(out.logps.numel(),)](
            *_sides(spec, policy, ref, factors=factors),
            *_token_labels(spec, labels),
            out,
            spec.vocab,
            _numbers(spec.divergences),
            FORMULAS=_formulas(spec.divergences),
            WANTED=arguments.Wanted(spec.entropy, spec.collision, _moments(spec)),
            SECOND=any(d.term is not None for d in spec.divergences),
            SHIFT=spec.shift,
            STEPS=_steps(config),
            num_warps=config.warps,
        )


def backward(
    spec: StatsSpec, policy, labels, ref, saved, grads: Grads, d_policy, d_ref, factors: RowFactors = NO_FACTORS
) -> None:
    divergences = spec.divergences if grads.divergence is not None else ()
    ref = ref if divergences or d_ref is not None else None
    config = configs.BACKWARD
    with on(policy.device):
        token_stats.token_stats_backward[(saved.shape[1],)](
            *_sides(spec, policy, ref, d_policy, d_ref, factors=factors),
            *_token_labels(spec, labels),
            *grads,
            saved,
            spec.vocab,
            spec.first,
            policy.shape[-1],
            ref.shape[-1] if ref is not None else 0,
            _numbers(divergences),
            FORMULAS=_formulas(divergences),
            SHIFT=spec.shift,
            BLOCK=config.lanes * config.unroll,
            STAGES=config.stages,
            num_warps=config.warps,
        )


def fold(spec: StatsSpec, policy, labels, ref, state, fresh: bool) -> None:
    config = fold_config(spec, policy.dtype)
    with on(policy.device):
        vocab_chunks.fold_slice[(policy.shape[0],)](
            *_sides(spec, policy, ref),
            labels,
            spec.ignore_index,
            *_fields(state),
            spec.vocab,
            spec.first,
            _powers(spec.divergences),
            FRESH=fresh,
            WANTED=_wanted(spec),
            STEPS=_steps(config),
            num_warps=config.warps,
        )


def terms(spec: StatsSpec, policy, labels, ref, saved, sums) -> None:
    config = configs.CHUNK_TWO_PASS
    with on(policy.device):
        vocab_chunks.add_terms[(policy.shape[0],)](
            *_sides(spec, policy, ref),
            labels,
            spec.ignore_index,
            *_fields(saved),
            *_fields(sums),
            spec.vocab,
            _numbers(spec.divergences),
            FORMULAS=_formulas(spec.divergences),
            STEPS=_steps(config),
            num_warps=config.warps,
        )


def merge_states(spec: StatsSpec, state, other) -> None:
    with on(state.device):
        vocab_chunks.merge_states[(state.shape[1],)](
            *_fields(state), *_fields(other), _powers(spec.divergences), num_warps=1
        )


def close(spec: StatsSpec, state, labels, out: Outputs) -> None:
    with on(state.device):
        vocab_chunks.close_states[(state.shape[1],)](
            *_fields(state),
            labels,
            spec.ignore_index,
            out,
            spec.vocab,
            _numbers(spec.divergences),
            FORMULAS=_formulas(spec.divergences),
            MOMENTS=_moments(spec),
            num_warps=1,
        )


def top(spec: StatsSpec, logits, values, ids, fresh: bool) -> None:
    config = configs.TOP
    rows, k = values.shape
    with on(logits.device):
        topk.top_entries[(rows,)](
            _logits(logits, _rows(logits), None),
            values,
            ids,
            spec.vocab,
            spec.first,
            k,
            FRESH=fresh,
            SLOTS=max(configs.TOP_SLOTS, triton.next_power_of_2(k)),
            BLOCK=config.step,
            num_warps=config.warps,
        )


def saved_log(x: torch.Tensor) -> torch.Tensor:
    """Return the logarithm in bits."""
    return x.log2()


def in_nats(x: torch.Tensor) -> torch.Tensor:
    """Convert bits to nats."""
    return x * math.log(2.0)


def frame(c: torch.Tensor, mp: torch.Tensor, mq: torch.Tensor) -> torch.Tensor:
    """Compute the same as frame() of kernels/elementwise.py, for torch tensors."""
    apart = mp - mq
    return (c - apart * LN2_HI.value) - apart * LN2_LO.value


@functools.cache
def _no_offsets(device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=torch.int64, device=device)


def _sequences(spec: PairLossSpec, mask, cu_seqlens):
    """Return which tokens count, where sequences start, the number of tokens, and the length of each sequence.

    Plan "row_blocks" takes blocks of packed sequences, and then the whole batch. So both are one kernel: the length is -1 where
    sequences are packed.
    """
    if cu_seqlens is None:
        return mask, _no_offsets(mask.device), mask.numel(), mask.numel() // spec.sequences
    return mask, cu_seqlens, mask.numel(), -1


def pair_forward(spec: PairLossSpec, logps, ref, mask, cu_seqlens, out: PairOutputs) -> None:
    with on(logps.device):
        pair_loss.pair_forward[(out.losses.numel(),)](
            logps,
            ref,
            *_sequences(spec, mask, cu_seqlens),
            out,
            spec.beta,
            spec.divergence.params,
            spec.term_params,
            LINK=jit(spec.divergence.f_dpo_link()),
            TERM=jit(spec.term),
            REF_TOKENS=ref is not None and not spec.ref_summed,
            BLOCK=configs.PAIRS.lanes,
            num_warps=configs.PAIRS.warps,
        )


def pair_backward(spec: PairLossSpec, grads: PairGrads, coef, mask, cu_seqlens, d_logps, d_ref) -> None:
    with on(coef.device):
        pair_loss.pair_backward[(coef.numel(),)](
            *grads,
            coef,
            *_sequences(spec, mask, cu_seqlens),
            d_logps,
            d_ref,
            coef.numel() // 2,
            REF_TOKENS=not spec.ref_summed,
            BLOCK=configs.PAIRS.lanes,
            num_warps=configs.PAIRS.warps,
        )


def _hidden(rows: HiddenRows | None, softcap, multiplier):
    """Return one side for fused_linear.py."""
    if rows is None:
        return arguments.Hidden(None, 0, None, 0, 0, None, None, None, None)
    low = rows.low_rank
    if low is not None:
        low = arguments.LowRankRows(
            low.product, low.product.stride(0), low.b, low.b.stride(0), low.b.shape[1], float(low.scaling)
        )
    x, weight = rows.x, rows.weight
    return arguments.Hidden(
        x,
        x.stride(0),
        weight,
        weight.stride(0),
        x.shape[1],
        rows.bias,
        low,
        softcap or None,
        None if multiplier == 1.0 else multiplier,
    )


def tile_config(spec: StatsSpec, dtype: torch.dtype, ref: bool, second: bool) -> configs.Tile:
    if dtype == torch.float32:
        return configs.TILE_FLOAT32
    family = "sm_80"
    if not INTERPRET.value:
        target = driver.active.get_current_target()
        if target.backend == "cuda":
            family = {9: "sm_90", 10: "sm_100"}.get(target.arch // 10, family)
        elif target.backend == "hip":
            family = "hip"
    tiles = configs.TILES[family]
    if TRITON_VERSION >= (3, 8):
        tiles = configs.SINCE_TRITON_3_8.get(family, tiles)
    if not ref:
        return tiles.one_entropy if spec.entropy else tiles.one
    own = spec.entropy or spec.collision
    if second or (own and spec.divergences) or any(d.power is not None for d in spec.divergences):
        return tiles.two_more
    return tiles.two_softcap if spec.softcap or spec.ref_softcap else tiles.two


def tile_splits(blocks: int, columns: int, group: int, processors: int) -> int:
    """Return the number of ranges into which the vocabulary is split.

    With it, one group of row blocks fills the device; among such numbers it gives the fewest steps in sequence.
    """
    low = min(columns, max(1, processors // max(1, min(group, blocks))))
    steps = lambda n: -(-blocks * n // processors) * -(-columns // n)  # noqa: E731
    best = min(range(low, min(columns, 2 * low) + 1), key=steps)
    return -(-columns // -(-columns // best))  # so no range is empty


def _tiles(spec: StatsSpec, policy: HiddenRows, labels, ref: HiddenRows | None, saved, out, splits) -> torch.Tensor:
    """Launch tile_sums and return the tensor that it writes, [fields, splits, rows].

    In the first sweep with one split it is a view of out [fields, rows]; otherwise it is a new tensor.
    """
    x, second = policy.x, saved is not None
    numbers = arguments.Numbers(_params(spec.divergences), () if second else _powers(spec.divergences), ())
    with on(x.device):
        config = tile_config(spec, x.dtype, ref is not None, second)
        blocks, columns = -(-len(x) // config.rows), -(-spec.vocab // config.columns)
        width = x.shape[1] + (ref.x.shape[1] if ref is not None else 0)
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
            _hidden(policy, spec.softcap, spec.multiplier),
            _hidden(ref, spec.ref_softcap, spec.ref_multiplier),
            labels,
            spec.ignore_index,
            *_fields(saved),
            parts,
            parts.stride(0),
            parts.stride(1),
            len(x),
            spec.vocab,
            spec.first,
            per,
            numbers,
            FORMULAS=_formulas(spec.divergences if second else ()),
            WANTED=_wanted(spec),
            GROUP=group,
            SHAPE=arguments.TileShape(config.rows, config.columns, config.depth, config.stages),
            num_warps=config.warps,
        )
    return parts


def tile_states(
    spec: StatsSpec, policy: HiddenRows, labels, ref: HiddenRows | None, state, splits: int | None = None
) -> None:
    """Write the states of rows; see the interface.

    splits: the number of ranges into which the vocabulary is split; None: chosen for the device.
    """
    parts = _tiles(spec, policy, labels, ref, None, state, splits)
    n = parts.shape[1]
    if n == 1:
        return
    while n > 1:  # merge the last half into the first
        half = n // 2
        merge_states(spec, parts[:, :half].flatten(1), parts[:, n - half : n].flatten(1))
        n -= half
    torch.where(labels == spec.ignore_index, state, parts[:, 0], out=state)


def tile_terms(
    spec: StatsSpec, policy: HiddenRows, labels, ref: HiddenRows, saved, sums, splits: int | None = None
) -> None:
    """Add the sums of the term divergences; see the interface. splits: as in tile_states."""
    sums += _tiles(spec, policy, labels, ref, saved, sums, splits).sum(1)
