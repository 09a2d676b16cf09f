"""Time and memory of token_stats against its eager twin, forward and backward, on whatever device there is.

    python bench/against_eager.py [--rows 4096] [--vocab 50304] [--divergence forward_kl] [--dtype float32]

Memory is the peak beyond inputs and gradients; times are medians of interleaved runs, so that their ratio holds on a
noisy machine. The policy asks for a gradient, the reference does not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--divergence", default="forward_kl")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    import fused_losses as fl
    from fused_losses.memory_probe import peak_bytes

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    z = torch.randn(args.rows, args.vocab, device=device).to(getattr(torch, args.dtype)).requires_grad_()
    w = (z.detach() + torch.randn(args.rows, args.vocab, device=device)).to(z.dtype)
    y = torch.randint(0, args.vocab, (args.rows,), device=device)

    def step(namespace) -> None:
        z.grad = None
        stats = namespace.token_stats(z, y, w, divergence=args.divergence)
        (stats.logps.sum() + stats.divergence[args.divergence].sum()).backward()
        if device.type != "cpu":
            torch.accelerator.synchronize()

    providers = {"eager": fl.reference, "fused_losses": fl}
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for turn in range(args.repeat + 1):  # the first is a warm-up
        for name, namespace in providers.items():
            print(f"\rrun {turn + 1}/{args.repeat + 1} {name:<14}", end="", file=sys.stderr, flush=True)
            start = time.perf_counter()
            step(namespace)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    z.grad = None
    gradient = z.numel() * z.element_size()
    memory = {name: peak_bytes(lambda n=namespace: step(n)) - gradient for name, namespace in providers.items()}
    print(file=sys.stderr)
    print(
        f"log-prob, reference log-prob and {args.divergence}, forward + backward, [{args.rows}, {args.vocab}] {args.dtype}, "
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for name in providers:
        mib = memory[name] / 2**20
        print(f"{name:<14} {statistics.median(seconds[name]):8.2f} s {mib:10.1f} MiB beyond inputs and gradient")
    medians = [statistics.median(s) for s in seconds.values()]
    print(f"{'ratio':<14} {medians[0] / medians[1]:8.1f} x {memory['eager'] / memory['fused_losses']:10.1f} x")


if __name__ == "__main__":
    main()
