"""What a training had to change about itself to go on: another order of the samples, smaller micro batches.

Such a decision must outlive the process that took it, or a restarted run would meet the same fault at the same step. It
is written beside the checkpoints the moment it is taken, and into every later checkpoint; the options, and with them
the stage's fingerprint, stay what was asked for. Decisions are only ever added, so of two records the longer holds.
"""

import json
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from pipelines.data.storage import Location, open_folder
from pipelines.training.checkpoints import write_json
from pipelines.training.order import BatchPlan

FILE = "adjustments.json"


class StartAgain(RuntimeError):
    """The run is to be built again from its newest checkpoint, by all ranks, each in its own process.

    A RuntimeError, so that a worker group takes it for the loss of a peer where it ends a worker.
    """


class RollBack(StartAgain):
    """Too many steps in a row were skipped."""

    def __init__(self, at_step: int, reason: str) -> None:
        """`at_step`: finished steps when it was noticed."""
        super().__init__(at_step, reason)
        self.at_step, self.reason = at_step, reason


class MemoryRanOut(StartAgain):
    """This rank alone ran out of memory: the others wait for it in a collective, so the whole group starts again."""


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """One return to a checkpoint."""

    at_step: int
    to_step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Adjustments:
    """The decisions so far."""

    rollbacks: tuple[Rollback, ...] = ()
    max_micro_size: int | None = None
    """Most samples of one forward on one rank, from when memory ran out; None: it never did."""

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Adjustments":
        """Read back `to_json()`; an empty dict is none."""
        rollbacks = tuple(Rollback(**entry) for entry in content.get("rollbacks", ()))
        return cls(rollbacks=rollbacks, max_micro_size=content.get("max_micro_size"))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def merged(self, other: "Adjustments") -> "Adjustments":
        """Return what both know."""
        sizes = [size for size in (self.max_micro_size, other.max_micro_size) if size is not None]
        return Adjustments(
            rollbacks=max(self.rollbacks, other.rollbacks, key=len), max_micro_size=min(sizes, default=None)
        )

    def after(self, cause: RollBack | None, to_step: int) -> "Adjustments":
        """Return what is known once `cause` led back to a checkpoint; None: nothing did."""
        if cause is None:
            return self
        back = Rollback(at_step=cause.at_step, to_step=to_step, reason=cause.reason)
        return replace(self, rollbacks=(*self.rollbacks, back))

    def order_number(self, step: int) -> int:
        """Which order of the samples holds at a step: that of the last rollback that led to it or before it.

        A function of the step, so that a run that falls back to a still earlier checkpoint meets the same samples.
        """
        return max((n for n, back in enumerate(self.rollbacks, 1) if back.to_step <= step), default=0)

    def segments(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """Cut steps [first, last) into (first, last, order number) of one order each."""
        starts = {back.to_step for back in self.rollbacks if first < back.to_step < last}
        borders = sorted({first, *starts, last})
        return [(a, b, self.order_number(a)) for a, b in pairwise(borders)]

    def plan(
        self, batch_size: int, world_size: int, accumulation: int, *, most_workers: int | None = None
    ) -> BatchPlan:
        """Deal out a global batch as asked for, or in more micro batches where they have to be smaller.

        They do where memory ran out, and where a group that has `most_workers` when it is whole has fewer: what fitted
        there fits here.

        Raises:
            InputError: the batch does not divide as asked for.
        """
        asked = BatchPlan(batch_size, world_size, accumulation)
        whole = asked if most_workers is None else BatchPlan(batch_size, most_workers, accumulation)
        largest = min(whole.micro_size, self.max_micro_size or whole.micro_size)
        if asked.micro_size <= largest:
            return asked
        # A part of the micro batch as asked for, so that what is reckoned by that (validation) stays whole.
        micro = max(size for size in range(1, largest + 1) if asked.micro_size % size == 0)
        return BatchPlan(batch_size, world_size, accumulation * (asked.micro_size // micro))

    def notes(self) -> list[str]:
        """Lines for people."""
        lines = [
            f"rolled back from step {back.at_step} to {back.to_step}, order {number} of the samples from there: "
            f"{back.reason}"
            for number, back in enumerate(self.rollbacks, 1)
        ]
        if self.max_micro_size is not None:
            lines.append(
                f"out of memory: micro batches of at most {self.max_micro_size} on a worker, same global batch"
            )
        return lines


def order_seed(seed: int, number: int) -> int:
    """Seed of order `number`: the run's own for 0, another one after each rollback."""
    if number == 0:
        return seed
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint32)[0])


def read_adjustments(folder: Location) -> Adjustments:
    """Return what is recorded in a folder of checkpoints; nothing where there is no record."""
    try:
        return Adjustments.from_json(json.loads(open_folder(folder).read_bytes(FILE)))
    except FileNotFoundError:
        return Adjustments()


def write_adjustments(folder: Location, adjustments: Adjustments) -> None:
    """Record them for good: what was there, or all of it. Several ranks may write the same at once."""
    write_json(open_folder(folder), FILE, adjustments.to_json())
