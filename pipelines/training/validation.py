"""The validation of a training: mean metrics over held-out rows, always with the same draws."""

import math

import torch
from torch import Tensor

from pipelines.errors import InputError
from pipelines.training.average import Average
from pipelines.training.batches import RowGroups, to_device, validation_batches
from pipelines.training.engine import Engine
from pipelines.training.objective import Objective
from pipelines.training.options import TrainingOptions
from pipelines.training.order import BatchPlan
from pipelines.training.world import World


class Validation:
    """The validation rows of an objective, if it has any."""

    def __init__(self, objective: Objective, options: TrainingOptions, plan: BatchPlan, world: World) -> None:
        self._objective, self._options, self._plan, self._world = objective, options, plan, world
        data = objective.validation_data
        self._groups = RowGroups(data, objective.columns) if data is not None else None

    def run(self, engine: Engine, average: Average, step: int) -> dict[str, float]:
        """Mean metrics with the averaged weights if there are any, prefixed `val_`; none where there are no rows.

        What is not finite is left out: it must not pass for the best, and JSON has no word for it.

        Raises:
            InputError: the rows do not make one whole batch.
        """
        if self._groups is None:
            return {}
        self._world.average_buffers(engine.trainee)
        engine.train(False)
        sums: dict[str, Tensor] = {}
        count = 0
        batches = validation_batches(
            self._groups,
            self._plan,
            self._world.rank,
            self._options.seed,
            self._objective.collate,
            whole=self._options.batch_size // self._options.accumulation,
        )
        with average.in_place(), torch.no_grad():
            for batch in batches:
                self._world.pulse.at(step, "validation")
                loss, metrics = engine(to_device(batch, self._world.device), self._world.gather)
                count += 1
                sums = {name: sums.get(name, 0.0) + value for name, value in {"loss": loss, **metrics}.items()}
        if count == 0:
            raise InputError(
                f"--batch-size {self._plan.batch_size} leaves no whole validation batch in "
                f"{sum(self._groups.sizes)} rows: lower it, or raise --accumulation"
            )
        means = engine.trainee.summarise(self._world.mean({name: s / count for name, s in sums.items()}))
        return {f"val_{name}": value for name, value in means.items() if math.isfinite(value)}
