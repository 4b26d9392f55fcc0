"""Datasets that do not fit the code or each other are refused before anything is made of them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.tables import tensor_type
from pipelines.errors import ContractError
from pipelines.training.batches import RowGroups
from pipelines.training.objective import DataRef
from tests.feature_factory import write_pairs

Change = Callable[[pa.Table], pa.Table]


def with_another_column(table: pa.Table) -> pa.Table:
    return table.append_column("score", pa.array([0.0] * table.num_rows))


def with_another_type(table: pa.Table) -> pa.Table:
    index = table.column_names.index("margin")
    return table.set_column(index, "margin", table["margin"].cast(pa.float64()))


def with_another_shape(table: pa.Table) -> pa.Table:
    index = table.column_names.index("winner")
    wide = pa.array([[0.0] * 12] * table.num_rows, pa.list_(pa.float32(), 12))
    return table.set_column(index, "winner", pa.ExtensionArray.from_storage(tensor_type(pa.float32(), 3, 4), wide))


def without_a_column(table: pa.Table) -> pa.Table:
    return table.drop_columns(["seeds"])


def rewrite(folder: Path, change: Change) -> None:
    """Give the first part another schema, with a manifest that knows of it: other code wrote this round."""
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["parts"][0]
    path = folder / entry["path"]
    pq.write_table(change(pq.read_table(path)), path)
    entry |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (with_another_column, "column 'score' is unknown"),
        (with_another_type, "column 'margin' is double, not float"),
        (with_another_shape, r"column 'winner' is .*shape=\[3,4\].*, not .*shape=\[40,160\]"),
        (without_a_column, "column 'seeds' is missing"),
    ],
)
def test_fault_30_a_round_whose_schema_drifted_is_refused_with_the_difference(
    tmp_path: Path, change: Change, told: str
) -> None:
    folder = write_pairs(tmp_path / "pairs", num_kept=4, num_dropped=0)
    rewrite(folder, change)
    with pytest.raises(ContractError, match=told):
        RowGroups(DataRef(location=str(folder), contract="pairs", split=None, keep_column="kept"), ("winner", "loser"))
