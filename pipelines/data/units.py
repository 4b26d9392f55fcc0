"""The one commit map: rows cut into units, units worked on by a pool of workers, each committed as a part.

The pool is Ray Data's actors (`unit_pool.py`); or the workers of a launch that are there already; or this process.

A unit is at most 64 rows of one split with a deterministic id; how it is committed is told in `commits.py`. A resumed
run does the units that have no part, and a unit done twice overwrites itself with the same bytes.
Inside a unit a worker sees one clip a call, which makes the result independent of how clips were grouped.
"""

import hashlib
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import torch

from models.spec import ClipSpec
from pipelines.cluster import connect
from pipelines.data import attempts
from pipelines.data.commits import commit_unit, done_units, remove_leftovers
from pipelines.data.contracts import Contract
from pipelines.data.storage import open_folder
from pipelines.data.store import ROW_GROUP_ROWS
from pipelines.devices import own_device
from pipelines.progress import Progress

if TYPE_CHECKING:
    from pipelines.training.workers import WorkerGroup
    from pipelines.training.world import Report, World

STALL_S = 3600.0
"""Default of the longest time that one row may take before its worker is given up."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Rows that are committed together: what a worker gets and what its part is called."""

    unit_id: str
    split: str
    rows: tuple[Any, ...]
    """Plain picklable descriptions of the rows (dictionaries, or keys to read)."""


class UnitSource(Protocol):
    """The units of a stage in a fixed order, each made when it is asked for; picklable, since workers ask."""

    @property
    def names(self) -> Sequence[str]:
        """The id of every unit."""
        ...

    @property
    def sizes(self) -> Sequence[int]:
        """How many rows each has."""
        ...

    def unit(self, index: int) -> Unit:
        """The unit at `index`."""
        ...

    def for_workers(self) -> "UnitSource":
        """What a worker needs to be told an index and find the unit."""
        ...


@dataclass(frozen=True)
class ListedUnits:
    """Units that are all in memory."""

    units: tuple[Unit, ...]

    @property
    def names(self) -> Sequence[str]:
        """The id of every unit."""
        return [unit.unit_id for unit in self.units]

    @property
    def sizes(self) -> Sequence[int]:
        """How many rows each has."""
        return [len(unit.rows) for unit in self.units]

    def unit(self, index: int) -> Unit:
        """The unit at `index`."""
        return self.units[index]

    def for_workers(self) -> "ListedUnits":
        """The list itself."""
        return self


Alive = Callable[[], None]
"""Called by a worker after every row: a worker that does not call it for too long is taken for hung."""


class UnitWorker(Protocol):
    """Turns a unit into a conforming table and a table of rejects; holds models, decoders and the like."""

    def process(self, unit: Unit, alive: Alive) -> tuple[pa.Table, pa.Table]:
        """The unit's rows and rejects; together they cover every input row once."""
        ...

    def close(self) -> None:
        """End child processes and threads; called when no unit is left."""
        ...


WorkerFactory = Callable[[torch.device], UnitWorker]
"""Makes a worker that computes on a device; runs where the work is done, must be picklable."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Who works on units; nothing of it affects the rows."""

    num_workers: int
    """Actors of Ray Data; 0 works in this process without Ray."""
    num_gpus: float = 0.0
    """GPUs that an actor holds; 0 computes on the CPU."""
    group: "WorkerGroup | None" = None
    """Workers of a launch, which do it in the actors' place."""
    stall_s: float = STALL_S
    """Longest time that an actor may take for one row before it is killed and replaced."""


HERE = Pool(num_workers=0)
"""This process, without Ray."""


def cut_units(rows: Iterable[Mapping[str, Any]], *, key: str = "clip_id", size: int = ROW_GROUP_ROWS) -> list[Unit]:
    """Sort rows by key, cut them by split into units of at most `size`; the same rows give the same units."""
    by_split: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: r[key]):
        by_split.setdefault(row["split"], []).append(row)
    units = []
    for split in sorted(by_split):
        group = by_split[split]
        for start in range(0, len(group), size):
            members = tuple(dict(row) for row in group[start : start + size])
            units.append(
                Unit(unit_id=unit_id(split, start // size, [m[key] for m in members]), split=split, rows=members)
            )
    return units


def unit_id(split: str, index: int, keys: Sequence[str]) -> str:
    """Deterministic name of a unit: its split, its index in the split and a hash of its keys."""
    return f"{split}-{index:06d}-{hashlib.sha256(chr(10).join(keys).encode()).hexdigest()[:10]}"


def run_units(
    units: UnitSource,
    pool: Pool,
    *,
    factory: WorkerFactory,
    contract: Contract,
    spec: ClipSpec,
    out: str,
    label: str = "units",
) -> None:
    """Process every unit that has no part yet; returns when all have one.

    Args:
        units: all units of the stage (done ones are skipped).
        pool: who does it.
        factory: makes a worker.
        contract: contract of the parts.
        spec: clip spec of the parts.
        out: the artifact's folder.
        label: what the progress line counts.

    Raises:
        PipelineError: what a worker raised.
        EnvironmentFailed: a unit's workers died again and again.
    """
    remove_leftovers(open_folder(out))
    done = done_units(open_folder(out))
    names, sizes = units.names, units.sizes
    todo = tuple(index for index, name in enumerate(names) if name not in done)
    order = UnitOrder(
        units=units, todo=todo, factory=factory, contract=contract, spec=spec, out=out, run_id=uuid.uuid4().hex
    )
    left = sum(sizes[index] for index in todo)
    with Progress(label=label, total=sum(sizes), done=sum(sizes) - left) as progress:
        if not todo:
            return
        if pool.group is not None:
            pool.group.run(order, lambda rows, _: progress.advance(rows))
        elif pool.num_workers > 0:
            # Here, because it imports this module.
            from pipelines.data.unit_pool import run_on_ray_data

            with connect():
                run_on_ray_data(order, pool, progress)
        else:
            order.run_here(progress.advance)
    open_units = set(names) - done_units(open_folder(out))
    if open_units:
        raise RuntimeError(f"{out}: {len(open_units)} units have no part, {min(open_units)} among them")
    open_folder(out).delete_flat(attempts.ATTEMPTS)


def _nobody_waits() -> None:
    """What a worker tells of its progress to, where nobody would kill it."""


@dataclass(frozen=True, kw_only=True)
class UnitOrder:
    """Units to be done; an order for a worker group (see `pipelines.training.order_book.Order`)."""

    units: UnitSource
    todo: tuple[int, ...]
    """Indices of the units that have no part."""
    factory: WorkerFactory
    contract: Contract
    spec: ClipSpec
    out: str
    run_id: str
    """Of this call of `run_units`; attempts are counted by it."""

    stall_timeout_s = None

    def run(self, world: "World", report: "Report") -> int | None:
        """Do every `world.size`-th unit that has no part; on rank 0 the number of units, once all have one."""
        worker = self.factory(world.device)
        done = done_units(open_folder(self.out))
        names = self.units.names
        for index in self.todo[world.rank :: world.size]:
            if names[index] not in done:
                report(self.commit(worker, self.units.unit(index), _nobody_waits), {})
        worker.close()
        world.collect(None)
        return len(self.todo) if world.is_main else None

    def run_here(self, advance: Callable[[int], None]) -> None:
        """Do all in this process; `advance` takes the rows of each unit."""
        worker = self.factory(own_device())
        try:
            for index in self.todo:
                advance(self.commit(worker, self.units.unit(index), _nobody_waits))
        finally:
            worker.close()

    def commit(self, worker: UnitWorker, unit: Unit, alive: Alive) -> int:
        """Have one unit done and commit it; returns how many rows it had."""
        table, rejects = worker.process(unit, alive)
        commit_unit(open_folder(self.out), unit, table, rejects, self.contract, self.spec)
        return len(unit.rows)

    def for_workers(self) -> "UnitOrder":
        """The same order for a worker that is told the index of each unit."""
        return replace(self, units=self.units.for_workers(), todo=())
