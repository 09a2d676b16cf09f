"""Show which backend runs here, check its results, measure the memory of a loss step, or run a small demo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

import torch

from . import __version__

COMMANDS = {  # name: (summary, example)
    "env": ("versions, devices, and which backend runs on each and why", ""),
    "check": (
        "value and gradient errors on your shapes, next to those of eager torch",
        "--shape 2,128,32000 --dtype bfloat16 --divergence forward_kl 'js(beta=0.3)'",
    ),
    "memory": (
        "what a loss step allocates, here and in naive code",
        "--batch 8 --length 1024 --vocab 128256 --dtype bfloat16 --divergence forward_kl",
    ),
    "demo": ("a small DPO training with naive and with fused code, and a picture", "--steps 10 --out demo.png"),
    "hub": ("a folder with this package that the kernels package of Hugging Face loads", "out"),
}


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """Build the parser of all commands.

    Only the given command gets its options, so only its module is imported.
    """
    parser = argparse.ArgumentParser(prog="python -m fused_losses", description=__doc__)
    parser.add_argument("--version", action="version", version=f"fused_losses {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (summary, example) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        sub.epilog = f"example: python -m fused_losses {name} {example}".rstrip()
        if name == command:
            module = import_module(f"{__package__}.cli.{name}")
            module.add_arguments(sub)
            sub.set_defaults(main=module.main)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 for success, 1 if it found an error, 2 for invalid input."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        build_parser(None).print_help()
        return 0
    args = build_parser(argv[0]).parse_args(argv)
    try:
        return args.main(args)
    except (ValueError, TypeError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
