"""What tests of several processes rest on: a rank which fails is heard of, and none outlives the process that started it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import kill_family
from ranks import Ranks

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")]


def adds(rank, group):
    total = torch.tensor([rank + 1])
    dist.all_reduce(total, group=group)
    assert total == 3 and dist.get_world_size(group) == 2


def breaks(rank, group):
    if rank == 1:
        os._exit(3)
    raise ValueError("on purpose")


def test_failures_are_heard_of():
    ranks = Ranks(2)
    ranks.run(2, adds)
    with pytest.raises(AssertionError) as failure:
        ranks.run(2, breaks)
    assert "rank 0: Traceback" in str(failure.value) and "ValueError: on purpose" in str(failure.value)
    assert "rank 1: died without a word, exit code 3" in str(failure.value)
    assert not ranks.alive


def stuck(rank, group):
    """One waits for the other, which does not answer, and both say so before."""
    dist.barrier(group)
    os.write(1, b"stuck\n")
    if rank == 0:
        dist.all_reduce(torch.ones(1), group=group)
    while True:
        pass


# Two processes of each kind, each of which says "stuck" and then runs for ever.
RANKS = "import ranks, test_ranks; ranks.Ranks(2).run(2, test_ranks.stuck)"
TORCHRUN = """
import helpers
words = "-m torch.distributed.run --standalone --nproc-per-node 2 --no-python sh -c".split()
helpers.python(*words, "echo stuck; exec sleep 600", stdout=None)
"""


def hear_ctrl_c():
    """Which a shell's background jobs, and what they start, ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("code", [RANKS, TORCHRUN], ids=["ranks", "torchrun"])
@pytest.mark.parametrize(("how", "all_of_them"), [("SIGINT", True), ("SIGKILL", False)])
def test_none_outlives_the_process_that_started_it(code, how, all_of_them):
    """Ctrl-C, which a terminal sends to all processes; and what a process does not hear of, as os._exit or SIGKILL."""
    here = Path(__file__).parent
    paths = [here, here.parent / "support", here.parents[1] / "bench", os.environ.get("PYTHONPATH", "")]
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=hear_ctrl_c,
    )
    try:
        assert [parent.stdout.readline() for _ in range(2)] == [b"stuck\n"] * 2
        (os.killpg if all_of_them else os.kill)(parent.pid, getattr(signal, how))
        parent.communicate(timeout=60)  # until nobody is left who could write to the pipe
    finally:
        if parent.returncode is None:
            kill_family(parent.pid)
