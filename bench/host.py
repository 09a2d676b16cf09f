"""python -m bench host: the processor's time of a call on a GPU, in launches of a plain Triton kernel; no GPU is needed.

Triton's own launch path runs up to the compiled kernel: arguments are bound and specialised, the key is looked up, the
launcher is called. In place of the kernel stands one that does nothing, and torch's operations work on tiny tensors of the
CPU. A GPU adds the driver's own time to every launch, the plain one included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

from bench import clock, machine_code

RESULT = Path(__file__).resolve().parent / "results" / "host.json"
TARGET = "dpo_loss from logits, forward + backward"
NO_WORK = ("view", "detach", "alias", "as_strided", "empty", "slice", "select", "squeeze", "t.default", "transpose", "expand",
           "unbind", "split", "permute", "reshape")  # fmt: skip


@triton.jit
def _plain(X, Y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i, mask=i < n), mask=i < n)


class _Operations(TorchDispatchMode):
    """Counts torch's operations that would be kernels on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(func)
        self.count += not name.startswith("fused_losses") and not any(word in name for word in NO_WORK)
        return func(*args, **(kwargs or {}))


def calls() -> dict[str, Callable[[], object]]:
    """Return what is timed; the first is the unit."""
    import fused_losses as fl

    b, t, vocab, width = 4, 16, 64, 32
    x, y = torch.zeros(64), torch.zeros(64)
    z = torch.randn(b, t, vocab, dtype=torch.bfloat16, requires_grad=True)
    h = torch.randn(b, t, width, dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(vocab, width, dtype=torch.bfloat16, requires_grad=True)
    ref, ref_h = torch.randn_like(z), torch.randn_like(h)
    labels = torch.randint(0, vocab, (b, t))
    labels[:, -2:] = -100

    def forward() -> None:
        fl.token_stats(z.detach(), labels, shift=False)

    def divergence() -> None:
        stats = fl.token_stats(z, labels, ref, divergence="reverse_kl", shift=False)
        stats.divergence["reverse_kl"].sum().backward()

    def dpo(policy: object, reference: object, module: object = fl) -> Callable[[], None]:
        return lambda: module.dpo_loss(policy, labels, reference, shift=True).loss.backward()  # type: ignore[attr-defined]

    return {
        "plain launch": lambda: _plain[(1,)](x, y, 64, BLOCK=64),
        "token_stats, log-probs, forward": forward,
        "token_stats, reverse KL, forward + backward": divergence,
        TARGET: dpo(z, ref),
        "dpo_loss from hidden states, forward + backward": dpo(fl.Hidden(h, head), fl.Hidden(ref_h, head.detach())),
        f"eager {TARGET}": dpo(z, ref, fl.reference),
    }


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Return microseconds, plain launches, launches of ours and operations of torch of each call, all calls in turn."""
    timed, found = calls(), {}
    with machine_code.launching("sm_90") as launched:
        for name, call in timed.items():
            for _ in range(5):
                call()
            launched.clear()
            with _Operations() as operations:
                call()
            found[name] = {"launches": len(launched), "operations": operations.count}
        times: dict[str, list[float]] = {name: [] for name in timed}
        for _ in range(rounds):
            for name, call in timed.items():
                start = time.process_time()
                call()
                times[name].append(time.process_time() - start)
    unit = statistics.median(next(iter(times.values())))
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        found[name] |= {"us": round(middle * 1e6, 1), "plain_launches": round(middle / unit, 1)}
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench host", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.relative_to(clock.ROOT)}")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    from fused_losses import backends

    with mock.patch.object(backends, "TRITON_DEVICES", (*backends.TRITON_DEVICES, "cpu")):
        found = measure(args.rounds)
    print(f"{'':<52}{'us':>8}{'plain launches':>16}{'launches':>10}{'operations of torch':>21}")
    for name, row in found.items():
        print(f"{name:<52}{row['us']:>8.1f}{row['plain_launches']:>16.1f}{row['launches']:>10}{row['operations']:>21}")
    if args.save:
        about = {"machine_info": clock.machine_info(torch.device("cpu")), "commit_info": clock.commit_info()}
        RESULT.write_text(json.dumps(about | {"calls": found}, indent=1) + "\n", "utf-8")
    return 0
