"""The report of verify_divergence and verify_loss: what was run, and what is wrong, each finding a sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..backends import BACKENDS, explain


@dataclass
class Report:
    """What was verified, and the findings. It is right if there are none."""

    subject: str
    ran: list[str] = field(default_factory=list)  # what was run, in words
    left_out: list[str] = field(default_factory=list)  # what was not, and why
    where: dict[str, list[str]] = field(
        default_factory=dict
    )  # finding -> the backends on which it was seen, if it has one
    known: set[str] = field(default_factory=set)  # what add_first() has added a finding about

    @property
    def findings(self) -> list[str]:
        """Return the findings, one sentence each."""
        return [f"{text} [{', '.join(seen)}]" if seen else text for text, seen in self.where.items()]

    @property
    def ok(self) -> bool:
        return not self.where

    def add(self, text: str, backend: str = "") -> None:
        """Add a finding, or a backend to a finding that is there."""
        seen = self.where.setdefault(text, [])
        if backend and backend not in seen:
            seen.append(backend)

    def add_first(self, about: str, text: str) -> None:
        """Add a finding about something, unless this method has added one about it: later ones say the same once more."""
        if about not in self.known:
            self.known.add(about)
            self.add(f"{about}: {text}")

    def __str__(self) -> str:
        count = {0: "nothing is wrong", 1: "1 finding"}.get(len(self.where), f"{len(self.where)} findings")
        lines = [f"{self.subject}: {count}"]
        lines += [f"  - {finding}" for finding in self.findings]
        lines += [f"  ran: {', '.join(self.ran)}"] if self.ran else []
        return "\n".join([*lines, *(f"  not run: {why}" for why in self.left_out)])


@contextmanager
def running_on(backend: str) -> Iterator[None]:
    """Make calls run on this backend in the context."""
    before = os.environ.get("FUSED_LOSSES_BACKEND")
    os.environ["FUSED_LOSSES_BACKEND"] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ["FUSED_LOSSES_BACKEND"]
        else:
            os.environ["FUSED_LOSSES_BACKEND"] = before


def backends_here(device: torch.device) -> tuple[list[str], list[str]]:
    """Return the backends that can run on a device, and for each of the others why it cannot."""
    able, left_out = [], []
    for backend in sorted(BACKENDS, key="torch".__ne__):  # torch first: what it says is the easiest to read
        with running_on(backend):
            try:
                explain(device)
            except (RuntimeError, ValueError) as problem:
                hint = "; set TRITON_INTERPRET=1 before Python starts" if "on cpu" in str(problem) else ""
                left_out.append(f"{problem}{hint}")
            else:
                able.append(backend)
    return able, left_out
