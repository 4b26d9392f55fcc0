"""The one commit map: rows cut into units, units worked on by a Ray Data actor pool, each committed as a part.

A unit is at most 64 rows of one split with a deterministic id; its part is written under a temporary name and renamed
to `data/part-<unit id>.parquet`, after its rejects. So a unit is done or not done, whoever died when; a resumed run
does the units that have no part, and a unit done twice overwrites itself with the same bytes.
Inside a unit a worker sees one clip a call, which makes the result independent of how clips were grouped.
"""

import hashlib
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from models.spec import ClipSpec
from pipelines.data.contracts import REJECTS, Contract
from pipelines.data.storage import Folder, open_folder
from pipelines.data.store import ROW_GROUP_ROWS, encode_part
from pipelines.errors import ContractError, EnvironmentFailed, InputError, PipelineError, Refused, StageConflict
from pipelines.progress import Progress

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


class _CommittingActor:
    """One actor of the pool: makes its worker once, then processes and commits unit after unit."""

    def __init__(self, factory: Callable[[], UnitWorker], out: str, contract: Contract, spec: ClipSpec) -> None:
        self._worker = factory()
        self._folder = open_folder(out)
        self._contract = contract
        self._spec = spec

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        receipts = [self._commit(pickle.loads(encoded)) for encoded in batch["unit"]]
        return {name: [receipt[name] for receipt in receipts] for name in receipts[0]}

    def _commit(self, unit: Unit) -> dict[str, Any]:
        try:
            table, rejects = self._worker.process(unit)
            commit_unit(self._folder, unit, table, rejects, self._contract, self._spec)
        except PipelineError as error:
            # Travels as data: Ray's wrapping of exceptions would lose the type, and with it the exit code.
            return {"unit_id": unit.unit_id, "rows": 0, "rejects": 0, "error": type(error).__name__, "what": str(error)}
        return {
            "unit_id": unit.unit_id,
            "rows": table.num_rows,
            "rejects": rejects.num_rows,
            "error": "",
            "what": "",
        }


def run_units(
    units: Sequence[Unit],
    *,
    factory: Callable[[], UnitWorker],
    contract: Contract,
    spec: ClipSpec,
    out: str,
    num_workers: int,
    num_gpus: float = 0.0,
    label: str = "units",
) -> None:
    """Process every unit that has no part yet; returns when all have one.

    Args:
        units: all units of the stage (done ones are skipped).
        factory: makes a worker; runs inside each actor, must be picklable.
        contract: contract of the parts.
        spec: clip spec of the parts.
        out: the artifact's folder.
        num_workers: actors; 0 works in this process without Ray.
        num_gpus: GPUs an actor holds.
        label: what the progress line counts.

    Raises:
        PipelineError: what a worker raised.
    """
    folder = open_folder(out)
    done = done_units(folder)
    todo = [unit for unit in units if unit.unit_id not in done]
    total = sum(len(unit.rows) for unit in units)
    with Progress(label=label, total=total, done=total - sum(len(u.rows) for u in todo)) as progress:
        if not todo:
            return
        receipts = (
            _run_here(todo, factory, contract, spec, folder)
            if num_workers == 0
            else _run_on_ray(todo, factory, contract, spec, out, num_workers, num_gpus)
        )
        received = set()
        for receipt in receipts:
            received.add(receipt["unit_id"])
            progress.advance(int(receipt["rows"]) + int(receipt["rejects"]))
    lost = [unit.unit_id for unit in todo if unit.unit_id not in received]
    if lost:
        raise RuntimeError(f"{len(lost)} units gave no receipt, {lost[0]} among them")


def _run_here(
    todo: Sequence[Unit], factory: Callable[[], UnitWorker], contract: Contract, spec: ClipSpec, folder: Folder
) -> Iterator[dict[str, Any]]:
    worker = factory()
    for unit in todo:
        table, rejects = worker.process(unit)
        commit_unit(folder, unit, table, rejects, contract, spec)
        yield {"unit_id": unit.unit_id, "rows": table.num_rows, "rejects": rejects.num_rows}


def _run_on_ray(
    todo: Sequence[Unit],
    factory: Callable[[], UnitWorker],
    contract: Contract,
    spec: ClipSpec,
    out: str,
    num_workers: int,
    num_gpus: float,
) -> Iterator[dict[str, Any]]:
    import ray
    from ray.data import ActorPoolStrategy

    from pipelines.cluster import cluster_cpus
    from pipelines.data.ray_data import quiet_ray_data

    num_workers = min(num_workers, len(todo))
    quiet_ray_data()
    # One block a unit: a unit is the grain of scheduling, retry and commit.
    source = ray.data.from_items([{"unit": pickle.dumps(unit)} for unit in todo], override_num_blocks=len(todo))
    receipts = source.map_batches(
        _CommittingActor,
        fn_constructor_args=(factory, out, contract, spec),
        batch_size=1,
        compute=ActorPoolStrategy(size=num_workers),
        num_cpus=actor_cpus(cluster_cpus(), num_workers),
        num_gpus=num_gpus or None,
    )
    for receipt in receipts.iter_rows():
        if receipt["error"]:
            raise _ERRORS[receipt["error"]](receipt["what"])
        yield receipt


def actor_cpus(total_cpus: float, num_workers: int) -> float:
    """CPU share of one actor, such that the pool never takes all of the cluster.

    A pool that holds every CPU leaves none for the rest of the plan and hangs without a word.
    """
    share = 0.7 * total_cpus / num_workers
    return float(math.floor(share)) if share >= 2 else 1.0 if share >= 1 else max(math.floor(share * 100) / 100, 0.01)
