"""Trainings as tests run them: by the product's loop here or in two workers, and by a plain loop of torch."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from _pytest.mark.structures import ParameterSet

from models.ema import WeightAverage, exponential_decay
from pipelines.training.batches import BatchSource, RowGroups
from pipelines.training.journal import read_journal
from pipelines.training.launch import fit
from pipelines.training.loop import TrainingOrder, TrainingResult
from pipelines.training.objective import Objective, Trainee
from pipelines.training.options import TrainingOptions
from pipelines.training.order import BatchPlan, GlobalOrder
from pipelines.training.workers import IDLE_CPUS, WorkerGroup, warm_workers
from pipelines.training.world import Report

ROOT = Path(__file__).parents[1]


def slow(*values: object) -> ParameterSet:
    """Parameters of a test that is run with the slow ones."""
    return pytest.param(*values, marks=pytest.mark.slow)


def run_training(
    objective: Objective,
    options: TrainingOptions,
    out: Path,
    *,
    group: WorkerGroup | None = None,
    report: Report = lambda step, metrics: None,
) -> TrainingResult:
    """Train into a folder, which is made if it is not there; in this process where no group is given."""
    out.mkdir(parents=True, exist_ok=True)
    return fit(TrainingOrder(objective, options, str(out)), num_workers=0, report=report, group=group)


def losses_of(out: Path) -> list[float | int | None]:
    """The loss of every step in a training's journal."""
    return [record["loss"] for record in read_journal(out / "metrics.jsonl")]


@contextmanager
def two_workers(max_failures: int) -> Iterator[WorkerGroup]:
    """Two Ray workers that find the tests' objectives."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with warm_workers(2, cpus_per_worker=IDLE_CPUS, max_failures=max_failures) as group:
        yield group


def plain_training(objective: Objective, options: TrainingOptions) -> tuple[list[float], Trainee, WeightAverage]:
    """What a loop of torch alone gives: no DeepSpeed, Ray, autocast, micro batches or checkpoints.

    Returns the losses, the trainee as it ends, and the exponential average (0.9) of its weights.
    """
    trainee = objective.build(torch.device("cpu"))
    groups = RowGroups(objective.training_data, objective.columns)
    source = BatchSource(
        groups=groups,
        order=GlobalOrder(groups.sizes, options.seed),
        plan=BatchPlan(options.batch_size, 1),
        rank=0,
        seed=options.seed,
        collate=objective.collate,
    )
    optimizer = torch.optim.AdamW(
        trainee.parameters(), options.lr, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay
    )
    average = WeightAverage(trainee.parameters())
    losses = []
    for step, batch in enumerate(source.micro_batches(0, options.steps)):
        loss, _ = trainee(batch, lambda tensor: tensor)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainee.parameters(), options.clip or math.inf)
        optimizer.param_groups[0]["lr"] = options.learning_rates()(step)
        optimizer.step()
        average.update(trainee.parameters(), exponential_decay(step + 1, 0.9))
        losses.append(float(loss.detach()))
    return losses, trainee, average
