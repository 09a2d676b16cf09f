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
    def step(self) -> int:
        return self.lanes * self.unroll

    @property
    def per_thread(self) -> int:
        return self.step // (32 * self.warps)


# Chosen from the machine code for sm_90 (no spills; 8 lanes a thread make 128-bit loads of 2-byte logits); not yet timed.
FORWARD = Config(1024, 8, 4, 2)
FORWARD_MORE = Config(1024, 4, 4, 2)  # half the step: a third exponential, or divergences with entropy or float32
FORWARD_TERM = Config(1024, 4, 4, 2)  # two sweeps for one divergence alone
FORWARD_TWO_PASS = Config(1024, 2, 4, 2)  # and for more: in longer steps they would spill
BACKWARD = Config(1024, 1, 4, 1)
# The same for chunks of a vocabulary, with one warp a row. What a row costs beside its logits (reductions, merging of states:
# 350 to 570 instructions a thread) is done by a quarter of the threads, and what is left of a row after whole steps is less.
CHUNK = Config(256, 8, 1, 2)
CHUNK_MORE = Config(256, 4, 1, 2)
CHUNK_TWO_PASS = Config(256, 2, 1, 2)
PAIRS = Config(1024, 1, 4, 1)
# One warp a row: the search for the largest entry of a block is a reduction, which then needs no shared memory.
TOP = Config(512, 1, 1, 1)
TOP_SLOTS = 16  # the least number of places for the best entries, so that few kernels are compiled


class Tile(NamedTuple):
    rows: int
    columns: int
    depth: int  # hidden dimensions in a step of the matrix product
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Tiles of fused_linear.py, by what a program keeps in registers."""

    one: Tile  # one side
    one_entropy: Tile
    two: Tile  # two sides
    two_softcap: Tile
    two_more: Tile  # two sides and a power, an entropy in addition to divergences, or terms


# They are the largest of those tried that do not spill registers (except with powers, see bench/static.py) in 96 KiB of shared
# memory (AMD: 64 KiB). A tile reads (1 / rows + 1 / columns) of a byte from L2 for each multiplication. Devices that are not
# listed use the tiles of sm_80.
TILES = {
    "sm_80": Tiles(
        one=Tile(128, 128, 32, 8, 4),
        one_entropy=Tile(128, 128, 32, 8, 4),
        two=Tile(64, 128, 32, 8, 4),
        two_softcap=Tile(64, 128, 32, 8, 4),
        two_more=Tile(64, 64, 32, 8, 4),
    ),
    "sm_90": Tiles(
        one=Tile(128, 256, 32, 8, 4),
        one_entropy=Tile(128, 256, 32, 8, 4),
        two=Tile(128, 128, 64, 8, 3),
        two_softcap=Tile(128, 64, 64, 8, 3),
        two_more=Tile(128, 64, 64, 8, 3),
    ),
    "sm_100": Tiles(
        one=Tile(128, 128, 64, 8, 3),
        one_entropy=Tile(128, 128, 64, 8, 3),
        two=Tile(128, 128, 32, 8, 3),
        two_softcap=Tile(128, 128, 32, 8, 3),
        two_more=Tile(128, 64, 64, 8, 3),
    ),
    "hip": Tiles(
        one=Tile(128, 256, 64, 8, 2),
        one_entropy=Tile(128, 256, 64, 8, 2),
        two=Tile(128, 128, 64, 8, 2),
        two_softcap=Tile(128, 128, 64, 8, 2),
        two_more=Tile(128, 64, 64, 8, 2),
    ),
}
# Since its version 3.8 Triton keeps more in registers there: with the tiles above it spills 167 times with an entropy, and 36
# times with two sides.
SINCE_TRITON_3_8 = {
    "sm_90": TILES["sm_90"]._replace(one_entropy=Tile(128, 128, 64, 8, 3), two=Tile(128, 64, 64, 8, 3)),
}
TILE_FLOAT32 = Tile(64, 64, 32, 8, 2)  # no matrix unit multiplies these exactly
GROUP_BYTES = 16 << 20  # size of the hidden states that programs running at the same time share through L2
