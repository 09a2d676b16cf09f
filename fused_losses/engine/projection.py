"""Compute one side's logits tile by tile, from hidden states or existing logits, and propagate the gradient back.

All matrix products of the package are here. A tile is [some rows, some columns] of the valid vocabulary in the dtype of
the statistics; row indices count only the rows that count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.layout import stats_dtype

RUN, MANY = 32, 128  # slices


class Inputs(NamedTuple):
    """The tensors of one side: x is [..., H] with a weight, logits [..., V] without."""

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0

    @property
    def hidden(self) -> int:
        """Return H plus the rank of the factors a and b; 0 for logits."""
        return 0 if self.weight is None else self.weight.shape[1] + (0 if self.a is None else self.a.shape[0])


def low_precision(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def mixed(device: torch.device) -> bool:
    """Return whether products of low-precision factors can be summed and returned in float32."""
    return device.type == "cuda"


def add_product(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, fresh: bool = False) -> None:
    """Compute alpha a @ b, and add it to out, or overwrite out if fresh.

    The product is summed in the dtype of out or a wider one.
    """
    beta = 0.0 if fresh else 1.0
    if a.dtype != out.dtype and b.dtype == a.dtype and mixed(out.device):
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, alpha=alpha, out=out)


class LogitSide:
    """One side given as existing logits. rows: the indices of the rows that are used, None for all."""

    def __init__(self, inputs: Inputs, rows: Tensor | None):
        x = inputs.x
        count = x[..., 0].numel()
        every = torch.arange(count, device=x.device) if rows is None else rows
        self.x, self.index = x, torch.unravel_index(every, x.shape[:-1])
        self.gradient: Tensor | None = None

    def want(self) -> None:
        self.gradient = torch.zeros_like(self.x, memory_format=torch.preserve_format)

    def _at(self, r: slice, c: slice) -> tuple[Tensor | slice, ...]:
        return (*(i[r] for i in self.index), c)

    def tile(self, r: slice, c: slice, out: Tensor) -> None:
        out.copy_(self.x[self._at(r, c)])

    def push(self, r: slice, c: slice, dz: Tensor) -> None:
        assert self.gradient is not None
        self.gradient[self._at(r, c)] = dz.to(self.x.dtype)

    def finish_slice(self, c: slice) -> None:
        pass

    def gradients(self) -> list[Tensor | None]:
        return [self.gradient, None, None, None, None]


class HiddenSide:
    """One side given as hidden states and a head. want() selects the gradients that push() sums."""

    def __init__(self, inputs: Inputs, rows: Tensor | None):
        x, weight = inputs.x, inputs.weight
        assert weight is not None
        self.inputs, self.rows = inputs, rows
        self.flat = x.reshape(-1, x.shape[-1])
        self.x = self.flat if rows is None else self.flat.index_select(0, rows)
        self.sums = stats_dtype(x)
        # the dtype of dz: that of the products, where those can be summed in float32
        self.dtype = x.dtype if mixed(x.device) else self.sums
        self.xa: Tensor | None = None
        if inputs.a is not None:
            xa = x.new_empty((len(self.x), len(inputs.a)), dtype=self.sums)
            add_product(xa, self.x, self._cast(inputs.a).T, inputs.scaling, fresh=True)
            self.xa = xa.to(self.dtype)
        self.wanted = [False] * 5

    def _cast(self, w: Tensor) -> Tensor:
        """Return a piece of a weight in the dtype of the products."""
        return w.to(self.dtype)

    def want(
        self, wanted: list[bool], several_blocks: bool, slices: int = 1, wide: bool = False, shared: bool = False
    ) -> None:
        """Prepare the sums for the gradients of x, weight, bias, a, b.

        several_blocks: a slice is pushed in more than one call. wide: gradients() does not round any of them. shared:
        gradients() does not round those of x and a, to which other ranks add theirs.
        """
        self.wanted, self.wide, self.shared, self.slices = wanted, wide, wide or shared, 0
        n, width = self.x.shape
        new = self.x.new_zeros
        self.dx = new((n, width), dtype=self.sums) if wanted[0] else None
        # the error of a sum of many slices grows with their number: sum RUN slices first, then these sums
        self.run = torch.zeros_like(self.dx) if self.dx is not None and slices > MANY else None
        self.dxa = new(self.xa.shape, dtype=self.sums) if self.xa is not None and (wanted[0] or wanted[3]) else None
        _, weight, bias, _, b, _ = self.inputs
        assert weight is not None
        self.dw = new(weight.shape, dtype=self._final(weight)) if wanted[1] else None
        self.dbias = new(bias.shape, dtype=self.sums) if wanted[2] and bias is not None else None
        self.db = new(b.shape, dtype=self._final(b)) if wanted[4] and b is not None else None
        self.several = several_blocks
        self.pending: list[Tensor | None] = [None, None]

    def _final(self, x: Tensor, shared: bool = False) -> torch.dtype:
        """Return the dtype of the gradient of x."""
        return self.sums if self.wide or (shared and self.shared) else x.dtype

    def tile(self, r: slice, c: slice, out: Tensor) -> None:
        _, weight, bias, _, b, _ = self.inputs
        assert weight is not None
        add_product(out, self.x[r], self._cast(weight[c]).T, fresh=True)
        if self.xa is not None and b is not None:
            add_product(out, self.xa[r], self._cast(b[c]).T)
        if bias is not None:
            out.add_(bias[c].to(out.dtype))

    def push(self, r: slice, c: slice, dz: Tensor) -> None:
        """Add the contribution of dz [rows, columns] to every wanted gradient."""
        _, weight, _, _, b, scaling = self.inputs
        assert weight is not None
        if self.dx is not None:
            add_product((self.dx if self.run is None else self.run)[r], dz, self._cast(weight[c]))
        if self.dxa is not None and b is not None:
            add_product(self.dxa[r], dz, self._cast(b[c]), scaling)
        if self.dbias is not None:
            self.dbias[c] += dz.sum(0, dtype=self.sums)
        if self.dw is not None:
            self._push_slice(0, self.dw[c], dz, self.x[r])
        if self.db is not None and self.xa is not None:
            self._push_slice(1, self.db[c], dz, self.xa[r])

    def pull(self, out: Tensor, c: slice, dz: Tensor) -> None:
        """Add dz W to the first H columns of out [rows, H + rank], and dz B to the last columns."""
        _, weight, _, _, b, _ = self.inputs
        assert weight is not None
        width = weight.shape[1]
        add_product(out[:, :width], dz, self._cast(weight[c]))
        if b is not None:
            add_product(out[:, width:], dz, self._cast(b[c]))

    def pulled(self, out: Tensor) -> Tensor:
        """Compute the gradient at the hidden states [rows, H] from the sums of pull()."""
        _, weight, _, a, _, scaling = self.inputs
        assert weight is not None
        if a is None:
            return out
        dx = out[:, : weight.shape[1]]
        add_product(dx, out[:, weight.shape[1] :], a.to(out.dtype), scaling)
        return dx

    def rows_of_head(self, ids: Tensor) -> Tensor:
        """Return W_y [rows, H], followed by B_y in further columns, where y are the ids."""
        _, weight, _, _, b, _ = self.inputs
        assert weight is not None
        return torch.cat([x[ids].to(self.sums) for x in (weight, b) if x is not None], dim=1)

    def _push_slice(self, i: int, out: Tensor, dz: Tensor, x: Tensor) -> None:
        """Compute out = dz^T x, rounded once.

        Over several blocks of rows it is summed in the dtype of the sums.
        """
        if out.dtype == self.sums or (not self.several and out.dtype == x.dtype == dz.dtype):
            add_product(out, dz.T, x, fresh=not self.several)
            return
        held = self.pending[i]
        if held is None:
            held = self.pending[i] = torch.zeros_like(out, dtype=self.sums)
        add_product(held, dz.T, x)

    def finish_slice(self, c: slice) -> None:
        self.slices += 1
        if self.run is not None and self.slices % RUN == 0:
            self._add_run()
        for held, out in zip(self.pending, (self.dw, self.db), strict=True):
            if held is not None and out is not None:
                out[c] = held
        self.pending = [None, None]

    def _add_run(self) -> None:
        assert self.dx is not None and self.run is not None
        self.dx += self.run
        self.run.zero_()

    def gradients(self) -> list[Tensor | None]:
        """Return the gradients of x, weight, bias, a, b. They are contiguous.

        Each is rounded once to the dtype of its tensor, unless want() was called with wide or shared.
        """
        x, _, bias, a, _, _ = self.inputs
        if self.run is not None:
            self._add_run()
            self.run = None
        dx, da, dbias = self.dx, None, self.dbias
        if self.dxa is not None and a is not None:
            if self.wanted[3]:
                da = torch.empty_like(a, dtype=self.sums, memory_format=torch.contiguous_format)
                add_product(da, self.dxa.T, self.x.to(self.sums), fresh=True)
                da = da.to(self._final(a, True))
            if dx is not None:
                add_product(dx, self.dxa, a.to(self.sums))
        if dx is not None:
            dx = spread(dx, self.rows, len(self.flat), self._final(x, True)).view(x.shape)
        if dbias is not None and bias is not None:
            dbias = dbias.to(self._final(bias))
        return [dx, self.dw, dbias, da, self.db]


def spread(x: Tensor, rows: Tensor | None, count: int, dtype: torch.dtype) -> Tensor:
    """Return x [n, H] of the rows that count as [count, H] with zeros for the other rows, in the given dtype."""
    if rows is None:
        return x.to(dtype)
    out = x.new_zeros((count, *x.shape[1:]), dtype=dtype)
    for part, ids in zip(x.split(4096), rows.split(4096), strict=True):  # in parts: avoids a copy of all rows
        out.index_copy_(0, ids, part.to(dtype))
    return out


Side = LogitSide | HiddenSide


def side(inputs: Inputs, rows: Tensor | None) -> Side:
    return LogitSide(inputs, rows) if inputs.weight is None else HiddenSide(inputs, rows)
