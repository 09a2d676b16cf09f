"""Compute one side's logits tile by tile, from hidden states or existing logits, and propagate the gradient back.

All matrix products of the package are here. A tile is [some rows, some columns] of the valid vocabulary in the dtype of
the statistics; row indices count only the rows that count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.layout import stats_dtype
from .sides import HiddenOperand, InputFlags, InputGradients, LogitsOperand, LowRank, Operand

RUN, MANY = 32, 128  # slices


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

    def __init__(self, operand: LogitsOperand, rows: Tensor | None):
        x = operand.logits
        count = x[..., 0].numel()
        indices = torch.arange(count, device=x.device) if rows is None else rows
        self.x, self.index = x, torch.unravel_index(indices, x.shape[:-1])
        self.gradient: Tensor | None = None

    def want(self, wanted: InputFlags, several_blocks: bool, slices: int = 1, shared: bool = False) -> None:
        """Prepare the gradient. The arguments are those of HiddenSide.want()."""
        if wanted.x:
            self.gradient = torch.zeros_like(self.x, memory_format=torch.preserve_format)

    def _at(self, r: slice, c: slice) -> tuple[Tensor | slice, ...]:
        return (*(i[r] for i in self.index), c)

    def tile(self, r: slice, c: slice, out: Tensor) -> None:
        out.copy_(self.x[self._at(r, c)])

    def push(self, r: slice, c: slice, dz: Tensor) -> None:
        if self.gradient is not None:
            self.gradient[self._at(r, c)] = dz.to(self.x.dtype)

    def finish_slice(self, c: slice) -> None:
        pass

    def gradients(self) -> InputGradients:
        return InputGradients(x=self.gradient)

    def dz_dtype(self, tile: Tensor) -> torch.dtype:
        """Return the dtype of the gradient of a tile that push() takes."""
        return tile.dtype


class _SliceSum:
    """A sum over slices. Its error would grow with their number: where there are many, RUN of them are summed first."""

    def __init__(self, total: Tensor, slices: int):
        self.total = self.part = total
        self.slices = 0
        if slices > MANY:
            self.part = torch.zeros_like(total)

    def finish_slice(self) -> None:
        self.slices += 1
        if self.slices % RUN == 0:
            self._add_part()

    def _add_part(self) -> None:
        if self.part is not self.total:
            self.total += self.part
            self.part.zero_()

    def close(self) -> Tensor:
        self._add_part()
        self.part = self.total
        return self.total


class _HeadSum:
    """The gradient of a tensor [V, n] of the head, of which each slice is rounded once.

    several_blocks: a slice is pushed in more than one call; it is then summed in the dtype of the sums.
    """

    def __init__(self, out: Tensor, sums: torch.dtype, several_blocks: bool):
        self.out, self.sums, self.several = out, sums, several_blocks
        self.pending: Tensor | None = None

    def push(self, c: slice, dz: Tensor, x: Tensor) -> None:
        """Add dz^T x to the slice."""
        out = self.out[c]
        if out.dtype == self.sums or (not self.several and out.dtype == x.dtype == dz.dtype):
            add_product(out, dz.T, x, fresh=not self.several)
            return
        if self.pending is None:
            self.pending = torch.zeros_like(out, dtype=self.sums)
        add_product(self.pending, dz.T, x)

    def finish_slice(self, c: slice) -> None:
        if self.pending is not None:
            self.out[c] = self.pending
            self.pending = None


class _LowRankRows:
    """The products x a^T of the rows, times the scaling, with the factors of LoRA."""

    def __init__(self, factors: LowRank, x: Tensor, dtype: torch.dtype, sums: torch.dtype):
        self.a, self.b, self.scaling = factors.a, factors.b, factors.scaling
        xa = x.new_empty((len(x), len(self.a)), dtype=sums)
        add_product(xa, x, self.a.to(dtype).T, self.scaling, fresh=True)
        self.xa = xa.to(dtype)
        self.gradient: Tensor | None = None  # dxa, in the dtype of the sums
        self.db: _HeadSum | None = None


class HiddenSide:
    """One side given as hidden states and a head. want() selects the gradients that push() sums."""

    def __init__(self, operand: HiddenOperand, rows: Tensor | None):
        x = operand.x
        self.operand, self.rows = operand, rows
        self.weight, self.bias = operand.weight, operand.bias
        self.flat = x.reshape(-1, x.shape[-1])
        self.x = self.flat if rows is None else self.flat.index_select(0, rows)
        self.sums = stats_dtype(x)
        # the dtype of dz: that of the products, where those can be summed in float32
        self.dtype = x.dtype if mixed(x.device) else self.sums
        factors = operand.low_rank
        self.low_rank = None if factors is None else _LowRankRows(factors, self.x, self.dtype, self.sums)
        self.wanted, self.wide, self.shared = InputFlags(), False, False
        self.dx: _SliceSum | None = None
        self.dw: _HeadSum | None = None
        self.dbias: Tensor | None = None

    def _cast(self, w: Tensor) -> Tensor:
        """Return a piece of a weight in the dtype of the products."""
        return w.to(self.dtype)

    def want(
        self, wanted: InputFlags, several_blocks: bool, slices: int = 1, shared: bool = False, wide: bool = False
    ) -> None:
        """Prepare the sums for the gradients that are wanted.

        several_blocks: a slice is pushed in more than one call. wide: gradients() does not round any of them. shared:
        gradients() does not round those of x and a, to which other ranks add theirs.
        """
        self.wanted, self.wide, self.shared = wanted, wide, wide or shared

        def new(x: Tensor, dtype: torch.dtype = self.sums) -> Tensor:
            return self.x.new_zeros(x.shape, dtype=dtype)

        def head(x: Tensor) -> _HeadSum:
            return _HeadSum(new(x, self._final(x)), self.sums, several_blocks)

        self.dx = _SliceSum(new(self.x), slices) if wanted.x else None
        self.dw = head(self.weight) if wanted.weight else None
        self.dbias = new(self.bias) if wanted.bias and self.bias is not None else None
        if self.low_rank is not None:
            self.low_rank.gradient = new(self.low_rank.xa) if wanted.x or wanted.a else None
            self.low_rank.db = head(self.low_rank.b) if wanted.b else None

    def _final(self, x: Tensor, shared: bool = False) -> torch.dtype:
        """Return the dtype of the gradient of x."""
        return self.sums if self.wide or (shared and self.shared) else x.dtype

    def tile(self, r: slice, c: slice, out: Tensor) -> None:
        add_product(out, self.x[r], self._cast(self.weight[c]).T, fresh=True)
        if self.low_rank is not None:
            add_product(out, self.low_rank.xa[r], self._cast(self.low_rank.b[c]).T)
        if self.bias is not None:
            out.add_(self.bias[c].to(out.dtype))

    def push(self, r: slice, c: slice, dz: Tensor) -> None:
        """Add the contribution of dz [rows, columns] to every wanted gradient."""
        if self.dx is not None:
            add_product(self.dx.part[r], dz, self._cast(self.weight[c]))
        if self.dbias is not None:
            self.dbias[c] += dz.sum(0, dtype=self.sums)
        if self.dw is not None:
            self.dw.push(c, dz, self.x[r])
        if (low := self.low_rank) is not None:
            if low.gradient is not None:
                add_product(low.gradient[r], dz, self._cast(low.b[c]), low.scaling)
            if low.db is not None:
                low.db.push(c, dz, low.xa[r])

    def pull(self, out: Tensor, c: slice, dz: Tensor) -> None:
        """Add dz W to the first H columns of out [rows, H + rank], and dz B to the last columns."""
        width = self.weight.shape[1]
        add_product(out[:, :width], dz, self._cast(self.weight[c]))
        if self.low_rank is not None:
            add_product(out[:, width:], dz, self._cast(self.low_rank.b[c]))

    def pulled(self, out: Tensor) -> Tensor:
        """Compute the gradient at the hidden states [rows, H] from the sums of pull()."""
        if self.low_rank is None:
            return out
        width = self.weight.shape[1]
        dx = out[:, :width]
        add_product(dx, out[:, width:], self.low_rank.a.to(out.dtype), self.low_rank.scaling)
        return dx

    def heads(self) -> list[Tensor]:
        """Return W, followed by B where there is one: what the states, and their products x a^T, are multiplied with."""
        return [self.weight] if self.low_rank is None else [self.weight, self.low_rank.b]

    def rows_of_head(self, ids: Tensor) -> Tensor:
        """Return W_y [rows, H], followed by B_y in further columns, where y are the ids."""
        return torch.cat([x[ids].to(self.sums) for x in self.heads()], dim=1)

    def finish_slice(self, c: slice) -> None:
        if self.dx is not None:
            self.dx.finish_slice()
        for head in (self.dw, None if self.low_rank is None else self.low_rank.db):
            if head is not None:
                head.finish_slice(c)

    def gradients(self) -> InputGradients:
        """Return the gradients. They are contiguous.

        Each is rounded once to the dtype of its tensor, unless want() was called with wide or shared.
        """
        x = self.operand.x
        dx = None if self.dx is None else self.dx.close()
        dbias, da, db = self.dbias, None, None
        if (low := self.low_rank) is not None:
            if low.gradient is not None and self.wanted.a:
                da = torch.empty_like(low.a, dtype=self.sums, memory_format=torch.contiguous_format)
                add_product(da, low.gradient.T, self.x.to(self.sums), fresh=True)
                da = da.to(self._final(low.a, True))
            if low.gradient is not None and dx is not None:
                add_product(dx, low.gradient, low.a.to(self.sums))
            db = None if low.db is None else low.db.out
        if dx is not None:
            dx = spread(dx, self.rows, len(self.flat), self._final(x, True)).view(x.shape)
        if dbias is not None and self.bias is not None:
            dbias = dbias.to(self._final(self.bias))
        return InputGradients(dx, None if self.dw is None else self.dw.out, dbias, da, db)

    def dz_dtype(self, tile: Tensor) -> torch.dtype:
        """Return the dtype of the gradient of a tile that push() takes."""
        return self.dtype


def spread(x: Tensor, rows: Tensor | None, count: int, dtype: torch.dtype) -> Tensor:
    """Return x [n, H] of the rows that count as [count, H] with zeros for the other rows, in the given dtype."""
    if rows is None:
        return x.to(dtype)
    out = x.new_zeros((count, *x.shape[1:]), dtype=dtype)
    for part, ids in zip(x.split(4096), rows.split(4096), strict=True):  # in parts: avoids a copy of all rows
        out.index_copy_(0, ids, part.to(dtype))
    return out


Side = LogitSide | HiddenSide


def side_of(operand: Operand, rows: Tensor | None) -> Side:
    """Return the operand with the products of its rows. rows: the indices of the rows that are used, None for all."""
    return LogitSide(operand, rows) if isinstance(operand, LogitsOperand) else HiddenSide(operand, rows)


def hidden_side(side: Side) -> HiddenSide:
    """Return a side that is given as hidden states; raise TypeError for logits, which not all plans take."""
    if isinstance(side, LogitSide):
        raise TypeError(f"expected hidden states, got logits {list(side.x.shape)}")
    return side
