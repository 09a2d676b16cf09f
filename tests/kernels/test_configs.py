"""Launch configurations and the planner's chunks fit each other."""

import pytest

from fused_losses.engine import planner

pytest.importorskip("triton")


def test_chunks_fit_the_steps_of_kernels():
    from fused_losses.kernels import configs

    chunks = (configs.CHUNK, configs.CHUNK_MORE, configs.CHUNK_TWO_PASS)
    assert all(planner.LANES % config.lanes == 0 for config in chunks)
    assert max(config.step for config in chunks) == planner.STEP
