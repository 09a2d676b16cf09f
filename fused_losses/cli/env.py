"""The command python -m fused_losses env: it prints versions and devices.

For each type of device it also prints the backend that runs there, and why.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import suppress

import torch

from .. import __version__
from ..backends import explain
from ..backends.compiled import COMPILE_FROM, folder

VARIABLES = ("FUSED_LOSSES_BACKEND", "TRITON_INTERPRET")
MEANING = {
    "triton": "the Triton kernels",
    "torch": "plain torch, a few rows at a time, with the kernels' formulas; Triton does not run",
    "compiled": f"loops that torch.compile makes of the formulas, from {COMPILE_FROM:,} logits; else plain torch",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Print versions, devices, and the backend of each device type. Exit code 1 if one has none."
    parser.add_argument("--json", action="store_true", help="print all of it as a JSON object")


def _version(name: str) -> str:
    """Return the version of an optional package, or why it cannot be used.

    The package is imported, because an installed package may be broken.
    """
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        return "not installed" if error.name == name else f"cannot be imported: {error}"
    except Exception as error:  # a broken installation may raise any error, which is printed
        return f"cannot be imported: {error}"
    return f"{module.__version__}, can be imported"


def versions() -> Iterator[tuple[str, str]]:
    kinds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "XPU": torch.version.xpu}
    built = [f"{kind} {version}" for kind, version in kinds.items() if version]
    yield "fused_losses", __version__
    yield "python", platform.python_version()
    yield "torch", f"{torch.__version__} (built for {', '.join(built) or 'the CPU alone'})"
    yield "triton", _version("triton")
    yield "numpy", _version("numpy")
    yield "platform", platform.platform()


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _cpu() -> str:
    words = [platform.machine(), f"{os.cpu_count()} cores", f"capability {torch.backends.cpu.get_cpu_capability()}"]
    with suppress(AttributeError, ValueError, OSError):  # not a POSIX system
        words.append(_gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    return ", ".join(words)


def devices() -> Iterator[tuple[str, str]]:
    """Yield (name, description) of every device that torch can use."""
    yield "cpu", _cpu()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return
    module = torch.get_device_module(accelerator)
    for i in range(torch.accelerator.device_count()):
        if not hasattr(module, "get_device_properties"):  # mps
            yield f"{accelerator.type}:{i}", accelerator.type
            continue
        properties = module.get_device_properties(i)
        words = [properties.name]
        if hasattr(properties, "major"):
            words.append(f"capability {properties.major}.{properties.minor}")
        yield f"{accelerator.type}:{i}", ", ".join([*words, _gib(properties.total_memory)])


def backend_of(device: torch.device) -> tuple[str | None, str]:
    """Return (backend or None, a sentence that says why)."""
    try:
        name, reason = explain(device)
    except (RuntimeError, ValueError) as error:
        return None, f"nothing runs: {error}"
    where = " in Triton's interpreter: slow, for tests" if (name, device.type) == ("triton", "cpu") else ""
    kept = (
        f"\nkept in {folder()}: what it compiles, up to half a minute for each kind of call"
        if name == "compiled"
        else ""
    )
    return name, f"{name} backend: {MEANING[name]}{where}\nwhy: {reason}{kept}"


def _print(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows) + 2
    for name, text in rows:
        print(f"{name:<{width}}{text}".replace("\n", "\n" + " " * width))
    print()


def main(args: argparse.Namespace) -> int:
    numbers, settings = dict(versions()), {name: os.environ.get(name) for name in VARIABLES}
    found = dict(devices())
    backends = {kind: backend_of(torch.device(kind)) for kind in dict.fromkeys(name.split(":")[0] for name in found)}
    if args.json:
        named = {kind: {"backend": name, "explanation": text} for kind, (name, text) in backends.items()}
        print(json.dumps({"versions": numbers, "environment": settings, "devices": found, "backends": named}, indent=2))
    else:
        _print(list(numbers.items()))
        _print([(name, value or "not set") for name, value in settings.items()])
        _print(list(found.items()))
        _print([(f"{kind} tensors", sentence) for kind, (_, sentence) in backends.items()])
    return 1 if None in [name for name, _ in backends.values()] else 0
