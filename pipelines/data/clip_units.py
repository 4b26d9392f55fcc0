"""Clips of a finished dataset cut into units that a worker can read: none across a row group, each row with its place.

Candidates are sampled, sounds are made worse and models are measured clip by clip from such units; each reads a clip
back by its place and id.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.contracts import REJECTS, Contract
from pipelines.data.store import Dataset
from pipelines.data.tables import column_to_numpy, reject_row, table_from_rows
from pipelines.data.units import Alive, Unit, unit_id
from pipelines.errors import MediaError

ROWS_PER_UNIT = 16
"""Clips committed together: what a kill can cost a worker, and the grain of sharing among workers."""


@dataclass(frozen=True, order=True)
class Place:
    """A row group: the path of its part, and its index there."""

    part: str
    row_group: int


def clip_places(features: Dataset, split: str) -> dict[Place, list[str]]:
    """The clip ids of every row group of a split, in the dataset's order."""
    return {
        Place(part.path, index): features.read_row_group(part, index, ["clip_id"])["clip_id"].to_pylist()
        for part in features.parts
        if part.split == split
        for index in range(len(part.row_groups))
    }


def draw_clips(clip_ids: Sequence[str], count: int | None, lot: Callable[[str], int]) -> set[str]:
    """The `count` clips of the lowest lots, or all of them."""
    return set(clip_ids) if count is None else set(sorted(clip_ids, key=lot)[:count])


def sampled_units(features: Dataset, split: str, count: int | None, lot: Callable[[str], int]) -> list[Unit]:
    """Units of the `count` clips of a split with the lowest lots, or of all; a function of its arguments alone."""
    places = clip_places(features, split)
    every = [clip_id for members in places.values() for clip_id in members]
    return cut_places(places, draw_clips(every, count, lot), split)


def cut_places(
    places: Mapping[Place, Sequence[str]],
    chosen: Collection[str],
    split: str,
    more: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Unit]:
    """Units of the chosen clips; a row is clip_id, part and row_group, and what `more` has for the clip."""
    units: list[Unit] = []
    for place, clip_ids in places.items():
        mine = sorted(set(clip_ids).intersection(chosen))
        for start in range(0, len(mine), ROWS_PER_UNIT):
            members = mine[start : start + ROWS_PER_UNIT]
            rows = tuple({"clip_id": clip_id, **vars(place), **(more or {}).get(clip_id, {})} for clip_id in members)
            units.append(Unit(unit_id=unit_id(split, len(units), members), split=split, rows=rows))
    return units


def row_group_units(features: Dataset, more: Mapping[str, Mapping[str, Any]] | None = None) -> list[Unit]:
    """A unit for every row group of every split, its clips in stored order; rows as those of `cut_places`.

    For work that is cheap a clip: as many parts come out as went in.
    """
    units: list[Unit] = []
    for part in features.parts:
        for index in range(len(part.row_groups)):
            clip_ids = features.read_row_group(part, index, ["clip_id"])["clip_id"].to_pylist()
            place, split = vars(Place(part.path, index)), str(part.split)
            rows = tuple({"clip_id": clip_id, **place, **(more or {}).get(clip_id, {})} for clip_id in clip_ids)
            units.append(Unit(unit_id=unit_id(split, len(units), clip_ids), split=split, rows=rows))
    return units


class ClipReader:
    """Reads clips of a dataset by place and id."""

    def __init__(self, features: Dataset) -> None:
        self._features = features
        self._parts = {part.path: part for part in features.parts}

    def read(self, place: Place, clip_ids: Collection[str], columns: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Some clips of one row group by id; tensors as numpy arrays of their own, the rest as Python values."""
        table = self._features.read_row_group(self._parts[place.part], place.row_group, columns)
        # An extension array cannot be filtered: rows are taken by slices.
        chosen = [i for i, clip_id in enumerate(table["clip_id"].to_pylist()) if clip_id in clip_ids]
        return {row["clip_id"]: row for row in (_row(table.slice(index, 1)) for index in chosen)}

    def read_unit(self, unit: Unit, columns: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The clips of a unit, which lie in one row group, by id."""
        first = unit.rows[0]
        place = Place(first["part"], first["row_group"])
        return self.read(place, {row["clip_id"] for row in unit.rows}, columns)

    def rows_and_rejects(
        self,
        unit: Unit,
        columns: Sequence[str],
        row_of: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]],
        *,
        contract: Contract,
        stage: str,
        alive: Alive,
    ) -> tuple[pa.Table, pa.Table]:
        """Each clip of a unit becomes a row of `contract`, or a reject of `stage` where that raises MediaError.

        `row_of` gets what the unit says of the clip, then the clip's columns.
        """
        clips = self.read_unit(unit, columns)
        rows, rejects = [], []
        for wanted in unit.rows:
            clip = clips[wanted["clip_id"]]
            try:
                rows.append(row_of(wanted, clip))
            except MediaError as error:
                rejects.append(reject_row(clip, stage, error))
            alive()
        spec = self._features.spec
        return table_from_rows(rows, contract, spec), table_from_rows(rejects, REJECTS, spec)


def _row(one: pa.Table) -> dict[str, Any]:
    return {
        name: np.array(column_to_numpy(one[name])[0])
        if isinstance(one[name].type, pa.FixedShapeTensorType)
        else one[name][0].as_py()
        for name in one.column_names
    }
