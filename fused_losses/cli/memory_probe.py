"""Measure the peak memory of a piece of PyTorch code, to the byte.

The result is what the code requested from the allocators, not what the process holds.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd.profiler import profile


def peak_bytes(fn: Callable[[], object]) -> int:
    """Return the largest number of bytes that `fn()` holds at any moment, beyond what is allocated when it starts.

    This counts every tensor, temporary, saved activation, gradient and return value that torch allocates during the call,
    also in custom ops and in backward, whether or not it still exists at the end. It does not count memory of other libraries
    (NumPy arrays, packing buffers inside BLAS) and, on the CPU, of Python threads other than the caller's. Freeing a tensor
    that was allocated before the call does not lower the count on the CPU.

    With CUDA in use this is the larger of the peaks of the host and of the devices: code that works on one side allocates
    little on the other. The call runs under the profiler, so measure its time separately.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler writes to stderr
    gc.collect()  # garbage of the caller must not be freed in the middle of the measurement
    gpus = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
    start = [torch.cuda.memory_allocated(gpu) for gpu in gpus]
    with profile(profile_memory=True) as prof:
        fn()
    device = sum(torch.cuda.max_memory_allocated(gpu) - before for gpu, before in zip(gpus, start, strict=True))
    if prof.kineto_results is None:
        raise RuntimeError("torch's profiler returned no results")
    return max(_host_peak(prof.kineto_results.experimental_event_tree()), device)


def _host_peak(roots: Iterable[Any]) -> int:
    """Replay the CPU allocator's events in order of time and return the peak.

    The profiler's own running total also contains frees of blocks from an earlier profile, so this function matches blocks by
    address.
    """
    events, stack = [], list(roots)
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        if event.name == "[memory]" and event.extra_fields.device.type == "cpu":
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    live: dict[int, int] = {}
    total = peak = 0
    for _, pointer, size in sorted(events, key=lambda event: event[0]):
        if size > 0:
            total += size - live.pop(pointer, 0)
            live[pointer] = size
        else:
            total -= live.pop(pointer, 0)
        peak = max(peak, total)
    return peak
