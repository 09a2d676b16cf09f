"""Without a GPU the Triton kernels run in Triton's interpreter on CPU tensors; it must be chosen before Triton is imported."""

import getpass
import json
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

# pytest-xdist runs as many processes as there are processors: each takes its share of them, and so does what it starts.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if WORKERS > 1:
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // WORKERS))  # which torch reads as it is imported

# Inductor may take code from its disk that was compiled for vectors of another width, if nothing but this setting differs.
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    folder = f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}_{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)

import pytest  # noqa: E402
import torch  # noqa: E402

GPU = torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    # tests/backends/test_compiled.py tests the compiled backend; elsewhere a large call would compile for seconds
    os.environ.setdefault("FUSED_LOSSES_BACKEND", "torch")


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


@pytest.fixture
def own_backend(device, monkeypatch):
    """The backend that tensors on this machine's device take: for what is plain torch around kernels that other tests run on
    both, of which Triton's interpreter would say the same once more."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch" if device.type == "cpu" else "triton")


@pytest.fixture(scope="module")
def one_thread():
    """Tensors are small, and threads that wait for a busy processor slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def static_report(tmp_path_factory):
    """Every kernel compiled for every target, once for all tests of all processes: exit code, output and rows of the check."""
    from filelock import FileLock
    from helpers import python

    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder  # of the whole run
    rows, report = folder / "static_rows.json", folder / "static_report.json"
    with FileLock(folder / "static.lock"):
        if not report.exists():
            done = python("-m", "bench.static", "--check", "--short", "--json", str(rows))
            assert rows.exists(), done.stderr[-3000:]
            made = {"code": done.returncode, "says": done.stdout, "rows": json.loads(rows.read_text())["rows"]}
            report.write_text(json.dumps(made))
    return SimpleNamespace(**json.loads(report.read_text()))


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


# Files whose tests share what is made once in a process: the compile report, ranks, what the examples say, a wheel. Where
# there are several processes, one of them runs all tests of a group.
GROUPS = {"test_static": "static", "test_costs": "static", "test_examples": "examples", "test_packaging": "packaging"}
GROUPS |= dict.fromkeys(("test_vocab_parallel", "test_sequence_group", "test_engines"), "ranks")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """For --dist loadscope. pytest-xdist's own groups (xdist_group) are lost in pytest 9.2, whose node ids are no strings."""
    if config.getoption("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return GROUPS.get(Path(nodeid.partition("::")[0]).stem, nodeid)

    return Scheduling(config, log)


def interpreted(item):
    """Whether kernels run in Triton's interpreter, a thousand times slower than anything else here."""
    return not GPU and hasattr(item, "callspec") and item.callspec.params.get("backend") == "triton"


def pytest_collection_modifyitems(items):
    """What takes long comes first, so that no process waits for another's last test."""
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if "static_report" in item.fixturenames or interpreted(item):
            item.add_marker("slow")
    first = ["static", "ranks", *GROUPS.values()]  # static takes longest
    groups = {group: first.index(group) for group in first}
    items.sort(
        key=lambda item: (groups.get(GROUPS.get(item.path.stem), len(first)), not item.get_closest_marker("slow"))
    )
