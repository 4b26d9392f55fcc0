"""Trainings by several gloo processes without Ray: cheap enough to try many worlds in one test."""

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipelines.training.loop import TrainingOrder, train
from pipelines.training.world import World

PATIENCE_S = 300.0
"""Longest time for all orders: there is no launcher here that would notice ranks that wait for each other."""
START_AND_END_S = 120.0
"""What is granted beyond it to the start of the processes and to their end."""


def train_together(orders: list[TrainingOrder], world_size: int, meeting: Path) -> None:
    """Carry out the orders one after another by `world_size` processes; a KeyError of the toy's defect is no failure.

    `meeting` is a file name that does not exist yet.
    """
    start_ranks(_rank, (orders, world_size, str(meeting)), world_size)


def start_ranks(body: Callable[..., None], args: tuple[Any, ...], world_size: int) -> None:
    """Call `body(rank, *args)` in `world_size` new processes and wait for their end.

    Ranks that are not done in five minutes print where each of their threads is and end, which fails the test; so do
    those that hang where they do not watch themselves, in their imports or on their way out.

    Raises:
        TimeoutError: they hung.
    """
    ranks = mp.start_processes(body, args, nprocs=world_size, join=False, start_method="spawn")
    assert isinstance(ranks, mp.ProcessContext)
    limit_s = PATIENCE_S + START_AND_END_S
    end = time.monotonic() + limit_s
    while not ranks.join(timeout=max(0.0, end - time.monotonic())):
        if time.monotonic() < end:
            continue
        processes: list[Any] = ranks.processes
        hung = [process for process in processes if process.is_alive()]
        for process in hung:
            # One after the other, or their lines mingle. It ends those that have not come as far as `one_of_several`.
            os.kill(process.pid, signal.SIGUSR1)
            process.join(1)
        for process in hung:
            process.kill()
            process.join()
        raise TimeoutError(f"processes {[process.pid for process in hung]} did not end within {limit_s:.0f} s")


@contextmanager
def one_of_several(rank: int, world_size: int, meeting: str) -> Iterator[World]:
    """Inside, this process is one rank; at the end it waits for the others. See `start_ranks`."""
    faulthandler.register(signal.SIGUSR1, sys.stderr, all_threads=True)
    faulthandler.dump_traceback_later(PATIENCE_S, exit=True)
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    store = dist.FileStore(meeting, world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    yield World(rank, world_size, torch.device("cpu"))
    dist.barrier()
    faulthandler.cancel_dump_traceback_later()


def _rank(rank: int, orders: list[TrainingOrder], world_size: int, meeting: str) -> None:
    with one_of_several(rank, world_size, meeting) as world:
        for order in orders:
            try:
                train(order, world, lambda step, metrics: None)
            except KeyError:
                continue
