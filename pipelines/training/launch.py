"""How a training is started: alone in this process, in workers of its own, or in a warm group that is already there."""

import os

import torch.distributed as dist

from pipelines.devices import own_device
from pipelines.training.loop import TrainingOrder, TrainingResult, train
from pipelines.training.worker_range import NumWorkers, WorkerRange
from pipelines.training.workers import WorkerGroup, warm_workers
from pipelines.training.world import Report, World


def fit(
    order: TrainingOrder,
    *,
    num_workers: NumWorkers,
    report: Report,
    gpus_per_worker: int | None = None,
    group: WorkerGroup | None = None,
) -> TrainingResult:
    """Train to the end, resuming whatever the order's folder holds.

    With a `group` its workers do it. Otherwise `num_workers` new ones, a number or a range as "2:8"; 0 runs in this
    process, without Ray, with the same loop and engine and a process group of one.
    """
    if group is not None:
        return group.run(order, report)
    if WorkerRange.of(num_workers).most > 0:
        with warm_workers(num_workers, gpus_per_worker=gpus_per_worker) as own:
            return own.run(order, report)
    return _fit_here(order, report)


def _fit_here(order: TrainingOrder, report: Report) -> TrainingResult:
    device = own_device()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it.
    if not dist.is_initialized():
        # DeepSpeed keeps the default group for the life of the process, so it is never destroyed here.
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    result = train(order, World(0, 1, device), report)
    if result is None:
        raise RuntimeError("the only rank returned no result")
    return result
