"""The same workloads for those who live in pytest-benchmark: pytest bench --benchmark-only [-k "dpo and fused"].

Small shapes, forward and backward of one provider at a time, each right before it is timed. python -m bench is the better
comparison: it interleaves the providers, and knows memory and limits.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench.measure import Run, gate, memory, truth_of
from bench.providers import providers
from bench.workloads import WORKLOADS, Problem, Shape

FROM_HIDDEN, FROM_LOGITS = Shape(256, 32, 64, 4096), Shape(256, 32, 0, 4096)
DEVICE = torch.device("cpu") if not torch.cuda.is_available() else torch.device("cuda")
CASES = [(w, p) for w in WORKLOADS for p in providers() if not p.compiled and not p.why_not(w, DEVICE)]


@pytest.mark.parametrize(("w", "provider"), [pytest.param(w, p, id=f"{w.name}-{p.name}") for w, p in CASES])
def test_step(benchmark, w, provider):
    problem = Problem.random(FROM_HIDDEN if w.hidden else FROM_LOGITS, DEVICE, w.frozen)
    run = Run(provider, w)
    benchmark.group = w.name
    benchmark.extra_info |= {"provider": provider.name, "error": gate(w, run, problem, truth_of(w, problem))}
    benchmark.extra_info["peak_bytes"] = memory(run, problem) - sum(x.nbytes for x in problem.leaves)

    def step():
        run.step(problem)
        if DEVICE.type != "cpu":
            torch.accelerator.synchronize()

    benchmark(step)
