"""Packaging metadata; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "fused_losses/__init__.py").read_text("utf-8"), re.M)[1]

DEMO = ["transformers", "datasets", "tokenizers", "matplotlib", "tqdm"]
TRAINER = ["transformers==5.23.*", "accelerate"]  # of integrations/trainer.py
TRL = ["trl==1.16.*", "peft", *TRAINER]  # of integrations/trl_*.py, which override what is private there
PEERS = ["trl==1.16.0", "liger-kernel==0.8.5"]  # exactly: tests/test_against_*.py call what is private there
BENCH = [*PEERS, "cut-cross-entropy==25.1.1", "transformers", "datasets", "matplotlib", "pytest", "pytest-benchmark"]
TEST = [
    "hypothesis",
    "kernels==0.17.*",
    "psutil",
    "pytest-xdist>=3.8",
    "setuptools>=77.0.3",
    "wheel",
    *TRL,
    *DEMO,
    *BENCH,
]
LINT = ["ruff", "mypy"]
DOCS = ["mkdocs-material", "mkdocstrings[python]"]

setup(
    name="fused_losses",
    version=VERSION,
    description="Fused Triton kernels and PyTorch wrappers for preference-optimisation losses",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license_expression="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    install_requires=["torch>=2.11", "numpy", 'triton>=3.6; platform_system == "Linux"'],
    extras_require={
        "transformers": TRAINER,
        "trl": TRL,
        "demo": DEMO,
        "peers": PEERS,
        "bench": BENCH,
        "test": TEST,
        "lint": LINT,
        "docs": DOCS,
        "dev": TEST + LINT + DOCS,
    },
    # verl and Axolotl load these in every run; they do nothing without FUSED_LOSSES_VERL=1, or their line in Axolotl's config.
    entry_points={
        "verl.plugins": ["fused_losses = fused_losses.integrations.verl:plugin"],
        "axolotl.plugins": ["fused-losses = fused_losses.integrations.axolotl:FusedLossesPlugin"],
    },
    # kernels/ is a folder of its own in the repository and fused_losses.kernels everywhere else. The symlink
    # fused_losses/kernels makes that true in a checkout too; without an __init__.py in kernels/, `import kernels`
    # from the repository root still finds the unrelated package of that name.
    packages=[*find_packages(include=["fused_losses", "fused_losses.*"]), "fused_losses.kernels"],
    package_dir={"fused_losses.kernels": "kernels"},
    package_data={"fused_losses": ["py.typed", "cli/data/*.jsonl"]},
    zip_safe=False,
)
