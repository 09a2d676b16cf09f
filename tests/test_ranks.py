"""What tests of several processes rest on: that a rank which fails is heard of."""

import os

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


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
