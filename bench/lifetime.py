"""Processes that end when the one that started them does, however that ends: interrupted, killed, or with os._exit."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import wait

PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # before a fork, after which nothing may be loaded


def ends_with(parent: int, by: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """For subprocess's preexec_fn: Linux sends the new process this signal when this one, `parent`, is gone. Nothing elsewhere.
    SIGTERM is for programs that have processes of their own to end, as torchrun."""

    def ask() -> None:
        if LIBC is not None:
            LIBC.prctl(PR_SET_PDEATHSIG, by)
            if os.getppid() != parent:  # it has ended before we asked
                os._exit(1)

    return ask


def end_with_parent() -> None:
    """In a process of multiprocessing's. The system kills it where it can; elsewhere a thread does, which needs the GIL."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "multiprocessing has not started this process"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which decides
    ends_with(parent.pid)()

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
