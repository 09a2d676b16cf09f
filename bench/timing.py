"""Times and memory of work on a device, the copy bandwidth that they are judged by, and the report that they go into.

Without a GPU the same functions read the clock and know of no memory, so that a benchmark can be tried anywhere.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

DIRECTIONS = ("forward", "backward")
MIN_REPEATS, MAX_REPEATS = 10, 100


class Timing(NamedTuple):
    """Milliseconds of one call on the device; of the host to queue one, with its preparation; over so many calls."""

    median: float
    p20: float
    p80: float
    host: float
    repeats: int


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """The result of one call and how long it took, compilation included."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return result, time.perf_counter() - start


def timed(
    device: torch.device, run: Callable[..., Any], prepare: Callable[[], Any] | None = None, seconds: float = 0.3
) -> Timing:
    """Times run(), or run(prepare()) without the prepare(), for about so many seconds.

    All calls are queued before any is waited for, so a kernel that takes longer than its launch is timed without it.
    """

    def arguments() -> tuple[Any, ...]:
        return () if prepare is None else (prepare(),)

    if device.type != "cuda":
        times = []
        for _ in range(3):
            given = arguments()
            times.append(1e3 * seconds_of(lambda given=given: run(*given), device)[1])
        return _timing(times, median(times))

    run(*arguments())
    once = seconds_of(lambda: run(*arguments()), device)[1]
    repeats = int(min(MAX_REPEATS, max(MIN_REPEATS, seconds / once)))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for _ in range(2):  # a queue builds up: from here on the device need not wait for the host
        run(*arguments())
    host = time.perf_counter()
    for start, end in events:
        given = arguments()
        start.record()
        run(*given)
        end.record()
        del given  # the next call needs the memory that it holds
    host = time.perf_counter() - host
    torch.cuda.synchronize(device)
    return _timing([start.elapsed_time(end) for start, end in events], 1e3 * host / repeats)


def _timing(times: list[float], host: float) -> Timing:
    fifths = quantiles(times, n=5, method="inclusive")
    return Timing(median(times), fifths[0], fifths[3], host, len(times))


def copy_bandwidth(device: torch.device, size: int) -> float:
    """GB/s of a copy of so many bytes within the device's memory: bytes read plus bytes written."""
    release_memory(device)
    # Random, not zeros: constant data can move faster.
    source = torch.randint(-(2**31), 2**31 - 1, (size // 4,), device=device, dtype=torch.int32)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(device, lambda: target.copy_(source)).median / 1e6


class PeakMemory:
    """bytes(): the most that was allocated at once since this was made, beyond what was allocated then."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)

    def bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) - self.before if self.device.type == "cuda" else None


def release_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def rows_that_fit(device: torch.device, row_bytes: int, most: int) -> int:
    """How many rows, at most so many and in whole 16s, fit in most of the free memory."""
    if device.type != "cuda":
        return most
    release_memory(device)
    return min(most, int(0.8 * torch.cuda.mem_get_info(device)[0]) // row_bytes // 16 * 16)


def told(root: Path, *command: str) -> str:
    """The first line that a command prints, or "unknown"."""
    with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.split("\n")[0].strip() or "unknown"
    return "unknown"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for name in ("triton", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


class Report:
    """Progress on the screen, one row for each measurement, and the file, written anew with every row."""

    def __init__(self, root: Path, device: torch.device, folders: Sequence[str | Path], seconds: float, **header: Any):
        self.start, self.seconds = time.monotonic(), seconds
        now = datetime.now(UTC)
        properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
        name = properties.name if properties else "cpu"
        self.header: dict[str, Any] = {
            "device": name,
            "multiprocessors": properties and properties.multi_processor_count,
            "memory_bytes": properties and properties.total_memory,
            "driver": told(root, "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "date": now.isoformat(timespec="seconds"),
            "commit": told(root, "git", "--no-optional-locks", "describe", "--always", "--dirty", "--exclude=*"),
            "versions": versions(),
            **header,
        }
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        self.paths = [Path(f, slug, f"{now:%Y-%m-%dT%H%M}-{self.header['commit']}.json") for f in folders]
        self.say(f"{name}, driver {self.header['driver']}, commit {self.header['commit']}")
        self.say(", ".join(f"{package} {version}" for package, version in self.header["versions"].items()))

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:5.0f} s] {text}", flush=True)

    def out_of_time(self, what: str) -> bool:
        """Whether `what` must be left out; says and remembers it."""
        out = time.monotonic() - self.start > self.seconds
        if out:
            self.left_out.append(what)
            self.say(f"no time left: {what}")
        return out

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        names = row["provider"], row["workload"], row["direction"], f"{row['rows']}x{row['vocab']}", row["dtype"]
        text = "{:<12} {:<20} {:<8} {:<11} {:<8} ".format(*names)
        if row["failed"]:
            self.say(f"{text}FAILED: {row['failed']}")
        else:
            spread = f"({row['ms_p20']:.3f}-{row['ms_p80']:.3f})"
            self.say(f"{text}{row['ms']:8.3f} ms {spread:<15} fraction {row['fraction']:.3f} error {row['error']:.1e}")
        self.save()

    def save(self) -> None:
        end = {"seconds": time.monotonic() - self.start, "left_out": self.left_out, "rows": self.rows}
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.header | end, indent=1) + "\n")

    def print_table(self, providers: Sequence[str]) -> None:
        print(f"\n{self.header['device']}, copy {self.header['copy_gb_s']:.4g} GB/s, commit {self.header['commit']}")
        columns = "{:<12} {:<20} {:<11} {:<8} {:>18} {:>18} {:>8} {:>7}"
        print(columns.format("", "", "", "", *DIRECTIONS, "error", "peak"))
        lines: dict[tuple[str, ...], dict[str, Any]] = {}
        for row in self.rows:
            key = (row["provider"], row["workload"], f"{row['rows']}x{row['vocab']}", row["dtype"])
            lines.setdefault(key, {})[row["direction"]] = row
        for key, row in lines.items():
            if key[0] not in providers:
                continue
            if failed := next((r["failed"] for r in row.values() if r["failed"]), None):
                print("{:<12} {:<20} {:<11} {:<8}".format(*key), f"FAILED: {failed[:90]}")
                continue
            times = [f"{row[d]['ms']:.3f} ms  {row[d]['fraction']:.3f}" for d in DIRECTIONS]
            error, peak = max(r["error"] for r in row.values()), row["forward"]["peak_bytes"]
            print(columns.format(*key, *times, f"{error:.1e}", "-" if peak is None else f"{peak / 2**20:.0f}"))
        print("Median ms and fraction of the copy bandwidth, on compulsory bytes; peak in MiB beyond the logits.")
        for what in self.left_out:
            print(f"no time left: {what}")
        for path in self.paths:
            print(path)
