"""A machine that does something else as well: processes that keep processors busy while something is timed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

from bench.lifetime import ends_with


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep so many processors busy inside, each by a process that only counts and that the system may move."""
    command = [sys.executable, "-S", "-c", "print(flush=True)\nwhile True: pass"]
    others = [
        subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=ends_with(os.getpid())) for _ in range(count)
    ]
    try:
        for other in others:
            assert other.stdout is not None
            other.stdout.readline()  # it counts from now on
        yield
    finally:
        for other in others:
            other.kill()
            other.communicate()
