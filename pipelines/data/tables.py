"""Tables that keep a contract: from rows and tensors to conforming Arrow tables, and back to arrays."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from models.spec import ClipSpec
from pipelines.data.contracts import REJECT_REASONS, SPLITS, Contract, tensor_type
from pipelines.errors import ContractError, MediaError


def tensor_column(values: np.ndarray) -> pa.FixedShapeTensorArray:
    """[B, ...] float16 or float32 array -> a tensor column of B rows."""
    shape = values.shape[1:]
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    storage = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(shape)))
    return pa.ExtensionArray.from_storage(tensor_type(pa.from_numpy_dtype(values.dtype), *shape), storage)


def column_to_numpy(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A tensor column of B rows -> [B, ...] array of its dtype."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    if len(array) == 0:
        return np.zeros((0, *array.type.shape), array.type.value_type.to_pandas_dtype())
    return array.to_numpy_ndarray()


def table_from_rows(rows: Iterable[dict], contract: Contract, spec: ClipSpec) -> pa.Table:
    """Rows as dictionaries (tensor values as numpy arrays) -> a conforming table; may be empty.

    Raises:
        ContractError: a value does not fit its column; names the column and the clip.
    """
    rows = list(rows)
    schema = contract.schema(spec)
    arrays = []
    for field in schema:
        absent = [row for row in rows if field.name not in row]
        if absent:
            raise ContractError(f"{contract.name}: column '{field.name}' is missing in clip '{_name(absent[0])}'")
        arrays.append(_column_array([row[field.name] for row in rows], field, contract, rows))
    return conform(pa.Table.from_arrays(arrays, schema=schema), contract, spec)


def _column_array(values: list, field: pa.Field, contract: Contract, rows: list[dict]) -> pa.Array:
    kind = field.type
    if not isinstance(kind, pa.FixedShapeTensorType):
        try:
            return pa.array(values, kind)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            names = [_name(row) for row in rows]
            raise ContractError(f"{contract.name}: column '{field.name}' of clips {names[:3]}: {error}") from error
    dtype = kind.value_type.to_pandas_dtype()
    for value, row in zip(values, rows, strict=True):
        if value is None or tuple(np.shape(value)) != tuple(kind.shape):
            raise ContractError(
                f"{contract.name}: column '{field.name}' of clip '{_name(row)}' has shape "
                f"{None if value is None else tuple(np.shape(value))}, expected {tuple(kind.shape)}"
            )
    stacked = np.stack([np.asarray(v, dtype) for v in values]) if values else np.zeros((0, *kind.shape), dtype)
    return tensor_column(stacked)


def _name(row: dict) -> str:
    return str(row.get("clip_id", "?"))


def reject_row(clip: Mapping[str, Any], stage: str, error: MediaError, *, attempts: int = 1) -> dict[str, Any]:
    """The rejects row of a clip (its `clip_id` and `source`) that a stage could not use."""
    return {
        "clip_id": clip["clip_id"],
        "stage": stage,
        "source": clip["source"],
        "reason": error.reason,
        "detail": error.detail,
        "attempts": attempts,
    }


def conform(table: pa.Table, contract: Contract, spec: ClipSpec) -> pa.Table:
    """Return `table` with exactly the contract's columns, order and types, or raise.

    Checks names, dtypes, tensor shapes, nulls, finiteness of floats, uniqueness of the key and the closed lists.

    Raises:
        ContractError: naming the column, and the clip where a value is at fault.
    """
    schema = contract.schema(spec)
    missing = [n for n in schema.names if n not in table.column_names]
    unknown = [n for n in table.column_names if n not in schema.names]
    if missing or unknown:
        raise ContractError(f"{contract.name}: missing columns {missing}, unknown columns {unknown}")
    for field in schema:
        column = table[field.name]
        if column.type != field.type:
            raise ContractError(f"{contract.name}: column '{field.name}' is {column.type}, expected {field.type}")
        if not field.nullable and column.null_count:
            at = column.to_pylist().index(None)
            raise ContractError(f"{contract.name}: column '{field.name}' is null in clip '{_clip(table, at)}'")
        _check_finite(table, field, contract)
    _check_key(table, contract)
    for name, allowed in (("split", SPLITS), ("reason", REJECT_REASONS)):
        if name in schema.names:
            for at, value in enumerate(table[name].to_pylist()):
                if value not in allowed:
                    raise ContractError(
                        f"{contract.name}: column '{name}' of clip '{_clip(table, at)}' is '{value}', "
                        f"expected one of {allowed}"
                    )
    return table.select(schema.names).replace_schema_metadata(schema.metadata)


def _clip(table: pa.Table, index: int) -> str:
    return str(table["clip_id"][index].as_py()) if "clip_id" in table.column_names else str(index)


def _check_finite(table: pa.Table, field: pa.Field, contract: Contract) -> None:
    column = table[field.name]
    if isinstance(field.type, pa.FixedShapeTensorType):
        values = column_to_numpy(column)
        bad = ~np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
    elif pa.types.is_floating(field.type):
        bad = ~np.isfinite(column.fill_null(0.0).to_numpy())
    elif pa.types.is_struct(field.type):
        bad = ~np.array([_is_finite(value) for value in column.to_pylist()], bool)
    else:
        return
    if bad.any():
        clip = _clip(table, int(np.argmax(bad)))
        raise ContractError(f"{contract.name}: column '{field.name}' is not finite in clip '{clip}'")


def _is_finite(value: object) -> bool:
    """Whether every float in a nested value is finite; nulls are a matter of the schema."""
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _check_key(table: pa.Table, contract: Contract) -> None:
    keys = list(zip(*(table[k].to_pylist() for k in contract.key), strict=True))
    if len(set(keys)) != len(keys):
        seen: set = set()
        for key in keys:
            if key in seen:
                raise ContractError(f"{contract.name}: key {key} occurs twice in one part")
            seen.add(key)
