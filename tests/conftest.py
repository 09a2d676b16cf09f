"""Without a GPU the Triton kernels run in Triton's interpreter on CPU tensors; it must be chosen before Triton is imported."""

import json
import os
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

GPU = torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="of the numbers that tests draw (default 0)")


def pytest_configure(config):
    seed = config.getoption("--seed")
    os.environ["FUSED_LOSSES_TEST_SEED"] = str(seed)  # where helpers.seed_of finds it, in other processes too
    if find_spec("hypothesis"):  # not on every machine with a GPU
        import hypothesis.core

        hypothesis.core.global_force_seed = seed
        # what an earlier run found is no part of this one
        hypothesis.settings.register_profile("suite", database=None)
        hypothesis.settings.load_profile("suite")


def pytest_report_header(config):
    return f"seed: {config.getoption('--seed')}"


@pytest.fixture
def device():
    return torch.accelerator.current_accelerator() if GPU else torch.device("cpu")


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch):
    """Every test that takes this runs once on each backend."""
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", request.param)
    return request.param


@pytest.fixture(scope="module")
def one_thread():
    """Tensors are small, and threads that wait for a busy processor slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def static_report(tmp_path_factory):
    """Every kernel compiled for every target, once for all tests: exit code, output and rows of the check."""
    from helpers import python

    path = tmp_path_factory.mktemp("static") / "rows.json"
    done = python("-m", "bench.static", "--check", "--short", "--json", str(path))
    assert path.exists(), done.stderr[-3000:]
    rows = json.loads(path.read_text())["rows"]
    return SimpleNamespace(code=done.returncode, says=done.stdout, rows=rows)


@pytest.fixture(autouse=True)
def seed():
    from helpers import seeded  # not above: it imports Triton

    seeded()


@pytest.fixture
def poison(monkeypatch):
    """torch.empty and friends hand out NaN, so that whatever a kernel leaves unwritten shows."""

    def poisoned(make):
        def wrapped(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(True)

        return wrapped

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
