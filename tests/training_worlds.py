"""Trainings by several gloo processes without Ray: cheap enough to try many worlds in one test."""

import faulthandler
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipelines.training.loop import TrainingOrder, train
from pipelines.training.world import World

PATIENCE_S = 300.0
"""Longest time for all orders: there is no launcher here that would notice ranks that wait for each other."""


def train_together(orders: list[TrainingOrder], world_size: int, meeting: Path) -> None:
    """Carry out the orders one after another by `world_size` processes; a KeyError of the toy's defect is no failure.

    `meeting` is a file name that does not exist yet. Ranks that are not done in five minutes print where each of their
    threads is and end, which fails the test.
    """
    mp.start_processes(_rank, (orders, world_size, str(meeting)), nprocs=world_size, start_method="spawn")


@contextmanager
def one_of_several(rank: int, world_size: int, meeting: str) -> Iterator[World]:
    """Inside, this process is one rank; at the end it waits for the others. See `train_together`."""
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
