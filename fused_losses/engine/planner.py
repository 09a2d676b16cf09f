"""Choose how to compute a call with hidden states: which plan, in tiles of which size, in how many bytes, and why.

The plans, with their GEMMs of N rows and V columns as "forward | backward":

    row_blocks    blocks of whole units (tokens, sequences, pairs) over the whole vocabulary; gradients are computed in the
                  forward: z, w, dX, dW. Where only the log-probs of w are needed, they are computed first, in chunks
    keep_logits   all logits fit the workspace and are kept: z, w | dX, dW
    vocab_chunks  chunks of the vocabulary; backward computes the logits again
                  z, w | z, w, dX, dW     (w in backward only where a divergence, or the reference, has a gradient)
    frozen_head   chunks, for a head without gradients: E_p[W] is updated together with the sums, as flash attention updates
                  its output; backward scales rows: z, w, E_p[W], and one more for the entropy and each divergence
    on_chip       a Triton kernel that keeps logits on the chip: z, w. It is meant for calls that need no gradient. With a
                  gradient, the backward of vocab_chunks rounds its logits differently from this forward, which is visible
                  where policy and reference nearly agree (ten times eager's error at differences of 1e-3)

z stands for the policy's logits, w for the reference's.
Divergences that need a second sweep, and in the plan "frozen_head" those without a scaling, compute z and w twice.
Everything is decided from shapes and flags: nothing is measured, no value is read from a device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from ..core.divergences import Divergence
from ..core.layout import BLOCK_BYTES
from ..core.names import not_one_of
from .projection import MANY

DEFAULT_WORKSPACE = 256 << 20
VARIABLE = "FUSED_LOSSES_WORKSPACE"
KINDS = ("on_chip", "frozen_head", "row_blocks", "keep_logits", "vocab_chunks")
ROWS = 8192  # of a tile at most: beyond this, more columns are better
# Columns of a tile on a GPU: a multiple of the lanes of the kernels (kernels/configs.py), and at least their longest step, as
# in less a row costs about as much beside its logits as in them. Beyond it more rows are better than more columns: each block
# of rows reads and writes a chunk of the head's gradient again, 8 H / rows bytes a logit. So no tile is made to fit L2 (50 MB).
LANES = 256
STEP = 2048
CPU_TILE = 16 << 20  # bytes of one tile of logits on a CPU, where larger products are not faster
CPU_BLOCK = 96 << 20  # bytes of a block of whole rows and its temporaries, for the same reason

# Temporaries of BLOCK_BYTES that the torch backend holds at the same time, without and with a divergence. From logits they
# are measured: of a gradient to the policy or to both; of divergences that are read once or twice. On tiles of a plan it is
# a bound of all cases, because what is left of the workspace is given to the tile.
BLOCKS = (6, 16)
LOGITS_BLOCKS = ((5, 6), (13, 15))


class PlanInputs(NamedTuple):
    """What planning needs to know of a call. Sizes are in elements; itemsize and sums are in bytes."""

    rows: int  # an upper bound: those that do not count are only found when the call runs
    vocab: int
    hidden: int  # the policy's H, with the rank of its factors; 0 where logits are given
    ref_hidden: int  # the same of the reference
    itemsize: int  # of the tensors that are multiplied
    sums: int  # of the statistics and of a tile's logits
    ref: bool  # the reference is a distribution, not None or log-probs
    device: str = "cpu"
    backend: str = "torch"
    bases: int = 0  # divergences and entropy: each needs a product in the plan "frozen_head"
    pair: bool = False  # a divergence is asked for
    second: bool = False  # one of them needs a second sweep
    frozen_second: bool = False  # in the plan "frozen_head", one of them needs a second sweep for its sum
    grad_hidden: bool = False  # gradients wanted: policy's hidden states (or logits)
    grad_head: bool = False  # policy's weight, bias or factors
    grad_weight: bool = False  # policy's weight itself
    grad_ref: bool = False  # anything of the reference
    unit: int = 0  # rows of the longest unit (token, sequence, pair) where the loss is known; 0: not known
    row_cast: int = 0  # bytes of a row of hidden states cast to the dtype of the products
    column_cast: int = 0  # bytes of a row of a head cast to that dtype
    static: bool = False  # static_shapes
    extra: bool = False  # one tile more than z and w: dz of the plan "frozen_head"
    dense: bool = True  # rows of the heads are contiguous, as the tile kernel reads them
    weight: int = 0  # elements of the policy's head

    @property
    def backward(self) -> bool:
        """Return whether any gradient is wanted."""
        return self.grad_hidden or self.grad_head or self.grad_ref


class Tile(NamedTuple):
    """The size of a tile of logits."""

    rows: int
    columns: int


class Products(NamedTuple):
    """The products of N rows and V columns, as text."""

    forward: str
    backward: str

    @property
    def number(self) -> int:
        """Return how many there are."""
        return sum(len(p.split(", ")) for p in self if p)


class PlanKind(NamedTuple):
    """The kind of a plan, and why it was chosen."""

    kind: str
    why: str


class Plan(NamedTuple):
    """The plan of a call. str(plan) describes it."""

    kind: str
    tile: Tile
    forward: str  # the products of N rows, V columns
    backward: str
    workspace: int  # the budget
    tiles: int  # bytes of it that tiles and their temporaries take
    kept: int  # bytes between forward and backward, and sums of gradients in a wider dtype
    why: str

    @property
    def gemms(self) -> int:
        """Return the number of products of N rows and V columns, forward and backward together."""
        return Products(self.forward, self.backward).number

    def __str__(self) -> str:
        mib = 2**20
        backward = self.backward or ("scales rows" if self.kind == "frozen_head" else "nothing left to multiply")
        return (
            f"plan {self.kind!r}: {self.why}\n"
            f"  products of N rows and V columns: {self.gemms} (forward {self.forward}; backward {backward})\n"
            f"  tiles of {self.tile.rows} rows x {self.tile.columns} columns: {self.tiles / mib:.1f} MiB of a workspace of "
            f"{self.workspace / mib:.1f} MiB\n"
            f"  held beside it: {self.kept / mib:.1f} MiB"
        )


class Peak(NamedTuple):
    """The bytes at the peak of a call from hidden states, beyond its inputs, by purpose.

    For most plans the peak is in backward, where the gradients exist.
    """

    gradients: dict[str, int]  # that the call has to return
    beside: dict[str, int]  # held at the same time as the tiles
    tiles: int

    @property
    def parts(self) -> dict[str, int]:
        """Return all of them by purpose."""
        gradients = {f"gradient of {name}": count for name, count in self.gradients.items() if count}
        return gradients | self.beside | {"tiles of logits": self.tiles}


def workspace_bytes(asked: int | None) -> int:
    """Return the budget in bytes: the argument, else FUSED_LOSSES_WORKSPACE, else 256 MiB."""
    value: object = asked
    name = "workspace"
    if asked is None:
        name, value = VARIABLE, os.environ.get(VARIABLE)
        if value is None:
            return DEFAULT_WORKSPACE
        value = int(value) if str(value).isdigit() else value
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}: expected a number of bytes >= 1, got {value!r}")
    return value


def _bytes(call: PlanInputs, rows: int, columns: int) -> int:
    """Return the bytes of tiles of this shape and their temporaries: the maximum of forward and backward."""
    low = call.itemsize < call.sums
    logit = call.sums * (1 + call.ref + call.extra)
    if call.backward and low and call.device == "cuda":  # dz beside z; elsewhere in its place
        logit += call.itemsize * (call.grad_hidden or call.grad_head) + call.itemsize * call.grad_ref
    size = rows * columns * logit
    if call.backend != "triton":  # "compiled" may leave a call to "torch"
        size += BLOCKS[int(call.pair)] * min(BLOCK_BYTES, rows * columns * call.sums)
    size += rows * call.row_cast + columns * call.column_cast
    if low and (rows < call.rows or call.device != "cuda"):  # a slice of dW before it is rounded
        size += columns * (call.hidden * call.grad_weight + call.ref_hidden * call.grad_ref) * call.sums
    return size


def tile_shape(call: PlanInputs, budget: int) -> Tile:
    """Return the rows and columns of the widest tile that fits the budget.

    It has as many rows as there are (at most ROWS), and fewer where the tile would become narrow.
    """
    rows, vocab = max(1, min(call.rows, ROWS)), call.vocab
    step, narrow = 16, STEP if call.device == "cuda" else 512
    while True:
        widest = vocab
        if call.device == "cpu":
            widest = min(vocab, max(512, CPU_TILE // (call.sums * rows)))
        columns = _widest(call, rows, widest, step, budget)
        if rows == 1 or columns >= min(narrow, widest):
            break
        if columns and columns >= rows:
            break
        rows = (rows + 1) // 2
    if not columns:
        _too_small(_bytes(call, 1, min(vocab, step)), budget, min(vocab, step))
    if call.device == "cuda" and LANES <= columns < vocab:
        chunks = -(-vocab // (columns // LANES * LANES))
        columns = -(-vocab // (chunks * LANES)) * LANES  # so that the last chunk is about as wide as the others
    return Tile(rows, columns)


def _too_small(least: int, budget: int, logits: int) -> NoReturn:
    raise ValueError(f"workspace: expected at least {least} bytes, for {logits} logits of one row, got {budget}")


def _widest(call: PlanInputs, rows: int, most: int, step: int, budget: int) -> int:
    """Return how many columns fit the budget, at most `most`; 0 if none fit.

    The result is `most`, or a multiple of 128 where at least 128 fit, or else a multiple of `step`.
    """
    low, high = 0, -(-most // step)
    while low < high:  # the bytes grow with the columns
        middle = (low + high + 1) // 2
        if _bytes(call, rows, min(most, middle * step)) <= budget:
            low = middle
        else:
            high = middle - 1
    columns = min(most, low * step)
    return columns if columns == most or columns < 128 else columns // 128 * 128


def make_plan(call: PlanInputs, kind: str = "auto", workspace: int | None = None) -> Plan:
    """Return the plan of that kind; for "auto", the one with the fewest products that fits the workspace."""
    budget = workspace_bytes(workspace)
    return _plan(call, choose_plan_kind(call, kind, budget), budget)


def choose_plan_kind(call: PlanInputs, kind: str, budget: int) -> PlanKind:
    """Return the kind of that plan, and why.

    Tiles are chosen elsewhere, because their shape differs for every number of rows. So torch.compile traces, and guards,
    this choice only.
    """
    if kind not in ("auto", *KINDS):
        raise not_one_of("plan", kind, ("auto", *KINDS))
    if not call.backward and kind in (
        "frozen_head",
        "row_blocks",
        "keep_logits",
    ):  # they differ only in how they compute gradients
        return PlanKind("vocab_chunks", f"nothing asks for a gradient, so plan {kind!r} is the forward of this one")
    if kind != "auto":
        reason = _refusal(call, kind, budget, asked=True)
        if reason:
            raise ValueError(f"plan: {kind!r} is not possible here: {reason}")
        return PlanKind(kind, "asked for")
    fewest, least = "vocab_chunks", 0
    for candidate in KINDS:  # of equal counts the first is chosen
        count = _products(call, candidate).number
        if not _refusal(call, candidate, budget, asked=False) and (count < least or not least):
            fewest, least = candidate, count
    return PlanKind(fewest, _reasons(call)[fewest])


def _reasons(call: PlanInputs) -> dict[str, str]:
    return {
        "on_chip": "nothing asks for a gradient and the hidden size is small, so logits need not leave the chip",
        "frozen_head": "the head has no gradient, so its rows' expectation comes with the forward",
        "row_blocks": "the loss is known and its units fit the workspace, so gradients come with the forward",
        "keep_logits": "all logits fit the workspace and are kept for backward",
        "vocab_chunks": (
            "nothing asks for a gradient"
            if not call.backward
            else "neither large blocks of units nor all logits fit the workspace"
            if call.unit
            else "the loss is not known here, and all logits do not fit the workspace"
        ),
    }


TILES_HIDDEN = 1024  # up to this H a tile kernel is expected to keep up with a GEMM that writes its logits


def _refusal(call: PlanInputs, kind: str, budget: int, asked: bool) -> str:
    """Return why this plan cannot run (or, if not asked for, should not), or an empty string."""
    return _REFUSALS[kind](call, budget, asked) if kind in _REFUSALS else ""


def _refuse_on_chip(call: PlanInputs, budget: int, asked: bool) -> str:
    if call.backend != "triton":
        return f"it is a Triton kernel, and this runs on the {call.backend} backend"
    if not call.hidden or (call.ref and not call.ref_hidden):
        return "both sides have to be hidden states"
    if not call.dense:
        return "the rows of the head weights have to be contiguous"
    if not asked and (call.backward or max(call.hidden, call.ref_hidden) > TILES_HIDDEN or call.second):
        return "not worth it"
    return ""


def _refuse_frozen_head(call: PlanInputs, budget: int, asked: bool) -> str:
    if call.grad_head or call.grad_ref or not call.hidden:
        return "it is for a policy from hidden states whose head, and reference, need no gradient"
    if not call.grad_hidden:
        return "nothing asks for a gradient"
    kept, tile = _kept_frozen(call), _bytes(call._replace(extra=True), 1, min(call.vocab, 16))
    if not asked and (kept > budget // 2 or kept + tile > budget):
        return "what it keeps for backward does not fit half the workspace"
    return ""


def _refuse_keep_logits(call: PlanInputs, budget: int, asked: bool) -> str:
    if not call.backward:
        return "nothing asks for a gradient"
    size = _whole_bytes(call)
    if size > budget:  # torch.compile would guard a number in a message
        return f"logits and their gradient take {size} bytes of {budget}" if asked else "not all logits fit"
    return ""


def _refuse_row_blocks(call: PlanInputs, budget: int, asked: bool) -> str:
    if call.static:
        return "it lays out its blocks on the host, which static_shapes forbids"
    if not call.unit:
        return "it is for losses that are reduced, and known as formulas, in eager mode"
    if call.grad_ref or not call.hidden:
        return "it is for a policy from hidden states and a reference that needs no gradient"
    if not call.backward:
        return "nothing asks for a gradient"
    size = rows_bytes(call, call.unit)
    if size > budget:
        return f"the longest unit takes {size} bytes of {budget}"
    rows = _block_rows(call, budget)
    if not asked and (rows < min(call.rows, worth(call.device)) or call.rows > MANY * rows):
        return "many small blocks are slow, and their sum is less exact"
    return ""


_REFUSALS: dict[str, Callable[[PlanInputs, int, bool], str]] = {
    "on_chip": _refuse_on_chip,
    "frozen_head": _refuse_frozen_head,
    "keep_logits": _refuse_keep_logits,
    "row_blocks": _refuse_row_blocks,
}


def _kept_whole(call: PlanInputs) -> int:
    return call.rows * call.vocab * call.sums * (1 + (call.pair or call.grad_ref))


def _whole_bytes(call: PlanInputs) -> int:
    """Return the bytes of the kept logits, and of a gradient for each side that wants one.

    The gradients may not be written over the kept logits.
    """
    dz = (call.grad_hidden or call.grad_head) + call.grad_ref
    return _kept_whole(call) + _bytes(call._replace(ref=False), call.rows, call.vocab * max(1, dz))


def rows_bytes(call: PlanInputs, rows: int) -> int:
    """Return the bytes that a block of so many rows over the whole vocabulary needs.

    This is the maximum over two moments: the block exists together with the sum of dW; later that sum, where it is in a wider
    dtype, exists together with dW itself. The reference's log-probs were computed before, in slices, unless its distribution
    is needed.
    """
    wide, final = (call.weight * size * call.grad_weight for size in (call.sums, call.itemsize))
    return max(
        _bytes(call._replace(grad_weight=False, ref=call.pair), rows, call.vocab) + wide - final, wide * (wide > final)
    )


def worth(device: str) -> int:
    """Return from how many rows on a block saves more than it costs.

    It saves products, and costs one more addition to a float32 dW: 2 flops per row and weight against 8 bytes per weight, at
    about 8 flops per byte for a CPU and 160 for a GPU (an H200; not measured).
    """
    return 32 if device == "cpu" else 640


def _block_rows(call: PlanInputs, budget: int) -> int:
    """Return the rows of a block of whole units: as many as fit, where all blocks have equal size."""
    few, most = 1, max(1, -(-call.rows // call.unit))
    total, room = most, budget
    if call.device == "cpu":
        room = min(budget, max(CPU_BLOCK, rows_bytes(call, -(-most // MANY) * call.unit)))
    while few < most:
        middle = (few + most + 1) // 2
        if rows_bytes(call, middle * call.unit) <= room:
            few = middle
        else:
            most = middle - 1
    return -(-total // -(-total // few)) * call.unit


def _products(call: PlanInputs, kind: str) -> Products:
    policy = ["z"] if call.hidden else []
    logits = [*policy, *(["w"] if call.ref_hidden else [])]
    sweeps = logits * (2 if call.second or (kind == "frozen_head" and call.frozen_second) else 1)
    back = [*(["dX"] if call.grad_hidden and call.hidden else []), *(["dW"] if call.grad_weight else [])]
    to_ref = ["dX_ref", "dW_ref"] if call.grad_ref and call.ref_hidden else []
    if kind == "row_blocks":
        return Products(", ".join([*logits, *back]), "")
    if kind == "frozen_head":
        extra = [f"E[h{i} W]" for i in range(call.bases)]
        return Products(", ".join([*sweeps, "E[p W]", *extra]), "")
    if kind == "keep_logits":
        return Products(", ".join(logits), ", ".join([*back, *to_ref]))
    again = logits if call.pair or call.grad_ref else policy
    return Products(", ".join(sweeps), ", ".join([*again, *back, *to_ref]) if call.backward else "")


def _kept_frozen(call: PlanInputs) -> int:
    return (1 + call.bases) * call.rows * call.hidden * call.sums


def logits_blocks(rows: int, vocab: int, divergences: Sequence[Divergence], both: bool) -> int:
    """Return the bytes of the torch backend's temporaries for float32 statistics of logits [rows, vocab].

    both: the gradient goes to the reference too.
    """
    row = 4 * vocab
    block = row * min(rows, max(1, BLOCK_BYTES // row))
    again = both if not divergences else any(d.term is not None for d in divergences)
    return LOGITS_BLOCKS[bool(divergences)][again] * block


def gradient_bytes(call: PlanInputs) -> dict[str, int]:
    """Return the bytes of the gradients that a call has to return."""
    states, head = call.rows * call.hidden, call.weight
    ref = (call.rows + call.vocab) * call.ref_hidden
    elements = {"states": states * call.grad_hidden, "head": head * call.grad_weight, "reference": ref * call.grad_ref}
    return {name: count * call.itemsize for name, count in elements.items()}


def peak(call: PlanInputs, plan: Plan, divergences: int) -> Peak:
    """Return the bytes at the peak of a call, forward and backward, with that plan and so many divergences."""
    gradients = gradient_bytes(call)
    returned, ref_twice = sum(gradients.values()), call.pair or call.grad_ref
    states, ref_states = (call.rows * width * call.itemsize for width in (call.hidden, call.ref_hidden))
    beside = {
        "sums, and what is kept for backward": plan.kept,
        "states of the rows that count": states + (ref_states if plan.kind != "vocab_chunks" or ref_twice else 0),
        "their gradient, before it is put back": states if call.itemsize == 4 else 0,
        "numbers per row": call.rows * (140 + 36 * divergences),
    }
    tiles = plan.tiles
    if plan.kind == "vocab_chunks" and not ref_twice:  # no gradient in forward, no reference in backward
        alone = call._replace(ref=False, ref_hidden=0)
        backward = _bytes(alone, *tile_shape(alone, plan.workspace))
        tiles = max(plan.tiles - plan.kept - states - returned, backward)
    if plan.kind == "row_blocks":  # backward scales the gradients, kept in float32, into new ones
        wide = [4 * call.rows * call.hidden, 4 * call.weight * call.grad_weight]
        rounded = max(wide) if call.itemsize < 4 else 0
        tiles = max(tiles, sum(wide) + rounded - sum(beside.values()))
    return Peak(gradients, beside, tiles)


def _plan(call: PlanInputs, chosen: PlanKind, budget: int) -> Plan:
    kind = chosen.kind
    low = call.itemsize < call.sums
    kept = call.rows * call.hidden * call.sums if low and call.grad_hidden else 0  # dX before it is rounded
    room = budget
    if kind == "frozen_head":
        kept += _kept_frozen(call)
        room = max(budget - _kept_frozen(call), budget // 2)
    if kind == "row_blocks":
        block = _block_rows(call, budget)
        tile, size = Tile(block, call.vocab), rows_bytes(call, block)
    elif kind == "keep_logits":
        tile, size = Tile(max(1, call.rows), call.vocab), _whole_bytes(call)
    else:
        call = call._replace(extra=kind == "frozen_head" and not (low and call.device == "cuda"))
        least = _bytes(call, 1, min(call.vocab, 16))
        if kind == "frozen_head" and least > room:
            _too_small(min(least + _kept_frozen(call), 2 * least), budget, min(call.vocab, 16))
        tile = tile_shape(call, room)
        size = _bytes(call, *tile)
    products = _products(call, kind)
    if kind == "vocab_chunks" and call.grad_hidden and call.vocab > MANY * tile.columns:
        kept += call.rows * call.hidden * call.sums  # sums of runs of slices
    return Plan(kind, tile, products.forward, products.backward, budget, size, kept, chosen.why)
