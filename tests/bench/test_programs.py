"""The demo and the GPU script run from end to end, small."""

import json
import os
import sys
from pathlib import Path

import pytest
from helpers import python

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def test_demo(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("datasets")
    picture = tmp_path / "demo.png"
    done = python(
        "-m",
        "fused_losses",
        "demo",
        "--steps",
        "3",
        "--f-steps",
        "2",
        "--vocab",
        "3000",
        "--workspace",
        "4M",
        "--out",
        str(picture),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "largest difference" in done.stdout and "from hidden: plan '" in done.stdout
    (peaks,) = (line.split()[-3:] for line in done.stdout.splitlines() if line.startswith("peak memory of the loss"))
    naive, from_logits, from_hidden = map(int, peaks)
    assert naive > from_logits > from_hidden > 0
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_gpu_script_without_a_gpu(tmp_path):
    """One of its tests fails, which is said at the end; every step that there is on a GPU runs."""
    import torch

    wrong = tmp_path / "test_wrong.py"
    wrong.write_text("def test_right():\n    pass\n\n\ndef test_wrong():\n    assert 1 + 1 == 3\n")
    env = os.environ | {"OUT": str(tmp_path)}
    options = ["--seconds", "1800", "--grid", "tiny", "--providers", "eager", "fused*", "--tests", str(wrong)]
    done = python("bench/gpu.py", "--dry-run", *options, env=env)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "cpu" / "tiny.json").read_text())
    assert report["benchmarks"] and report["commit_info"]["id"]
    summary = done.stdout[done.stdout.index("\nsummary") :].splitlines()
    steps = {line.split(":")[0].strip(): line for line in summary[2:]}
    assert set(steps) == {"tests", "bench", "ncu", "targets", "training", "tune"}
    assert "tests: FAILED, exit code 1 (1 failed, 1 passed)" in done.stdout and done.stdout.count(": FAILED") == 1
    assert all(line.endswith(": passed") for name, line in steps.items() if name != "tests"), steps
    assert {b["params"]["vocab"] for b in report["benchmarks"]} == {517}
    assert "| not measured |" in (tmp_path / "cpu" / "targets.txt").read_text()
    if not torch.cuda.is_available():
        assert python("bench/gpu.py").returncode == 2
        assert python("-m", "bench", "tune").returncode == 2


def test_what_the_gpu_script_says_of_a_step(tmp_path, capsys):
    """Its exit code is that of the worst step."""
    sys.path.append(str(ROOT))  # last: it holds kernels/
    from bench import gpu

    steps = gpu.Steps(tmp_path, 60.0)
    steps.run(gpu.Command("good", ["-c", "print('3 passed, 1 skipped')"], 50.0))
    assert steps.lines == ["good: passed (3 passed, 1 skipped)"] and not steps.failed
    steps.run(gpu.Command("may fail", ["-c", "raise SystemExit(3)"], 50.0, fatal=False))
    assert steps.lines[1:] == ["may fail: FAILED, exit code 3"] and not steps.failed
    steps.run(gpu.Command("bad", ["-c", "raise SystemExit(3)"], 50.0))
    assert steps.failed and "3 passed" in capsys.readouterr().out


def test_host_time_without_a_gpu():
    """Triton's launch path runs up to the kernel: two launches of the loss, and two of its gradient."""
    pytest.importorskip("triton")
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FUSED_LOSSES_BACKEND")}
    done = python("-m", "bench", "host", "--rounds", "3", env=clean)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {line[:52].strip(): line[52:].split() for line in done.stdout.splitlines()[1:]}
    assert rows["plain launch"][1:] == ["1.0", "1", "0"]
    assert rows["dpo_loss from logits, forward + backward"][2] == "4"
    assert float(rows["dpo_loss from logits, forward + backward"][1]) > 4
