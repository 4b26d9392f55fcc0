"""The plan of a stage over a manifest of any size: Parquet with a row group a unit, read by who does the unit.

So the driver holds names alone, workers are told an index, and what went into a dataset lies beside what came out.
"""

import io
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.data.storage import open_folder
from pipelines.data.store import ROW_GROUP_ROWS
from pipelines.data.units import Unit, unit_id
from pipelines.errors import InputError

PLAN = "plan"
UNITS_PER_FILE = 64
UNIT_COLUMN = "unit_id"

Rows = Callable[[pa.Table], Iterator[Mapping[str, Any]]]
"""Gives the rows of a slice of the plan as plain values for a worker; picklable."""


@dataclass(frozen=True, kw_only=True)
class PlannedUnits:
    """The units of a written plan."""

    out: str
    """The artifact's folder; the plan lies in `plan/`."""
    names: Sequence[str]
    sizes: Sequence[int]
    rows_of: Rows

    def unit(self, index: int) -> Unit:
        """The unit at `index`, read from the plan."""
        table = open_folder(self.out).use_file(
            _file_name(index // UNITS_PER_FILE),
            lambda file: pq.ParquetFile(file).read_row_group(index % UNITS_PER_FILE),
        )
        rows = tuple(dict(row) for row in self.rows_of(table.drop_columns([UNIT_COLUMN])))
        return Unit(unit_id=table[UNIT_COLUMN][0].as_py(), split=table["split"][0].as_py(), rows=rows)

    def for_workers(self) -> "PlannedUnits":
        """The same without the lists, which only the driver needs."""
        return replace(self, names=(), sizes=())


def write_plan(out: str, plan: pa.Table, rows_of: Rows, *, unit_rows: int = ROW_GROUP_ROWS) -> PlannedUnits:
    """Cut a plan into units of at most `unit_rows` rows of one split, and write it to `plan/`.

    Args:
        out: the artifact's folder.
        plan: sorted by (split, clip_id), both strings.
        rows_of: what a worker gets of it.
        unit_rows: at most 64, one row group.

    Returns the units; the same plan gives the same ones.
    """
    folder = open_folder(out)
    bounds = list(_bounds(plan["split"], unit_rows))
    names = []
    for number, first in enumerate(range(0, len(bounds), UNITS_PER_FILE)):
        sink = io.BytesIO()
        schema = plan.schema.append(pa.field(UNIT_COLUMN, pa.string()))
        with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
            for split, index, start, stop in bounds[first : first + UNITS_PER_FILE]:
                rows = plan.slice(start, stop - start)
                names.append(unit_id(split, index, rows["clip_id"].to_pylist()))
                named = rows.append_column(schema.field(UNIT_COLUMN), pa.repeat(names[-1], rows.num_rows))
                writer.write_table(named, row_group_size=ROW_GROUP_ROWS)
        folder.write_bytes(_file_name(number), sink.getvalue())
    sizes = [stop - start for _, _, start, stop in bounds]
    return PlannedUnits(out=out, names=names, sizes=sizes, rows_of=rows_of)


def find_planned(out: str, clip_ids: Collection[str], rows_of: Rows) -> list[dict[str, Any]]:
    """The planned rows of some clips of an artifact, as its workers got them; only ids are read of the others.

    Raises:
        InputError: the artifact has no plan (it was made from another dataset, or by older code).
    """
    folder = open_folder(out)
    names = folder.list_names(PLAN)
    if not names:
        raise InputError(f"{folder.uri} has no {PLAN}/: its rows were not made from files; look at what it was made of")
    wanted = pa.array(sorted(clip_ids), pa.large_string())
    tables = [
        folder.use_file(f"{PLAN}/{name}", lambda file: _rows_with(pq.ParquetFile(file), wanted)) for name in names
    ]
    return [dict(row) for table in tables for row in rows_of(table)]


def _rows_with(plan: pq.ParquetFile, clip_ids: pa.Array) -> pa.Table:
    """The rows of some clips; only ids are read of row groups that have none of them."""
    found = [plan.schema_arrow.empty_table()]
    for group in range(plan.num_row_groups):
        ids = plan.read_row_group(group, columns=["clip_id"])["clip_id"].cast(pa.large_string())
        here = pc.is_in(ids, value_set=clip_ids)  # pyright: ignore[reportAttributeAccessIssue]
        if pc.any(here).as_py():  # pyright: ignore[reportAttributeAccessIssue]
            found.append(plan.read_row_group(group).filter(here))
    return pa.concat_tables(found).drop_columns([UNIT_COLUMN])


def _bounds(splits: pa.ChunkedArray, unit_rows: int) -> Iterator[tuple[str, int, int, int]]:
    """(split, number in the split, first row, row after the last) of every unit."""
    lengths = {entry["values"]: entry["counts"] for entry in splits.value_counts().to_pylist()}
    first = 0
    for split in sorted(lengths):
        for number, start in enumerate(range(first, first + lengths[split], unit_rows)):
            yield split, number, start, min(start + unit_rows, first + lengths[split])
        first += lengths[split]


def _file_name(number: int) -> str:
    return f"{PLAN}/part-{number:06d}.parquet"
