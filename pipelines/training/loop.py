"""The one training loop: restore, then batch -> loss -> backward -> step, with validation and checkpoints between.

It is what every rank of a Ray Train worker group runs, and what runs alone in process with one rank. A step that is
interrupted anywhere is done again from the newest complete checkpoint with the same samples and the same draws, so
the journal of an interrupted run equals that of an uninterrupted one.
"""

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.ema import WeightAverage, exponential_decay, gamma_of_width, power_decay
from models.weights import load_weights, save_weights
from pipelines.errors import EnvironmentFailed, InputError
from pipelines.training import checkpoints
from pipelines.training.batches import SAMPLE_ROWS, BatchSource, Prefetched, RowGroups, validation_batches
from pipelines.training.engine import Engine, StepOutcome
from pipelines.training.flops import count_flops
from pipelines.training.gpus import peak_flops
from pipelines.training.journal import Journal
from pipelines.training.objective import Batch, Objective
from pipelines.training.options import TrainingOptions
from pipelines.training.order import BatchPlan, GlobalOrder
from pipelines.training.timing import StepClock, StepCost, StepMeter
from pipelines.training.world import Report, World

CHECKPOINTS = "checkpoints"
JOURNAL = "metrics.jsonl"
STATE = "training.json"
AVERAGE = "average.safetensors"
FIRST_ALARM = "first alarm"
DISK_FAULT = "PytorchStreamWriter"
"""What torch's own RuntimeError says when a file cannot be written to its end."""


@dataclass(frozen=True)
class TrainingOrder:
    """One training to be done: everything a worker needs, picklable."""

    objective: Objective
    options: TrainingOptions
    out: str
    """Folder on storage that all workers see."""

    def run(self, world: World, report: Report) -> "TrainingResult | None":
        """Train to the end from wherever the folder is; see `pipelines.training.workers.Order`."""
        return train(self, world, report)


@dataclass(frozen=True)
class TrainingResult:
    """What the launcher gets back from rank 0."""

    steps: int
    skipped_steps: int
    files: list[str]
    """What was exported, names inside the folder."""
    metrics: dict[str, float]
    """Of the last validation and of the export."""
    stopped: str | None
    """Why it ended before its last step (an alarm under strict guards); None if it did not."""
    notes: list[str]
    """Broken checkpoints that were passed over, alarms."""


@dataclass
class Progress:
    """What a checkpoint remembers besides weights and optimizer."""

    step: int = 0
    samples: int = 0
    skipped_steps: int = 0
    bad_run: int = 0
    """Skipped steps in a row, up to now."""
    num_average_updates: int = 0
    last_validation: dict[str, float] = field(default_factory=dict)
    stopped: str | None = None
    notes: list[str] = field(default_factory=list)
    watch: dict[str, float] = field(default_factory=dict)


def train(order: TrainingOrder, world: World, report: Report) -> TrainingResult | None:
    """Train to the end from wherever the folder is; the result on rank 0, None on the others.

    Raises:
        InputError: the options do not fit the data or the number of workers, or a checkpoint this run cannot use.
        EnvironmentFailed: too many steps in a row were not finite.
    """
    run = _Run(order, world, report)
    try:
        run.restore()
        run.steps()
        return run.finish()
    finally:
        run.close()


class _Run:
    def __init__(self, order: TrainingOrder, world: World, report: Report) -> None:
        self.order, self.world, self.report = order, world, report
        self.objective, self.options = order.objective, order.options
        self.root = Path(order.out) / CHECKPOINTS
        self.progress = Progress()
        self.learning_rate = self.options.learning_rates()
        self.plan = BatchPlan(self.options.batch_size, world.size, self.options.accumulation)
        self.groups = RowGroups(self.objective.training_data, self.objective.columns)
        self.validation_groups = (
            RowGroups(self.objective.validation_data, self.objective.columns)
            if self.objective.validation_data is not None
            else None
        )
        self.source = BatchSource(
            groups=self.groups,
            order=GlobalOrder(self.groups.sizes, self.options.seed),
            plan=self.plan,
            rank=world.rank,
            seed=self.options.seed,
            collate=self.objective.collate,
        )
        trainee = self.objective.build(world.device)
        self.peak_flops, self.sample_flops = self._device_peak(), None
        if self.peak_flops is not None:
            # Before the engine deals the weights out to the workers.
            counted = count_flops(trainee, self._to_device(self.source.sample()))
            self.sample_flops = None if counted is None else counted // SAMPLE_ROWS
        self.engine = Engine(trainee, self.options, self.plan, world)
        self.clock = StepClock(world.device)
        with self.engine.whole_weights(trained_alone=True):
            self.average = WeightAverage(self.engine.trainable) if self._averages() else None
        self.journal: Journal | None = None
        self.prefetched: Prefetched | None = None

    def restore(self) -> None:
        """Continue from the newest complete checkpoint, agreed on by all ranks; rank 0 cuts the journal back to it."""
        found, skipped = self.world.share(checkpoints.newest_complete(self.root) if self.world.is_main else (None, []))
        if found is not None:
            self._load(found)
        notes = [f"checkpoint {broken.name} passed over: {broken.reason}" for broken in skipped]
        if self.objective.probe_every and not self._probes():
            notes.append("gradients are not probed under ZeRO-3")
        self.progress.notes.extend(note for note in notes if note not in self.progress.notes)
        if self.world.is_main:
            self.journal = Journal(Path(self.order.out) / JOURNAL, self.progress.step)

    def steps(self) -> None:
        """Take the remaining steps."""
        first = self.progress.step
        self.prefetched = Prefetched(self.source.micro_batches(first, self.options.steps))
        batches = iter(self.prefetched)
        meter = StepMeter(
            batch_size=self.options.batch_size,
            world_size=self.world.size,
            first_step=first,
            total_steps=self.options.steps,
        )
        for step in range(first, self.options.steps):
            if self.progress.stopped is not None:
                break
            started = time.perf_counter()
            probing = self._probes() and (step + 1) % self.objective.probe_every == 0
            metrics, outcome = self._step(step, batches, probing)
            self._count(step, outcome)
            metrics |= {
                "learning_rate": self.learning_rate(step),
                "grad_norm": outcome.grad_norm,
                "skipped": float(not outcome.applied),
            }
            cost = StepCost(
                sample_bytes=self.groups.row_bytes, sample_flops=self.sample_flops, peak_flops=self.peak_flops
            )
            metrics |= meter.metrics(step, time.perf_counter() - started, self.clock.end_step(), cost)
            self._watch(metrics)
            if self._due(self.options.validate_every):
                metrics |= self._validate()
            if self.journal is not None:
                self.journal.append(self.progress.step, metrics)
                self.report(self.progress.step, metrics)
            if self._due(self.options.checkpoint_every):
                self._checkpoint()

    def finish(self) -> TrainingResult | None:
        """Export what the next stage loads, from the averaged weights if there are any; rank 0 returns the result."""
        self.world.average_buffers(self.engine.trainee)
        with self._averaged_weights():
            if not self.world.is_main:
                return None
            self.engine.train(False)
            exported = self.objective.export(self.engine.trainee, Path(self.order.out))
        progress = self.progress
        return TrainingResult(
            steps=progress.step,
            skipped_steps=progress.skipped_steps,
            files=exported.files,
            metrics={**progress.last_validation, **exported.metrics},
            stopped=progress.stopped,
            notes=progress.notes,
        )

    def close(self) -> None:
        """Stop the reader, close the journal, free the engine."""
        if self.prefetched is not None:
            self.prefetched.close()
        if self.journal is not None:
            self.journal.close()
        self.engine.close()

    def _step(self, step: int, batches: Iterator[Batch], probing: bool) -> tuple[dict[str, float], StepOutcome]:
        torch.manual_seed(_step_seed(self.options.seed, step, self.world.rank))
        self.engine.train(True)
        totals: dict[str, Tensor] = {}
        probed: dict[str, float] = {}
        outcome: StepOutcome | None = None
        for micro in range(self.options.accumulation):
            with self.clock.part("data"):
                batch = self._to_device(next(batches))
            if probing and micro == 0:
                probed = self.engine.trainee.probe(batch, self.world.gather)
            with self.clock.part("forward"):
                loss, metrics = self.engine(batch, self.world.gather)
            metrics = {"loss": loss.detach(), **metrics}
            last = micro == self.options.accumulation - 1
            outcome = self.engine.backward(loss, last=last, learning_rate=self.learning_rate(step), clock=self.clock)
            share = 1.0 / self.options.accumulation
            totals = {name: totals.get(name, 0.0) + value * share for name, value in metrics.items()}
        if outcome is None:
            raise RuntimeError("the last micro batch of a step did not step")
        averaged = self.world.mean(totals | {name: torch.tensor(value) for name, value in probed.items()})
        return self.engine.trainee.summarise(averaged), outcome

    def _count(self, step: int, outcome: StepOutcome) -> None:
        progress = self.progress
        progress.step = step + 1
        progress.samples += self.options.batch_size
        if outcome.applied:
            progress.bad_run = 0
            if self.average is not None:
                with self.engine.whole_weights(trained_alone=True):
                    self.average.update(self.engine.trainable, self._decay(self.average.num_updates + 1))
            return
        progress.skipped_steps += 1
        progress.bad_run += 1
        if progress.bad_run >= self.options.max_bad_steps:
            raise EnvironmentFailed(
                f"{self.order.out}: steps {step + 2 - progress.bad_run} to {step + 1} all had a loss or gradient that "
                f"is not finite; nothing of them was kept. Lower --lr (now {self.options.lr}) or look at the data"
            )

    def _watch(self, metrics: dict[str, float]) -> None:
        alarm = self.engine.trainee.alarm(metrics)
        metrics["alarm"] = float(alarm is not None)
        if alarm is None:
            return
        if not any(note.startswith(FIRST_ALARM) for note in self.progress.notes):
            self.progress.notes.append(f"{FIRST_ALARM} at step {self.progress.step}: {alarm}")
        if self.objective.stop_on_alarm:
            self.progress.stopped = f"step {self.progress.step}: {alarm}"

    def _validate(self) -> dict[str, float]:
        """Mean metrics over the validation rows, with the averaged weights if there are any; prefixed `val_`."""
        if self.validation_groups is None:
            return {}
        self.world.average_buffers(self.engine.trainee)
        self.engine.train(False)
        sums: dict[str, Tensor] = {}
        count = 0
        batches = validation_batches(
            self.validation_groups, self.plan, self.world.rank, self.options.seed, self.objective.collate
        )
        with self._averaged_weights(), torch.no_grad():
            for batch in batches:
                loss, metrics = self.engine(self._to_device(batch), self.world.gather)
                count += 1
                sums = {name: sums.get(name, 0.0) + value for name, value in {"loss": loss, **metrics}.items()}
        if count == 0:
            raise InputError(
                f"--batch-size {self.options.batch_size} leaves no whole validation batch in "
                f"{sum(self.validation_groups.sizes)} rows: lower it, or raise --accumulation"
            )
        means = self.engine.trainee.summarise(self.world.mean({name: s / count for name, s in sums.items()}))
        self.progress.last_validation = {f"val_{name}": value for name, value in means.items()}
        return self.progress.last_validation

    def _checkpoint(self) -> None:
        """Save, or stop cleanly where the storage does not take it; the checkpoints before stay whole."""
        try:
            self._save()
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and DISK_FAULT not in str(error):
                raise
            raise EnvironmentFailed(
                f"{self.root}: the checkpoint of step {self.progress.step} cannot be written "
                f"({str(error).splitlines()[0]}); free the storage and run the same command again"
            ) from error

    def _save(self) -> None:
        """Write one checkpoint by all ranks; it is published when every file is hashed."""
        name = self.world.share(checkpoints.folder_name(self.root, self.progress.step) if self.world.is_main else "")
        folder = self.root / name
        self.world.average_buffers(self.engine.trainee)
        self.engine.save(self.root, name)
        if self.world.is_main:
            self.progress.watch = self.engine.trainee.watch_state()
            if self.average is not None:
                self.progress.num_average_updates = self.average.num_updates
                save_weights(folder / AVERAGE, {f"{i:06d}": s for i, s in enumerate(self.average.shadows)})
            (folder / STATE).write_text(json.dumps(vars(self.progress), indent=1), encoding="utf-8")
        names = self.world.share(checkpoints.list_files(folder) if self.world.is_main else [])
        mine = checkpoints.digest_files(folder, names[self.world.rank :: self.world.size])
        files = {name: entry for part in self.world.collect(mine) for name, entry in part.items()}
        if self.world.is_main:
            checkpoints.publish(
                folder,
                step=self.progress.step,
                world_size=self.world.size,
                metric=self.progress.last_validation.get("val_loss"),
                files=files,
            )
            checkpoints.retain(self.root, self.options.keep_last)

    def _load(self, found: checkpoints.Checkpoint) -> None:
        if found.world_size != self.world.size and self.options.zero_stage > 0:
            raise InputError(
                f"{found.path} was written by {found.world_size} workers under ZeRO-{self.options.zero_stage}, which "
                f"cannot be dealt out to {self.world.size}: continue with --num-workers {found.world_size}"
            )
        self.engine.load(self.root, found.name)
        state = json.loads((found.path / STATE).read_text(encoding="utf-8"))
        self.progress = Progress(**state)
        self.engine.trainee.load_watch_state(self.progress.watch)
        if self.average is not None:
            shadows = load_weights(found.path / AVERAGE)
            self.average.load_state_dict(
                {
                    "num_updates": self.progress.num_average_updates,
                    "shadows": [shadows[name] for name in sorted(shadows)],
                }
            )

    def _averaged_weights(self) -> AbstractContextManager[None]:
        if self.average is None:
            return self.engine.whole_weights()
        average = self.average
        return self.engine.replaced_weights(lambda parameters: average.copy_to(parameters))

    def _probes(self) -> bool:
        """Not under ZeRO-3: only one backward, the engine's own, fetches the weights that are dealt out there."""
        return self.objective.probe_every > 0 and self.options.zero_stage < 3

    def _averages(self) -> bool:
        return self.options.ema_decay is not None or self.options.ema_width is not None

    def _decay(self, update: int) -> float:
        if self.options.ema_width is not None:
            return power_decay(update, gamma_of_width(self.options.ema_width))
        return exponential_decay(update, self.options.ema_decay or 0.0)

    def _due(self, every: int) -> bool:
        """Every so many steps, and after the last one."""
        at_end = self.progress.step == self.options.steps or self.progress.stopped is not None
        return at_end or (every > 0 and self.progress.step % every == 0)

    def _device_peak(self) -> float | None:
        """Operations a second of rank 0's GPU; None on the other ranks, which report nothing."""
        if not self.world.is_main or self.world.device.type != "cuda":
            return None
        return peak_flops(torch.cuda.get_device_name(self.world.device), bf16=self.options.bf16)

    def _to_device(self, batch: Batch) -> Batch:
        if self.world.device.type == "cpu":
            return batch
        return {name: t.pin_memory().to(self.world.device, non_blocking=True) for name, t in batch.items()}


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Torch's own generator (dropout) as a function of the step: there is no RNG state to save."""
    key: Any = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]
    return int(key) & (2**63 - 1)
