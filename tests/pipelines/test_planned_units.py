import tempfile

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.planned_units import UNITS_PER_FILE, find_planned, write_plan
from pipelines.data.units import cut_units
from pipelines.errors import InputError


def rows_of(table: pa.Table) -> list[dict]:
    return table.to_pylist()


def plan_of(rows: list[dict]) -> pa.Table:
    ordered = sorted(rows, key=lambda row: (row["split"], row["clip_id"]))
    return pa.Table.from_pylist(
        ordered, pa.schema([("clip_id", pa.string()), ("split", pa.string()), ("n", pa.int64())])
    )


@given(
    st.lists(
        st.tuples(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), st.sampled_from(["train", "val"])),
        unique_by=lambda row: row[0],
        max_size=200,
    )
)
@settings(max_examples=30, deadline=None)
def test_the_units_of_a_plan_are_those_that_cutting_the_rows_gives(rows: list[tuple[str, str]]) -> None:
    listed = [{"clip_id": clip, "split": split, "n": i} for i, (clip, split) in enumerate(rows)]
    with tempfile.TemporaryDirectory() as out:
        planned = write_plan(out, plan_of(listed), rows_of)
        told = planned.for_workers()
        assert [told.unit(index) for index in range(len(planned.names))] == cut_units(listed)
        assert list(planned.names) == [unit.unit_id for unit in cut_units(listed)]
        assert list(planned.sizes) == [len(unit.rows) for unit in cut_units(listed)]


def test_a_long_plan_lies_in_several_files_and_one_clip_is_found_in_it(tmp_path) -> None:
    count = 64 * UNITS_PER_FILE + 70
    rows = [{"clip_id": f"c{i:06d}", "split": "train", "n": i} for i in range(count)]
    planned = write_plan(str(tmp_path), plan_of(rows), rows_of)
    assert len(list((tmp_path / "plan").iterdir())) == 2
    assert list(planned.sizes[-2:]) == [64, 6]
    assert planned.unit(UNITS_PER_FILE).rows[0] == rows[64 * UNITS_PER_FILE]
    assert find_planned(str(tmp_path), ["c004100", "c000003", "absent"], rows_of) == [rows[3], rows[4100]]


def test_an_artifact_without_a_plan_says_so(tmp_path) -> None:
    with pytest.raises(InputError, match="has no plan/"):
        find_planned(str(tmp_path), ["a"], rows_of)
