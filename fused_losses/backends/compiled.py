"""Compute token_stats on a CPU with loops that torch.compile makes: one over the rows, the formulas of block.py inside.

The torch backend calls a dozen operations for each block of rows, and all threads wait for each other after every one. Here
Inductor makes C++ code of whole passes. A tile has all rows that count; no temporary has its size. What is not worth a
compilation is left to torch_backend.py: calls of fewer than COMPILE_FROM logits, numbers of one row, preference pairs. Both
have the same units and layouts, so that each can take over from the other within a call.

Inductor keeps what it compiles on disk, in folder().
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.fx.experimental import _config as shapes_config

from ..core.elementwise import transform_logits
from ..core.layout import (
    NO_FACTORS,
    Grads,
    Outputs,
    RowFactors,
    StatsSpec,
    rows_view,
    shifted_labels,
    stats_dtype,
    term_rows,
    write_divergence,
)
from . import block, torch_backend
from .block import Block, Side, Sums, Totals
from .compiled_elementwise import bind
from .torch_backend import (  # noqa: F401 (functions of the interface that are the same here)
    check_labels,
    close,
    frame,
    in_nats,
    merge_states,
    pair_backward,
    pair_forward,
    saved_log,
    tile_states,
    tile_terms,
    top,
)

# On two cores, forward and backward of a new kind of call compile for 5 to 25 s, the first on a machine for 10 s more, and from
# the disk for 3 to 5. At this size a call is about 40 ms faster than torch_backend's, at [512, 16384] 100 ms: training gets
# that back in some hundred steps, once for all its runs.
COMPILE_FROM = 1 << 22

log = logging.getLogger("fused_losses")


# The path of the C++ compiler that Inductor would call, or None; found once, since torch.compile reads it while it traces
COMPILER = shutil.which(os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")))


def folder() -> str:
    """Return the folder in which Inductor keeps what it compiles; TORCHINDUCTOR_CACHE_DIR names another."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # not above: importing it takes a while

    return cache_dir()


class _LeftToTorchError(Exception):
    """This call is for the torch backend: nothing to compute, or it cannot be compiled."""


class _Scale(NamedTuple):
    """Softcap and multiplier of the logits of one side, as transform_logits() takes them.

    They are tensors where they change a logit, so that another temperature is not another compilation; the multiplier is
    [rows, 1] where rows have factors.
    """

    softcap: Tensor | float
    multiplier: Tensor | float

    @classmethod
    def of(
        cls, softcap: float, multiplier: float, factors: Tensor | None, numbers: Tensor, dtype: torch.dtype
    ) -> _Scale:
        """Return those of the rows of these numbers; factors: those of all rows."""
        cap = torch.tensor(softcap, dtype=dtype) if softcap else 0.0
        if factors is not None:
            return cls(cap, (multiplier * factors[numbers])[:, None])
        return cls(cap, torch.tensor(multiplier, dtype=dtype) if multiplier != 1.0 else 1.0)

    def side(self, logits: Tensor, dtype: torch.dtype) -> Side:
        return Side(*transform_logits(logits, *self, dtype))


class _Place(NamedTuple):
    """The rows that count in a tensor of logits or of their gradients."""

    memory: Tensor  # all rows [rows, V], or [outer, inner, V] where rows have two strides
    at: tuple[Tensor, ...]  # one for each dimension of the rows

    @classmethod
    def of(cls, x: Tensor, vocab: int, numbers: Tensor) -> _Place:
        """Take the rows of these numbers. `memory` is no view: code for a view would depend on the tensor it is a part of."""
        view = rows_view(x.detach(), 1)[..., :vocab]
        at: tuple[Tensor, ...] = (numbers,)
        if view.shape[0] == 1:
            view = view[0]
        else:
            at = numbers // view.shape[1], numbers % view.shape[1]
        own = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage(), view.storage_offset(), view.shape, view.stride())
        return cls(own, at)

    def load(self, column: Tensor | None = None) -> Tensor:
        """Return [rows, V], or [rows, 1] of one column of each row."""
        if column is not None:
            return torch.ops.aten._unsafe_index(self.memory, [*self.at, column])[:, None]
        if len(self.at) == 1:
            return torch.embedding(self.memory, self.at[0])  # whose places never count from the end: one step less
        return torch.ops.aten._unsafe_index(self.memory, list(self.at))  # the places are in range

    def store(self, x: Tensor) -> None:
        """Write x [rows, V]."""
        # of equal sizes, what is computed and where it is written are one loop, without a buffer between
        torch._check(x.shape[-1] == self.memory.shape[-1])
        self.memory[self.at] = x.to(self.memory.dtype)

    def apart(self) -> _Place:
        """Return the same place as a tensor that torch.compile takes for another.

        Where a loop writes to what it reads, torch.compile puts a buffer between; it need not, if each step of the loop reads
        only where it writes.
        """
        return self._replace(memory=torch.from_dlpack(self.memory))


class _Places(NamedTuple):
    """Where the gradients of both sides are written; None: not wanted."""

    policy: _Place | None
    ref: _Place | None

    def to_write(self, rows: _Rows) -> _Places:
        """Return the places as _gradients() takes them: where one gradient is written over logits, a place apart.

        Two gradients may become two loops, and the second must not read what the first has written: None is for those.
        """
        both = self.policy is not None and self.ref is not None

        def place(of: _Place | None, logits: _Place | None) -> _Place | None:
            if of is None or logits is None or of.memory.data_ptr() != logits.memory.data_ptr():
                return of
            return None if both else of.apart()

        return _Places(place(self.policy, rows.policy), place(self.ref, rows.ref))


class _Rows(NamedTuple):
    """The logits of the rows of a call that count, and the columns of their labels."""

    label: Tensor
    policy: _Place
    ref: _Place | None
    scale: _Scale
    ref_scale: _Scale

    def block(self, label: Tensor | None, column: Tensor | None = None) -> Block:
        """Return all columns of the rows, or one column of each; label: as Block has it."""
        dtype = stats_dtype(self.policy.memory)
        ref = None if self.ref is None else self.ref_scale.side(self.ref.load(column), dtype)
        return Block(self.scale.side(self.policy.load(column), dtype), ref, label)

    def label_columns(self) -> tuple[Tensor, Block]:
        """Return a column of each row, that of its label if it has one here, and a block of these columns alone."""
        here = (self.label >= 0) & (self.label < self.policy.memory.shape[-1])
        column = self.label.where(here, 0)
        return column, self.block(here.long() - 1, column)


def _totals(spec: StatsSpec, rows: _Rows) -> Totals:
    return block.totals(spec, rows.block(None))


def _terms(spec: StatsSpec, rows: _Rows, saved: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    tile = rows.block(None)
    if tile.ref is None:
        raise AssertionError("terms need a reference")
    return list(block.terms(spec, tile.policy.logits, tile.ref.logits, saved))


class _Asked(NamedTuple):
    """Which gradients are wanted, and of which divergences the incoming ones are not 0."""

    active: tuple[int, ...]
    policy: bool
    ref: bool


def _gradients(
    spec: StatsSpec,
    asked: _Asked,
    rows: _Rows,
    saved: Tensor,
    grads: Grads,
    d_policy: _Place | None,
    d_ref: _Place | None,
) -> None:
    """Write the gradients to their places; None: to where the logits are. Those of the labels' own terms are not in them."""
    each = block.gradients(spec, rows.block(None), saved, grads, *asked)
    for place, gradient in zip((d_policy or rows.policy, d_ref or rows.ref), each, strict=True):
        if place is not None and gradient is not None:
            place.store(gradient)


_failures: list[Exception] = []  # after the first one, the torch backend computes everything
_programs: dict[tuple, Callable] = {}
_lock = threading.Lock()


def _bound(spec: StatsSpec, double: bool) -> StatsSpec:
    """Return a spec without what does not change the code, with formulas for compiled loops."""
    divergences = [
        replace(
            d,
            term=d.term and bind(d.term, double),
            grad_p=bind(d.grad_p, double),
            grad_q=bind(d.grad_q, double),
        )
        for d in spec.divergences
    ]
    return StatsSpec(tuple(divergences), spec.entropy, spec.collision, False, 0, 0)


# What several sums share is computed in their one loop, and not written to memory for them, unless it is very long.
OPTIONS = {
    "compile_threads": 1,
    "cpp.max_horizontal_fusion_size": 1024,
    "assert_indirect_indexing": False,
    "realize_opcount_threshold": 128,
    "realize_reads_threshold": 16,
    "realize_acc_reads_threshold": 32,
}


@functools.cache
def vector_width() -> int:
    """Return the bits of the vectors that this process compiles for; 0: it compiles loops without vectors."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa  # not above: importing it takes a while

    return pick_vec_isa().bit_width()


def _options() -> dict[str, Any]:
    """Return the options of torch.compile: OPTIONS, and the width of the vectors.

    The width would not be part of the key under which Inductor keeps code on disk, but all options are. Processes with another
    ATEN_CPU_CAPABILITY, or on another processor with the same disk, would mix code of different widths.
    """
    return {**OPTIONS, "cpp.simdlen": vector_width()}


def _new_program(function: Callable, fixed: tuple) -> Callable:
    def program(*args: object) -> object:
        if not is_compiling():  # torch runs the function as it is written, with temporaries of the size of a tile
            raise _LeftToTorchError
        return function(*fixed, *args)

    # Dynamo keeps what it compiled, and counts recompilations, by code object
    own = types.FunctionType(program.__code__.replace(), globals(), closure=program.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=True, options=_options())


@contextmanager
def _tracing() -> Iterator[None]:
    """Set what torch.compile reads while it traces.

    Sizes that are equal by chance, of rows that count and of all rows, are not to be equal in the code. The parameters of
    divergences are constants: as variables, torch 2.13 may take the code for other values from its cache.
    """
    from torch._dynamo import config

    with shapes_config.patch(use_duck_shape=False), config.patch(specialize_float=True):  # type: ignore[attr-defined]
        yield


def _program(function: Callable, spec: StatsSpec, double: bool, fixed: tuple) -> Callable:
    """Return the function with its first arguments fixed, as a program that its first call compiles."""
    formulas = tuple((d.key, d.power, d.params, d.term, d.grad_p, d.grad_q) for d in spec.divergences)
    key = function, formulas, spec.entropy, spec.collision, double, fixed
    with _lock:
        if not _programs:
            log.warning(
                "fused_losses compiles loops for this CPU: up to half a minute for each new kind of call, and a few seconds "
                "where %s has them already. FUSED_LOSSES_BACKEND=torch runs without.",
                folder(),
            )
        if key not in _programs:
            _programs[key] = _new_program(function, (_bound(spec, double), *fixed))
        return _programs[key]


def _failed(error: Exception) -> None:
    """Leave all that follows to the torch backend, and say so once."""
    with _lock:
        _failures.append(error)
        if len(_failures) > 1:
            return
    message = str(error).strip().split("\n")[0]
    log.warning("fused_losses: a compilation failed, torch goes on: %s: %s", type(error).__name__, message)


def _run(function: Callable, spec: StatsSpec, rows: _Rows, *args: object, fixed: tuple = ()) -> Any:
    """Run the compiled function; the first call for a spec compiles it."""
    if rows.label.numel() < 2:  # torch.compile makes other code for a size of 0 or 1
        raise _LeftToTorchError
    program = _program(function, spec, stats_dtype(rows.policy.memory) == torch.float64, fixed)
    try:
        with torch.no_grad(), _tracing():
            return program(rows, *args)
    except _LeftToTorchError:
        raise
    except Exception as error:  # whatever the compiler raises: the torch backend computes the same
        _failed(error)
        raise _LeftToTorchError from error


def _or_torch(function: Callable) -> Callable:
    """Leave a function of the interface to the torch backend where compiling does not pay, or fails."""

    @functools.wraps(function)
    def run(spec: StatsSpec, policy: Tensor, labels: Tensor, ref: Tensor | None, *args: object) -> None:
        large = labels.numel() * spec.vocab >= COMPILE_FROM or os.environ.get("FUSED_LOSSES_BACKEND") == "compiled"
        if large and not _failures:
            with suppress(_LeftToTorchError):
                return function(spec, policy, labels, ref, *args)
        return getattr(torch_backend, function.__name__)(spec, policy, labels, ref, *args)

    return run


def _rows(
    spec: StatsSpec, policy: Tensor, labels: Tensor, ref: Tensor | None, factors: RowFactors = NO_FACTORS
) -> tuple[Tensor, _Rows]:
    """Return the numbers of the rows that count, and what a compiled function takes of them."""
    dtype = stats_dtype(policy)
    y = labels.reshape(-1).long()
    numbers = (y != spec.ignore_index).nonzero().squeeze(1)
    return numbers, _Rows(
        y[numbers] - spec.first,
        _Place.of(policy, spec.vocab, numbers),
        None if ref is None else _Place.of(ref, spec.vocab, numbers),
        _Scale.of(spec.softcap, spec.multiplier, factors.policy, numbers, dtype),
        _Scale.of(spec.ref_softcap, spec.ref_multiplier, factors.ref, numbers, dtype),
    )


def _sums(spec: StatsSpec, rows: _Rows) -> Sums:
    """Return the sums of the rows; the logits of their labels are computed here, without a loop of their own."""
    return block.sums(_run(_totals, spec, rows), rows.label_columns()[1])


@_or_torch
def forward(
    spec: StatsSpec,
    policy: Tensor,
    labels: Tensor,
    ref: Tensor | None,
    out: Outputs,
    factors: RowFactors = NO_FACTORS,
) -> None:
    labels = shifted_labels(labels, spec.shift, spec.ignore_index)
    check_labels(spec, labels)
    numbers, rows = _rows(spec, policy, labels, ref if out.ref_logps is not None else None, factors)
    found = _sums(spec, rows)
    torch_backend.clear(out)
    torch_backend.write(spec, numbers, found, out)
    if rows.ref is not None and any(d.term is not None for d in spec.divergences):
        for i, value, slope in _run(_terms, spec, rows, out.saved[:, numbers]):
            write_divergence(spec, i, value, slope, numbers, out)


@_or_torch
def fold(spec: StatsSpec, policy: Tensor, labels: Tensor, ref: Tensor | None, state: Tensor, fresh: bool) -> None:
    numbers, rows = _rows(spec, policy, labels, ref)
    new = _sums(spec, rows).state()
    state[:, numbers] = new if fresh else torch_backend.merged(spec, state[:, numbers], new)


@_or_torch
def terms(spec: StatsSpec, policy: Tensor, labels: Tensor, ref: Tensor, saved: Tensor, sums: Tensor) -> None:
    numbers, rows = _rows(spec, policy, labels, ref)
    for i, *totals in _run(_terms, spec, rows, saved[:, numbers]):
        for at, total in zip(term_rows(i), totals, strict=True):
            sums[at, numbers] += total


@_or_torch
def backward(  # noqa: PLR0913 (the interface)
    spec: StatsSpec,
    policy: Tensor,
    labels: Tensor,
    ref: Tensor | None,
    saved: Tensor,
    grads: Grads,
    d_policy: Tensor | None,
    d_ref: Tensor | None,
    factors: RowFactors = NO_FACTORS,
) -> None:
    labels = shifted_labels(labels, spec.shift, spec.ignore_index)
    active = torch_backend.active_divergences(grads)
    numbers, rows = _rows(spec, policy, labels, ref if active or d_ref is not None else None, factors)
    of_rows = Grads(*(None if g is None else g[..., numbers] for g in grads))
    asked = _Asked(tuple(active), d_policy is not None, d_ref is not None)
    saved = saved[:, numbers]
    # The labels' columns are computed here; in the loop, each column would be compared with a label.
    column, of_labels = rows.label_columns()
    at_labels = block.gradients(spec, of_labels, saved, of_rows, *asked)
    places = _Places(*(None if x is None else _Place.of(x, spec.vocab, numbers) for x in (d_policy, d_ref)))
    _run(_gradients, spec, rows, saved, of_rows, *places.to_write(rows), fixed=(asked,))
    for place, gradient in zip(places, at_labels, strict=True):
        if place is not None and gradient is not None:
            place.memory[(*place.at, column)] = gradient.squeeze(1).to(place.memory.dtype)
    for x in (d_policy, d_ref):
        if x is not None:
            torch_backend.zero_outside(rows_view(x, 1), labels, spec)
