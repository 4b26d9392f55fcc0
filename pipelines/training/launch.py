"""How a training is started: alone in this process, in workers of its own, or in a warm group that is already there."""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from pipelines.training.loop import Report, TrainingOrder, TrainingResult, train
from pipelines.training.workers import WorkerGroup, warm_workers
from pipelines.training.world import World


def fit(order: TrainingOrder, *, num_workers: int, report: Report, group: WorkerGroup | None = None) -> TrainingResult:
    """Train to the end, resuming whatever the order's folder holds.

    With a `group` its workers do it. Otherwise `num_workers` new ones; 0 runs in this process, without Ray, with the
    same loop and engine and a process group of one.
    """
    if group is not None:
        return group.run(order, report)
    if num_workers > 0:
        with warm_workers(num_workers) as own:
            return own.run(order, report)
    return _fit_here(order, report)


def _fit_here(order: TrainingOrder, report: Report) -> TrainingResult:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        started = not dist.is_initialized()
        if started:
            store = dist.FileStore(str(Path(folder) / "store"), 1)
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        result = train(order, World(0, 1, device), report)
        # DeepSpeed keeps the default group for the life of the process, so it is not destroyed here.
    if result is None:
        raise RuntimeError("the only rank returned no result")
    return result
