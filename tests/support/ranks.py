"""Functions run on the processes of a gloo group. Starting one costs seconds, so they wait for the next; none is ever taken
down but killed, for gloo's threads may abort while an interpreter leaves, which says nothing about us. They end with the
process that started them, however that ends, and leave nothing on disk."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import seeded
from lifetime import end_with_parent

CONTEXT = mp.get_context("spawn")
GRACE = 5.0  # seconds that the others get once one has failed: they may wait for it for ever


class Ranks:
    """So many processes; run() takes the first few. A failure costs them all: what they are at then, nobody knows."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.alive: list[tuple[Any, Connection]] = []
        self.store: dist.TCPStore | None = None  # where they find each other: on a port that is free

    def run(self, world: int, function: Callable, *args: Any, timeout: float = 120.0) -> None:
        """function(rank, group, *args) on ranks 0 .. world - 1, with this process's FUSED_LOSSES_BACKEND. Raises
        AssertionError with the words of those that failed."""
        task = function, world, args, os.environ.get("FUSED_LOSSES_BACKEND")
        self.start()
        for _, pipe in self.alive[:world]:
            pipe.send(task)
        outcomes, end = dict.fromkeys(range(world), "no answer"), time.monotonic() + timeout
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self.alive[:world])}
        while waiting and (left := end - time.monotonic()) > 0:
            for pipe in wait(list(waiting), left):
                rank = waiting.pop(pipe)  # type: ignore[call-overload]
                outcomes[rank] = self.outcome(rank)
                end = min(end, time.monotonic() + GRACE) if outcomes[rank] else end
        if any(outcomes.values()):
            self.kill()
        words = [f"rank {rank}: {said}" for rank, said in outcomes.items() if said]
        assert not words, "\n".join(words)

    def outcome(self, rank: int) -> str:
        process, pipe = self.alive[rank]
        try:
            return pipe.recv()
        except (EOFError, ConnectionError):
            process.join()
            return f"died without a word, exit code {process.exitcode}"

    def start(self) -> None:
        if all(process.is_alive() for process, _ in self.alive) and self.alive:
            return
        self.kill()
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.size):
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(target=serve, args=(there, rank, self.size, self.store.port), daemon=True)
            process.start()
            there.close()
            self.alive.append((process, here))

    def kill(self) -> None:
        for process, pipe in self.alive:
            process.kill()
            process.join()
            pipe.close()
        self.alive, self.store = [], None


def serve(pipe: Connection, rank: int, size: int, port: int) -> None:
    end_with_parent()
    sys.path.append(str(Path(__file__).parents[2]))  # of the tests' modules; last, for it holds kernels/
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    groups = {world: dist.new_group(list(range(world))) for world in range(1, size)} | {size: dist.group.WORLD}
    while True:
        try:
            function, world, args, backend = pipe.recv()
            os.environ.pop("FUSED_LOSSES_BACKEND", None)
            os.environ |= {} if backend is None else {"FUSED_LOSSES_BACKEND": backend}
            seeded()
            function(rank, groups[world], *args)
            said = ""
        except EOFError:  # nobody is there to ask for more
            os._exit(0)
        except BaseException:
            said = traceback.format_exc()
        pipe.send(said)


FOUR = Ranks(4)


def on_ranks(world: int, function: Callable, *args: Any) -> None:
    """Ranks.run on processes that all tests share."""
    FOUR.run(world, function, *args)
