"""python -m fused_losses hub: write this package as a folder that the `kernels` package of Hugging Face loads.

    from kernels import get_local_kernel
    fl = get_local_kernel(Path("OUT"))      # the functions of fused_losses; nothing else has to be installed but torch

LOCAL_KERNELS="owner/name=OUT" puts the folder in place of a repository of the Hub. The copy has a name of its own, and so have
its operators: an installed fused_losses beside it stays as it is. It has no commands and no integrations.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
PARTS = ("core", "kernels", "backends", "engine", "losses", "nn", "reference")
FILES = ("__init__.py", "integrations/__init__.py", "integrations/trl_functions.py")
LAYERS = "\nfrom .nn import hub_layers as layers  # noqa: E402\n"
VARIANT = "build/torch-universal"
VERSION = 0  # of the Hub: not stable yet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="the folder to write; it must not exist yet")


def main(args: argparse.Namespace) -> int:
    """Write the folder, and print what loads it."""
    name = write(args.out)
    print(f"{args.out}: {name}\nfrom kernels import get_local_kernel; fl = get_local_kernel(Path({str(args.out)!r}))")
    return 0


def write(out: Path) -> str:
    """Write the folder `out` and return the id of the copy, which is the name of its module and of its operators.

    Raises:
        ValueError: If the folder exists.
    """
    if out.exists():
        raise ValueError(f"out: expected the path of a folder to make, {out} exists")
    target = out / VARIANT
    for part in PARTS:
        shutil.copytree(PACKAGE / part, target / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACKAGE / file, target / file)
    with (target / "__init__.py").open("a", encoding="utf-8") as start:
        start.write(LAYERS)
    files = {
        path.relative_to(target).as_posix(): path.read_bytes() for path in sorted(target.rglob("*")) if path.is_file()
    }
    hashes = {name: hashlib.sha256(content).digest() for name, content in files.items()}
    own = hashlib.sha256(b"".join(hashes.values())).hexdigest()[:8]
    metadata = {
        "id": f"fused_losses_{own}",
        "name": "fused-losses",
        "version": VERSION,
        "license": "MIT",
        "python-depends": [],
        "backend": {"type": "cuda"},
        "digest": {"algorithm": "sha256", "files": {n: base64.b64encode(h).decode() for n, h in hashes.items()}},
    }
    (target / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return str(metadata["id"])
