"""The one training loop: restore, then batch -> loss -> backward -> step, with validation and checkpoints between.

It is what every rank of a Ray Train worker group runs, and what runs alone in process with one rank. A step that is
interrupted anywhere is done again from the newest complete checkpoint with the same samples and the same draws, so
the journal of an interrupted run equals that of an uninterrupted one.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.data.storage import open_folder
from pipelines.errors import EnvironmentFailed
from pipelines.training import checkpoints
from pipelines.training.adjustments import (
    Adjustments,
    RollBack,
    StartAgain,
    order_seed,
    read_adjustments,
    write_adjustments,
)
from pipelines.training.attempts import Attempt, repeat
from pipelines.training.average import Average
from pipelines.training.batches import BatchSource, Prefetched, RowGroups, to_device
from pipelines.training.engine import Engine, StepOutcome
from pipelines.training.flops import device_load
from pipelines.training.guards import GRAD_NORM, LOSS, SpikeGuard
from pipelines.training.journal import Journal
from pipelines.training.objective import Batch, Objective
from pipelines.training.options import TrainingOptions
from pipelines.training.order import BatchPlan
from pipelines.training.preflight import check_machine
from pipelines.training.run_state import Progress
from pipelines.training.snapshots import Snapshots
from pipelines.training.timing import StepClock, StepMeter
from pipelines.training.validation import Validation
from pipelines.training.workplace import Workplace
from pipelines.training.world import Report, World

CHECKPOINTS = "checkpoints"
FIRST_ALARM = "first alarm"


@dataclass(frozen=True)
class TrainingOrder:
    """One training to be done: everything a worker needs, picklable."""

    objective: Objective
    options: TrainingOptions
    out: str
    """Folder on storage that all workers see, a path or a URI."""

    @property
    def stall_timeout_s(self) -> float | None:
        """See `TrainingOptions`."""
        return self.options.stall_timeout_s

    def run(self, world: World, report: Report) -> "TrainingResult | None":
        """Train to the end from wherever the folder is; see `pipelines.training.order_book.Order`."""
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
    """Broken checkpoints that were passed over, rollbacks, smaller micro batches, alarms."""


def train(order: TrainingOrder, world: World, report: Report) -> TrainingResult | None:
    """Train to the end from wherever the folder is; the result on rank 0, None on the others.

    A run that has to change something about itself (`pipelines.training.adjustments`) is built again in this process,
    except where memory ran out on one of several ranks: then `MemoryRanOut` asks for a new group.

    Raises:
        InputError: the options do not fit the data, the machine or the number of workers, or a checkpoint this run
            cannot use.
        EnvironmentFailed: too many steps in a row were skipped, also after the rollbacks that are allowed; the weights
            are not finite; or memory ran out and smaller micro batches do not help.
        MemoryRanOut: with several ranks, this one ran out of memory; another attempt begins with smaller micro batches.
    """
    check_machine(order.options, world.device)

    def body(attempt: Attempt) -> TrainingResult | None:
        run = _Run(order, world, report)
        try:
            run.restore(attempt.cause)
            attempt.micro_size = run.plan.micro_size
            run.steps()
            attempt.micro_size = None
            return run.finish()
        finally:
            run.close()

    checkpoints_of_order = f"{order.out}/{CHECKPOINTS}"
    loss_is_mean = order.objective.loss_is_mean
    return repeat(body, out=order.out, checkpoints=checkpoints_of_order, loss_is_mean=loss_is_mean, world=world)


class _Run:
    def __init__(self, order: TrainingOrder, world: World, report: Report) -> None:
        self.order, self.world, self.report = order, world, report
        world.pulse.at(0, "start")
        self.objective, self.options = order.objective, order.options
        self.root = open_folder(f"{order.out}/{CHECKPOINTS}")
        self.progress = Progress()
        self.learning_rate = self.options.learning_rates()
        self.guard = SpikeGuard(self.options.spike_factor)
        self.adjustments: Adjustments = world.share(read_adjustments(self.root) if world.is_main else None)
        self.plan = self._plan(self.adjustments)
        self.groups = RowGroups(self.objective.training_data, self.objective.columns)
        self.validation = Validation(self.objective, self.options, self.plan, world)
        self.source = BatchSource(
            groups=self.groups,
            order=self.groups.order(self.options.seed),
            plan=self.plan,
            rank=world.rank,
            seed=self.options.seed,
            collate=self.objective.collate,
        )
        trainee = self.objective.build(world.device)
        # Before the engine deals the weights out to the workers; the other ranks report nothing.
        self.load = device_load(trainee, self.source, world.device, bf16=self.options.bf16) if world.is_main else None
        self.engine = Engine(trainee, self.options, self.plan, world)
        self.clock = StepClock(world.device)
        self.average = Average(self.engine, self.options)
        self.snapshots = Snapshots(self.root, world, self.engine, self.options)
        self.journal: Journal | None = None
        self.place = Workplace(order.out)
        self.prefetched: Prefetched | None = None

    def restore(self, cause: RollBack | None = None) -> None:
        """Continue from the newest complete checkpoint, agreed on by all ranks; rank 0 cuts the journal back to it.

        `cause`: why a run in this process went back to it.
        """
        if self.place.is_scratch:
            # Not watched: to fetch a checkpoint takes as long as the network does.
            self.world.pulse.rest()
        else:
            self.world.pulse.at(0, "restore")
        found, skipped = self.world.share(checkpoints.newest_complete(self.root) if self.world.is_main else (None, []))
        if found is not None:
            self._load(found)
        self._adjust(cause)
        notes = [f"checkpoint {broken.name} passed over: {broken.reason}" for broken in skipped]
        if self.objective.probe_every and not self._probes():
            notes.append("gradients are not probed under ZeRO-3")
        notes.extend(self.adjustments.notes())
        self.world.pulse.at(self.progress.step, "journal")
        self.progress.notes.extend(note for note in notes if note not in self.progress.notes)
        if self.world.is_main:
            self.journal = Journal(self.place.journal, self.progress.step)

    def _load(self, found: checkpoints.Checkpoint) -> None:
        self.progress = Progress(**self.snapshots.load(found, self.average.weights))
        self.engine.trainee.load_watch_state(self.progress.watch)
        if self.place.is_scratch:
            if self.world.is_main:
                self.place.take_journal(found.path)
            self.world.collect(None)  # Until every rank has read it.
            found.release()

    def steps(self) -> None:
        """Take the remaining steps."""
        first = self.progress.step
        self.prefetched = Prefetched(self._micro_batches(first))
        batches = iter(self.prefetched)
        meter = StepMeter(
            batch_size=self.options.batch_size,
            world_size=self.world.size,
            first_step=first,
            total_steps=self.options.steps,
            load=self.load,
        )
        for step in range(first, self.options.steps):
            if self.progress.stopped is not None:
                break
            started = time.perf_counter()
            probing = self._probes() and (step + 1) % self.objective.probe_every == 0
            metrics, outcome = self._step(step, batches, probing)
            self._count(step, metrics, outcome)
            metrics |= {"learning_rate": self.learning_rate(step)}
            parts = self.clock.end_step()
            metrics |= meter.metrics(step, time.perf_counter() - started, parts, self.groups.row_bytes)
            self._watch(metrics)
            if self._due(self.options.validate_every):
                self.progress.last_validation = self.validation.run(self.engine, self.average, self.progress.step)
                metrics |= self.progress.last_validation
            if self.journal is not None:
                self.journal.append(self.progress.step, metrics)
                self.report(self.progress.step, metrics)
            if self._due(self.options.checkpoint_every) and self._is_sound():
                self.world.pulse.at(step, "checkpoint")
                self._checkpoint()

    def finish(self) -> TrainingResult | None:
        """Export what the next stage loads, from the averaged weights if there are any; rank 0 returns the result."""
        self.snapshots.wait()
        self.world.average_buffers(self.engine.trainee)
        with self.average.in_place():
            if not self.engine.is_finite():
                raise EnvironmentFailed(
                    f"{self.order.out}: the weights are not finite after step {self.progress.step} and are not "
                    f"exported. Lower --lr (now {self.options.lr}); the same command goes on from the last checkpoint"
                )
            self.world.pulse.rest()
            if not self.world.is_main:
                return None
            self.engine.train(False)
            exported = self.place.export(self.objective, self.engine.trainee)
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
        """Let a checkpoint under way end, stop the reader, close the journal, free the engine."""
        self.snapshots.close()
        if self.prefetched is not None:
            self.prefetched.close()
        if self.journal is not None:
            self.journal.close()
        self.place.close()
        self.engine.close()

    def _step(self, step: int, batches: Iterator[Batch], probing: bool) -> tuple[dict[str, float], StepOutcome]:
        torch.manual_seed(_step_seed(self.options.seed, step, self.world.rank))
        self.engine.train(True)
        totals: dict[str, Tensor] = {}
        probed: dict[str, float] = {}
        outcome: StepOutcome | None = None
        loss_spike = False
        statistics = self.engine.batch_statistics()
        for micro in range(self.plan.accumulation):
            last = micro == self.plan.accumulation - 1
            self.world.pulse.at(step, "data")
            with self.clock.part("data"):
                batch = to_device(next(batches), self.world.device)
            self.world.pulse.at(step, "forward")
            if probing and micro == 0:
                probed = self.engine.trainee.probe(batch, self.world.gather)
            with self.clock.part("forward"):
                loss, metrics = self.engine(batch, self.world.gather, last=last)
            metrics = {LOSS: loss.detach(), **metrics}
            share = 1.0 / self.plan.accumulation
            totals = {name: totals.get(name, 0.0) + value * share for name, value in metrics.items()}
            if last and self._is_loss_spike(totals[LOSS]):
                # As a loss that is not finite: the engine skips the step on every rank.
                loss_spike, loss = True, loss * math.nan
            self.world.pulse.at(step, "backward")
            outcome = self.engine.backward(
                loss,
                last=last,
                learning_rate=self.learning_rate(step),
                clock=self.clock,
                is_spike=self._is_norm_spike,
            )
        if outcome is None:
            raise RuntimeError("the last micro batch of a step did not step")
        if not outcome.applied:
            self.engine.restore_batch_statistics(statistics)
        self.world.pulse.at(step, "metrics")
        averaged = self.world.mean(totals | {name: torch.tensor(value) for name, value in probed.items()})
        return self.engine.trainee.summarise(averaged), replace(outcome, spike=outcome.spike or loss_spike)

    def _is_loss_spike(self, total: Tensor) -> bool:
        """Whether the loss of the whole step, known before its last backward pass, is a spike; equal on every rank."""
        return self.guard.factor is not None and self.guard.is_spike(LOSS, self.world.mean({LOSS: total})[LOSS])

    def _is_norm_spike(self, norm: float) -> bool:
        return self.guard.is_spike(GRAD_NORM, norm)

    def _count(self, step: int, metrics: dict[str, float], outcome: StepOutcome) -> None:
        """Take a step into the account, the averages and the guards; go back where too many were skipped."""
        progress = self.progress
        progress.step = step + 1
        progress.samples += self.options.batch_size
        metrics |= {GRAD_NORM: outcome.grad_norm, "skipped": float(not outcome.applied)}
        if self.guard.factor is not None:
            metrics["skipped_spike"] = float(outcome.spike)
        if self.plan.accumulation != self.options.accumulation:
            metrics["accumulation"] = float(self.plan.accumulation)
        if self.world.most is not None:
            metrics["workers"] = float(self.world.size)
        if number := self.adjustments.order_number(step):
            metrics["order"] = float(number)
        if outcome.applied:
            progress.bad_run = 0
            self.guard.accept(metrics)
            self.average.update()
            return
        progress.skipped_steps += 1
        progress.skipped_spikes += outcome.spike
        progress.bad_run += 1
        if progress.bad_run >= self.options.max_bad_steps:
            self._go_back(step)

    def _go_back(self, step: int) -> None:
        """Ask for a rollback, or stop where there were enough of them."""
        kinds = "that is not finite" + (" or a spike" if self.guard.factor is not None else "")
        reason = f"steps {step + 2 - self.progress.bad_run} to {step + 1} all had a loss or gradient {kinds}"
        if len(self.adjustments.rollbacks) < self.options.max_rollbacks:
            raise RollBack(self.progress.step, reason)
        tried = f", also after {self.options.max_rollbacks} rollbacks" if self.options.max_rollbacks else ""
        raise EnvironmentFailed(
            f"{self.order.out}: {reason}{tried}; nothing of them was kept. Lower --lr (now {self.options.lr}), look at "
            "the data, or raise --max-rollbacks"
        )

    def _adjust(self, cause: RollBack | None) -> None:
        """Record a rollback to where the run is now; take over what the checkpoint knows and the record beside lost."""
        known = self.adjustments.merged(Adjustments.from_json(self.progress.adjustments))
        known = known.after(cause, self.progress.step)
        if known != self.adjustments and self.world.is_main:
            write_adjustments(self.root, known)
        smaller = self._plan(known) != self.plan
        self.adjustments, self.progress.adjustments = known, known.to_json()
        if smaller:
            raise StartAgain("the checkpoint was written with smaller micro batches")
        if self.progress.recent:
            self.guard.recent = self.progress.recent
        self.progress.recent = self.guard.recent if self.guard.factor is not None else {}

    def _plan(self, adjustments: Adjustments) -> BatchPlan:
        # A loss that compares the samples of a micro batch keeps their number, so fewer workers hold more of them.
        most, options = self.world.most if self.objective.loss_is_mean else None, self.options
        return adjustments.plan(options.batch_size, self.world.size, options.accumulation, most_workers=most)

    def _micro_batches(self, first: int) -> Iterator[Batch]:
        """Yield the micro batches from step `first` to the last, each stretch of steps in its own order."""
        for start, end, number in self.adjustments.segments(first, self.options.steps):
            order = self.groups.order(order_seed(self.options.seed, number))
            yield from replace(self.source, order=order).micro_batches(start, end)

    def _is_sound(self) -> bool:
        """Whether the weights may be gone back to: finite, and not in the middle of a row of skipped steps."""
        if self.progress.bad_run:
            return False
        with self.engine.whole_weights(trained_alone=True):
            return self.engine.is_finite()

    def _watch(self, metrics: dict[str, float]) -> None:
        alarm = self.engine.trainee.alarm(metrics)
        metrics["alarm"] = float(alarm is not None)
        if alarm is None:
            return
        if not any(note.startswith(FIRST_ALARM) for note in self.progress.notes):
            self.progress.notes.append(f"{FIRST_ALARM} at step {self.progress.step}: {alarm}")
        if self.objective.stop_on_alarm:
            self.progress.stopped = f"step {self.progress.step}: {alarm}"

    def _checkpoint(self) -> None:
        """Begin a checkpoint; it is written beside the next steps."""
        self.progress.watch = self.engine.trainee.watch_state()
        self.progress.num_average_updates = self.average.num_updates
        cut = self.journal.cut() if self.journal is not None and self.place.is_scratch else None
        metric = self.progress.last_validation.get("val_loss")
        self.snapshots.save(vars(self.progress), self.average.weights, metric, cut)

    def _probes(self) -> bool:
        """Not under ZeRO-3: only one backward, the engine's own, fetches the weights that are dealt out there."""
        return self.objective.probe_every > 0 and self.options.zero_stage < 3

    def _due(self, every: int) -> bool:
        """Every so many steps, and after the last one."""
        at_end = self.progress.step == self.options.steps or self.progress.stopped is not None
        return at_end or (every > 0 and self.progress.step % every == 0)


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Torch's own generator (dropout) as a function of the step: there is no RNG state to save."""
    key: Any = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]
    return int(key) & (2**63 - 1)
