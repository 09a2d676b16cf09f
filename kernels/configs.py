"""Launch configurations: fixed, by what a kernel holds per step. Nothing is tuned at run time."""

from typing import NamedTuple


class Config(NamedTuple):
    lanes: int  # vocabulary entries side by side: one accumulator of each kind for every lane
    unroll: int  # of which a step reads this many rows, so that checks made once a step cost little
    warps: int
    stages: int  # steps in flight in the asynchronous loads

    @property
    def per_thread(self) -> int:
        return self.lanes * self.unroll // (32 * self.warps)


# Chosen from the machine code for sm_90 (no spills; 8 lanes a thread make 128-bit loads of 2-byte logits); not yet timed.
FORWARD = Config(1024, 8, 4, 2)
FORWARD_MORE = Config(1024, 4, 4, 2)  # a third exponential or an entropy beside the divergences: half the step
FORWARD_TWO_PASS = Config(1024, 2, 4, 2)
BACKWARD = Config(1024, 1, 4, 1)
PAIRS = Config(1024, 1, 4, 1)
