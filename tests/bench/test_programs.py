"""The demo and the GPU script run from end to end, small."""

import json
import os
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
    import torch

    env = os.environ | {"OUT": str(tmp_path)}
    done = python("bench/gpu.py", "--dry-run", "--tests", "tests/docs/test_readme.py -k tree", env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "cpu" / "tiny.json").read_text())
    assert report["benchmarks"] and report["commit_info"]["id"]
    summary = done.stdout[done.stdout.index("\nsummary") :].splitlines()
    assert {line.split(":")[0].strip() for line in summary[2:]} == {"tests", "bench", "targets"}
    assert "tests: passed (1 passed)" in done.stdout and "FAILED" not in done.stdout
    assert "| not measured |" in (tmp_path / "cpu" / "targets.txt").read_text()
    if not torch.cuda.is_available():
        assert python("bench/gpu.py").returncode == 2
        assert python("-m", "bench", "tune").returncode == 2


def test_a_test_that_fails_on_the_gpu_is_reported(tmp_path):
    wrong = tmp_path / "test_wrong.py"
    wrong.write_text("def test_wrong():\n    assert 1 + 1 == 3\n")
    env = os.environ | {"OUT": str(tmp_path)}
    command = ("bench/gpu.py", "--dry-run", "--tests", str(wrong), "--seconds", "30", "--grid", "tiny")
    done = python(*command, env=env)
    assert done.returncode == 1 and "tests: FAILED, exit code 1 (1 failed)" in done.stdout
