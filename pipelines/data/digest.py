"""digest(dataset): sha256 over the rows sorted by key, of their logical values.

A row's hash is taken where the row is written and travels in the part's footer, so that the digest of a dataset of
any size costs a reading of footers.
"""

import hashlib
import json
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from pipelines.data.contracts import Contract
from pipelines.data.tables import column_to_numpy

ROW_HASHES = b"row_hashes"


def row_hashes(table: pa.Table, contract: Contract) -> list[tuple[str, str]]:
    """(key, sha256) of every row of a conforming table, in its order; columns that name a place are left out."""
    hashers = [hashlib.sha256() for _ in range(table.num_rows)]
    for column in contract.columns:
        if not column.in_digest:
            continue
        for hasher, value in zip(hashers, _value_bytes(table[column.name]), strict=True):
            hasher.update(column.name.encode() + b"\0" + len(value).to_bytes(8, "little") + value)
    keys = zip(*(table[k].to_pylist() for k in contract.key), strict=True)
    return [("\x1f".join(map(str, key)), h.hexdigest()) for key, h in zip(keys, hashers, strict=True)]


def _value_bytes(column: pa.ChunkedArray) -> Iterable[bytes]:
    if isinstance(column.type, pa.FixedShapeTensorType):
        values = column_to_numpy(column)
        return [np.ascontiguousarray(row).tobytes() for row in values]
    return [_canonical(value) for value in column.to_pylist()]


def _canonical(value: object) -> bytes:
    if isinstance(value, bytes):
        return b"b" + value
    if isinstance(value, list):
        return b"l" + b"".join(len(part).to_bytes(8, "little") + part for part in map(_canonical, value))
    return b"j" + json.dumps(value, sort_keys=True, ensure_ascii=False).encode()


def combine(hashes: Iterable[tuple[str, str]]) -> str:
    """Digest of a dataset from its rows' (key, hash), in any order."""
    total = hashlib.sha256()
    for key, value in sorted(hashes):
        total.update(f"{key}\t{value}\n".encode())
    return total.hexdigest()
