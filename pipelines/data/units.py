"""The one commit map: rows cut into units, units worked on by a pool of workers, each committed as a part.

The pool is Ray Data's actors; or the workers of a launch that are there already; or this process.

A unit is at most 64 rows of one split with a deterministic id; its part is written under a temporary name and renamed
to `data/part-<unit id>.parquet`, after its rejects. So a unit is done or not done, whoever died when; a resumed run
does the units that have no part, and a unit done twice overwrites itself with the same bytes.
Inside a unit a worker sees one clip a call, which makes the result independent of how clips were grouped.
"""

import hashlib
import math
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import torch

from models.spec import ClipSpec
from pipelines.cluster import cluster_cpus, connect
from pipelines.data.contracts import REJECTS, Contract
from pipelines.data.storage import Folder, open_folder
from pipelines.data.store import ROW_GROUP_ROWS, encode_part
from pipelines.devices import cpu_device, own_device
from pipelines.errors import ContractError, EnvironmentFailed, InputError, PipelineError, Refused, StageConflict
from pipelines.progress import Progress

if TYPE_CHECKING:
    from pipelines.training.workers import WorkerGroup
    from pipelines.training.world import Report, World

_ERRORS = {e.__name__: e for e in (ContractError, EnvironmentFailed, InputError, Refused, StageConflict)}


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Rows that are committed together: what a worker gets and what its part is called."""

    unit_id: str
    split: str
    rows: tuple[Any, ...]
    """Plain picklable descriptions of the rows (dictionaries, or keys to read)."""


class UnitWorker(Protocol):
    """Turns a unit into a conforming table and a table of rejects; holds models, decoders and the like."""

    def process(self, unit: Unit) -> tuple[pa.Table, pa.Table]:
        """The unit's rows and rejects; together they cover every input row once."""
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


def done_units(folder: Folder) -> set[str]:
    """Ids of the units whose part is in `data/`."""
    names = folder.list_names("data")
    return {n[len("part-") : -len(".parquet")] for n in names if n.startswith("part-") and n.endswith(".parquet")}


def commit_unit(
    folder: Folder, unit: Unit, table: pa.Table, rejects: pa.Table, contract: Contract, spec: ClipSpec
) -> None:
    """Write a unit's rejects, then its part; the part's name is what says the unit is done.

    Raises:
        ContractError: a row breaks the contract.
        RuntimeError: rows and rejects do not add up to the unit.
    """
    if table.num_rows + rejects.num_rows != len(unit.rows):
        raise RuntimeError(
            f"unit {unit.unit_id}: {len(unit.rows)} rows in, {table.num_rows} out and {rejects.num_rows} rejected"
        )
    if rejects.num_rows:
        folder.write_bytes(f"rejects/part-{unit.unit_id}.parquet", encode_part(rejects, REJECTS, spec))
    folder.write_bytes(f"data/part-{unit.unit_id}.parquet", encode_part(table, contract, spec))


def run_units(
    units: Sequence[Unit],
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
    """
    done = done_units(open_folder(out))
    order = UnitOrder(
        units=tuple(unit for unit in units if unit.unit_id not in done),
        factory=factory,
        contract=contract,
        spec=spec,
        out=out,
    )
    total = sum(len(unit.rows) for unit in units)
    with Progress(label=label, total=total, done=total - sum(len(u.rows) for u in order.units)) as progress:
        if not order.units:
            return
        if pool.group is not None:
            pool.group.run(order, lambda rows, _: progress.advance(rows))
        elif pool.num_workers > 0:
            with connect():
                _run_on_ray_data(order, pool, progress)
        else:
            worker = factory(own_device())
            for unit in order.units:
                progress.advance(order.commit(worker, unit))
    left = {unit.unit_id for unit in units} - done_units(open_folder(out))
    if left:
        raise RuntimeError(f"{out}: {len(left)} units have no part, {min(left)} among them")


@dataclass(frozen=True, kw_only=True)
class UnitOrder:
    """Units to be done; an order for a worker group (see `pipelines.training.workers.Order`)."""

    units: tuple[Unit, ...]
    factory: WorkerFactory
    contract: Contract
    spec: ClipSpec
    out: str

    def run(self, world: "World", report: "Report") -> int | None:
        """Do every `world.size`-th unit that has no part; on rank 0 the number of units, once all have one."""
        worker = self.factory(world.device)
        done = done_units(open_folder(self.out))
        for unit in self.units[world.rank :: world.size]:
            if unit.unit_id not in done:
                report(self.commit(worker, unit), {})
        world.collect(None)
        return len(self.units) if world.is_main else None

    def commit(self, worker: UnitWorker, unit: Unit) -> int:
        """Have one unit done and commit it; returns how many rows it had."""
        table, rejects = worker.process(unit)
        commit_unit(open_folder(self.out), unit, table, rejects, self.contract, self.spec)
        return len(unit.rows)


class _CommittingActor:
    """One actor of Ray Data's pool: makes its worker once, then processes and commits unit after unit."""

    def __init__(self, order: UnitOrder, on_gpu: bool) -> None:
        # What Ray assigned and not what the machine has: an actor without a GPU may still see those of others.
        self._worker = order.factory(own_device() if on_gpu else cpu_device())
        self._order = order

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        receipts = [self._commit(pickle.loads(encoded)) for encoded in batch["unit"]]
        return {name: [receipt[name] for receipt in receipts] for name in receipts[0]}

    def _commit(self, unit: Unit) -> dict[str, Any]:
        try:
            return {"rows": self._order.commit(self._worker, unit), "error": "", "what": ""}
        except PipelineError as error:
            # Travels as data: Ray's wrapping of exceptions would lose the type, and with it the exit code.
            return {"rows": 0, "error": type(error).__name__, "what": str(error)}


def _run_on_ray_data(order: UnitOrder, pool: Pool, progress: Progress) -> None:
    import ray
    from ray.data import ActorPoolStrategy

    from pipelines.data.ray_data import quiet_ray_data

    num_workers = min(pool.num_workers, len(order.units))
    quiet_ray_data()
    # One block a unit: a unit is the grain of scheduling, retry and commit.
    items = [{"unit": pickle.dumps(unit)} for unit in order.units]
    receipts = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _CommittingActor,
        fn_constructor_args=(replace(order, units=()), pool.num_gpus > 0),
        batch_size=1,
        compute=ActorPoolStrategy(size=num_workers),
        num_cpus=actor_cpus(cluster_cpus(), num_workers),
        num_gpus=pool.num_gpus or None,
    )
    for receipt in receipts.iter_rows():
        if receipt["error"]:
            raise _ERRORS[receipt["error"]](receipt["what"])
        progress.advance(int(receipt["rows"]))


def actor_cpus(total_cpus: float, num_workers: int) -> float:
    """CPU share of one actor, such that the pool never takes all of the cluster.

    A pool that holds every CPU leaves none for the rest of the plan and hangs without a word. A cluster that has no
    CPU yet grows by what is asked for.
    """
    if total_cpus < 1:
        return 1.0
    share = 0.7 * total_cpus / num_workers
    return float(math.floor(share)) if share >= 2 else 1.0 if share >= 1 else max(math.floor(share * 100) / 100, 0.01)
