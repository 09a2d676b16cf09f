"""Fixed launch configurations, which depend on how much data a kernel keeps in each step.

Nothing is tuned at run time.
"""

from typing import NamedTuple


class Config(NamedTuple):
    lanes: int  # vocabulary entries processed in parallel; each lane has one accumulator of each kind
    unroll: int  # groups of lanes that one step reads, so that checks made once per step cost little
    warps: int
    stages: int  # steps in flight in the asynchronous loads

    @property
    def per_thread(self) -> int:
        return self.lanes * self.unroll // (32 * self.warps)


# Chosen from the machine code for sm_90 (no spills; 8 lanes a thread make 128-bit loads of 2-byte logits); not yet timed.
FORWARD = Config(1024, 8, 4, 2)
FORWARD_MORE = Config(1024, 4, 4, 2)  # half the step: a third exponential, or divergences with entropy or float32
FORWARD_TERM = Config(1024, 4, 4, 2)  # two sweeps for one divergence alone
FORWARD_TWO_PASS = Config(1024, 2, 4, 2)  # and for more: in longer steps they would spill
BACKWARD = Config(1024, 1, 4, 1)
PAIRS = Config(1024, 1, 4, 1)


class Tile(NamedTuple):
    rows: int
    columns: int
    depth: int  # hidden dimensions in a step of the matrix product
    warps: int
    stages: int


# Tiles of fused_linear.py for one side | two sides | two sides and more sums in registers (a power, an entropy in addition to
# divergences, terms). They are the largest of those tried that do not spill registers (except with softcap and powers, see
# bench/static.py) in 96 KiB of shared memory (AMD: 64 KiB). A tile reads (1 / rows + 1 / columns) of a byte from L2 for each
# multiplication. Devices that are not listed use the tiles of sm_80.
TILES = {
    "sm_80": (Tile(128, 128, 32, 8, 4), Tile(64, 128, 32, 8, 4), Tile(64, 64, 32, 8, 4)),
    "sm_90": (Tile(128, 256, 32, 8, 4), Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3)),
    "sm_100": (Tile(128, 128, 64, 8, 3), Tile(128, 128, 32, 8, 3), Tile(128, 64, 64, 8, 3)),
    "hip": (Tile(128, 256, 64, 8, 2), Tile(128, 128, 64, 8, 2), Tile(128, 64, 64, 8, 2)),
}
TILE_FLOAT32 = Tile(64, 64, 32, 8, 2)  # no matrix unit multiplies these exactly
GROUP_BYTES = 16 << 20  # size of the hidden states that programs running at the same time share through L2
