"""The demo and the GPU script run from end to end, small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command, env=None):
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=env)


def test_demo(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("datasets")
    picture = tmp_path / "demo.png"
    done = run(
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

    done = run("bench/gpu.py", "--dry-run", "--skip-tests", "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (written,) = (path for path in tmp_path.rglob("*.json") if not path.name.startswith("hidden-"))
    rows = json.loads(written.read_text())
    assert rows and "commit" in written.read_text()
    if not torch.cuda.is_available():
        assert run("bench/gpu.py").returncode == 2
