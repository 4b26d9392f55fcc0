import numpy as np
import pyarrow as pa
import pytest

from pipelines.data.contracts import CONTRACTS, FEATURES, PAIRS, REJECTS
from pipelines.data.tables import column_to_numpy, conform, table_from_rows, tensor_column
from pipelines.errors import ContractError
from tests.pipelines.row_factory import TINY, make_row


@pytest.mark.parametrize("name", sorted(CONTRACTS))
def test_rows_of_every_contract_conform_and_keep_their_values(name: str) -> None:
    contract = CONTRACTS[name]
    rows = [make_row(contract, f"clip {i}", seed=i) for i in range(3)]
    table = table_from_rows(rows, contract, TINY)
    assert table.schema.metadata[b"contract"] == f"{name}/{contract.version}".encode()
    for field in table.schema:
        if isinstance(field.type, pa.FixedShapeTensorType):
            assert np.array_equal(column_to_numpy(table[field.name]), np.stack([r[field.name] for r in rows]))


def test_a_breach_names_the_column_and_the_clip() -> None:
    bad = make_row(FEATURES, "clip b")
    bad["latent_mean"][3, 4] = np.nan
    with pytest.raises(ContractError, match=r"'latent_mean' is not finite in clip 'clip b'"):
        table_from_rows([make_row(FEATURES, "clip a"), bad], FEATURES, TINY)
    for name, value in (("loudness_lufs", -np.inf), ("cuts_s", [1.0, np.nan])):
        loud = make_row(FEATURES, "clip h")
        loud["measures"][name] = value
        with pytest.raises(ContractError, match=r"'measures' is not finite in clip 'clip h'"):
            table_from_rows([loud], FEATURES, TINY)
    short = make_row(FEATURES, "clip c")
    short["sync_features"] = short["sync_features"][:-1]
    with pytest.raises(ContractError, match=r"'sync_features' of clip 'clip c' has shape \(39, 576\)"):
        table_from_rows([short], FEATURES, TINY)
    gone = make_row(FEATURES, "clip d")
    gone["caption"] = None
    with pytest.raises(ContractError, match=r"'caption' is null in clip 'clip d'"):
        table_from_rows([gone], FEATURES, TINY)
    with pytest.raises(ContractError, match=r"'split' of clip 'clip e' is 'dev'"):
        table_from_rows([make_row(FEATURES, "clip e", split="dev")], FEATURES, TINY)
    reject = make_row(REJECTS, "clip f") | {"reason": "bored"}
    with pytest.raises(ContractError, match="'reason' of clip 'clip f' is 'bored'"):
        table_from_rows([reject], REJECTS, TINY)
    lacking = make_row(PAIRS, "clip g")
    del lacking["kept"]
    with pytest.raises(ContractError, match="'kept' is missing in clip 'clip g'"):
        table_from_rows([lacking], PAIRS, TINY)


def test_a_key_may_occur_once() -> None:
    row = make_row(FEATURES, "twin")
    with pytest.raises(ContractError, match="twin"):
        table_from_rows([row, row], FEATURES, TINY)


def test_unknown_columns_and_other_types_are_refused() -> None:
    table = table_from_rows([make_row(FEATURES, "a")], FEATURES, TINY)
    with pytest.raises(ContractError, match="unknown columns \\['extra'\\]"):
        conform(table.append_column("extra", pa.array([1])), FEATURES, TINY)
    index = table.schema.get_field_index("start_s")
    with pytest.raises(ContractError, match="'start_s' is int64, expected double"):
        conform(table.set_column(index, "start_s", pa.array([1])), FEATURES, TINY)


def test_tensor_columns_keep_shape_and_type() -> None:
    values = np.random.default_rng(0).standard_normal((3, 2, 5)).astype(np.float16)
    column = tensor_column(values)
    assert column.type.shape == [2, 5]
    assert np.array_equal(column_to_numpy(column), values)
